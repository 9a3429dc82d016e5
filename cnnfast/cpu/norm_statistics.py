"""Statistics of channels-last maps on a CPU that are as exact as PyTorch's of contiguous ones, and norms by them.

PyTorch adds up the values of a channel of such a map one after the other. Here one call gives mean and variance of
every channel of every few hundred positions, which are merged in float64 (by NumPy, whose calls on a few numbers take
half the time of PyTorch's).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..norms import Norm
from ..step import Operands

__all__ = ["MOST", "VECTOR_16", "is_far", "normalise", "statistics"]

MOST = 1250
"""Values for each thread that ATen may add up one after the other in float32: where most are the same one, each sum is
rounded alike, and errors grow with their number, to 1e-5 of the largest result (docs/facts.md)."""

VECTOR_16 = 32
"""Channels that ATen takes at once in 16 bits."""

Array = NDArray[np.float64]

_FAR = 8.0  # deviations of a mean from 0: beyond, sums and products are rounded at a size that the result has not
_FAR_16 = 32.0  # likewise in 16 bits, that sums of one value after the other bear
_WIDE_16 = 512  # channels in 16 bits; so many are as good as more


def is_far(mean: Tensor, inverse: Tensor, limit: float) -> bool:
    """Whether a mean is more than ``limit`` deviations from 0, or no number; ``inverse``: one over these."""
    farthest = torch.linalg.vector_norm(mean * inverse, math.inf).item()
    return not farthest <= limit


@np.errstate(all="ignore")  # of what is not finite, as PyTorch has it
def normalise(norm: Norm, o: Operands, y: Tensor) -> list[tuple[Array, Array]]:
    """Each image with the statistics of its channels or groups: y, which x may be. Mean and (biased) variance of each,
    (C or groups,)."""
    x, join = o.x, norm.join(o.x.shape[1])
    narrow = x.dtype != torch.float32
    scale, shift = (t if t is None or not narrow else t.float() for t in (o.scale, o.shift))
    found: tuple[Tensor, ...]
    each, empty = [], x.new_empty(0, dtype=torch.float32)
    for image, into in [(x, y)] if len(x) == 1 else zip(x.split(1), y.split(1), strict=True):
        at_once = _at_once(image, norm.eps) if narrow and join == 1 else None
        if at_once is None:
            mean, var = statistics(_rows(image), join)
            measured = mean
            if not narrow and (mean * mean > _FAR**2 * (var + norm.eps)).any():
                (of_channels,) = _of_channels(join, mean)
                image = image - of_channels.view(1, -1, *(1,) * (x.dim() - 2))
                mean, var = statistics(_rows(image), join)
                measured = mean + measured
            each.append((measured, var))
            found = _of_channels(join, mean, var)
        else:
            each.append((at_once[0].numpy(), at_once[1].numpy()))
            found = at_once
        # ATen's BatchNorm by given statistics: a product and a sum, in one pass over a channels-last map.
        vectors: list[Any] = [scale, shift, *found]
        of = image
        if narrow and (times := _positions_at_once(*_rows(image).shape)) > 1:
            vectors = [None if v is None else v.repeat(times) for v in vectors]
            of, into = _joined(_rows(image), times), _joined(_rows(into), times)
        weight, bias, by, over = vectors
        torch.native_batch_norm(of, weight, bias, by, over, False, 0.0, norm.eps, out=(into, empty, empty.detach()))
    return each


def _rows(image: Tensor) -> Tensor:
    """(1, C, *size), channels-last, as (positions, C)."""
    channels = image.shape[1]
    return image.as_strided((image.numel() // channels, channels), (channels, 1))  # one call, where views are several


def _joined(rows: Tensor, times: int) -> Tensor:
    """(positions, C) as (1, times * C, 1, positions / times), channels-last: so many positions are one with more
    channels."""
    n, channels = rows.shape
    whole, each = n * channels, times * channels
    return rows.as_strided((1, each, 1, n // times), (whole, 1, whole, each))


def _positions_at_once(positions: int, channels: int) -> int:
    """How many are taken as one in 16 bits, of which ATen leaves channels that fill no vector to scalar code."""
    times = 1
    while channels % VECTOR_16 and times * channels < _WIDE_16 and positions % (2 * times) == 0:
        times *= 2
    return times


def _of_channels(join: int, *statistics: Array) -> tuple[Tensor, ...]:
    """(C / join,) each as (C,) float32."""
    rows = np.array(statistics, dtype=np.float32)
    return torch.from_numpy(rows if join == 1 else np.repeat(rows, join, 1)).unbind()


# --- statistics -------------------------------------------------------------------------------------------------------


_FEW = 512  # values whose sum in float32 is about as exact as each of them


@np.errstate(all="ignore")
def statistics(rows: Tensor, join: int) -> tuple[Array, Array]:
    """Mean and (biased) variance of every ``join`` columns of (n, C): (C / join,)."""
    n = len(rows)
    parts, each = _parts(n)
    used = parts * each
    mean, var = _merged(rows if n == used else rows[:used], parts, join)
    if n > used:
        rest_mean, rest_var = _merged(rows[used:], 1, join)
        share, difference = (n - used) / n, rest_mean - mean
        mean = mean + difference * share
        var = var * (1 - share) + rest_var * share + difference * difference * (share * (1 - share))
    return mean, var


def _at_once(image: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """Mean and (biased) variance of each channel of an image in 16 bits, in float32; None where ATen's sums of one
    value after the other, in float32, do not bear its means, or its vectors are not filled."""
    if image.shape[1] % VECTOR_16:
        return None
    mean, var = _float32_statistics(image)
    return None if is_far(mean, (var + eps).rsqrt_(), _FAR_16) else (mean, var)


def _float32_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """ATen's of a BatchNorm: it has float32 ones of 16 bits where the running ones are."""
    running = None if x.dtype == torch.float32 else x.new_zeros(x.shape[1], dtype=torch.float32)
    return torch.batch_norm_update_stats(x, running, running, 0.0)


def _merged(rows: Tensor, parts: int, join: int) -> tuple[Array, Array]:
    """`statistics` of ``parts`` times as many rows as each of the parts has: every ``parts``-th row is of one."""
    means, variances = (t.numpy().reshape(parts, -1, join) for t in _of_parts(rows, parts))
    apart, count = means.astype(np.float64), parts * join
    mean = np.add.reduce(apart, (0, 2)) / count
    apart -= mean[:, None]
    np.multiply(apart, apart, out=apart)
    apart += variances
    return mean, np.add.reduce(apart, (0, 2)) / count


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
