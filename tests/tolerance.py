"""The one tolerance rule of the tests.

A result may differ from float64 by at most twice what a yardstick of the same precision differs: float32 arithmetic on
operands rounded to the dtype, the result rounded once. Both in the maximum and in the root mean square, plus a floor of
one rounding of the result's dtype relative to the largest expected value (a yardstick can be exact by luck; no rounded
result can promise better than its last place) and one float32 rounding of the largest value before the activation,
where the caller names it (tanh of 5 forgets the magnitude at which the sum was rounded).
"""

from __future__ import annotations

import torch

__all__ = ["assert_close", "round_tf32"]


def round_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 values rounded to TF32's ten explicit mantissa bits, to nearest, ties away from zero (as cuDNN
    rounds)."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def assert_close(
    actual: torch.Tensor, expected64: torch.Tensor, yardstick: torch.Tensor, what: str = "", before: float = 0.0
) -> None:
    """``actual`` against float64, no worse than twice ``yardstick`` (same dtype as actual) plus the floor.

    ``before``: the largest magnitude before the activation."""
    assert actual.dtype == yardstick.dtype, f"{what}: dtype {actual.dtype}, expected {yardstick.dtype}"
    assert actual.shape == expected64.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected64.shape)}"
    if actual.numel() == 0:
        return
    got, ref, yard = (t.detach().double().cpu() for t in (actual, expected64, yardstick))
    nan = ~torch.isfinite(got) & torch.isfinite(ref)
    assert not nan.any(), f"{what}: {int(nan.sum())} non-finite values, first at {nan.nonzero()[0].tolist()}"
    error, allowed = (got - ref).abs(), (yard - ref).abs()
    eps = torch.finfo(actual.dtype).eps
    floor = eps * ref.abs().max().item() + torch.finfo(torch.float32).eps * before
    worst, limit = error.max().item(), 2 * allowed.max().item() + floor
    rms, rms_limit = error.square().mean().sqrt().item(), 2 * allowed.square().mean().sqrt().item() + floor / 2
    if worst <= limit and rms <= rms_limit:
        return
    at = (error > limit).nonzero()[:5].tolist()
    at = at or [list(torch.unravel_index(error.argmax(), error.shape))]
    lines = [f"{[int(i) for i in c]}: got {got[tuple(c)].item():.6g}, expected {ref[tuple(c)].item():.6g}" for c in at]
    raise AssertionError(
        f"{what}: max error {worst:.3g} (allowed {limit:.3g}), RMS {rms:.3g} (allowed {rms_limit:.3g}); "
        + "; ".join(lines)
    )
