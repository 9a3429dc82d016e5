"""Masks to learn from and to measure on: scratches, round holes, text. Needs Pillow, imported where it is used."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["KINDS", "draw_mask"]

KINDS = ("scratches", "holes", "text")

_AREA = 64 * 64  # pixels on which as much is drawn as the functions below say


def draw_mask(rng: np.random.Generator, size: tuple[int, int], kind: str, dense: int = 1) -> np.ndarray:
    """Bool (H, W), True inside: ``kind`` is one of `KINDS`, or "mixed": scratches and holes. A few percent of the
    pixels, at least one; about ``dense`` times as much.

    Scratches are bent lines, 1 to 4 pixels wide; holes are ellipses with half axes of 2 to 9, some larger; text has
    letters 10 to 32 pixels high. The letters are Pillow's own, and change with its version.
    """
    from PIL import Image, ImageDraw

    h, w = size
    image = Image.new("L", (w, h))
    draw = ImageDraw.Draw(image)
    many, few = (dense * max(1, h * w // _AREA // part) for part in (2, 3))
    if kind in ("scratches", "mixed"):
        for _ in range(rng.integers(1, 4) * many):
            _scratch(draw, rng, h, w)
    if kind in ("holes", "mixed"):
        for _ in range(rng.integers(1, 3) * many):
            _hole(draw, rng, h, w)
    if kind == "text":
        for _ in range(rng.integers(1, 3) * few):
            _text(draw, rng, h, w)
    mask = np.array(image) > 127
    if not mask.any():  # all of it fell outside
        mask[h // 2, w // 2] = True
    return mask


def _scratch(draw: object, rng: np.random.Generator, h: int, w: int) -> None:
    y, x, direction = rng.uniform(0, h), rng.uniform(0, w), rng.uniform(0, 2 * math.pi)
    points = [(x, y)]
    for _ in range(rng.integers(2, 5)):
        length, direction = rng.uniform(8, 30), direction + rng.normal(0, 0.5)
        y, x = y + length * math.sin(direction), x + length * math.cos(direction)
        points.append((x, y))
    draw.line(points, fill=255, width=int(rng.integers(1, 5)))  # type: ignore[attr-defined]


def _hole(draw: object, rng: np.random.Generator, h: int, w: int) -> None:
    y, x = rng.uniform(0, h), rng.uniform(0, w)
    a, b = rng.uniform(2, 9, 2) * (1.6 if rng.random() < 0.15 else 1)
    draw.ellipse((x - a, y - b, x + a, y + b), fill=255)  # type: ignore[attr-defined]


def _text(draw: object, rng: np.random.Generator, h: int, w: int) -> None:
    from PIL import ImageFont

    font = ImageFont.load_default(int(rng.integers(10, 33)))
    text = "".join(map(chr, rng.integers(33, 127, rng.integers(2, 8))))
    place = rng.uniform(-10, w - 10), rng.uniform(-5, h - 10)
    draw.text(place, text, fill=255, font=font, stroke_width=int(rng.integers(0, 2)))  # type: ignore[attr-defined]
