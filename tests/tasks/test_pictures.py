"""pictures.py: what is read, kept and written, and what is refused. Pillow makes the files and reads the results."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image, ImageCms, PngImagePlugin

from cnnfast.messages import CnnfastError, UsageError
from cnnfast.tasks import pictures, png16
from cnnfast.tasks.images import ImageError
from cnnfast.tasks.pictures import Picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_png_keeps_every_bit(tmp_path: Path, channels: int, dtype: type) -> None:
    path, pixels = tmp_path / "a.png", noise(7, 5, channels, dtype=dtype)
    pictures.write(path, Picture(pixels))
    found = pictures.read(path)
    assert found.pixels.dtype == dtype
    np.testing.assert_array_equal(found.pixels, pixels)
    with Image.open(path) as image:  # a file that others read
        image.load()
        assert image.size == (5, 7)
        if channels > 2 and dtype is np.uint16:
            np.testing.assert_allclose(np.asarray(image), pixels // 257, atol=1)


@pytest.mark.parametrize("level", [0, 9])
def test_the_effort_changes_the_size_only(tmp_path: Path, level: int) -> None:
    for dtype in (np.uint8, np.uint16):
        pixels = np.zeros((64, 64, 3), dtype)
        pictures.write(tmp_path / "a.png", Picture(pixels), level)
        assert ((tmp_path / "a.png").stat().st_size > 64 * 64 * 3) == (level == 0)
        np.testing.assert_array_equal(pictures.read(tmp_path / "a.png").pixels, pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_other_kinds(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    ramp = np.linspace(0, 65535, 64 * 64 * 3).reshape(64, 64, 3)
    pictures.write(path, Picture(ramp.astype(np.uint16)))
    found = pictures.read(path).pixels
    assert found.dtype == np.uint8 and np.abs(found - ramp / 257).max() < 6
    pictures.write(path, Picture(np.full((8, 8, 1), 77, np.uint8)))
    assert np.abs(pictures.read(path).pixels.astype(int) - 77).max() <= 1


def test_webp_keeps_transparency(tmp_path: Path) -> None:
    pixels = noise(16, 16, 4)
    pictures.write(tmp_path / "a.webp", Picture(pixels))
    np.testing.assert_array_equal(pictures.read(tmp_path / "a.webp").pixels[..., 3], pixels[..., 3])


def test_palettes_become_colours(tmp_path: Path) -> None:
    rgb = Image.fromarray(noise(9, 9, 3)).quantize(16)
    rgb.save(tmp_path / "a.png")
    np.testing.assert_array_equal(pictures.read(tmp_path / "a.png").pixels, np.asarray(rgb.convert("RGB")))
    rgb.save(tmp_path / "b.png", transparency=3)
    found = pictures.read(tmp_path / "b.png").pixels
    np.testing.assert_array_equal(found[..., 3], np.where(np.asarray(rgb) == 3, 0, 255))
    Image.fromarray(noise(9, 9) > 99).save(tmp_path / "c.png")
    assert set(np.unique(pictures.read(tmp_path / "c.png").pixels)) == {0, 255}


def test_key_colours_become_alpha(tmp_path: Path) -> None:
    pixels = noise(6, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=tuple(int(v) for v in pixels[2, 1]))
    found = pictures.read(tmp_path / "a.png").pixels
    assert found.shape[2] == 4 and found[2, 1, 3] == 0 and (found[..., 3] == 0).sum() == 1
    deep = noise(6, 4, 3, dtype=np.uint16)
    (tmp_path / "b.png").write_bytes(png16.encode(deep, 1, [(b"tRNS", deep[2, 1].astype(">u2").tobytes())]))
    found = pictures.read(tmp_path / "b.png").pixels
    np.testing.assert_array_equal(found[..., :3], deep)
    assert found[2, 1, 3] == 0 and (found[..., 3] == 0).sum() == 1
    key = (b"tRNS", deep[2, 1, :1].astype(">u2").tobytes())
    (tmp_path / "c.png").write_bytes(png16.encode(deep[..., :1], 1, [key]))
    found = pictures.read(tmp_path / "c.png").pixels
    np.testing.assert_array_equal(found[..., :1], deep[..., :1])
    assert found.shape[2] == 2 and found[2, 1, 1] == 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["8 bits", "grey of 16", "colours of 16"])
def test_turned_as_exif_says(tmp_path: Path, orientation: int, kind: str) -> None:
    """Each of the eight ways gives what Pillow's own turning gives."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a maker"
    small = noise(5, 3, 3)
    expected = np.asarray(pil_turned(small, exif))
    path = tmp_path / "a.png"
    if kind == "8 bits":
        Image.fromarray(small).save(path, exif=exif)
    elif kind == "grey of 16":
        small, expected = small[..., 0], expected[..., 0]
        Image.fromarray(small.astype(np.uint16) * 257).save(path, exif=exif)
    else:
        part = (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        path.write_bytes(png16.encode(small.astype(np.uint16) * 257, 1, [part]))
    found = pictures.read(path)
    np.testing.assert_array_equal(found.pixels.squeeze(), expected.astype(int) * (1 if kind == "8 bits" else 257))
    pictures.write(path, found)
    with Image.open(path) as image:
        assert image.getexif().get(0x0112) is None and image.getexif()[0x010F] == "a maker"
    np.testing.assert_array_equal(pictures.read(path).pixels, found.pixels)


def pil_turned(pixels: np.ndarray, exif: Image.Exif) -> Image.Image:
    from PIL import ImageOps

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    return ImageOps.exif_transpose(Image.open(buffer))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_profile_and_metadata_go_along(tmp_path: Path, suffix: str, dtype: type) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    exif.get_ifd(0x8769)[0xA002] = 8  # its width, which is not the result's
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "of a person")
    text.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>")
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "a.png", icc_profile=SRGB, exif=exif, dpi=(300, 300), pnginfo=text)
    read = pictures.read(tmp_path / "a.png")
    path = tmp_path / f"b{suffix}"
    pictures.write(path, Picture(noise(16, 16, 3, dtype=dtype), read.info))
    with Image.open(path) as image:
        assert image.info["icc_profile"] == SRGB
        found = image.getexif()
        assert found[0x010F] == "a maker" and 0xA002 not in found.get_ifd(0x8769)
        assert "xmpmeta" in str(image.info.get("xmp"))
        if suffix == ".png":
            assert image.text["Comment"] == "of a person"
        if suffix != ".webp":
            assert image.info["dpi"][0] == pytest.approx(300, abs=0.1)


def test_cmyk_becomes_colours(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    cmyk.save(tmp_path / "a.jpg", icc_profile=b"not a profile")
    found = pictures.read(tmp_path / "a.jpg")
    assert found.pixels.shape == (8, 8, 3) and "icc_profile" not in found.info
    red, green, blue = found.pixels[4, 4]
    assert red < 60 and green > 150 and blue > 200  # cyan


def animation(path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)


def bomb(path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def cut(path: Path, deep: bool = False) -> None:
    if deep:
        data = png16.encode(noise(64, 64, 3, dtype=np.uint16), 1)
    else:
        buffer = io.BytesIO()
        Image.fromarray(noise(64, 64, 3)).save(buffer, "PNG" if path.suffix == ".png" else "JPEG")
        data = buffer.getvalue()
    path.write_bytes(data[: len(data) * 2 // 3])


def changed(path: Path) -> None:
    data = bytearray(png16.encode(noise(64, 64, 3, dtype=np.uint16), 1))
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


ODD = {
    "text.png": (lambda p: p.write_text("a text\n"), "is no picture"),
    "empty.png": (lambda p: p.write_bytes(b""), "is no picture"),
    "moving.gif": (animation, "is an animation \\(3\\): single pictures are taken"),
    "moving.png": (animation, "is an animation \\(3\\)"),
    "moving.webp": (animation, "is an animation \\(3\\)"),
    "pages.tiff": (animation, "is a file of several pages \\(3\\)"),
    "bomb.png": (bomb, "has more than [0-9]+ million pixels and is not decoded"),
    "cut.png": (cut, "cannot be read"),
    "cut.jpg": (cut, "cannot be read: .*truncated"),
    "cut16.png": (lambda p: cut(p, deep=True), "cannot be read"),
    "changed16.png": (changed, "cannot be read"),
    "float.tiff": (lambda p: Image.new("F", (4, 4)).save(p), "has 32-bit pixels"),
    "integers.tiff": (lambda p: Image.new("I", (4, 4)).save(p), "has 32-bit pixels"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    make, said = ODD[name]
    make(tmp_path / name)
    with pytest.raises(ImageError, match=said) as caught:
        pictures.read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_targets_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="pictures are written as .jpeg, .jpg, .png, .webp"):
        pictures.write(tmp_path / "a.gif", Picture(noise(4, 4, 3)))
    with pytest.raises(UsageError, match="JPEG has no transparency: write a .png or .webp"):
        pictures.write(tmp_path / "a.jpg", Picture(noise(4, 4, 4)))
    with pytest.raises(CnnfastError, match="4x70000 is too large for JPEG: write a .png"):
        pictures.write(tmp_path / "a.jpg", Picture(np.zeros((70000, 4, 3), np.uint8)))
    with pytest.raises(CnnfastError, match="20000x4 is too large for WEBP"):
        pictures.write(tmp_path / "a.webp", Picture(np.zeros((4, 20000, 3), np.uint8)))
    assert not list(tmp_path.iterdir())


def test_what_goes_in_comes_out() -> None:
    """Pillow's pictures, arrays and `Picture`: of one kind before and after."""

    def doubled(picture: Picture) -> Picture:
        return Picture(np.concatenate([picture.pixels] * 3, 2) if picture.pixels.shape[2] == 1 else picture.pixels)

    colours, grey = noise(5, 7, 3), noise(5, 7)
    np.testing.assert_array_equal(pictures.through(doubled, colours, "it"), colours)
    assert pictures.through(doubled, grey, "it").shape == (5, 7, 3)  # what became colours stays so
    assert pictures.through(lambda picture: picture, grey, "it").shape == (5, 7)
    assert isinstance(pictures.through(doubled, Picture(colours), "it"), Picture)
    assert pictures.through(doubled, Image.fromarray(colours), "it").mode == "RGB"
    deep = noise(5, 7, dtype=np.uint16)
    assert pictures.through(lambda picture: picture, Image.fromarray(deep), "it").mode == "I;16"
    found = np.asarray(pictures.through(doubled, Image.fromarray(deep), "it"))  # Pillow has no colours of 16 bits
    assert found.dtype == np.uint8 and np.abs(found[..., 0] - deep / 257).max() <= 0.5
    for wrong in ("a.png", None, 3):
        with pytest.raises(UsageError, match="expected a Pillow image or an array, got"):
            pictures.through(doubled, wrong, "it")


def test_a_profile_of_greys_is_none_of_colours() -> None:
    grey = Picture(noise(3, 4, 1), {"icc_profile": b"grey", "dpi": (72, 72)})
    assert pictures.made_of(grey, noise(3, 4, 2)).info == grey.info
    assert pictures.made_of(grey, noise(3, 4, 3)).info == {"dpi": (72, 72)}
    assert pictures.made_of(Picture(noise(3, 4, 3), grey.info), noise(3, 4, 4)).info == grey.info


def test_black_results_are_refused() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    pictures.check_result(black, black, "it")
    pictures.check_result(white, white, "it")
    with pytest.raises(CnnfastError, match="it gave a black picture: nothing is written"):
        pictures.check_result(white, black, "it")


# --- 16 bits ----------------------------------------------------------------------------------------------------------


def as_deep(data: bytes) -> bytes:
    """An RGBA PNG of 8 bits as the file of grey and alpha of 16 bits that has the same bytes."""
    head = data[12:16] + data[16:24] + bytes([16, 4]) + data[26:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


@pytest.mark.parametrize("kind", ["flat", "noise", "ramps"])
def test_all_of_pngs_filters(kind: str) -> None:
    """Pillow chooses filters row by row, all five of them for ramps."""
    y, x = np.mgrid[:40, :60]
    pixels = {
        "flat": np.full((40, 60, 4), 9, np.uint8),
        "noise": noise(40, 60, 4),
        "ramps": np.stack([x * 3 + y, x * y, (x + y) ** 2 // 7, 255 - x], 2).astype(np.uint8),
    }[kind]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    np.testing.assert_array_equal(png16.decode(as_deep(buffer.getvalue())), pixels.view(">u2").reshape(40, 60, 2))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8), (13, 11)])
def test_interlaced_files(size: tuple[int, int]) -> None:
    """Put together here by the specification's seven passes, without filters."""
    pixels = noise(*size, 3, dtype=np.uint16)
    rows = bytearray()
    for x, y, dx, dy in png16._ADAM7:
        for row in pixels[y::dy, x::dx]:
            if len(row):
                rows += b"\0" + row.astype(">u2").tobytes()
    header = struct.pack(">IIBBBBB", size[1], size[0], 16, 2, 0, 0, 1)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(rows))), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    np.testing.assert_array_equal(png16.decode(b"\x89PNG\r\n\x1a\n" + body), pixels)
