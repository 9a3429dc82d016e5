"""`StyleTransfer` over a picture of any size in bounded memory, with what the whole picture would give.

Its instance norms need the mean and variance of whole maps, one norm after the other. Where the whole does not fit,
maps at a quarter of the size (a sixteenth of the pixels) are kept whole, layer by layer, in this machine's memory;
what is larger is computed by tiles, and again from the last map that was kept for each norm on the way: about twice
the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..generators.style import Moments, Section, StyleTransfer
from ..messages import CnnfastError
from . import tiles
from .tiles import ImageJob, Sweep, Tile

__all__ = ["layout", "run"]

_DOWN = 4  # from the picture to the maps that are kept
_LEAST = 8  # pixels of a side, for which borders can be reflected at a quarter of the size

# Numbers held at the peak for a pixel of what goes in, over the channels of the widest map there: as measured on a CPU,
# and a third to spare. Of the whole network; of the sections.
_WHOLE, _SECTIONS = 6, {(1, 4): 6, (1, 1): 8, (4, 1): 60}


def run(
    network: StyleTransfer,
    style: Tensor,
    pixels: np.ndarray,
    *,
    styled: nn.Module | None = None,
    name: str = "style",
    memory: float | None = None,
    side: int | None = None,
    result: np.dtype | type | None = None,
    on_progress: Callable[[float], object] | None = None,
) -> np.ndarray:
    """``pixels`` (H, W, 3) in the style that ``style`` (numbers,) says: of the same size, of the dtype ``result``
    (default: theirs). Integers are from 0 to their largest, floats from 0 to 1.

    ``network`` is where and in the dtype in which it runs; ``styled``: what its `StyleTransfer.styled` gave for this
    style, for callers with many pictures. ``memory``: bytes that may be taken besides the picture and
    its result, None: all that the whole takes. ``side``: of the tiles, instead; 0 for none. CnnfastError where less
    would have to be enough, or a result is not finite.
    """
    h, w = pixels.shape[:2]
    if min(h, w) < _LEAST:
        pixels = np.pad(pixels, ((0, max(0, _LEAST - h)), (0, max(0, _LEAST - w)), (0, 0)), "edge")
    target = np.dtype(pixels.dtype if result is None else result)
    if (pixels == pixels[:1, :1]).all():
        return _flat(network, style, (h, w), target)
    with torch.inference_mode():
        if not side:
            styled = network.styled(style) if styled is None else styled
            done = _whole(network, styled, pixels, name, memory, target, on_progress)
        else:
            done = None
        if done is None:
            done = _Run(network, style, pixels, name, on_progress).all(memory, side, target)
    return done[:h, :w]


def _flat(network: StyleTransfer, style: Tensor, size: tuple[int, int], target: np.dtype) -> np.ndarray:
    """Of a picture of one colour: there the norms' results are their summands, whatever the colour; in floating point
    they would enlarge roundings, one after the other, until noise is all that is seen."""
    norm = network.layers[-1].norm
    assert norm is not None
    with torch.no_grad():
        colour = torch.sigmoid(norm.vectors(style)[1]).double().cpu().numpy()
    values = colour * tiles.white(target)
    return np.broadcast_to(values if target.kind == "f" else values.round(), (*size, 3)).astype(target)


def layout(device: torch.device) -> torch.memory_format:
    """In which the networks and what they are given should lie in memory. On a CPU the instance norms of large maps and
    the 9x9 convolutions of few channels are faster in torch's own."""
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last


def _where(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(network.parameters())
    return parameter.device, parameter.dtype


def _whole(
    network: StyleTransfer,
    styled: nn.Module,
    pixels: np.ndarray,
    name: str,
    memory: float | None,
    target: np.dtype,
    on_progress: Callable[[float], object] | None,
) -> np.ndarray | None:
    """At once, or None where that does not fit."""
    device, dtype = _where(network)
    floats = _WHOLE * max(network.config.contract)
    if memory is not None and pixels.shape[0] * pixels.shape[1] * floats * dtype.itemsize > memory:
        return None
    job = ImageJob(name, styled, halo=0, multiple=_DOWN, tiled=False, layout=layout(device))
    try:
        return tiles.run(job, pixels, device=device, dtype=dtype, result=target, on_progress=on_progress)
    except CnnfastError as error:
        if "out of memory" not in str(error):
            raise
        return None


@dataclass
class _Moments:
    """Mean and variance (C,) of all that was added, in float64 (Chan, Golub and LeVeque, 1979)."""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, part: Tensor) -> None:
        """(C, h, w)."""
        n = part.shape[1] * part.shape[2]
        variance, mean = (t.double() for t in torch.var_mean(part, (1, 2), correction=0))
        step = mean - self.mean
        total = self.count + n
        self.squares = self.squares + variance * n + step**2 * (self.count * n / total)
        self.mean = self.mean + step * (n / total)
        self.count = total

    def value(self) -> Moments:
        assert isinstance(self.mean, Tensor) and isinstance(self.squares, Tensor)
        return self.mean, self.squares / self.count


class _Run:
    """A picture by sections. ``kept`` is the map (C, h, w) behind the last one, ``before`` the one ahead of it."""

    def __init__(
        self,
        network: StyleTransfer,
        style: Tensor,
        pixels: np.ndarray,
        name: str,
        on_progress: Callable[[float], object] | None,
    ) -> None:
        self.network, self.style, self.pixels, self.name = network, style, pixels, name
        self.device, self.dtype = _where(network)
        h, w = (tiles.up(n, _DOWN) for n in pixels.shape[:2])
        self.exact = torch.promote_types(self.dtype, torch.float32)
        self.picture, self.map = Tile(0, h, 0, w), Tile(0, h // _DOWN, 0, w // _DOWN)
        self.on_progress, self.done = on_progress, 0.0
        self.kept, self.before = torch.empty(0), torch.empty(0)
        self.moments: list[Moments | None] = [None] * len(network.layers)

    def all(self, memory: float | None, side: int | None, target: np.dtype) -> np.ndarray:
        *sections, last = self.network.sections
        memory = self._without_maps(memory)
        passes = [(s, layers) for s in (*sections, last) for layers in self._passes(s)]
        work = [self._work(s, layers) for s, layers in passes]
        shares = iter([w / (sum(work) + work[-1]) for w in work])
        output = np.empty((*self.pixels.shape[:2], 3), target)
        for section in sections:
            self._section(section, memory, side, shares)
        for layers in self._passes(last):
            self._measure(last, layers, memory, side, next(shares), keep=None)
        where = f"{self.name} in {str(self.dtype).removeprefix('torch.')}"

        def write(tile: Tile, y: Tensor) -> None:
            tiles.store(y[None], output, tile, where)

        self._sweep(last, last.layers, False, memory, side, 1 - self.done, write)
        return output

    def _without_maps(self, memory: float | None) -> float | None:
        """What of ``memory`` is left for tiles beside three maps, on a CPU."""
        if memory is None or self.device.type != "cpu":
            return memory
        maps = 3 * self.network.config.contract[-1] * self.map.bottom * self.map.right * 4
        if maps > memory / 2:
            h, w = self.pixels.shape[:2]
            raise CnnfastError(
                f"out of memory: {self.name} of {w}x{h} pixels needs {2 * maps / 2**20:,.0f} MiB at least, "
                f"{memory / 2**20:,.0f} may be taken: raise --memory, or compute it smaller (--size)"
            )
        return memory - maps

    def _passes(self, section: Section) -> list[tuple[int, ...]]:
        """Layers of a section that are run to measure the last one's result, and to keep it at the section's end."""
        ends = range(1, len(section.layers) + 1)
        last = len(section.layers) if section.up == 1 else -1
        return [section.layers[:n] for n in ends if self.network.layers[section.layers[n - 1]].norm or n == last]

    def _work(self, section: Section, layers: Sequence[int]) -> float:
        """Multiply-adds for each pixel of the picture."""
        scale, total = 1.0 if section.down > 1 else 1 / _DOWN, 0.0
        for layer in (self.network.layers[i] for i in layers):
            scale *= layer.up / layer.conv.stride[0]
            total += layer.conv.weight.numel() * scale**2
        return total

    def _section(self, section: Section, memory: float | None, side: int | None, shares: Iterator[float]) -> None:
        passes = self._passes(section)
        layer = self.network.layers[section.layers[-1]]
        for layers in passes:
            keep = None
            if layers == section.layers:
                keep = torch.empty(layer.conv.out_channels, self.map.bottom, self.map.right, dtype=self.exact)
            self._measure(section, layers, memory, side, next(shares), keep)
        assert keep is not None
        if layer.norm is not None:
            behind = nn.Sequential(*layer.behind(self.style, self.moments[section.layers[-1]])).to(keep.device)
            for rows in keep.split(64, 1):
                rows.copy_(behind(rows[None])[0])
        if section.adds:
            keep += self.before
        self.kept, self.before = keep, self.kept if not section.adds else torch.empty(0)

    def _measure(
        self,
        section: Section,
        layers: Sequence[int],
        memory: float | None,
        side: int | None,
        share: float,
        keep: Tensor | None,
    ) -> None:
        """The moments of the result of the last one's convolution, which goes into ``keep``."""
        normed = self.network.layers[layers[-1]].norm is not None
        moments = _Moments()

        def take(tile: Tile, y: Tensor) -> None:
            if normed:
                moments.add(y.to(self.exact))
            if keep is not None:
                keep[:, tile.top : tile.bottom, tile.left : tile.right] = y.to(keep.device, keep.dtype)

        self._sweep(section, layers, normed, memory, side, share, take)
        if normed:
            self.moments[layers[-1]] = moments.value()

    def _sweep(
        self,
        section: Section,
        layers: Sequence[int],
        raw: bool,
        memory: float | None,
        side: int | None,
        share: float,
        take: Callable[[Tile, Tensor], object],
    ) -> None:
        """``take`` for the results (C, h, w) of all tiles, and their places, of these layers of the section."""
        part = self.network.part(layers, self.style, [self.moments[i] for i in layers], raw)
        whole = self.picture if section.down > 1 else self.map
        halo, multiple = section.halo, section.down
        up, down = self._scale(layers)
        if side is None:
            channels = max(self.network.layers[i].conv.out_channels for i in section.layers)
            floats = _SECTIONS[section.up, section.down] * channels
            chosen = tiles.side_that_fits(whole, memory, self.device, self.dtype, floats, halo, multiple)
        else:
            chosen = tiles.up(side, multiple)

        def work(tile: Tile) -> None:
            x = self._input(section, tile).to(self.device, self.dtype)
            y = part(x.contiguous(memory_format=layout(self.device)))[0]
            top, left = ((first - max(first - halo, 0)) * up // down for first in (tile.top, tile.left))
            place = Tile(*(n * up // down for n in (tile.top, tile.bottom, tile.left, tile.right)))
            rows, columns = place.bottom - place.top, place.right - place.left
            take(place, y[:, top : top + rows, left : left + columns])

        sweep = Sweep(self.name, self.device, chosen, multiple, on_progress=self._told(share))
        sweep.each(whole, work)
        self.done += share

    def _input(self, section: Section, tile: Tile) -> Tensor:
        halo = section.halo
        if section.down > 1:
            return tiles.cut(self.pixels, tile, halo, section.down)
        rows = slice(max(tile.top - halo, 0), tile.bottom + halo)
        return self.kept[None, :, rows, max(tile.left - halo, 0) : tile.right + halo]

    def _scale(self, layers: Sequence[int]) -> tuple[int, int]:
        up, down = 1, 1
        for layer in (self.network.layers[i] for i in layers):
            up, down = up * layer.up, down * layer.conv.stride[0]
        return up, down

    def _told(self, share: float) -> Callable[[float], object] | None:
        told, done = self.on_progress, self.done
        return None if told is None else lambda part: told(min(done + share * part, 1.0))
