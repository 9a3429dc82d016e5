"""The one tolerance rule, of the tests and of the check at a kernel's first use.

A result may differ from float64 by twice as much as a yardstick of the same precision: float32 arithmetic on operands
rounded to the dtype, the result rounded once. What follows is said of n elements; u is the dtype's epsilon.

**All elements.** The root mean square of the errors is at most twice the yardstick's (but at least what rounding values
of the size before the activation would give: a saturated result forgets it), plus half a floor: one rounding of the
largest expected value (a yardstick can be exact by luck) and one float32 rounding of the largest value on the way.

**Each element** is within what the worst of n errors of twice the yardstick's scale may be, with probability 1 - 1e-9.

- The scale s is the root mean square of the yardstick's errors in the element's image and channel (row times column
  over all; in a weight, its first two dimensions), and at least that of all relative to the size of the values there,
  or of one rounding to the dtype of such values (0.21 u of their RMS): one channel's errors may be small by luck.
- Rounded operands and results make many small, bounded errors: Gaussian, so that the worst of n is below
  2 s sqrt(2 ln(2 n / 1e-9)), 16 s for 65,536 elements, 17 s for 10^7. The last rounding alone is below u |expected|.
- If the 16 worst errors of the yardstick, ahead of the last rounding and in units of s, have a root mean square T
  larger than as many of n Gaussian draws have, elements differ in scale in a way that is not known, and the limit
  grows in that proportion; and with the element's own size where that is above what is usual in its channel.
- A sum in float32 is not Gaussian: each addition errs in proportion to the partial sum that it meets. For a running sum
  that ends at b times its RMS, the error is a normal number times the root of b^2/3 + U, U the integral of a squared
  Brownian bridge; its tail is exp(-2.2 t) in units of its RMS. There the limit is 8 T max(1, |b|) s. T is 4 to 6: a sum
  in one chain of twice the RMS passes with 1 - 1e-9 even where the yardstick's, in blocks, has Gaussian tails.
- The yardstick's scale is an estimate. Of two sets of n draws one has exp(6 / sqrt(n)) times the other's RMS with
  probability 1e-9: below 75 draws that is more than 2, and takes its place for what was wrong ahead of the last
  rounding. Draws are fewer than elements where few errors outweigh the rest (2 n / (kurtosis - 1)) or a channel's go
  together (by the variance of the channels' means over that of independent errors).

**A whole model** rounds in float32 at each of its layers, and sums in another order at each: values of up to `LAYERS`
times the largest result count as rounded on the way. Its yardsticks are PyTorch's own runs of it, in which sums have
other orders, too; it may be as far from float64 as the rule allows by one of them.

So a single wrong element is noticed, in layers of DCGAN's sizes, when it is off by 1e-5 to 2e-5 of the result's RMS in
float32, 0.7 % in TF32, 0.5 % in float16 and 4 % in bfloat16 (of its own magnitude, if that is larger).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch

from .activations import Activation
from .reference import conv_weight, run_reference
from .step import Operands, Step

__all__ = ["Limits", "expected", "limits", "model_verdict", "round_tf32", "verdict"]

ALARM = 1e-9  # the probability that a right result is refused
SIGMA = 6.0  # that of a normal number above this
WORST = 16  # so many of the yardstick's errors tell how it errs at the worst: known within 18 %
ROUNDING = 0.21  # the RMS of a rounding over u times the value, over mantissas as they occur: sqrt(3 / 8 / ln 2 / 12)
FLOAT32 = 2**-14  # more than float32 arithmetic loses of a result: there, operands were rounded to fewer bits
LAYERS = 64  # roundings on the way through a whole model, of the size of its largest result
TINY = 1e-300


def round_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 values rounded to TF32's ten explicit mantissa bits, to nearest, ties away from zero (as cuDNN
    rounds)."""
    x = x.float().contiguous()
    rounded = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isnan(), x, rounded)  # the addition carries a NaN of all ones to -0


@dataclass(frozen=True)
class Limits:
    """What a result may be wrong by: each element (float64, of the result's shape), and all in the root mean square."""

    each: torch.Tensor
    rms: float


def limits(expected64: torch.Tensor, yardstick: torch.Tensor, before: torch.Tensor | float = 0.0) -> Limits:
    """The limits of results in ``yardstick``'s dtype; finite tensors of at least one element, any device.

    ``before``: the values before the activation, of the result's shape, where they may have been rounded on the way
    (tanh of 5 forgets the size of the sum, and so does a channel that ReLU leaves a few values of); or a number, the
    largest magnitude that float32 rounded on the way.
    """
    ref, yard = (t.detach().type(torch.float64) for t in (expected64, yardstick))
    kind, eps32 = torch.finfo(yardstick.dtype), torch.finfo(torch.float32).eps
    eps, n, magnitude, signed = kind.eps, ref.numel(), ref.abs(), yard - ref
    if isinstance(before, torch.Tensor):
        inner = magnitude.maximum(before.detach().type(torch.float64).abs())
        largest, way = magnitude.max().item(), inner.max().item()
    else:
        inner, largest, way = magnitude, magnitude.max().item(), before
    error, last_place = signed.abs(), eps * magnitude.clamp_min(kind.smallest_normal)
    earlier = (error - last_place / 2).clamp_min(0)  # what was wrong ahead of the last rounding, as far as it shows
    rms, size = _rms(error), _rms(inner)
    unsure = max(2.0, math.exp(SIGMA / math.sqrt(_draws(signed, earlier))))

    usual = _rms_of_planes(inner).clamp_min(TINY)
    scale = torch.maximum(_rms_of_planes(error), usual * max(rms / max(size, TINY), ROUNDING * eps))
    grown = scale * (magnitude / usual).clamp_min(1)
    worst = _rms((earlier / grown).flatten().topk(min(n, WORST)).values)
    gauss = math.sqrt(2 * math.log(2 * n / ALARM))
    sums = yardstick.dtype == torch.float32 and rms <= FLOAT32 * size
    tail = unsure * (4 * worst if sums else gauss * worst / _worst_of(n))
    each = torch.maximum(torch.maximum(last_place, 2 * gauss * scale), tail * grown) + min(eps, eps32) * max(
        largest, way
    )

    rounded = 2 * ROUNDING * eps * size * (1 + SIGMA / math.sqrt(2 * n))
    whole = max(2 * rms + (unsure - 2) * _rms(earlier), rounded)
    return Limits(each, whole + (eps * largest + eps32 * way) / 2)


def _rms(t: torch.Tensor) -> float:
    return t.square().mean().sqrt().item()


def _draws(signed: torch.Tensor, earlier: torch.Tensor) -> float:
    """As how many independent errors the yardstick's count, from 1 to n."""
    n, rms = signed.numel(), _rms(signed)
    size = _rms(earlier)
    if size == 0:
        return n
    kurtosis = _rms((earlier / size).square()) ** 2
    together = 1.0
    if signed.dim() > 1:
        means = signed.mean([k for k in range(signed.dim()) if k != 1])
        together = n / means.numel() * (_rms(means) / rms) ** 2
    return max(1.0, n / max(1.0, (kurtosis - 1) / 2) / max(1.0, together))


def _rms_of_planes(t: torch.Tensor) -> torch.Tensor:
    """The root mean square in each part of the first two dimensions, broadcastable: that of a row times that of a
    column over that of all. A row or column of few elements does not count as smaller than all."""
    square = t.square()
    mean = square.mean()
    planes = mean.sqrt()
    for d in (0, 1) if t.dim() > 1 and mean > 0 else ():
        few = t.numel() // t.shape[d]
        if few >= 4:
            ratio = (square.mean([k for k in range(t.dim()) if k != d], keepdim=True) / mean).sqrt()
            planes = planes * (ratio if few >= WORST else ratio.clamp_min(1))
    return planes


def _worst_of(n: int) -> float:
    """The root mean square of the `WORST` largest of n standard normal numbers."""
    share = WORST / n
    if share >= 1:
        return 1.0
    q = NormalDist().inv_cdf(1 - share / 2)
    return math.sqrt(1 + 2 * q * NormalDist().pdf(q) / share)


def verdict(
    actual: torch.Tensor, expected64: torch.Tensor, yardstick: torch.Tensor, before: torch.Tensor | float = 0.0
) -> str | None:
    """None where ``actual`` is within the `limits` that ``yardstick`` (same dtype) sets; otherwise what is wrong with
    it, with numbers and positions.

    Any device (the tensors on one). ``before``: as of `limits`.
    """
    if actual.dtype != yardstick.dtype:
        return f"dtype {actual.dtype}, expected {yardstick.dtype}"
    if actual.shape != expected64.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected64.shape)}"
    if actual.numel() == 0:
        return None
    # `Tensor.type`, not `to`: interpreters that stand in for a GPU look at every argument of `to`.
    got, ref, yard = (t.detach().type(torch.float64) for t in (actual, expected64, yardstick))
    known = torch.isfinite(ref) & torch.isfinite(yard)
    bad = ~torch.isfinite(got) & known
    if bad.any():
        return f"{int(bad.sum())} non-finite values, first at {bad.nonzero()[0].tolist()}"
    if not known.all():
        unknown = ~known
        return f"{int(unknown.sum())} values have no finite expectation, first at {unknown.nonzero()[0].tolist()}"
    allowed = limits(ref, yardstick, before)
    error, rms = (got - ref).abs(), _rms(got - ref)
    over = int((error > allowed.each).sum())
    if over == 0 and rms <= allowed.rms:
        return None
    worst = (error / allowed.each).flatten().topk(min(5, max(1, over))).indices
    at = [tuple(int(i) for i in torch.unravel_index(k, error.shape)) for k in worst]
    numbers = (
        f"max error {error[at[0]].item():.3g} (allowed {allowed.each[at[0]].item():.3g}), "
        f"RMS {rms:.3g} (allowed {allowed.rms:.3g})"
    )
    return "; ".join([numbers, *(f"{list(c)}: got {got[c].item():.6g}, expected {ref[c].item():.6g}" for c in at)])


def model_verdict(actual: torch.Tensor, expected64: torch.Tensor, yardsticks: Sequence[torch.Tensor]) -> str | None:
    """`verdict` of a result of a whole model, a gradient or a buffer, by any of ``yardsticks``: PyTorch's own runs."""
    way = LAYERS * expected64.abs().max().item() if expected64.numel() else 0.0
    problem = None
    for yardstick in yardsticks:
        found = verdict(actual, expected64, yardstick, way)
        if found is None:
            return None
        problem = problem or found
    return problem


def _cast(o: Operands, dtype: torch.dtype) -> Operands:
    tensors: dict[str, Any] = {k: v.detach().type(dtype) for k, v in o._asdict().items() if isinstance(v, torch.Tensor)}
    return o._replace(**tensors)


def expected(step: Step, o: Operands, tf32: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(the step in float64, the yardstick in x's dtype, the values before the activation), on o's device.

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
        run = replace(step, upsample=None, pad=(0,) * step.spec.ndim)
    before = run_reference(replace(step, activation=Activation()), exact)
    slope = exact.slope if step.activation.name == "prelu" else None
    yardstick = run_reference(run, wide).type(o.x.dtype)
    return step.activation(before, slope), yardstick, before
