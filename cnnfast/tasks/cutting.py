"""``compose cutout``: people out of a picture, before another one or before nothing.

Where they are says a small network, MediaPipe's, of some 256x256 pixels. It is asked at several sizes, and again about
the part where it sees somebody; `matting` takes that to the picture's own edges.
`Cutter` keeps the network for many pictures; `cut_out` is one call.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cpu.packing import freeze
from ..dispatch import backend as backend_context
from ..generators import create_model
from ..messages import CnnfastError, UsageError
from . import batch, matting, pictures, pixels
from .machine import choose_device, choose_dtype, containers, require, require_memory
from .matting import Matte
from .pictures import Picture

__all__ = ["Cutter", "add_command", "behind_of", "cut_out", "enlarged", "read", "smaller"]

PACKAGES = MappingProxyType({"pillow": "PIL", "tqdm": "tqdm"})

# Sizes at which the network is asked, of whose answers the mean is better than each: squares as it was trained on, and
# the picture's own proportions with as many pixels as a square of this side.
_SQUARES, _SIDES = (256, 320), (224, 256, 288)
_MULTIPLE = 16
_MARGIN = 0.1  # of its size, around the part about which the network is asked again
_WORK = 512  # longer side, in pixels, of the picture on which edges are looked for
_PERSON = 0.5  # of the mask, somewhere, below which nobody is there


class Cutter:
    """Cuts the people out of pictures and puts them before ``background``: a picture (of any size: it is enlarged or
    made smaller to cover, and its middle is taken), a colour as Pillow names them ("white", "#204060"), or None,
    before nothing. ``device``, ``dtype`` and ``backend`` as of `Enhancer`.

    UsageError for what is not offered; WeightsError where weights cannot be had.
    """

    def __init__(
        self,
        background: Any = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        backend: str | None = None,
        sequential: type[nn.Sequential] | None = None,
    ) -> None:
        self.background = None if background is None else behind_of(background)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self._backend = backend
        made = containers(self.device) if sequential is None else sequential
        network = create_model("selfie", pretrained=True, sequential=made).eval().requires_grad_(False)
        self.network = network.to(self.device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        freeze(self.network)

    def __call__(self, image: Any) -> Any:
        """The people of a picture, of the kind that ``image`` is, see `pictures.through`; with alpha where there is
        nothing behind them. ImageError where nobody is found."""
        return pictures.through(self.picture, image, "cutout")

    def picture(self, picture: Picture, on_progress: Callable[[float], object] | None = None) -> Picture:
        """The same for a `Picture`, whose ``info`` goes along."""
        matte = self.matte(picture)
        given, behind = picture.pixels, None
        if self.background is not None:
            profile = picture.info.get("icc_profile") if picture.colours.shape[2] == 3 else None
            behind = pixels.covering(pixels.in_profile(self.background, profile), given)
        done = matting.composed(given, matte, behind)
        pictures.check_result(given, done, "cutout")
        if on_progress is not None:
            on_progress(1.0)
        return pictures.made_of(picture, done)

    def matte(self, picture: Picture) -> Matte:
        """Where the people are. ImageError where nobody is found."""
        h, w, c = picture.pixels.shape
        require_memory(2 * h * w * c * picture.pixels.itemsize, f"a picture of {w}x{h}")
        colours, alpha = pixels.in_8_bits(picture.colours), picture.alpha
        if alpha is not None and alpha.min() != alpha.max():
            colours = pictures.spread_colours(colours, alpha)
        small = smaller(colours, _within(_WORK, h, w))
        return matting.matte_of(small, self.mask(colours), (h, w))

    def mask(self, colours: np.ndarray) -> Tensor:
        """Where people are in pixels (H, W, 1 or 3) uint8: float32 from 0 to 1 (h, w), of the same proportions and at
        most 512 pixels long, on the CPU. ImageError where nobody is found."""
        h, w = colours.shape[:2]
        size = _within(_WORK, h, w)
        mask = self._asked(colours, size)
        rows, columns = ((mask > _PERSON).any(1 - i).nonzero().flatten() for i in (0, 1))
        if not len(rows):
            raise pictures.ImageError("shows nobody that the network finds")
        (top, bottom), (left, right) = (_around(n, m) for n, m in ((rows, size[0]), (columns, size[1])))
        part = (
            slice(top * h // size[0], -(-bottom * h // size[0])),
            slice(left * w // size[1], -(-right * w // size[1])),
        )
        again = torch.zeros_like(mask)
        again[top:bottom, left:right] = self._asked(colours[part], (bottom - top, right - left))
        return again if again.max() > _PERSON else mask

    def _asked(self, colours: np.ndarray, size: tuple[int, int]) -> Tensor:
        """The mean of the network's answers, as ``size``."""
        h, w = colours.shape[:2]
        fitting = [_multiples(side * (h / w) ** 0.5, side * (w / h) ** 0.5) for side in _SIDES]
        total = torch.zeros(size)
        sizes = [*((side, side) for side in _SQUARES), *fitting]
        for one in sizes:
            total += enlarged(self.answer(smaller(colours, one)), size)
        return total / len(sizes)

    def answer(self, x: Tensor) -> Tensor:
        """What the network says of a picture (3, h, w) in [0, 1], multiples of 16: float32 (h, w) on the CPU."""
        x = x[None].to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), backend_context(self._backend) if self._backend is not None else nullcontext():
            y = self.network(x)
        if not torch.isfinite(y).all():
            raise CnnfastError(f"selfie in {str(self.dtype).removeprefix('torch.')} gave values that are not finite")
        return y[0, 0].float().cpu().clone()


def cut_out(image: Any, background: Any = None, **options: Any) -> Any:
    """The people of ``image`` before ``background``, or before nothing: see `Cutter`, whose options these are. A
    picture of Pillow's gives one, an array gives one. For many pictures keep a `Cutter`."""
    return Cutter(background, **options)(image)


def _within(longest: int, h: int, w: int) -> tuple[int, int]:
    scale = min(1.0, longest / max(h, w))
    return max(1, round(h * scale)), max(1, round(w * scale))


def _multiples(h: float, w: float) -> tuple[int, int]:
    """The next multiples of 16, for long pictures not beyond what such a network is good for."""
    most = 4 * max(_SIDES)
    h, w = (min(max(n, _MULTIPLE), most) for n in (h, w))
    return round(h / _MULTIPLE) * _MULTIPLE, round(w / _MULTIPLE) * _MULTIPLE


def _around(found: Tensor, size: int) -> tuple[int, int]:
    """From the first to behind the last of these positions, and a margin."""
    first, last = int(found[0]), int(found[-1]) + 1
    margin = round(_MARGIN * (last - first))
    return max(first - margin, 0), min(last + margin, size)


def smaller(colours: np.ndarray, size: tuple[int, ...]) -> Tensor:
    """Pixels (H, W, 1 or 3) uint8 at another size (height, width): float32 (3, h, w) in [0, 1]."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(colours[..., 0] if colours.shape[2] == 1 else colours))
    image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC).convert("RGB")
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1).contiguous()


def enlarged(mask: Tensor, size: tuple[int, ...]) -> Tensor:
    antialias = mask.shape[0] > size[0] or mask.shape[1] > size[1]
    return nn.functional.interpolate(mask[None, None], size, mode="bilinear", antialias=antialias)[0, 0]


# --- what is behind ---------------------------------------------------------------------------------------------------


def behind_of(background: Any) -> Picture:
    """A background as people give it: see `Cutter`. A colour is a picture of one pixel. UsageError for a text that is
    no colour."""
    if isinstance(background, Picture):
        return background
    if isinstance(background, np.ndarray):
        return pictures.from_array(background)
    require("cutout", {"pillow": "PIL"})
    if hasattr(background, "getexif"):
        return pictures.from_pil(background)
    if not isinstance(background, str):
        raise UsageError(f"expected a picture or a colour behind, got {type(background).__name__}")
    from PIL import ImageColor

    try:
        colour = ImageColor.getrgb(background)
    except ValueError as error:
        raise UsageError(f"--background {background}: no such file, and no colour such as white or #204060") from error
    return Picture(np.array(colour, np.uint8).reshape(1, 1, -1))


# --- the command ------------------------------------------------------------------------------------------------------


def add_command(commands: Any, name: str, **options: Any) -> None:
    """The subcommand ``name``; ``options`` are those of ``add_parser``."""
    command = commands.add_parser(name, **options)
    batch.add_batch_options(command)
    command.add_argument(
        "--background",
        metavar="PICTURE|COLOUR",
        help="what is put behind the people: a picture, or white, '#204060', ... (default: nothing; .png or .webp)",
    )
    batch.add_machine_options(command, memory=False)
    command.set_defaults(work=_work, ranks=True)


def read_behind(background: str) -> Picture:
    """The value of ``--background``. A file comes first."""
    if os.path.lexists(background):
        return read(Path(background))
    return behind_of(background)


def read(path: Path) -> Picture:
    """`pictures.read`, whose ImageError names the file."""
    try:
        return pictures.read(path)
    except pictures.ImageError as error:
        raise pictures.ImageError(f"{path} {error}") from error


def _work(arguments: argparse.Namespace) -> int:
    require("cutout", PACKAGES)
    behind = None if arguments.background is None else read_behind(arguments.background)
    transparent = behind is None or behind.has_alpha
    written = pictures.TRANSPARENT if transparent else pictures.WRITTEN
    items = batch.plan(arguments.inputs, arguments.output, arguments.recursive, written)
    cutter = Cutter(behind, device=arguments.device, dtype=arguments.dtype, backend=arguments.backend)

    def work(source: Path, target: Path, told: Callable[[float], object]) -> None:
        picture = read(source)
        try:
            done = cutter.picture(picture, told)
        except pictures.ImageError as error:
            raise pictures.ImageError(f"{source} {error}") from error
        pictures.write(target, done, arguments.png_level)

    return batch.process(items, work, skip_existing=arguments.skip_existing)
