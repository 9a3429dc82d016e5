"""Winograd's minimal filtering along the rows of a plane or the planes of a volume: a method of `methods`, in float32.

The filters of `toom_cook`, along the first dimension; in the others each of their products is an ordinary convolution
by oneDNN. The transforms A and B are sums of whole rows: long runs of memory, by PyTorch's own operators, in blocks
that stay in a cache. (Two dimensions at once save more products and lose that in transforms; docs/facts.md has both.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..spec import ConvSpec
from .onednn import Convolution, Deconvolution, PostOp, passed_over
from .toom_cook import Sum, Window, blocks_of, cheapest, windows_of, workspace

__all__ = ["Filters", "Winograd", "is_signal"]


def is_signal(spec: ConvSpec, shape: Sequence[int]) -> bool:
    """Whether it is of one dimension: a plane of height 1."""
    return spec.ndim == 2 and shape[2] == 1 and spec.kernel_size[0] == 1


class Filters:
    """What is common to the methods that take one dimension, ``axis``, by these filters. Tensors are (N, length, plane,
    C) for them, ``plane`` what the other dimensions have."""

    takes_post = False

    def __init__(self, spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype, axis: int, *, exact: bool) -> None:
        self.dtype, self.spec = dtype, spec
        self.windows = windows_of(spec, axis)
        self.out = spec.output_size(shape[2:])
        self.rest_in, rest_out = shape[3 + axis :], self.out[1 + axis :]
        self.plane_in, self.plane_out = math.prod(self.rest_in), math.prod(rest_out)
        self.length = shape[2 + axis]
        self.phases, self.step = (spec.stride[axis], 1) if spec.transposed else (1, spec.stride[axis])
        self.rows = self.out[axis] // self.phases
        taps = len(self.windows[0].taps[0][0])
        self.transform = cheapest(taps, exact=exact)
        self.tile, self.parts = self.transform.tile, -(-taps // self.transform.taps)
        self.channels = spec.in_channels * len(self.windows[0].starts)
        each = 4 * self.transform.points * self.plane_in * self.channels
        self.images, self.tiles = blocks_of(shape[0], -(-self.rows // self.tile), each)
        self.read = self.tiles + self.parts - 1
        self.reach = self.step * (self.tile * (self.read - 1) + self.transform.points - 1) + 1

    @staticmethod
    def fit(spec: ConvSpec, shape: tuple[int, ...], axis: int) -> bool:
        """Whether there are filters for ``axis``, and errors are within the tolerance rule."""
        windows = windows_of(spec, axis)
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

    def work(self, shape: tuple[int, ...]) -> tuple[float, int, float, float]:
        """Products that are left of a multiply-add; blocks; numbers that are transformed, on both sides; weights."""
        t, windows = self.transform, len(self.windows)
        share = self.parts * t.points / (self.tile * len(self.windows[0].taps[0][0]))
        blocks = shape[0] // self.images * -(-self.rows // (self.tiles * self.tile))
        positions = blocks * self.images * self.read * t.points
        shorter = 1.5 if len(self.windows[0].starts) > 1 else 1.0  # runs of memory
        read = shorter * windows * positions * self.plane_in * self.channels
        written = positions * self.plane_out * self.phases * self.spec.out_channels
        return share, blocks, read + written, share * self.tile * math.prod(self.spec.weight_shape)

    def filters(self, weight: torch.Tensor, w: Window) -> torch.Tensor:
        """G g for a window, of a weight (taps, C_out, C_in, *rest): (points, residues * C_out, starts * C_in, parts,
        *rest), float32."""
        each = torch.cat([torch.cat([self._parts(weight, taps) for taps in of], 2) for of in w.taps], 1)
        return torch.tensordot(self.transform.weight, each.double(), 1).float()

    def _parts(self, weight: torch.Tensor, taps: tuple[int, ...]) -> torch.Tensor:
        chosen, of = weight[list(taps)], self.transform.taps
        missing = chosen.new_zeros(self.parts * of - len(taps), *chosen.shape[1:])
        return torch.cat([chosen, missing]).unflatten(0, (self.parts, of)).movedim(0, 3)

    def shifts(self, shift: torch.Tensor | None, w: Window) -> list[torch.Tensor | None]:
        """What to add to the products of each point, so that ``shift`` (C_out) is added to the outputs."""
        ones = self.transform.ones.tolist()
        if shift is None:
            return [None] * len(ones)
        return [(shift.double() * by).float().repeat(len(w.residues)) for by in ones]

    def run(self, x: torch.Tensor, packed: Any, post: PostOp, channels_last: bool) -> torch.Tensor | None:
        """See `onednn.Method`. None where the result is not finite: an infinity meets its negative in a transform, and
        reaches outputs that are not its own."""
        n, c = x.shape[:2]
        x = x.movedim(1, -1).reshape(n, self.length, self.plane_in, c)
        size = (n, self.rows, self.phases, self.plane_out, self.spec.out_channels)
        y = torch.empty(size, dtype=torch.float32, device=x.device)
        count, total = min(self.tiles * self.tile, self.rows), 0.0
        starts = [*range(0, self.rows - count, count), self.rows - count]
        for i, first in itertools.product(range(0, n, self.images), starts):
            part = y[i : i + self.images, first : first + count]
            whole = count == self.tiles * self.tile
            into = part if whole else part.new_empty(self.images, self.tiles * self.tile, *size[2:])
            self.block(x[i : i + self.images], first, packed, into)
            if not whole:
                part.copy_(into[:, :count])
            total += part.sum().item()
        if not math.isfinite(total):
            return None
        return y.view(n, *self.out, size[-1]).movedim(-1, 1)

    def block(self, x: torch.Tensor, first: int, packed: Any, y: torch.Tensor) -> None:
        """The outputs from ``first`` on, of each residue, into y (N, tiles * tile, residues, plane, C_out)."""
        raise NotImplementedError

    def around(self, x: torch.Tensor, low: int) -> tuple[torch.Tensor, int]:
        """x, and where in it ``low`` is; a copy with zeros around it where ``reach`` of its rows are not all there."""
        if low >= 0 and low + self.reach <= self.length:
            return x, low
        padded = x.new_empty(x.shape[0], self.reach, *x.shape[2:])
        a, b = (min(max(at, 0), self.length) for at in (low, low + self.reach))
        a, b = (a - low, b - low) if a < b else (0, 0)
        padded[:, :a], padded[:, b:] = 0, 0
        padded[:, a:b] = x[:, low + a : low + b] if a < b else 0
        return padded, 0


class Winograd(Filters):
    """See the head of this file."""

    def __init__(self, spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        # PyTorch's own sums in three dimensions err less than in two, and so do those of five points.
        super().__init__(spec, shape, dtype, 0, exact=spec.ndim == 3)
        each_of = (spec.kernel_size, spec.stride, spec.padding, spec.output_padding, spec.dilation)
        geometry = [(a, *of[1:]) for a, of in zip((self.parts, 1, 0, 0, 1), each_of, strict=True)]
        kind: type[Convolution | Deconvolution] = Deconvolution if spec.transposed else Convolution
        size = (self.images, self.channels, self.read, *self.rest_in)
        self.inner: list[Convolution | Deconvolution] = []
        for w in self.windows:
            inner = ConvSpec(spec.transposed, self.channels, len(w.residues) * spec.out_channels, *geometry)  # type: ignore[arg-type]
            self.inner.append(kind(inner, size, dtype))

    @staticmethod
    def applies(spec: ConvSpec, shape: tuple[int, ...]) -> bool:
        return not is_signal(spec, shape) and Filters.fit(spec, shape, 0)

    def gain(self, shape: tuple[int, ...], threads: int) -> float:
        """What it is expected to be faster by than the same arithmetic at the rate of oneDNN's own operators. In
        multiply-adds at that rate, it costs its products, two transforms, a number of calls (threads wait for each
        other in each) and the reading of a larger weight: docs/facts.md, fitted for one thread and two."""
        macs, (share, blocks, numbers, weights) = self.spec.macs(shape[0], shape[2:]), self.work(shape)
        calls = blocks * len(self.windows) * self.transform.points
        cost = 1.15 * share * macs + 46 * threads**0.15 * numbers + 3e6 * threads**1.5 * calls
        return macs / (cost + 8 * threads**0.75 * weights)

    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        """For each window, a pack of ``inner`` for each point."""
        transposed = self.spec.transposed
        weight = (weight.transpose(0, 1) if transposed else weight).movedim(2, 0)
        packs = []
        for w, inner in zip(self.windows, self.inner, strict=True):
            points = self.filters(weight, w)
            points = points.transpose(1, 2) if transposed else points
            packs.append(
                [inner.pack(one.contiguous(), by) for one, by in zip(points, self.shifts(shift, w), strict=True)]
            )
        return packs

    def block(self, x: torch.Tensor, first: int, packed: Any, y: torch.Tensor) -> None:
        v = workspace((3, self.images, self.read, self.plane_in, self.channels))
        for w, inner, packs in zip(self.windows, self.inner, packed, strict=True):
            d = [self._input(x, start + self.step * first) for start in w.starts]
            self._output(self._products(d, v, inner, packs), y, w)

    def _input(self, x: torch.Tensor, low: int) -> list[torch.Tensor]:
        """The rows d: for each row of a tile, (N, tiles, plane, C). ``low``: the first."""
        x, low = self.around(x, low)
        image, row, *strides = x.stride()
        size, each = (self.images, self.read, *x.shape[2:]), [image, self.tile * self.step * row, *strides]
        first = x.storage_offset() + low * row
        return [x.as_strided(size, each, first + j * self.step * row) for j in range(self.transform.points)]

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
        size = (n, rows // t.tile, plane, several, c)
        m = [one.movedim(1, -1).reshape(size) for one in m]
        strides = (y.stride(0), t.tile * y.stride(1), c, y.stride(2), 1)
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
