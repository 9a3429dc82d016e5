"""Winograd's minimal filtering along one dimension of signals, planes and volumes: a method of `methods`, in float32.

The filters of `toom_cook`, in three calls: a small matrix makes the inputs of each tile into those of its products (one
batched matrix product for all tiles), which lie side by side as the channels of one grouped convolution by oneDNN; it
takes the other dimensions and the parts of long filters; and a second matrix makes a tile of outputs of its results,
with all residues of a transposed convolution in place. (Two dimensions at once save more products and lose that in
transforms; docs/facts.md has both.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..spec import ConvSpec
from .onednn import Convolution, Deconvolution, Method, PostOp, passed_over
from .toom_cook import blocks_of, cheapest, windows_of, workspace

__all__ = ["Winograd"]


class Winograd(Method):
    """See the head of this file. Tensors are (N, before..., length, behind..., C) inside, ``length`` the dimension of
    the filters: the last, whose tiles lie in memory as they are read, or the first, for maps too narrow for that."""

    takes_post = False

    def __init__(self, spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        axis = _axis(spec, shape)
        assert axis is not None, "see `applies`"
        n, c, *size = shape
        self.dtype, self.spec, self.axis, self.shape = dtype, spec, axis, (n, *size)
        windows = self.windows = windows_of(spec, axis)
        stride, each = spec.stride[axis], len(windows[0].residues)
        phases, step = (stride, 1) if spec.transposed else (1, stride)
        taps = len(windows[0].taps[0][0])
        # PyTorch's own sums in three dimensions err less than in two, and so do those of five points.
        t = self.transform = cheapest(taps, exact=spec.ndim == 3)
        self.parts = -(-taps // t.taps)

        # A tile: ``span`` inputs from ``low + pitch * tile`` on, and what it makes of them and of the products.
        starts = [s for w in windows for s in w.starts]
        self.low, self.pitch, self.length = min(starts), t.tile * step, size[axis]
        self.span = max(starts) - self.low + step * (t.points - 1) + 1
        inputs = t.inputs.new_zeros(len(windows), t.points, len(windows[0].starts), self.span)
        outputs = t.outputs.new_zeros(t.tile, phases, len(windows), t.points, each)
        for i, w in enumerate(windows):
            for k, start in enumerate(w.starts):
                inputs[i, :, k, start - self.low :][:, : step * (t.points - 1) + 1 : step] = t.inputs
            for r, residue in enumerate(w.residues):
                outputs[:, residue, i, :, r] = t.outputs
        self.inputs, self.outputs = inputs.flatten(0, 2), outputs.flatten(2).flatten(0, 1)
        self._edges: dict[int, torch.Tensor] = {}

        # A block: some whole images; or, of one image, some rows ahead of the dimension, or some of its tiles.
        self.out = spec.output_size(size)
        self.behind, self.behind_out = math.prod(size[axis + 1 :]), math.prod(self.out[axis + 1 :])
        self.tiles = -(-self.out[axis] // len(self.outputs))
        self.rows, padding = self.out[0], list(spec.padding)
        numbers, before = len(self.inputs) * c * self.behind, math.prod(size[:axis])
        if before == 1:
            self.images, self.tiles = blocks_of(n, self.tiles, 4 * numbers)
        elif spec.transposed:
            self.images, _ = blocks_of(n, 1, 4 * numbers * before * (self.tiles + self.parts - 1))
        else:
            a_row = 4 * spec.stride[0] * numbers * (before // size[0]) * (self.tiles + self.parts - 1)
            self.images, self.rows = blocks_of(n, self.out[0], a_row)
        self.read = self.tiles + self.parts - 1
        rows = size[0]
        if axis and self.rows < self.out[0]:
            padding[0] = 0
            rows = spec.stride[0] * (self.rows - 1) + spec.dilation[0] * (spec.kernel_size[0] - 1) + 1

        def of(values: Sequence[int], here: int) -> tuple[int, ...]:
            return (*values[:axis], here, *values[axis + 1 :])

        channels = len(self.inputs) * c
        inner = replace(
            spec,
            in_channels=channels,
            out_channels=self.outputs.shape[1] * spec.out_channels,
            kernel_size=of(spec.kernel_size, self.parts),
            stride=of(spec.stride, 1),
            padding=of(padding, 0),
            output_padding=of(spec.output_padding, 0),
            dilation=of(spec.dilation, 1),
            groups=len(windows) * t.points,
        )
        self.size = (self.images, *((rows, *size[1:axis]) if axis else ()), self.read, *size[axis + 1 :])
        kind: type[Convolution | Deconvolution] = Deconvolution if spec.transposed else Convolution
        self.inner = kind(inner, (self.images, channels, *self.size[1:]), dtype)

    @staticmethod
    def applies(spec: ConvSpec, shape: tuple[int, ...]) -> bool:
        """Whether there are filters, with errors within the tolerance rule, and batched products to transform by."""
        return _axis(spec, shape) is not None and torch.backends.mkl.is_available()

    def gain(self, threads: int, moving: float) -> float:
        """What it is expected to be faster by than the same arithmetic at the rate of oneDNN's own operators. In
        multiply-adds at that rate, it costs its products, numbers and tiles that are transformed, numbers that are
        copied for that, a number of calls and the reading of a larger weight, these less and less with more threads,
        and all but the products more where products are faster (``moving``: `methods.moving`): docs/facts.md, fitted
        for one and two."""
        spec, t, (n, *size) = self.spec, self.transform, self.shape
        length, of = self.out[self.axis], len(self.outputs)
        blocks = -(-length // (self.tiles * of))
        more = blocks * self.tiles * of / length  # the last tile may be whole
        left = self.parts * t.points / (t.tile * len(self.windows[0].taps[0][0]))
        blocks *= n // self.images * (-(-self.out[0] // self.rows) if self.axis else 1)
        read, made = blocks * math.prod(self.size), n * math.prod(self.out) * more / of
        numbers = read * len(self.inputs) * spec.in_channels + made * self.outputs.shape[1] * spec.out_channels
        lines = math.prod(self.size[: 1 + self.axis])
        straight = self.behind == 1 and (lines == 1 or self.length == self.read * self.pitch)
        copied = 0 if straight else read * self.span * spec.in_channels
        if self.behind_out > 1 or length % of:
            copied += n * math.prod(self.out) * spec.out_channels
        macs, weights = spec.macs(n, size), left * t.tile * math.prod(spec.weight_shape)
        moved = 13 * numbers + 25 * copied + threads**0.6 * (7500 * (read + made) + (9e6 + 4 * weights) * blocks)
        return macs / (left * more * macs * (1.28 + 7 / spec.out_channels) + moving * moved)

    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        transposed, t, at = self.spec.transposed, self.transform, self.axis
        weight = (weight.transpose(0, 1) if transposed else weight).movedim(2 + at, 0)  # (taps, C_out, C_in, *rest)

        def parts(taps: tuple[int, ...]) -> torch.Tensor:
            missing = weight.new_zeros(self.parts * t.taps - len(taps), *weight.shape[1:])
            return torch.cat([weight[list(taps)], missing]).unflatten(0, (self.parts, t.taps)).movedim(0, 3 + at)

        filters = []
        for w in self.windows:
            each = torch.cat([torch.cat([parts(taps) for taps in of], 2) for of in w.taps], 1)
            filters.append(torch.tensordot(t.weight, each.double(), 1).float())
        points = torch.cat(filters)  # (groups, residues * C_out, starts * C_in, *kernel)
        points = (points.transpose(1, 2) if transposed else points).flatten(0, 1)
        if shift is not None:
            by = torch.outer(t.ones, shift.double()).float()  # what adds the shift to every output
            shift = by.repeat(len(self.windows), len(self.windows[0].residues)).flatten()
        return self.inner.pack(points.contiguous(), shift)

    def run(self, x: torch.Tensor, packed: Any, post: PostOp, channels_last: bool) -> torch.Tensor | None:
        return self.bound(packed, post, channels_last)(x)

    def bound(self, packed: Any, post: PostOp, channels_last: bool) -> Callable[[torch.Tensor], torch.Tensor | None]:
        multiply = self.inner.bound(packed, PostOp(), True)
        return lambda x: self._run(x, multiply)

    def _run(self, x: torch.Tensor, multiply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor | None:
        """None where the result is not finite: an infinity meets its negative in a transform, and reaches outputs that
        are not its own. ``multiply``: the products."""
        x = x.movedim(1, -1).contiguous()
        y = torch.empty((x.shape[0], *self.out, self.spec.out_channels), dtype=torch.float32, device=x.device)
        made, axis, total = self.tiles * len(self.outputs), self.axis, 0.0
        images, rows = range(0, len(x), self.images), range(0, self.out[0], self.rows)
        for i, row, place in itertools.product(images, rows, range(0, self.out[axis], made)):
            of, part = x, y
            if self.images < len(x):
                of, part = x[i : i + self.images], y[i : i + self.images]
            row = min(row, self.out[0] - self.rows)  # the last may overlap
            if axis and self.rows < self.out[0]:
                part = part[:, row : row + self.rows]
            if made < self.out[axis]:
                part = part.narrow(1 + axis, place, min(made, self.out[axis] - place))
            self._block(of, row, place // len(self.outputs), multiply, part)
            total += part.sum().item()
        return y.movedim(-1, 1) if math.isfinite(total) else None

    def _block(
        self,
        x: torch.Tensor,
        row: int,
        tile: int,
        multiply: Callable[[torch.Tensor], torch.Tensor],
        y: torch.Tensor,
    ) -> None:
        """Outputs from ``row`` and ``tile`` on into y, of images x."""
        c, c_out, points = x.shape[-1], y.shape[-1], len(self.inputs)
        tiles = math.prod(self.size)
        memory = workspace(tiles * c * (points + self.span))
        v = memory[: tiles * c * points].view(*self.size, points * c)
        into = v
        if self.axis and self.rows < self.out[0]:
            first = row * self.spec.stride[0] - self.spec.padding[0]
            a, b = (min(max(at, 0), x.shape[1]) for at in (first, first + self.size[1]))
            into = v[:, a - first : b - first]
            v[:, : a - first], v[:, b - first :], x = 0, 0, x[:, a:b]
        x = x.view(-1, self.length, self.behind, c)
        self._transform(x, tile, into.view(-1, points, c), memory[tiles * c * points :])
        m = multiply(v.movedim(-1, 1)).movedim(1, -1)
        m = m.reshape(-1, self.outputs.shape[1], c_out)
        count, length, of = len(m), y.shape[1 + self.axis], len(self.outputs)
        straight = self.behind_out == 1 and length == self.tiles * of and y.is_contiguous()
        found = y.view(count, of, c_out) if straight else m.new_empty(count, of, c_out)
        torch.bmm(self.outputs.expand(count, -1, -1), m, out=found)  # autocast leaves those with `out` alone
        if straight:
            return
        found = found.view(-1, self.tiles, self.behind_out, of, c_out).transpose(2, 3)
        whole, rest = divmod(length, of)
        y = y.view(len(found), length, self.behind_out, c_out)
        y[:, : whole * of].view(len(found), whole, *found.shape[2:]).copy_(found[:, :whole])
        if rest:
            y[:, whole * of :] = found[:, whole, :rest]

    def _transform(self, x: torch.Tensor, first: int, v: torch.Tensor, d: torch.Tensor) -> None:
        """B^T of ``read`` tiles from ``first`` on of each line x (lines, length, behind, C), into v (tiles of all lines
        and positions behind, points, C); ``d``: memory."""
        lines, length, behind, c = x.shape
        low, read, span = self.low + self.pitch * first, self.read, self.span
        begin = min(max(-(low // self.pitch), 0), read)  # of the tiles with all inputs
        end = min(max((length - span - low) // self.pitch + 1, begin), read)
        at, pitch = x.storage_offset() + (low + self.pitch * begin) * behind * c, self.pitch * behind * c
        edges = [*range(begin), *range(end, read)]
        if behind == 1 and begin < end and (lines == 1 or length == read * self.pitch):
            # All tiles are equally far apart; those between two lines come later.
            count = (lines - 1) * read + end - begin
            each = x.as_strided((count, span, c), (pitch, c, 1), at)
            torch.bmm(self.inputs.expand(count, -1, -1), each, out=v[begin : begin + count])
            of_line = v.view(lines, read, len(self.inputs), c)
            for tile in edges:  # by the inputs nearest to them
                start = low + self.pitch * tile
                near = min(max(start, 0), length - span)
                each = x.as_strided((lines, span, c), (length * c, c, 1), x.storage_offset() + near * c)
                matrix = self._shifted(start - near).expand(lines, -1, -1)
                into = of_line[:, tile]
                if lines == 1:
                    torch.bmm(matrix, each, out=into)
                else:  # MKL wants a dense result
                    into.copy_(torch.bmm(matrix, each, out=into.new_empty(into.shape)))
            return
        count = lines * read * behind
        d = d[: count * span * c].view(lines, read, behind, span, c)
        if begin < end:
            size, strides = (lines, end - begin, behind, span, c), (x.stride(0), pitch, c, behind * c, 1)
            d[:, begin:end].copy_(x.as_strided(size, strides, at))
        for tile in edges:
            start, one = low + self.pitch * tile, d[:, tile]
            a = min(max(-start, 0), span)
            b = min(max(length - start, a), span)
            if a:
                one[:, :, :a].zero_()
            if b < span:
                one[:, :, b:].zero_()
            if a < b:
                one[:, :, a:b].copy_(x[:, start + a : start + b].transpose(1, 2))
        torch.bmm(self.inputs.expand(count, -1, -1), d.view(count, span, c), out=v)

    def _shifted(self, by: int) -> torch.Tensor:
        """The transform of inputs that lie so much to the right of those that it is given; what is not there is 0."""
        matrix = self._edges.get(by)
        if matrix is None:
            matrix = torch.zeros_like(self.inputs)
            if 0 <= by < self.span:
                matrix[:, by:] = self.inputs[:, : self.span - by]
            elif -self.span < by < 0:
                matrix[:, :by] = self.inputs[:, -by:]
            self._edges[by] = matrix
        return matrix


def _axis(spec: ConvSpec, shape: tuple[int, ...]) -> int | None:
    """The dimension of the filters, if any: the last, or the first where that has fewer than eight tiles. (oneDNN takes
    few positions of the innermost dimension slowly.)"""
    last = spec.ndim - 1
    fit = [axis for axis in (last, 0) if _fits(spec, shape, axis)]
    if not fit or last not in fit or math.prod(shape[2:-1]) == 1:
        return fit[0] if fit else None
    phases = spec.stride[last] if spec.transposed else 1
    taps = len(windows_of(spec, last)[0].taps[0][0])
    tile = cheapest(taps, exact=spec.ndim == 3).tile
    return last if spec.output_size(shape[2:])[last] > 7 * phases * tile else fit[-1]


def _fits(spec: ConvSpec, shape: tuple[int, ...], axis: int) -> bool:
    windows = windows_of(spec, axis)
    if spec.groups > 1 or not windows:
        return False
    taps, out = len(windows[0].taps[0][0]), spec.output_size(shape[2:])
    one = not spec.transposed and spec.stride[axis] == 1
    if taps < 2 or taps > 4 and not one:
        return False
    tile = cheapest(taps, exact=spec.ndim == 3).tile
    if out[axis] <= tile * (spec.stride[axis] if spec.transposed else 1):
        return False  # one tile
    if spec.dilation[axis] > 1 or passed_over(spec, shape):  # PyTorch's own sums err less there than these
        return False
    if not spec.transposed:
        return True
    each = zip(out, spec.stride, spec.dilation, spec.output_padding, strict=True)
    return all(o % s == 0 and d == 1 and more < s for o, s, d, more in each)
