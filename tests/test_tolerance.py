"""The tolerance rule: what passes, and what it says of what does not."""

from __future__ import annotations

import pytest
import torch

from cnnfast.activations import Activation
from cnnfast.reference import run_reference
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step, Upsample, upsample_step
from cnnfast.tolerance import expected, round_tf32, verdict

from .tolerance import assert_close


def triple() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(a float16 result, its float64 truth, its yardstick)."""
    exact = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    return exact.half(), exact, exact.half()


def test_a_rounded_result_passes() -> None:
    actual, exact, yardstick = triple()
    assert verdict(actual, exact, yardstick) is None
    assert verdict(actual[:0], exact[:0], yardstick[:0]) is None


def test_twice_the_yardstick_and_the_floor_are_the_limit() -> None:
    exact = torch.full((1000,), 1.0, dtype=torch.float64)
    yardstick = exact.float() + 1e-3
    limit = 2 * (yardstick.double() - exact).max().item() + torch.finfo(torch.float32).eps
    rms = 2e-3 + torch.finfo(torch.float32).eps / 2
    one = exact.float()
    one[7] += limit - 1e-6
    assert verdict(one, exact, yardstick) is None
    one[7] = 1.0 + limit + 1e-6
    problem = verdict(one, exact, yardstick)
    assert problem is not None and problem.endswith("; [7]: got 1.002, expected 1")
    everywhere = exact.float() + rms + 1e-6
    assert "RMS 0.002 (allowed 0.002)" in str(verdict(everywhere, exact, yardstick))


def test_before_raises_the_floor() -> None:
    exact = torch.tensor([0.5], dtype=torch.float64)
    actual = torch.tensor([0.5 + 5e-6])
    assert verdict(actual, exact, exact.float()) is not None
    assert verdict(actual, exact, exact.float(), before=100.0) is None


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
    assert before == pytest.approx(exact.atanh().abs().max().item(), rel=1e-5)
    wrong = (yardstick - exact).abs().max().item()
    assert wrong > 1e-5 if tf32 else wrong < 1e-6


def test_round_tf32_keeps_ten_bits() -> None:
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -(1 + 3 * 2**-11)])
    assert round_tf32(x).tolist() == [1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -(1 + 2**-9)]


def test_round_tf32_keeps_what_is_not_finite() -> None:
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000, -0x800000], dtype=torch.int32)  # CUDA's NaN first
    rounded = round_tf32(bits.view(torch.float32))
    assert rounded[:3].isnan().all() and rounded[3:].tolist() == [float("inf"), -float("inf")]
