"""``python -m cnnfast gallery``: what the image tasks make, on one contact sheet.

Of noise, of texts, and of three photographs that are fetched as the figures' are. Needs Pillow and scikit-image.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import make_output_dir, write_atomically
from ..messages import UsageError
from . import repairing
from .cutting import Cutter
from .damage import draw_mask
from .data import photograph
from .drawing import Drawer
from .enhancement import Enhancer
from .machine import require
from .plots import grid
from .repairing import Repairer
from .sampling import Sampler
from .styling import Styler

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["LARGEST", "Tile", "add_command", "run", "sheet", "tiles"]

LARGEST = 300_000  # bytes of the sheet
_COLUMNS, _SIDE, _GAP, _LINE = 4, 240, 10, 18  # pixels; two lines of caption
_TEXTS = ("red heart", "cat with tears of joy", "woman pilot dark skin tone", "flag: Japan")
_QUALITIES = range(90, 40, -5)


@dataclass(frozen=True)
class Tile:
    """An ``image`` (Pillow's) and what it shows: at most two lines."""

    image: Image.Image
    caption: tuple[str, ...]


def tiles(device: str | None = None) -> Iterator[Tile]:
    """The sheet's tiles, row by row. WeightsError where weights or photographs cannot be had."""
    yield from _from_noise_and_text(device)
    yield from _enhanced(device)
    yield from _repaired_and_cut(device)
    yield from _styled(device)


def _from_noise_and_text(device: str | None) -> Iterator[Tile]:
    from PIL import Image

    faces = Sampler("faces", seed=1, device=device).images(0, 16)
    yield Tile(Image.fromarray(grid(faces, 4)), ("generate --model faces", "--count 16 --seed 1"))
    eyes = Sampler("eyes", seed=7, colours=["brown", "blue", "green"], device=device).images(0, 9)
    about = ("generate --model eyes --count 9", "--colour brown blue green --seed 7")
    yield Tile(Image.fromarray(grid(eyes, 3)), about)
    drawer = Drawer(device=device)
    for start in (0, 2):
        texts = _TEXTS[start : start + 2]
        pair = [np.asarray(drawer.draw(text).image) for text in texts]
        yield Tile(_beside(pair), tuple(f'draw "{text}"' for text in texts))


def _enhanced(device: str | None) -> Iterator[Tile]:
    from PIL import Image

    part = photograph("chelsea").crop((100, 40, 340, 280))
    small = part.resize((part.width // 4, part.height // 4), Image.Resampling.BICUBIC)
    yield Tile(_enlarged(small), ("a picture of 60x60,", "its pixels enlarged"))
    yield Tile(Enhancer(4, device=device)(small), ("enhance --scale 4", "of it"))
    buffer = io.BytesIO()
    photograph("astronaut").crop((165, 30, 285, 150)).save(buffer, "JPEG", quality=12)
    damaged = Image.open(buffer)
    yield Tile(_enlarged(damaged), ("a JPEG of quality 12,", "its pixels enlarged"))
    yield Tile(_enlarged(Enhancer(denoise=3, device=device)(damaged)), ("enhance --denoise 3", "of it"))


def _repaired_and_cut(device: str | None) -> Iterator[Tile]:
    from PIL import Image

    truth = np.array(photograph("coffee").crop((100, 20, 480, 400)))
    rng = np.random.default_rng(3)
    mask = draw_mask(rng, truth.shape[:2], "text") | draw_mask(rng, truth.shape[:2], "scratches")
    damaged = truth.copy()
    damaged[mask] = 255
    yield Tile(Image.fromarray(damaged), ("text and scratches,", "which a mask marks"))
    yield Tile(Image.fromarray(Repairer(device=device)(damaged, mask)), ("repair --mask mask.png", "of it"))
    person = photograph("astronaut")
    cut = Cutter(device=device)(person)
    yield Tile(_on_squares(cut), ("compose cutout", "people before nothing"))
    behind = photograph("coffee")
    yield Tile(Cutter(behind, device=device)(person), ("compose cutout", "--background coffee.jpg"))


def _styled(device: str | None) -> Iterator[Tile]:
    cat, person = photograph("chelsea").crop((60, 0, 360, 300)), photograph("astronaut")
    yield Tile(Styler("mosaic", device=device)(cat), ("compose style", "--style mosaic"))
    blend = {"starry": 2.0, "lace": 1.0}
    yield Tile(Styler(blend, device=device)(cat), ("compose style", "--style starry=2 --style lace"))
    yield Tile(Styler(photograph("coffee"), device=device)(cat), ("compose style", "--style coffee.jpg"))
    only = Styler("starry", only="background", device=device)(person)
    yield Tile(only, ("compose style --style starry", "--only background"))


def _enlarged(image: Image.Image) -> Image.Image:
    """To a tile's size, each pixel a square."""
    from PIL import Image

    return image.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)


def _beside(pictures: Sequence[np.ndarray]) -> Image.Image:
    """Two drawings, corner to corner, on white."""
    from PIL import Image

    h, w = pictures[0].shape[:2]
    whole = Image.new("RGB", (2 * w, 2 * h), "white")
    for k, pixels in enumerate(pictures):
        whole.paste(Image.fromarray(pixels), (k * w, k * h))
    return whole


def _on_squares(image: Image.Image) -> Image.Image:
    """A picture with alpha on the grey squares that stand for nothing."""
    from PIL import Image

    y, x = np.indices((image.height, image.width)) // 24
    squares = np.where((x + y) % 2, 205, 240).astype(np.uint8)
    behind = Image.fromarray(squares).convert("RGB")
    behind.paste(image, (0, 0), image)
    return behind


def sheet(shown: Sequence[Tile]) -> Image.Image:
    """All tiles on one picture, each its whole at the same size, under it its caption."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    rows = -(-len(shown) // _COLUMNS)
    step = _SIDE + 2 * _LINE + _GAP
    whole = Image.new("RGB", (_COLUMNS * (_SIDE + _GAP) + _GAP, rows * step + _GAP), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(14)
    for k, tile in enumerate(shown):
        left, top = _GAP + k % _COLUMNS * (_SIDE + _GAP), _GAP + k // _COLUMNS * step
        image = ImageOps.pad(tile.image.convert("RGB"), (_SIDE, _SIDE), Image.Resampling.LANCZOS, color="white")
        whole.paste(image, (left, top))
        for line, text in enumerate(tile.caption):
            while font.getlength(text) > _SIDE:
                text = text.removesuffix("...")[:-1] + "..."
            pen.text((left, top + _SIDE + line * _LINE), text, fill="black", font=font)
    return whole


def encoded(image: Image.Image, largest: int = LARGEST) -> bytes:
    """A JPEG of at most ``largest`` bytes, as good as that allows."""
    data = b""
    for quality in _QUALITIES:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= largest:
            break
    return data


def run(output: Path = Path("out/gallery.jpg"), device: str | None = None) -> int:
    """Make the sheet and write it; the exit status. UsageError for a name that is no JPEG's."""
    if output.suffix.lower() not in (".jpg", ".jpeg"):
        raise UsageError(f"--output {output}: expected the name of a JPEG, such as gallery.jpg")
    require("gallery", repairing.PACKAGES)
    make_output_dir(output.parent)
    from tqdm import tqdm

    shown = list(tqdm(tiles(device), unit=" pictures", disable=None, leave=False))
    data = encoded(sheet(shown))
    write_atomically(output, data)
    print(f"wrote {output}: {len(shown)} pictures, {len(data):,} bytes")
    return 0


def add_command(commands: Any, name: str, **options: Any) -> None:
    """The subcommand ``name``; ``options`` are those of ``add_parser``."""
    command = commands.add_parser(name, **options)
    command.add_argument(
        "--output", type=Path, default=Path("out/gallery.jpg"), metavar="FILE", help="a JPEG (%(default)s)"
    )
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where torch can use it)")
    command.set_defaults(work=_work)


def _work(arguments: argparse.Namespace) -> int:
    return run(arguments.output, arguments.device)
