"""``compose``: pictures made of pictures. Its parts: `styling`, `cutting`; how well they do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import cutting, stages, styling
from .cutting import Cutter
from .data import photograph
from .pictures import Picture
from .styling import Styler

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["add_command", "evaluate"]


def add_command(commands: Any, name: str, **options: Any) -> None:
    """The task's subcommand ``name`` and those below it; ``options`` are those of ``add_parser``."""
    parents = options.get("parents", [])
    parts = commands.add_parser(name, **options).add_subparsers(required=True, metavar="PART")
    styling.add_command(parts, "style", help="a picture in the style of others", parents=parents)
    cutting.add_command(parts, "cutout", help="people before another picture, or before nothing", parents=parents)


# --- figures ----------------------------------------------------------------------------------------------------------

# The person on scikit-image's photograph astronaut (512x512), her helmet included: traced by hand, to about two pixels.
# fmt: off
OUTLINE = (
    (50, 512), (42, 500), (30, 480), (23, 450), (25, 430), (20, 405), (22, 370), (25, 340), (33, 318), (42, 290),
    (46, 275), (58, 258), (72, 240), (98, 226), (115, 210), (116, 187), (122, 190), (125, 175), (135, 160), (150, 152),
    (168, 148), (186, 151), (181, 132), (172, 127), (168, 118), (160, 105), (154, 88), (153, 70), (158, 58), (170, 50),
    (188, 40), (195, 30), (208, 20), (224, 16), (240, 17), (256, 22), (272, 28), (282, 34), (292, 50), (299, 65),
    (301, 85), (298, 103), (290, 118), (278, 130), (268, 135), (262, 148), (257, 165), (256, 174), (272, 185),
    (288, 203), (300, 222), (304, 235), (315, 240), (330, 255), (342, 268), (348, 285), (356, 305), (362, 332),
    (364, 350), (380, 346), (400, 344), (420, 347), (440, 355), (460, 370), (478, 392), (490, 415), (496, 445),
    (503, 458), (512, 475), (512, 512),
)
# fmt: on
_EDGE = 8  # pixels to both sides of the outline


def evaluate(**options: Any) -> list[tuple[str, str, float, float]]:
    """(what, of which, the plain way, ours). ``options`` go to `Cutter` and `Styler`.

    Cut-outs: of an astronaut, on her own photograph and, cut out along `OUTLINE`, before two others. "overlap": of what
    is in front by more than a half with what the outline holds, intersection over union; "edge": the mean difference of
    alpha to the outline's, within 8 pixels of it. The plain way is what the network says of 256x256 pixels, enlarged.
    Styles: "style by tiles", the largest difference to the whole on the photograph coffee, by tiles of 128 pixels; the
    plain way is to style each tile by itself.
    """
    cutter = Cutter(**options)
    rows = []
    for name, image, truth in _scenes():
        pixels = np.asarray(image)
        matte = cutter.matte(Picture(pixels))
        mask = cutting.enlarged(cutter.answer(cutting.smaller(pixels, (256, 256))), truth.shape).numpy()
        found = matte.alpha(pixels)
        edge = _near(truth)
        rows.append(("overlap", name, _overlap(mask, truth), _overlap(found, truth)))
        rows.append(("edge", name, _difference(mask, truth, edge), _difference(found, truth, edge)))
    pixels = np.asarray(photograph("coffee"), np.float32)[:384, :512] / 255
    for style in ("mosaic", "starry"):
        styler = Styler(style, **options)
        whole = stages.run(styler.network, styler.numbers, pixels)
        ours = stages.run(styler.network, styler.numbers, pixels, side=128)
        plain = np.empty_like(whole)
        for top in range(0, 384, 128):
            for left in range(0, 512, 128):
                tile = np.s_[top : top + 128, left : left + 128]
                plain[tile] = stages.run(styler.network, styler.numbers, pixels[tile])
        rows.append(("style by tiles", style, float(abs(plain - whole).max()), float(abs(ours - whole).max())))
    return rows


def _scenes() -> Iterator[tuple[str, Image.Image, np.ndarray]]:
    """(name, picture, truth (H, W) from 0 to 1)."""
    from PIL import Image, ImageDraw, ImageOps

    person = photograph("astronaut")
    large = Image.new("L", (4 * person.width, 4 * person.height))
    ImageDraw.Draw(large).polygon([(4 * x, 4 * y) for x, y in OUTLINE], fill=255)
    mask = large.resize(person.size, Image.Resampling.BOX)
    yield "astronaut", person, np.asarray(mask, np.float32) / 255
    for name, size, left in (("chelsea", 400, 240), ("coffee", 480, 60)):
        image = ImageOps.fit(photograph(name), (720, 560))
        cut = mask.resize((size, size), Image.Resampling.LANCZOS)
        image.paste(person.resize((size, size), Image.Resampling.LANCZOS), (left, 560 - size), cut)
        truth = Image.new("L", image.size)
        truth.paste(cut, (left, 560 - size))
        yield f"astronaut before {name}", image, np.asarray(truth, np.float32) / 255


def _overlap(found: np.ndarray, truth: np.ndarray) -> float:
    a, b = found > 0.5, truth > 0.5
    return float((a & b).sum() / (a | b).sum())


def _difference(found: np.ndarray, truth: np.ndarray, where: np.ndarray) -> float:
    return float(np.abs(found - truth)[where].mean())


def _near(truth: np.ndarray) -> np.ndarray:
    inside = torch.from_numpy(truth > 0.5).float()[None]
    outside = torch.nn.functional.max_pool2d(1 - inside, 2 * _EDGE + 1, 1, _EDGE)
    return (torch.nn.functional.max_pool2d(inside, 2 * _EDGE + 1, 1, _EDGE) * outside)[0].numpy() > 0
