"""Transposed and plain convolution of sm_90: copies by descriptors (TMA), and warps that only copy beside warps that
only multiply.

    y = act((conv(x) + bias - mean) * rsqrt(var + eps) * scale + shift + residual)

The same implicit GEMM as `conv_transpose.py`'s "phases", in Gluon. M = a box of BOX_N images x BOX_H rows x BOX_W
columns of one phase of y; N = output channels; K = taps of the phase x input channels of the group, taps outside.

x and y are channels-last and dense, and seen as

    x  (N, H / IN_H, IN_H, W / IN_W, IN_W * C_in)       y  (N, OH / SH, SH, OW / SW, SW * C_out)

so that what a tap reads of x (which pixels: a plain convolution's stride is IN_H x IN_W) and what a phase writes of y
are boxes of five dimensions. What a box has outside of x is filled with zeros by the copy itself, and what it has
outside of y is not stored: no row has an address or a mask here. w is read in place, a tap of it as a matrix.

Programs are as many as run at once; each takes every num_programs(0)-th tile. Its one copying warp runs ahead of the
multiplying warps by STAGES buffers, over the ends of tiles too. A buffer is handed over by two barriers: ``ready``
counts the copies' bytes, ``empty`` the product that has read it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .epilogue import epilogue
from .indexing import phase_taps, tile_order
from .statistics import emit_statistics

# Triton 3.8 has both names of each, 3.9 the first alone.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

PRODUCER_REGISTERS = gl.constexpr(40)  # of a thread of the copying warp; the others get the rest


@gluon.jit
def box_of(m, num_h, num_w, BOX_N: gl.constexpr, BOX_H: gl.constexpr, BOX_W: gl.constexpr):
    """Where row tile ``m`` starts: (image, row, column) of its phase."""
    strip = m // num_w
    image = strip // num_h
    return image * BOX_N, (strip - image * num_h) * BOX_H, (m - strip * num_w) * BOX_W


@gluon.jit
def following(stage, parity, STAGES: gl.constexpr):
    """The next buffer, and the parity of its barriers' phase."""
    stage += 1
    last = stage == STAGES
    return gl.where(last, 0, stage), gl.where(last, parity ^ 1, parity)


@gluon.jit
def preceding(stage, STAGES: gl.constexpr):
    """The buffer before."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def pixel(position, STRIDE: gl.constexpr, PAD: gl.constexpr):
    """(box, remainder) of position = box * STRIDE + remainder >= -PAD."""
    if STRIDE == 1:
        return position, position * 0
    else:
        SHIFT: gl.constexpr = (PAD + STRIDE - 1) // STRIDE
        box = (position + SHIFT * STRIDE) // STRIDE - SHIFT
        return box, position - box * STRIDE


@gluon.jit
def columns_of(x, PARTS: gl.constexpr):
    """x (BLOCK_M, BLOCK_N) in PARTS pieces of consecutive columns. Each lies in registers of its own: nothing moves."""
    if PARTS == 1:
        return (x,)
    else:
        a, b = x.reshape((x.shape[0], 2, x.shape[1] // 2)).permute((0, 2, 1)).split()
        return columns_of(a, PARTS // 2) + columns_of(b, PARTS // 2)


@gluon.jit
def copy_tiles(
    x_desc,
    w_desc,
    x_buffers,
    w_buffers,
    ready,
    empty,
    tiles,
    num_m,
    num_n,
    num_h,
    num_w,
    GROUPS: gl.constexpr,
    CIN: gl.constexpr,
    COLS: gl.constexpr,
    KH: gl.constexpr,
    KW: gl.constexpr,
    SH: gl.constexpr,
    SW: gl.constexpr,
    IN_H: gl.constexpr,
    IN_W: gl.constexpr,
    PAD_H: gl.constexpr,
    PAD_W: gl.constexpr,
    DH: gl.constexpr,
    DW: gl.constexpr,
    GH: gl.constexpr,
    GW: gl.constexpr,
    INV_H: gl.constexpr,
    INV_W: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    K_LAST: gl.constexpr,
    BOX_N: gl.constexpr,
    BOX_H: gl.constexpr,
    BOX_W: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The copying warp: for each tile, tap and block of channels, a box of x and a block of w."""
    CHANNELS: gl.constexpr = GROUPS * CIN
    TRIPS: gl.constexpr = (CIN + BLOCK_K - 1) // BLOCK_K
    BYTES: gl.constexpr = (BOX_N * BOX_H * BOX_W + BLOCK_N) * BLOCK_K * 2
    STEP_H: gl.constexpr = -(DH // GH) if TRANSPOSED else DH
    STEP_W: gl.constexpr = -(DW // GW) if TRANSPOSED else DW
    TAP_STEP_H: gl.constexpr = SH // GH if TRANSPOSED else 1
    TAP_STEP_W: gl.constexpr = SW // GW if TRANSPOSED else 1
    stage = gl.to_tensor(0)
    parity = gl.to_tensor(1)  # nothing is in a buffer that was never filled
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n, phase = tile_order(tile, num_m, num_n, SH * SW, GROUP_M)
        image, first_h, first_w = box_of(m, num_h, num_w, BOX_N, BOX_H, BOX_W)
        th0, taps_h, off_h = phase_taps(phase // SW, KH, SH, PAD_H, DH, GH, INV_H, TRANSPOSED)
        tw0, taps_w, off_w = phase_taps(phase % SW, KW, SW, PAD_W, DW, GW, INV_W, TRANSPOSED)
        column = n * BLOCK_N
        group = column // COLS if GROUPS > 1 else column * 0
        for jh in range(taps_h):
            box_h, rest_h = pixel(off_h + jh * STEP_H, IN_H, PAD_H)
            for jw in range(taps_w):
                box_w, rest_w = pixel(off_w + jw * STEP_W, IN_W, PAD_W)
                tap = (th0 + jh * TAP_STEP_H) * KW + tw0 + jw * TAP_STEP_W
                channel = rest_w * CHANNELS + group * CIN
                for trip in range(TRIPS):
                    k = trip * BLOCK_K
                    mbarrier.wait(empty.index(stage), parity)
                    arrived = ready.index(stage)
                    mbarrier.expect(arrived, BYTES)
                    at = [image, first_h + box_h, rest_h, first_w + box_w, channel + k]
                    async_load(x_desc, at, arrived, x_buffers.index(stage))
                    if K_LAST:
                        of_w = [column, tap, k]
                    else:
                        of_w = [group * CIN + k, tap, column - group * COLS]
                    async_load(w_desc, of_w, arrived, w_buffers.index(stage))
                    stage, parity = following(stage, parity, STAGES)


@gluon.jit
def multiply_tiles(
    y_desc,
    residual_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    scale_ptr,
    shift_ptr,
    slope_ptr,
    stats_ptr,
    x_buffers,
    w_buffers,
    out,
    ready,
    empty,
    tiles,
    num_m,
    num_n,
    num_h,
    num_w,
    N,
    QH,
    QW,
    eps,
    GROUPS: gl.constexpr,
    CIN: gl.constexpr,
    COUT: gl.constexpr,
    KH: gl.constexpr,
    KW: gl.constexpr,
    SH: gl.constexpr,
    SW: gl.constexpr,
    PAD_H: gl.constexpr,
    PAD_W: gl.constexpr,
    DH: gl.constexpr,
    DW: gl.constexpr,
    GH: gl.constexpr,
    GW: gl.constexpr,
    INV_H: gl.constexpr,
    INV_W: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    K_LAST: gl.constexpr,
    SLOPES: gl.constexpr,
    P0: gl.constexpr,
    P1: gl.constexpr,
    ACT: gl.constexpr,
    BOX_N: gl.constexpr,
    BOX_H: gl.constexpr,
    BOX_W: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    CHUNK: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    BIG: gl.constexpr,
):
    """The multiplying warps: the products of a tile, then by CHUNK columns the epilogue on the sums and the store, from
    two buffers in turn."""
    BLOCK_M: gl.constexpr = BOX_N * BOX_H * BOX_W
    TRIPS: gl.constexpr = (CIN + BLOCK_K - 1) // BLOCK_K
    L: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, BLOCK_N, 16]
    )
    OF_CHUNK: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, CHUNK, 16]
    )
    stage = gl.to_tensor(0)
    parity = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        m, n, phase = tile_order(tile, num_m, num_n, SH * SW, GROUP_M)
        _, taps_h, _ = phase_taps(phase // SW, KH, SH, PAD_H, DH, GH, INV_H, TRANSPOSED)
        _, taps_w, _ = phase_taps(phase % SW, KW, SW, PAD_W, DW, GW, INV_W, TRANSPOSED)
        acc = warpgroup_mma_init(gl.zeros((BLOCK_M, BLOCK_N), gl.float32, L))
        steps = taps_h * taps_w * TRIPS
        for step in range(steps):
            mbarrier.wait(ready.index(stage), parity)
            a = x_buffers.index(stage).reshape((BLOCK_M, BLOCK_K))
            if K_LAST:
                b = w_buffers.index(stage).reshape((BLOCK_N, BLOCK_K)).permute((1, 0))
            else:
                b = w_buffers.index(stage).reshape((BLOCK_K, BLOCK_N))
            acc = warpgroup_mma(a, b, acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=1, deps=(acc,)))
            mbarrier.arrive(empty.index(preceding(stage, STAGES)), count=1, pred=step > 0)
            stage, parity = following(stage, parity, STAGES)
        sums = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index(preceding(stage, STAGES)), count=1, pred=steps > 0)

        image, first_h, first_w = box_of(m, num_h, num_w, BOX_N, BOX_H, BOX_W)
        rh = phase // SW
        rw = phase % SW
        rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, OF_CHUNK))
        i = image + rows // (BOX_H * BOX_W)
        qh = first_h + rows // BOX_W % BOX_H
        qw = first_w + rows % BOX_W
        row_mask = (i < N) & (qh < QH) & (qw < QW)
        if BIG:
            i = i.to(gl.int64)
        offs_y = (((i * QH + qh) * SH + rh) * QW + qw) * (SW * COUT) + rw * COUT
        here = gl.minimum(N - image, BOX_N) * gl.minimum(QH - first_h, BOX_H) * gl.minimum(QW - first_w, BOX_W)
        chunks = columns_of(sums, BLOCK_N // CHUNK)
        for c in gl.static_range(BLOCK_N // CHUNK):
            first = n * BLOCK_N + c * CHUNK
            chan = first + gl.arange(0, CHUNK, gl.SliceLayout(0, OF_CHUNK))
            chan_mask = chan < COUT
            part = gl.convert_layout(chunks[c], OF_CHUNK, assert_trivial=True)
            # fmt: off
            y = epilogue(part, offs_y[:, None] + chan[None, :], row_mask[:, None] & chan_mask[None, :], chan, chan_mask,
                         residual_ptr, bias_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, slope_ptr, eps, SLOPES,
                         P0, P1, ACT).to(y_desc.dtype)
            # fmt: on
            tma.store_wait(1)  # the last but one has left its buffer
            out.index(turn).reshape((BLOCK_M, CHUNK)).store(y)
            fence_async_shared()
            async_store(y_desc, [image, first_h, rh, first_w, rw * COUT + first], out.index(turn))
            turn ^= 1
            if stats_ptr is not None:
                # fmt: off
                emit_statistics(y, row_mask, here, stats_ptr, m * (SH * SW) + phase, num_m * (SH * SW), chan,
                                chan_mask, first == 0, COUT)
                # fmt: on
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "QH", "QW"])
def conv_hopper_kernel(
    x_desc,  # boxes (BOX_N, BOX_H, 1, BOX_W, BLOCK_K) of x, as above
    w_desc,  # (C_in, taps, columns) by (BLOCK_K, 1, BLOCK_N); K_LAST: (C_out, taps, C_in) by (BLOCK_N, 1, BLOCK_K)
    y_desc,  # boxes (BOX_N, BOX_H, 1, BOX_W, CHUNK) of y, as above
    residual_ptr,  # as y, or None, like the others
    bias_ptr,  # (COUT,), like the next five
    mean_ptr,
    var_ptr,
    scale_ptr,
    shift_ptr,
    slope_ptr,
    stats_ptr,  # the statistics of y by parts: one for each row tile and phase (`store_statistics`)
    N,
    QH,  # rows and columns of a phase, all of one size
    QW,
    eps,
    GROUPS: gl.constexpr,
    CIN: gl.constexpr,  # input channels of a group
    COUT: gl.constexpr,  # all output channels
    COLS: gl.constexpr,  # those of a group
    KH: gl.constexpr,
    KW: gl.constexpr,
    SH: gl.constexpr,  # phases
    SW: gl.constexpr,
    IN_H: gl.constexpr,  # input positions from one row to the next: a plain convolution's stride, else 1
    IN_W: gl.constexpr,
    PAD_H: gl.constexpr,
    PAD_W: gl.constexpr,
    DH: gl.constexpr,
    DW: gl.constexpr,
    GH: gl.constexpr,  # gcd(stride, dilation)
    GW: gl.constexpr,
    INV_H: gl.constexpr,  # inverse of D/G modulo S/G
    INV_W: gl.constexpr,
    TRANSPOSED: gl.constexpr,
    K_LAST: gl.constexpr,  # input channels are contiguous in w
    SLOPES: gl.constexpr,
    P0: gl.constexpr,
    P1: gl.constexpr,
    ACT: gl.constexpr,
    BOX_N: gl.constexpr,
    BOX_H: gl.constexpr,
    BOX_W: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    CHUNK: gl.constexpr,  # columns of a tile that the epilogue holds, and the store copies, at a time
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    BIG: gl.constexpr,  # y has 2^31 elements or more
):
    """y of every tile that is this program's. Launched with the multiplying warps; Triton adds the copying one."""
    num_h = gl.cdiv(QH, BOX_H)
    num_w = gl.cdiv(QW, BOX_W)
    num_m = gl.cdiv(N, BOX_N) * num_h * num_w
    num_n = gl.cdiv(COUT, BLOCK_N)
    tiles = num_m * num_n * (SH * SW)
    dtype: gl.constexpr = x_desc.dtype
    x_buffers = gl.allocate_shared_memory(dtype, [STAGES, BOX_N, BOX_H, 1, BOX_W, BLOCK_K], x_desc.layout)
    if K_LAST:
        w_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 1, BLOCK_K], w_desc.layout)
    else:
        w_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, 1, BLOCK_N], w_desc.layout)
    out = gl.allocate_shared_memory(dtype, [2, BOX_N, BOX_H, 1, BOX_W, CHUNK], y_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    fence_async_shared()
    # fmt: off
    gl.warp_specialize([
        (multiply_tiles, (
            y_desc, residual_ptr, bias_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, slope_ptr, stats_ptr,
            x_buffers, w_buffers, out, ready, empty, tiles, num_m, num_n, num_h, num_w, N, QH, QW, eps,
            GROUPS, CIN, COUT, KH, KW, SH, SW, PAD_H, PAD_W, DH, DW, GH, GW, INV_H, INV_W, TRANSPOSED, K_LAST,
            SLOPES, P0, P1, ACT, BOX_N, BOX_H, BOX_W, BLOCK_N, BLOCK_K, CHUNK, GROUP_M, STAGES, BIG,
        )),
        (copy_tiles, (
            x_desc, w_desc, x_buffers, w_buffers, ready, empty, tiles, num_m, num_n, num_h, num_w,
            GROUPS, CIN, COLS, KH, KW, SH, SW, IN_H, IN_W, PAD_H, PAD_W, DH, DW, GH, GW, INV_H, INV_W, TRANSPOSED,
            K_LAST, BOX_N, BOX_H, BOX_W, BLOCK_N, BLOCK_K, GROUP_M, STAGES,
        )),
    ], [1], [PRODUCER_REGISTERS])
    # fmt: on
