"""Weights out of TensorFlow Lite's files, which are FlatBuffers: the operators of a graph and its constant tensors.

Followed are ``schema.fbs`` (https://github.com/tensorflow/tensorflow, tensorflow/compiler/mlir/lite/schema) and the
description of FlatBuffers' encoding. Read is what networks of convolutions in floats are made of; quantised weights are
not.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Graph", "Operator", "numbered", "read_graph"]

_MAGIC = b"TFL3"
_FLOATS = {0: "<f4", 1: "<f2"}  # TensorType; constants of other types (sizes, axes) are left out
_CUSTOM = 32
# BuiltinOperator, of those with which something is done here. Others are named by their number.
_NAMES = {3: "CONV_2D", 4: "DEPTHWISE_CONV_2D", 6: "DEQUANTIZE"}
_TRANSPOSED = "Convolution2DTransposeBias"  # MediaPipe's own: kernel and stride are equal


@dataclass(frozen=True)
class Operator:
    """``inputs`` and ``outputs``: numbers of tensors, -1 where one is left out."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """``operators`` in their order, which is one of computation; ``constants``: the floats, by number of tensor."""

    operators: tuple[Operator, ...]
    constants: Mapping[int, np.ndarray]


class _Table:
    """A table of the file: its fields by their numbers in the schema, and what is not there by its default."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - self._number("<i", at)  # the vtable

    def _number(self, kind: str, at: int) -> int:
        if not 0 <= at <= len(self._data) - struct.calcsize(kind):
            raise ValueError(f"{struct.calcsize(kind)} bytes expected at {at}, of {len(self._data)}")
        return struct.unpack_from(kind, self._data, at)[0]

    def _place(self, field: int) -> int:
        """Where a field is; 0: nowhere."""
        offset = 4 + 2 * field
        if offset >= self._number("<H", self._fields):
            return 0
        found = self._number("<H", self._fields + offset)
        return self._at + found if found else 0

    def number(self, field: int, kind: str = "<i") -> int:
        at = self._place(field)
        return self._number(kind, at) if at else 0

    def _vector(self, field: int) -> tuple[int, int]:
        """(where its elements begin, how many there are)."""
        at = self._place(field)
        if not at:
            return 0, 0
        at += self._number("<I", at)
        return at + 4, self._number("<I", at)

    def array(self, field: int, dtype: str = "<i4") -> np.ndarray:
        at, count = self._vector(field)
        size = count * np.dtype(dtype).itemsize
        if size > len(self._data) - at:
            raise ValueError(f"{size} bytes expected at {at}, of {len(self._data)}")
        return np.frombuffer(self._data, dtype, count, at)

    def text(self, field: int) -> str:
        return self.array(field, "|u1").tobytes().decode("utf-8", "replace")

    def tables(self, field: int) -> list[_Table]:
        first = self._vector(field)[0]
        return [_Table(self._data, first + 4 * i + int(n)) for i, n in enumerate(self.array(field, "<u4"))]


def read_graph(data: bytes) -> Graph:
    """The graph of a model. ValueError, which says why, where the bytes are none."""
    if data[4:8] != _MAGIC:
        raise ValueError(f"{_MAGIC.decode()} is not at its beginning: no TensorFlow Lite model")
    model = _Table(data, struct.unpack_from("<I", data)[0])
    graphs, buffers = model.tables(2), model.tables(4)
    if len(graphs) != 1:
        raise ValueError(f"it has {len(graphs)} graphs: one is read")
    kinds = [_kind(code) for code in model.tables(1)]
    constants = {}
    for i, tensor in enumerate(graphs[0].tables(0)):
        dtype, buffer = _FLOATS.get(tensor.number(1, "<b")), tensor.number(2, "<I")
        if dtype is None or _of(buffers, buffer).array(0, "|u1").size == 0:
            continue
        values, shape = _of(buffers, buffer).array(0, "|u1"), tensor.array(0)
        if values.size != math.prod(map(int, shape)) * np.dtype(dtype).itemsize or min(shape, default=1) < 0:
            raise ValueError(f"the tensor {tensor.text(3)} has {values.size} bytes, its shape is {tuple(shape)}")
        constants[i] = values.view(dtype).reshape(shape)
    operators = tuple(
        Operator(_of(kinds, o.number(0, "<I")), tuple(o.array(1).tolist()), tuple(o.array(2).tolist()))
        for o in graphs[0].tables(3)
    )
    return Graph(operators, constants)


def _of(items: list, number: int):  # type: ignore[no-untyped-def]
    if number >= len(items):
        raise ValueError(f"number {number} of {len(items)} is asked for")
    return items[number]


def _kind(code: _Table) -> str:
    number = max(code.number(0, "<b"), code.number(3))  # the one that older readers see ends at 127
    return code.text(1) if number == _CUSTOM else _NAMES.get(number, f"operator {number}")


def numbered(graph: Graph) -> dict[str, Tensor]:
    """Weights and biases of the convolutions in float32 under the names ``0.weight``, ``0.bias``, ``1.weight``, ... in
    the order of the graph, see `ncnn.by_order`: (out, in, kh, kw), depthwise (out, 1, kh, kw), transposed (in, out, kh,
    kw). ValueError for other operators that have floats of their own, and for weights that are computed."""
    known = dict(graph.constants)
    found: dict[str, Tensor] = {}
    count = 0
    for operator in graph.operators:
        own = [i for i in operator.inputs if i in known]
        if operator.kind == "DEQUANTIZE" and own:
            known[operator.outputs[0]] = known[own[0]]
        elif operator.kind in _ORDERS:
            for key, i in zip(("weight", "bias"), operator.inputs[1:3], strict=False):
                if i not in known:
                    raise ValueError(f"the {key} of {operator.kind} is no constant of floats")
                a = known[i].astype(np.float32)
                if key == "weight":
                    a = a.transpose(_ORDERS[operator.kind])
                found[f"{count}.{key}"] = torch.from_numpy(np.ascontiguousarray(a))
            count += 1
        elif own:
            raise ValueError(f"{operator.kind} has floats of its own: they are not read")
    return found


# A kernel's dimensions, in torch's order.
_ORDERS = {"CONV_2D": (0, 3, 1, 2), "DEPTHWISE_CONV_2D": (3, 0, 1, 2), _TRANSPOSED: (3, 0, 1, 2)}
