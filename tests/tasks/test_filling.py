"""Filling holes: scikit-image's result where a hole is small, bounded work where it is not, any shape."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("skimage", reason="scikit-image is not installed")
from skimage.restoration import inpaint_biharmonic

from cnnfast.tasks import filling
from cnnfast.tasks.damage import KINDS, draw_mask
from cnnfast.tasks.filling import Box, bounds, depth, fill, holes


def smooth(h: int, w: int, channels: int = 3) -> np.ndarray:
    """A picture without noise, float32."""
    y, x = np.mgrid[:h, :w]
    waves = [0.5 + 0.2 * np.sin(y / (7 + c)) + 0.2 * np.cos(x / (9 + 2 * c) + y / 31) for c in range(channels)]
    return np.stack(waves, 2).astype(np.float32)


def disk(h: int, w: int, y: int, x: int, radius: int) -> np.ndarray:
    rows, columns = np.mgrid[:h, :w]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


@pytest.mark.parametrize("kind", KINDS)
def test_small_holes_are_filled_as_scikit_image_fills_them(kind: str) -> None:
    """By tiles of 192: two and a half by one and a half of them."""
    pixels = np.random.default_rng(0).random((300, 470, 3)).astype(np.float32)
    mask = draw_mask(np.random.default_rng(1), (300, 470), kind)
    expected = inpaint_biharmonic(pixels.astype(np.float64), mask, channel_axis=-1)
    assert np.abs(fill(pixels, mask) - expected).max() < 5e-3


def test_a_tile_is_filled_exactly() -> None:
    pixels, mask = np.random.default_rng(0).random((90, 90, 1)).astype(np.float32), disk(90, 90, 44, 40, 9)
    expected = inpaint_biharmonic(pixels.astype(np.float64), mask, channel_axis=-1)
    np.testing.assert_allclose(fill(pixels, mask), expected, rtol=0, atol=1e-6)


def test_what_lay_in_the_holes_does_not_matter() -> None:
    pixels, mask = smooth(80, 80), disk(80, 80, 30, 30, 20) | disk(80, 80, 60, 60, 4)
    other = pixels.copy()
    other[mask] = np.nan
    np.testing.assert_array_equal(fill(pixels, mask), fill(other, mask))
    np.testing.assert_array_equal(fill(pixels, mask)[~mask], pixels[~mask])


def test_large_holes_are_smooth_and_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole of 300x300 is 90,000 unknowns in one system; a band of 8 pixels along its rim is some 10,000, by tiles."""
    solved: list[int] = []
    real = filling.biharmonic

    def counted(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
        solved.append(int(mask.sum()))
        return real(pixels, mask)

    monkeypatch.setattr(filling, "biharmonic", counted)
    pixels, mask = smooth(400, 400), np.zeros((400, 400), bool)
    mask[50:350, 50:350] = True
    filled = fill(pixels, mask)
    assert max(solved) < 8_000 and sum(solved) < 40_000
    assert pixels.min() - 0.01 <= filled.min() and filled.max() <= pixels.max() + 0.01
    steps = max(np.abs(np.diff(filled, axis=axis)).max() for axis in (0, 1))
    assert steps < 3 * max(np.abs(np.diff(pixels, axis=axis)).max() for axis in (0, 1))


def test_a_scratch_over_a_large_picture_costs_what_the_scratch_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = filling.biharmonic

    def counted(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
        seen.append(mask.size)
        return real(pixels, mask)

    monkeypatch.setattr(filling, "biharmonic", counted)
    pixels, mask = np.full((3000, 3000, 1), 0.25, np.float32), np.zeros((3000, 3000), bool)
    line = np.arange(100, 2900)
    mask[line, line] = mask[line, line + 1] = True
    filled = fill(pixels, mask)
    assert sum(seen) < 0.2 * mask.size
    np.testing.assert_allclose(filled, pixels, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (1, 3), (2, 2), (3, 5), (10, 700), (20, 20), (33, 65)])
@pytest.mark.parametrize("known", ["corner", "edge"])
def test_pictures_of_which_little_is_known(shape: tuple[int, int], known: str) -> None:
    """A biharmonic surface through one point, or through points in a line, is not determined."""
    mask = np.ones(shape, bool)
    mask[0, : 1 if known == "corner" else None] = False
    if mask.any():
        pixels = np.full((*shape, 2), (0.25, 0.75), np.float32)
        np.testing.assert_allclose(fill(pixels, mask), pixels, atol=1e-5)


def test_everything_marked() -> None:
    with pytest.raises(ValueError, match="the mask covers everything"):
        fill(smooth(8, 8), np.ones((8, 8), bool))


@pytest.mark.parametrize(
    ("make", "deep"),
    [
        (lambda: disk(100, 100, 50, 50, 10), None),
        (lambda: disk(100, 100, 50, 50, 40), 40),
        (lambda: np.tile(np.arange(100) > 30, (10, 1)), 69),  # lower than a cell
        (lambda: np.arange(100)[:, None] * np.ones((1, 100)) > 60, 39),  # at the edge, where cells are cut
    ],
    ids=["small", "large", "low", "edge"],
)
def test_depth(make: Callable[[], np.ndarray], deep: int | None) -> None:
    found = depth(make())
    assert (None if found is None else round(found.max())) == deep


def test_boxes() -> None:
    mask = np.zeros((100, 200), bool)
    assert bounds(mask) is None and not list(holes(mask))
    mask[10:12, 20:25] = mask[60, 90] = mask[99, 199] = True
    assert bounds(mask) == Box(10, 100, 20, 200)
    assert list(holes(mask, 64)) == [Box(10, 12, 20, 25), Box(60, 61, 90, 91), Box(99, 100, 199, 200)]
    box = Box(60, 61, 90, 91).grown(13, mask.shape, 8)
    assert box == Box(40, 74, 72, 104) and Box(60, 61, 90, 91).within(box) == (slice(20, 21), slice(18, 19))
