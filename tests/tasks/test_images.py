"""Pictures as people bring them: each kind against the picture that it shows, and each that cannot be read by name."""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from cnnfast.tasks.data import DataError, load_images
from cnnfast.tasks.images import ImageError, read_rgb

Image = pytest.importorskip("PIL.Image")

WHITE, RED = (255, 255, 255), (255, 0, 0)


def file(picture: Image.Image, kind: str, **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer


def read(picture: Image.Image, kind: str, **options: object) -> np.ndarray:
    """What `read_rgb` makes of the picture in a file: (H, W, 3)."""
    found = read_rgb(file(picture, kind, **options))
    assert found.mode == "RGB"
    return np.asarray(found)


COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_colours_as_they_are(kind: str) -> None:
    assert (read(Image.fromarray(COLOURS), kind, **({"lossless": True} if kind == "WEBP" else {})) == COLOURS).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_and_black_and_white(kind: str) -> None:
    grey = COLOURS[..., 0]
    assert (read(Image.fromarray(grey), kind) == grey[..., None]).all()
    bits = grey > 127
    assert (read(Image.fromarray(bits), kind) == 255 * bits[..., None]).all()


# --- orientation ------------------------------------------------------------------------------------------------------

# Of the EXIF standard: what must be done to the pixels to see the picture upright.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: p.swapaxes(0, 1)[:, ::-1],
    7: lambda p: p.swapaxes(0, 1)[::-1, ::-1],
    8: lambda p: p.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "16-bit PNG", "palette PNG"])
def test_the_orientation_of_exif(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture, expected = Image.fromarray(COLOURS), COLOURS
    if kind == "16-bit PNG":
        picture, expected = Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 257), COLOURS[..., :1].repeat(3, 2)
    elif kind == "palette PNG":
        picture = picture.quantize(64)
    options = {"lossless": True} if kind == "WEBP" else {}
    found = read(picture, kind.split()[-1], exif=exif, **options)
    assert (found == UPRIGHT[orientation](expected)).all()


def test_a_jpeg_of_a_telephone() -> None:
    """Taken upright: stored lying, with orientation 6."""
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:, :16] = RED  # left: the top of what is seen
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = read(Image.fromarray(stored), "JPEG", exif=exif, quality=95)
    assert seen.shape == (32, 16, 3)
    assert seen[:12, :, 0].min() > 200 and seen[20:].max() < 60


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("exif", [b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_damaged_exif_says_nothing_of_the_orientation(exif: bytes) -> None:
    assert read(Image.fromarray(COLOURS), "JPEG", exif=exif).shape == COLOURS.shape


# --- depth ------------------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 65535, 64).reshape(8, 8).round().astype(np.uint16)
EIGHT = (RAMP / 257).round().astype(np.uint8)[..., None].repeat(3, 2)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled(mode: str, kind: str) -> None:
    pixels = RAMP.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
    assert (read(Image.frombytes(mode, (8, 8), pixels), kind) == EIGHT).all()


def test_16_bits_of_a_pgm() -> None:
    assert (np.asarray(read_rgb(io.BytesIO(b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes()))) == EIGHT).all()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> io.BytesIO:
    """A PNG, chunk by chunk: Pillow writes none of these."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def test_16_bits_a_channel() -> None:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in COLOURS.astype(np.uint16) * 257)
    assert (np.asarray(read_rgb(png(7, 5, 16, 2, rows))) == COLOURS).all()


def test_16_bits_with_a_transparent_grey() -> None:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RAMP)
    found = np.asarray(read_rgb(png(8, 8, 16, 0, rows, (b"tRNS", struct.pack(">H", int(RAMP[0, 3]))))))
    expected = EIGHT.copy()
    expected[0, 3] = 255
    assert (found == expected).all()


def tiff(depth: int, photometric: int, data: bytes) -> io.BytesIO:
    """A grey TIFF of 8x8 pixels in one strip."""
    tags = [(256, 8), (257, 8), (258, depth), (259, 1), (262, photometric), (273, 200), (277, 1), (278, 8)]
    tags.append((279, len(data)))
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return io.BytesIO(head.ljust(200, b"\0") + data)


def test_white_that_is_0() -> None:
    assert (np.asarray(read_rgb(tiff(16, 1, RAMP.tobytes()))) == EIGHT).all()
    assert (np.asarray(read_rgb(tiff(16, 0, RAMP.tobytes()))) == EIGHT[::-1, ::-1]).all(), "the ramp is symmetric"


def test_12_bits() -> None:
    values = (RAMP >> 4).reshape(-1, 2)
    a, b = values[:, 0], values[:, 1]
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()
    found = np.asarray(read_rgb(tiff(12, 1, packed)))
    assert (found == (values.reshape(8, 8) / 4095 * 255).round().astype(np.uint8)[..., None]).all()


@pytest.mark.parametrize(
    "dtype, message", [(np.int32, "has 32-bit integers"), (np.float32, "has floating-point numbers")]
)
def test_what_has_no_white_is_refused(dtype: type, message: str) -> None:
    with pytest.raises(ImageError, match=f"^{message}, of which it is not known what is white: save it with 8 or 16"):
        read(Image.fromarray(RAMP.astype(dtype)), "TIFF")


# --- transparency -----------------------------------------------------------------------------------------------------


def on_white(colour: tuple[int, ...], alpha: int) -> tuple[int, ...]:
    return tuple(round((c * alpha + 255 * (255 - alpha)) / 255) for c in colour)


@pytest.mark.parametrize("alpha", [0, 51, 128, 255])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_lies_on_white(alpha: int, kind: str) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = read(Image.new("RGBA", (2, 2), (*RED, alpha)), kind, **options)
    assert np.abs(found.astype(int) - on_white(RED, alpha)).max() <= 1
    if kind != "WEBP":
        found = read(Image.new("LA", (2, 2), (100, alpha)), kind)
        assert np.abs(found.astype(int) - on_white((100,) * 3, alpha)).max() <= 1


def test_palettes() -> None:
    picture = Image.new("P", (3, 1))
    picture.putpalette([10, 20, 30, *RED, 0, 0, 0])
    picture.putdata([0, 1, 2])
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        assert read(picture, kind).tolist() == [[[10, 20, 30], [255, 0, 0], [0, 0, 0]]], kind
    for kind in ("PNG", "GIF"):
        assert read(picture, kind, transparency=1).tolist() == [[[10, 20, 30], [255, 255, 255], [0, 0, 0]]], kind
    (found,) = read(picture, "PNG", transparency=bytes([255, 51, 0]))
    assert found.tolist() == [[10, 20, 30], list(on_white(RED, 51)), [255, 255, 255]]


@pytest.mark.parametrize("mode, key", [("RGB", RED), ("L", 76), ("1", 255)])
def test_a_transparent_colour(mode: str, key: object) -> None:
    assert (read(Image.new("RGB", (2, 2), RED if mode != "1" else WHITE).convert(mode), "PNG") != 0).any()
    assert (read(Image.new(mode, (2, 2), key), "PNG", transparency=key) == 255).all()


# --- CMYK, animations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    """Pillow writes CMYK into a JPEG as Adobe does, inverted."""
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    if kind == "JPEG":
        assert b"Adobe" in file(picture, kind).getvalue()
    assert np.abs(read(picture, kind).astype(int) - RED).max() <= 2
    assert read(Image.new("CMYK", (16, 16), (0, 0, 0, 255)), kind).max() <= 2


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_picture_of_several(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(data) as opened:
        assert opened.n_frames == 2
    data.seek(0)
    assert np.abs(np.asarray(read_rgb(data)).astype(int) - RED).max() <= 2


# --- what is not read -------------------------------------------------------------------------------------------------


def test_more_pixels_than_are_safe_are_not_decoded() -> None:
    """The head of the file alone: were it decoded, the error would be another one."""
    for width, height in ((9500, 9500), (40_000, 40_000), (2**31 - 1, 2**31 - 1)):
        with pytest.raises(ImageError, match="^has more than 89 million pixels and is not decoded: make it smaller"):
            read_rgb(png(width, height, 8, 2, b""))
    with pytest.raises(ImageError, match="^cannot be read: "):
        read_rgb(png(9400, 9400, 8, 2, b""))


def test_pillow_s_own_limit_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with warnings.catch_warnings(), pytest.raises(ImageError, match="pixels and is not decoded"):
        warnings.simplefilter("ignore")
        read(Image.fromarray(COLOURS), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert (read(Image.fromarray(COLOURS), "PNG") == COLOURS).all()


KINDS = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off(kind: str) -> None:
    big = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = file(big, kind).getvalue()
    for part in (0, 4, 30, len(data) // 2):
        with pytest.raises(ImageError, match="^cannot be read: [^\n]+$"):
            read_rgb(io.BytesIO(data[:part]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "TIFF"])  # libtiff writes to standard error
def test_damage_of_any_kind_is_an_image_error(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}
    good, random, refused = file(Image.fromarray(COLOURS), kind, **options).getvalue(), Random(0), 0
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(random.choice([1, 8])):
            bad[random.randrange(len(bad))] = random.randrange(256)
        try:
            read_rgb(io.BytesIO(bytes(bad)))
        except ImageError:
            refused += 1
    assert refused > 20


def test_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ImageError, match="^cannot be read: cannot identify image file"):
        read_rgb(tmp_path / "a.png")
    with pytest.raises(ImageError, match="^cannot be read: .*No such file"):
        read_rgb(tmp_path / "b.png")
    with pytest.raises(ImageError, match="^cannot be read: .*Is a directory"):
        read_rgb(str(tmp_path))


# --- in a folder ------------------------------------------------------------------------------------------------------


def test_a_folder_of_every_kind(tmp_path: Path) -> None:
    """One picture in many forms: to a training they are the same."""
    pixels = np.kron(COLOURS[:4, :4, :1].repeat(3, 2), np.ones((8, 8, 1), np.uint8))
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 3
    picture.save(tmp_path / "a.png")
    picture.rotate(180).save(tmp_path / "b.png", exif=exif)
    picture.quantize(64).save(tmp_path / "c.gif")
    picture.convert("RGBA").save(tmp_path / "d.TIFF")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "e.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "f.tif")
    picture.save(tmp_path / "g.webp", lossless=True)
    picture.save(tmp_path / "h.bmp")
    images = load_images(str(tmp_path), 32)
    assert images.shape == (8, 3, 32, 32)
    for a, b in itertools.pairwise(images):
        assert (a == b).all()


BAD = {
    "cut.jpg": lambda: file(Image.fromarray(COLOURS.repeat(20, 0)), "JPEG").getvalue()[:300],
    "huge.png": lambda: png(40_000, 40_000, 8, 2, b"").getvalue(),
    "float.tiff": lambda: file(Image.fromarray(RAMP.astype(np.float32)), "TIFF").getvalue(),
    "text.png": lambda: b"text",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_of_a_folder_is_named(name: str, tmp_path: Path) -> None:
    for other in "abc":
        Image.fromarray(COLOURS).save(tmp_path / f"{other}.png")
    (tmp_path / name).write_bytes(BAD[name]())
    with pytest.raises(DataError, match=f"^--data {tmp_path}: {name} (cannot be read|has)[^\n]+$"):
        load_images(str(tmp_path), 16)


def test_a_huge_picture_costs_no_memory(tmp_path: Path) -> None:
    """A small file that would be 4.8 GB of pixels."""
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    (tmp_path / "bomb.png").write_bytes(png(40_000, 40_000, 8, 2, b"\0" * 120_001 * 100).getvalue())
    code = """
        import resource, sys
        from cnnfast.tasks.data import DataError, load_images
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            load_images(sys.argv[1], 16)
        except DataError as error:
            assert "bomb.png has more than 89 million pixels" in str(error), error
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    pytest.importorskip("resource")
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000, "kilobytes"
