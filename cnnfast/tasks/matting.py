"""From a coarse mask to a cut-out: how much of each pixel belongs to it, and of what colour that part is.

All that needs surroundings is computed on a smaller picture; at the full size every pixel stands by itself, so that
pictures of any size take rows of memory only. The mask follows the picture's edges by a guided filter (He, Sun and
Tang, "Guided Image Filtering", 2013, and "Fast Guided Filter", 2015); colours at soft edges, which hold some of the old
background, are parted as in "Approximate Fast Foreground Colour Estimation" (Forte, 2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .tiles import white

__all__ = ["Matte", "composed", "matte_of"]

_RADIUS, _EPS = 1 / 64, 1e-5  # of the guided filter: of the longer side; of the squared contrast that is kept
_STEEP = 2.0  # by which the filter's soft edges are sharpened
_FAR, _NEAR = 1 / 11, 1 / 170  # radii of the means of colours, of the longer side
_TINY = 1e-5
_PIXELS = 2**18  # of the rows that are worked on at once


@dataclass(frozen=True)
class Matte:
    """What makes alpha and colours of any rows of a picture of ``size`` (height, width).

    ``maps`` (10, h, w) float32, at the smaller size: three factors and a summand, which make alpha of a pixel's
    colours, and the mean colours in front and behind.
    """

    maps: Tensor
    size: tuple[int, int]

    def rows(self, colours: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        """(colours of the part in front (n, W, 3), alpha (n, W, 1)), floats in [0, 1], of the rows from ``first`` on,
        whose ``colours`` are (n, W, 1 or 3) in [0, 1]. Where alpha is 1 the colours are those given, to the bit."""
        maps = self._enlarged(first, first + colours.shape[0]).astype(colours.dtype, copy=False)
        factors, summand, front, behind = maps[..., :3], maps[..., 3:4], maps[..., 4:7], maps[..., 7:]
        colours = np.broadcast_to(colours, (*colours.shape[:2], 3))
        alpha = _steep((factors * colours).sum(2, keepdims=True) + summand)
        rest = colours - alpha * front - (1 - alpha) * behind
        return np.where(alpha == 1, colours, (front + alpha * rest).clip(0, 1)), alpha

    def alpha(self, colours: np.ndarray) -> np.ndarray:
        """Float32 (H, W) of a whole picture (H, W, 1 or 3), uint8, uint16 or floats from 0 to 1."""
        result = np.empty(self.size, np.float32)
        for rows in _strips(self.size):
            result[rows] = self.rows(_floats(colours[rows]), rows.start)[1][..., 0]
        return result

    def _enlarged(self, first: int, last: int) -> np.ndarray:
        """Those rows of ``maps`` at the full size, bilinear: float32 (last - first, W, 10)."""
        h = self.maps.shape[1]
        at = ((torch.arange(first, last) + 0.5) * (h / self.size[0]) - 0.5).clamp(0, h - 1)
        upper = at.floor().long()
        part = (at - upper)[:, None]
        lines = torch.lerp(self.maps[:, upper], self.maps[:, (upper + 1).clamp(max=h - 1)], part)
        lines = F.interpolate(lines[None], (last - first, self.size[1]), mode="bilinear")
        return lines[0].permute(1, 2, 0).numpy()


def matte_of(small: Tensor, mask: Tensor, size: tuple[int, int]) -> Matte:
    """Of a picture of ``size`` (height, width), given it smaller, ``small`` (3, h, w) in [0, 1], and a mask (h, w)."""
    longer = max(small.shape[1:])
    filtered = _guided(small, mask, max(1, round(longer * _RADIUS)), _EPS)
    alpha = _steep((filtered[:3] * small).sum(0, keepdim=True) + filtered[3:])
    front = behind = small
    for radius in (_FAR, _NEAR):
        r = max(1, round(longer * radius))
        known = _mean(alpha, r)
        front = _mean(front * alpha, r) / (known + _TINY)
        behind = _mean(behind * (1 - alpha), r) / (1 - known + _TINY)
        if radius == _FAR:
            front = (front + alpha * (small - alpha * front - (1 - alpha) * behind)).clamp(0, 1)
    return Matte(torch.cat([filtered, front, behind]), size)


def composed(
    pixels: np.ndarray, matte: Matte, behind: np.ndarray | None = None, front: np.ndarray | None = None
) -> np.ndarray:
    """A picture's cut-out before ``behind``, or before nothing: pixels (H, W, C) as of `pictures.Picture`, of the dtype
    of ``pixels``, with alpha where one of both lets something through.

    ``behind`` has the size and the dtype of ``pixels``, the number of channels need not be the same. ``front`` (H, W, 1
    or 3): other colours than the picture's. Transparency of ``pixels`` counts. Pixels wholly in front or behind are
    those of the picture to the bit.
    """
    h, w, c = pixels.shape
    own, b = c in (2, 4), 0 if behind is None else behind.shape[2]
    alphas = behind is None or b in (2, 4)
    grey = c - own == 1 and b - (b in (2, 4)) <= 1 and (front is None or front.shape[2] == 1)
    result = np.empty((h, w, (1 if grey else 3) + alphas), pixels.dtype)
    for rows in _strips((h, w)):
        given = _floats(pixels[rows])
        colours, alpha = matte.rows(given[..., : c - own], rows.start)
        if front is not None:
            colours = np.broadcast_to(_floats(front[rows]), colours.shape)
        if own:
            alpha = alpha * given[..., -1:]
        if behind is not None:
            other = _floats(behind[rows])
            left = (1 - alpha) * (other[..., -1:] if alphas else 1)
            total = alpha + left
            colours = (alpha * colours + left * other[..., : b - (b in (2, 4))]) / np.maximum(total, _TINY)
            alpha = total
        if grey:
            colours = colours.mean(2, keepdims=True, dtype=np.float64)
        values = np.concatenate([colours, alpha], 2) if alphas else colours
        values = values.clip(0, 1) * white(pixels.dtype)
        result[rows] = values if pixels.dtype.kind == "f" else values.round()
    return result


def _strips(size: tuple[int, int]) -> Iterator[slice]:
    step = max(1, _PIXELS // size[1])
    yield from (slice(first, min(first + step, size[0])) for first in range(0, size[0], step))


def _floats(pixels: np.ndarray) -> np.ndarray:
    """In [0, 1], in float32 where they are not in float64."""
    values: np.ndarray = pixels.astype(np.float64 if pixels.dtype == np.float64 else np.float32)
    return values / values.dtype.type(white(pixels.dtype))


def _steep(alpha):  # type: ignore[no-untyped-def]
    return ((alpha - 0.5) * _STEEP + 0.5).clip(0, 1)


def _mean(x: Tensor, radius: int) -> Tensor:
    """Of (C, h, w), over the square of this radius around each pixel, as far as it lies within; by sums from the
    edges, in double precision."""
    for dim in (1, 2):
        n = x.shape[dim]
        at = torch.arange(n)
        first, last = (at - radius).clamp(min=0), (at + radius).clamp(max=n - 1)
        count = (last - first + 1).view(-1, *[1] * (2 - dim))
        lines = []
        for channel in x:  # one by one: the sums are large
            sums = F.pad(channel.cumsum(dim - 1, dtype=torch.float64), (0, 0, 1, 0) if dim == 1 else (1, 0))
            part = sums.index_select(dim - 1, last + 1) - sums.index_select(dim - 1, first)
            lines.append((part / count).to(x.dtype))
        x = torch.stack(lines)
    return x


def _guided(image: Tensor, mask: Tensor, radius: int, eps: float) -> Tensor:
    """Three factors and a summand (4, h, w) that make the mask of the picture's colours, the best around each pixel."""
    pairs = torch.stack([image[i] * image[j] for i in range(3) for j in range(3)])
    means = _mean(torch.cat([image, mask[None], image * mask, pairs]), radius)
    of_image, of_mask, of_both, of_pairs = means[:3], means[3:4], means[4:7], means[7:]
    covariance = of_both - of_image * of_mask
    variance = of_pairs.unflatten(0, (3, 3)) - of_image[:, None] * of_image[None]
    matrix = variance.permute(2, 3, 0, 1) + eps * torch.eye(3)
    factors = torch.linalg.solve(matrix, covariance.permute(1, 2, 0)).permute(2, 0, 1)
    summand = of_mask - (factors * of_image).sum(0, keepdim=True)
    return _mean(torch.cat([factors, summand]), radius)
