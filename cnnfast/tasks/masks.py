"""Which pixels a person's mask marks, and whether it fits the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..messages import UsageError
from . import pictures
from .machine import require
from .pictures import Picture
from .tiles import white

__all__ = ["marked", "mask_for", "painted"]

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601


def mask_for(picture: Picture, mask: Any, grow: int = 0) -> np.ndarray:
    """What ``mask`` marks of ``picture``: bool (H, W), grown by ``grow`` pixels on each side.

    ``mask``: a `Picture`, a picture of Pillow's, or an array (H, W) or (H, W, 1 to 4) of bool, uint8, uint16 or floats
    from 0 to 1. A pixel is marked where its brightness times its opacity is half of white or more. A mask of the size
    that the picture had before it was turned as its EXIF says is turned likewise. UsageError for another size, and
    where nothing or everything is marked.
    """
    found = marked(mask)
    h, w = picture.pixels.shape[:2]
    if found.shape == (w, h) and h != w and picture.orientation in (5, 6, 7, 8):
        found = pictures.turned(found, picture.orientation)
    if found.shape != (h, w):
        size = f"{found.shape[1]}x{found.shape[0]}"
        raise UsageError(f"the mask is {size} pixels, the picture {w}x{h}: they have to be of one size")
    if not found.any():
        raise UsageError("the mask marks nothing: white is what is repaired")
    if grow:
        from scipy.ndimage import maximum_filter

        found = maximum_filter(found, 2 * grow + 1, mode="constant")
    if found.all():
        raise UsageError("the mask marks the whole picture: white is what is repaired, out of what is black around it")
    return found


def marked(mask: Any) -> np.ndarray:
    """Bool (H, W), as `mask_for` says."""
    if isinstance(mask, np.ndarray):
        if mask.ndim not in (2, 3) or (mask.ndim == 3 and not 1 <= mask.shape[2] <= 4):
            raise UsageError(f"expected a mask (H, W) or (H, W, 1 to 4), got {mask.shape}")
        if mask.dtype == bool:
            mask = mask.astype(np.uint8) * np.uint8(255)
        elif mask.dtype not in (np.uint8, np.uint16) and mask.dtype.kind != "f":
            raise UsageError(f"expected a mask of bool, uint8, uint16 or floats from 0 to 1, got {mask.dtype}")
        elif mask.dtype.kind == "f" and not (mask.min(initial=0) >= 0 and mask.max(initial=0) <= 1):  # NaN too
            raise UsageError("a mask of floats has values from 0 to 1; this one has others")
        picture = Picture(mask[..., None] if mask.ndim == 2 else mask)
    elif isinstance(mask, Picture):
        picture = mask
    else:
        require("repair", {"pillow": "PIL"})
        picture = pictures.from_pil(mask)
    largest = np.float32(white(picture.pixels.dtype))
    values = picture.colours / largest
    brightness = values @ np.array(_LUMA, np.float32) if values.shape[2] == 3 else values[..., 0]
    if picture.alpha is not None:
        brightness = brightness * (picture.alpha[..., 0] / largest)
    return brightness >= 0.5


def painted(layers: Sequence[Any], size: tuple[int, ...]) -> np.ndarray:
    """What was painted on a picture of ``size`` (height, width, ...): bool (H, W), where one of the ``layers``
    (pictures of Pillow's, painted on it at any size) is opaque by a half or more, whatever the colour."""
    from PIL import Image

    found = np.zeros(size[:2], bool)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A").resize(size[1::-1], Image.Resampling.NEAREST)
        found |= np.asarray(alpha) >= 128
    return found
