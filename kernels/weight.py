"""A weight brought into the order in which `conv_transpose.conv_transpose_kernel` reads it, taps summed on the way.

    out[g, u, i, v, o] = sum over the terms e of w[g, i, o, table[u, v, e]]

Two kinds of layers need it on every call: few columns, whose phases (v) share a tile, with zeros where a phase lacks
a tap; and a convolution after an upsampling, each of whose taps is a sum (`cnnfast.reference.collapse_weight`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_weight_kernel(
    w_ptr,  # element (g, i, o, tap) at g*W_GROUP + i*W_IN + o*W_OUT + the tap's offset
    table_ptr,  # (slots, TERMS) int32: offsets of the taps that are summed, negative where there are fewer
    out_ptr,  # element (g, slot, i, o) at g*OUT_GROUP + (slot // PHASES)*OUT_TAP + i*OUT_IN + (slot % PHASES)*COUT + o
    CIN: tl.constexpr,  # of a group, like the next
    COUT: tl.constexpr,
    W_GROUP: tl.constexpr,
    W_IN: tl.constexpr,
    W_OUT: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    OUT_TAP: tl.constexpr,
    OUT_IN: tl.constexpr,
    PHASES: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """One program owns BLOCK_I x BLOCK_O channels of a slot and group. Sums are exact to one rounding: float64 for
    float32."""
    slot = tl.program_id(1)
    group = tl.program_id(2).to(tl.int64)
    tiles_o = tl.cdiv(COUT, BLOCK_O)
    offs_i = tl.program_id(0) // tiles_o * BLOCK_I + tl.arange(0, BLOCK_I)
    offs_o = tl.program_id(0) % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    mask = (offs_i < CIN)[:, None] & (offs_o < COUT)[None, :]
    source = w_ptr + group * W_GROUP + offs_i[:, None] * W_IN + offs_o[None, :] * W_OUT
    if w_ptr.dtype.element_ty == tl.float32 and TERMS > 1:
        acc = tl.zeros((BLOCK_I, BLOCK_O), tl.float64)
    else:
        acc = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    for e in tl.static_range(TERMS):
        tap = tl.load(table_ptr + slot * TERMS + e)
        value = tl.load(source + tl.maximum(tap, 0), mask=mask & (tap >= 0), other=0.0)
        acc += value.to(acc.dtype)
    offs = (slot // PHASES) * OUT_TAP + offs_i[:, None] * OUT_IN + (slot % PHASES) * COUT + offs_o[None, :]
    tl.store(out_ptr + group * OUT_GROUP + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)
