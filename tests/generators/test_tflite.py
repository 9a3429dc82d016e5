"""tflite.py: models are written here, byte by byte, and read back; damaged ones are refused."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import nn

from cnnfast.generators import tflite
from cnnfast.generators.ncnn import by_order

# A table: field's number -> ("<i", 5), bytes, an array, a list of tables.
Table = Mapping[int, object]


def flatbuffer(root: Table, magic: bytes = b"TFL3") -> bytes:
    """The encoding of https://flatbuffers.dev/internals: what is referred to lies behind what refers to it."""
    data = bytearray(4) + magic

    def at_four() -> int:
        data.extend(bytes(-len(data) % 4))
        return len(data)

    def refer(place: int, target: int) -> None:
        struct.pack_into("<I", data, place, target - place)

    def vector(value: bytes | np.ndarray | Sequence[Table]) -> int:
        start = at_four()
        if isinstance(value, (bytes, np.ndarray)):
            data.extend(struct.pack("<I", len(value)) + bytes(value))
            return start
        data.extend(struct.pack("<I", len(value)) + bytes(4 * len(value)))
        for i, table in enumerate(value):
            refer(start + 4 + 4 * i, write(table))
        return start

    def write(table: Table) -> int:
        slots = max(table, default=-1) + 1
        vtable = at_four()
        data.extend(struct.pack("<HH", 4 + 2 * slots, 4 + 4 * len(table)) + bytes(2 * slots))
        start = at_four()
        data.extend(struct.pack("<i", start - vtable))
        places = {}
        for number in table:
            struct.pack_into("<H", data, vtable + 4 + 2 * number, len(data) - start)
            places[number] = len(data)
            data.extend(bytes(4))
        for number, value in table.items():
            if isinstance(value, tuple):
                struct.pack_into(value[0], data, places[number], value[1])
            else:
                refer(places[number], vector(value))  # type: ignore[arg-type]
        return start

    refer(0, write(root))
    return bytes(data)


def ints(*values: int) -> np.ndarray:
    return np.array(values, "<i4")


def tensor(shape: Sequence[int], kind: int, buffer: int) -> Table:
    return {0: ints(*shape), 1: ("<b", kind), 2: ("<I", buffer), 3: b"a tensor"}


def operator(code: int, inputs: Sequence[int], outputs: Sequence[int]) -> Table:
    return {0: ("<I", code), 1: ints(*inputs), 2: ints(*outputs)}


SHAPES = [(4, 3, 3, 2), (4,), (1, 5, 5, 4), (4,), (3, 2, 2, 4), (3,)]  # dense, depthwise, MediaPipe's transposed one
HALF = 1


def model(arrays: Sequence[np.ndarray], extra: Sequence[Table] = (), magic: bytes = b"TFL3") -> bytes:
    """Three convolutions, the first one's weights in half precision."""
    tensors, buffers = [tensor((1, 8, 8, 2), 0, 0)], [{}]
    for a in arrays:
        tensors.append(tensor(a.shape, HALF if a.dtype == np.float16 else 0, len(buffers)))
        buffers.append({0: a.tobytes()})
    whole = tensor(SHAPES[0], 0, 0)
    codes = [
        {0: ("<b", 3)},
        {0: ("<b", 4), 3: ("<i", 4)},
        {0: ("<b", 6)},
        {0: ("<b", 32), 1: b"Convolution2DTransposeBias"},
        {0: ("<b", 127), 3: ("<i", 150)},
    ]
    operators = [
        operator(2, [1], [7]),  # float16 to float32
        operator(0, [0, 7, 2], [0]),
        operator(1, [0, 3, 4], [0]),
        operator(3, [0, 5, 6], [0]),
        *extra,
    ]
    graph = {0: [*tensors, whole], 3: operators}
    return flatbuffer({0: ("<I", 3), 1: codes, 2: [graph], 4: buffers}, magic)


@pytest.fixture
def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    found = [rng.standard_normal(shape).astype(np.float32) for shape in SHAPES]
    return [found[0].astype(np.float16), *found[1:]]


def test_what_was_written_is_read(arrays: list[np.ndarray]) -> None:
    graph = tflite.read_graph(model(arrays))
    kinds = ["DEQUANTIZE", "CONV_2D", "DEPTHWISE_CONV_2D", "Convolution2DTransposeBias"]
    assert [o.kind for o in graph.operators] == kinds
    assert graph.operators[1].inputs == (0, 7, 2) and sorted(graph.constants) == [1, 2, 3, 4, 5, 6]
    found = tflite.numbered(graph)
    orders = [(0, 3, 1, 2), None, (3, 0, 1, 2), None, (3, 0, 1, 2), None]
    expected = [a if order is None else a.transpose(order) for a, order in zip(arrays, orders, strict=True)]
    assert list(found) == [f"{i}.{key}" for i in range(3) for key in ("weight", "bias")]
    for t, a in zip(found.values(), expected, strict=True):
        assert t.dtype == torch.float32
        np.testing.assert_array_equal(t.numpy(), a.astype(np.float32))
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 5, groups=4), nn.ConvTranspose2d(4, 3, 2, 2))
    network.load_state_dict(by_order(network, found))


def test_a_half_precision_weight_is_used_as_it_is(arrays: list[np.ndarray]) -> None:
    found = tflite.numbered(tflite.read_graph(model(arrays)))
    assert (found["0.weight"].half().float() == found["0.weight"]).all()


def test_what_is_not_read(arrays: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="TFL3 is not at its beginning"):
        tflite.read_graph(model(arrays, magic=b"TFL4"))
    with pytest.raises(ValueError, match="TFL3 is not at its beginning"):
        tflite.read_graph(b"")
    of_its_own = tflite.read_graph(model(arrays, extra=[operator(4, [0, 2], [0])]))
    with pytest.raises(ValueError, match="operator 150 has floats of its own"):
        tflite.numbered(of_its_own)
    computed = tflite.read_graph(model(arrays, extra=[operator(0, [0, 0, 2], [0])]))
    with pytest.raises(ValueError, match="the weight of CONV_2D is no constant of floats"):
        tflite.numbered(computed)
    with pytest.raises(ValueError, match="number 9 of 5 is asked for"):
        tflite.read_graph(model(arrays, extra=[operator(9, [0], [0])]))
    short = [arrays[0][:3], *arrays[1:]]
    two = flatbuffer({1: [], 2: [{}, {}], 4: []})
    with pytest.raises(ValueError, match="it has 2 graphs"):
        tflite.read_graph(two)
    with pytest.raises(ValueError, match=r"layer 0 has .*expected"):
        network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 5, groups=4), nn.ConvTranspose2d(4, 3, 2, 2))
        by_order(network, tflite.numbered(tflite.read_graph(model(short))))


def test_a_damaged_file_is_a_value_error(arrays: list[np.ndarray]) -> None:
    """Cut off anywhere, or with any byte changed: read, or refused, and nothing else."""
    data = model(arrays)
    refused = 0
    for end in range(len(data)):
        try:
            tflite.numbered(tflite.read_graph(data[:end]))
        except ValueError:
            refused += 1
    assert refused > len(data) // 2
    rng = np.random.default_rng(0)
    for at in range(4, len(data)):
        changed = bytearray(data)
        changed[at] = rng.integers(256)
        try:
            tflite.numbered(tflite.read_graph(bytes(changed)))
        except ValueError:
            refused += 1
