"""Toom and Cook's filters of one dimension, for `winograd`: a tile of m outputs of a filter with
r taps takes m + r - 1 products instead of m r, ``A^T ((G g) (B^T d))`` with matrices of constants.

Points. B, G and A evaluate and interpolate polynomials at pairs +-p, at 0 where a point is left over, and at infinity.
The error grows with their spread; with the pairs of this file it is about that of oneDNN's own sums.

More taps than four are taken three or four at a time, as a convolution along the tiles. A transposed convolution has
such filters in each of its phases, and phases that read the same inputs share a transform; a strided convolution is a
sum of such filters over every stride-th input.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import NamedTuple

import torch

from ..spec import ConvSpec

__all__ = ["Transform", "Window", "blocks_of", "cheapest", "transform", "windows_of", "workspace"]

_BLOCK = 2**24  # bytes of transformed input at a time
_PAIRS = {5: (0.4, 1.2), 6: (0.625, 1.5), 7: (0.4, 0.9, 1.8)}  # by the number of points; found by a search


class Transform(NamedTuple):
    """Of ``taps`` and a ``tile`` of outputs: ``outputs @ ((weight @ g) * (inputs @ d))``.

    ``weight``: G (points, taps), float64, ``inputs``: B^T (points, points), ``outputs``: A^T (tile, points), float32.
    ``ones``: what added to the product of each point adds 1 to every output.
    """

    taps: int
    tile: int
    points: int
    weight: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor
    ones: torch.Tensor


@cache
def transform(taps: int, tile: int) -> Transform:
    """Everything is in float64 until it is a constant."""
    size = taps + tile - 1
    p = torch.tensor(_PAIRS[size], dtype=torch.float64, device="cpu")
    points = torch.cat([p, -p, p.new_zeros(1 - size % 2)])

    def evaluation(n: int) -> torch.Tensor:
        infinity = points.new_tensor([[0.0] * (n - 1) + [1.0]])
        return torch.cat([points[:, None] ** torch.arange(n, device="cpu"), infinity])

    inputs, weight, outputs = torch.linalg.inv(evaluation(size)).T, evaluation(taps), evaluation(tile)
    inputs = inputs.where(inputs.abs() > 1e-9 * inputs.abs().max(), 0.0)
    scale = inputs.abs().amax(1, keepdim=True)  # a product's inputs are about as large as x
    ones = torch.linalg.pinv(outputs.T) @ outputs.new_ones(tile)
    return Transform(taps, tile, size, weight * scale, (inputs / scale).float(), outputs.T.float().contiguous(), ones)


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
    """All of equally many residues; none where phases differ in their number of taps."""
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
    if len(sizes) != 1 or 0 in sizes:
        return []
    if len({len(w.residues) for w in found}) > 1:
        alone = [(r, w.starts, taps) for w in found for r, taps in zip(w.residues, w.taps, strict=True)]
        found = [Window(range(r, r + 1), starts, (taps,)) for r, starts, taps in alone]
    return found


def blocks_of(images: int, tiles: int, each: int) -> tuple[int, int]:
    """Images and tiles of a block, all of one size: whole images where these are small, else tiles of one (the last
    block may overlap). ``each``: bytes of a tile."""
    fitting = [i for i in range(1, images + 1) if images % i == 0 and i * each * tiles <= _BLOCK]
    count = max(fitting, default=1)
    return count, -(-tiles // -(-tiles * count * each // _BLOCK))


_local = threading.local()


def workspace(size: int) -> torch.Tensor:
    """Numbers of memory that the thread keeps: fresh pages cost as much as a transform."""
    kept: torch.Tensor | None = getattr(_local, "kept", None)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):
            kept = torch.empty(size, dtype=torch.float32, device="cpu")
        _local.kept = kept
    return kept[:size]
