"""Backward of normalisation, affine, residual and activation: one pass that sums, a finish, one pass that applies.

    z = xhat * weight + bias + residual,  xhat = (x - mean) * rstd,  y = act(z)
    dz = grad * act'(z)           act' of z itself, which is computed again, or of y
    dbias = sum dz,  dweight = sum dz * xhat
    dx = rstd * (weight * dz - mean1 - xhat * mean2), the means of weight * dz and weight * dz * xhat over what shares
         statistics (both 0 where the statistics are constants)

Layouts, segments and parts are those of `norm_act.py`. Sums of parts are added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import act_grad
from .epilogue import slopes, vector
from .indexing import offsets, part_base, part_of_segment
from .norm_act import VECTORS
from .statistics import center_and_scale

GRADIENTS = ["bias_grad_ptr", "weight_grad_ptr", "slope_grad_ptr", "weight_ptr"]


@triton.jit
def _gradient(
    grad,
    xhat,
    saved_ptr,  # y where OF is "y", the residual (or None) where it is "x"; at the part's base
    offs,
    mask,
    weight,
    bias,
    slope,
    P0: tl.constexpr,
    P1: tl.constexpr,
    ACT: tl.constexpr,
    OF: tl.constexpr,
):
    """(dz, z): the gradient ahead of the activation, and what it is taken at."""
    if OF == "":
        return grad, grad
    elif OF == "y":
        y = tl.load(saved_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        return grad * act_grad(y, slope, P0, P1, ACT, "y"), y
    else:
        z = xhat * weight[None, :] + bias[None, :]
        if saved_ptr is not None:
            z += tl.load(saved_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        return grad * act_grad(z, slope, P0, P1, ACT, "x"), z


@triton.jit(do_not_specialize=["ROWS", "PARTS", "TILES", "eps"], do_not_specialize_on_alignment=VECTORS)
def grad_sums_kernel(
    x_ptr,
    grad_ptr,  # in Y_LAST's layout, like saved
    saved_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    slope_ptr,
    sums_ptr,  # (2 or 3, SEGMENTS, PARTS, C) float32: of dz, dz * xhat, and with SLOPE_SUM grad * z where z <= 0
    ROWS,
    PARTS,
    TILES,
    eps,
    C: tl.constexpr,
    JOIN: tl.constexpr,
    EACH: tl.constexpr,
    VAR: tl.constexpr,
    SLOPES: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    ACT: tl.constexpr,
    OF: tl.constexpr,
    SLOPE_SUM: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    ROWS_BY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ROWS, segment, first, here, chan, chan_mask = part_of_segment(ROWS, PARTS, TILES, C, ROWS_BY, BLOCK_M, BLOCK_C)
    mean, rstd = center_and_scale(mean_ptr, var_ptr, segment, chan, chan_mask, eps, C, JOIN, EACH, VAR)
    weight = vector(weight_ptr, chan, chan_mask, 1.0)
    bias = vector(bias_ptr, chan, chan_mask, 0.0)
    slope = slopes(slope_ptr, chan, chan_mask, SLOPES)
    x_ptr = part_base(x_ptr, segment, first, ROWS, C, X_LAST)
    grad_ptr = part_base(grad_ptr, segment, first, ROWS, C, Y_LAST)
    if saved_ptr is not None:
        saved_ptr = part_base(saved_ptr, segment, first, ROWS, C, Y_LAST)
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_xhat = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if SLOPE_SUM:
        sum_slope = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for row0 in range(0, here, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        mask = (rows < here)[:, None] & chan_mask[None, :]
        x = tl.load(x_ptr + offsets(rows, chan, ROWS, C, X_LAST), mask=mask, other=0.0).to(tl.float32)
        offs = offsets(rows, chan, ROWS, C, Y_LAST)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        xhat = (x - mean[None, :]) * rstd[None, :]
        dz, z = _gradient(grad, xhat, saved_ptr, offs, mask, weight, bias, slope, P0, P1, ACT, OF)
        sum_dz += dz
        sum_dz_xhat += dz * xhat
        if SLOPE_SUM:
            sum_slope += tl.where(z > 0, 0.0, grad * z)
    parts = tl.num_programs(0).to(tl.int64) * C
    out = sums_ptr + tl.program_id(0).to(tl.int64) * C + chan
    tl.store(out, tl.sum(sum_dz, 0), mask=chan_mask)
    tl.store(out + parts, tl.sum(sum_dz_xhat, 0), mask=chan_mask)
    if SLOPE_SUM:
        tl.store(out + 2 * parts, tl.sum(sum_slope, 0), mask=chan_mask)


@triton.jit(do_not_specialize=["SEGMENTS", "PARTS", "COUNT"], do_not_specialize_on_alignment=GRADIENTS)
def finish_sums_kernel(
    sums_ptr,  # (number of outputs, SEGMENTS, PARTS, C) float32
    bias_grad_ptr,  # (C,), like the next two: sums over all segments and parts, or None
    weight_grad_ptr,
    slope_grad_ptr,
    means_ptr,  # (SEGMENTS, 2, C / JOIN) float32: mean1 and mean2; or None
    weight_ptr,  # (C,) or None
    SEGMENTS,
    PARTS,
    COUNT,  # float: values that share statistics
    C: tl.constexpr,
    JOIN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Programs 0, 1, ...: BLOCK_C channels of the gradients of the vectors. Those after them: the means of BLOCK_C
    channels, or a group, of a segment."""
    CHANNEL_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    BLOCKS: tl.constexpr = CHANNEL_BLOCKS if JOIN == 1 else C // JOIN
    pid = tl.program_id(0)
    total = SEGMENTS.to(tl.int64) * PARTS
    second = sums_ptr + total * C
    a = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    b = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if pid < CHANNEL_BLOCKS:
        chan = pid * BLOCK_C + tl.arange(0, BLOCK_C)
        chan_mask = chan < C
        c = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for p0 in range(0, SEGMENTS * PARTS, BLOCK_P):
            p = p0 + tl.arange(0, BLOCK_P)
            mask = (p < SEGMENTS * PARTS)[:, None] & chan_mask[None, :]
            offs = p.to(tl.int64)[:, None] * C + chan[None, :]
            if bias_grad_ptr is not None:
                a += tl.load(sums_ptr + offs, mask=mask, other=0.0)
            if weight_grad_ptr is not None:
                b += tl.load(second + offs, mask=mask, other=0.0)
            if slope_grad_ptr is not None:
                c += tl.load(second + total * C + offs, mask=mask, other=0.0)
        if bias_grad_ptr is not None:
            tl.store(bias_grad_ptr + chan, tl.sum(a, 0).to(bias_grad_ptr.dtype.element_ty), mask=chan_mask)
        if weight_grad_ptr is not None:
            tl.store(weight_grad_ptr + chan, tl.sum(b, 0).to(weight_grad_ptr.dtype.element_ty), mask=chan_mask)
        if slope_grad_ptr is not None:
            tl.store(slope_grad_ptr + chan, tl.sum(c, 0).to(slope_grad_ptr.dtype.element_ty), mask=chan_mask)
    elif means_ptr is not None:
        pid -= CHANNEL_BLOCKS
        segment = pid // BLOCKS
        block = pid - segment * BLOCKS
        for c0 in range(0, JOIN, BLOCK_C):
            if JOIN == 1:
                chan = block * BLOCK_C + tl.arange(0, BLOCK_C)
                chan_mask = chan < C
            else:
                inner = c0 + tl.arange(0, BLOCK_C)
                chan = block * JOIN + inner
                chan_mask = inner < JOIN
            weight = vector(weight_ptr, chan, chan_mask, 1.0)[None, :]
            for p0 in range(0, PARTS, BLOCK_P):
                p = p0 + tl.arange(0, BLOCK_P)
                mask = (p < PARTS)[:, None] & chan_mask[None, :]
                offs = (segment.to(tl.int64) * PARTS + p)[:, None] * C + chan[None, :]
                a += tl.load(sums_ptr + offs, mask=mask, other=0.0) * weight
                b += tl.load(second + offs, mask=mask, other=0.0) * weight
        if JOIN == 1:
            offs_m = segment.to(tl.int64) * (2 * C) + block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask_m = block * BLOCK_C + tl.arange(0, BLOCK_C) < C
            tl.store(means_ptr + offs_m, tl.sum(a, 0) / COUNT, mask=mask_m)
            tl.store(means_ptr + C + offs_m, tl.sum(b, 0) / COUNT, mask=mask_m)
        else:
            offs_g = segment.to(tl.int64) * BLOCKS + pid
            tl.store(means_ptr + offs_g, tl.sum(tl.sum(a, 0), 0) / COUNT)
            tl.store(means_ptr + BLOCKS + offs_g, tl.sum(tl.sum(b, 0), 0) / COUNT)


@triton.jit(do_not_specialize=["ROWS", "PARTS", "TILES", "eps"], do_not_specialize_on_alignment=VECTORS)
def grad_apply_kernel(
    x_ptr,
    grad_ptr,
    saved_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    slope_ptr,
    means_ptr,  # (segments or 1, 2, C / JOIN): mean1 and mean2; or None: the statistics are constants
    dx_ptr,  # in x's layout
    dz_ptr,  # in Y_LAST's layout, or None
    ROWS,
    PARTS,
    TILES,
    eps,
    C: tl.constexpr,
    JOIN: tl.constexpr,
    EACH: tl.constexpr,
    VAR: tl.constexpr,
    SLOPES: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    ACT: tl.constexpr,
    OF: tl.constexpr,
    X_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    ROWS_BY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ROWS, segment, first, here, chan, chan_mask = part_of_segment(ROWS, PARTS, TILES, C, ROWS_BY, BLOCK_M, BLOCK_C)
    mean, rstd = center_and_scale(mean_ptr, var_ptr, segment, chan, chan_mask, eps, C, JOIN, EACH, VAR)
    mean1, mean2 = center_and_scale(means_ptr, None, segment, chan, chan_mask, eps, C, JOIN, EACH, False)
    weight = vector(weight_ptr, chan, chan_mask, 1.0)
    bias = vector(bias_ptr, chan, chan_mask, 0.0)
    slope = slopes(slope_ptr, chan, chan_mask, SLOPES)
    x_ptr = part_base(x_ptr, segment, first, ROWS, C, X_LAST)
    dx_ptr = part_base(dx_ptr, segment, first, ROWS, C, X_LAST)
    grad_ptr = part_base(grad_ptr, segment, first, ROWS, C, Y_LAST)
    if saved_ptr is not None:
        saved_ptr = part_base(saved_ptr, segment, first, ROWS, C, Y_LAST)
    if dz_ptr is not None:
        dz_ptr = part_base(dz_ptr, segment, first, ROWS, C, Y_LAST)
    for row0 in range(0, here, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        mask = (rows < here)[:, None] & chan_mask[None, :]
        offs_x = offsets(rows, chan, ROWS, C, X_LAST)
        offs = offsets(rows, chan, ROWS, C, Y_LAST)
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if means_ptr is not None or OF == "x":
            x = tl.load(x_ptr + offs_x, mask=mask, other=0.0).to(tl.float32)
            xhat = (x - mean[None, :]) * rstd[None, :]
        else:
            xhat = grad
        dz, _ = _gradient(grad, xhat, saved_ptr, offs, mask, weight, bias, slope, P0, P1, ACT, OF)
        if dz_ptr is not None:
            tl.store(dz_ptr + offs, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        dx = dz * weight[None, :]
        if means_ptr is not None:
            dx -= mean1[None, :] + xhat * mean2[None, :]
        tl.store(dx_ptr + offs_x, (dx * rstd[None, :]).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["ROWS", "PARTS", "TILES"])
def act_backward_kernel(
    grad_ptr,
    saved_ptr,  # as OF says; None where OF is ""
    dz_ptr,  # None where OF is ""
    sums_ptr,  # (1, SEGMENTS, PARTS, C) float32 of dz, or None
    ROWS,
    PARTS,
    TILES,
    C: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    ACT: tl.constexpr,
    OF: tl.constexpr,
    Y_LAST: tl.constexpr,
    ROWS_BY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """An activation's backward with the sums that are a convolution's bias gradient."""
    ROWS, segment, first, here, chan, chan_mask = part_of_segment(ROWS, PARTS, TILES, C, ROWS_BY, BLOCK_M, BLOCK_C)
    grad_ptr = part_base(grad_ptr, segment, first, ROWS, C, Y_LAST)
    if OF != "":
        saved_ptr = part_base(saved_ptr, segment, first, ROWS, C, Y_LAST)
        dz_ptr = part_base(dz_ptr, segment, first, ROWS, C, Y_LAST)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for row0 in range(0, here, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M)
        mask = (rows < here)[:, None] & chan_mask[None, :]
        offs = offsets(rows, chan, ROWS, C, Y_LAST)
        dz = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if OF != "":
            saved = tl.load(saved_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            dz = (dz * act_grad(saved, 0.0, P0, P1, ACT, OF)).to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + offs, dz, mask=mask)
        total += dz.to(tl.float32)
    if sums_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * C + chan, tl.sum(total, 0), mask=chan_mask)
