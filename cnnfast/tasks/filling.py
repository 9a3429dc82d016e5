"""Holes filled smoothly from what lies around them: biharmonic functions (scikit-image), in bounded time and memory.

Holes are solved by tiles with a margin of their surroundings. Deep inside a large hole a solution is smooth, and far
from cheap: there the values of a picture of half the size are taken, filled likewise, so that what is left to solve is
a band along the rim. So the time is that of the holes' rims, whatever their width. A small hole is solved as
`skimage.restoration.inpaint_biharmonic` solves it by itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["Box", "biharmonic", "depth", "fill", "holes"]

SIDE = 192  # of a tile
_MARGIN = 32  # around it, for the filling
_CELL = 16  # a square of this side that lies within a hole is what makes it a large one
_BAND = 8  # pixels along the rim that are solved in a large hole


@dataclass(frozen=True)
class Box:
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right``."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def grown(self, margin: int, size: tuple[int, ...], multiple: int = 1) -> Box:
        """With ``margin`` on each side, as far as a picture (H, W) goes; begins at multiples of ``multiple``."""
        top, left = (max(n - margin, 0) // multiple * multiple for n in (self.top, self.left))
        return Box(top, min(self.bottom + margin, size[0]), left, min(self.right + margin, size[1]))

    def within(self, other: Box) -> tuple[slice, slice]:
        """This box's slices of what ``other``, in which it lies, cuts out."""
        top, left = other.top, other.left
        return slice(self.top - top, self.bottom - top), slice(self.left - left, self.right - left)


def bounds(mask: np.ndarray) -> Box | None:
    """The smallest box around what is True in (H, W), None where nothing is."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return Box(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1) if rows.size else None


def holes(mask: np.ndarray, side: int = SIDE) -> Iterator[Box]:
    """Of every square of ``side`` pixels that has holes in it, the smallest box around them."""
    for top in range(0, mask.shape[0], side):
        for left in range(0, mask.shape[1], side):
            found = bounds(mask[top : top + side, left : left + side])
            if found is not None:
                yield Box(found.top + top, found.bottom + top, found.left + left, found.right + left)


def biharmonic(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``pixels`` (H, W, C) with what ``mask`` (H, W) marks filled, float64; values stay between those around.

    Not finite where fewer than three points, not in a line, are known. In float64: the system of a hole that is 20
    pixels wide loses five digits.
    """
    from scipy.sparse.linalg import MatrixRankWarning
    from skimage.restoration import inpaint_biharmonic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MatrixRankWarning)  # the result tells
        return inpaint_biharmonic(pixels.astype(np.float64), mask, channel_axis=-1)


def depth(mask: np.ndarray) -> np.ndarray | None:
    """How far each pixel of a hole (H, W) is from the nearest known one, float64; None where all holes are small ones,
    narrower than about twice `_CELL`. ValueError where nothing is known."""
    if mask.all():
        raise ValueError("the mask covers everything: there is nothing to fill it from")
    cells = np.pad(mask, [(0, -n % _CELL) for n in mask.shape], constant_values=True)
    h, w = (n // _CELL for n in cells.shape)
    if not cells.reshape(h, _CELL, w, _CELL).all((1, 3)).any():
        return None
    from scipy.ndimage import distance_transform_edt

    return distance_transform_edt(mask)


def fill(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of ``pixels`` (H, W, C), float32, in which what ``mask`` (H, W) marks is filled from the rest; what was
    there does not matter. ValueError where the mask covers everything."""
    filled, unknown = pixels.copy(), mask
    filled[mask] = 0  # what was there may not be finite
    far = depth(mask)
    coarse = None
    if far is not None and far.max() > _CELL:
        deep = far > _BAND
        coarse = _from_half(filled, mask)
        filled[deep] = coarse[deep]
        unknown = mask & ~deep
    for box in holes(unknown):
        window = box.grown(_MARGIN, mask.shape)
        inside = unknown[box.slices]
        solved = biharmonic(filled[window.slices], unknown[window.slices])[box.within(window)]
        if not np.isfinite(solved[inside]).all():
            coarse = _from_half(filled, unknown) if coarse is None else coarse
            solved = coarse[box.slices]
        filled[box.slices][inside] = solved[inside]
    return filled


def _from_half(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What `fill` makes of a picture of half the size, enlarged. A pixel of that is the mean of the known ones among
    four, and a hole where there are none."""
    h, w, c = pixels.shape
    ends = ((0, h % 2), (0, w % 2))
    known = np.pad((~mask).astype(np.float32), ends)[..., None]
    values = np.pad(pixels, (*ends, (0, 0))) * known
    total, count = (a.reshape(a.shape[0] // 2, 2, a.shape[1] // 2, 2, -1).sum((1, 3)) for a in (values, known))
    small = fill(total / np.maximum(count, 1), count[..., 0] == 0)
    return _twice(_twice(small, 0)[:h], 1)[:, :w]


def _twice(a: np.ndarray, axis: int) -> np.ndarray:
    """Twice as long along ``axis``, linearly interpolated between the centres of pixels."""
    a = np.moveaxis(a, axis, 0)
    before, after = np.concatenate([a[:1], a[:-1]]), np.concatenate([a[1:], a[-1:]])
    result = np.empty((2 * len(a), *a.shape[1:]), a.dtype)
    result[0::2], result[1::2] = 0.75 * a + 0.25 * before, 0.75 * a + 0.25 * after
    return np.moveaxis(result, 0, axis)
