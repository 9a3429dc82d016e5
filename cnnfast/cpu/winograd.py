"""Winograd's minimal filtering along one dimension: a method of `methods`, in float32.

A tile of m outputs in a row of a convolution with r taps takes m r products, or m + r - 1 by Toom and Cook: ``A^T ((G
g) (B^T d))``, with matrices of constants. One dimension of a convolution is taken so (rows of a plane, planes of a
volume, positions of a signal); in the others each of the m + r - 1 products is an ordinary convolution by oneDNN. The
transforms A and B are sums of whole rows: long runs of memory, by PyTorch's own operators, in blocks that stay in a
cache. (Two dimensions at once save more products and lose that in transforms; docs/facts.md has both.)

More taps than four are taken three or four at a time, as a convolution along the tiles. A transposed convolution has
such filters in each of its phases, and phases that read the same rows share a transform; a strided convolution is a sum
of such filters over every stride-th row.

Points. B, G and A evaluate and interpolate polynomials at pairs +-p, at 0 where a point is left over, and at infinity.
The error grows with their spread; with the pairs of this file it is about that of oneDNN's own sums.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from ..spec import ConvSpec
from .onednn import Convolution, Deconvolution, PostOp, passed_over

__all__ = ["Winograd"]

_PAIRS = {5: (0.4, 1.2), 6: (0.625, 1.5), 7: (0.4, 0.9, 1.8)}  # by the number of points; found by a search
_BLOCK = 2**22  # bytes of transformed input at a time


Sum = tuple[tuple[int, float], ...]  # of rows: (row, factor), the first factor 1


class Transform(NamedTuple):
    """Of ``taps`` and a ``tile`` of outputs. The points are all +p, then all -p, 0 where a point is left, and infinity.

    ``weight``: G (points, taps), float64; ``ones``: what added to the product of each point adds 1 to every output. B:
    +p takes ``even + ratio * odd``, -p ``even - ratio * odd``, of each pair; infinity, and 0 a row before it, ``end``.
    ``powers``: A of each pair, (pairs, tile).
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
    )


def _cheapest(taps: int, *, exact: bool) -> Transform:
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


def _windows(spec: ConvSpec, axis: int) -> list[Window]:
    """Empty where phases differ in their number of taps."""
    stride, dilation, kernel = spec.stride[axis], spec.dilation[axis], spec.kernel_size[axis]
    found: list[Window] = []
    if spec.transposed:
        for phase in spec.phases[axis]:
            pairs = phase.pairs()[::-1]
            starts, taps = tuple(offset for _, offset in pairs[:1]), (tuple(t for t, _ in pairs),)
            last = found.pop() if found and found[-1].starts == starts else Window(range(phase.residue, 0), starts, ())
            found.append(Window(range(last.residues.start, phase.residue + 1), starts, (*last.taps, taps)))
    else:
        each = tuple(tuple(range(first, kernel, stride)) for first in range(min(stride, kernel)))
        found.append(Window(range(1), tuple(dilation * t[0] - spec.padding[axis] for t in each), (each,)))
    sizes = {len(taps) for w in found for of in w.taps for taps in of}
    return found if len(sizes) == 1 and 0 not in sizes else []


def _axis(spec: ConvSpec, shape: Sequence[int]) -> int:
    """The first dimension; of a signal, which comes as a plane of height 1, the second."""
    return 1 if spec.ndim == 2 and shape[2] == 1 and spec.kernel_size[0] == 1 else 0


class Winograd:
    """See the head of this file."""

    takes_post = False

    def __init__(self, spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.dtype, self.spec, axis = dtype, spec, _axis(spec, shape)
        self.windows = _windows(spec, axis)
        self.out = spec.output_size(shape[2:])
        self.signal = axis == 1
        self.transposed = spec.transposed and not self.signal
        rest_in, rest_out = shape[3 + axis :], self.out[1 + axis :]  # the tensors are (N, length, plane, C)
        self.plane_in, self.plane_out = math.prod(rest_in), math.prod(rest_out)
        self.length = shape[2 + axis]
        self.phases, self.step = (spec.stride[axis], 1) if spec.transposed else (1, spec.stride[axis])
        self.rows = self.out[axis] // self.phases
        taps = len(self.windows[0].taps[0][0])
        # PyTorch's own sums in three dimensions err less than in two, and so do those of five points.
        self.transform = _cheapest(taps, exact=spec.ndim == 3)
        self.tile, self.parts = self.transform.tile, -(-taps // self.transform.taps)
        self.channels = spec.in_channels * len(self.windows[0].starts)
        # Blocks are whole images where these are small, else rows of one; all of one size, the last may overlap.
        points = self.transform.points
        tiles, each = -(-self.rows // self.tile), 4 * points * self.plane_in * self.channels
        fitting = [i for i in range(1, shape[0] + 1) if shape[0] % i == 0 and i * each * tiles <= _BLOCK]
        self.images = max(fitting, default=1)
        self.tiles = -(-tiles // -(-tiles * self.images * each // _BLOCK))
        self.read = self.tiles + self.parts - 1
        self.reach = self.step * (self.tile * (self.read - 1) + points - 1) + 1
        geometry: list[tuple[int, ...]] = [(1, self.parts), (1, 1), (0, 0), (0, 0), (1, 1)]
        size: tuple[int, ...] = (1, self.read)  # a signal is a row: as a column it is slower with AVX2
        if not self.signal:
            each_of = (spec.kernel_size, spec.stride, spec.padding, spec.output_padding, spec.dilation)
            geometry = [(a, *of[1:]) for a, of in zip((self.parts, 1, 0, 0, 1), each_of, strict=True)]
            size = (self.read, *rest_in)
        self.kernel, self.inner = geometry[0], []
        for w in self.windows:
            kind: type[Convolution | Deconvolution] = Deconvolution if self.transposed else Convolution
            inner = ConvSpec(self.transposed, self.channels, len(w.residues) * spec.out_channels, *geometry)  # type: ignore[arg-type]
            self.inner.append(kind(inner, (self.images, self.channels, *size), dtype))

    @staticmethod
    def applies(spec: ConvSpec, shape: tuple[int, ...]) -> bool:
        axis = _axis(spec, shape)
        windows = _windows(spec, axis)
        if spec.groups > 1 or not windows:
            return False
        taps, out = len(windows[0].taps[0][0]), spec.output_size(shape[2:])
        one = not spec.transposed and spec.stride[axis] == 1
        if taps < 2 or taps > 4 and not one or out[axis] < 4:
            return False
        if spec.dilation[axis] > 1 or passed_over(spec, shape):  # PyTorch's own sums err less there than these
            return False
        if not spec.transposed:
            return True
        each = zip(out, spec.stride, spec.dilation, spec.output_padding, strict=True)
        return all(o % s == 0 and d == 1 and more < s for o, s, d, more in each)

    def gain(self, shape: tuple[int, ...], threads: int) -> float:
        """What it is expected to be faster by than the same arithmetic at the rate of oneDNN's own operators. In
        multiply-adds at that rate, it costs its products, two transforms of numbers, a number of calls (threads wait
        for each other in each) and the reading of a larger weight: docs/facts.md, fitted for one thread and two."""
        t, macs = self.transform, self.spec.macs(shape[0], shape[2:])
        share = self.parts * t.points / (self.tile * len(self.windows[0].taps[0][0]))
        blocks = shape[0] // self.images * -(-self.rows // (self.tiles * self.tile))
        positions = blocks * self.images * self.read
        read = len(self.windows) * positions * self.plane_in * self.channels
        read *= 1.5 if len(self.windows[0].starts) > 1 else 1  # in shorter runs
        written = positions * self.plane_out * self.phases * self.spec.out_channels
        cost = 1.15 * share * macs
        cost += 46 * threads**0.15 * t.points * (read + written)
        cost += 3e6 * threads**1.5 * blocks * len(self.windows) * t.points
        cost += 8 * threads**0.75 * share * self.tile * math.prod(self.spec.weight_shape)
        return macs / cost

    # --- the weight ---------------------------------------------------------------------------------------------------

    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        """For each window, a pack of `inner` for each point."""
        t = self.transform
        if self.spec.transposed:
            weight = weight.transpose(0, 1)
        weight = (weight.flatten(2)[..., None] if self.signal else weight).movedim(2, 0)  # (taps, C_out, C_in, *rest)
        packs: list[list[Any]] = []
        for w, inner in zip(self.windows, self.inner, strict=True):
            # (taps of the transform, residues * C_out, starts * C_in, parts, *rest)
            each = torch.cat([torch.cat([self._parts(weight, taps) for taps in of], 2) for of in w.taps], 1)
            points = torch.tensordot(t.weight, each.double(), 1).float()
            if self.transposed:
                points = points.transpose(1, 2)
            packs.append([])
            for one, by in zip(points, t.ones.tolist(), strict=True):
                raised = None if shift is None else (shift.double() * by).float().repeat(len(w.residues))
                packs[-1].append(inner.pack(one.reshape(*one.shape[:2], *self.kernel), raised))
        return packs

    def _parts(self, weight: torch.Tensor, taps: tuple[int, ...]) -> torch.Tensor:
        chosen, of = weight[list(taps)], self.transform.taps
        missing = chosen.new_zeros(self.parts * of - len(taps), *chosen.shape[1:])
        return torch.cat([chosen, missing]).unflatten(0, (self.parts, of)).movedim(0, 3)

    # --- a call -------------------------------------------------------------------------------------------------------

    def run(self, x: torch.Tensor, packed: Any, post: PostOp, channels_last: bool) -> torch.Tensor | None:
        """See `onednn.Method`. None where the result is not finite: an infinity meets its negative in a transform, and
        reaches outputs that are not its own."""
        n, c = x.shape[:2]
        x = x.movedim(1, -1).reshape(n, self.length, self.plane_in, c)
        size = (n, self.rows, self.phases, self.plane_out, self.spec.out_channels)
        y = torch.empty(size, dtype=torch.float32, device=x.device)
        count, total = min(self.tiles * self.tile, self.rows), 0.0
        starts = [*range(0, self.rows - count, count), self.rows - count]
        v = _workspace((3, *self._order(self.images, self.read, self.plane_in, self.channels)))
        for i, first in itertools.product(range(0, n, self.images), starts):
            part = y[i : i + self.images, first : first + count]
            whole = count == self.tiles * self.tile
            into = part if whole else part.new_empty(self.images, self.tiles * self.tile, *size[2:])
            for w, inner, packs in zip(self.windows, self.inner, packed, strict=True):
                d = [self._input(x, i, start + self.step * first) for start in w.starts]
                self._output(self._products(d, v, inner, packs), into, w)
            if not whole:
                part.copy_(into[:, :count])
            total += part.sum().item()
        if not math.isfinite(total):
            return None
        return y.view(n, *self.out, size[-1]).movedim(-1, 1)

    def _input(self, x: torch.Tensor, image: int, low: int) -> list[torch.Tensor]:
        """The rows d: for each row of a tile, (images, tiles, plane, C). ``low``: the first."""
        rows = x[image : image + self.images]
        if low < 0 or low + self.reach > self.length:
            padded = rows.new_empty(self.images, self.reach, *rows.shape[2:])
            a, b = (min(max(at, 0), self.length) for at in (low, low + self.reach))
            a, b = (a - low, b - low) if a < b else (0, 0)
            padded[:, :a], padded[:, b:] = 0, 0
            padded[:, a:b] = rows[:, low + a : low + b] if a < b else 0
            rows, low = padded, 0
        image_stride, row_stride, *strides = rows.stride()
        size = self._order(self.images, self.read, *rows.shape[2:])
        each = self._order(image_stride, self.tile * self.step * row_stride, *strides)
        first, row_stride = rows.storage_offset() + low * row_stride, self.step * row_stride
        return [rows.as_strided(size, each, first + j * row_stride) for j in range(self.transform.points)]

    def _order(self, image: int, row: int, plane: int, *rest: int) -> tuple[int, ...]:
        """Sizes or strides of (N, rows, plane, ...) in the order of `inner`'s tensors."""
        return (image, plane, row, *rest) if self.signal else (image, row, plane, *rest)

    def _products(
        self, d: list[list[torch.Tensor]], v: torch.Tensor, inner: Convolution | Deconvolution, packs: list[Any]
    ) -> list[torch.Tensor]:
        """The convolution of B^T d at each point. ``d``: the rows of each start; ``v``: memory for three points. (Each
        is transformed right before its convolution, which finds it in the cache.)"""
        t, c = self.transform, self.spec.in_channels
        plus, minus, spare = v
        size = (self.images, *inner.shape[2:], self.channels)
        first, second = (one.view(size).movedim(-1, 1) for one in (plus, minus))
        parts = [slice(k * c, (k + 1) * c) for k in range(len(d))]
        pluses, minuses, ends = [], [], []
        for i in range(t.pairs):
            for rows, part in zip(d, parts, strict=True):
                p, q, r = plus[..., part], minus[..., part], spare[..., part]
                _add(rows, t.even[i], q)
                _add(rows, t.odd[i], r)
                torch.add(q, r, alpha=t.ratio[i], out=p)
                q.sub_(r, alpha=t.ratio[i])
            pluses.append(inner.run(first, packs[i], PostOp(), True))
            minuses.append(inner.run(second, packs[t.pairs + i], PostOp(), True))
        for back in reversed(range(1 + t.zero)):
            for rows, part in zip(d, parts, strict=True):
                _add(rows, t.end, plus[..., part], back)
            ends.append(inner.run(first, packs[self.transform.points - 1 - back], PostOp(), True))
        return pluses + minuses + ends

    def _output(self, m: list[torch.Tensor], y: torch.Tensor, w: Window) -> None:
        """A^T m, m (N, residues * C_out, tiles, *rest) of each point, into y (N, rows, residues, plane, C_out)."""
        t, (n, rows, _, plane, c), several = self.transform, y.shape, len(w.residues)
        size = self._order(n, rows // t.tile, plane, several, c)
        m = [one.movedim(1, -1).reshape(size) for one in m]
        strides = self._order(y.stride(0), t.tile * y.stride(1), c, y.stride(2), 1)
        start = y.storage_offset() + w.residues.start * y.stride(2)
        out = [y.as_strided(size, strides, start + j * y.stride(1)) for j in range(t.tile)]
        sums = [plus + minus for plus, minus in zip(m, m[t.pairs :], strict=False)][: t.pairs]
        differences = [m[i].sub_(m[i + t.pairs]) for i in range(t.pairs)]
        for j, into in enumerate(out):
            terms = [(one, by[j]) for one, by in zip(differences if j % 2 else sums, t.powers, strict=True)]
            if j == 0 and t.zero or j == t.tile - 1:
                terms.insert(0, (m[2 * t.pairs if j == 0 else -1], 1.0))
            (one, by), (other, factor), *more = terms
            if by != 1.0:
                one = torch.mul(one, by, out=into)
            torch.add(one, other, alpha=factor, out=into)
            for other, factor in more:
                into.add_(other, alpha=factor)


def _add(rows: list[torch.Tensor], terms: Sum, out: torch.Tensor, back: int = 0) -> None:
    (a, _), (b, factor), *more = terms
    torch.add(rows[a - back], rows[b - back], alpha=factor, out=out)
    for j, factor in more:
        out.add_(rows[j - back], alpha=factor)


_local = threading.local()


def _workspace(shape: tuple[int, ...]) -> torch.Tensor:
    """Memory that the thread keeps: fresh pages cost as much as a transform."""
    kept: torch.Tensor | None = getattr(_local, "kept", None)
    size = math.prod(shape)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):
            kept = torch.empty(size, dtype=torch.float32, device="cpu")
        _local.kept = kept
    return kept[:size].view(shape)
