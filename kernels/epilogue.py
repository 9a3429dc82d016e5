"""Device functions that kernels share: vectors of channels, the epilogue on an accumulator."""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import act


@triton.jit
def vector(ptr, offs, mask, default: tl.constexpr):
    """Elements of a vector of any dtype in float32; ``default`` where there is no vector."""
    if ptr is None:
        return (offs * 0).to(tl.float32) + default  # not `tl.full`, which knows no layout: Gluon calls this too
    else:
        return tl.load(ptr + offs, mask=mask, other=default).to(tl.float32)


@triton.jit
def slopes(slope_ptr, chan, mask, SLOPES: tl.constexpr):
    """PReLU's weight, of SLOPES elements (one for all channels, or one for each), against a tile: (1, BLOCK_N)."""
    return vector(slope_ptr, chan * (1 if SLOPES > 1 else 0), mask, 0.0)[None, :]


@triton.jit
def epilogue(
    acc,
    offs,
    mask,
    chan,
    chan_mask,
    residual_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    scale_ptr,
    shift_ptr,
    slope_ptr,
    eps,
    SLOPES: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    ACT: tl.constexpr,
):
    """All between the sums and the store, in float32: acc (BLOCK_M, BLOCK_N), whose element lies at ``offs`` of the
    residual where ``mask``; chan (BLOCK_N,) its output channels. Every pointer may be None. In any layout: Gluon's
    kernels call it too."""
    if bias_ptr is not None or mean_ptr is not None:
        center = vector(bias_ptr, chan, chan_mask, 0.0) - vector(mean_ptr, chan, chan_mask, 0.0)
        acc += center[None, :]
    if var_ptr is not None or scale_ptr is not None:
        factor = vector(scale_ptr, chan, chan_mask, 1.0)
        if var_ptr is not None:
            factor *= tl.rsqrt(vector(var_ptr, chan, chan_mask, 1.0) + eps)
        acc *= factor[None, :]
    if shift_ptr is not None:
        acc += vector(shift_ptr, chan, chan_mask, 0.0)[None, :]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if ACT == "prelu":
        slope = slopes(slope_ptr, chan, chan_mask, SLOPES)
    else:
        slope = 0.0
    return act(acc, slope, P0, P1, ACT)


@triton.jit
def finish(
    acc,
    offs,
    mask,
    chan,
    chan_mask,
    y_ptr,
    residual_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    scale_ptr,
    shift_ptr,
    slope_ptr,
    eps,
    SLOPES: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    ACT: tl.constexpr,
):
    """`epilogue` and the store to ``offs`` of y where ``mask``. Returns the values as stored."""
    # fmt: off
    acc = epilogue(acc, offs, mask, chan, chan_mask, residual_ptr, bias_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr,
                   slope_ptr, eps, SLOPES, P0, P1, ACT).to(y_ptr.dtype.element_ty)
    # fmt: on
    tl.store(y_ptr + offs, acc, mask=mask)
    return acc
