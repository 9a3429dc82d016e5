"""``compose style``: pictures in the style of others, all of them or what is behind the people only.

26 styles are learnt; any picture can be one too. `Styler` keeps its networks for many pictures; `style` is one call.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
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
from ..messages import UsageError
from . import batch, matting, pictures, pixels, stages
from .cutting import Cutter, read, smaller
from .machine import choose_device, choose_dtype, memory_to_use, require, require_memory
from .pictures import Picture

__all__ = ["PARTS", "STYLES", "Styler", "add_command", "style", "weighted"]

PACKAGES = MappingProxyType({"pillow": "PIL", "tqdm": "tqdm"})

# The published styles have numbers only; these names say what they look like.
STYLES = (
    "pastel",
    "yellow-ink",
    "watercolour",
    "carnival",
    "poster",
    "ember",
    "midnight",
    "primary",
    "pink-pencil",
    "lace",
    "copper",
    "etching",
    "lilac",
    "tropic",
    "mist",
    "mosaic",
    "crayon",
    "weave",
    "woodgrain",
    "starry",
    "crimson",
    "pop",
    "fresco",
    "charcoal",
    "indigo",
    "tapestry",
)
PARTS = ("background", "person")

_PREDICTED_FROM = 256  # side of the pictures out of which styles are predicted
_LEAST_SIZE = 32

Style = Any  # a name, a number, a path, a picture
Weighted = list[tuple[int | Picture, float]]


class Styler:
    """Gives pictures a style.

    ``style``: a name of `STYLES`, its number, or a picture (a path, a Pillow image, an array, a `Picture`); or several,
    a mapping or a sequence of them or of pairs of a style and its weight, which are blended. Pictures and learnt styles
    are of two networks, between which nothing can be blended. ``strength``: from 0, the picture as it is, to 1, the
    style alone. ``only``: "background", what is behind the people, or "person". ``size``: pixels of the longer side at
    which larger pictures are styled; strokes have a size in pixels, so that they become larger (default: as it is).
    ``device``, ``dtype``, ``backend`` and ``memory`` as of `Enhancer`.

    UsageError for what is not offered; WeightsError where weights cannot be had.
    """

    def __init__(
        self,
        style: Style,
        *,
        strength: float = 1.0,
        only: str | None = None,
        size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        backend: str | None = None,
        memory: float | None = None,
        sequential: type[nn.Sequential] | None = None,
    ) -> None:
        if not 0 <= strength <= 1:
            raise UsageError(f"--strength {strength}: expected a number from 0 to 1")
        if only is not None and only not in PARTS:
            raise UsageError(f"--only {only}: expected one of {', '.join(PARTS)}")
        if size is not None and size < _LEAST_SIZE:
            raise UsageError(f"--size {size}: expected at least {_LEAST_SIZE} pixels")
        found = weighted(style)
        self.strength, self.only, self.size = strength, only, size
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.memory, self._backend = memory, backend
        made: dict[str, Any] = {} if sequential is None else {"sequential": sequential}
        learnt = isinstance(found[0][0], int)
        self.name = "style_26" if learnt else "style_any"
        numbers = _learnt(found) if learnt else _predicted(found, made)
        network = create_model(self.name, pretrained=True, **made).eval().requires_grad_(False)
        layout = stages.layout(self.device)
        self.network: Any = network.to(self.device, self.dtype, memory_format=layout)  # type: ignore[call-overload]
        freeze(self.network)
        self.numbers = numbers.to(self.device, self.dtype)
        with torch.no_grad():
            self._styled = self.network.styled(self.numbers)
        self._cutter = None
        if only is not None:
            self._cutter = Cutter(device=device, dtype=dtype, backend=backend, sequential=sequential)

    def __call__(self, image: Any, *, on_progress: Callable[[float], object] | None = None) -> Any:
        """The picture in the style, of the kind that ``image`` is and as large, in colours, see `pictures.through`.
        ImageError where ``only`` a part is asked for and nobody is found."""
        return pictures.through(lambda picture: self.picture(picture, on_progress), image, "style")

    def picture(self, picture: Picture, on_progress: Callable[[float], object] | None = None) -> Picture:
        """The same for a `Picture`, whose ``info`` goes along, and its transparency."""
        h, w, c = picture.pixels.shape
        require_memory(h * w * (c + 9) * picture.pixels.itemsize, f"a picture of {w}x{h}")
        matte = None if self._cutter is None else self._cutter.matte(picture)
        colours, alpha = picture.colours, picture.alpha
        if alpha is not None and alpha.min() != alpha.max():
            colours = pictures.spread_colours(colours, alpha)
        colours = np.broadcast_to(colours, (h, w, 3))
        done = self._run(colours, on_progress)
        pictures.check_result(colours, done, self.name)
        if self.strength < 1:
            _mix(done, colours, self.strength)
        if matte is not None and self.only == "background":
            done = matting.composed(colours, matte, behind=done)
        elif matte is not None:
            done = matting.composed(colours, matte, behind=colours, front=done)
        if alpha is not None:
            done = np.concatenate([done, alpha], 2)
        return pictures.made_of(picture, done)

    def _run(self, colours: np.ndarray, on_progress: Callable[[float], object] | None) -> np.ndarray:
        h, w = colours.shape[:2]
        memory = self.memory if self.memory is not None else memory_to_use(self.device)
        scale = 1.0 if self.size is None else min(1.0, self.size / max(h, w))
        if scale < 1:
            colours = pixels.resized(colours, (max(1, round(h * scale)), max(1, round(w * scale))))
        with backend_context(self._backend) if self._backend is not None else nullcontext():
            done = stages.run(
                self.network,
                self.numbers,
                colours,
                styled=self._styled,
                name=self.name,
                memory=memory,
                on_progress=on_progress,
            )
        return done if scale == 1 else pixels.resized(done, (h, w))


def style(image: Any, style: Style, **options: Any) -> Any:
    """``image`` in a style: see `Styler`, whose options these are. A picture of Pillow's gives one, an array gives one.
    For many pictures keep a `Styler`."""
    return Styler(style, **options)(image)


def _mix(styled: np.ndarray, colours: np.ndarray, strength: float) -> None:
    """``styled`` becomes the mean of both; rows by rows, for less memory."""
    for top in range(0, styled.shape[0], 64):
        rows = slice(top, top + 64)
        mean = styled[rows] * np.float32(strength) + colours[rows] * np.float32(1 - strength)
        styled[rows] = mean if styled.dtype.kind == "f" else mean.round()


# --- which style ------------------------------------------------------------------------------------------------------


def weighted(style: Style) -> Weighted:
    """Styles and their weights, which add up to 1: see `Styler`; learnt ones by their numbers. UsageError for what is
    none, and for pictures beside learnt styles."""
    if isinstance(style, Mapping):
        pairs = list(style.items())
    elif isinstance(style, Sequence) and not isinstance(style, str):
        pairs = [item if isinstance(item, tuple) else (item, 1.0) for item in style]
    else:
        pairs = [(style, 1.0)]
    if not pairs:
        raise UsageError("no style is given")
    found = [(_one(item), float(weight)) for item, weight in pairs]
    total = sum(weight for _, weight in found)
    if min(weight for _, weight in found) < 0 or not 0 < total < math.inf:
        raise UsageError("weights of styles must be positive numbers")
    if len({isinstance(item, int) for item, _ in found}) > 1:
        raise UsageError("learnt styles and pictures cannot be blended: they are of two networks")
    return [(item, weight / total) for item, weight in found]


def _one(item: Style) -> int | Picture:
    if isinstance(item, Picture):
        return item
    if isinstance(item, np.ndarray):
        return pictures.from_array(item)
    if isinstance(item, (int, str)) and not isinstance(item, bool):
        number = _number(item)
        if number is not None:
            return number
    if isinstance(item, (str, os.PathLike)) and os.path.lexists(item):
        require("style", {"pillow": "PIL"})
        return read(Path(item))
    if hasattr(item, "getexif"):
        return pictures.from_pil(item)
    known = ", ".join(STYLES)
    raise UsageError(f"style {item}: expected one of {known}, 0 to {len(STYLES) - 1}, or a picture or its path")


def _number(item: int | str) -> int | None:
    text = str(item)
    if text in STYLES:
        return STYLES.index(text)
    return int(text) if text.isascii() and text.isdecimal() and int(text) < len(STYLES) else None


def _learnt(found: Weighted) -> Tensor:
    numbers = torch.zeros(len(STYLES))
    for item, weight in found:
        assert isinstance(item, int)
        numbers[item] += weight
    return numbers


def _predicted(found: Weighted, made: Mapping[str, Any]) -> Tensor:
    """The mean of what a network makes of the pictures' middle squares, on the CPU, where once is soon done."""
    network = create_model("style_predictor", pretrained=True, **made)
    squares = []
    for item, _ in found:
        assert isinstance(item, Picture)
        square = pixels.covering(pixels.on_white(item), np.empty((_PREDICTED_FROM, _PREDICTED_FROM, 3), np.uint8))
        squares.append(smaller(square, (_PREDICTED_FROM, _PREDICTED_FROM)))
    with torch.inference_mode():
        vectors = network(torch.stack(squares))
    return (vectors * torch.tensor([weight for _, weight in found])[:, None]).sum(0).clone()


# --- the command ------------------------------------------------------------------------------------------------------


def add_command(commands: Any, name: str, **options: Any) -> None:
    """The subcommand ``name``; ``options`` are those of ``add_parser``."""
    command = commands.add_parser(name, **options)
    batch.add_batch_options(command)
    command.add_argument(
        "--style",
        action="append",
        required=True,
        metavar="STYLE[=WEIGHT]",
        help=f"{', '.join(STYLES)}; or 0 to {len(STYLES) - 1}; or any picture. Given several times: a blend",
    )
    command.add_argument("--strength", type=float, default=1.0, metavar="0-1", help="1: the style alone (1)")
    command.add_argument("--only", choices=PARTS, help="style what is behind the people, or them")
    command.add_argument(
        "--size", type=int, metavar="PIXELS", help="style larger pictures at this longer side: larger strokes"
    )
    batch.add_machine_options(command)
    command.set_defaults(work=_work, ranks=True)


def given(text: str) -> tuple[str, float]:
    """A value of ``--style``: STYLE, or STYLE=WEIGHT where STYLE=WEIGHT is no file."""
    head, separator, tail = text.rpartition("=")
    if not separator or os.path.lexists(text):
        return text, 1.0
    try:
        return head, float(tail)
    except ValueError as error:
        raise UsageError(f"--style {text}: expected a number behind =") from error


def _work(arguments: argparse.Namespace) -> int:
    require("style", PACKAGES)
    items = batch.plan(arguments.inputs, arguments.output, arguments.recursive)
    styler = Styler(
        [given(text) for text in arguments.style],
        strength=arguments.strength,
        only=arguments.only,
        size=arguments.size,
        device=arguments.device,
        dtype=arguments.dtype,
        backend=arguments.backend,
        memory=arguments.memory,
    )

    def work(source: Path, target: Path, told: Callable[[float], object]) -> None:
        picture = read(source)
        pictures.check_target(target, picture)  # before the work
        try:
            done = styler.picture(picture, told)
        except pictures.ImageError as error:
            raise pictures.ImageError(f"{source} {error}") from error
        pictures.write(target, done, arguments.png_level)

    return batch.process(items, work, skip_existing=arguments.skip_existing)
