"""``python -m cnnfast draw "red heart"``: an image from a text. Needs Pillow.

What can be drawn is a vocabulary: emoji, by the words of their English and German names, in combinations old and new;
and eyes in eight colours, by the generator of `sampling`. The network for emoji ships with the package.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..cpu.packing import freeze
from ..files import make_output_dir
from ..memory_format import channels_last
from ..messages import CnnfastWarning, UsageError
from ..nn.layers import Sequential
from . import evaluation
from .arguments import positive, seed
from .emoji import load_emoji
from .machine import REQUIRES, choose_device, require
from .plots import is_picture, pixels, save_pixels
from .sampling import Sampler
from .text_weights import load_weights
from .words import Reading, Vocabulary, fold, split

if TYPE_CHECKING:
    import os

    from PIL import Image

__all__ = ["Drawer", "Drawing", "add_command", "colour_of_eyes", "draw", "evaluate"]

_EYES = frozenset({"eye", "eyes", "auge", "augen"})
# What people call the colours of `sampling.COLOURS`, with the forms that German adjectives take.
_COLOURS = {
    **{name: name for name in ("amber", "blue", "brown", "gray", "grayscale", "green", "hazel", "red")},
    "grey": "gray",
    "greyscale": "grayscale",
    **{
        f"{stem}{end}": name
        for stem, name in (("blau", "blue"), ("braun", "brown"), ("grau", "gray"), ("grun", "green"), ("rot", "red"))
        for end in ("", "e", "er", "es", "en", "em")
    },
}
_BATCH = 64
_LARGEST = 8192  # pixels of a side that an image is enlarged to


@dataclass(frozen=True)
class Drawing:
    """An ``image`` (Pillow's, RGB), what it is ("emoji" or "brown eye"), and ``remarks`` on how the text was read."""

    image: Image.Image
    what: str
    remarks: tuple[str, ...]

    def enlarged(self, size: int) -> Drawing:
        """The same, its image ``size`` pixels high and wide. UsageError for more than 8192."""
        from PIL import Image

        check_size(size)
        return replace(self, image=self.image.resize((size, size), Image.Resampling.LANCZOS))


class Drawer:
    """Draws texts; keeps its networks. ``weights_file``: of ``train text``, instead of what ships with the package.

    UsageError for an unknown device, WeightsError where weights cannot be had.
    """

    def __init__(
        self,
        weights_file: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        sequential: type[nn.Sequential] = Sequential,
    ) -> None:
        self.device = device if isinstance(device, torch.device) else choose_device(device)
        network, self.vocabulary, self.made_by = load_weights(weights_file, sequential=sequential)
        network = network.to(self.device)
        self.network = channels_last(network) if self.device.type == "cuda" else network
        freeze(self.network)
        self._samplers: dict[tuple[str, int], Sampler] = {}

    def images(self, texts: Sequence[str]) -> Tensor:
        """Emoji of texts, in [-1, 1], float32 on the CPU: (N, 3, size, size). Unknown words are left out."""
        readings = [self.vocabulary.read(text) for text in texts]
        made = [torch.zeros(0, 3, self.network.config.image_size, self.network.config.image_size)]
        with torch.inference_mode():
            for start in range(0, len(readings), _BATCH):
                rows, letters = self.vocabulary.encode(readings[start : start + _BATCH])
                made.append(self.network(rows.to(self.device), letters.to(self.device)).float().cpu())
        return torch.cat(made)

    def draw(self, text: str, seed: int = 0) -> Drawing:
        """``text`` as a drawing. ``seed`` is of eyes alone: an emoji is always the same.

        UsageError for a text without words, or of which no word is known, with known ones that look like them.
        """
        from PIL import Image

        colour, reading = self.read(text)
        made = self.images([text]) if colour is None else self._sampler(colour, seed).images(0, 1)
        what = "emoji" if colour is None else f"{colour} eye"
        return Drawing(Image.fromarray(pixels(made)[0]), what, tuple(reading.remarks()))

    def read(self, text: str) -> tuple[str | None, Reading]:
        """(colour of the eye that the text is about, or None, what else it says). UsageError as `draw`."""
        colour, rest = colour_of_eyes(text, self.vocabulary)
        if colour is not None:
            return colour, rest
        reading = self.vocabulary.read(text)
        if not reading.words:
            raise UsageError(_refusal(reading))
        return None, reading

    def _sampler(self, colour: str, seed: int) -> Sampler:
        key = colour, seed
        if key not in self._samplers:
            self._samplers = {key: Sampler("eyes", seed=seed, colours=[colour], device=str(self.device))}
        return self._samplers[key]


def colour_of_eyes(text: str, vocabulary: Vocabulary) -> tuple[str | None, Reading]:
    """The colour where a text is about eyes of one of the eight and about nothing else that is known, else None; and
    the words that are not known."""
    words = [fold(part) for word in split(text) for part in word.split("-")]
    others = [word for word in words if word not in _EYES and word not in _COLOURS]
    rest = vocabulary.read(" ".join(others))
    colours = {_COLOURS[word] for word in words if word in _COLOURS}
    about_eyes = len(colours) == 1 and not _EYES.isdisjoint(words) and not rest.words
    return (colours.pop() if about_eyes else None), rest


def _refusal(reading: Reading) -> str:
    if not reading.unknown:
        return "the text has no words: expected some like 'red heart' (--words lists those it knows)"
    return f"it knows none of the words {reading.unknown_text()}: --words lists those it knows"


def draw(
    text: str,
    *,
    seed: int = 0,
    device: str | None = None,
    weights_file: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """A Pillow image of ``text``: an emoji of 64x64, or for a text like "brown eye" an eye of 128x128.

    Words that are not known are left out, with a `CnnfastWarning` that names them. A `Drawer` keeps the networks for
    more texts. Errors are its errors.
    """
    drawing = Drawer(weights_file, device=device).draw(text, seed)
    for remark in drawing.remarks:
        warnings.warn(f"{text[:80]!r}: {remark}", CnnfastWarning, stacklevel=2)
    return drawing.image


def evaluate(
    weights_file: str | os.PathLike[str] | None = None,
    font: str | os.PathLike[str] | None = None,
    device: str | None = None,
) -> list[evaluation.Row]:
    """How well what the training did not see is drawn, as `evaluation.evaluate` says. Needs the font and the names that
    the training needs. UsageError without a font, WeightsError where names or weights cannot be had."""
    drawer = Drawer(weights_file, device=device)
    data = load_emoji(drawer.network.config.image_size, font)
    return evaluation.evaluate(data, drawer.vocabulary, drawer.images)


# --- the command ------------------------------------------------------------------------------------------------------


def add_command(commands: Any, name: str, **options: Any) -> None:
    """The task's subcommand ``name``; ``options`` are those of ``add_parser``."""
    command = commands.add_parser(name, **options)
    command.add_argument("text", nargs="*", help="words, in quotes or not")
    command.add_argument("--output", type=Path, default=Path("drawing.png"), metavar="FILE", help="(%(default)s)")
    command.add_argument("--size", type=positive, metavar="PIXELS", help="of a side (emoji 64, eyes 128)")
    command.add_argument("--seed", type=seed, default=0, help="of an eye; an emoji is always the same (%(default)s)")
    command.add_argument("--words", action="store_true", help="list the words it knows, or those that begin so")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where torch can use it)")
    command.add_argument("--weights-file", type=Path, metavar="PATH", help="text.npz of a training of yours")
    command.set_defaults(work=_work)


def _work(arguments: argparse.Namespace) -> int:
    require("draw", {"pillow": REQUIRES["pillow"]})
    text = " ".join(arguments.text)
    if arguments.words:
        return _list_words(load_weights(arguments.weights_file)[1], text)
    if arguments.size is not None:
        check_size(arguments.size)
    if not is_picture(arguments.output):
        raise UsageError(f"--output {arguments.output}: expected the name of a picture, such as drawing.png")
    drawer = Drawer(arguments.weights_file, device=arguments.device)
    drawer.read(text)  # refused before anything is written
    make_output_dir(arguments.output.parent)
    drawing = drawer.draw(text, arguments.seed)
    if arguments.size is not None:
        drawing = drawing.enlarged(arguments.size)
    save_pixels(arguments.output, np.asarray(drawing.image))
    print(f"wrote {arguments.output}: {drawing.what}, {drawing.image.width}x{drawing.image.height}")
    for remark in drawing.remarks:
        print(remark)
    return 0


def check_size(size: int) -> None:
    """UsageError for a side longer than what an image is enlarged to."""
    if size > _LARGEST:
        raise UsageError(f"--size {size}: expected at most {_LARGEST}")


def _list_words(vocabulary: Vocabulary, start: str) -> int:
    words = [word for word in vocabulary.words if word.startswith(fold(start))]
    if not words:
        raise UsageError(f"it knows no word that begins with {start!r}")
    print("\n".join(words))
    return 0
