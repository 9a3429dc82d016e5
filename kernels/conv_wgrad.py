"""Weight gradient of a convolution, transposed or plain: a matrix product over all positions.

    dw[g, a, b, t] = sum over positions (n, h, w) of A[n, h, w, g, a] * B[n, SH*h + DH*t_h - PAD_H, SW*w + ..., g, b]

A is the tensor on the grid of the gather, B the one that the taps step over: for a transposed convolution A is its
input and B the gradient of its output, for a plain one A is the gradient of the output and B the input. Both are
channels-last and dense; dw takes any strides (the parameter's).

M = A's channels of a group, N = (tap, channel of B), K = positions. One trip of the loop takes a box of RN images x RH
lines x RW positions (at most BLOCK_K): where a row of a tile lies inside its box is known before the loop, so that a
trip moves a corner by scalars and divides nothing. In three dimensions A's planes (n, d) count as images: a trip finds
the plane of B that each row meets at each tap, with one division a row.

The boxes are cut in SPLITS parts whose float32 sums `sum_splits_kernel` adds in a fixed order: results are the same
to the bit from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .indexing import inside
from .product import multiply_add, unscaled


@triton.jit(do_not_specialize=["N", "D", "H", "W", "BD", "BH", "BW", "SPLITS", "RN", "RH", "RW"])
def conv_wgrad_kernel(
    a_ptr,  # (N, H, W, GROUPS * CA)
    b_ptr,  # (N, BH, BW, GROUPS * CB), or (N // D, BD, BH, BW, GROUPS * CB)
    out_ptr,  # element (a of all groups, b, td, th, tw) at their products with OUT_A, OUT_B, OUT_D, OUT_H, OUT_W
    work_ptr,  # (SPLITS, GROUPS * CA, KD * KH * KW, CB) float32, used where SPLITS > 1
    N,  # images of A, or their planes
    D,  # of each image; None in two dimensions, like BD
    H,
    W,
    BD,
    BH,
    BW,
    SPLITS,
    RN,  # the box of a trip: images, lines, positions of a line
    RH,
    RW,
    GROUPS: tl.constexpr,
    CA: tl.constexpr,  # channels of a group, like CB
    CB: tl.constexpr,
    KD: tl.constexpr,  # 1 in two dimensions
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DD: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    OUT_A: tl.constexpr,
    OUT_B: tl.constexpr,
    OUT_D: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    TF32: tl.constexpr,  # products of it for one of float32's: 1 or 3; 0: none, or 16-bit operands
    BLOCK_M: tl.constexpr,  # of A's channels
    BLOCK_N: tl.constexpr,  # of columns (tap, b)
    BLOCK_K: tl.constexpr,  # of positions
    EVEN: tl.constexpr,  # a box is BLOCK_K positions, and boxes fill the grid: no position lies beyond it
    BIG: tl.constexpr,  # a or b has 2^31 elements or more
    FENCE: tl.constexpr,  # of the binary's key alone: it is compiled inside `cnnfast.gpu.fence.inserted`
):
    # --- which tile: those of one row lie next to each other, they read the same part of A ----------------------------
    COLUMNS: tl.constexpr = KD * KH * KW * CB
    tiles_n = tl.cdiv(COLUMNS, BLOCK_N)
    pid = tl.program_id(0)
    split = tl.program_id(1)
    group = tl.program_id(2)
    offs_a = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_a = offs_a < CA
    columns = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_b = columns < COLUMNS
    tap = columns // CB
    offs_b = columns - tap * CB
    th = tap // KW
    tw = tap - th * KW
    if D is not None:
        td = th // KH
        th = th - td * KH

    # --- a tile's rows and columns, from the corner of the box --------------------------------------------------------
    A_ROW: tl.constexpr = GROUPS * CA
    B_ROW: tl.constexpr = GROUPS * CB
    r = tl.arange(0, BLOCK_K)
    w = r % RW
    h = r // RW % RH
    n = r // (RW * RH)
    if not EVEN:
        n = tl.where(n < RN, n, N)  # rows beyond the box are of no image
    if BIG:
        n = n.to(tl.int64)
    a_cols = (group * CA + offs_a)[:, None]
    b_cols = (group * CB + offs_b)[None, :]
    bh = (h * SH)[:, None] + (th * DH - PAD_H)[None, :]
    bw = (w * SW)[:, None] + (tw * DW - PAD_W)[None, :]
    a_here = ((n * H + h) * W + w)[None, :] * A_ROW + a_cols
    if D is not None:
        b_here = (bh * BW + bw) * B_ROW + b_cols
    else:
        b_here = (((n * BH)[:, None] + bh) * BW + bw) * B_ROW + b_cols
    n_left = N - n  # a row is on the grid where the corner is below these
    h_left = H - h
    w_left = W - w

    # --- the product over this split's boxes --------------------------------------------------------------------------
    boxes_h = tl.cdiv(H, RH)
    boxes_w = tl.cdiv(W, RW)
    boxes = tl.cdiv(N, RN) * boxes_h * boxes_w
    per_split = tl.cdiv(boxes, SPLITS)
    first = split * per_split
    line = first // boxes_w
    w0 = (first - line * boxes_w) * RW
    h0 = line % boxes_h * RH
    n0 = line // boxes_h * RN
    if BIG:
        n0 = n0.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(first, tl.minimum(first + per_split, boxes)):
        a_offs = a_here + ((n0 * H + h0) * W + w0) * A_ROW
        if D is not None:
            image = (n0 + n) // D
            bd = ((n0 + n - image * D) * SD)[:, None] + (td * DD - PAD_D)[None, :]
            b_offs = b_here + ((image * BD)[:, None] + bd) * (BH * BW * B_ROW) + (h0 * SH * BW + w0 * SW) * B_ROW
        else:
            b_offs = b_here + ((n0 * BH + h0 * SH) * BW + w0 * SW) * B_ROW
        ok = inside(bh + h0 * SH, BH) & inside(bw + w0 * SW, BW)
        if D is not None:
            ok = ok & inside(bd, BD)
        # A masked, pipelined load still forms its address: a row outside points at the tensor's start.
        # A is loaded as the product takes it: a transposition of the loaded tile would keep it out of the pipeline.
        if EVEN and CA % BLOCK_M == 0:
            a = tl.load(a_ptr + a_offs)
        elif EVEN:
            a = tl.load(a_ptr + a_offs, mask=mask_a[:, None], other=0.0)
        else:
            on_grid = (n0 < n_left) & (h0 < h_left) & (w0 < w_left)
            ok = ok & on_grid[:, None]
            a_ok = on_grid[None, :]
            if CA % BLOCK_M != 0:
                a_ok = a_ok & mask_a[:, None]
            a = tl.load(a_ptr + tl.where(on_grid[None, :], a_offs, a_cols), mask=a_ok, other=0.0)
        b_ok = ok
        if COLUMNS % BLOCK_N != 0:
            b_ok = ok & mask_b[None, :]
        b = tl.load(b_ptr + tl.where(ok, b_offs, b_cols), mask=b_ok, other=0.0)
        acc = multiply_add(a, b, acc, TF32)
        # the next corner
        w0 += RW
        ends = w0 >= W
        w0 = tl.where(ends, 0, w0)
        h0 = tl.where(ends, h0 + RH, h0)
        ends = h0 >= H
        h0 = tl.where(ends, 0, h0)
        n0 = tl.where(ends, n0 + RN, n0)
    acc = unscaled(acc, TF32)

    # --- the store ----------------------------------------------------------------------------------------------------
    row = group * CA + offs_a
    mask = mask_a[:, None] & mask_b[None, :]
    if SPLITS > 1:
        sums = work_ptr + split.to(tl.int64) * (GROUPS * CA * COLUMNS)
        tl.store(sums + (row * COLUMNS)[:, None] + columns[None, :], acc, mask=mask)
    else:
        column = th * OUT_H + tw * OUT_W + offs_b * OUT_B
        if D is not None:
            column += td * OUT_D
        tl.store(out_ptr + (row * OUT_A)[:, None] + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["SPLITS"])
def sum_splits_kernel(
    work_ptr,  # (SPLITS, A, KD * KH * KW, CB) float32
    out_ptr,  # element (a, b, td, th, tw) at their products with OUT_A, OUT_B, OUT_D, OUT_H, OUT_W
    SPLITS,
    A: tl.constexpr,
    CB: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    OUT_A: tl.constexpr,
    OUT_B: tl.constexpr,
    OUT_D: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the splits in their order; one program owns BLOCK elements of the weight."""
    TAPS: tl.constexpr = KD * KH * KW
    TOTAL: tl.constexpr = A * TAPS * CB
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = e < TOTAL
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        acc += tl.load(work_ptr + split.to(tl.int64) * TOTAL + e, mask=mask, other=0.0)
    rest = e // CB
    b = e - rest * CB
    a = rest // TAPS
    tap = rest - a * TAPS
    th = tap // KW
    out = a * OUT_A + b * OUT_B + (tap - th * KW) * OUT_W
    if KD > 1:
        td = th // KH
        th -= td * KH
        out += td * OUT_D
    out += th * OUT_H
    tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=mask)
