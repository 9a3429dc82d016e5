"""Winograd's minimal filtering of signals, which come as planes of height 1: a method of `methods`, in float32.

The filters of `toom_cook`. Both transforms are batched matrix products, of a small matrix of constants with the inputs
of each tile, whose result has a tile's points side by side: the channels of one grouped convolution by oneDNN, which
takes the products of all points (and the parts of long filters) in one call.
"""

from __future__ import annotations

from typing import Any

import torch

from ..spec import ConvSpec
from .onednn import Convolution, PostOp
from .toom_cook import workspace
from .winograd import Filters, is_signal

__all__ = ["WinogradSignal"]


class WinogradSignal(Filters):
    """See the head of this file."""

    def __init__(self, spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__(spec, shape, dtype, 1, exact=False)
        points, self.inner = self.transform.points, []
        for w in self.windows:
            results = points * len(w.residues) * spec.out_channels
            inner = ConvSpec.make(points * self.channels, results, (1, self.parts), transposed=False, groups=points)
            self.inner.append(Convolution(inner, (self.images, points * self.channels, 1, self.read), dtype))

    @staticmethod
    def applies(spec: ConvSpec, shape: tuple[int, ...]) -> bool:
        return is_signal(spec, shape) and Filters.fit(spec, shape, 1)

    def gain(self, shape: tuple[int, ...], threads: int) -> float:
        """See `winograd.Winograd.gain`."""
        macs, (share, blocks, numbers, weights) = self.spec.macs(shape[0], shape[2:]), self.work(shape)
        cost = 1.2 * share * macs + 55 * threads**0.15 * numbers + 4e6 * threads**1.5 * blocks * len(self.windows)
        return macs / (cost + 4 * threads**0.75 * weights)

    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        """For each window, a pack of ``inner``."""
        weight = (weight.transpose(0, 1) if self.spec.transposed else weight).flatten(2).movedim(2, 0)
        packs = []
        for w, inner in zip(self.windows, self.inner, strict=True):
            points = self.filters(weight, w).flatten(0, 1)[:, :, None]
            by = None if shift is None else torch.cat(self.shifts(shift, w))  # type: ignore[arg-type]
            packs.append(inner.pack(points.contiguous(), by))
        return packs

    def block(self, x: torch.Tensor, first: int, packed: Any, y: torch.Tensor) -> None:
        t, c, row = self.transform, self.spec.in_channels, self.step * self.spec.in_channels
        d, v = workspace((2, self.images, self.read, t.points, self.channels))
        for w, inner, pack in zip(self.windows, self.inner, packed, strict=True):
            for k, start in enumerate(w.starts):
                signal, low = self.around(x, start + self.step * first)
                size, each = (self.images, self.read, t.points, c), (signal.stride(0), self.tile * row, row, 1)
                d[..., k * c : (k + 1) * c] = signal.as_strided(size, each, signal.storage_offset() + low * c)
            tiles = self.images * self.read
            torch.bmm(t.inputs.expand(tiles, -1, -1), d.view(tiles, t.points, -1), out=v.view(tiles, t.points, -1))
            m = inner.run(v.view(self.images, 1, self.read, -1).movedim(-1, 1), pack, PostOp(), True)
            m = m.movedim(1, -1).reshape(self.images * self.tiles, t.points, -1)
            found = m.new_empty(m.shape[0], t.tile, m.shape[2])
            torch.bmm(t.outputs.expand(m.shape[0], -1, -1), m, out=found)  # autocast leaves those with `out` alone
            into = y[:, :, w.residues.start : w.residues.stop, 0]
            into.copy_(found.view(into.shape))
