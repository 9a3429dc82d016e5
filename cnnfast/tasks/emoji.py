"""Emoji and their names: pictures of a font, texts of a package, and which of them a training never sees.

Pictures are rendered with Pillow from Noto Color Emoji (Debian's fonts-noto-color-emoji, SIL OFL 1.1), 128x128 and then
averaged to the size asked for, on white. Names are those of the package ``emoji`` (BSD): English ones with their
aliases, and German ones. Only training and evaluation need either.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..fetch import PipRunner, WheelFile, fetch, run_pip
from ..messages import LOGGER, CnnfastError, UsageError, one_line

__all__ = ["FONT_SHA256", "SPLITS", "Emoji", "EmojiSet", "find_font", "load_emoji"]

# Where systems put the font (Debian and Ubuntu, Arch, Fedora, macOS by hand).
_FONTS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji-fonts/NotoColorEmoji.ttf",
    "~/Library/Fonts/NotoColorEmoji.ttf",
    "~/.local/share/fonts/NotoColorEmoji.ttf",
)
_GET_FONT = "install fonts-noto-color-emoji (Debian: apt-get install fonts-noto-color-emoji), or pass --font FILE"
# Of version 2.042, which the shipped weights were trained on; others have other pictures.
FONT_SHA256 = "e5899ed38b8ed83e08bd3ac5de09791e9d19d288333a796de1d35ad17396f1ec"
_BITMAP_SIZE = 109  # the one size that the font's bitmaps have, 136x128 pixels, the outer 4 columns empty

_PACKAGE = {
    "package": "emoji",
    "version": "2.16.0",
    "wheel": "emoji-2.16.0-py3-none-any.whl",
    "wheel_sha256": "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330",
    "wheel_size": 610912,
}
_NAMES = WheelFile(
    member="emoji/unicode_codes/emoji.json",
    sha256="68d0dc4ac61ccb49c1335809ffb963bcca0fdb4a7e04278ff597125a2b043122",
    size=531550,
    **_PACKAGE,  # type: ignore[arg-type]
)
_GERMAN_NAMES = WheelFile(
    member="emoji/unicode_codes/emoji_de.json",
    sha256="bdf48ceaa1f0692ee7744e5357a37e6a0aae035dd816c507691bd948101095c5",
    size=288501,
    **_PACKAGE,  # type: ignore[arg-type]
)
_OTHERWISE = "and do this again"
_FULLY_QUALIFIED = 2  # the package's ``status`` of an emoji that is no variant of another

_VARIATION = "\ufe0f"  # stands where no skin tone does
_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"

# What is kept from the training: a part of the pictures that it is about, chosen once for all (no option, no seed).
SPLITS = ("skin tones", "tone pairs", "gender x role")
_HELD_OUT = 0.12
_HELD_OUT_ROLES = 16


@dataclass(frozen=True)
class Emoji:
    """One picture: its ``character``, the same without skin ``tones``, and its names (English, aliases, German)."""

    character: str
    base: str
    tones: int
    english: str
    aliases: tuple[str, ...]
    german: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.english, *self.aliases, self.german)


@dataclass(frozen=True)
class EmojiSet:
    """``images`` uint8 (N, 3, size, size) of ``emoji``; ``held_out``: indices by the names of `SPLITS`; ``train``: the
    others."""

    emoji: tuple[Emoji, ...]
    images: Tensor
    train: tuple[int, ...]
    held_out: Mapping[str, tuple[int, ...]]

    def weights(self) -> Tensor:
        """How often the pictures of ``train`` should be seen: n of one base, in n skin tones, count as sqrt(n)."""
        count = Counter(self.emoji[i].base for i in self.train)
        return torch.tensor([count[self.emoji[i].base] ** -0.5 for i in self.train], dtype=torch.float64)


def find_font(font: str | os.PathLike[str] | None) -> Path:
    """``font``, or Noto Color Emoji where systems keep it. UsageError where there is none."""
    if font is not None:
        if not os.path.isfile(font):
            raise UsageError(f"--font {font} is not a file: {_GET_FONT}")
        return Path(font)
    found = next((path for path in (Path(f).expanduser() for f in _FONTS) if path.is_file()), None)
    if found is None:
        raise UsageError(f"Noto Color Emoji is not installed: {_GET_FONT}")
    return found


def load_emoji(size: int, font: str | os.PathLike[str] | None = None, runner: PipRunner = run_pip) -> EmojiSet:
    """Every emoji that the font shows as one picture, at ``size`` pixels (a divisor of 128).

    UsageError without a font, CnnfastError for one that Pillow cannot render, WeightsError where the names cannot be
    had. Needs Pillow with Raqm, which its wheels have.
    """
    if size < 1 or 128 % size:
        raise UsageError(f"size={size}: expected a divisor of 128")
    path = find_font(font)
    names, german = (json.loads(fetch(file, runner, _OTHERWISE)) for file in (_NAMES, _GERMAN_NAMES))
    characters = [c for c, entry in names.items() if entry["status"] == _FULLY_QUALIFIED]
    pictures = _render(path, characters, size)
    emoji = tuple(_emoji(c, names[c], german[c]) for c in pictures)
    held_out = _hold_out(emoji)
    kept = {i for indices in held_out.values() for i in indices}
    train = tuple(i for i in range(len(emoji)) if i not in kept)
    return EmojiSet(emoji, torch.from_numpy(np.stack(list(pictures.values()))), train, held_out)


def _emoji(character: str, entry: Mapping[str, Any], german: str) -> Emoji:
    base = "".join(c for c in character if c not in _TONES and c != _VARIATION)
    tones = sum(c in _TONES for c in character)
    # Of "+1" and "-1" nothing is left that tells them apart.
    aliases = tuple(_name(a) for a in entry.get("alias", ()) if re.search("[A-Za-z]", a))
    return Emoji(character, base, tones, _name(entry["en"]), aliases, _name(german))


def _name(name: str) -> str:
    """ ":keycap_#:" -> "keycap hash"; the German "Lehrer(in)", of either gender, -> "person Lehrer"."""
    text = name.strip(":").replace("_", " ").replace("*", " asterisk ").replace("#", " hash ")
    return re.sub(r"([\w-]+)\((?:in|r|e)\)", r"person \1", text)


def _render(path: Path, characters: Sequence[str], size: int) -> dict[str, np.ndarray]:
    """uint8 (3, size, size) of the characters that are one picture in the font."""
    from PIL import Image, ImageDraw, ImageFont, features

    if not features.check("raqm"):
        raise CnnfastError("this Pillow has no Raqm, without which it cannot compose emoji: its wheels on PyPI have it")
    try:
        data = path.read_bytes()
        font = ImageFont.truetype(str(path), _BITMAP_SIZE, layout_engine=ImageFont.Layout.RAQM)
        width = font.getlength("\U0001f600")
    except OSError as error:
        raise CnnfastError(f"--font {path} cannot be used: {one_line(error)}; {_GET_FONT}") from error
    if hashlib.sha256(data).hexdigest() != FONT_SHA256:
        LOGGER.warning("%s is not version 2.042, of which the shipped weights are: other pictures", path)
    pictures = {}
    for character in characters:
        if font.getlength(character) != width:  # several pictures: this font does not have the whole
            continue
        canvas = Image.new("RGBA", (136, 128), (255, 255, 255, 0))
        ImageDraw.Draw(canvas).text((0, 0), character, font=font, embedded_color=True)
        pixels = np.asarray(canvas)[:, 4:132].astype(np.float64)
        alpha = pixels[..., 3:] / 255
        if not alpha.any():
            continue
        on_white = pixels[..., :3] * alpha + 255 * (1 - alpha)
        factor = 128 // size
        small = on_white.reshape(size, factor, size, factor, 3).mean((1, 3))
        pictures[character] = small.round().astype(np.uint8).transpose(2, 0, 1)
    if len(pictures) < 100:
        raise CnnfastError(f"{path} shows {len(pictures)} of {len(characters)} emoji: it is another font; {_GET_FONT}")
    return pictures


def _hold_out(emoji: Sequence[Emoji]) -> dict[str, tuple[int, ...]]:
    """The splits. Of a gender x role everything is held out, in all skin tones, and the other gender stays; of a person
    at most two of the five skin tones; of two people some pairs of tones."""
    order = np.random.default_rng(1)
    roles: dict[str, dict[str, str]] = defaultdict(dict)
    for e in emoji:
        found = re.fullmatch("(man|woman) (.+)", e.english)
        if found and not e.tones:
            roles[found[2]][found[1]] = e.base
    both = sorted(role for role, bases in roles.items() if len(bases) == 2)
    chosen = order.permutation(both)[:_HELD_OUT_ROLES]
    bases = {roles[role]["man" if n % 2 == 0 else "woman"] for n, role in enumerate(chosen)}

    single = [i for i, e in enumerate(emoji) if e.tones == 1 and e.base not in bases]
    tones: list[int] = []
    seen: Counter[str] = Counter()
    for i in order.permutation(single).tolist():
        if len(tones) < _HELD_OUT * len(single) and seen[emoji[i].base] < 2:
            seen[emoji[i].base] += 1
            tones.append(i)
    pairs = order.permutation([i for i, e in enumerate(emoji) if e.tones == 2]).tolist()
    splits = tones, pairs[: int(_HELD_OUT * len(pairs))], [i for i, e in enumerate(emoji) if e.base in bases]
    return {name: tuple(sorted(indices)) for name, indices in zip(SPLITS, splits, strict=True)}
