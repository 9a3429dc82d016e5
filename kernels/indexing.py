"""Device functions that place a program: tile order, and the taps of a phase (`cnnfast.spec.phases_1d`, restated)."""

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
def border(i, size, MODE: tl.constexpr):
    """The pixel that a position outside 0..size-1 shows: the nearest one, or the one reflected at the first or last."""
    if MODE == "replicate":
        return tl.minimum(tl.maximum(i, 0), size - 1)
    else:
        return size - 1 - tl.abs(size - 1 - tl.abs(i))
