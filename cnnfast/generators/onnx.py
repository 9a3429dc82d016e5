"""Weights out of ONNX files, which are protocol buffers: the nodes of a graph and its constants.

Followed are ``onnx.proto`` (https://github.com/onnx/onnx) and protobuf's own description of its encoding. Read is what
a network's weights need: dense tensors inside the file. Subgraphs, functions and external data are not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Graph", "Node", "numbered", "read_graph", "weights"]

# TensorProto.DataType -> how raw_data holds it. Others (strings, complex numbers, bfloat16, 4 and 8 bits) are refused.
_DTYPES = {1: "<f4", 2: "|u1", 3: "|i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "|b1", 10: "<f2", 11: "<f8"}
_EXTERNAL = 1


@dataclass(frozen=True)
class Node:
    """A node of the graph; ``options``: of its attributes those that are one whole number."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: Mapping[str, int]


@dataclass(frozen=True)
class Graph:
    """``nodes`` in their order, which is one of computation, and ``constants``: initialisers by their names, and what
    Constant nodes give."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, np.ndarray]


# --- protobuf ---------------------------------------------------------------------------------------------------------

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # kinds of fields on the wire
_Value = int | bytes


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(an unsigned number of up to 64 bits, what follows it)."""
    value = 0
    for i in range(10):
        if at + i >= len(data):
            raise ValueError(f"it ends inside a number at {at}")
        value |= (data[at + i] & 0x7F) << 7 * i
        if data[at + i] < 0x80:
            return value & 2**64 - 1, at + i + 1
    raise ValueError(f"no number ends at {at}")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _fields(data: bytes) -> Iterator[tuple[int, _Value]]:
    """(number, value) of a message's fields: whole numbers as they are, everything else as its bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_EIGHT, _FOUR):
            size = 8 if kind == _EIGHT else 4
        else:
            raise ValueError(f"at {at} is a field of the kind {kind}: no ONNX file, or a damaged one")
        if size > len(data) - at:
            raise ValueError(f"{size} bytes expected at {at}, {len(data) - at} are left")
        yield tag >> 3, data[at : at + size]
        at += size


def _message(data: bytes) -> dict[int, list[_Value]]:
    found: dict[int, list[_Value]] = defaultdict(list)
    for number, value in _fields(data):
        found[number].append(value)
    return found


def _bytes(values: list[_Value]) -> list[bytes]:
    if not all(isinstance(value, bytes) for value in values):
        raise ValueError("a number is where a message or text is expected")
    return values  # type: ignore[return-value]


def _text(values: list[_Value]) -> str:
    return b"".join(_bytes(values[-1:])).decode("utf-8", "replace")


def _numbers(values: list[_Value]) -> list[int]:
    """Repeated whole numbers: one a field, or packed."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(_signed(value))
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            found.append(_signed(number))
    return found


# --- ONNX -------------------------------------------------------------------------------------------------------------


def read_graph(data: bytes) -> Graph:
    """The graph of a model. ValueError, which says why, where the bytes are none."""
    graphs = _bytes(_message(data)[7])
    if len(graphs) != 1:
        raise ValueError(f"it has {len(graphs)} graphs: no ONNX model")
    graph = _message(graphs[0])
    constants = dict(_tensor(part) for part in _bytes(graph[5]))
    nodes = []
    for part in _bytes(graph[1]):
        node, tensors = _node(part)
        nodes.append(node)
        if node.kind == "Constant" and node.outputs and "value" in tensors:
            constants[node.outputs[0]] = tensors["value"]
    return Graph(tuple(nodes), constants)


def _node(data: bytes) -> tuple[Node, dict[str, np.ndarray]]:
    m = _message(data)
    options, tensors = {}, {}
    for part in _bytes(m[5]):
        attribute = _message(part)
        name = _text(attribute[1])
        if attribute[5]:
            tensors[name] = _tensor(_bytes(attribute[5])[-1])[1]
        elif attribute[20] in ([], [2]):  # AttributeProto.INT; a zero need not be written
            options[name] = (_numbers(attribute[3]) or [0])[-1]
    inputs, outputs = (tuple(_text([name]) for name in m[k]) for k in (1, 2))
    return Node(_text(m[4]), _text(m[3]), inputs, outputs, options), tensors


def _tensor(data: bytes) -> tuple[str, np.ndarray]:
    """(name, values)."""
    m = _message(data)
    name, shape, kind = _text(m[8]), _numbers(m[1]), (_numbers(m[2]) or [0])[-1]
    if kind not in _DTYPES:
        raise ValueError(f"the tensor {name} is of the kind {kind}: those are not read")
    if _numbers(m[14])[-1:] == [_EXTERNAL]:
        raise ValueError(f"the tensor {name} lies in a file of its own: those are not read")
    dtype = np.dtype(_DTYPES[kind])
    if m[9]:
        raw = _bytes(m[9])[-1]
        if len(raw) % dtype.itemsize:
            raise ValueError(f"the tensor {name} has {len(raw)} bytes, in numbers of {dtype.itemsize}")
        values = np.frombuffer(raw, dtype)
    elif kind in (1, 11):
        typed = b"".join(_bytes(m[4 if kind == 1 else 10]))
        values = np.frombuffer(typed[: len(typed) // dtype.itemsize * dtype.itemsize], dtype)
    elif kind == 10:  # half precision as its bits
        values = np.array(_numbers(m[5]), np.int64).astype("<u2").view(dtype)
    else:
        values = np.array(_numbers(m[7 if kind == 7 else 5]), np.int64).astype(dtype)
    if min(shape, default=1) < 0 or values.size != math.prod(shape):
        raise ValueError(f"the tensor {name} has {values.size} values, its shape is {tuple(shape)}")
    return name, values.reshape(shape)


# --- weights ----------------------------------------------------------------------------------------------------------


def weights(graph: Graph) -> dict[str, np.ndarray]:
    """The constants that are floats, and what DequantizeLinear nodes make of constants under the name of their result,
    all in float32: ``(x - zero) * scale``, both one number or, along ``axis``, one for each channel. ValueError where
    they do not fit."""
    found = {k: a.astype(np.float32) for k, a in graph.constants.items() if a.dtype.kind == "f"}
    for node in graph.nodes:
        if node.kind == "DequantizeLinear" and node.outputs and node.inputs[:1] and node.inputs[0] in graph.constants:
            found[node.outputs[0]] = _dequantised(node, graph.constants)
    return found


def _dequantised(node: Node, constants: Mapping[str, np.ndarray]) -> np.ndarray:
    try:
        x, *others = (constants[name] for name in node.inputs if name)
        scale, zero = (others + [np.zeros((), x.dtype)])[:2]
        if scale.ndim == 1 and scale.size > 1:
            axis = node.options.get("axis", 1)
            shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
            scale, zero = scale.reshape(shape), zero.reshape(shape if zero.size > 1 else [1] * x.ndim)
        # In float64: an int32 has more bits than float32.
        result = (x.astype(np.float64) - zero.astype(np.float64)) * scale.astype(np.float64)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{node.kind} {node.name} does not fit its constants: {error}") from error
    if result.shape != x.shape:
        raise ValueError(f"{node.kind} {node.name} makes {result.shape} of {x.shape}")
    return result.astype(np.float32)


def numbered(graph: Graph) -> dict[str, Tensor]:
    """Weights and biases of the convolutions (out, in, kh, kw) under the names ``0.weight``, ``0.bias``, ... in the
    order of the graph, see `ncnn.by_order`. ValueError where one has a weight that is computed."""
    known, found = weights(graph), {}
    convolutions = [node for node in graph.nodes if node.kind in ("Conv", "ConvTranspose")]
    for i, node in enumerate(convolutions):
        for key, name in zip(("weight", "bias"), node.inputs[1:3], strict=False):
            if name not in known:
                raise ValueError(f"the {key} of {node.kind} {node.name} is no constant")
            found[f"{i}.{key}"] = torch.from_numpy(np.ascontiguousarray(known[name]))
    return found
