"""A network over a picture of any size in bounded memory: overlapping tiles, of which each gives its middle.

An `ImageJob` says what a tile has to hold so that tiles give what the whole picture would. Where a network needs means
of the whole (`Means`), they are taken in passes over all tiles ahead of the last one. Networks, not pictures, are the
subject here: pictures are arrays (H, W, C), which `pictures` reads and writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..messages import CnnfastError, is_out_of_memory

__all__ = ["ImageJob", "Means", "Sweep", "Tile", "cut", "portion", "run", "side_that_fits", "store", "up", "white"]

_SMALLEST = 16  # pixels of a tile's side, below which memory is not the trouble
# What a tile's side is at most: larger ones are no faster (their maps leave the caches), and progress is seldom told.
_LARGEST = {"cpu": 512, "cuda": 1024}


@dataclass(frozen=True)
class Means:
    """Global means that a network needs, in the order in which it does.

    ``map`` takes a tile (N, C, H, W) and the means so far, and gives the map (N, C', h, w) of the next one, whose pixel
    (0, 0) belongs to the tile's first: one pixel for every ``strides[k]`` of the tile, as many as the tile reaches.
    """

    strides: tuple[int, ...]
    map: Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class ImageJob:
    """A network and what is to be known of it to run it by tiles.

    ``network``: pictures (N, C, H, W) in [0, 1], C = ``channels`` -> (N, C, scale*H, scale*W); with ``means``, it takes
    the list of them as a second argument.
    ``halo``: how many pixels around a pixel its result depends on: of those a tile has that many more on each side.
    ``pads``: True for a network that keeps the size, padding at the picture's edge in its own way. False for one that
    does not pad: its result is smaller by ``2 * halo``, and it is given the picture's edge repeated as often.
    ``multiple``: tiles begin and end at multiples of it (strides inside the network); at the end the edge is repeated.
    ``floats``: the numbers that it holds at its peak for a pixel of the input, from which sizes of tiles follow.
    ``differs``: why tiles do not give what the whole would, None where they do.
    ``tiled``: False for a network that only takes whole pictures.
    ``layout``: of the pictures that it is given, in memory.
    """

    name: str
    network: Callable[..., Tensor]
    halo: int
    scale: int = 1
    channels: int = 3
    pads: bool = True
    multiple: int = 1
    floats: int = 1024
    means: Means | None = None
    differs: str | None = None
    tiled: bool = True
    layout: torch.memory_format = torch.channels_last

    def __post_init__(self) -> None:
        if min(self.halo, self.scale - 1, self.channels - 1, self.multiple - 1, self.floats - 1) < 0:
            raise ValueError(f"{self}: halo must not be negative, the other numbers must be positive")
        if not self.pads and 2 * self.halo % self.multiple:
            raise ValueError(f"twice halo={self.halo} does not divide by multiple={self.multiple}")


def white(dtype: np.dtype) -> float:
    """The value of white: the largest of unsigned integers, 1 of floats."""
    return 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)


@dataclass(frozen=True)
class Tile:
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right`` of the picture."""

    top: int
    bottom: int
    left: int
    right: int

    def split(self, side: int) -> Iterator[Tile]:
        for top in range(self.top, self.bottom, side):
            for left in range(self.left, self.right, side):
                yield Tile(top, min(top + side, self.bottom), left, min(left + side, self.right))


def run(
    job: ImageJob,
    pixels: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    memory: float | None = None,
    side: int | None = None,
    result: np.dtype | type | None = None,
    on_progress: Callable[[float], object] | None = None,
) -> np.ndarray:
    """``job`` over a picture (H, W, C), C = 1 or the job's; the result (scale*H, scale*W, C), of the dtype ``result``
    (default: of ``pixels``). Integers are from 0 to their largest, floats from 0 to 1; results are clipped to that.

    ``memory``: bytes that a tile may take, from which its side follows; ``side`` sets it instead. A tile that does not
    fit after all is cut in smaller ones. ``on_progress`` is told the part (0 to 1) that is done.
    CnnfastError where even a small tile does not fit, or a result is not finite.
    """
    target = np.dtype(pixels.dtype if result is None else result)
    with torch.inference_mode():
        return _Run(job, pixels, torch.device(device), dtype, target, on_progress).all(memory, side)


class _Run:
    def __init__(
        self,
        job: ImageJob,
        pixels: np.ndarray,
        device: torch.device,
        dtype: torch.dtype,
        target: np.dtype,
        on_progress: Callable[[float], object] | None,
    ) -> None:
        if pixels.ndim != 3 or min(pixels.shape) < 1 or pixels.shape[2] not in (1, job.channels):
            raise ValueError(f"expected pixels (H, W, 1 or {job.channels}), got {pixels.shape}")
        self.job, self.pixels, self.device, self.dtype = job, pixels, device, dtype
        self.target, self.on_progress = target, on_progress

    def all(self, memory: float | None, side: int | None) -> np.ndarray:
        job = self.job
        h, w, c = self.pixels.shape
        # Tiles begin at multiples of the job's: the picture's end is the end of the last one.
        whole = Tile(0, up(h, job.multiple), 0, up(w, job.multiple))
        if not job.tiled:
            side = max(whole.bottom, whole.right)
        elif side is None:
            side = side_that_fits(whole, memory, self.device, self.dtype, job.floats, job.halo, job.multiple)
        side = up(side, job.multiple)
        self.output = np.empty((h * job.scale, w * job.scale, c), self.target)
        measured = job.means.strides if job.means is not None and max(whole.bottom, whole.right) > side else ()
        self.sweep = Sweep(job.name, self.device, side, job.multiple, job.tiled, self.on_progress)
        self.share = 1 / (len(measured) + 1)
        means: list[Tensor] = []
        for stride in measured:
            means.append(self._mean(whole, stride, means))
        self.sweep.each(whole, lambda tile: self._store(tile, self._network(self._input(tile), means)), self.share)
        return self.output

    def _input(self, tile: Tile) -> Tensor:
        job = self.job
        x = cut(self.pixels, tile, job.halo, job.multiple, job.pads)
        if x.shape[1] != job.channels:
            x = x.expand(-1, job.channels, -1, -1)
        return x.to(self.device, self.dtype).contiguous(memory_format=job.layout)

    def _network(self, x: Tensor, means: Sequence[Tensor]) -> Tensor:
        return self.job.network(x) if self.job.means is None else self.job.network(x, means)

    def _store(self, tile: Tile, y: Tensor) -> None:
        job, s = self.job, self.job.scale
        halo = up(job.halo, job.multiple) if job.pads else 0
        y = y[..., min(halo, tile.top) * s :, min(halo, tile.left) * s :]
        target = Tile(*(s * n for n in (tile.top, tile.bottom, tile.left, tile.right)))
        store(y, self.output, target, f"{job.name} in {str(self.dtype).removeprefix('torch.')}")

    def _mean(self, whole: Tile, stride: int, means: Sequence[Tensor]) -> Tensor:
        """The next mean (1, C, 1, 1) over the whole: of each tile's map the part that no other has."""
        assert self.job.means is not None
        take = self.job.means.map
        total: list[Tensor] = []
        count = 0

        def add(tile: Tile) -> None:
            nonlocal count
            part = take(self._input(tile), means)
            rows = None if tile.bottom == whole.bottom else (tile.bottom - tile.top) // stride
            columns = None if tile.right == whole.right else (tile.right - tile.left) // stride
            part = part[0, :, :rows, :columns]
            total.append(part.sum((1, 2), dtype=torch.float64))
            count += part.shape[1] * part.shape[2]

        self.sweep.each(whole, add, self.share)
        return (torch.stack(total).sum(0) / count).view(1, -1, 1, 1)


# --- parts, of which other ways through a picture are made ------------------------------------------------------------


class Sweep:
    """Goes through tiles, several times if need be. One that does not fit in memory is cut, and so are those after it.

    ``side``: a tile's, a multiple of ``multiple``. ``on_progress`` is told the part (0 to 1) that is done.
    """

    def __init__(
        self,
        name: str,
        device: torch.device,
        side: int,
        multiple: int = 1,
        tiled: bool = True,
        on_progress: Callable[[float], object] | None = None,
    ) -> None:
        self.name, self.device, self.side, self.multiple, self.tiled = name, device, side, multiple, tiled
        self.on_progress, self.done = on_progress, 0.0

    def each(self, whole: Tile, work: Callable[[Tile], None], share: float = 1.0) -> None:
        """``work`` for all tiles of ``whole``, which is ``share`` of all that is to be done. CnnfastError where even a
        small tile does not fit."""
        waiting = [whole]
        while waiting:
            tile = waiting.pop(0)
            if max(tile.bottom - tile.top, tile.right - tile.left) > self.side:
                waiting[:0] = tile.split(self.side)
                continue
            try:
                work(tile)
            except Exception as error:  # torch's is a RuntimeError with words in it
                if not is_out_of_memory(error):
                    raise
                self.side = self._smaller(error)
                waiting.insert(0, tile)
                continue
            area = (tile.bottom - tile.top) * (tile.right - tile.left)
            self.done += share * area / (whole.bottom * whole.right)
            if self.on_progress is not None:
                self.on_progress(min(self.done, 1.0))

    def _smaller(self, error: Exception) -> int:
        half = up(self.side // 2, self.multiple)
        if not self.tiled or half < _SMALLEST or half >= self.side:
            raise CnnfastError(
                f"out of memory: {self.name} does not fit on {self.device} even by tiles of {self.side}x"
                f"{self.side} pixels"
                if self.tiled
                else f"out of memory: {self.name} takes whole pictures only: make this one smaller"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return half


def side_that_fits(
    whole: Tile,
    memory: float | None,
    device: torch.device,
    dtype: torch.dtype,
    floats: int,
    halo: int = 0,
    multiple: int = 1,
) -> int:
    """A tile's side for ``memory`` bytes, None: as large as pays. ``floats``, ``halo``, ``multiple``: `ImageJob`'s."""
    largest = _LARGEST.get(device.type, 512)
    if memory is not None:
        fits = int(math.sqrt(max(memory, 0) / dtype.itemsize / floats)) - 2 * halo
        largest = min(largest, max(_SMALLEST, fits))
    # Of equal size, so that none is a strip of which most is overlap.
    parts = math.ceil(max(whole.bottom, whole.right) / largest)
    return up(math.ceil(max(whole.bottom, whole.right) / parts), multiple)


def cut(pixels: np.ndarray, tile: Tile, halo: int, multiple: int = 1, pads: bool = True) -> Tensor:
    """The tile of a picture (H, W, C) with its surroundings, in [0, 1]: float32 (1, C, h, w) on the CPU. ``halo``,
    ``multiple`` and ``pads`` as of `ImageJob`."""
    h, w = pixels.shape[:2]
    halo = up(halo, multiple) if pads else halo
    ends = []
    for first, last, size in ((tile.top, tile.bottom, h), (tile.left, tile.right, w)):
        end = up(size, multiple)
        a, b = first - halo, last + halo
        indices = np.arange(max(a, 0), min(b, end)) if pads else np.arange(a, b)
        ends.append(indices.clip(0, size - 1))  # the edge is repeated
    values = pixels[ends[0][:, None], ends[1]].astype(np.float32) / np.float32(white(pixels.dtype))
    return torch.from_numpy(values).permute(2, 0, 1)[None]


def store(y: Tensor, output: np.ndarray, tile: Tile, name: str) -> None:
    """Write what was computed for a tile (1, C, h, w), in [0, 1] or about, into its place in ``output`` (H, W, C),
    clipped, and rounded where that holds integers. Both may end beyond the picture. Of a grey picture it is the mean of
    the channels. CnnfastError for values that are not finite."""
    h, w, c = output.shape
    bottom, right = min(tile.bottom, h), min(tile.right, w)
    y = y[0, :, : bottom - tile.top, : right - tile.left].float()
    if not torch.isfinite(y).all():
        raise CnnfastError(f"{name} gave values that are not finite")
    if y.shape[0] != c:
        y = y.mean(0, keepdim=True)
    y = y.clamp_(0, 1).permute(1, 2, 0)
    if output.dtype.kind != "f":
        y = (y * white(output.dtype)).round_()
    output[tile.top : bottom, tile.left : right] = y.cpu().numpy().astype(output.dtype)


def portion(on_progress: Callable[[float], object] | None, number: int, parts: int) -> Callable[[float], object] | None:
    """What to tell of the work ``number`` of so many that make a whole."""
    return None if on_progress is None else lambda done: on_progress((number + done) / parts)


def up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple
