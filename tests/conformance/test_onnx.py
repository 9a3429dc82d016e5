"""ONNX's backend node cases of ConvTranspose (1-D and 2-D)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import cnnfast
from cnnfast.spec import ConvSpec

onnx = pytest.importorskip("onnx", reason="onnx is not installed")


def _cases() -> dict[str, tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]]:
    """name -> (attributes, X, W, Y)."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases("ConvTranspose")
    out = {}
    for case in found:
        nodes = case.model.graph.node
        if len(nodes) != 1 or nodes[0].op_type != "ConvTranspose":
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
        (x, w), (y,) = case.data_sets[0]
        if x.ndim in (3, 4):
            out[case.name] = attributes, x, w, y
    return out


CASES = _cases()


def arguments(attributes: dict[str, Any], x: np.ndarray, w: np.ndarray) -> tuple[ConvSpec, list[tuple[int, int]]]:
    """(spec, per dimension the (first, last + 1) output that the case keeps)."""
    ndim = x.ndim - 2
    known = {"strides", "dilations", "group", "pads", "output_padding", "output_shape", "kernel_shape", "auto_pad"}
    assert set(attributes) <= known, attributes
    stride = attributes.get("strides", [1] * ndim)
    dilation = attributes.get("dilations", [1] * ndim)
    output_padding = list(attributes.get("output_padding", [0] * ndim))
    size, kernel, group = x.shape[2:], w.shape[2:], attributes.get("group", 1)
    full = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(size, stride, dilation, kernel, strict=True)]
    wanted = attributes.get("output_shape")
    if attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        assert attributes["auto_pad"] == b"SAME_UPPER"
        wanted = [n * s for n, s in zip(size, stride, strict=True)]
    if wanted is not None:  # the total padding follows from the shape; a negative one is output padding
        total = [f + op - o for f, op, o in zip(full, output_padding, wanted, strict=True)]
        output_padding = [op + max(0, -t) for op, t in zip(output_padding, total, strict=True)]
        pads = [(max(0, t) // 2, max(0, t) - max(0, t) // 2) for t in total]
    else:
        flat = attributes.get("pads", [0] * 2 * ndim)
        pads = list(zip(flat[:ndim], flat[ndim:], strict=True))
    both = [min(p) for p in pads]
    spec = ConvSpec.make(
        w.shape[0], w.shape[1] * group, kernel, stride, both, output_padding, group, dilation, ndim=ndim
    )
    ends = [(b - p, n - (e - p)) for (b, e), p, n in zip(pads, both, spec.output_size(size), strict=True)]
    return spec, ends


def run(name: str, device: torch.device | str, backend: str, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(result, expected); every group's channels filled up with zeros to ``channels``, which changes nothing."""
    attributes, x, w, y = CASES[name]
    spec, ends = arguments(attributes, x, w)
    g = spec.groups

    def grown(t: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        big = torch.zeros(shape)
        big[tuple(slice(n) for n in t.shape)] = t
        return big

    c_in, c_out = max(channels, w.shape[0] // g), max(channels, w.shape[1])
    tx = torch.from_numpy(x.copy()).unflatten(1, (g, -1))
    tx = grown(tx.transpose(1, 2), (tx.shape[0], c_in, g, *tx.shape[3:])).transpose(1, 2).flatten(1, 2)
    tw = torch.from_numpy(w.copy()).unflatten(0, (g, -1)).transpose(0, 1)
    tw = grown(tw, (c_in, g, c_out, *tw.shape[3:])).transpose(0, 1).flatten(0, 1)
    function = cnnfast.ops.conv_transpose1d if spec.ndim == 1 else cnnfast.ops.conv_transpose2d
    got = function(
        tx.to(device), tw.to(device), None, spec.stride, spec.padding, spec.output_padding, g, spec.dilation,
        backend=backend,
    )  # fmt: skip
    got = got.unflatten(1, (g, -1))[:, :, : w.shape[1]].flatten(1, 2)
    return got[(..., *(slice(*e) for e in ends))].cpu(), torch.from_numpy(y.copy())


def test_there_are_cases() -> None:
    assert len(CASES) >= 9 and {x.ndim for _, x, _, _ in CASES.values()} == {3, 4}


@pytest.mark.parametrize("name", CASES)
def test_case_on_the_cpu(name: str) -> None:
    got, expected = run(name, "cpu", "auto")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_case_on_triton(name: str, device: torch.device, launches: list[str]) -> None:
    """Small integers: exact in TF32 too."""
    got, expected = run(name, device, "triton", channels=16)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert len(launches) == 1
