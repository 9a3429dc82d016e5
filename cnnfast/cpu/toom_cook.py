"""Toom and Cook's filters of one dimension, for `winograd` and `winograd_signal`: a tile of m outputs of a filter with
r taps takes m + r - 1 products instead of m r, ``A^T ((G g) (B^T d))`` with matrices of constants.

Points. B, G and A evaluate and interpolate polynomials at pairs +-p, at 0 where a point is left over, and at infinity.
The error grows with their spread; with the pairs of this file it is about that of oneDNN's own sums.

More taps than four are taken three or four at a time, as a convolution along the tiles. A transposed convolution has
such filters in each of its phases, and phases that read the same inputs share a transform; a strided convolution is a
sum of such filters over every stride-th input.
"""

from __future__ import annotations

import math
import threading
from functools import cache
from typing import NamedTuple

import torch

from ..spec import ConvSpec

__all__ = ["Sum", "Transform", "Window", "blocks_of", "cheapest", "transform", "windows_of", "workspace"]

_BLOCK = 2**22  # bytes of transformed input at a time
_PAIRS = {5: (0.4, 1.2), 6: (0.625, 1.5), 7: (0.4, 0.9, 1.8)}  # by the number of points; found by a search


Sum = tuple[tuple[int, float], ...]  # of rows: (row, factor), the first factor 1


class Transform(NamedTuple):
    """Of ``taps`` and a ``tile`` of outputs. The points are all +p, then all -p, 0 where a point is left, and infinity.

    ``weight``: G (points, taps), float64; ``ones``: what added to the product of each point adds 1 to every output. B:
    +p takes ``even + ratio * odd``, -p ``even - ratio * odd``, of each pair; infinity, and 0 a row before it, ``end``.
    ``powers``: A of each pair, (pairs, tile). ``inputs``: B^T (points, points), ``outputs``: A^T (tile, points).
    """

    taps: int
    tile: int
    points: int
    pairs: int
    zero: bool
    weight: torch.Tensor
    ones: torch.Tensor
    even: tuple[Sum, ...]
    odd: tuple[Sum, ...]
    ratio: tuple[float, ...]
    end: Sum
    powers: tuple[tuple[float, ...], ...]
    inputs: torch.Tensor
    outputs: torch.Tensor


def _sum(row: torch.Tensor) -> Sum:
    """A row of B over its leading coefficient."""
    values = row.tolist()
    used = [j for j in reversed(range(len(values))) if values[j]]
    return tuple((j, values[j] / values[used[0]]) for j in used)


@cache
def transform(taps: int, tile: int) -> Transform:
    """Everything is in float64 until it is a constant."""
    size = taps + tile - 1
    pairs = len(_PAIRS[size])
    zero = size % 2 == 0
    p = torch.tensor(_PAIRS[size], dtype=torch.float64, device="cpu")
    points = torch.cat([p, -p, p.new_zeros(int(zero))])

    def evaluation(n: int) -> torch.Tensor:
        infinity = points.new_tensor([[0.0] * (n - 1) + [1.0]])
        return torch.cat([points[:, None] ** torch.arange(n, device="cpu"), infinity])

    rows, weight, outputs = torch.linalg.inv(evaluation(size)).T, evaluation(taps), evaluation(tile)
    rows = rows.where(rows.abs() > 1e-9 * rows.abs().max(), 0.0)
    plus, minus = rows[:pairs], rows[pairs : 2 * pairs]
    even, odd = (plus + minus) / 2, (plus - minus) / 2
    leading = [max(j for j in range(size) if half[0, j]) for half in (even, odd)]
    first, second = even[:, leading[0]], odd[:, leading[1]]
    # Each row is divided by its leading coefficient, and the weight multiplied by it.
    scale = torch.cat([first, first, *([rows[-2, -2:-1]] if zero else []), rows[-1, -1:]])
    inputs = (rows / scale[:, None]).float()
    if zero:  # the first output starts from the product at 0; so the second may start from the first pair's
        outputs[[0, pairs]] /= p[0]
        scale[[0, pairs]] *= p[0]

    return Transform(
        taps,
        tile,
        size,
        pairs,
        zero,
        weight * scale[:, None],
        torch.linalg.pinv(outputs.T) @ outputs.new_ones(tile),
        tuple(map(_sum, even)),
        tuple(map(_sum, odd)),
        tuple((second / first).tolist()),
        _sum(rows[-1]),
        tuple(map(tuple, outputs[:pairs].tolist())),
        inputs,
        outputs.T.float().contiguous(),
    )


def cheapest(taps: int, *, exact: bool) -> Transform:
    """The transform with which ``taps`` take the fewest products; parts of them are whole tiles apart. ``exact``: of
    those that err least."""
    choice = [(taps, 4)] if taps == 2 or taps in (3, 4) and not exact else []
    choice += [(3, 3)] if taps > 2 else []
    choice += [(4, 4)] if taps > 4 and not exact else []
    return min((transform(*c) for c in choice), key=lambda t: t.points * -(-taps // t.taps) / t.tile)


class Window(NamedTuple):
    """Outputs ``stride * q + residue`` for a run of ``residues`` that read the same rows: for each of ``starts``, rows
    ``start + q, start + q + step, ...``; ``taps``: for each residue and start, the weight's taps in rising rows."""

    residues: range
    starts: tuple[int, ...]
    taps: tuple[tuple[tuple[int, ...], ...], ...]


def windows_of(spec: ConvSpec, axis: int) -> list[Window]:
    """Empty where phases differ in their number of taps."""
    found: list[Window] = []
    if spec.transposed:
        for phase in spec.phases[axis]:
            pairs = phase.pairs()[::-1]
            starts, taps = tuple(offset for _, offset in pairs[:1]), (tuple(t for t, _ in pairs),)
            last = found.pop() if found and found[-1].starts == starts else Window(range(phase.residue, 0), starts, ())
            found.append(Window(range(last.residues.start, phase.residue + 1), starts, (*last.taps, taps)))
    else:
        pairs, stride = spec.phases[axis][0].pairs(), spec.stride[axis]
        each = [pairs[first::stride] for first in range(min(stride, len(pairs)))]
        chosen = tuple(tuple(t for t, _ in of) for of in each)
        found.append(Window(range(1), tuple(of[0][1] for of in each), (chosen,)))
    sizes = {len(taps) for w in found for of in w.taps for taps in of}
    return found if len(sizes) == 1 and 0 not in sizes else []


def blocks_of(images: int, tiles: int, each: int) -> tuple[int, int]:
    """Images and tiles of a block, all of one size: whole images where these are small, else tiles of one (the last
    block may overlap). ``each``: bytes of a tile."""
    fitting = [i for i in range(1, images + 1) if images % i == 0 and i * each * tiles <= _BLOCK]
    count = max(fitting, default=1)
    return count, -(-tiles // -(-tiles * count * each // _BLOCK))


_local = threading.local()


def workspace(shape: tuple[int, ...]) -> torch.Tensor:
    """Memory that the thread keeps: fresh pages cost as much as a transform."""
    kept: torch.Tensor | None = getattr(_local, "kept", None)
    size = math.prod(shape)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):
            kept = torch.empty(size, dtype=torch.float32, device="cpu")
        _local.kept = kept
    return kept[:size].view(shape)
