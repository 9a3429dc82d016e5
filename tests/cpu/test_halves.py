"""One sample of three dimensions as two halves: PyTorch's convolution and its gradients."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from cnnfast import reference
from cnnfast.cpu import conv_autograd, halves
from cnnfast.cpu.conv_autograd import Ways, ways
from cnnfast.spec import ConvSpec

from ..tolerance import assert_close

LAST = torch.channels_last_3d

pytestmark = pytest.mark.usefixtures("one_thread")


def spec_of(*geometry: object, transposed: bool = False) -> ConvSpec:
    return ConvSpec.make(*geometry, transposed=transposed, ndim=3)  # type: ignore[arg-type]


def operands(spec: ConvSpec, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, weight, bias and a gradient of the result."""
    grad = torch.randn(1, spec.out_channels, *spec.output_size(size))
    x, w, b = (
        torch.randn(1, spec.in_channels, *size),
        torch.randn(spec.weight_shape) / 8,
        torch.randn(spec.out_channels),
    )
    x, grad = (t.contiguous(memory_format=LAST) for t in (x, grad))
    return tuple(t.to(dtype) for t in (x, w, b, grad))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_any_geometry(seed: int, transposed: bool) -> None:
    """The cut itself, in float64 and both formats."""
    r, spec, size = random.Random(seed), None, (1, 1, 1)
    while spec is None or halves._cut(spec, size[0]).rows < 2:
        k, s, d = ([r.choice(of) for _ in range(3)] for of in ((1, 2, 3, 4, 5), (1, 2, 3), (1, 1, 2)))
        p, size = [r.randint(0, 2) for _ in range(3)], (r.randint(2, 9), r.randint(2, 6), r.randint(2, 6))
        more = [r.randint(0, max(a, b) - 1) if transposed else 0 for a, b in zip(s, d, strict=True)]
        try:
            spec = spec_of(4, 6, k, s, p, more, r.choice([1, 2]), d, transposed=transposed)
            spec.output_size(size)
        except ValueError:
            spec = None
    x, w, b, grad = operands(spec, size, torch.float64)
    if seed % 2:
        x, grad = x.contiguous(), grad.contiguous()
    y = halves.forward(x, w, b, spec)
    torch.testing.assert_close(y, reference.conv(x, w, b, spec))
    s = spec
    want = torch.ops.aten.convolution_backward(
        grad, x, w, [6], s.stride, s.padding, s.dilation, transposed, s.output_padding, s.groups, (True,) * 3
    )
    for need in ((True,) * 3, (True, False, False), (False, True, False), (False, False, True)):
        got = halves.backward(grad, x, w, [6], spec, need)
        for g, e, n in zip(got, want, need, strict=True):
            assert (g is None) == (not n)
            if g is not None:
                torch.testing.assert_close(g, e)


LAYERS: dict[str, tuple[ConvSpec, tuple[int, ...]]] = {
    "plain": (spec_of(16, 16, 3, 1, 1), (9, 12, 11)),
    "strided": (spec_of(8, 16, 3, 2, 1), (18, 15, 17)),
    "dilated": (spec_of(8, 8, (3, 1, 3), 1, (2, 0, 0), 0, 1, (2, 1, 1)), (10, 24, 20)),
    "transposed": (spec_of(16, 8, 3, 2, 1, 1, transposed=True), (9, 10, 9)),
    "transposed odd": (spec_of(16, 8, 2, 2, transposed=True), (13, 13, 12)),
}


@pytest.mark.parametrize(("last", "channels_last"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_within_the_rule(name: str, last: bool, channels_last: bool) -> None:
    spec, size = LAYERS[name]
    x, w, b, grad = operands(spec, size)
    assert ways(spec, tuple(x.shape), x.dtype) == ("halves", "halves", torch.float32)
    w = w.contiguous(memory_format=LAST) if channels_last else w
    x = x if last else x.contiguous()

    def run(function: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w, b)]
        y = function(*leaves, spec)  # type: ignore[operator]
        y.backward(grad.to(dtype))
        return (y.detach(), *(leaf.grad for leaf in leaves))  # type: ignore[arg-type, return-value]

    def by_onednn(x: Tensor, w: Tensor, b: Tensor, spec: ConvSpec) -> Tensor:
        """PyTorch's own of a batch of two."""
        return reference.conv(torch.cat([x, torch.zeros_like(x)]), w, b, spec)[:1]

    found = [
        run(conv_autograd.volume_convolution, torch.float32),
        run(reference.conv, torch.float64),
        run(by_onednn, torch.float32),
    ]
    for got, exact, yardstick in zip(*found, strict=True):
        assert_close(got, exact, yardstick, name)
    y, _, dw, _ = found[0]
    assert y.is_contiguous(memory_format=LAST if last else torch.contiguous_format) and dw.stride() == w.stride()


def test_a_result_may_be_overwritten() -> None:
    spec, size = LAYERS["plain"]
    x, w, b, grad = (t.requires_grad_() for t in operands(spec, size))
    y = conv_autograd.volume_convolution(x, w, b, spec)
    want = torch.autograd.grad(torch.relu(y), (x, w, b), grad, retain_graph=True)
    found = torch.autograd.grad(torch.relu_(y), (x, w, b), grad)
    assert all(torch.equal(a, e) for a, e in zip(found, want, strict=True))


def test_derivatives_of_derivatives_and_batches_of_gradients() -> None:
    spec, size = LAYERS["transposed"]
    x, w, b, grad = operands(spec, size)
    x.requires_grad_(), w.requires_grad_()
    found = []
    for function in (conv_autograd.volume_convolution, reference.conv):
        y = function(x, w, b, spec)
        (dx,) = torch.autograd.grad(y, x, grad, create_graph=True)
        (dw,) = torch.autograd.grad(dx.square().sum(), w)
        y = function(x, w, b, spec)
        (each,) = torch.autograd.grad(y, w, torch.stack([grad, 2 * grad]), is_grads_batched=True)
        found.append((dx, dw, each))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
RULES = [
    ("small batches of one", spec_of(16, 16, 3, 1, 1), (1, 16, 32, 32, 32), F32, "halves"),
    ("two samples", spec_of(16, 16, 3, 1, 1), (2, 16, 32, 32, 32), F32, "aten"),
    ("large enough for oneDNN", spec_of(32, 32, 3, 1, 1), (1, 32, 32, 32, 32), F32, "aten"),
    ("one position", spec_of(16, 16, 1), (1, 16, 20, 20, 20), F32, "aten"),
    ("one channel", spec_of(1, 16, 3, 1, 1), (1, 1, 32, 32, 32), F32, "aten"),
    ("few positions", spec_of(256, 256, 3, 1, 1), (1, 256, 4, 4, 4), F32, "aten"),
    ("little work", spec_of(4, 4, 3, 1, 1), (1, 4, 8, 8, 8), F32, "aten"),
    ("one row", spec_of(32, 32, (1, 3, 3), 1, (0, 1, 1)), (1, 32, 1, 24, 24), F32, "aten"),
    ("float64", spec_of(16, 16, 3, 1, 1), (1, 16, 32, 32, 32), F64, "aten"),
]


@pytest.mark.parametrize(("name", "spec", "shape", "dtype", "way"), RULES, ids=[rule[0] for rule in RULES])
def test_the_rule(name: str, spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype, way: str) -> None:
    assert ways(spec, shape, dtype) == Ways(way, way, dtype)


def test_no_halves_where_aten_would_loop_over_them_too() -> None:
    """A transposed convolution that is depthwise."""
    spec, shape = spec_of(16, 16, 3, 1, 1, 0, 16, transposed=True), (1, 16, 16, 16, 16)
    assert not halves.applies(spec, shape, F32) and not halves.applies(spec, (2, *shape[1:]), F32)
