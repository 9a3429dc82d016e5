"""Pictures as people bring them -> 8-bit RGB as people see them. Needs Pillow, imported where it is used."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ..messages import CnnfastError, one_line

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageError", "read_rgb"]


_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF


class ImageError(CnnfastError):
    """A picture that is not read; the message is what follows its name."""


def read_rgb(file: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """The picture in ``file``, in mode RGB with 8 bits a channel.

    - Turned and mirrored as its EXIF orientation says; colour profiles are not applied.
    - 16-bit grey is scaled (65535 is white); 32-bit integers and floats are refused, for what is white in them is not
      said in the file.
    - Transparency (of alpha channels, palettes and a key colour) is laid on white.
    - Of an animation, and of a file of several pages or pictures, the first. Photographs of telephones are such files.
    - CMYK, inverted in Adobe's JPEGs, by Pillow's arithmetic.

    ImageError for a file that is no picture, damaged or cut off, and, before it is decoded, for more pixels than Pillow
    takes for safe (``PIL.Image.MAX_IMAGE_PIXELS``).
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data, which says nothing then
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                ends = _black_and_white(picture)  # of the file: what is turned knows its format no more
                upright = ImageOps.exif_transpose(picture)
                return _rgb(upright) if ends is None else _grey(upright, *ends)
    except ImageError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million"
        raise ImageError(f"has more than {limit} pixels and is not decoded: make it smaller first") from error
    except Exception as error:  # a damaged file fails in any way
        raise ImageError(f"cannot be read: {one_line(error)}") from error


def _rgb(picture: Image.Image) -> Image.Image:
    from PIL import Image

    if picture.mode in ("I", "F"):
        kind = "32-bit integers" if picture.mode == "I" else "floating-point numbers"
        raise ImageError(f"has {kind}, of which it is not known what is white: save it with 8 or 16 bits")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _black_and_white(picture: Image.Image) -> tuple[int, int] | None:
    """The values of black and white where the picture is grey of 16 bits (or 12, in a TIFF), else None."""
    if not (picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))):
        return None
    tags = getattr(picture, "tag_v2", {})
    largest = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    return (largest, 0) if tags.get(_PHOTOMETRIC) == 0 else (0, largest)


def _grey(picture: Image.Image, black: int, white: int) -> Image.Image:
    """Pillow's own conversion would clip at 255."""
    from PIL import Image

    values = np.asarray(picture).astype(np.float64)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = white
    scaled = ((values - black) * (255 / (white - black))).round().clip(0, 255)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
