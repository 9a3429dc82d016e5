"""Norms of channels-last maps in inference on a CPU, and what follows them.

PyTorch's own take E[x^2] - E[x]^2 of such a map (GroupNorm), add up a channel's values one after the other (BatchNorm),
or convert it to NCHW (InstanceNorm). Here they are taken where the map and its means bear that, and statistics by parts
(`norm_statistics`) elsewhere; one pass scales and shifts then, and the rest is in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

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
from .norm_statistics import MOST, VECTOR_16, is_far, normalise

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
        normalise(norm, o, y)
    if o.residual is not None:
        y += o.residual
    return activated(y, activation, o.slope)


SMALL = {"group": 2**14, "instance": 2**15}  # numbers of an image in 16 bits, in the time of which it is converted
# Of the errors that `MOST` knows, a mean of m deviations from 0 makes more: positions * (0.6 + m^2) of 800 in a group,
# whose variance is E[x^2] - E[x]^2, and positions * (3.2 + m) of 5000 in a channel, of which what differs from the mean
# is squared, are 1e-5 of the largest result (docs/facts.md).
_FARTHEST = 32.0
_NEAR_16 = 3.0  # deviations of a mean from 0 that E[x^2] - E[x]^2 bears, where the result is rounded to 16 bits
# Of fewer positions ATen takes a group in 16 bits by its channels alone, one by one where they fill no vector (ten
# times slower), and converting an image up to so large costs less than calls for its statistics.
_FEW_POSITIONS_16, _GROUP_16, _SMALL_BY_SCALARS = 1024, 16, 2**16
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
    if each > MOST:
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
    if channels % VECTOR_16 == VECTOR_16 // 2:
        return channels * positions > _HALF_16 * threads
    return channels % VECTOR_16 != 0
