"""Transposed and plain convolution as a gather, with its epilogue.

    y = act((conv(x) + bias - mean) * rsqrt(var + eps) * scale + shift + residual)

Implicit GEMM over the input grid. For a phase (rh, rw) of the output, with q = (qh, qw) on the input grid:

    conv(x)[n, SH*qh + rh, SW*qw + rw, c] = sum over taps j and channels k of
        x[n, qh + off_h(j), qw + off_w(j), k] * w[tap(j), k, c]

A plain convolution has one phase, and reads at (stride * qh + off_h(j), stride * qw + off_w(j)).

M = rows (n, qh, qw) of the phase; N = output channels; K = taps of the phase x input channels of the group, taps
outside. x and y are channels-last, dense; w is addressed by constant strides (group, tap, k, column), so that a
channels-last parameter is read in place. One program owns a BLOCK_M x BLOCK_N tile of one phase, group and K split.

With MERGE_H x MERGE_W > 1 the columns are (a, b, channel): one pass over x feeds all phases, and the store puts column
(a, b, c) of row q at output (MERGE_H*qh + a, MERGE_W*qw + b, c). That is how few output channels, a 1x1 input, kernel =
stride and a pixel shuffle are done; the gather is then a plain convolution over the union of the phases'
neighbourhoods.

Three dimensions have another index ahead of h in all of it: rows (n, qd, qh, qw), phases (rd, rh, rw), merged columns
(a_d, a, b, channel). It is absent, not one, where D is None.

Where K is split, `split_k_epilogue_kernel` adds the parts and does the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .epilogue import finish
from .indexing import border, inside, phase_taps, tile_order, volume
from .product import multiply_add, unscaled
from .statistics import emit_statistics, store_statistics


@triton.jit(do_not_specialize=["N", "D", "H", "W", "OD", "OH", "OW", "SPLITS"])
def conv_transpose_kernel(
    x_ptr,  # (N, H, W, GROUPS * CIN), or (N, D, H, W, GROUPS * CIN)
    w_ptr,  # element (g, tap, k, column) at g*W_GROUP + tap*W_TAP + k*W_K + column*W_COL
    y_ptr,  # (N, OH, OW, COUT), or (N, COUT, OH, OW) when not Y_CHANNELS_LAST; OD ahead of OH where there is one
    work_ptr,  # SPLIT_K: (SPLITS, N, OH, OW, COUT) float32, likewise, used where SPLITS > 1
    residual_ptr,  # as y
    bias_ptr,  # (COUT,), like the next five
    mean_ptr,
    var_ptr,
    scale_ptr,
    shift_ptr,
    slope_ptr,
    stats_ptr,  # None, or the statistics of y by parts: one for each row tile and phase (`store_statistics`)
    N,
    D,  # None in two dimensions, like OD
    H,
    W,
    OD,
    OH,
    OW,
    SPLITS,  # parts of K, where it is split
    eps,
    GROUPS: tl.constexpr,
    CIN: tl.constexpr,  # input channels of a group
    COUT: tl.constexpr,  # all output channels
    COLS: tl.constexpr,  # columns of a group: merged phases x output channels of a group
    KD: tl.constexpr,  # 1 in two dimensions, as the other sizes; offsets are 0
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,  # phases on the grid
    SH: tl.constexpr,
    SW: tl.constexpr,
    IN_D: tl.constexpr,  # input positions from one row to the next: a plain convolution's stride, else 1
    IN_H: tl.constexpr,
    IN_W: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    EDGE: tl.constexpr,  # what lies around the image: "zeros", or up to EDGE_H and EDGE_W pixels "replicate"/"reflect"
    EDGE_D: tl.constexpr,
    EDGE_H: tl.constexpr,
    EDGE_W: tl.constexpr,
    DD: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    GD: tl.constexpr,  # gcd(stride, dilation)
    GH: tl.constexpr,
    GW: tl.constexpr,
    INV_D: tl.constexpr,  # inverse of D/G modulo S/G
    INV_H: tl.constexpr,
    INV_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TAPS_D: tl.constexpr,  # taps of a phase where all phases have the same number, else 0
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    MAX_TAPS: tl.constexpr,
    MERGE_D: tl.constexpr,
    MERGE_H: tl.constexpr,
    MERGE_W: tl.constexpr,
    W_GROUP: tl.constexpr,
    W_TAP: tl.constexpr,
    W_K: tl.constexpr,
    W_COL: tl.constexpr,
    W_FIRST: tl.constexpr,
    W_ROW: tl.constexpr,  # from one row of merged phases to the next, where their columns are not all W_COL apart
    Y_CHANNELS_LAST: tl.constexpr,
    SLOPES: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    ACT: tl.constexpr,
    TF32: tl.constexpr,  # products of it for one of float32's: 1 or 3; 0: none, or 16-bit operands
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    UNROLL: tl.constexpr,  # channel blocks of one trip through the loop
    SPLIT_K: tl.constexpr,  # whether K may be cut in SPLITS parts, whose sums go to work_ptr
    BIG: tl.constexpr,  # x or y has 2^31 elements or more
    FENCE: tl.constexpr,  # of the binary's key alone: it is compiled inside `cnnfast.gpu.fence.inserted`
):
    # --- which tile -------------------------------------------------------------------------------------------------
    PHASES: tl.constexpr = SD * SH * SW
    planes = N
    if D is not None:
        planes = N * tl.cdiv(OD, SD * MERGE_D)
    num_m = tl.cdiv(planes * tl.cdiv(OH, SH * MERGE_H) * tl.cdiv(OW, SW * MERGE_W), BLOCK_M)
    pid_m, pid_n, phase = tile_order(tl.program_id(0), num_m, tl.cdiv(COLS, BLOCK_N), PHASES, GROUP_M)
    split = tl.program_id(1)
    group = tl.program_id(2)
    rh = phase // SW
    rw = phase % SW
    planes = N
    if D is not None:
        rd = rh // SH
        rh = rh % SH
        QD = tl.cdiv(OD - rd, SD * MERGE_D)
        planes = N * QD
    QH = tl.cdiv(OH - rh, SH * MERGE_H)
    QW = tl.cdiv(OW - rw, SW * MERGE_W)
    M = planes * QH * QW
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = offs_n < COLS
    CHANNELS_OUT: tl.constexpr = COUT // GROUPS
    part = pid_m * PHASES + phase
    parts = num_m * PHASES
    if pid_m * BLOCK_M >= M:  # this phase is smaller than the largest one
        if stats_ptr is not None:
            none = tl.zeros((BLOCK_N,), tl.float32)
            first_n = (pid_n == 0) & (group == 0) & (SPLITS == 1)
            out, out_mask = group * CHANNELS_OUT + offs_n, col_mask & (SPLITS == 1)
            store_statistics(stats_ptr, part, parts, 0.0, none, none, out, out_mask, first_n, COUT)
        return
    th0, taps_h, off_h = phase_taps(rh, KH, SH, PAD_H, DH, GH, INV_H, TRANSPOSED)
    tw0, taps_w, off_w = phase_taps(rw, KW, SW, PAD_W, DW, GW, INV_W, TRANSPOSED)
    if TAPS_H > 0:
        taps_h = TAPS_H
    if TAPS_W > 0:
        taps_w = TAPS_W
    row_taps = tl.maximum(taps_w, 1)  # a divisor, also in a phase without taps
    STEP_H: tl.constexpr = -(DH // GH) if TRANSPOSED else DH
    STEP_W: tl.constexpr = -(DW // GW) if TRANSPOSED else DW
    TAP_STEP_H: tl.constexpr = SH // GH if TRANSPOSED else 1
    TAP_STEP_W: tl.constexpr = SW // GW if TRANSPOSED else 1
    if D is not None:
        td0, taps_d, off_d = phase_taps(rd, KD, SD, PAD_D, DD, GD, INV_D, TRANSPOSED)
        if TAPS_D > 0:
            taps_d = TAPS_D
        plane_taps = tl.maximum(taps_h * taps_w, 1)
    STEP_D: tl.constexpr = -(DD // GD) if TRANSPOSED else DD
    TAP_STEP_D: tl.constexpr = SD // GD if TRANSPOSED else 1

    # --- rows: (n, qd, qh, qw) and which taps fall on the input -------------------------------------------------------
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = offs_m < M
    n = offs_m // (QH * QW)
    q = offs_m - n * (QH * QW)
    qh = q // QW
    qw = q - qh * QW
    ih = qh * IN_H
    iw = qw * IN_W
    CHANNELS: tl.constexpr = GROUPS * CIN
    if D is not None:
        nd = n
        n = nd // QD
        qd = nd - n * QD
        i_d = qd * IN_D
        plane = H * W * CHANNELS
    offs_k = tl.arange(0, BLOCK_K)
    # Offsets are int32 inside an image, and over the whole tensor where it has less than 2^31 elements.
    image = row_mask * 0 + group * CIN
    if BIG:
        x_rows = (x_ptr + tl.where(row_mask, n, 0).to(tl.int64) * (volume(D, H, W) * CHANNELS))[:, None]
    else:
        x_rows = x_ptr
        image += n * (volume(D, H, W) * CHANNELS)
    if D is not None:
        here = (image + i_d * plane + (ih * W + iw) * CHANNELS)[:, None] + offs_k[None, :]
        PADDED_D = D + 2 * EDGE_D
    else:
        here = (image + (ih * W + iw) * CHANNELS)[:, None] + offs_k[None, :]
    PADDED_H = H + 2 * EDGE_H
    PADDED_W = W + 2 * EDGE_W
    if MAX_TAPS <= 32:
        bits = tl.zeros((BLOCK_M,), tl.int32)
        for j in tl.static_range(MAX_TAPS):  # not a loop: its result would be pinned to a layout that the loads convert
            of_depth = row_mask
            if D is not None:
                j_d = j // plane_taps
                of_depth = inside(i_d + off_d + j_d * STEP_D, PADDED_D) & row_mask
                j_h = (j - j_d * plane_taps) // row_taps
                j_w = j - j_d * plane_taps - j_h * taps_w
            else:
                j_h = j // row_taps
                j_w = j - j_h * taps_w
            on = inside(ih + off_h + j_h * STEP_H, PADDED_H) & inside(iw + off_w + j_w * STEP_W, PADDED_W) & of_depth
            bits |= on.to(tl.int32) << j
        bits = bits[:, None]

    # --- the product: taps outside, channels inside, one loop; a trip is UNROLL channel blocks of one tap -------------
    merged = offs_n // CHANNELS_OUT
    a_h = merged // MERGE_W
    if D is not None:
        a_d = a_h // MERGE_H
        a_h = a_h - a_d * MERGE_H
    if W_ROW > 0:
        w_col = a_h * W_ROW + (offs_n - a_h * (MERGE_W * CHANNELS_OUT)) * W_COL
    else:
        w_col = offs_n * W_COL
    w_tile = w_ptr + W_FIRST + group * W_GROUP + offs_k[:, None] * W_K + w_col[None, :]
    TRIP: tl.constexpr = BLOCK_K * UNROLL
    TRIPS: tl.constexpr = (CIN + TRIP - 1) // TRIP
    steps = taps_h * taps_w * TRIPS
    if D is not None:
        steps *= taps_d
    if SPLIT_K:
        per_split = tl.cdiv(steps, SPLITS)
        first = split * per_split
        last = tl.minimum(first + per_split, steps)
    else:
        first = 0
        last = steps
    x_tap = (off_h * W + off_w) * CHANNELS
    x_tap_row = STEP_H * W * CHANNELS
    w_tap = (th0 * KW + tw0) * W_TAP
    if D is not None:
        x_tap += off_d * plane
        w_tap += td0 * (KH * KW * W_TAP)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, last):
        t = step // TRIPS
        k0 = (step - t * TRIPS) * TRIP
        in_plane = t
        if D is not None:
            jd = t // plane_taps
            in_plane = t - jd * plane_taps
        jh = in_plane // row_taps
        jw = in_plane - jh * taps_w
        if MAX_TAPS <= 32:
            ok = ((bits >> t) & 1) != 0
        else:
            ok = inside(ih + off_h + jh * STEP_H, PADDED_H) & inside(iw + off_w + jw * STEP_W, PADDED_W) & row_mask
            if D is not None:
                ok = ok & inside(i_d + off_d + jd * STEP_D, PADDED_D)
            ok = ok[:, None]
        x_off = x_tap + jh * x_tap_row + jw * (STEP_W * CHANNELS) + k0
        w_off = w_tap + jh * (TAP_STEP_H * KW * W_TAP) + jw * (TAP_STEP_W * W_TAP) + k0 * W_K
        if D is not None:
            x_off += jd * (STEP_D * plane)
            w_off += jd * (TAP_STEP_D * KH * KW * W_TAP)
        # A masked, pipelined load still forms its address: a row outside the image points at the tensor's start.
        if EDGE == "zeros":
            x_ptrs = x_rows + tl.where(ok, here + x_off, offs_k[None, :])
        else:
            th = border(ih + off_h + jh * STEP_H - EDGE_H, H, EDGE)
            tw = border(iw + off_w + jw * STEP_W - EDGE_W, W, EDGE)
            there = image + (th * W + tw) * CHANNELS
            if D is not None:
                there += border(i_d + off_d + jd * STEP_D - EDGE_D, D, EDGE) * plane
            there = there[:, None] + (k0 + offs_k)[None, :]
            x_ptrs = x_rows + tl.where(ok, there, offs_k[None, :])
        w_ptrs = w_tile + w_off
        for u in tl.static_range(UNROLL):
            left = CIN - k0 - u * BLOCK_K
            if CIN % TRIP == 0:
                a = tl.load(x_ptrs + u * BLOCK_K, mask=ok, other=0.0)
            else:
                a = tl.load(x_ptrs + u * BLOCK_K, mask=ok & (offs_k < left)[None, :], other=0.0)
            if CIN % TRIP == 0 and COLS % BLOCK_N == 0:
                b = tl.load(w_ptrs + u * (BLOCK_K * W_K))
            elif CIN % TRIP == 0:
                b = tl.load(w_ptrs + u * (BLOCK_K * W_K), mask=col_mask[None, :], other=0.0)
            else:
                b = tl.load(w_ptrs + u * (BLOCK_K * W_K), mask=(offs_k < left)[:, None] & col_mask[None, :], other=0.0)
            acc = multiply_add(a, b, acc, TF32)
    acc = unscaled(acc, TF32)

    if stats_ptr is not None:
        # Stored and summed without anything between, the accumulator makes ptxas (sm_90) wait for each product of the
        # loop; an addition that no compiler may drop, as it turns -0 to 0, does not.
        acc += 0.0

    # --- the store: column -> (a, b, channel), row -> output position -------------------------------------------------
    chan = group * CHANNELS_OUT + offs_n - merged * CHANNELS_OUT
    oh = qh * (SH * MERGE_H) + rh
    ow = qw * (SW * MERGE_W) + rw
    mask = row_mask[:, None] & col_mask[None, :]
    if D is not None:
        od = qd * (SD * MERGE_D) + rd
    if MERGE_D * MERGE_H * MERGE_W > 1:
        if D is not None:
            a_w = merged - (a_d * MERGE_H + a_h) * MERGE_W
            mask = mask & (od[:, None] + a_d[None, :] < OD)
        else:
            a_w = merged - a_h * MERGE_W
        mask = mask & (oh[:, None] + a_h[None, :] < OH) & (ow[:, None] + a_w[None, :] < OW)
    else:
        a_d = merged * 0
        a_h = merged * 0
        a_w = merged * 0
    if D is not None:  # its planes are rows of a higher image
        oh += od * OH
        a_h += a_d * OH
    if BIG:
        image_y = n.to(tl.int64) * (volume(OD, OH, OW) * COUT)
    else:
        image_y = n * (volume(OD, OH, OW) * COUT)
    if Y_CHANNELS_LAST or SPLIT_K:
        offs_last = image_y[:, None] + ((oh * OW + ow) * COUT)[:, None] + ((a_h * OW + a_w) * COUT + chan)[None, :]
    if Y_CHANNELS_LAST:
        offs_y = offs_last
    else:
        offs_y = image_y[:, None] + (oh * OW + ow)[:, None] + (chan * volume(OD, OH, OW) + a_h * OW + a_w)[None, :]
    if SPLIT_K:
        if SPLITS > 1:
            tl.store(work_ptr + split.to(tl.int64) * N * (volume(OD, OH, OW) * COUT) + offs_last, acc, mask=mask)
            return
    # fmt: off
    y = finish(acc, offs_y, mask, chan, col_mask, y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, scale_ptr,
               shift_ptr, slope_ptr, eps, SLOPES, P0, P1, ACT)
    # fmt: on
    if stats_ptr is not None:
        rows = tl.minimum(M - pid_m * BLOCK_M, BLOCK_M)
        first_n = (pid_n == 0) & (group == 0)
        emit_statistics(y, row_mask, rows, stats_ptr, part, parts, chan, col_mask, first_n, COUT)


@triton.jit(do_not_specialize=["N", "POSITIONS", "SPLITS"])
def split_k_epilogue_kernel(
    work_ptr,  # (SPLITS, N, POSITIONS, COUT) float32 partial sums
    y_ptr,  # (N, POSITIONS, COUT), or (N, COUT, POSITIONS) when not Y_CHANNELS_LAST
    residual_ptr,  # as y
    bias_ptr,
    mean_ptr,
    var_ptr,
    scale_ptr,
    shift_ptr,
    slope_ptr,
    stats_ptr,  # None, or the statistics of y by parts of BLOCK_M rows
    N,
    POSITIONS,
    SPLITS,
    eps,
    COUT: tl.constexpr,
    Y_CHANNELS_LAST: tl.constexpr,
    SLOPES: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum the splits in a fixed order and finish. One program owns BLOCK_M rows (image, position) x BLOCK_N
    channels."""
    total = N.to(tl.int64) * POSITIONS
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    chan = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = chan < COUT
    mask = (offs_m < total)[:, None] & col_mask[None, :]
    offs_work = offs_m[:, None] * COUT + chan[None, :]
    offs = offs_work
    if not Y_CHANNELS_LAST:
        n = offs_m // POSITIONS
        offs = (n * (POSITIONS * COUT) + offs_m - n * POSITIONS)[:, None] + (chan * POSITIONS)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in range(SPLITS):
        acc += tl.load(work_ptr + split * total * COUT + offs_work, mask=mask, other=0.0)
    # fmt: off
    y = finish(acc, offs, mask, chan, col_mask, y_ptr, residual_ptr, bias_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr,
               slope_ptr, eps, SLOPES, P0, P1, ACT)
    # fmt: on
    if stats_ptr is not None:
        part = tl.program_id(0)
        rows = tl.minimum(total - part.to(tl.int64) * BLOCK_M, BLOCK_M)
        emit_statistics(
            y, offs_m < total, rows, stats_ptr, part, tl.num_programs(0), chan, col_mask, tl.program_id(1) == 0, COUT
        )
