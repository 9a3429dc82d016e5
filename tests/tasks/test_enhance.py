"""enhance: the command on people's pictures, good and odd; the same from Python; the figures on photographs.

Most run on networks without weights, whose results NumPy can tell: enlarging repeats pixels, denoising changes nothing.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")
from PIL import Image

import cnnfast.tasks
from cnnfast.__main__ import main
from cnnfast.fetch import WeightsError
from cnnfast.messages import UsageError
from cnnfast.tasks import enhancement, pictures, png16
from cnnfast.tasks.enhancement import Enhancer, enhance
from cnnfast.tasks.figures import ENHANCE_LEAST


class Repeats(nn.Module):
    """Enlarges by repeating pixels."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(scale=scale)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x * self.factor, scale_factor=self.config.scale)


class Keeps(nn.Module):
    """Denoises by leaving the picture as it is, cunet's way: without the margin around it, by four means."""

    strides = (2, 2, 4, 2)

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scale=1)

    def forward(self, x: Tensor, means: Sequence[Tensor] = ()) -> Tensor:
        return x[..., 28:-28, 28:-28]

    def mean_map(self, x: Tensor, means: Sequence[Tensor]) -> Tensor:
        stride = self.strides[len(means)]
        return x[..., ::stride, ::stride]


def network(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    return Keeps() if name.startswith("cunet") else Repeats(int(name[-1]))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(enhancement, "create_model", network)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def repeated(pixels: np.ndarray, scale: int = 2) -> np.ndarray:
    return pixels.repeat(scale, 0).repeat(scale, 1)


def command(*arguments: str) -> int:
    return main(["enhance", *arguments])


# --- odd pictures that give a result ----------------------------------------------------------------------------------


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def palette(path: Path) -> None:
    image = Image.fromarray(noise(9, 12, 3)).quantize(8)
    image.save(path, transparency=bytes([0, 128, *[255] * 6]))


GOOD: dict[str, Callable[[Path], None]] = {
    "rgb.png": lambda p: Image.fromarray(noise(20, 30, 3)).save(p),
    "grey.png": lambda p: Image.fromarray(noise(20, 30)).save(p),
    "bits.png": lambda p: Image.fromarray(noise(20, 30) > 99).save(p),
    "grey16.png": lambda p: Image.fromarray(noise(20, 30, dtype=np.uint16)).save(p),
    "rgb16.png": lambda p: p.write_bytes(png16.encode(noise(20, 30, 3, dtype=np.uint16), 1)) and None,
    "palette.png": lambda p: Image.fromarray(noise(9, 12, 3)).quantize(8).save(p),
    "palette.gif": lambda p: Image.fromarray(noise(9, 12, 3)).quantize(8).save(p),
    "1x1.png": lambda p: Image.fromarray(noise(1, 1, 3)).save(p),
    "1x4000.png": lambda p: Image.fromarray(noise(4000, 1, 3)).save(p),
    "4000x1.png": lambda p: Image.fromarray(noise(1, 4000, 3)).save(p),
    "black.png": lambda p: Image.new("RGB", (8, 8)).save(p),
    "turned.png": lambda p: Image.fromarray(noise(20, 30, 3)).save(p, exif=exif(6)),
    "page.tiff": lambda p: Image.fromarray(noise(20, 30, 3)).save(p),
    "picture.bmp": lambda p: Image.fromarray(noise(20, 30, 3)).save(p),
    "wrong-suffix.png": lambda p: Image.fromarray(noise(20, 30, 3)).save(p, "BMP"),
    "cmyk.jpg": lambda p: Image.new("CMYK", (9, 9), (0, 200, 100, 20)).save(p),
    "turned.jpg": lambda p: Image.fromarray(noise(20, 30, 3)).save(p, exif=exif(8)),
    "lossless.webp": lambda p: Image.fromarray(noise(20, 30, 3)).save(p, lossless=True),
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_pictures_give_the_right_one(plain: Path, name: str) -> None:
    GOOD[name](Path(name))
    assert command(name, "--output", "out.png") == 0
    np.testing.assert_array_equal(pictures.read("out.png").pixels, repeated(pictures.read(name).pixels))


def alpha16(p: Path) -> None:
    p.write_bytes(png16.encode(noise(20, 30, 4, dtype=np.uint16), 1))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("rgba.png", lambda p: Image.fromarray(noise(20, 30, 4)).save(p)),
        ("la.png", lambda p: Image.fromarray(noise(20, 30, 2)).save(p)),
        ("rgba16.png", alpha16),
        ("palette.png", palette),
        ("rgba.webp", lambda p: Image.fromarray(noise(20, 30, 4)).save(p, lossless=True)),
    ],
)
def test_transparency_is_enlarged_too(plain: Path, name: str, make: Callable[[Path], None]) -> None:
    make(Path(name))
    assert command(name, "--output", "out.png") == 0
    before, after = pictures.read(name), pictures.read("out.png")
    assert before.alpha is not None and after.alpha is not None and after.pixels.dtype == before.pixels.dtype
    np.testing.assert_array_equal(after.alpha, repeated(before.alpha))
    seen = repeated(before.alpha)[..., 0] > 0
    np.testing.assert_array_equal(after.colours[seen], repeated(before.colours)[seen])


def test_what_is_hidden_does_not_come_out_as_a_rim() -> None:
    """Behind a white disk there is black, which nobody sees: a blur must not find it."""
    y, x = np.mgrid[:32, :32]
    alpha = np.where((x - 16) ** 2 + (y - 16) ** 2 < 100, 255, 0).astype(np.uint8)[..., None]
    colours = np.repeat(alpha, 3, 2)
    assert (pictures.spread_colours(colours, alpha) == 255).all()
    deep = pictures.spread_colours(colours.astype(np.uint16) * 257, alpha)
    assert (deep == 65535).all() and deep.dtype == np.uint16
    nothing = np.zeros_like(alpha)
    assert pictures.spread_colours(colours, nothing) is colours


def test_alpha_that_is_the_same_everywhere(plain: Path) -> None:
    pixels = noise(20, 30, 4)
    pixels[..., 3] = 200
    done = enhance(pixels)
    np.testing.assert_array_equal(done, repeated(pixels))


# --- odd pictures that do not -----------------------------------------------------------------------------------------


def bomb(path: Path) -> None:
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def cut(path: Path) -> None:
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:-3000])


def animation(path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "text.png": (lambda p: p.write_text("a text"), "text.png is no picture"),
    "empty.jpg": (lambda p: p.write_bytes(b""), "empty.jpg is no picture"),
    "cut.jpg": (cut, "cut.jpg cannot be read"),
    "cut.png": (cut, "cut.png cannot be read"),
    "bomb.png": (bomb, "bomb.png has more than"),
    "moving.gif": (animation, "moving.gif is an animation (2): single pictures are taken"),
    "float.tiff": (lambda p: Image.new("F", (4, 4)).save(p), "float.tiff has 32-bit pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_line_and_nothing_written(plain: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, said = BAD[name]
    make(Path(name))
    assert command(name, "--output", "out.png") == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert [line for line in errors if said in line] == [line for line in errors if line.startswith("error: ")]
    assert len([line for line in errors if line.startswith("error: ")]) == 1
    assert [p.name for p in plain.iterdir()] == [name]


def test_a_folder_with_some_of_them(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("in")
    for name in ("rgb.png", "cmyk.jpg", "palette.gif"):
        GOOD[name](Path("in", name))
    for name in ("text.png", "cut.jpg", "bomb.png"):
        BAD[name][0](Path("in", name))
    assert command("in", "--output", "out") == 1
    said = capsys.readouterr()
    assert said.out == "3 written, 3 failed\n"
    assert sum(line.count("error: ") for line in said.err.splitlines()) == 3
    assert sorted(p.name for p in Path("out").iterdir()) == ["cmyk.jpg", "palette.png", "rgb.png"]
    assert command("in", "--output", "out", "--skip-existing") == 1
    assert capsys.readouterr().out == "0 written, 3 there already, 3 failed\n"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["rgb.png", "--output", "out.gif"], 2, "out.gif: pictures are written as"),
        (["rgb.png", "--output", "rgb.png"], 2, "rgb.png is a picture that is to be read"),
        (["none.png", "--output", "out.png"], 2, "none.png does not exist"),
        (["rgba.png", "--output", "out.jpg"], 2, "out.jpg: JPEG has no transparency"),
        (["rgb.png", "--output", "rgba.png/out.png"], 1, "rgba.png"),
        (["rgb.png", "--output", "/proc/none/out.png"], 1, "/proc/none"),
        (["rgb.png", "--output", "out.png", "--scale", "1"], 2, "--scale 1 changes nothing by itself"),
        (["rgb.png", "--output", "out.png", "--model", "best"], 2, "--model best: expected one of span, upconv7"),
        (["rgb.png", "--output", "out.png", "--model", "none.pth"], 2, "--model none.pth: no such file"),
        (["rgb.png", "--output", "out.png", "--model", "upconv7", "--scale", "4"], 2, "upconv7 enlarges by 2 at most"),
        (["rgb.png", "--output", "out.png", "--device", "tpu"], 2, "--device tpu"),
        (["rgb.png", "--output", "out.png", "--dtype", "float16", "--device", "cpu"], 2, "--dtype float16: this CPU"),
    ],
)
def test_what_cannot_be_asked_for(
    plain: Path,
    arguments: list[str],
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cnnfast.cpu.isa import InstructionSet
    from cnnfast.tasks import machine

    monkeypatch.setattr(machine, "instruction_set", lambda: InstructionSet.AVX2)
    GOOD["rgb.png"](Path("rgb.png"))
    Image.fromarray(noise(8, 8, 4)).save("rgba.png")
    assert command(*arguments) == status
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0]
    assert sorted(p.name for p in plain.iterdir()) == ["rgb.png", "rgba.png"]


def test_a_result_that_is_black_or_not_finite(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for factor, said in ((0.0, "gave a black picture"), (float("nan"), "gave values that are not finite")):
        enhancer = Enhancer()
        enhancer.jobs[0].network.factor.data.fill_(factor)  # type: ignore[union-attr, operator]
        with pytest.raises(RuntimeError, match=said):
            enhancer(noise(8, 8, 3))


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "scale", "networks"),
    [
        ({}, 2, ["span_x2"]),
        ({"scale": 4}, 4, ["span_x4"]),
        ({"scale": 3}, 3, ["span_x4"]),
        ({"denoise": 1}, 1, ["cunet_noise1"]),
        ({"scale": 1, "denoise": 0}, 1, ["cunet_noise0"]),
        ({"scale": 2, "denoise": 3}, 2, ["cunet_noise3", "span_x2"]),
        ({"model": "upconv7"}, 2, ["upconv7_x2"]),
        ({"model": "art"}, 4, ["srvgg_x4"]),
        ({"model": "art", "scale": 2}, 2, ["srvgg_x4"]),
        ({"model": "sharp", "denoise": 1}, 4, ["cunet_noise1", "rrdb_x4"]),
    ],
)
def test_which_networks(plain: Path, options: dict[str, Any], scale: int, networks: list[str]) -> None:
    enhancer = Enhancer(**options)
    assert (enhancer.scale, [job.name for job in enhancer.jobs]) == (scale, networks)
    flat = np.full((12, 10, 3), 99, np.uint8)
    np.testing.assert_array_equal(enhancer(flat), np.full((12 * scale, 10 * scale, 3), 99))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(9, 7), (9, 7, 1), (9, 7, 2), (9, 7, 3), (9, 7, 4)])
def test_arrays_give_arrays(plain: Path, dtype: type, shape: tuple[int, ...]) -> None:
    pixels = 0.1 + 0.9 * np.random.default_rng(0).random(shape)  # what is hidden has no colour to keep
    pixels = pixels.astype(dtype) if np.dtype(dtype).kind == "f" else (pixels * np.iinfo(dtype).max).astype(dtype)
    done = cnnfast.tasks.enhance(pixels)
    assert done.dtype == dtype and done.shape == (18, 14, *shape[2:])
    np.testing.assert_allclose(done, repeated(pixels), rtol=1e-6 if np.dtype(dtype).kind == "f" else 0)


def test_pictures_give_pictures(plain: Path) -> None:
    image = Image.fromarray(noise(20, 30, 3))
    image.info["icc_profile"] = b"profile"
    done = cnnfast.tasks.Enhancer(denoise=1, scale=2)(image)
    assert isinstance(done, Image.Image) and done.size == (60, 40) and done.info["icc_profile"] == b"profile"
    np.testing.assert_array_equal(np.asarray(done), repeated(np.asarray(image)))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4,), np.uint8), "expected an array \\(H, W\\) or \\(H, W, 1 to 4\\), got \\(4,\\)"),
        (np.zeros((4, 4, 5), np.uint8), "got \\(4, 4, 5\\)"),
        (np.zeros((0, 4, 3), np.uint8), "got \\(0, 4, 3\\)"),
        (np.zeros((4, 4), np.int64), "expected an array of uint8, uint16 or floats from 0 to 1, got int64"),
    ],
)
def test_arrays_that_are_no_pictures(plain: Path, image: np.ndarray, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        enhance(image)


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys; from cnnfast.__main__ import parser; parser(['env']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


# --- trained ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_figures(state: Callable[[str], None]) -> None:
    """Better than the plain way by so many dB on every photograph."""
    try:
        rows = enhancement.evaluate()
    except WeightsError as error:
        pytest.skip(str(error).splitlines()[0])
    assert len(rows) == 9
    for what, name, before, after in rows:
        state(f"enhance {what} {name}: {before:.2f} -> {after:.2f} dB")
        assert after - before >= ENHANCE_LEAST[what], (what, name)


def test_one_photograph_is_better_and_tiles_are_the_whole() -> None:
    from cnnfast.tasks import tiles
    from cnnfast.tasks.data import photograph

    try:
        enhancer, truth = Enhancer(2), photograph("astronaut").crop((150, 30, 310, 190))
    except WeightsError as error:
        pytest.skip(str(error).splitlines()[0])
    small = truth.resize((80, 80), Image.Resampling.BICUBIC)
    plain_way = small.resize(truth.size, Image.Resampling.BICUBIC)
    assert enhancement.psnr(enhancer(small), truth) > enhancement.psnr(plain_way, truth) + 1
    pixels = np.asarray(small, np.float32) / 255
    whole = tiles.run(enhancer.jobs[0], pixels, side=1000)
    assert np.abs(tiles.run(enhancer.jobs[0], pixels, side=16) - whole).max() <= 1e-5
