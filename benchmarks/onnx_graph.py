"""A chain of `torch.nn` modules as an ONNX model, built by hand (the exporter asks for packages that this does not)."""

from __future__ import annotations

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from .case import BATCH_NORMS, CONVOLUTIONS, LIVE_NORMS, TRANSPOSED

__all__ = ["to_onnx"]

OPSET, IR_VERSION = 17, 8  # both read by every onnxruntime and OpenVINO of the last years


def to_onnx(modules: nn.Sequential, input_shape: tuple[int, ...]) -> bytes:
    """``modules`` (eval mode, any floating dtype) -> a serialised model from ``x`` (N, C, H, W) or (N, C, L) to ``y``,
    in float32.

    Weights are widened to float32, which changes no value. ValueError for a module that has no translation.
    """
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, value: torch.Tensor, dtype: torch.dtype = torch.float32) -> str:
        constants.append(numpy_helper.from_array(value.detach().to(dtype).contiguous().numpy(), name))
        return name

    current = "x"
    for i, m in enumerate(modules):
        attributes: dict[str, object] = {}
        inputs = [current]
        if isinstance(m, CONVOLUTIONS):
            transposed = isinstance(m, TRANSPOSED)
            if m.padding_mode not in ("zeros", "reflect") or isinstance(m.padding, str):
                raise ValueError(f"padding {m.padding!r} in mode {m.padding_mode!r} has no translation to ONNX")
            padding = list(m.padding)
            if m.padding_mode == "reflect":
                ends = torch.tensor([0, 0, *padding] * 2)
                pads = [current, constant(f"pads{i}", ends, torch.int64)]
                nodes.append(helper.make_node("Pad", pads, [f"padded{i}"], mode="reflect"))
                inputs, padding = [f"padded{i}"], [0] * len(padding)
            op = "ConvTranspose" if transposed else "Conv"
            attributes = {
                "kernel_shape": list(m.kernel_size),
                "strides": list(m.stride),
                "pads": [*padding, *padding],
                "dilations": list(m.dilation),
                "group": m.groups,
            }
            if transposed:
                attributes["output_padding"] = list(m.output_padding)
            inputs.append(constant(f"weight{i}", m.weight))
            if m.bias is not None:
                inputs.append(constant(f"bias{i}", m.bias))
        elif isinstance(m, BATCH_NORMS):
            op, attributes = "BatchNormalization", {"epsilon": m.eps}
            vectors = {"scale": m.weight, "shift": m.bias, "mean": m.running_mean, "var": m.running_var}
            for name, v in vectors.items():
                if v is None:
                    raise ValueError(f"a {type(m).__name__} without {name} has no translation to ONNX")
                inputs.append(constant(f"{name}{i}", v))
        elif isinstance(m, LIVE_NORMS) and m.running_mean is None:
            op, attributes = "InstanceNormalization", {"epsilon": m.eps}
            inputs.append(constant(f"scale{i}", torch.ones(m.num_features) if m.weight is None else m.weight))
            inputs.append(constant(f"shift{i}", torch.zeros(m.num_features) if m.bias is None else m.bias))
        elif isinstance(m, nn.Upsample) and m.mode == "nearest":
            op = "Resize"
            attributes = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
            scales = [1.0, 1.0, *[float(m.scale_factor)] * (len(input_shape) - 2)]  # type: ignore[arg-type]
            inputs += ["", constant(f"scales{i}", torch.tensor(scales))]
        elif isinstance(m, nn.PixelShuffle):
            op, attributes = "DepthToSpace", {"blocksize": m.upscale_factor, "mode": "CRD"}
        elif isinstance(m, nn.PReLU):
            op = "PRelu"
            inputs.append(constant(f"slope{i}", m.weight.reshape(-1, *[1] * (len(input_shape) - 2))))
        elif isinstance(m, nn.LeakyReLU):
            op, attributes = "LeakyRelu", {"alpha": m.negative_slope}
        elif isinstance(m, nn.ReLU | nn.Tanh | nn.Sigmoid):
            op = {nn.ReLU: "Relu", nn.Tanh: "Tanh", nn.Sigmoid: "Sigmoid"}[type(m)]
        else:
            raise ValueError(f"{m} has no translation to ONNX")
        output = "y" if i == len(modules) - 1 else f"t{i}"
        nodes.append(helper.make_node(op, inputs, [output], **attributes))
        current = output
    graph = helper.make_graph(
        nodes,
        "modules",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(input_shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"y{k}" for k in range(len(input_shape))])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model.SerializeToString()
