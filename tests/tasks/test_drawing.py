"""``draw``: what a text becomes, what is said of it, what is refused; the network that ships with the package."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cnnfast
from cnnfast import trained
from cnnfast.__main__ import main
from cnnfast.generators import TextImageConfig, create_model, list_models
from cnnfast.messages import CnnfastWarning, UsageError
from cnnfast.tasks import draw, drawing, sampling
from cnnfast.tasks.drawing import Drawer, colour_of_eyes
from cnnfast.tasks.text_image import Options, Trainer
from cnnfast.tasks.text_weights import load_weights, save_weights
from cnnfast.tasks.words import Vocabulary

from ..text_data import shapes

image_module = pytest.importorskip("PIL.Image")
pytest.importorskip("tqdm")

CPU = torch.device("cpu")
TINY = Options(width=4, image_size=16, batch_size=6, epochs=2, amp="none")
EYES = Vocabulary.of(["brown bear", "eye", "red heart", "heart with arrow", "green eyes monkey"], ["rotes Herz"])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that knows shapes, and the words "eye" and "red"."""
    data = shapes()
    emoji = list(data.emoji)
    emoji[0] = replace(emoji[0], aliases=("eye with red lid",))
    trainer = Trainer(TINY, replace(data, emoji=tuple(emoji)), CPU)
    path = tmp_path_factory.mktemp("weights") / "text.npz"
    save_weights(path, trainer.generator, trainer.vocabulary, {})
    return path


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Seeds and colours of the eyes that were asked for; the eyes are grey."""
    asked: list[tuple[int, str]] = []

    class Painter:
        def __init__(self, model: str, *, seed: int, colours: list[str], device: str) -> None:
            assert model == "eyes"
            asked.append((seed, colours[0]))

        def images(self, first: int, count: int) -> torch.Tensor:
            return torch.zeros(count, 3, 128, 128)

    monkeypatch.setattr(drawing, "Sampler", Painter)
    return asked


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_text_is_drawn_whatever_its_form(weights: Path) -> None:
    drawer = Drawer(weights, device="cpu")
    first = drawer.draw("green post")
    assert first.image.size == (16, 16) and first.image.mode == "RGB" and first.what == "emoji" and not first.remarks
    for text in ("GREEN  Post!", "a green post, please", "grün post", "post green", "green posts", "green wooden post"):
        drawn = drawer.draw(text)
        assert (np.asarray(drawn.image) == np.asarray(first.image)).all() == (text not in ("grün post", "post green"))
        assert bool(drawn.remarks) == (text in ("grün post", "green posts", "green wooden post")), text
    assert drawer.draw("green wooden post").remarks == ("left out, not among the words it knows: 'wooden'",)
    assert np.array_equal(np.asarray(drawer.draw("green post", seed=9).image), np.asarray(first.image))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the text has no words: expected some like 'red heart'"),
        (" \n\t", "the text has no words"),
        ("!!! ❤️", "the text has no words"),
        ("the a of", "the text has no words"),
        ("xyzzy", "it knows none of the words 'xyzzy': --words lists those it knows"),
        ("gren sqare", r"it knows none of the words 'gren' \(near: green\), 'sqare' \(near: square\): --words"),
        ("красное сердце", "it knows none of the words 'красное', 'сердце'"),
        ("x" * 100_000, "it knows none of the words 'xxxxxxxxxxxxxxxxxxxxxxxx'"),
    ],
)
def test_texts_of_unknown_words_are_refused(text: str, message: str, weights: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Drawer(weights, device="cpu").draw(text)
    assert len(str(caught.value)) < 200


def test_in_python(weights: Path) -> None:
    with pytest.warns(CnnfastWarning, match="'shiny red square': left out, not among the words it knows: 'shiny'"):
        image = draw("shiny red square", weights_file=weights, device="cpu")
    assert image.size == (16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(draw("red square", weights_file=weights, device="cpu")), np.asarray(image))


def test_images_of_many_texts(weights: Path) -> None:
    drawer = Drawer(weights, device="cpu")
    texts = ["red square", "blue bar"] * 50
    images = drawer.images(texts)
    assert images.shape == (100, 3, 16, 16)
    torch.testing.assert_close(images[0::2], images[:1].expand(50, -1, -1, -1))
    assert (images[0] - images[1]).abs().max() > 1e-3
    assert drawer.images([]).shape == (0, 3, 16, 16)


# --- eyes -------------------------------------------------------------------------------------------------------------

ABOUT_EYES = {
    "brown eye": "brown",
    "Brown Eyes": "brown",
    "an eye, green": "green",
    "grey eyes": "gray",
    "gray-eye": "gray",
    "hazel eye": "hazel",
    "grayscale eyes": "grayscale",
    "braunes Auge": "brown",
    "grüne Augen": "green",
    "rotes Auge": "red",
    "beautiful brown eyes": "brown",
    "eye": None,
    "eyes": None,
    "brown": None,
    "brown bear eye": None,
    "red heart eyes": None,
    "purple eye": None,
    "blue and green eyes": None,
    "green eyes monkey": None,
    "": None,
}


@pytest.mark.parametrize("text, colour", ABOUT_EYES.items())
def test_which_texts_are_about_eyes(text: str, colour: str | None) -> None:
    found, rest = colour_of_eyes(text, EYES)
    assert found == colour
    if text == "beautiful brown eyes":
        assert list(rest.unknown) == ["beautiful"]


def test_every_colour_of_the_eyes_can_be_named() -> None:
    assert {drawing._COLOURS[name] for name in sampling.COLOURS} == set(sampling.COLOURS)
    assert set(drawing._COLOURS.values()) == set(sampling.COLOURS)


def test_eyes_go_to_the_eyes(weights: Path, painted: list[tuple[int, str]]) -> None:
    drawer = Drawer(weights, device="cpu")
    drawn = drawer.draw("lovely brown eyes", seed=4)
    assert drawn.image.size == (128, 128) and drawn.what == "brown eye"
    assert drawn.remarks == ("left out, not among the words it knows: 'lovely'",)
    drawer.draw("brown eye", seed=4)
    drawer.draw("blue eye", seed=4)
    assert painted == [(4, "brown"), (4, "blue")], "the network is kept"
    assert drawer.draw("eye").what == "emoji" and drawer.draw("red square").what == "emoji" and len(painted) == 2


# --- the command ------------------------------------------------------------------------------------------------------


def run(weights: Path, *arguments: str) -> int:
    return main(["draw", *arguments, "--weights-file", str(weights), "--device", "cpu"])


def test_the_command(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "heart.png"
    assert run(weights, "big red squares", "--output", str(output)) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {output}: emoji, 16x16",
        "read 'squares' as 'square'",
        "left out, not among the words it knows: 'big'",
    ]
    with image_module.open(output) as picture:
        assert picture.size == (16, 16) and picture.format == "PNG"
    assert run(weights, "red", "square", "--size", "50", "--output", str(tmp_path / "x.webp")) == 0
    with image_module.open(tmp_path / "x.webp") as picture:
        assert picture.size == (50, 50) and picture.format == "WEBP"


def test_the_words(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(weights, "--words") == 0
    words = capsys.readouterr().out.split()
    assert words == sorted(words) and {"red", "square", "grunes", "eye"} <= set(words)
    assert run(weights, "GR", "--words") == 0
    assert capsys.readouterr().out.split() == ["green", "grunes"]
    assert run(weights, "zz", "--words") == 2
    assert "it knows no word that begins with 'zz'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (("xyzzy",), 2, "it knows none of the words 'xyzzy'"),
        ((), 2, "the text has no words"),
        (("red square", "--output", "folder"), 2, "--output folder: expected the name of a picture, such as drawing"),
        (("red square", "--output", "x.tiff"), 2, "--output x.tiff: expected a name that ends in"),
        (("red square", "--size", "100000"), 2, "--size 100000: expected at most 8192"),
        (("red square", "--weights-file", "absent.npz"), 1, "absent.npz: No such file"),
    ],
)
def test_what_the_command_refuses(
    arguments: tuple[str, ...],
    status: int,
    message: str,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert main(["draw", "--weights-file", str(weights), "--device", "cpu", *arguments]) == status
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


# --- the network that ships -------------------------------------------------------------------------------------------

# Of pictures that the training does not see, 16x16 each, eight in a row: what `python -m tests.held_out` writes.
HELD_OUT = Path(__file__).resolve().parents[1] / "held_out.png"


@pytest.fixture(scope="module")
def shipped() -> Drawer:
    return Drawer(device="cpu")


def test_what_ships_is_small_and_of_the_configuration_in_the_registry(shipped: Drawer) -> None:
    path = Path(trained.__file__).with_name(trained.SHIPPED["text_image"].file)
    assert path.stat().st_size <= 3_000_000
    assert shipped.network.config == TextImageConfig() and shipped.network.config.image_size == 64
    model = create_model("text_image", pretrained=True)
    assert not model.training and "text_image" in list_models(pretrained=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, shipped.network.state_dict()[name]), name
    assert shipped.made_by["options"]["seed"] == 0 and shipped.made_by["steps"] > 1000


def test_what_ships_draws_as_plain_pytorch_does(shipped: Drawer) -> None:
    plain, vocabulary, _ = load_weights(sequential=nn.Sequential)
    rows, letters = vocabulary.encode([vocabulary.read(t) for t in ("red heart", "woman astronaut dark skin tone")])
    with torch.inference_mode():
        expected = plain(rows, letters)
    ours = shipped.images(["red heart", "woman astronaut dark skin tone"])
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_ships_knows_colours(shipped: Drawer) -> None:
    hearts = {name: shipped.images([f"{name} heart"])[0, :, 24:40, 24:40].mean((1, 2)) for name in ("red", "blue")}
    assert hearts["red"][0] > hearts["red"][2] + 0.8 and hearts["blue"][2] > hearts["blue"][0] + 0.5
    german = shipped.images(["rotes Herz"])[0, :, 24:40, 24:40].mean((1, 2))
    assert (german - hearts["red"]).abs().max() < 0.3


def test_what_ships_draws_what_it_has_not_seen(shipped: Drawer) -> None:
    """Of 32 pictures that were kept back, and no others, the nearest to a drawing is the right one."""
    from ..held_out import NAMES

    with image_module.open(HELD_OUT) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
    real = pixels.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
    drawn = nn.functional.avg_pool2d(shipped.images(NAMES), 4)
    nearest = (drawn[:, None] - real[None]).square().flatten(2).mean(2).argmin(1)
    assert len(NAMES) == len(real) == 32
    wrong = [name for i, name in enumerate(NAMES) if nearest[i] != i]
    assert len(wrong) <= 2, wrong


def test_nothing_of_this_is_imported_by_the_library() -> None:
    assert "cnnfast.tasks" not in {m.__module__ for m in (cnnfast.Sequential, cnnfast.create_model)}
