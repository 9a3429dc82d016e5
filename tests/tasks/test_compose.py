"""compose: the commands on people's pictures, good and odd; the same from Python; pictures with people by the real
networks.

Most run on stand-ins whose results NumPy can tell: a style turns a picture into its negative (or a picture's mean
colour), and people are what is red.
"""

from __future__ import annotations

import os
from pathlib import Path
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
from cnnfast.tasks import composing, cutting, pictures, png16, stages, styling
from cnnfast.tasks.cutting import Cutter, cut_out
from cnnfast.tasks.pictures import ImageError, Picture
from cnnfast.tasks.styling import STYLES, Styler, style, weighted
from tests.tasks.test_enhance import BAD, GOOD


class Network(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.ones(()))

    def styled(self, numbers: Tensor) -> nn.Module:
        return nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "style_predictor":
            return x.mean((2, 3)) * self.weight
        assert self.name == "selfie" and x.shape[1] == 3 and not x.shape[2] % 16 and not x.shape[3] % 16
        return (x[:, :1] - x[:, 1:2] > 0.5).to(x.dtype)


def network(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    return Network(name)


def negative(network: Network, numbers: Tensor, pixels: np.ndarray, **options: Any) -> np.ndarray:
    """Of a learnt style; of a picture its mean colour."""
    top = 1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max
    if network.name == "style_any":
        return (np.broadcast_to(numbers.numpy(), pixels.shape) * top).astype(pixels.dtype)
    return (top - pixels).astype(pixels.dtype)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(cutting, "create_model", network)
    monkeypatch.setattr(styling, "create_model", network)
    monkeypatch.setattr(stages, "run", negative)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def person(h: int = 60, w: int = 80, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    """A red block on blue, the middle half each way."""
    top = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    pixels = np.zeros((h, w, channels), dtype)
    pixels[..., 2] = top
    if channels == 4:
        pixels[..., 3] = top
    pixels[h // 4 : -h // 4, w // 4 : -w // 4, :3] = (top, 0, 0)
    return pixels


def inside(h: int = 60, w: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """(surely the block, surely what is behind it)."""
    y, x = np.mgrid[:h, :w]
    far = np.maximum(np.abs(y + 0.5 - h / 2) - h / 4, np.abs(x + 0.5 - w / 2) - w / 4)
    return far < -6, far > 6


def compose(*arguments: str) -> int:
    return main(["compose", *arguments])


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


# --- a style ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
def test_odd_pictures_get_a_style(plain: Path, name: str) -> None:
    GOOD[name](Path(name))
    if name == "black.png":
        Image.new("RGB", (8, 8), "white").save(name)  # whose negative is black
        assert compose("style", name, "--style", "mosaic", "--output", "out.png") == 1
        return
    assert compose("style", name, "--style", "mosaic", "--output", "out.png") == 0
    before, after = pictures.read(name).pixels, pictures.read("out.png").pixels
    assert after.shape == (*before.shape[:2], 3)
    np.testing.assert_array_equal(after, np.broadcast_to(np.iinfo(before.dtype).max - before, after.shape))


@pytest.mark.parametrize("name", BAD)
def test_one_line_and_nothing_written(plain: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, said = BAD[name]
    make(Path(name))
    for arguments in (["style", name, "--style", "mosaic"], ["cutout", name]):
        assert compose(*arguments, "--output", "out.png") == 1
        told = errors(capsys)
        assert len(told) == 1 and said in told[0]
    person_file = Path("person.png")
    Image.fromarray(person()).save(person_file)
    for arguments in (["style", "person.png", "--style", name], ["cutout", "person.png", "--background", name]):
        assert compose(*arguments, "--output", "out.png") == 1
        told = errors(capsys)
        assert len(told) == 1 and said in told[0]
    assert sorted(p.name for p in plain.iterdir()) == sorted([name, "person.png"])


def test_a_folder_with_some_of_them(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("in")
    for name in ("rgb.png", "cmyk.jpg", "palette.gif"):
        GOOD[name](Path("in", name))
    BAD["text.png"][0](Path("in", "text.png"))
    assert compose("style", "in", "--style", "mosaic", "--output", "out") == 1
    assert capsys.readouterr().out == "3 written, 1 failed\n"
    assert sorted(p.name for p in Path("out").iterdir()) == ["cmyk.jpg", "palette.png", "rgb.png"]


@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_stays(plain: Path, channels: int) -> None:
    pixels = noise(20, 30, channels)
    done = style(pixels, "mosaic")
    assert done.shape == (20, 30, 4)
    np.testing.assert_array_equal(done[..., 3], pixels[..., -1])
    seen = pixels[..., -1] > 0
    np.testing.assert_array_equal(done[seen][:, :3], np.broadcast_to(255 - pixels[seen][:, :-1], (seen.sum(), 3)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_the_strength(plain: Path, dtype: type) -> None:
    pixels = np.random.default_rng(0).random((70, 50, 3))
    pixels = pixels.astype(dtype) if np.dtype(dtype).kind == "f" else (pixels * np.iinfo(dtype).max).astype(dtype)
    top = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    for strength in (0.0, 0.25, 1.0):
        done = style(pixels, "mosaic", strength=strength)
        exact = strength * (top - pixels.astype(np.float64)) + (1 - strength) * pixels
        assert done.dtype == dtype and done.shape == pixels.shape
        assert np.abs(done - exact).max() <= (1e-6 if np.dtype(dtype).kind == "f" else 0.51)
    np.testing.assert_array_equal(style(pixels, "mosaic", strength=0), pixels)


def test_larger_strokes(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The style is made on a smaller picture, the result is as large as the picture."""
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(stages, "run", lambda n, v, p, **o: (seen.append(p.shape), negative(n, v, p, **o))[1])
    flat = np.full((90, 120, 3), 50, np.uint8)
    for size in (40, 120, 4000):
        np.testing.assert_array_equal(style(flat, 3, size=size), np.full((90, 120, 3), 205))
    assert seen == [(30, 40, 3), (90, 120, 3), (90, 120, 3)]


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ("mosaic", {15: 1}),
        ("15", {15: 1}),
        (15, {15: 1}),
        (["mosaic", "starry"], {15: 0.5, 19: 0.5}),
        ([("mosaic", 1), ("starry", 3)], {15: 0.25, 19: 0.75}),
        ({"mosaic": 3, 0: 1}, {15: 0.75, 0: 0.25}),
        (["0", "pastel"], {0: 1}),
    ],
)
def test_learnt_styles_and_blends(plain: Path, given: Any, weights: dict[int, float]) -> None:
    expected = torch.zeros(len(STYLES))
    for number, weight in weights.items():
        expected[number] = weight
    torch.testing.assert_close(Styler(given).numbers, expected)


def test_any_picture_is_a_style(plain: Path) -> None:
    """A path, a Pillow image, an array; the middle square; transparency on white; blends by weight."""
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = (255, 51, 0)
    Image.fromarray(wide).save("a=b.png")
    for given in ("a=b.png", Path("a=b.png"), Image.fromarray(wide), wide, Picture(wide.astype(np.uint16) * 257)):
        torch.testing.assert_close(Styler(given).numbers, torch.tensor([1, 0.2, 0]), atol=1e-3, rtol=0)
    clear = np.dstack([wide, np.zeros((40, 80, 1), np.uint8)])
    torch.testing.assert_close(Styler(clear).numbers, torch.ones(3), atol=1e-3, rtol=0)
    grey = np.full((9, 9), 51, np.uint8)
    torch.testing.assert_close(
        Styler([(grey, 1), (wide, 3)]).numbers, torch.tensor([0.8, 0.2, 0.05]), atol=1e-3, rtol=0
    )
    done = style(noise(8, 8, 3).astype(np.float64), wide)
    np.testing.assert_allclose(done[0, 0], [1, 0.2, 0], atol=1e-3)


def test_blends_on_the_command_line(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(styling, "Styler", lambda given, **options: (seen.append(given), Styler(given, **options))[1])
    GOOD["rgb.png"](Path("rgb.png"))
    Path("x=2.png").write_bytes(Path("rgb.png").read_bytes())
    common = ["rgb.png", "--output", "out.png"]
    assert compose("style", *common, "--style", "mosaic=3", "--style", "starry") == 0
    assert compose("style", *common, "--style", "x=2.png", "--style", "x=2.png=0.5") == 0
    assert seen == [[("mosaic", 3.0), ("starry", 1.0)], [("x=2.png", 1.0), ("x=2.png", 0.5)]]


@pytest.mark.parametrize("only", styling.PARTS)
def test_a_style_for_a_part(plain: Path, only: str) -> None:
    pixels = person()
    done = style(pixels, "mosaic", only=only)
    front, behind = inside()
    styled, kept = (behind, front) if only == "background" else (front, behind)
    np.testing.assert_array_equal(done[styled], (255 - pixels)[styled])
    np.testing.assert_array_equal(done[kept], pixels[kept])


# --- a cut-out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [3, 4])
def test_people_before_nothing(plain: Path, dtype: type, channels: int) -> None:
    pixels = person(channels=channels, dtype=dtype)
    done = cut_out(pixels)
    front, behind = inside()
    top = pixels.max()
    assert done.shape == (60, 80, 4) and done.dtype == dtype
    np.testing.assert_array_equal(
        done[front], np.broadcast_to(person(channels=4, dtype=dtype)[front], done[front].shape)
    )
    assert (done[behind][:, 3] == 0).all() and done[..., 3].max() == top
    assert done[behind][:, 2].max() < 0.1 * top  # nothing of what was behind is in the file


def test_people_before_a_picture(plain: Path) -> None:
    """Enlarged to cover, its middle; of other dtypes and channels."""
    pixels = person()
    front, behind = inside()
    halves = np.zeros((20, 200, 3), np.uint8)
    halves[:, 100:] = 200
    wide = cut_out(pixels, halves)
    np.testing.assert_array_equal(wide[front], pixels[front])
    assert (
        set(np.unique(wide[behind][:, 1])) >= {0, 200} and (wide[:8, :30] == 0).all() and (wide[:8, 50:] == 200).all()
    )
    for grey in (np.full((7, 9), 51, np.uint8), np.full((7, 9), 51 * 257, np.uint16), np.full((7, 9, 1), 0.2)):
        done = cut_out(pixels, grey)
        assert (done[behind] == 51).all() and done.shape == pixels.shape
    glass = np.zeros((30, 30, 4), np.uint8)
    glass[..., 1:] = 128
    done = cut_out(pixels, glass)
    assert done.shape == (60, 80, 4)
    np.testing.assert_array_equal(np.unique(done[behind], axis=0), [[0, 128, 128, 128]])
    for colour, value in (("white", (255, 255, 255)), ("#204060", (32, 64, 96))):
        np.testing.assert_array_equal(np.unique(cut_out(pixels, colour)[behind], axis=0), [value])
    deep = cut_out(person(dtype=np.uint16), "#204060")
    np.testing.assert_array_equal(np.unique(deep[behind], axis=0), [[32 * 257, 64 * 257, 96 * 257]])


def test_grey_people(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before nothing or grey the result is grey."""
    monkeypatch.setattr(Network, "forward", lambda self, x: (x[:, :1] > 0.5).to(x.dtype))
    pixels = np.zeros((60, 80), np.uint8)
    pixels[15:-15, 20:-20] = 200
    front, behind = inside()
    alone = cut_out(pixels)
    assert alone.shape == (60, 80, 2) and (alone[front] == (200, 255)).all() and (alone[behind][:, 1] == 0).all()
    done = cut_out(pixels, np.full((5, 5), 30, np.uint8))
    assert done.shape == (60, 80) and (done[front] == 200).all() and (done[behind] == 30).all()
    assert cut_out(pixels, "red").shape == (60, 80, 3)


def test_pictures_give_pictures(plain: Path) -> None:
    image = Image.fromarray(person())
    image.info["icc_profile"] = b"profile"
    done = cnnfast.tasks.cut_out(image)
    assert isinstance(done, Image.Image) and done.mode == "RGBA" and done.info["icc_profile"] == b"profile"
    assert cnnfast.tasks.Cutter(image)(image).mode == "RGB"
    assert cnnfast.tasks.style(image, "mosaic").info["icc_profile"] == b"profile"
    deep = Image.fromarray(noise(20, 30, dtype=np.uint16))
    found = cnnfast.tasks.Styler("mosaic")(deep)  # Pillow has no colours of 16 bits
    assert found.mode == "RGB" and found.size == (30, 20)


def test_nobody_there(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (40, 30), "blue").save("sea.png")
    Image.fromarray(person()).save("person.png")
    assert compose("cutout", "sea.png", "--output", "out.png") == 1
    assert errors(capsys) == ["error: sea.png shows nobody that the network finds"]
    assert compose("style", "sea.png", "--style", "pop", "--only", "background", "--output", "out.png") == 1
    assert errors(capsys) == ["error: sea.png shows nobody that the network finds"]
    assert compose("cutout", "sea.png", "person.png", "--output", "out") == 1
    assert sorted(p.name for p in Path("out").iterdir()) == ["person.png"]
    with pytest.raises(ImageError, match="shows nobody"):
        cut_out(np.zeros((1, 1, 3), np.uint8))


def test_cutouts_on_the_command_line(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("in")
    Image.fromarray(person()).save("in/a.jpg", quality=98)
    png = png16.encode(person(channels=4, dtype=np.uint16), 1)
    Path("in/b.png").write_bytes(png)
    Image.new("RGB", (64, 64), "green").save("meadow.png")
    assert compose("cutout", "in", "--output", "out") == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["a.png", "b.png"]  # a JPEG has no transparency
    assert pictures.read("out/b.png").pixels.dtype == np.uint16 and pictures.read("out/a.png").has_alpha
    assert compose("cutout", "in", "--background", "meadow.png", "--output", "before") == 0
    assert sorted(p.name for p in Path("before").iterdir()) == ["a.jpg", "b.png"]
    _, behind = inside()
    np.testing.assert_array_equal(pictures.read("before/b.png").pixels[behind][0], [0, 128 * 257, 0])
    assert compose("cutout", "in/a.jpg", "--background", "white", "--output", "white.jpg") == 0
    capsys.readouterr()
    assert compose("cutout", "in/a.jpg", "--output", "out.jpg") == 2
    assert errors(capsys) == ["error: out.jpg: JPEG has no transparency: write a .png or .webp"]


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["style", "rgb.png", "--style", "cubism"], 2, "style cubism: expected one of pastel, yellow-ink"),
        (["style", "rgb.png", "--style", "26"], 2, "style 26: expected one of pastel"),
        (["style", "rgb.png", "--style", "mosaic=much"], 2, "--style mosaic=much: expected a number behind ="),
        (["style", "rgb.png", "--style", "mosaic=-1"], 2, "weights of styles must be positive numbers"),
        (["style", "rgb.png", "--style", "mosaic=nan"], 2, "weights of styles must be positive numbers"),
        (["style", "rgb.png", "--style", "pop", "--style", "rgb.png"], 2, "they are of two networks"),
        (
            ["style", "rgb.png", "--style", "pop", "--strength", "1.5"],
            2,
            "--strength 1.5: expected a number from 0 to 1",
        ),
        (["style", "rgb.png", "--style", "pop", "--strength", "nan"], 2, "--strength nan"),
        (["style", "rgb.png", "--style", "pop", "--size", "10"], 2, "--size 10: expected at least 32 pixels"),
        (["style", "rgba.png", "--style", "pop", "--output", "out.jpg"], 2, "out.jpg: JPEG has no transparency"),
        (["style", "none.png", "--style", "pop"], 2, "none.png does not exist"),
        (["cutout", "rgb.png", "--background", "none.png"], 2, "--background none.png: no such file, and no colour"),
        (["cutout", "rgb.png", "--device", "tpu"], 2, "--device tpu"),
    ],
)
def test_what_cannot_be_asked_for(
    plain: Path, arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    GOOD["rgb.png"](Path("rgb.png"))
    Image.fromarray(noise(8, 8, 4)).save("rgba.png")
    output = [] if "--output" in arguments else ["--output", "out.png"]
    assert compose(*arguments, *output) == status
    told = errors(capsys)
    assert len(told) == 1 and said in told[0]
    assert sorted(p.name for p in plain.iterdir()) == ["rgb.png", "rgba.png"]


def test_what_python_cannot_ask_for(plain: Path) -> None:
    for given, said in (
        ([], "no style is given"),
        (None, "style None|None"),
        (True, "style True|True"),
        (2.5, "2.5"),
        (np.zeros((3, 3, 5), np.uint8), r"expected an array"),
    ):
        with pytest.raises(Exception, match=said) as caught:
            weighted(given)
        assert isinstance(caught.value, UsageError), given
    with pytest.raises(UsageError, match="--only sky: expected one of background, person"):
        Styler("pop", only="sky")
    with pytest.raises(UsageError, match="no such file, and no colour"):
        Cutter("ultra")
    with pytest.raises(UsageError, match="expected an array"):
        Cutter()(np.zeros((3, 3, 7), np.uint8))


def test_the_names_of_styles() -> None:
    assert len(STYLES) == len(set(STYLES)) == 26
    assert not any(name.isdecimal() or "=" in name or "." in name for name in STYLES)


# --- trained ----------------------------------------------------------------------------------------------------------


def test_a_person_is_cut_out_and_styled() -> None:
    """A photograph by the real networks: the face stays, what is behind it goes."""
    from cnnfast.tasks.data import photograph

    try:
        image, cutter, styler = photograph("astronaut"), Cutter(), Styler("mosaic", only="background")
    except WeightsError as error:
        pytest.skip(str(error).splitlines()[0])
    before = np.asarray(image)
    alone = np.asarray(cutter(image))
    face, sky = np.s_[60:110, 200:250], np.s_[10:60, 400:500]
    assert (alone[face][..., 3] == 255).mean() > 0.95 and (alone[sky][..., 3] == 0).mean() > 0.95
    done = np.asarray(styler(image))
    assert (done[face] == before[face]).mean() > 0.95
    assert np.abs(done[sky].astype(float) - before[sky]).mean() > 10


@pytest.mark.slow
def test_the_figures(state: Any) -> None:
    try:
        rows = composing.evaluate()
    except WeightsError as error:
        pytest.skip(str(error).splitlines()[0])
    for what, name, plain_way, ours in rows:
        state(f"compose {what}, {name}: {plain_way:.4g} -> {ours:.4g}")
        if what == "style by tiles":
            assert ours < 0.005 < plain_way
