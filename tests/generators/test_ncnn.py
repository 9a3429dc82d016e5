"""ncnn.py: a network's files are written here, byte by byte, and read back."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from torch import nn

from cnnfast.generators import ncnn

PARAM = """7767517
5 5
Input            in    0 1 data
Convolution      a     1 1 data x 0=4 1=3 4=1 5=1 6=108
PReLU            b     1 1 x y 0=4
Deconvolution    c     1 1 y z 0=2 1=2 11=3 3=2 5=0 6=48
InnerProduct     d     1 1 z out 0=3 1=1 2=15
"""
HALF, FLOAT = 0x01306B47, 0


def tagged(values: np.ndarray, tag: int) -> bytes:
    data = struct.pack("<I", tag) + values.astype("<f2" if tag == HALF else "<f4").tobytes()
    return data + b"\0" * (-len(data) % 4)


@pytest.fixture
def arrays() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(4, 3, 3, 3), (4,), (4,), (2, 4, 3, 2), (3, 5), (3,)]
    return [rng.standard_normal(shape).astype(np.float16).astype(np.float32) for shape in shapes]


def binary(arrays: list[np.ndarray], tag: int = HALF) -> bytes:
    a, b, c, d, e, f = arrays
    return tagged(a, tag) + b.tobytes() + c.tobytes() + tagged(d, tag) + tagged(e, tag) + f.tobytes()


@pytest.mark.parametrize("tag", [HALF, FLOAT, 0x0002C056], ids=["half", "float", "raw"])
def test_what_was_written_is_read(arrays: list[np.ndarray], tag: int) -> None:
    layers = ncnn.read_param(PARAM)
    assert [layer.kind for layer in layers] == ["Input", "Convolution", "PReLU", "Deconvolution", "InnerProduct"]
    assert layers[3].inputs == ("y",) and layers[3].outputs == ("z",) and layers[3].number(3) == 2
    found = dict((layer.name, w) for layer, w in ncnn.read_weights(layers, binary(arrays, tag)))
    assert list(found) == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(found["a"]["weight"], arrays[0])
    np.testing.assert_array_equal(found["a"]["bias"], arrays[1])
    np.testing.assert_array_equal(found["b"]["weight"], arrays[2])
    np.testing.assert_array_equal(found["c"]["weight"], arrays[3].transpose(1, 0, 2, 3))  # (in, out, kh, kw)
    assert "bias" not in found["c"]
    np.testing.assert_array_equal(found["d"]["weight"], arrays[4])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "its first line is not 7767517"),
        ("767517\n5 5\n", "its first line is not 7767517"),
        ("7767517\n6 5\n" + "\n".join(PARAM.splitlines()[2:]), "it has 5 layers and announces 6"),
        ("7767517\n1 1\nConvolution a x 1 data y\n", "its lines are damaged"),
        ("7767517\n1 1\nConvolution\n", "its lines are damaged"),
        ("7767517\n1 1\nInput a 0 1 x zero=1\n", "its lines are damaged"),
    ],
    ids=["empty", "magic", "count", "number", "short", "option"],
)
def test_a_param_file_that_is_none(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ncnn.read_param(text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-4], "12 bytes expected at .*, 8 are left"),
        (lambda data: data + b"\0\0\0\0", "4 bytes are left behind the last layer"),
        (lambda data: b"", "it ends at Convolution a"),
        (lambda data: struct.pack("<I", 0x000D4B38) + data[4:], "tag 0x000d4b38: quantised weights are not read"),
    ],
    ids=["cut", "longer", "empty", "int8"],
)
def test_a_bin_file_that_does_not_fit(arrays: list[np.ndarray], damage: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ncnn.read_weights(ncnn.read_param(PARAM), damage(binary(arrays)))  # type: ignore[operator]


def test_layers_that_could_hold_weights_are_refused() -> None:
    for line in ("BatchNorm a 1 1 x y 0=4", "Scale a 1 1 x y 0=4"):
        with pytest.raises(ValueError, match=f"layers of the kind {line.split()[0]} are not read"):
            ncnn.read_weights(ncnn.read_param(f"7767517\n1 1\n{line}\n"), b"")


def test_by_order(arrays: list[np.ndarray]) -> None:
    state = ncnn.numbered(ncnn.read_param(PARAM), binary(arrays))
    assert list(state) == ["0.weight", "0.bias", "1.weight", "2.weight", "3.weight", "3.bias"]
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.ConvTranspose2d(4, 2, (3, 2), bias=False), nn.Conv2d(5, 3, 1)
    )
    network.load_state_dict(ncnn.by_order(network, state))
    torch.testing.assert_close(network[0].weight, torch.from_numpy(arrays[0]))
    torch.testing.assert_close(network[3].weight, torch.from_numpy(arrays[4])[:, :, None, None])
    with pytest.raises(ValueError, match="4 layers with weights, expected 3"):
        ncnn.by_order(network[:3], state)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.ConvTranspose2d(4, 2, 3), nn.Conv2d(5, 3, 1))
    with pytest.raises(
        ValueError, match="layer 2 has .*'weight': \\(4, 2, 3, 2\\).*, expected .*'weight': \\(4, 2, 3, 3\\)"
    ):
        ncnn.by_order(other, state)
