"""Float32 by three products of TF32 (`kernels/product.py`), of plans that calls do not take yet: every regime of the
convolution and of its gradients, what is not finite, the ends of float32's range; and how Triton compiles it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cnnfast.gpu.conv_choice import KINDS
from cnnfast.gpu.devices import tf32_convolutions
from cnnfast.ops.run import run_step
from cnnfast.step import Operands, Step

from ..cases import Case, check, conv, reference
from ..tolerance import assert_close
from . import test_conv, test_conv_statistics, test_conv_wgrad

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.rehearse.inspector import compile_job, recording  # noqa: E402
from benchmarks.rehearse.launches import kinds  # noqa: E402

EXACT = test_conv_wgrad.PRECISIONS["fp32"]
INF, NAN, LARGEST = float("inf"), float("nan"), torch.finfo(torch.float32).max


@pytest.fixture
def three(poison: None) -> Iterator[None]:
    """Calls take plans of three products and no others."""
    with kinds("fp32x3"):
        yield


def of_three(launches: list[str]) -> bool:
    return bool(launches) and all(name.endswith("tf32x3") for name in launches)


# --- the same cases as every other precision's ------------------------------------------------------------------------


SHORT = ("phases", "masked-merged", "split-over-uneven-phases", "transposed")


def marked(cases: Iterable[Any], short: Collection[str] = SHORT) -> list[Any]:
    """The short ones, and the others as slow."""
    names = ((c, c.name if isinstance(c, test_conv_wgrad.Case) else c.id) for c in cases)
    return [pytest.param(c, id=name, marks=[pytest.mark.slow] * (name not in short)) for c, name in names]


FORWARD = marked(test_conv.REGIMES + test_conv.GEOMETRY + test_conv.SCHEDULES + test_conv.SLOW)
STATISTICS = marked(test_conv_statistics.BATCH, ["masked-channels"])
GRADIENTS = marked(test_conv_wgrad.REGIMES + test_conv_wgrad.GEOMETRY)


@pytest.mark.parametrize("case", FORWARD)
def test_forward(case: Case, three: None, device: torch.device, launches: list[str]) -> None:
    check(case, "fp32", device, launches)
    assert of_three(launches)


@pytest.mark.parametrize("c", STATISTICS)
def test_statistics(c: Case, three: None, device: torch.device, launches: list[str]) -> None:
    test_conv_statistics.check(c, "fp32", device, "batch")
    assert of_three(launches)


LARGE = (("block_m", 128), ("block_n", 64), ("num_warps", 8))
OWN = {  # what is the largest here, and a box of no more than 32 positions
    "widest-tile": LARGE,
    "tallest-tile": LARGE,
    "box-of-part-of-a-line": (("box", (1, 2, 16)), ("even", False)),
}


@pytest.mark.parametrize("c", GRADIENTS)
def test_weight_gradient(c: test_conv_wgrad.Case, three: None, device: torch.device, launches: list[str]) -> None:
    test_conv_wgrad.check(replace(c, plan=OWN.get(c.name, c.plan)), EXACT, device)
    assert of_three(launches)


@pytest.mark.slow
def test_gradients(three: None, device: torch.device, launches: list[str]) -> None:
    """A layer's training step: forward, and the gradients of its input and weight."""
    import cnnfast

    torch.manual_seed(0)
    x, w, g = torch.randn(2, 32, 4, 5), torch.randn(32, 48, 4, 4) / 16, torch.randn(2, 48, 8, 10)
    found = []
    for t in (device, torch.float64, torch.float32):
        a, b = (v.detach().clone().to(t).requires_grad_() for v in (x, w))
        if t is device:
            with tf32_convolutions(False):
                y = cnnfast.ops.conv_transpose2d(a, b, stride=2, padding=1, backend="triton")
                y.backward(g.to(device))
        else:
            F.conv_transpose2d(a, b, stride=2, padding=1).backward(g.to(t))
        assert a.grad is not None and b.grad is not None
        found.append((a.grad.cpu(), b.grad.cpu()))
    for name, got, exact, yardstick in zip(("input", "weight"), *found, strict=True):
        assert_close(got, exact, yardstick, name)
    assert of_three(launches) and len(launches) == 3


# --- what is not finite, and the ends of the range --------------------------------------------------------------------

CASE = conv(
    "ends", "phases", 40, 16, 3, 1, 1, transposed=False, size=(4, 8), batch=1, activation="identity", bias=False
)


def operands() -> Operands:
    return CASE.operands(torch.float32, "cpu")


def run(o: Operands, device: torch.device) -> torch.Tensor:
    there = Operands(*(v.to(device) if isinstance(v, torch.Tensor) else v for v in o))
    with tf32_convolutions(False):
        return run_step(CASE.step, there, channels_last=True, backend="triton").cpu()


NOT_FINITE = {
    "infinity": {"x": [INF]},
    "minus-infinity": {"x": [-INF]},
    "infinities-that-meet": {"x": [INF, -INF]},
    "infinity-in-the-weight": {"weight": [INF]},
    "infinity-times-large": {"x": [INF], "weight": [1e30, -1e30]},
    "infinity-times-infinity": {"x": [INF], "weight": [-INF]},
    "infinity-times-zero": {"x": [INF], "weight": [0.0]},
    "nan": {"x": [NAN]},
    "nan-of-any-bits": {"x": [torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32).item()]},
    "nan-in-the-weight": {"weight": [NAN]},
}


@pytest.mark.parametrize("values", NOT_FINITE.values(), ids=NOT_FINITE)
def test_what_is_not_finite_stays_what_it_is(
    values: dict[str, list[float]], three: None, device: torch.device, launches: list[str]
) -> None:
    """Infinity less itself, which is what its low part would be, reaches no result; nor does infinity times the low
    part of the other operand, of any sign."""
    o = operands()
    for i, v in enumerate(values.get("x", ())):
        o.x[0, 3 + i, 2 + i, 2] = v
    for i, v in enumerate(values.get("weight", ())):
        o.weight[5 + i, 3, 1, 1] = v
    y, exact = run(o, device), reference(CASE.step, o, False)[0]
    assert not exact.isfinite().all() and of_three(launches)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(y), kind(exact))


def test_every_bit_of_nan(three: None, device: torch.device) -> None:
    """CUDA's own is all ones."""
    for bits in (0x7FFFFFFF, -1, 0x7FC00000):
        o = operands()
        o.x.view(torch.int32)[0, 3, 2, 2] = bits
        assert torch.equal(run(o, device).isnan(), reference(CASE.step, o, False)[0].isnan())


def test_the_largest_floats_do_not_round_to_infinity(three: None, device: torch.device, launches: list[str]) -> None:
    o = operands()
    weight = o.weight.clone()
    weight[:, 3] = torch.linspace(-0.2, 0.2, 16)[:, None, None]
    o.x[0, 3, 1, 1::3] = torch.tensor([LARGEST, -LARGEST, 3.4021e38])  # no result reads two of them
    o = o._replace(weight=weight)
    y, (exact, yardstick, before) = run(o, device), reference(CASE.step, o, False)
    assert y.isfinite().all()
    assert_close(y, exact, yardstick, before=before)
    o = operands()
    o.weight[2, 3, 1, 1] = LARGEST  # in the weight, its product with the positions that it meets
    y, yardstick = run(o, device), reference(CASE.step, o, False)[1]
    finite = yardstick.isfinite()
    assert torch.equal(y.isinf(), yardstick.isinf()) and not finite.all()
    torch.testing.assert_close(y[finite], yardstick[finite], rtol=1e-5, atol=1e-5)
    assert of_three(launches)


def test_sums_that_overflow_are_infinite(three: None, device: torch.device) -> None:
    """Low products overflow too, with any sign: of 3e38 * (1 + 2^-12), say, the low part is negative."""
    o = operands()
    x = torch.full_like(o.x, 3.0e38).mul_(1 - 2.0**-12)
    weight = torch.full_like(o.weight, 1e30).mul_(1 + 2.0**-12)
    assert run(o._replace(x=x, weight=weight), device).isposinf().all()
    assert run(o._replace(x=-x, weight=weight), device).isneginf().all()


def test_integers_are_exact(three: None, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    o = operands()
    x = torch.randint(-2000, 2001, o.x.shape, generator=g).float()
    weight = torch.randint(-8, 9, o.weight.shape, generator=g).float()
    exact = F.conv2d(x, weight, padding=1)
    assert exact.abs().max() < 2**24 and torch.equal(run(o._replace(x=x, weight=weight), device), exact)


@pytest.mark.parametrize("exponent", [-110, 110])
def test_any_scale(exponent: int, three: None, device: torch.device) -> None:
    o = operands()
    o = o._replace(x=o.x * 2.0**exponent)
    assert_close(run(o, device), *reference(CASE.step, o, False))


def test_denormals_among_other_values(three: None, device: torch.device) -> None:
    o = operands()
    o.x[:, ::2] *= 2.0**-130
    o.weight[::2] *= 2.0**-130
    assert 0 < o.x.abs().min() < torch.finfo(torch.float32).smallest_normal
    y, (exact, yardstick, before) = run(o, device), reference(CASE.step, o, False)
    assert_close(y, exact, yardstick, before=before)


def test_of_denormals_alone_the_low_parts_are_lost(three: None, device: torch.device) -> None:
    """Below 2^-114 a low part is a denormal, of which TF32 holds the first bits (docs/facts.md)."""
    o = operands()
    for exponent, most in ((-120, 4e-5), (-126, 3e-3)):
        small = o._replace(x=o.x * 2.0**exponent)
        exact = reference(CASE.step, small, False)[0]
        error = (run(small, device).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < most


# --- as compiled ------------------------------------------------------------------------------------------------------

LAYER = Step(test_conv_wgrad.LAYERS[-2])  # 128 -> 64, 4x4, stride 2


@pytest.mark.parametrize("arch", [80, 90])
def test_blocks_are_added_outside_of_the_tensor_cores(arch: int) -> None:
    """Triton folds an addition to a product's sum into the product where it can; here it must not, as tensor cores cut.
    Of the three products of a block none starts from the sum that the loop carries."""
    from cnnfast.gpu import conv as launch

    x, weight = (
        torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
        for shape in ((16, 128, 16, 16), LAYER.spec.weight_shape)
    )
    with recording(arch) as calls, kinds("fp32x3"), tf32_convolutions(False):
        launch.run(LAYER, Operands(x, weight), True)
    (call,) = (c for c in calls if c.job.function == "conv_transpose_kernel")
    code = compile_job(call.job).asm["ttgir"]  # in either form of MLIR's text, the short and the general one
    products = re.findall(r'(%\w+) = "?(?:tt\.dot|ttng\.warp_group_dot)"?[ (]%\S+, %\S+, (%\w+)', code)
    assert len(products) == 3 and not any(start.startswith("%arg") for _, start in products), products
    waits = dict(re.findall(r'(%\w+)(?::\d)? = "?ttng\.warp_group_dot_wait"?[ (](%\w+)', code))
    sums = re.findall(r'= "?arith\.addf"?[ (](%\w+), (%\w+)', code)
    outside = [block for carried, block in sums if carried.startswith("%arg")]
    assert [waits.get(block, block) for block in outside] == [products[-1][0]], (outside, products)


def test_calls_do_not_take_it_yet() -> None:
    assert KINDS == (False,), "a GPU has measured it: say where (docs/facts.md), and test what calls take then"
