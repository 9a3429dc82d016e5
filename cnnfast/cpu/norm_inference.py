"""Norms of channels-last maps in inference on a CPU, and what follows them.

PyTorch's own take E[x^2] - E[x]^2 of such a map (GroupNorm), add up a channel's values one after the other (BatchNorm),
or convert it to NCHW (InstanceNorm). Here one call gives mean and variance of every channel of every few hundred
positions, which are merged in float64; one pass scales and shifts, and the rest is in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import Activation
from ..dispatch import needs_gradient
from ..memory_format import format_of, new_strides
from ..norms import Norm
from ..spec import DTYPES
from ..step import Operands
from .finish import activated
from .norm import is_far

__all__ = ["SMALL", "at_once", "finished", "why_not"]


def why_not(norm: Norm | None, o: Operands) -> str | None:
    """Why `finished` does not apply, or None: it does to a dense map of several positions, channels-last, in float32 or
    16 bits (whose weight and bias may be float32: autocast), and a norm by the statistics of each image that moves no
    others."""
    x = o.x
    if norm is None or not norm.measured or not norm.per_image:
        return "it does not measure each image"
    if needs_gradient(o):
        return "a gradient is wanted"
    if o.mean is not None or o.var is not None:
        return "it moves running statistics"
    affine = {t.dtype for t in (o.scale, o.shift) if t is not None}
    others = {t.dtype for t in (o.residual, o.slope) if t is not None}
    if x.dtype not in DTYPES or not (others <= {x.dtype} and (affine <= {x.dtype} or affine == {torch.float32})):
        return "it is not all float32, or in 16 bits but for weight and bias"
    if x.dim() not in (4, 5) or x.is_contiguous() or not x.is_contiguous(memory_format=format_of(x.dim(), True)):
        return "the map is not channels-last"
    if x.numel() == 0 or o.residual is not None and o.residual.shape != x.shape:
        return f"shapes {tuple(x.shape)} and {None if o.residual is None else tuple(o.residual.shape)}"
    return None


def finished(norm: Norm, o: Operands, activation: Activation, *, ours: bool) -> Tensor:
    """``act(norm(x) + residual)`` of what `why_not` accepts, channels-last; in place of x where that is ``ours``."""
    x = o.x
    by_aten = _by_aten(norm, x.shape, x.dtype, torch.get_num_threads())
    y = None if by_aten is None else by_aten(x, o.scale, o.shift)
    if y is None:
        y = x if ours else torch.empty_like(x)
        _normalise(norm, o, y)
    if o.residual is not None:
        y += o.residual
    return activated(y, activation, o.slope)


SMALL = {"group": 2**14, "instance": 2**15}  # numbers of an image in 16 bits, in the time of which it is converted
# In float32 ATen adds the values and squares of a channel up one after the other, each thread those of so many
# positions; where most values are the same one, each sum is rounded alike, and errors grow with the positions. What a
# mean of m deviations from 0 makes of that: with `_MOST` positions, or positions * (0.6 + m^2) of 800 in a group, whose
# variance is E[x^2] - E[x]^2, and positions * (3.2 + m) of 5000 in a channel, of which what differs from the mean is
# squared, 1e-5 of the largest result (docs/facts.md).
_MOST, _FARTHEST = 1250, 32.0
_FAR = 8.0  # deviations of a mean from 0: beyond, sums and products are rounded at a size that the result has not
_NEAR_16 = 3.0  # deviations of a mean from 0 that E[x^2] - E[x]^2 bears, where the result is rounded to 16 bits
_FAR_16 = 32.0  # likewise, that sums of one value after the other bear
# Of fewer positions ATen takes a group in 16 bits by its channels alone, one by one where they fill no vector (ten
# times slower), and converting an image up to so large costs less than calls for its statistics.
_FEW_POSITIONS_16, _GROUP_16, _SMALL_BY_SCALARS = 1024, 16, 2**16
_VECTOR_16, _WIDE_16 = 32, 512  # channels that ATen takes at once in 16 bits; so many are as good as more
_HALF_16 = 2**20  # numbers for each thread up to which it takes groups no slower where half a vector is left

_ByAten = Callable[[Tensor, Tensor | None, Tensor | None], Tensor | None]


@lru_cache(maxsize=4096)
def _by_aten(norm: Norm, shape: torch.Size, dtype: torch.dtype, threads: int) -> _ByAten | None:
    """The norm of maps of this shape by ATen, of x, weight and bias, where its sums are short, or its result is rounded
    to 16 bits; None where that is not so, and where it tells of the values."""
    if dtype != torch.float32:
        return _by_aten_16(norm, shape, threads)
    positions = math.prod(shape[2:])
    each = max(positions if positions < _LEAST_ON_THREADS else positions / threads, 1)
    if each > _MOST:
        return None
    if norm.kind == "group":
        return partial(_groups, norm, new_strides(shape, True), math.sqrt(800 / each - 0.6))
    return partial(_images, norm, new_strides(shape, True), min(5000 / each - 3.2, _FARTHEST))


def at_once(norm: Norm, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether a norm of channels-last maps of this shape (N, C, *size) is a few calls, of most values."""
    return _by_aten(norm, torch.Size(shape), dtype, torch.get_num_threads()) is not None


_LEAST_ON_THREADS = 2048  # positions that ATen takes on several threads, whatever the groups are


def _by_aten_16(norm: Norm, shape: torch.Size, threads: int) -> _ByAten | None:
    """`_by_aten` in 16 bits: of small images with the contiguous copy, which costs less than a few calls."""
    channels, positions = shape[1], math.prod(shape[2:])
    by_scalars = norm.kind == "group" and channels // norm.groups % _GROUP_16 != 0 and positions < _FEW_POSITIONS_16
    if channels * positions <= (_SMALL_BY_SCALARS if by_scalars else SMALL[norm.kind]):
        return partial(_contiguous, norm)
    if norm.kind != "group" or by_scalars or _leaves_scalars(channels, positions, threads):
        return None
    return partial(_groups_16, norm, new_strides(shape, True))


def _contiguous(norm: Norm, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    x, last = x.contiguous(), format_of(x.dim(), True)
    if norm.kind == "group":
        return _grouped(norm, x, scale, shift)[0].contiguous(memory_format=last)
    return F.instance_norm(x, weight=scale, bias=shift, eps=norm.eps).contiguous(memory_format=last)


def _groups(
    norm: Norm, strides: tuple[int, ...], near: float, x: Tensor, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """Of groups that have a mean farther than ``near``, less that mean."""
    x = _strided(x, strides)
    y, mean, inverse = _grouped(norm, x, scale, shift)
    if is_far(mean, inverse, near):
        mean = mean.repeat_interleave(x.shape[1] // norm.groups, 1).view(*x.shape[:2], *(1,) * (x.dim() - 2))
        y, _, _ = _grouped(norm, x - mean, scale, shift)
    return y.contiguous(memory_format=format_of(x.dim(), True))


def _groups_16(
    norm: Norm, strides: tuple[int, ...], x: Tensor, scale: Tensor | None, shift: Tensor | None
) -> Tensor | None:
    """None where a mean is far: a difference would be rounded."""
    y, mean, inverse = _grouped(norm, _strided(x, strides), scale, shift)
    return None if is_far(mean, inverse, _NEAR_16) else y.contiguous(memory_format=format_of(x.dim(), True))


def _images(
    norm: Norm, strides: tuple[int, ...], near: float, x: Tensor, scale: Tensor | None, shift: Tensor | None
) -> Tensor | None:
    """Each image as a batch, by ATen's BatchNorm; None where a mean is farther than ``near``."""
    x = _strided(x, strides)
    if len(x) == 1:
        y, mean, inverse = torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, norm.eps)
        return None if is_far(mean, inverse, near) else y.contiguous(memory_format=format_of(x.dim(), True))
    y = torch.empty_like(x)
    for image, into in zip(x.split(1), y.split(1), strict=True):
        out = into, x.new_empty(0), x.new_empty(0)
        _, mean, inverse = torch.native_batch_norm(image, scale, shift, None, None, True, 0.0, norm.eps, out=out)
        if is_far(mean, inverse, near):
            return None
    return y


def _grouped(norm: Norm, x: Tensor, scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm, and of each group its mean and one over its deviation."""
    n, c, *size = x.shape
    return torch.native_group_norm(x, scale, shift, n, c, math.prod(size), norm.groups, norm.eps)


def _strided(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Sizes of one have strides of any size."""
    return x if x.stride() == strides else x.as_strided(x.shape, strides)


def _leaves_scalars(channels: int, positions: int, threads: int) -> bool:
    """Whether ATen takes a group norm of an image in 16 bits slower than calls for its statistics are, as its channels
    do not fill vectors."""
    if channels % _VECTOR_16 == _VECTOR_16 // 2:
        return channels * positions > _HALF_16 * threads
    return channels % _VECTOR_16 != 0


def _normalise(norm: Norm, o: Operands, y: Tensor) -> None:
    """Each image with the statistics of its channels: y, which x may be."""
    x, join = o.x, norm.join(o.x.shape[1])
    narrow = x.dtype != torch.float32
    scale, shift = (t if t is None or not narrow else t.float() for t in (o.scale, o.shift))
    for k, image in enumerate(x.split(1)):
        found = _at_once(image, norm.eps) if narrow and join == 1 else None
        if found is None:
            mean, var = _of_groups(_rows(image), join)
            if not narrow and (mean.square().sub_(var, alpha=_FAR**2) > norm.eps * _FAR**2).any():
                image = image - _of_channels(mean, join).view(1, -1, *(1,) * (x.dim() - 2))
                mean, var = _of_groups(_rows(image), join)
            found = _of_channels(mean, join), _of_channels(var, join)
        # ATen's BatchNorm by given statistics: a product and a sum, in one pass over a channels-last map.
        vectors: list[Any] = [scale, shift, *found]
        of, into = image, y[k : k + 1]
        if narrow and (times := _positions_at_once(*_rows(image).shape)) > 1:
            vectors = [None if v is None else v.repeat(times) for v in vectors]
            of, into = _joined(_rows(image), times), _joined(_rows(into), times)
        out = into, found[0].new_empty(0), found[0].new_empty(0)
        weight, bias, mean, var = vectors
        torch.native_batch_norm(of, weight, bias, mean, var, False, 0.0, norm.eps, out=out)


def _rows(image: Tensor) -> Tensor:
    """(1, C, *size), channels-last, as (positions, C)."""
    return image.movedim(1, -1).view(-1, image.shape[1])


def _joined(rows: Tensor, times: int) -> Tensor:
    """(positions, C) as (1, times * C, 1, positions / times), channels-last: so many positions are one with more
    channels."""
    return rows.view(1, 1, -1, times * rows.shape[1]).permute(0, 3, 1, 2)


def _positions_at_once(positions: int, channels: int) -> int:
    """How many are taken as one in 16 bits, of which ATen leaves channels that fill no vector to scalar code."""
    times = 1
    while channels % _VECTOR_16 and times * channels < _WIDE_16 and positions % (2 * times) == 0:
        times *= 2
    return times


def _of_channels(v: Tensor, join: int) -> Tensor:
    """(C / join,) float64 as (C,) float32."""
    v = v.float()
    return v if join == 1 else v.view(-1, 1).expand(-1, join).reshape(-1)


# --- statistics -------------------------------------------------------------------------------------------------------


_FEW = 512  # values whose sum in float32 is about as exact as each of them


def _of_groups(rows: Tensor, join: int) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of every ``join`` columns of (n, C): (C / join,), float64."""
    n = len(rows)
    parts, each = _parts(n)
    used = parts * each
    mean, var = _merged(rows if n == used else rows[:used], parts, join)
    if n > used:
        rest_mean, rest_var = _merged(rows[used:], 1, join)
        share, difference = (n - used) / n, rest_mean - mean
        mean = mean.add(difference, alpha=share)
        var = var * (1 - share) + rest_var * share + difference.square() * (share * (1 - share))
    return mean, var


def _at_once(image: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """Mean and (biased) variance of each channel of an image in 16 bits, in float32; None where ATen's sums of one
    value after the other, in float32, do not bear its means, or its vectors are not filled."""
    if image.shape[1] % _VECTOR_16:
        return None
    mean, var = _float32_statistics(image)
    return None if is_far(mean, (var + eps).rsqrt_(), _FAR_16) else (mean, var)


def _float32_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """ATen's of a BatchNorm: it has float32 ones of 16 bits where the running ones are."""
    running = None if x.dtype == torch.float32 else x.new_zeros(x.shape[1], dtype=torch.float32)
    return torch.batch_norm_update_stats(x, running, running, 0.0)


def _merged(rows: Tensor, parts: int, join: int) -> tuple[Tensor, Tensor]:
    """`_of_groups` of ``parts`` times as many rows as each of the parts has: every ``parts``-th row is of one."""
    means, variances = _of_parts(rows, parts)
    between, mean = torch.var_mean(means.view(parts, -1, join).double(), (0, 2), correction=0)
    return mean, between.add_(variances.view(parts, -1, join).mean((0, 2), dtype=torch.float64))


_READ_TWICE = 2**22  # bytes that are still in a cache when they are read again


def _of_parts(rows: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each column of each part, (parts * C,)."""
    # PyTorch's BatchNorm of parts * C channels takes their means and variances in two readings.
    each = len(rows) // parts
    at_once = max(1, _READ_TWICE // (each * rows.shape[1] * rows.element_size()))
    if parts <= 2 * at_once:
        return _float32_statistics(_joined(rows, parts))
    found = [_float32_statistics(_joined(some, len(some) // each)) for some in rows.split(at_once * each)]
    means, variances = zip(*found, strict=True)
    return torch.cat(means), torch.cat(variances)


@lru_cache(maxsize=1024)
def _parts(n: int) -> tuple[int, int]:
    """Into how many parts of how many rows n rows are cut, but for a rest smaller than the parts are many."""
    parts = -(-n // _FEW)
    parts = next((k for k in range(parts, 2 * parts) if n % k == 0), parts)
    return parts, n // parts
