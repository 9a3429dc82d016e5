"""Weights out of ncnn's files: ``.param`` (text, the list of layers) and ``.bin`` (the weights one after the other).

ncnn's own documentation of the format: "param and model file structure" and "operation-param-weight-table". Read are
the layers of which image networks are made; anything else that could hold weights is refused, for nothing behind it
could be found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Layer", "by_order", "numbered", "read_param", "read_weights"]

_MAGIC = "7767517"
_HALF, _RAW = 0x01306B47, (0, 0x0002C056)  # the tag ahead of a weight: float16, or float32 as it is

# Layers without weights.
_PLAIN = frozenset(
    "BinaryOp Concat Crop Eltwise Input Interp PixelShuffle Pooling ReLU Scale Sigmoid Split Swish UnaryOp".split()
)
_FROM_INPUT = -233  # a Scale's size where its factors are an input and no weight


@dataclass(frozen=True)
class Layer:
    """A line of a ``.param`` file; ``options`` by ncnn's numbers, their values as they are written."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: Mapping[int, str]

    def number(self, key: int, default: int = 0) -> int:
        return int(self.options.get(key, default))


def read_param(text: str) -> tuple[Layer, ...]:
    """The layers of a ``.param`` file in their order. ValueError, which says why, where it is none."""
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if not lines or lines[0] != [_MAGIC]:
        raise ValueError(f"its first line is not {_MAGIC}: no text of ncnn's layers")
    try:
        count = int(lines[1][0])
        layers = tuple(_layer(words) for words in lines[2:])
    except (IndexError, ValueError) as error:
        raise ValueError(f"its lines are damaged: {error}") from error
    if len(layers) != count:
        raise ValueError(f"it has {len(layers)} layers and announces {count}")
    return layers


def _layer(words: Sequence[str]) -> Layer:
    ends = 4 + int(words[2])
    names, pairs = words[ends : ends + int(words[3])], words[ends + int(words[3]) :]
    options = dict(pair.split("=", 1) for pair in pairs)
    return Layer(words[0], words[1], tuple(words[4:ends]), tuple(names), {int(k): v for k, v in options.items()})


class _Reader:
    """Little-endian numbers one after the other; ValueError where they end too early."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def plain(self, count: int, dtype: str = "<f4") -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        if count < 0 or size > self.left:
            raise ValueError(f"{size} bytes expected at {self._at}, {self.left} are left")
        values = np.frombuffer(self._data, dtype, count, self._at)
        self._at += -(-size // 4) * 4  # float16 is padded
        return values.astype(np.float32)

    def tagged(self, count: int, layer: Layer) -> np.ndarray:
        at = self._at
        if self.left < 4:
            raise ValueError(f"it ends at {layer.kind} {layer.name}")
        tag = int.from_bytes(self._data[at : at + 4], "little")
        self._at += 4
        if tag == _HALF:
            return self.plain(count, "<f2")
        if tag in _RAW:
            return self.plain(count)
        raise ValueError(f"{layer.kind} {layer.name} has the tag {tag:#010x}: quantised weights are not read")


def read_weights(layers: Sequence[Layer], data: bytes) -> tuple[tuple[Layer, dict[str, np.ndarray]], ...]:
    """The layers that have weights, and these in float32 with torch's names and shapes: ``weight`` and ``bias`` of
    Convolution (out, in, kh, kw), Deconvolution (in, out, kh, kw) and InnerProduct (out, in), ``weight`` of PReLU (n,),
    ``data`` of MemoryData (c, h, w), without what it does not have.

    ValueError where the data do not fit the layers to the last byte.
    """
    reader, found = _Reader(data), []
    for layer in layers:
        arrays = _weights(layer, reader)
        if arrays:
            found.append((layer, arrays))
    if reader.left:
        raise ValueError(f"{reader.left} bytes are left behind the last layer")
    return tuple(found)


def _weights(layer: Layer, reader: _Reader) -> dict[str, np.ndarray]:
    n = layer.number
    if layer.kind in ("Convolution", "Deconvolution"):
        out, width = n(0), n(1)
        height = n(11, width)
        weight = reader.tagged(n(6), layer)
        if min(out, width, height) < 1 or weight.size % (out * width * height):
            raise ValueError(f"{layer.kind} {layer.name}: {weight.size} weights, kernels of {out}x{height}x{width}")
        weight = weight.reshape(out, -1, height, width)
        if layer.kind == "Deconvolution":
            weight = weight.transpose(1, 0, 2, 3)
        return {"weight": weight, "bias": reader.plain(out)} if n(5) else {"weight": weight}
    if layer.kind == "InnerProduct":
        weight = reader.tagged(n(2), layer).reshape(n(0), -1)
        return {"weight": weight, "bias": reader.plain(n(0))} if n(1) else {"weight": weight}
    if layer.kind == "PReLU":
        return {"weight": reader.plain(n(0))}
    if layer.kind == "MemoryData":
        shape = [size for size in (n(2), n(1), n(0)) if size]
        return {"data": reader.plain(math.prod(shape)).reshape(shape)}
    if layer.kind not in _PLAIN or (layer.kind == "Scale" and n(0) != _FROM_INPUT):
        raise ValueError(f"layers of the kind {layer.kind} are not read ({layer.name})")
    return {}


def numbered(layers: Sequence[Layer], data: bytes) -> dict[str, Tensor]:
    """`read_weights` under the names ``0.weight``, ``0.bias``, ``1.weight``, ...: layers have no better ones. Constants
    (MemoryData) are left out, networks have theirs."""
    found = [arrays for _, arrays in read_weights(layers, data) if "weight" in arrays]
    return {f"{i}.{key}": torch.from_numpy(a.copy()) for i, arrays in enumerate(found) for key, a in arrays.items()}


def by_order(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of ``network`` from `numbered` tensors: both name their layers in the order of the computation.

    A dense layer may be a 1x1 convolution here. ValueError where numbers, names or sizes differ.
    """
    modules = [(name, m) for name, m in network.named_modules() if isinstance(m, _WEIGHTED)]
    numbers = {int(key.split(".")[0]) for key in state}
    if numbers != set(range(len(modules))):
        raise ValueError(f"{len(numbers)} layers with weights, expected {len(modules)}")
    named = {}
    for i, (name, module) in enumerate(modules):
        found = {key.split(".", 1)[1]: t for key, t in state.items() if key.startswith(f"{i}.")}
        own = module.state_dict()
        shapes = [{key: tuple(t.shape) for key, t in d.items()} for d in (found, own)]
        cut = [{key: [n for n in shape if n != 1] for key, shape in d.items()} for d in shapes]
        if cut[0] != cut[1]:
            raise ValueError(f"layer {i} has {shapes[0]}, expected {shapes[1]} ({name})")
        named.update({f"{name}.{key}": t.reshape(own[key].shape) for key, t in found.items()})
    return named


_WEIGHTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.PReLU)
