"""Pixels made to fit others: their size, dtype, proportions, colour profile. Arrays (H, W, C) as of `Picture`."""

from __future__ import annotations

import io

import numpy as np

from .pictures import Picture, spread_colours
from .tiles import white

__all__ = ["as_dtype", "covering", "in_8_bits", "in_profile", "on_white", "preview", "resized"]


def resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels (H, W, C) as ``size`` (height, width), bicubic, with a low-pass where they become fewer; channel by
    channel, for Pillow has no others but of 8 bits."""
    from PIL import Image

    result = np.empty((*size, pixels.shape[2]), pixels.dtype)
    for c in range(pixels.shape[2]):
        channel = Image.fromarray(pixels[..., c].astype(np.float32))
        values = np.asarray(channel.resize(size[::-1], Image.Resampling.BICUBIC)).clip(0, white(pixels.dtype))
        result[..., c] = values if pixels.dtype.kind == "f" else values.round()
    return result


def as_dtype(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The same picture in another of the dtypes that `Picture` has, or in floats from 0 to 1."""
    if pixels.dtype == dtype:
        return pixels
    if pixels.dtype == np.uint8 and dtype == np.uint16:
        return pixels.astype(np.uint16) * np.uint16(257)
    values = pixels.astype(np.float32) / np.float32(white(pixels.dtype))
    if dtype.kind == "f":
        return values.astype(dtype)
    return (values.clip(0, 1) * np.float32(white(dtype))).round().astype(dtype)


def in_8_bits(colours: np.ndarray) -> np.ndarray:
    """In uint8, for networks, which see no more."""
    if colours.dtype == np.uint16:
        return (colours >> 8).astype(np.uint8)
    return colours if colours.dtype == np.uint8 else (colours.clip(0, 1) * 255).round().astype(np.uint8)


def covering(background: Picture, pixels: np.ndarray) -> np.ndarray:
    """The background as large as ``pixels`` (H, W, C) and of their dtype: the largest part of its middle that has their
    proportions."""
    h, w = pixels.shape[:2]
    given = background.pixels
    if given.shape[:2] == (1, 1):
        return np.broadcast_to(as_dtype(given, pixels.dtype), (h, w, given.shape[2]))
    scale = max(h / given.shape[0], w / given.shape[1])
    cut = tuple(min(n, max(1, round(m / scale))) for n, m in zip(given.shape, (h, w), strict=False))
    top, left = (given.shape[0] - cut[0]) // 2, (given.shape[1] - cut[1]) // 2
    part = given[top : top + cut[0], left : left + cut[1]]
    colours = part.shape[2] - (part.shape[2] in (2, 4))
    if colours < part.shape[2]:  # or hidden colours would come in at the rim
        part = part.copy()
        part[..., :colours] = spread_colours(part[..., :colours], part[..., colours:])
    return as_dtype(part if cut == (h, w) else resized(part, (h, w)), pixels.dtype)


def on_white(picture: Picture) -> Picture:
    """A picture without transparency: what is not seen of it is white."""
    if picture.alpha is None:
        return picture
    top = np.float32(white(picture.pixels.dtype))
    part = picture.alpha.astype(np.float32) / top
    laid = picture.colours * part + top * (1 - part)
    if picture.pixels.dtype.kind != "f":
        laid = laid.round()
    return Picture(laid.astype(picture.pixels.dtype), picture.info)


def in_profile(picture: Picture, profile: bytes | None) -> Picture:
    """A picture's colours as another profile (None: sRGB) says them; left as they are where that is not known: those
    of 16 bits, greys, and profiles of other spaces."""
    from PIL import Image, ImageCms

    own = picture.info.get("icc_profile")
    if own == profile or picture.pixels.dtype != np.uint8 or picture.colours.shape[2] != 3:
        return picture
    ends = [ImageCms.createProfile("sRGB") if p is None else io.BytesIO(p) for p in (own, profile)]
    image = Image.fromarray(np.ascontiguousarray(picture.colours))
    try:
        converted = np.asarray(ImageCms.profileToProfile(image, ends[0], ends[1], outputMode="RGB"))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return picture
    pixels = converted if picture.alpha is None else np.concatenate([converted, picture.alpha], 2)
    return Picture(pixels, {**picture.info, "icc_profile": profile})


def preview(picture: Picture, longest: int) -> Picture:
    """A picture to look at: of 8 bits, its longer side ``longest`` pixels at most."""
    h, w = picture.pixels.shape[:2]
    scale = min(1.0, longest / max(h, w))
    shown = in_8_bits(picture.pixels)
    if scale < 1:
        shown = resized(shown, (max(1, round(h * scale)), max(1, round(w * scale))))
    return Picture(shown, picture.info)
