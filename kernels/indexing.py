"""Device functions that place a program: of a convolution, its tile and the taps of its phase
(`cnnfast.spec.phases_1d`, restated); of a normalisation, its part of a segment."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_order(pid, num_m, num_n, PHASES: tl.constexpr, GROUP_M: tl.constexpr):
    """pid -> (m tile, n tile, phase). A group of GROUP_M row tiles meets every phase and column tile before the next
    group, so that its input stays in L2; later phases, which have the most taps, come first."""
    width = GROUP_M * PHASES * num_n
    group = pid // width
    first_m = group * GROUP_M
    group_m = tl.minimum(num_m - first_m, GROUP_M)
    rest = pid - group * width
    column = rest // group_m
    phase = column // num_n
    return first_m + rest - column * group_m, column - phase * num_n, PHASES - 1 - phase


@triton.jit
def phase_taps(
    r,
    K: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    INVERSE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Taps of the outputs ``S*q + r``: (first tap, number of taps, input offset of the first).

    Tap ``j`` of the phase is ``first + j*S/G`` and reads input ``q + offset - j*D/G`` (transposed), or ``j`` and
    ``q - P + j*D`` (plain, one phase).
    """
    if TRANSPOSED:
        c = r + P
        first = (c // G) * INVERSE % (S // G)
        count = (K - first + S // G - 1) // (S // G)
        count = tl.where((c % G == 0) & (first < K), count, 0)
        offset = (c - D * first) // S
    else:
        first = r * 0
        count = r * 0 + K
        offset = r * 0 - P
    return first, count, offset


@triton.jit
def inside(i, size):
    """0 <= i < size in one comparison."""
    return i.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def volume(d, h, w):
    """Positions of an image: h * w, or d * h * w where there is a d."""
    if d is None:
        return h * w
    else:
        return d * h * w


@triton.jit
def border(i, size, MODE: tl.constexpr):
    """The pixel that a position outside 0..size-1 shows: the nearest one, or the one reflected at the first or last."""
    if MODE == "replicate":
        return tl.minimum(tl.maximum(i, 0), size - 1)
    else:
        return size - 1 - tl.abs(size - 1 - tl.abs(i))


@triton.jit
def part_of_segment(
    ROWS, PARTS, TILES, C: tl.constexpr, ROWS_BY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """What program (segment, part; block of channels) owns: (ROWS, segment, first row, rows, channels (BLOCK_C,), which
    of these there are). ROWS comes back as what ROWS_BY divides, spelt out for the compiler."""
    ROWS = ROWS // ROWS_BY * ROWS_BY
    pid = tl.program_id(0)
    segment = pid // PARTS
    first = (pid - segment * PARTS) * TILES * BLOCK_M
    here = tl.minimum(TILES * BLOCK_M, ROWS - first) // ROWS_BY * ROWS_BY
    chan = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    return ROWS, segment, first, here, chan, chan < C


@triton.jit
def part_base(ptr, segment, first, ROWS, C: tl.constexpr, LAST: tl.constexpr):
    """Where row ``first`` of a segment starts. Offsets from here fit 32 bits, this one need not."""
    if LAST:
        return ptr + (segment.to(tl.int64) * ROWS + first) * C
    else:
        return ptr + segment.to(tl.int64) * ROWS * C + first


@triton.jit
def offsets(rows, chan, ROWS, C: tl.constexpr, LAST: tl.constexpr):
    """Of a tile (BLOCK_M, BLOCK_C), from `part_base`."""
    if LAST:
        return rows[:, None] * C + chan[None, :]
    else:
        return chan[None, :] * ROWS + rows[:, None]
