"""The tolerance rule: what passes, and what it says of what does not."""

from __future__ import annotations

import math

import pytest
import torch

from cnnfast.activations import Activation
from cnnfast.reference import run_reference
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step, Upsample, upsample_step
from cnnfast.tolerance import expected, limits, round_tf32, verdict

from .tolerance import assert_close


def triple() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(a float16 result, its float64 truth, its yardstick)."""
    exact = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    return exact.half(), exact, exact.half()


def test_a_rounded_result_passes() -> None:
    actual, exact, yardstick = triple()
    assert verdict(actual, exact, yardstick) is None
    assert verdict(actual[:0], exact[:0], yardstick[:0]) is None


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_twice_the_yardstick_and_the_floor_are_the_limit_of_the_root_mean_square() -> None:
    exact = torch.full((1000,), 1.0, dtype=torch.float64)
    yardstick = exact.float() + 1e-3
    twice = 2 * (yardstick.double() - exact)[0].item()
    half = torch.finfo(torch.float32).eps / 2
    assert limits(exact, yardstick).rms == pytest.approx(twice + half, rel=1e-9)
    assert limits(exact, yardstick, before=3.0).rms == pytest.approx(twice + 4 * half, rel=1e-9)
    assert verdict(exact.float() + 2e-3 - 1e-6, exact, yardstick) is None
    assert "RMS 0.002 (allowed 0.002)" in str(verdict(exact.float() + 2e-3 + 1e-6, exact, yardstick))


def test_an_element_may_be_what_the_worst_of_n_draws_is() -> None:
    """Of normal errors that are more than float32 arithmetic would make, as those of TF32 operands."""
    exact = normal(4, 64, 16, 16)
    yardstick = (exact + 1e-3 * normal(*exact.shape, seed=1)).float()
    allowed, scale = limits(exact, yardstick), math.sqrt(2 * math.log(2 * exact.numel() / 1e-9))
    usual = allowed.each[exact.abs() < 0.5]
    assert (usual / (2 * scale * 1e-3)).sub(1).abs().max() < 0.2
    one = yardstick.clone()
    one[2, 3, 4, 5] = exact[2, 3, 4, 5] + 1.2 * allowed.each[2, 3, 4, 5]
    problem = verdict(one, exact, yardstick)
    assert problem is not None and problem.count("; [") == 1 and "; [2, 3, 4, 5]: got " in problem


def test_limits_of_channels() -> None:
    """Channels (and images) that differ in scale have limits of their own, one whose yardstick is exact by luck that of
    the others, relative to its values; what is zero may be off by the last place of the largest value."""
    scale = torch.logspace(-3, 1, 12, dtype=torch.float64)[:, None, None]
    exact = normal(3, 12, 8, 8) * scale
    exact[:, 5] = 0
    yardstick = (exact * (1 + 1e-3 * normal(3, 12, 8, 8, seed=1))).float()
    yardstick[:, 7] = exact[:, 7].float()
    ratio = limits(exact, yardstick).each.amin((0, 2, 3)) / scale.flatten()
    known = [c for c in range(12) if c != 5]
    assert ratio[known].max() < 3 * ratio[known].min()
    assert 1e-7 < limits(exact, yardstick).each[:, 5].max() < 1e-5


def chain(terms: torch.Tensor, block: int) -> torch.Tensor:
    """Sums along dimension 0 in float32: chains of ``block`` terms, whose sums are added up."""
    sums = []
    for part in terms.split(block):
        total = part[0].clone()
        for t in part[1:]:
            total += t
        sums.append(total)
    return sums[0] if len(sums) == 1 else chain(torch.stack(sums), block)


def rounded(x: torch.Tensor, seed: int) -> torch.Tensor:
    """A sum with some error of its own, rounded to bfloat16, and a rounding on the way."""
    return (x + 3e-4 * normal(*x.shape, seed=seed)).bfloat16()


@pytest.mark.parametrize(("n", "times"), [(3, 100), (8, 200), (16, 200), (64, 200), (1000, 20), (65536, 2)])
def test_other_draws_of_the_same_errors_pass(n: int, times: int) -> None:
    for seed in range(times):
        exact = normal(n, seed=1000 + seed)
        draws = [(exact + 1e-5 * normal(n, seed=seed + k)).float() for k in (2000, 3000)]
        assert verdict(draws[0], exact, draws[1]) is None
        assert verdict(rounded(exact, 4000 + seed), exact, rounded(exact, 5000 + seed)) is None


@pytest.mark.parametrize(("n", "terms"), [(3, 100), (100, 1000), (20000, 300)])
def test_sums_in_any_order_pass(n: int, terms: int) -> None:
    """One chain against one in the other direction, and against a third of it at a time."""
    for seed in range(3):
        t = normal(terms, n, seed=seed).float()
        exact, one = t.double().sum(0), chain(t, terms)
        assert verdict(one, exact, chain(t, terms // 3)) is None
        assert verdict(chain(t.flip(0), terms), exact, one) is None


def test_a_channel_that_relu_leaves_a_few_values_of() -> None:
    """Where a value on the way was rounded, its size counts, not what the activation leaves of it."""
    inner = normal(2, 8, 16, 16)
    inner[:, 3] -= 2.6
    exact, yardstick = inner.relu(), inner.relu().bfloat16()
    actual = (inner + 2**-8 * normal(*inner.shape, seed=1)).relu().bfloat16()
    assert verdict(actual, exact, yardstick) is not None
    assert verdict(actual, exact, yardstick, before=inner) is None


def test_before_raises_the_floor() -> None:
    exact = torch.tensor([0.5], dtype=torch.float64)
    actual = torch.tensor([0.5 + 5e-6])
    assert verdict(actual, exact, exact.float()) is not None
    assert verdict(actual, exact, exact.float(), before=100.0) is None
    assert verdict(actual, exact, exact.float(), before=torch.tensor([-100.0])) is None


def test_an_expectation_that_is_not_finite() -> None:
    exact = torch.tensor([1.0, 1e5, 2.0], dtype=torch.float64)
    assert "1 values have no finite expectation, first at [1]" in str(verdict(exact.half(), exact, exact.half()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite(value: float) -> None:
    actual, exact, yardstick = triple()
    actual[1, 2, 3, 4] = value
    assert verdict(actual, exact, yardstick) == "1 non-finite values, first at [1, 2, 3, 4]"


def test_other_dtypes_and_shapes() -> None:
    actual, exact, yardstick = triple()
    assert verdict(actual.float(), exact, yardstick) == "dtype torch.float32, expected torch.float16"
    assert verdict(actual[:1], exact, yardstick) == "shape (1, 3, 4, 5), expected (2, 3, 4, 5)"


def test_asserted() -> None:
    actual, exact, yardstick = triple()
    actual[0, 1, 2, 3] += 1
    with pytest.raises(AssertionError, match=r"^layer 3: max error 1 \(allowed .*\[0, 1, 2, 3\]: got"):
        assert_close(actual, exact, yardstick, "layer 3")
    assert_close(*triple())


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("upsampled", [False, True])
def test_expected_is_the_reference_in_float64(tf32: bool, upsampled: bool) -> None:
    g = torch.Generator().manual_seed(0)
    if upsampled:
        step = upsample_step(8, 4, (3, 3), Upsample((2, 2), (1, 1), "reflect"), activation=Activation("tanh"))
        weight = torch.randn(4, 8, 3, 3, generator=g) / 8
    else:
        step = Step(ConvSpec.make(8, 4, 4, 2, 1), Activation("tanh"))
        weight = torch.randn(8, 4, 4, 4, generator=g) / 8
    o = Operands(torch.randn(2, 8, 5, 4, generator=g), weight, torch.randn(4, generator=g))
    exact, yardstick, before = expected(step, o, tf32)
    doubled = Operands(*(t.double() if isinstance(t, torch.Tensor) else t for t in o))
    torch.testing.assert_close(exact, run_reference(step, doubled))
    assert exact.dtype == torch.float64 and yardstick.dtype == torch.float32
    torch.testing.assert_close(before, exact.atanh(), rtol=1e-5, atol=0)
    wrong = (yardstick - exact).abs().max().item()
    assert wrong > 1e-5 if tf32 else wrong < 1e-6


def test_round_tf32_keeps_ten_bits() -> None:
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -(1 + 3 * 2**-11)])
    assert round_tf32(x).tolist() == [1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -(1 + 2**-9)]


def test_round_tf32_keeps_what_is_not_finite() -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000, -0x800000], dtype=torch.int32)  # CUDA's NaN first
    rounded = round_tf32(bits.view(torch.float32))
    assert rounded[:3].isnan().all() and rounded[3:].tolist() == [float("inf"), -float("inf")]
