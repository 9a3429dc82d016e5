"""Odd files through the command line, for each task that takes pictures: the right picture, or one line and a status.

What is right is told by whoever made the file, not by this project's reader. The networks are stand-ins whose results
NumPy can tell: enlarging repeats pixels, a style gives the negative, everything is a person. Repairing is by random
weights: every pixel outside the mask is as it was.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")
from PIL import Image, ImageCms, TiffImagePlugin

from cnnfast.__main__ import main
from cnnfast.generators import RepairConfig, RepairUNet
from cnnfast.tasks import cutting, enhancement, pictures, png16, stages, styling
from cnnfast.tasks.repair_weights import save_network


class StandIn(nn.Module):
    """SPAN: repeats pixels. The selfie segmentation: everything is a person."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.config = SimpleNamespace(scale=2)
        self.weight = nn.Parameter(torch.ones(()))

    def styled(self, numbers: Tensor) -> nn.Module:
        return nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "span_x2":
            return nn.functional.interpolate(x, scale_factor=2)
        assert self.name == "selfie"
        return torch.ones_like(x[:, :1])


def stand_in(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    return StandIn(name)


def negative(network: nn.Module, numbers: Tensor, pixels: np.ndarray, **options: Any) -> np.ndarray:
    return (np.iinfo(pixels.dtype).max - pixels).astype(pixels.dtype)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "repair.npz"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = RepairUNet(RepairConfig((8, 8, 8)))
        nn.init.normal_(network.leave[0].weight, 0, 0.02)
    save_network(path, network.eval(), {})
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the stand-ins."""
    for module in (cutting, enhancement, styling):
        monkeypatch.setattr(module, "create_model", stand_in)
    monkeypatch.setattr(stages, "run", negative)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


# --- pictures: each writes a file, and tells its pixels (H, W, C) as people see them --------------------------------


def saved(path: Path, pixels: np.ndarray, kind: str = "PNG", **options: Any) -> np.ndarray:
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(path, kind, **options)
    return pixels


def decoded(path: Path, pixels: np.ndarray, kind: str, **options: Any) -> np.ndarray:
    """Of a kind that does not keep every bit: as Pillow reads it."""
    saved(path, pixels, kind, **options)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def deep(path: Path, channels: int) -> np.ndarray:
    pixels = noise(20, 30, channels, dtype=np.uint16)
    path.write_bytes(png16.encode(pixels, 1))
    return pixels


def turned(path: Path, kind: str) -> np.ndarray:
    """Orientation 6: what is on the left in the file is seen above, from right to left."""
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind == "PNG":
        return np.rot90(saved(path, noise(20, 30, 3), kind, exif=exif), -1)
    return np.rot90(decoded(path, noise(20, 30, 3), kind, exif=exif), -1)


def palette(path: Path) -> np.ndarray:
    index, colours = noise(20, 30) % 4, noise(4, 3)
    image = Image.frombytes("P", (30, 20), index.tobytes())
    image.putpalette(colours.tobytes())
    image.save(path, "PNG", transparency=bytes([0, 128, 255, 255]))
    alpha = np.array([0, 128, 255, 255], np.uint8)
    return np.dstack([colours[index], alpha[index]])


def key_colour(path: Path) -> np.ndarray:
    pixels = noise(20, 30, 3)
    pixels[:5] = (1, 2, 3)
    saved(path, pixels, transparency=(1, 2, 3))
    return np.dstack([pixels, np.where((pixels == (1, 2, 3)).all(2), 0, 255).astype(np.uint8)])


def bits(path: Path) -> np.ndarray:
    black = noise(20, 30) < 99
    Image.fromarray(~black).save(path, "PNG")
    return np.where(black, 0, 255).astype(np.uint8)[..., None]


def cmyk(path: Path) -> np.ndarray:
    """Without a profile. Flat, so that JPEG changes little: red by no cyan, all magenta and yellow."""
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, "JPEG", quality=100)
    return np.full((16, 16, 3), (255, 0, 0), np.uint8)


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def cmyk_with_a_broken_profile(path: Path) -> np.ndarray:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, "JPEG", quality=100, icc_profile=b"no profile" * 50)
    return np.full((16, 16, 3), (255, 0, 0), np.uint8)


def animated_by_one(path: Path) -> np.ndarray:
    """A GIF, an APNG: of one picture, that is one."""
    pixels = noise(20, 30, 1)
    saved(path, pixels, "GIF", save_all=True)
    return np.broadcast_to(pixels, (20, 30, 3))


def with_an_odd_end(path: Path) -> np.ndarray:
    pixels = saved(path, noise(20, 30, 3))
    path.write_bytes(path.read_bytes() + b"what a camera added" * 100)
    return pixels


def linked(path: Path) -> np.ndarray:
    folder = path.parent.parent / "elsewhere"
    folder.mkdir()
    pixels = saved(folder / "picture", noise(20, 30, 3))
    path.symlink_to(folder / "picture")
    return pixels


RIGHT: dict[str, Callable[[Path], np.ndarray]] = {
    "8 bits.png": lambda p: saved(p, noise(20, 30, 3)),
    "grey.png": lambda p: saved(p, noise(20, 30, 1)),
    "1 bit.png": bits,
    "16 bits.png": lambda p: deep(p, 3),
    "16 bits with alpha.png": lambda p: deep(p, 4),
    "grey of 16 bits with alpha.png": lambda p: deep(p, 2),
    "la.png": lambda p: saved(p, noise(20, 30, 2)),
    "rgba.png": lambda p: saved(p, noise(20, 30, 4)),
    "palette with transparency.png": palette,
    "key colour.png": key_colour,
    "turned.png": lambda p: turned(p, "PNG"),
    "turned.jpg": lambda p: turned(p, "JPEG"),
    "damaged exif.jpg": lambda p: decoded(p, noise(20, 30, 3), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "1x1.png": lambda p: saved(p, noise(1, 1, 3)),
    "1x4000.png": lambda p: saved(p, noise(4000, 1, 3)),
    "4000x1.png": lambda p: saved(p, noise(1, 4000, 3)),
    "cmyk.jpg": cmyk,
    "cmyk with a broken profile.jpg": cmyk_with_a_broken_profile,
    "grey.jpg": lambda p: decoded(p, noise(20, 30, 1), "JPEG")[..., :1],
    "progressive.jpg": lambda p: decoded(p, noise(20, 30, 3), "JPEG", progressive=True),
    "huge profile.png": lambda p: saved(p, noise(20, 30, 3), icc_profile=srgb() + bytes(20_000_000)),
    "broken profile.png": lambda p: saved(p, noise(20, 30, 3), icc_profile=b"\xff" * 1000),
    "lossless.webp": lambda p: saved(p, noise(20, 30, 4), "WEBP", lossless=True, exact=True),
    "picture.bmp": lambda p: saved(p, noise(20, 30, 3), "BMP"),
    "picture.tiff": lambda p: saved(p, noise(20, 30, 3), "TIFF", compression="tiff_lzw"),
    "one picture.gif": animated_by_one,
    "a bmp.png": lambda p: saved(p, noise(20, 30, 3), "BMP"),
    "UPPER.PNG": lambda p: saved(p, noise(20, 30, 3)),
    "no suffix": lambda p: saved(p, noise(20, 30, 3)),
    "two\nlines \u4e2d\u6587 \udcff.png": lambda p: saved(p, noise(20, 30, 3)),
    "an odd end.png": with_an_odd_end,
    "a link.png": linked,
}


def enhanced(p: np.ndarray) -> np.ndarray:
    return p.repeat(2, 0).repeat(2, 1)


def alpha_of(p: np.ndarray) -> np.ndarray | None:
    return p[..., -1:] if p.shape[2] in (2, 4) else None


def styled(p: np.ndarray) -> np.ndarray:
    alpha = alpha_of(p)
    colours = p if alpha is None else p[..., :-1]
    done = np.broadcast_to(np.iinfo(p.dtype).max - colours, (*p.shape[:2], 3))
    return done if alpha is None else np.concatenate([done, alpha], 2)


def cut_out(p: np.ndarray) -> np.ndarray:
    return p if alpha_of(p) is not None else np.dstack([p, np.full(p.shape[:2], np.iinfo(p.dtype).max, p.dtype)])


TASKS: dict[str, tuple[list[str], Callable[[np.ndarray], np.ndarray]]] = {
    "enhance": (["enhance"], enhanced),
    "style": (["compose", "style", "--style", "mosaic"], styled),
    "cutout": (["compose", "cutout"], cut_out),
}


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def same_where_seen(done: np.ndarray, right: np.ndarray) -> None:
    assert done.dtype == right.dtype and done.shape == right.shape
    alpha = alpha_of(right)
    seen = slice(None) if alpha is None else alpha[..., 0] > 0
    np.testing.assert_array_equal(done[seen], right[seen])
    if alpha is not None:
        np.testing.assert_array_equal(done[..., -1:], alpha)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", RIGHT)
def test_the_right_picture(here: Path, name: str, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, right = TASKS[task]
    pixels = RIGHT[name](here / name)
    status = main([*arguments, name, "--output", "out.png"])
    assert (status, told(capsys)) == (0, [])
    same_where_seen(pictures.read("out.png").pixels, right(pixels))
    assert sorted(os.listdir()) == sorted([name, "out.png"])


@pytest.mark.parametrize("name", [name for name in RIGHT if name != "1x1.png"])  # which has nothing around its hole
def test_the_right_picture_of_repair(here: Path, name: str, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = RIGHT[name](here / name)
    h, w = pixels.shape[:2]
    hole = np.zeros((h, w), bool)
    hole[h // 2 : h // 2 + 3, w // 2 : w // 2 + 3] = True
    Image.fromarray(hole).save("mask of 1 bit.png")
    command = ["repair", name, "--mask", "mask of 1 bit.png", "--output", "out.png", "--weights-file", str(weights)]
    assert (main(command), told(capsys)) == (0, [])
    done = pictures.read("out.png").pixels
    assert done.dtype == pixels.dtype and done.shape == pixels.shape
    np.testing.assert_array_equal(done[~hole], pixels[~hole])
    assert sorted(os.listdir()) == sorted([name, "mask of 1 bit.png", "out.png"])


@pytest.mark.parametrize("deep", [False, True])
def test_a_profile_that_pillow_refuses_goes_along(here: Path, deep: bool) -> None:
    profile = srgb() + np.random.default_rng(0).bytes(3_000_000)
    pixels = noise(8, 8, 3, dtype=np.uint16 if deep else np.uint8)
    pictures.write(Path("in.png"), pictures.Picture(pixels, {"icc_profile": profile}))
    for output in ("out.png", "out.jpg", "out.webp"):
        assert main(["enhance", "in.png", "--output", output]) == 0
        assert pictures.read(output).info["icc_profile"] == profile
    np.testing.assert_array_equal(pictures.read("out.png").pixels, enhanced(pixels))


def test_a_profile_that_jpeg_has_no_room_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(here / "in.png", noise(8, 8, 3), icc_profile=srgb() + bytes(17_000_000))
    assert main(["enhance", "in.png", "--output", "out.jpg"]) == 1
    assert told(capsys) == ["error: out.jpg: the picture's colour profile is too large for JPEG: write a .png"]
    assert os.listdir() == ["in.png"]


# --- files that are refused -----------------------------------------------------------------------------------------


def frames(path: Path, **options: Any) -> None:
    several = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    several[0].save(path, save_all=True, append_images=several[1:], **options)


def cut(path: Path, kind: str, deep: bool = False) -> None:
    buffer = io.BytesIO()
    if deep:
        buffer.write(png16.encode(noise(64, 64, 3, dtype=np.uint16), 1))
    else:
        Image.fromarray(noise(64, 64, 3)).save(buffer, kind)
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def bomb(path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def floats(path: Path) -> None:
    Image.new("F", (8, 8)).save(path)


def no_pixels(path: Path) -> None:
    """A TIFF whose header says 0x0."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in ((256, 0), (257, 0), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 1)):
        tags[tag] = value
    buffer = io.BytesIO(b"II*\0\x08\0\0\0")
    buffer.seek(8)
    tags.save(buffer)
    path.write_bytes(buffer.getvalue())


def changed(path: Path) -> None:
    """Two bytes in the middle of the pixels."""
    saved(path, noise(64, 64, 3))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    data[len(data) // 2 + 1] ^= 255
    path.write_bytes(data)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "text.png": (lambda p: p.write_text("a text"), "is no picture"),
    "empty.png": (lambda p: p.write_bytes(b""), "is no picture"),
    "zeros.jpg": (lambda p: p.write_bytes(bytes(5000)), "is no picture"),
    "cut.png": (lambda p: cut(p, "PNG"), "cannot be read"),
    "cut16.png": (lambda p: cut(p, "PNG", deep=True), "cannot be read"),
    "cut.jpg": (lambda p: cut(p, "JPEG"), "cannot be read"),
    "cut.webp": (lambda p: cut(p, "WEBP"), "cannot be read"),
    "cut.gif": (lambda p: cut(p, "GIF"), "cannot be read"),
    "cut.tiff": (lambda p: cut(p, "TIFF"), "cannot be read"),
    "cut.bmp": (lambda p: cut(p, "BMP"), "cannot be read"),
    "changed.png": (changed, "cannot be read"),
    "no pixels.tiff": (no_pixels, ""),
    "bomb.png": (bomb, "has more than"),
    "moving.gif": (frames, "is an animation (2)"),
    "moving.webp": (frames, "is an animation (2)"),
    "moving.png": (frames, "is an animation (2)"),
    "pages.tiff": (frames, "is a file of several pages (2)"),
    "floats.tiff": (floats, "has 32-bit pixels"),
    "two\nlines.png": (lambda p: p.write_text("a text"), "is no picture"),
    "dangling.png": (lambda p: p.symlink_to("nowhere"), "No such file"),
    "loop.png": (lambda p: p.symlink_to(p.name), "Too many levels of symbolic links"),
    "a folder.png": (lambda p: p.mkdir(), "has no pictures"),
    "missing.png": (lambda p: None, "does not exist"),
}


def commands(weights: Path) -> dict[str, list[str]]:
    Image.fromarray(np.eye(8, dtype=bool)).save("mask.png")
    repair = ["repair", "--mask", "mask.png", "--weights-file", str(weights)]
    return {**{task: arguments for task, (arguments, _) in TASKS.items()}, "repair": repair}


@pytest.mark.parametrize("task", [*TASKS, "repair"])
@pytest.mark.parametrize("name", REFUSED)
def test_one_line_and_the_folder_as_it_was(
    here: Path, weights: Path, name: str, task: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A result that was there stays, too."""
    make, said = REFUSED[name]
    arguments = commands(weights)[task]
    make(here / name)
    Path("out.png").write_bytes(b"an older result")
    before = sorted(os.listdir())
    assert main([*arguments, name, "--output", "out.png"]) in (1, 2)
    lines = capfd.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and "(--debug" not in errors[0]
    assert name.replace("\n", " ") in errors[0]
    assert sorted(os.listdir()) == before
    assert Path("out.png").read_bytes() == b"an older result"


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "missing.png"])
def test_beside_others(here: Path, weights: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The others are made, and the status says that one is not."""
    REFUSED[name][0](here / name)
    saved(here / "good.png", noise(8, 8, 3))
    status = main(["enhance", name, "good.png", "--output", "made"])
    printed = capfd.readouterr()
    if name == "a folder.png":  # what is wrong with what was asked for is said ahead
        assert status == 2 and not Path("made").exists()
        return
    assert status == 1 and printed.out == "1 written, 1 failed\n"
    assert os.listdir("made") == ["good.png"]


# --- where the result goes ------------------------------------------------------------------------------------------


def hard_link(picture: Path) -> str:
    os.link(picture, "link.png")
    return "link.png"


def symbolic_link(picture: Path) -> str:
    Path("link.png").symlink_to(picture)
    return "link.png"


def written_in(text: str) -> Callable[[Path], str]:
    return lambda picture: text


TARGETS: dict[str, tuple[Callable[[Path], str], int, str]] = {
    "the input": (written_in("in.png"), 2, "in.png is a picture that is to be read"),
    "the input, by another way": (written_in("./x/../in.png"), 2, "is a picture that is to be read"),
    "a symbolic link to the input": (symbolic_link, 2, "link.png is a picture that is to be read"),
    "a kind that is not written": (written_in("out.gif"), 2, "out.gif: pictures are written as"),
    "no kind": (written_in("out"), 2, "--output out"),
    "a folder that cannot be": (written_in("in.png/out.png"), 1, "in.png"),
    "a folder of the system": (written_in("/proc/none/out.png"), 1, "/proc/none"),
    "a name too long": (written_in("x" * 300 + ".png"), 1, "File name too long"),
    "no name": (written_in(""), 2, "in.png is a picture that is to be read"),
}


@pytest.mark.parametrize("task", [*TASKS, "repair"])
@pytest.mark.parametrize("name", TARGETS)
def test_targets(here: Path, weights: Path, name: str, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    target, status, said = TARGETS[name]
    arguments = commands(weights)[task]
    os.mkdir("x")
    saved(here / "in.png", noise(8, 8, 3))
    output = target(here / "in.png")
    before = sorted(os.listdir()), Path("in.png").read_bytes()
    assert main([*arguments, "in.png", "--output", output]) == status
    errors = told(capsys)
    assert len(errors) == 1 and said in errors[0] and "(--debug" not in errors[0]
    assert (sorted(os.listdir()), Path("in.png").read_bytes()) == before


def test_a_folder_that_cannot_be_written(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(here / "in.png", noise(8, 8, 3))
    Path("closed").mkdir(mode=0o555)
    if os.access("closed", os.W_OK):
        pytest.skip("this user may write everywhere")
    assert main(["enhance", "in.png", "--output", "closed/out.png"]) == 1
    (error,) = told(capsys)
    assert "closed" in error and os.listdir("closed") == []


# --- masks ----------------------------------------------------------------------------------------------------------

MASKS: dict[str, tuple[Callable[[Path], object], str]] = {
    **{name: case for name, case in REFUSED.items() if name not in ("a folder.png", "no pixels.tiff")},
    "a folder.png": (lambda p: p.mkdir(), "has no in"),
    "another size.png": (lambda p: saved(p, noise(8, 9, 1)), "the mask is 9x8 pixels, the picture 8x8"),
    "black.png": (lambda p: saved(p, np.zeros((8, 8, 1), np.uint8)), "the mask marks nothing"),
    "white.png": (lambda p: saved(p, np.full((8, 8, 1), 255, np.uint8)), "the mask marks the whole picture"),
    "clear.png": (lambda p: saved(p, np.zeros((8, 8, 4), np.uint8)), "the mask marks nothing"),
}


@pytest.mark.parametrize("name", MASKS)
def test_odd_masks(here: Path, weights: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, said = MASKS[name]
    make(here / name)
    saved(here / "in.png", noise(8, 8, 3))
    before = sorted(os.listdir())
    command = ["repair", "in.png", "--mask", name, "--output", "out.png", "--weights-file", str(weights)]
    assert main(command) in (1, 2)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and "(--debug" not in errors[0]
    assert sorted(os.listdir()) == before


# --- the other pictures of compose ----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--style", "--background"])
@pytest.mark.parametrize("name", [name for name in REFUSED if name != "no pixels.tiff"])
def test_odd_styles_and_backgrounds(here: Path, name: str, option: str, capfd: pytest.CaptureFixture[str]) -> None:
    REFUSED[name][0](here / name)
    saved(here / "in.png", noise(8, 8, 3))
    before = sorted(os.listdir())
    part = "style" if option == "--style" else "cutout"
    assert main(["compose", part, "in.png", option, name, "--output", "out.png"]) in (1, 2)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "(--debug" not in errors[0] and name.replace("\n", " ") in errors[0]
    assert sorted(os.listdir()) == before
