"""Normalisation by statistics, affine, residual and activation: the forward kernels.

    y = act((x - mean) * rstd * weight + bias + residual)

A tensor is (SEGMENTS, ROWS, C) when it is channels-last, (SEGMENTS, C, ROWS) when it is not. A segment is one image, or
the whole batch where no tensor of the launch is laid out by images and no image has statistics of its own. A program
owns TILES * BLOCK_M rows of a segment (a *part*) and BLOCK_C channels.

Statistics are centred. Each element of a tile is a lane that runs Welford's recurrence over the rows that it meets; at
its end a part joins its lanes, and `merge_stats_kernel` joins the parts, always in the same order: no atomics, the
same bits from run to run. (E[x^2] - E[x]^2 loses everything where the mean is far larger than the deviation.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import act
from .epilogue import slopes, vector
from .indexing import offsets, part_base, part_of_segment
from .statistics import center_and_scale, store_statistics

# Vectors (a user's buffers) need not lie at multiples of 16 bytes; a binary for each combination would be many.
RUNNING = ["running_mean_ptr", "running_var_ptr", "batches_ptr"]
VECTORS = ["mean_ptr", "var_ptr", "weight_ptr", "bias_ptr", "slope_ptr"]


@triton.jit
def _total(x, JOIN: tl.constexpr):
    """Sum of a (parts, channels) tile: over the parts, and over the channels where they share statistics."""
    s = tl.sum(x, 0)
    if JOIN > 1:
        s = tl.sum(s, 0)
    return s


# --- statistics -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["ROWS", "PARTS", "TILES"])
def partial_stats_kernel(
    x_ptr,
    stats_ptr,  # `cnnfast.norms.Partials`
    ROWS,
    PARTS,
    TILES,
    C: tl.constexpr,
    X_LAST: tl.constexpr,
    ROWS_BY: tl.constexpr,  # divides ROWS and BLOCK_M: spelt out for the compiler, which then loads 16 bytes at a time
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Count, mean and sum of squares about it, of each channel over the part."""
    ROWS, segment, first, here, chan, chan_mask = part_of_segment(ROWS, PARTS, TILES, C, ROWS_BY, BLOCK_M, BLOCK_C)
    x_ptr = part_base(x_ptr, segment, first, ROWS, C, X_LAST)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    met = 0.0
    for row0 in range(0, here, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        on = rows < here
        mask = on[:, None] & chan_mask[None, :]
        x = tl.load(x_ptr + offsets(rows, chan, ROWS, C, X_LAST), mask=mask, other=0.0).to(tl.float32)
        met += 1.0
        delta = tl.where(on[:, None], x - mean, 0.0)
        mean += delta * (1.0 / met)
        m2 += delta * (x - mean)
    # Rows that each lane has met: counted here and not in the loop, which would carry them in another layout.
    n = ((here + BLOCK_M - 1 - tl.arange(0, BLOCK_M)) // BLOCK_M).to(tl.float32)
    count = here.to(tl.float32)
    center = tl.sum(mean * n[:, None], 0) / count
    center += tl.sum((mean - center[None, :]) * n[:, None], 0) / count
    d = mean - center[None, :]
    m2 = tl.sum(m2 + d * d * n[:, None], 0)
    first = tl.program_id(1) == 0
    store_statistics(stats_ptr, tl.program_id(0), tl.num_programs(0), count, center, m2, chan, chan_mask, first, C)


@triton.jit(do_not_specialize=["PARTS", "eps", "momentum", "keep"], do_not_specialize_on_alignment=RUNNING)
def merge_stats_kernel(
    stats_ptr,  # `cnnfast.norms.Partials`
    moments_ptr,  # (SEGMENTS, 2, C / JOIN) float32: mean and 1/deviation
    var_ptr,  # (SEGMENTS, C / JOIN) float32, unbiased; or None
    running_mean_ptr,  # (C,), or None: moved towards mean and unbiased variance
    running_var_ptr,
    batches_ptr,  # () int64, or None: goes up by one
    PARTS,
    eps,
    momentum,
    keep,  # 1 - momentum
    C: tl.constexpr,
    JOIN: tl.constexpr,  # channels that share statistics: 1, or those of a group
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_C channels of a segment, or one group of JOIN channels. Lanes take every BLOCK_P-th part by
    Chan's formula, and are joined once."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C if JOIN == 1 else C // JOIN
    pid = tl.program_id(0)
    segment = pid // BLOCKS
    block = pid - segment * BLOCKS
    parts = tl.num_programs(0) // BLOCKS * PARTS  # of all segments
    mean_ptr = stats_ptr + parts
    m2_ptr = mean_ptr + parts.to(tl.int64) * C
    n = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for c0 in range(0, JOIN, BLOCK_C):
        if JOIN == 1:
            chan = block * BLOCK_C + tl.arange(0, BLOCK_C)
            chan_mask = chan < C
        else:
            inner = c0 + tl.arange(0, BLOCK_C)
            chan = block * JOIN + inner
            chan_mask = inner < JOIN
        for p0 in range(0, PARTS, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            mask = (p < PARTS)[:, None] & chan_mask[None, :]
            part = segment.to(tl.int64) * PARTS + p
            offs = part[:, None] * C + chan[None, :]
            more = tl.load(stats_ptr + part[:, None] + chan[None, :] * 0, mask=mask, other=0.0)
            share = more / tl.maximum(n + more, 1.0)
            delta = tl.load(mean_ptr + offs, mask=mask, other=0.0) - mean
            m2 += tl.load(m2_ptr + offs, mask=mask, other=0.0) + delta * delta * n * share
            mean += delta * share
            n += more
    total = tl.maximum(_total(n, JOIN), 1.0)
    center = _total(mean * n, JOIN) / total
    center += _total((mean - center) * n, JOIN) / total
    d = mean - center
    m2_total = _total(m2 + d * d * n, JOIN)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(m2_total / total + eps))
    unbiased = m2_total / tl.maximum(total - 1.0, 1.0)
    if JOIN == 1:
        chan = block * BLOCK_C + tl.arange(0, BLOCK_C)
        chan_mask = chan < C
        others = segment.to(tl.int64) * C + chan
        offs = others + segment.to(tl.int64) * C
        if running_mean_ptr is not None:
            old = tl.load(running_mean_ptr + chan, mask=chan_mask, other=0.0).to(tl.float32)
            new = old * keep + center * momentum
            tl.store(running_mean_ptr + chan, new.to(running_mean_ptr.dtype.element_ty), mask=chan_mask)
        if running_var_ptr is not None:
            old = tl.load(running_var_ptr + chan, mask=chan_mask, other=0.0).to(tl.float32)
            new = old * keep + unbiased * momentum
            tl.store(running_var_ptr + chan, new.to(running_var_ptr.dtype.element_ty), mask=chan_mask)
    else:
        others = pid.to(tl.int64)
        offs = others + segment * BLOCKS
        chan_mask = pid >= 0
    tl.store(moments_ptr + offs, center, mask=chan_mask)
    tl.store(moments_ptr + C // JOIN + offs, rstd, mask=chan_mask)
    if var_ptr is not None:
        tl.store(var_ptr + others, unbiased, mask=chan_mask)
    if batches_ptr is not None:
        tl.store(batches_ptr, tl.load(batches_ptr, mask=pid == 0, other=0) + 1, mask=pid == 0)


# --- one pass: normalise, affine, residual, activation ----------------------------------------------------------------


@triton.jit(do_not_specialize=["ROWS", "PARTS", "TILES", "eps"], do_not_specialize_on_alignment=VECTORS)
def norm_act_kernel(
    x_ptr,
    y_ptr,
    residual_ptr,  # in y's layout, or None
    mean_ptr,  # `center_and_scale`, with var_ptr
    var_ptr,
    weight_ptr,  # (C,) or None, like bias
    bias_ptr,
    slope_ptr,  # (SLOPES,)
    ROWS,
    PARTS,
    TILES,
    eps,
    C: tl.constexpr,
    JOIN: tl.constexpr,
    EACH: tl.constexpr,  # every segment has statistics of its own
    VAR: tl.constexpr,  # mean and variance are given
    SLOPES: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    ACT: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    ROWS_BY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ROWS, segment, first, here, chan, chan_mask = part_of_segment(ROWS, PARTS, TILES, C, ROWS_BY, BLOCK_M, BLOCK_C)
    mean, rstd = center_and_scale(mean_ptr, var_ptr, segment, chan, chan_mask, eps, C, JOIN, EACH, VAR)
    scale = rstd * vector(weight_ptr, chan, chan_mask, 1.0)
    shift = vector(bias_ptr, chan, chan_mask, 0.0)
    slope = slopes(slope_ptr, chan, chan_mask, SLOPES)
    x_ptr = part_base(x_ptr, segment, first, ROWS, C, X_LAST)
    y_ptr = part_base(y_ptr, segment, first, ROWS, C, Y_LAST)
    if residual_ptr is not None:
        residual_ptr = part_base(residual_ptr, segment, first, ROWS, C, Y_LAST)
    for row0 in range(0, here, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        mask = (rows < here)[:, None] & chan_mask[None, :]
        x = tl.load(x_ptr + offsets(rows, chan, ROWS, C, X_LAST), mask=mask, other=0.0).to(tl.float32)
        z = (x - mean[None, :]) * scale[None, :] + shift[None, :]
        offs_y = offsets(rows, chan, ROWS, C, Y_LAST)
        if residual_ptr is not None:
            z += tl.load(residual_ptr + offs_y, mask=mask, other=0.0).to(tl.float32)
        y = act(z, slope, P0, P1, ACT)
        tl.store(y_ptr + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask)
