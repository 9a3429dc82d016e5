"""The one tolerance rule, of the tests and of the check at a kernel's first use.

A result may differ from float64 by at most twice what a yardstick of the same precision differs: float32 arithmetic on
operands rounded to the dtype, the result rounded once. Both in the maximum and in the root mean square, plus a floor of
one rounding of the result's dtype relative to the largest expected value (a yardstick can be exact by luck; no rounded
result can promise better than its last place) and one float32 rounding of the largest value before the activation,
where the caller names it (tanh of 5 forgets the magnitude at which the sum was rounded).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .activations import Activation
from .reference import conv_weight, run_reference
from .step import Operands, Step

__all__ = ["expected", "round_tf32", "verdict"]


def round_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 values rounded to TF32's ten explicit mantissa bits, to nearest, ties away from zero (as cuDNN
    rounds)."""
    x = x.float().contiguous()
    rounded = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isnan(), x, rounded)  # the addition carries a NaN of all ones to -0


def verdict(actual: torch.Tensor, expected64: torch.Tensor, yardstick: torch.Tensor, before: float = 0.0) -> str | None:
    """None where ``actual`` is no worse than twice ``yardstick`` (same dtype as actual) plus the floor; otherwise what
    is wrong with it, with numbers and positions.

    Any device (the three on one). ``before``: the largest magnitude before the activation.
    """
    if actual.dtype != yardstick.dtype:
        return f"dtype {actual.dtype}, expected {yardstick.dtype}"
    if actual.shape != expected64.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected64.shape)}"
    if actual.numel() == 0:
        return None
    # `Tensor.type`, not `to`: interpreters that stand in for a GPU look at every argument of `to`.
    got, ref, yard = (t.detach().type(torch.float64) for t in (actual, expected64, yardstick))
    bad = ~torch.isfinite(got) & torch.isfinite(ref)
    if bad.any():
        return f"{int(bad.sum())} non-finite values, first at {bad.nonzero()[0].tolist()}"
    error, allowed = (got - ref).abs(), (yard - ref).abs()
    eps = torch.finfo(actual.dtype).eps
    floor = eps * ref.abs().max().item() + torch.finfo(torch.float32).eps * before
    worst, limit = error.max().item(), 2 * allowed.max().item() + floor
    rms, rms_limit = error.square().mean().sqrt().item(), 2 * allowed.square().mean().sqrt().item() + floor / 2
    if worst <= limit and rms <= rms_limit:
        return None
    at = (error > limit).nonzero()[:5].tolist()
    at = at or [[int(i) for i in torch.unravel_index(error.argmax(), error.shape)]]
    lines = [f"{c}: got {got[tuple(c)].item():.6g}, expected {ref[tuple(c)].item():.6g}" for c in at]
    numbers = f"max error {worst:.3g} (allowed {limit:.3g}), RMS {rms:.3g} (allowed {rms_limit:.3g})"
    return f"{numbers}; " + "; ".join(lines)


def _cast(o: Operands, dtype: torch.dtype) -> Operands:
    tensors: dict[str, Any] = {k: v.detach().type(dtype) for k, v in o._asdict().items() if isinstance(v, torch.Tensor)}
    return o._replace(**tensors)


def expected(step: Step, o: Operands, tf32: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(the step in float64, the yardstick in x's dtype, the largest magnitude before the activation), on o's device.

    ``tf32``: float32 operands count as rounded to TF32. On a GPU PyTorch's switch must not allow TF32 for float32
    operands that count as exact.
    """
    wide, exact = _cast(o, torch.float32), _cast(o, torch.float64)
    run = step
    if tf32:
        # The kernel multiplies what an upsampling's taps sum to, rounded; a torch user's convolution rounds the taps.
        wide = wide._replace(x=round_tf32(wide.x), weight=round_tf32(wide.weight))
    elif step.upsample is not None and o.x.dtype != torch.float32:
        wide = wide._replace(x=step.pad_input(wide.x), weight=conv_weight(step, o.weight).type(torch.float32))
        run = replace(step, upsample=None, pad=(0, 0))
    before = run_reference(replace(step, activation=Activation()), exact)
    slope = exact.slope if step.activation.name == "prelu" else None
    yardstick = run_reference(run, wide).type(o.x.dtype)
    return step.activation(before, slope), yardstick, before.abs().max().item() if before.numel() else 0.0
