"""A chain of `torch.nn` modules as an ONNX model, built by hand (the exporter asks for packages that this does not)."""

from __future__ import annotations

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

__all__ = ["to_onnx"]

OPSET, IR_VERSION = 17, 8  # both read by every onnxruntime and OpenVINO of the last years


def to_onnx(modules: nn.Sequential, input_shape: tuple[int, int, int, int]) -> bytes:
    """``modules`` (eval mode, any floating dtype) -> a serialised model from ``x`` (N, C, H, W) to ``y``, in float32.

    Weights are widened to float32, which changes no value. ValueError for a module that has no translation.
    """
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, value: torch.Tensor) -> str:
        constants.append(numpy_helper.from_array(value.detach().float().contiguous().numpy(), name))
        return name

    current = "x"
    for i, m in enumerate(modules):
        attributes: dict[str, object] = {}
        inputs = [current]
        if isinstance(m, nn.ConvTranspose2d | nn.Conv2d):
            if m.padding_mode != "zeros" or isinstance(m.padding, str):
                raise ValueError(f"padding {m.padding!r} in mode {m.padding_mode!r} has no translation to ONNX")
            op = "ConvTranspose" if isinstance(m, nn.ConvTranspose2d) else "Conv"
            attributes = {
                "kernel_shape": list(m.kernel_size),
                "strides": list(m.stride),
                "pads": [*m.padding, *m.padding],
                "dilations": list(m.dilation),
                "group": m.groups,
            }
            if isinstance(m, nn.ConvTranspose2d):
                attributes["output_padding"] = list(m.output_padding)
            inputs.append(constant(f"weight{i}", m.weight))
            if m.bias is not None:
                inputs.append(constant(f"bias{i}", m.bias))
        elif isinstance(m, nn.BatchNorm2d):
            op, attributes = "BatchNormalization", {"epsilon": m.eps}
            vectors = {"scale": m.weight, "shift": m.bias, "mean": m.running_mean, "var": m.running_var}
            for name, v in vectors.items():
                if v is None:
                    raise ValueError(f"a BatchNorm2d without {name} has no translation to ONNX")
                inputs.append(constant(f"{name}{i}", v))
        elif isinstance(m, nn.Upsample) and m.mode == "nearest":
            op = "Resize"
            attributes = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
            inputs += ["", constant(f"scales{i}", torch.tensor([1.0, 1.0, m.scale_factor, m.scale_factor]))]
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
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "C", "H", "W"])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model.SerializeToString()
