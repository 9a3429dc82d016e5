"""Pictures read and written with all that they hold: 8 or 16 bits, grey, transparency, metadata and colour profile.

`images.read_rgb` is for networks that look at pictures; this is for jobs that give people their pictures back. Needs
Pillow, imported where it is used.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_atomically
from ..messages import CnnfastError, UsageError, one_line
from . import png16
from .images import ImageError
from .machine import require
from .tiles import white

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "READ",
    "TRANSPARENT",
    "WRITTEN",
    "Picture",
    "check_result",
    "from_array",
    "from_pil",
    "made_of",
    "read",
    "spread_colours",
    "through",
    "to_pil",
    "turned",
    "write",
]

READ = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
WRITTEN = (".jpeg", ".jpg", ".png", ".webp")
TRANSPARENT = (".png", ".webp")

_LARGEST_SIDE = {"JPEG": 65535, "WEBP": 16383}
_LARGEST_PROFILE = 255 * 65519  # bytes that JPEG has room for
_QUALITY = 95  # of JPEG and WebP
_ORIENTATION, _SIZES = 0x0112, (0xA002, 0xA003)  # tags of EXIF
_EXIF = 0x8769
_SRGB_SPACES = ("CMYK", "YCbCr", "LAB", "HSV")


@dataclass(frozen=True)
class Picture:
    """``pixels`` (H, W, C) uint8 or uint16: grey, grey and alpha, RGB or RGBA. ``info``: what Pillow calls so, as far
    as it goes along: ``icc_profile``, ``exif``, ``xmp`` (bytes), ``dpi``, ``text`` (PNG's). ``orientation``: how it was
    turned and mirrored when it was read (EXIF's 1 to 8)."""

    pixels: np.ndarray
    info: Mapping[str, Any] = field(default_factory=dict)
    orientation: int = 1

    @property
    def colours(self) -> np.ndarray:
        """(H, W, 1 or 3)."""
        return self.pixels[..., : self.pixels.shape[2] - self.has_alpha]

    @property
    def alpha(self) -> np.ndarray | None:
        """(H, W, 1)."""
        return self.pixels[..., -1:] if self.has_alpha else None

    @property
    def has_alpha(self) -> bool:
        return self.pixels.shape[2] in (2, 4)


# --- reading ----------------------------------------------------------------------------------------------------------


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong in Pillow is an `ImageError`, whose message follows the picture's name."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF data, which says nothing then
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except CnnfastError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        limit = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million"
        raise ImageError(f"has more than {limit} pixels and is not decoded: make it smaller first") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"is no picture (of the kinds that Pillow reads: {', '.join(READ)} and others)") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in any way
        raise ImageError(f"cannot be read: {one_line(error)}") from error


def read(path: str | os.PathLike[str]) -> Picture:
    """The picture in a file, turned and mirrored as its EXIF orientation says.

    Palettes become colours, a key colour alpha; CMYK and other spaces become RGB, by their profile where they have one.
    ImageError for an animation and a file of several pages, for 32-bit pixels (what is white is not said in the file),
    more pixels than Pillow takes for safe, and a file that is no picture, damaged or cut off. OSError where it cannot
    be opened.
    """
    from PIL import Image

    data, profile = png16.split_profile(Path(path).read_bytes())
    with _told(), Image.open(io.BytesIO(data)) as image:
        _one_frame(image)
        picture = from_pil(image, deep=(lambda: png16.decode(data)) if png16.is_deep(data[:26]) else None)
    return picture if profile is None else replace(picture, info={**picture.info, "icc_profile": profile})


def _one_frame(image: Image.Image) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a telephone's photograph with its preview
        what = "a file of several pages" if image.format == "TIFF" else "an animation"
        raise ImageError(f"is {what} ({frames}): single pictures are taken")


def from_pil(image: Image.Image, deep: Callable[[], np.ndarray] | None = None) -> Picture:
    """As `read`, of a picture of Pillow's; ``deep`` gives its pixels in 16 bits where Pillow has cut them down."""
    from PIL import Image, ImageOps

    with _told():
        orientation = image.getexif().get(_ORIENTATION, 1)
        if deep is not None:
            pixels = turned(deep(), orientation)
            upright = ImageOps.exif_transpose(image)
        else:
            upright = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                pixels = _deep_grey(image, orientation)
            elif image.mode in ("I", "F"):
                raise ImageError("has 32-bit pixels, of which it is not known what is white: save it with 8 or 16 bits")
            else:
                upright = _as_colours(upright)
                pixels = np.asarray(upright)
        if min(pixels.shape[:2]) < 1:
            raise ImageError("has no pixels")
        info = {key: upright.info[key] for key in ("icc_profile", "xmp", "dpi") if upright.info.get(key)}
        text = {k: v for k, v in getattr(image, "text", {}).items() if not k.startswith(("XML:", "Raw profile"))}
        if text:
            info["text"] = text
        exif = upright.getexif() if isinstance(upright, Image.Image) else None
        if exif:
            info["exif"] = _exif(exif)
        return Picture(pixels[..., None] if pixels.ndim == 2 else pixels, info, orientation)


def _exif(exif: Image.Exif) -> bytes:
    """Without what is true of the file read only: how it is turned, how large it is."""
    exif.pop(_ORIENTATION, None)
    inner = exif.get_ifd(_EXIF)
    for tag in _SIZES:
        inner.pop(tag, None)
    return exif.tobytes()


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """As EXIF's orientation (1 to 8) says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _deep_grey(image: Image.Image, orientation: int) -> np.ndarray:
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image).astype(np.uint16)
    bits = tags.get(258, (16,))[0]
    if bits < 16:  # 12, of a TIFF
        values = np.round(values * (65535 / (2**bits - 1))).astype(np.uint16)
    if tags.get(262) == 0:  # 0 is white
        values = 65535 - values
    key = image.info.get("transparency")
    if isinstance(key, int):
        alpha = np.where(values == key, 0, 65535).astype(np.uint16)
        values = np.dstack([values, alpha])
    return turned(values, orientation)


def _as_colours(image: Image.Image) -> Image.Image:
    """Into one of the modes L, LA, RGB, RGBA; ``info`` goes along."""
    if image.mode in _SRGB_SPACES:
        profile = image.info.get("icc_profile")
        rgb = (_by_profile(image, profile) if profile else None) or image.convert("RGB")
        rgb.info = {k: v for k, v in image.info.items() if k != "icc_profile"}  # it was of the other space
        return rgb
    if image.has_transparency_data:
        mode = "LA" if image.mode in ("1", "L", "LA", "La") else "RGBA"
    else:
        mode = "L" if image.mode in ("1", "L") else "RGB"
    converted = image if image.mode == mode else image.convert(mode)
    converted.info = dict(image.info)
    return converted


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """In sRGB, or None where the profile is not one of its space."""
    from PIL import ImageCms

    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


# --- writing ----------------------------------------------------------------------------------------------------------


def to_pil(picture: Picture) -> Image.Image:
    """As a picture of Pillow's. 16-bit grey keeps its bits (I;16). Pillow has no colours or alpha of 16 bits:
    ValueError."""
    from PIL import Image

    pixels = picture.pixels
    if pixels.dtype == np.uint16 and pixels.shape[2] != 1:
        raise ValueError("Pillow has no pictures of 16 bits with colours or alpha: use arrays")
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))
    image.info.update({k: v for k, v in picture.info.items() if k != "text"})
    return image


def through(work: Callable[[Picture], Picture], image: Any, job: str) -> Any:
    """What ``work`` makes of a picture, of the kind that ``image`` is: a `Picture`, a Pillow image (turned as its EXIF
    says), or an array (H, W) or (H, W, C), C from 1 to 4 as in `Picture`, uint8, uint16, or floats from 0 to 1.

    An array (H, W) gives one where the result has one channel. What Pillow has no 16 bits for becomes 8. UsageError for
    other arrays and other things; CnnfastError where Pillow is needed for ``job`` and is not installed.
    """
    if isinstance(image, Picture):
        return work(image)
    if isinstance(image, np.ndarray):
        done = work(from_array(image)).pixels
        return done[..., 0] if image.ndim == 2 and done.shape[2] == 1 else done
    require(job, {"pillow": "PIL"})
    if not hasattr(image, "getexif"):
        raise UsageError(f"expected a Pillow image or an array, got {type(image).__name__}")
    result = work(from_pil(image))
    if result.pixels.dtype == np.uint16 and result.pixels.shape[2] != 1:
        result = Picture(_in_8_bits(result.pixels), result.info)
    return to_pil(result)


def from_array(image: np.ndarray) -> Picture:
    """As `through` says."""
    if image.ndim not in (2, 3) or (image.ndim == 3 and not 1 <= image.shape[2] <= 4) or 0 in image.shape:
        raise UsageError(f"expected an array (H, W) or (H, W, 1 to 4), got {image.shape}")
    if image.dtype not in (np.uint8, np.uint16) and image.dtype.kind != "f":
        raise UsageError(f"expected an array of uint8, uint16 or floats from 0 to 1, got {image.dtype}")
    return Picture(image[..., None] if image.ndim == 2 else image)


def _in_8_bits(pixels: np.ndarray) -> np.ndarray:
    return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def made_of(picture: Picture, pixels: np.ndarray) -> Picture:
    """``pixels`` with the ``info`` of ``picture``; without its profile where grey became colours."""
    made = Picture(pixels, picture.info)
    if made.colours.shape[2] == picture.colours.shape[2]:
        return made
    return Picture(pixels, {key: value for key, value in picture.info.items() if key != "icc_profile"})


def check_target(path: Path, picture: Picture | None = None, written: Sequence[str] = WRITTEN) -> None:
    """UsageError where a picture, or this one, or one of a job whose results are ``written`` so, cannot be written
    under this name."""
    suffix = path.suffix.lower()
    if suffix not in WRITTEN:
        raise UsageError(f"{path}: pictures are written as {', '.join(written)}")
    if suffix not in (TRANSPARENT if picture is not None and picture.has_alpha else written):
        raise UsageError(f"{path}: JPEG has no transparency: write a .png or .webp")


def write(path: Path, picture: Picture, png_level: int = 1) -> None:
    """Write a picture, whole or not at all, of the kind that its name says; 16 bits stay in a PNG only. JPEG and WebP
    have quality 95. ``png_level``: zlib's, 0 to 9.

    UsageError for another kind, and for transparency in a JPEG; CnnfastError for more pixels than the kind has; OSError
    where it cannot be written.
    """
    check_target(path, picture)
    kind = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG")
    height, width, channels = picture.pixels.shape
    if max(height, width) > _LARGEST_SIDE.get(kind, 2**31 - 1):
        raise CnnfastError(f"{path}: {width}x{height} is too large for {kind}: write a .png")
    if kind == "JPEG" and len(picture.info.get("icc_profile", b"")) > _LARGEST_PROFILE:
        raise CnnfastError(f"{path}: the picture's colour profile is too large for JPEG: write a .png")
    info, deep = picture.info, picture.pixels.dtype == np.uint16
    if deep and kind == "PNG" and channels > 1:
        write_atomically(path, png16.encode(picture.pixels, png_level, _chunks(info)))
        return
    if deep and kind != "PNG":
        picture = Picture(_in_8_bits(picture.pixels), info)
    options: dict[str, Any] = {k: info[k] for k in ("icc_profile", "exif", "dpi") if k in info}
    if kind == "PNG":
        options |= {"compress_level": png_level, "pnginfo": _png_text(info)}
    else:
        options |= {"quality": _QUALITY}
        if "xmp" in info:
            options["xmp"] = info["xmp"]
        if kind == "JPEG":
            options["subsampling"] = 0
        else:
            options.pop("dpi", None)
    image = to_pil(picture)
    image.info = {}  # Pillow would take some of it, and warn
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    write_atomically(path, buffer.getvalue())


def _png_text(info: Mapping[str, Any]) -> Any:
    from PIL import PngImagePlugin

    text = PngImagePlugin.PngInfo()
    if "xmp" in info:
        text.add_itxt("XML:com.adobe.xmp", info["xmp"].decode("utf-8", "replace"))
    for key, value in info.get("text", {}).items():
        text.add_itxt(key, str(value))
    return text


def _chunks(info: Mapping[str, Any]) -> list[tuple[bytes, bytes]]:
    """The metadata as PNG's chunks: Pillow writes them all for a picture of one pixel."""
    from PIL import Image

    options = {k: info[k] for k in ("icc_profile", "exif", "dpi") if k in info}
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG", pnginfo=_png_text(info), **options)
    return [part for part in png16.chunks(buffer.getvalue()) if part[0] not in (b"IHDR", b"IDAT", b"IEND")]


def check_result(before: np.ndarray, after: np.ndarray, what: str) -> None:
    """CnnfastError where a picture became black, which a network out of its range gives (that values are finite is
    seen to where they are computed)."""
    if after.size and before.any() and not after.any():
        raise CnnfastError(f"{what} gave a black picture: nothing is written; --dtype float32 may help")


def spread_colours(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The colours where nothing is seen of them (``alpha`` is 0) made those of their surroundings: what lies there
    (black, mostly) would come out as a rim. By halves: each pixel of a smaller picture is the mean of those seen."""
    seen = (alpha > 0).astype(np.float32)
    if not seen.any() or seen.all():
        return colours
    levels = [(colours * seen, seen)]
    while max(levels[-1][1].shape[:2]) > 1:
        levels.append(tuple(_halved(a) for a in levels[-1]))  # type: ignore[arg-type]
    total, weight = levels[-1]
    mean = total / weight
    for total, weight in reversed(levels[:-1]):
        h, w = weight.shape[:2]
        coarse = mean.repeat(2, 0)[:h].repeat(2, 1)[:, :w]
        mean = np.where(weight > 0, total / np.maximum(weight, 1e-9), coarse)
    if colours.dtype.kind != "f":
        mean = mean.round().clip(0, white(colours.dtype))
    return np.where(alpha > 0, colours, mean.astype(colours.dtype))


def _halved(a: np.ndarray) -> np.ndarray:
    h, w = a.shape[:2]
    a = np.pad(a, ((0, h % 2), (0, w % 2), (0, 0)))
    return a[::2, ::2] + a[1::2, ::2] + a[::2, 1::2] + a[1::2, 1::2]
