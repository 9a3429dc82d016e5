"""``repair``: scratches, text and small holes, which a mask marks, filled from what lies around them.

The filling is biharmonic (`filling`), and a small network trained by this project adds what a smooth surface lacks.
`Repairer` keeps the network for many pictures; `repair` is one call.
"""

from __future__ import annotations

import argparse
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn

from ..cpu.packing import freeze
from ..dispatch import backend as backend_context
from ..generators import RepairUNet
from ..messages import CnnfastWarning, UsageError
from . import batch, pictures, tiles
from .damage import KINDS, draw_mask
from .data import HELD_OUT, photograph
from .filling import biharmonic, bounds, depth, fill, holes
from .machine import choose_device, choose_dtype, containers, memory_to_use, require, require_memory
from .masks import mask_for
from .pictures import Picture
from .repair_weights import load_network
from .tiles import ImageJob

__all__ = ["SMALL", "Repairer", "Row", "add_command", "evaluate", "repair", "table"]

PACKAGES = MappingProxyType({"pillow": "PIL", "scikit-image": "skimage", "tqdm": "tqdm"})

# Pixels to the nearest known one, up to which a hole is a small one: further in nothing but a smooth surface is made.
SMALL = 32
_AROUND = 128  # pixels around all holes that are looked at: more than filling and network see
_FLOATS = 350  # as `ImageJob.floats`
_LARGEST_GROWTH = 64


class Repairer:
    """Repairs pictures where masks mark them; every other pixel stays as it is.

    ``grow``: pixels by which every mask is grown, for masks that leave a rim of the damage. ``weights_file``: what
    ``train repair`` wrote, in the place of the shipped weights. ``device``, ``dtype``, ``backend`` and ``memory`` as of
    `Enhancer`. UsageError for what is not offered; WeightsError for a file that does not hold such weights.
    """

    def __init__(
        self,
        *,
        grow: int = 0,
        weights_file: str | os.PathLike[str] | None = None,
        device: str | None = None,
        dtype: str | None = None,
        backend: str | None = None,
        memory: float | None = None,
        sequential: type[nn.Sequential] | None = None,
    ) -> None:
        require("repair", PACKAGES)
        if not 0 <= grow <= _LARGEST_GROWTH:
            raise UsageError(f"--grow {grow}: expected 0 to {_LARGEST_GROWTH} pixels")
        self.grow, self.memory, self._backend = grow, memory, backend
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        made = containers(self.device) if sequential is None else sequential
        network = load_network(weights_file, sequential=made)
        network.requires_grad_(False)
        network.to(self.device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        freeze(network)
        self.network = network
        self._job = ImageJob(
            "repair",
            self._with_mask,
            halo=RepairUNet.halo,
            channels=4,
            multiple=RepairUNet.multiple,
            floats=_FLOATS,
        )

    def _with_mask(self, x: Tensor) -> Tensor:
        return torch.cat([self.network(x), x[:, 3:]], 1)  # `tiles.run` gives as many channels as it takes

    def __call__(self, image: Any, mask: Any, *, on_progress: Callable[[float], object] | None = None) -> Any:
        """The repaired picture, of the kind that ``image`` is, as `pictures.through` says. ``mask`` as of
        `masks.mask_for`, white where it is to be repaired; it need not be of the same kind."""
        return pictures.through(lambda picture: self.picture(picture, mask, on_progress), image, "repair")

    def picture(self, picture: Picture, mask: Any, on_progress: Callable[[float], object] | None = None) -> Picture:
        """The same for a `Picture`, whose ``info`` goes along. Transparency is repaired too where it is not the same
        all around; colours that nobody sees are not looked at."""
        marked = mask_for(picture, mask, self.grow)
        box = bounds(marked)
        assert box is not None  # `mask_for` has seen to it
        region = box.grown(_AROUND, marked.shape, RepairUNet.multiple)
        whole, inside = picture.pixels.copy(), marked[region.slices]
        h, w = inside.shape
        require_memory(h * w * 4 * (3 * whole.shape[2] + 8), f"a part of {w}x{h} pixels")
        _tell_of_large_holes(inside)
        part = Picture(whole[region.slices])
        colours, alpha = part.colours, part.alpha
        passes = 1
        if alpha is not None:
            around = alpha[~inside]
            solid = bool((around == around.flat[0]).all())
            if solid:
                alpha[inside] = around.flat[0]
            else:
                passes = 2
                colours = pictures.spread_colours(colours, alpha * ~inside[..., None])
                alpha[inside] = self._repaired(alpha, inside, _part(on_progress, 1, 2))
        part.colours[inside] = self._repaired(colours, inside, _part(on_progress, 0, passes))
        return Picture(whole, picture.info)

    def _repaired(
        self, pixels: np.ndarray, inside: np.ndarray, on_progress: Callable[[float], object] | None
    ) -> np.ndarray:
        """New values (N, C) of the pixels (H, W, C) that are ``inside``, of their dtype."""
        white = tiles.white(pixels.dtype)
        filled = fill(pixels.astype(np.float32) / np.float32(white), inside)
        colours = np.broadcast_to(filled, (*inside.shape, 3)) if filled.shape[2] == 1 else filled
        result = filled.copy()
        memory = self.memory if self.memory is not None else memory_to_use(self.device)
        boxes = list(holes(inside))
        with backend_context(self._backend) if self._backend is not None else nullcontext():
            for number, box in enumerate(boxes):
                window = box.grown(RepairUNet.halo, inside.shape, RepairUNet.multiple)
                cut = np.dstack([colours[window.slices], inside[window.slices]]).astype(np.float32, copy=False)
                refined = tiles.run(self._job, cut, device=self.device, dtype=self.dtype, memory=memory)
                refined = refined[box.within(window)][..., :3]
                if filled.shape[2] == 1:
                    refined = refined.mean(2, keepdims=True)
                marked = inside[box.slices]
                result[box.slices][marked] = refined[marked]
                if on_progress is not None:
                    on_progress((number + 1) / len(boxes))
        values = result[inside].clip(0, 1) * white
        return (values if pixels.dtype.kind == "f" else values.round()).astype(pixels.dtype)


def repair(image: Any, mask: Any, **options: Any) -> Any:
    """``image`` repaired where ``mask`` is white: see `Repairer`, whose options these are. A picture of Pillow's gives
    one, an array gives one. For many pictures keep a `Repairer`."""
    return Repairer(**options)(image, mask)


def _tell_of_large_holes(inside: np.ndarray) -> None:
    far = depth(inside)
    if far is not None and far.max() > SMALL:
        warnings.warn(
            f"a hole is {2 * int(far.max())} pixels wide: this is for small ones, up to {2 * SMALL}; the middle of a "
            "larger one becomes a smooth surface (white in the mask is what is repaired)",
            CnnfastWarning,
            stacklevel=4,
        )


def _part(on_progress: Callable[[float], object] | None, number: int, parts: int) -> Callable[[float], object] | None:
    return None if on_progress is None else lambda done: on_progress((number + done) / parts)


# --- the command ------------------------------------------------------------------------------------------------------


def add_command(commands: Any, name: str, **options: Any) -> None:
    """The task's subcommand ``name``; ``options`` are those of ``add_parser``."""
    command = commands.add_parser(name, **options)
    batch.add_batch_options(command)
    command.add_argument(
        "--mask",
        type=Path,
        required=True,
        metavar="MASK",
        help="white where to repair, of the picture's size; or a folder of masks that are named like their pictures",
    )
    command.add_argument("--grow", type=int, default=0, metavar="PIXELS", help="mark that much more around (0)")
    command.add_argument("--weights-file", type=Path, metavar="PATH", help="what `train repair` wrote")
    batch.add_machine_options(command)
    command.set_defaults(work=_work, ranks=True)


def _work(arguments: argparse.Namespace) -> int:
    require("repair", PACKAGES)
    items = batch.plan(arguments.inputs, arguments.output, arguments.recursive)
    if not os.path.lexists(arguments.mask):
        raise UsageError(f"--mask {arguments.mask} does not exist")
    repairer = Repairer(
        grow=arguments.grow,
        weights_file=arguments.weights_file,
        device=arguments.device,
        dtype=arguments.dtype,
        backend=arguments.backend,
        memory=arguments.memory,
    )

    def work(source: Path, target: Path, told: Callable[[float], object]) -> None:
        mask = mask_of(source, arguments.inputs, arguments.mask)
        picture = _read(source)
        pictures.check_target(target, picture)  # before the work
        try:
            done = repairer.picture(picture, _read(mask), told)
        except UsageError as error:
            raise UsageError(f"{source} and {mask}: {error}") from error
        pictures.write(target, done, arguments.png_level)

    return batch.process(items, work, skip_existing=arguments.skip_existing)


def _read(path: Path) -> Picture:
    try:
        return pictures.read(path)
    except pictures.ImageError as error:
        raise pictures.ImageError(f"{path} {error}") from error


def mask_of(source: Path, inputs: Sequence[Path], mask: Path) -> Path:
    """The mask of a picture: ``mask`` itself, or in that folder the picture that stands where ``source`` stands below
    ``inputs``, with any suffix. UsageError where there is none."""
    if not mask.is_dir():
        return mask
    folders = [folder for folder in inputs if folder.is_dir() and source.is_relative_to(folder)]
    inside = source.relative_to(folders[0]) if folders else Path(source.name)
    for name in (inside, *(inside.with_suffix(suffix) for suffix in pictures.READ)):
        if (mask / name).is_file():
            return mask / name
    raise UsageError(f"{source}: --mask {mask} has no {inside.with_suffix('')} ({', '.join(pictures.READ)})")


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """PSNR in dB inside the mask: of scikit-image's biharmonic filling, and of what `Repairer` makes."""

    damage: str
    photograph: str
    biharmonic: float
    repaired: float

    @property
    def gain(self) -> float:
        return self.repaired - self.biharmonic


def evaluate(names: Sequence[str] = tuple(HELD_OUT), turns: int = 2, **options: Any) -> list[Row]:
    """Photographs that the network was not trained on, damaged by each kind of `damage.KINDS`, ``turns`` times with
    other masks. ``options`` go to `Repairer`. The biharmonic filling is that of the whole photograph at once."""
    repairer = Repairer(**options)
    rows = []
    for k, kind in enumerate(KINDS):
        for name in names:
            truth = np.array(photograph(name))
            for turn in range(turns):
                mask = draw_mask(np.random.default_rng([k, turn, *name.encode()]), truth.shape[:2], kind)
                damaged = truth.copy()
                damaged[mask] = 255
                plain = (biharmonic(damaged / 255, mask) * 255).round()
                rows.append(Row(kind, name, _psnr(plain, truth, mask), _psnr(repairer(damaged, mask), truth, mask)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The figures, case by case, and their mean."""
    cells = [(r.damage, r.photograph, f"{r.biharmonic:.2f}", f"{r.repaired:.2f}", f"{r.gain:+.2f}") for r in rows]
    gain = sum(r.gain for r in rows) / len(rows)
    better = sum(r.gain > 0 for r in rows)
    headers = ("damage", "photograph", "biharmonic, dB", "repaired, dB", "gain")
    lines = tabulate(cells, headers, disable_numparse=True, colalign=("left", "left", "right", "right", "right"))
    return f"{lines}\nmean gain {gain:+.2f} dB, better in {better} of {len(rows)} cases"


def _psnr(made: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    error = ((made.astype(np.float64) - truth) ** 2)[mask].mean()
    return 10 * math.log10(255**2 / error) if error else math.inf
