"""Device functions that give the statistics of a convolution's result with the result, by parts (`cnnfast.norms`), and
that read the statistics by which a tensor is normalised."""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import vector


@triton.jit
def store_statistics(stats_ptr, part, parts, count, mean, m2, chan, chan_mask, first, COUT: tl.constexpr):
    """One part of `cnnfast.norms.Partials`: count (parts,), mean (parts, COUT) and m2 likewise, one after the other.
    ``first``: whether this program is the part's one that stores the count."""
    offs = part.to(tl.int64) * COUT + chan
    tl.store(stats_ptr + part, count, mask=first)
    tl.store(stats_ptr + parts + offs, mean, mask=chan_mask)
    tl.store(stats_ptr + parts + parts.to(tl.int64) * COUT + offs, m2, mask=chan_mask)


@triton.jit
def emit_statistics(v, row_mask, rows, stats_ptr, part, parts, chan, chan_mask, first, COUT: tl.constexpr):
    """Mean and centred sum of squares of v (BLOCK_M, BLOCK_N), as stored, over its first ``rows`` rows."""
    v = v.to(tl.float32)
    count = rows.to(tl.float32)
    mean = tl.sum(tl.where(row_mask[:, None], v, 0.0), 0) / count
    d = tl.where(row_mask[:, None], v - mean[None, :], 0.0)
    store_statistics(stats_ptr, part, parts, count, mean, tl.sum(d * d, 0), chan, chan_mask, first, COUT)


@triton.jit
def center_and_scale(
    mean_ptr,  # (segments or 1, 2, C / JOIN): mean and 1/deviation; where VAR the mean alone; None: 0 and 1
    var_ptr,  # (C,) where VAR
    segment,
    chan,
    mask,
    eps,
    C: tl.constexpr,
    JOIN: tl.constexpr,
    EACH: tl.constexpr,
    VAR: tl.constexpr,
):
    """(mean, 1/deviation) of each channel."""
    offs = chan // JOIN
    if EACH:
        offs += segment.to(tl.int64) * (2 * (C // JOIN))
    mean = vector(mean_ptr, offs, mask, 0.0)
    if VAR:
        rstd = tl.div_rn(1.0, tl.sqrt_rn(vector(var_ptr, offs, mask, 1.0) + eps))
    else:
        rstd = vector(mean_ptr, offs + C // JOIN, mask, 1.0)
    return mean, rstd
