"""Weight gradient of a convolution, transposed or plain: for each tap a matrix product over all positions.

    dw[g, a, b, t] = sum over positions (n, h, w) of A[n, h, w, g, a] * B[n, SH*h + DH*t_h - PAD_H, SW*w + ..., g, b]

A is the tensor on the grid of the gather, B the one that the taps step over: for a transposed convolution A is its
input and B the gradient of its output, for a plain one A is the gradient of the output and B the input. Both are
channels-last and dense; dw takes any strides (the parameter's).

The positions are cut in SPLITS parts whose float32 sums `sum_splits_kernel` adds in a fixed order: results are the same
to the bit from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .conv_transpose import round_tf32
from .indexing import inside


@triton.jit(do_not_specialize=["N", "H", "W", "BH", "BW", "SPLITS"])
def conv_wgrad_kernel(
    a_ptr,  # (N, H, W, GROUPS * CA)
    b_ptr,  # (N, BH, BW, GROUPS * CB)
    out_ptr,  # element (a of all groups, b, th, tw) at their products with OUT_A, OUT_B, OUT_H, OUT_W
    work_ptr,  # (SPLITS, GROUPS * CA, KH * KW, CB) float32, used where SPLITS > 1
    N,
    H,
    W,
    BH,
    BW,
    SPLITS,
    GROUPS: tl.constexpr,
    CA: tl.constexpr,  # channels of a group, like CB
    CB: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    OUT_A: tl.constexpr,
    OUT_B: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    MERGED: tl.constexpr,  # columns are (tap, b); otherwise a tile has one tap, and its columns are b
    TF32: tl.constexpr,
    BLOCK_M: tl.constexpr,  # of A's channels
    BLOCK_N: tl.constexpr,  # of columns
    BLOCK_K: tl.constexpr,  # of positions: BLOCK_K / RUN lines of the image, RUN positions of each
    RUN: tl.constexpr,
    BIG: tl.constexpr,  # a or b has 2^31 elements or more
):
    # --- which tile: taps lie next to each other, they read the same rows of A ----------------------------------------
    TAPS: tl.constexpr = KH * KW
    pid = tl.program_id(0)
    split = tl.program_id(1)
    group = tl.program_id(2)
    if MERGED:
        tiles_n = tl.cdiv(TAPS * CB, BLOCK_N)
        columns = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        tap = columns // CB
        offs_b = columns - tap * CB
        mask_b = columns < TAPS * CB
        pid_m = pid // tiles_n
    else:
        tiles_n = tl.cdiv(CB, BLOCK_N)
        tap = pid % TAPS
        offs_b = (pid // TAPS % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_b = offs_b < CB
        pid_m = pid // (TAPS * tiles_n)
    th = tap // KW
    tw = tap - th * KW
    offs_a = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_a = offs_a < CA

    # --- the product over this split's positions ----------------------------------------------------------------------
    LINES_PER_BLOCK: tl.constexpr = BLOCK_K // RUN
    lines = N * H
    chunks = tl.cdiv(W, RUN)
    blocks = tl.cdiv(lines, LINES_PER_BLOCK) * chunks
    per_split = tl.cdiv(blocks, SPLITS)
    first = split * per_split
    r = tl.arange(0, BLOCK_K)
    a_cols = (group * CA + offs_a)[:, None]
    b_cols = (group * CB + offs_b)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(first, tl.minimum(first + per_split, blocks)):
        line_block = block // chunks
        chunk = block - line_block * chunks
        line = line_block * LINES_PER_BLOCK + r // RUN
        w = chunk * RUN + r % RUN
        on_grid = (line < lines) & (w < W)
        n = line // H
        bh0 = (line - n * H) * SH - PAD_H
        bw0 = w * SW - PAD_W
        if MERGED:
            bh = bh0[:, None] + (th * DH)[None, :]
            bw = bw0[:, None] + (tw * DW)[None, :]
            ok = on_grid[:, None] & inside(bh, BH) & inside(bw, BW) & mask_b[None, :]
        else:
            bh = bh0[:, None] + th * DH
            bw = bw0[:, None] + tw * DW
            ok = on_grid[:, None] & inside(bh, BH) & inside(bw, BW)
        image = n[:, None]
        if BIG:
            a_rows = line.to(tl.int64) * W + w
            b_rows = (image.to(tl.int64) * BH + bh) * BW + bw
        else:
            a_rows = line * W + w
            b_rows = (image * BH + bh) * BW + bw
        # A masked, pipelined load still forms its address: a row outside points at the tensor's start.
        a_rows = tl.where(on_grid, a_rows, 0) * (GROUPS * CA)
        b_rows = tl.where(ok, b_rows, 0) * (GROUPS * CB)
        # A is loaded as the product takes it: a transposition of the loaded tile would keep it out of the pipeline.
        if CA % BLOCK_M == 0:
            a = tl.load(a_ptr + a_cols + a_rows[None, :], mask=on_grid[None, :], other=0.0)
        else:
            a = tl.load(a_ptr + a_cols + a_rows[None, :], mask=on_grid[None, :] & mask_a[:, None], other=0.0)
        if MERGED or CB % BLOCK_N == 0:
            b = tl.load(b_ptr + b_rows + b_cols, mask=ok, other=0.0)
        else:
            b = tl.load(b_ptr + b_rows + b_cols, mask=ok & mask_b[None, :], other=0.0)
        if TF32:
            acc = tl.dot(round_tf32(a), round_tf32(b), acc, input_precision="tf32")
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")

    # --- the store ----------------------------------------------------------------------------------------------------
    row = group * CA + offs_a
    mask = mask_a[:, None] & mask_b[None, :]
    if SPLITS > 1:
        sums = work_ptr + split.to(tl.int64) * (GROUPS * CA * TAPS * CB)
        tl.store(sums + (row * (TAPS * CB))[:, None] + (tap * CB + offs_b)[None, :], acc, mask=mask)
    else:
        column = th * OUT_H + tw * OUT_W + offs_b * OUT_B
        tl.store(out_ptr + (row * OUT_A)[:, None] + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["SPLITS"])
def sum_splits_kernel(
    work_ptr,  # (SPLITS, A, KH * KW, CB) float32
    out_ptr,  # element (a, b, th, tw) at their products with OUT_A, OUT_B, OUT_H, OUT_W
    SPLITS,
    A: tl.constexpr,
    CB: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    OUT_A: tl.constexpr,
    OUT_B: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the splits in their order; one program owns BLOCK elements of the weight."""
    TOTAL: tl.constexpr = A * KH * KW * CB
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = e < TOTAL
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        acc += tl.load(work_ptr + split.to(tl.int64) * TOTAL + e, mask=mask, other=0.0)
    rest = e // CB
    b = e - rest * CB
    a = rest // (KH * KW)
    tap = rest - a * (KH * KW)
    th = tap // KW
    out = a * OUT_A + b * OUT_B + th * OUT_H + (tap - th * KW) * OUT_W
    tl.store(out_ptr + out, acc.to(out_ptr.dtype.element_ty), mask=mask)
