"""An interpreter of ncnn's layers, one of torch's functions for each: what the networks are held against.

It knows nothing of `cnnfast.generators`, and takes the graph from the ``.param`` file alone.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cnnfast.generators.ncnn import Layer, read_param, read_weights


def run(param: str, data: bytes, x: Tensor) -> Tensor:
    """The last layer's result for the one input ``x``."""
    layers = read_param(param)
    weights = {
        layer.name: {k: torch.from_numpy(np.array(a)) for k, a in w.items()} for layer, w in read_weights(layers, data)
    }
    values: dict[str, Tensor] = {}
    for layer in layers:
        if layer.kind == "Input":
            result = x
        else:
            result = _layer(layer, [values[name] for name in layer.inputs], weights.get(layer.name, {}))
        for name in layer.outputs:
            values[name] = result
    return result


def _activated(x: Tensor, layer: Layer) -> Tensor:
    kind = layer.number(9)
    if kind == 2:
        return F.leaky_relu(x, float(layer.options[-23310].split(",")[1]))
    return {0: lambda y: y, 1: torch.relu, 4: torch.sigmoid}[kind](x)


def _layer(layer: Layer, x: list[Tensor], w: dict[str, Tensor]) -> Tensor:
    n = layer.number
    kind = layer.kind
    if kind == "Convolution":
        return _activated(F.conv2d(x[0], w["weight"], w.get("bias"), n(3, 1), n(4), n(2, 1)), layer)
    if kind == "Deconvolution":
        return _activated(F.conv_transpose2d(x[0], w["weight"], w.get("bias"), n(3, 1), n(4)), layer)
    if kind == "InnerProduct":
        return _activated(F.linear(x[0], w["weight"], w.get("bias")), layer)
    if kind == "Pooling":
        assert n(4) and n(0) == 1  # global, average
        return x[0].mean((2, 3))
    if kind == "Scale":
        return x[0] * x[1][:, :, None, None]
    if kind == "Crop":
        h, wd = x[1].shape[-2:]
        return x[0][..., n(1) : n(1) + h, n(0) : n(0) + wd]
    if kind == "Eltwise":
        assert n(0) == 1  # a sum
        factors = layer.options.get(-23301)
        a, b = [float(f) for f in factors.split(",")[1:]] if factors else (1.0, 1.0)
        return a * x[0] + b * x[1]
    if kind == "BinaryOp":
        other = x[1] if len(x) > 1 else float(layer.options[2])
        return {0: torch.add, 1: torch.sub, 2: torch.mul, 3: torch.div}[n(0)](x[0], other)
    if kind == "PReLU":
        return F.prelu(x[0], w["weight"])
    if kind == "MemoryData":
        return w["data"]
    if kind == "Concat":
        return torch.cat(x, 1)
    if kind == "Interp":
        assert n(0) == 1  # nearest
        return F.interpolate(x[0], scale_factor=float(layer.options[1]), mode="nearest")
    return {
        "Split": lambda y: y,
        "Sigmoid": torch.sigmoid,
        "Swish": F.silu,
        "PixelShuffle": lambda y: F.pixel_shuffle(y, n(0)),
    }[kind](x[0])
