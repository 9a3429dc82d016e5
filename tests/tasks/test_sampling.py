"""``generate``: images by their numbers, walks, files; the trained eyes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cnnfast.__main__ import main
from cnnfast.fetch import WeightsError
from cnnfast.generators import DCGANConfig, DCGANGenerator, create_model
from cnnfast.messages import UsageError
from cnnfast.tasks import generate, sampling
from cnnfast.tasks.sampling import COLOURS, Sampler

image_module = pytest.importorskip("PIL.Image")
pytest.importorskip("tqdm")

FACES = DCGANConfig(nz=6, ngf=4, image_size=16)
EYES = DCGANConfig(nz=6, ngf=4, image_size=32, classes=8, dropout=0.2)


@pytest.fixture(autouse=True)
def tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small generators with random weights in the place of the trained ones."""
    if "real" in request.keywords:
        return

    def model(name: str, pretrained: bool, weights_file: object, *, sequential: type[nn.Sequential]) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = DCGANGenerator(EYES if name == "dcgan_eyes" else FACES, sequential=sequential)
            with torch.no_grad():  # pictures with something in them
                for p in made.parameters():
                    if p.dim() == 4:
                        p.mul_(10)
        return made.eval()

    monkeypatch.setattr(sampling, "create_model", model)


def sampler(model: str = "faces", **options: object) -> Sampler:
    return Sampler(model, device="cpu", **options)  # type: ignore[arg-type]


# --- images by their numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["faces", "eyes"])
def test_an_image_is_the_same_whatever_is_asked_for_with_it(model: str) -> None:
    all_ = sampler(model, seed=3).images(0, 40)
    again = sampler(model, seed=3)
    for first, count in ((0, 1), (39, 1), (5, 3), (15, 2), (0, 16), (16, 16), (31, 9), (0, 40)):
        assert torch.equal(again.images(first, count), all_[first : first + count]), (first, count)
    assert all_.std() > 0.1 and len(all_.flatten(1).unique(dim=0)) == 40
    other = sampler(model, seed=4).images(0, 40)
    assert not (other == all_).flatten(1).all(1).any()
    assert again.images(7, 0).shape == (0, *all_.shape[1:])


def test_noise_is_standard_and_every_image_has_its_own() -> None:
    made = sampler(seed=1)
    noise = torch.stack([made._noise(k) for k in range(2000)])
    assert abs(noise.mean().item()) < 0.05 and noise.std().item() == pytest.approx(1, abs=0.05)
    assert len(noise.unique(dim=0)) == 2000
    assert not torch.equal(made._noise(2**40), made._noise(0))


def test_it_is_the_network_on_that_noise() -> None:
    made = sampler(seed=1)
    z = torch.stack([made._noise(k) for k in range(16)]).view(16, -1, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(made.images(0, 16), made.network(z))


def test_global_random_state_is_left_alone() -> None:
    made, before = sampler("eyes"), torch.get_rng_state()
    first = made.images(0, 3)
    torch.manual_seed(5)
    assert torch.equal(made.images(0, 3), first)
    torch.set_rng_state(before)


def test_colours_in_turn() -> None:
    made = sampler("eyes", colours=["Brown", "grey"])
    labels = [made._label(k).nonzero()[:, 0].tolist() for k in range(4)]
    assert labels == [[COLOURS.index("brown")], [COLOURS.index("gray")]] * 2
    assert [int(sampler("eyes")._label(k).argmax()) for k in range(9)] == [*range(8), 0]
    brown, blue = (sampler("eyes", colours=[c]).images(0, 1) for c in ("brown", "blue"))
    assert not torch.equal(brown, blue)
    assert torch.equal(made.images(0, 1), brown), "the colour of image 0, with the noise of image 0"


def test_a_walk_passes_the_images() -> None:
    made = sampler("eyes", seed=2)
    frames, images = made.walk(3, 13), made.images(0, 4)
    torch.testing.assert_close(frames[::4], images)
    steps = (frames[1:] - frames[:-1]).flatten(1).norm(dim=1)
    assert steps.min() > 0 and steps.max() < (images[1:] - images[:-1]).flatten(1).norm(dim=1).max()
    noise = torch.stack([made._between(0, 1, part).flatten()[:6] for part in (0.0, 0.25, 0.5, 0.75, 1.0)])
    lengths = noise.norm(dim=1)
    assert lengths.min() >= lengths[[0, -1]].min() * 0.999, "not through the middle, where no noise is"
    label = made._between(0, 1, 0.25).flatten()[6:]
    assert label[0] == 0.75 and label[1] == 0.25
    with pytest.raises(ValueError, match="two images and two frames"):
        made.walk(0, 5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "cats"}, "--model cats: expected one of faces, eyes"),
        ({"model": "eyes", "colours": ["purple"]}, "--colour purple: expected one of amber, blue, brown, gray, "),
        ({"colours": ["brown"]}, "--colour brown: --model faces has no colours to choose from; eyes have"),
        ({"seed": -1}, "seed -1: expected a whole number from 0"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sampler(**options)  # type: ignore[arg-type]


def test_in_python() -> None:
    images = generate("eyes", 3, seed=1, first=2, colours=["green"], device="cpu")
    assert [i.size for i in images] == [(32, 32)] * 3 and images[0].mode == "RGB"
    expected = sampler("eyes", seed=1, colours=["green"]).images(2, 3)
    assert np.abs(np.asarray(images[1]) / 127.5 - 1 - expected[1].permute(1, 2, 0).numpy()).max() < 0.005
    assert generate(count=0, device="cpu") == []
    with pytest.raises(ValueError, match="must not be negative"):
        generate(count=-1)


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    return main(["generate", "--device", "cpu", *arguments])


def picture(path: Path) -> np.ndarray:
    with image_module.open(path) as opened:
        return np.asarray(opened.convert("RGB"))


def test_a_grid_and_a_folder_show_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--count", "5", "--output", str(tmp_path / "a" / "grid.png")) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path}/a/grid.png: 5 images of 16x16\n"
    assert run("--count", "20", "--output", str(tmp_path / "each")) == 0
    assert capsys.readouterr().out == f"wrote 20 images, {tmp_path}/each/000000.png to 000019.png\n"
    grid = picture(tmp_path / "a" / "grid.png")
    assert grid.shape == (2 * 18 + 2, 3 * 18 + 2, 3)
    for k, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]):
        part = grid[2 + 18 * row :, 2 + 18 * column :][:16, :16]
        assert np.array_equal(part, picture(tmp_path / "each" / f"{k:06d}.png")), k
    assert len(list((tmp_path / "each").iterdir())) == 20


def test_one_image_has_no_frame(tmp_path: Path) -> None:
    assert run("--count", "1", "--output", str(tmp_path / "one.png")) == 0
    assert picture(tmp_path / "one.png").shape == (16, 16, 3)


@pytest.mark.parametrize("suffix, kind", [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("PNG", "PNG")])
def test_kinds_of_pictures(suffix: str, kind: str, tmp_path: Path) -> None:
    assert run("--count", "4", "--columns", "4", "--output", str(tmp_path / f"x.{suffix}")) == 0
    with image_module.open(tmp_path / f"x.{suffix}") as opened:
        assert opened.format == kind and opened.size == (4 * 18 + 2, 18 + 2)


def test_a_walk_is_a_strip_or_a_folder(tmp_path: Path) -> None:
    assert run("--model", "eyes", "--walk", "9", "--output", str(tmp_path / "walk.png")) == 0
    assert picture(tmp_path / "walk.png").shape == (32 + 4, 9 * 34 + 2, 3)
    assert run("--model", "eyes", "--walk", "9", "--count", "3", "--output", str(tmp_path / "walk")) == 0
    assert len(list((tmp_path / "walk").iterdir())) == 9
    assert run("--model", "eyes", "--output", str(tmp_path / "images")) == 0
    first, last = picture(tmp_path / "walk" / "000000.png"), picture(tmp_path / "walk" / "000008.png")
    assert np.abs(first - picture(tmp_path / "images" / "000000.png").astype(float)).max() <= 1
    assert np.abs(last - picture(tmp_path / "images" / "000002.png").astype(float)).max() <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--output x.txt", "--output x.txt: expected a name that ends in .jpeg, .jpg, .png, .webp, or a folder"),
        ("--walk 1", "--walk 1 --count 2: expected at least 2 of each"),
        ("--walk 5 --count 1", "--walk 5 --count 1: expected at least 2 of each"),
        ("--model eyes --colour pink", "--colour pink: expected one of amber"),
        ("--count 2000000000", "out of memory: a picture of 2000000000 images needs at least"),
    ],
)
def test_what_the_command_refuses(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments.split()) in (1, 2)
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_where_it_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run("--output", str(tmp_path / "file" / "x.png")) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("Not a directory" in said or "File exists" in said)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- the trained eyes -------------------------------------------------------------------------------------------------


def test_the_layout_is_that_of_the_published_weights() -> None:
    state = create_model("dcgan_eyes").state_dict()
    widths = {0: (108, 1024), 4: (1024, 512), 7: (512, 256), 10: (256, 128), 13: (128, 64), 16: (64, 3)}
    assert {k: tuple(v.shape) for k, v in state.items() if v.dim() == 4} == {
        f"main.{i}.weight": (*w, 4, 4) for i, w in widths.items()
    }


def eyes(**options: object) -> Sampler:
    try:
        return Sampler("eyes", device="cpu", **options)  # type: ignore[arg-type]
    except WeightsError as error:
        pytest.skip(f"no trained weights: {error}")


@pytest.mark.real
def test_the_trained_eyes_have_their_colours() -> None:
    """Red minus blue, and green minus the mean of both, in the middle of the picture: means of 32 eyes of a colour."""
    colours = ["blue", "brown", "grayscale", "green", "red", "amber"]
    images = eyes(colours=colours, seed=1).images(0, 32 * len(colours))
    assert images.shape == (192, 3, 128, 128) and images.std() > 0.2
    middle = {}
    for i, colour in enumerate(colours):
        r, g, b = images[i :: len(colours), :, 40:88, 40:88].mean((0, 2, 3)).tolist()
        middle[colour] = r - b, g - (r + b) / 2
    assert middle["blue"][0] < middle["brown"][0] < middle["amber"][0] and middle["red"][0] > middle["blue"][0]
    assert middle["green"][1] == max(m[1] for m in middle.values())
    assert max(map(abs, middle["grayscale"])) < 0.1


@pytest.mark.real
def test_the_trained_eyes_agree_with_plain_pytorch() -> None:
    ours, plain = eyes().images(0, 16), eyes(sequential=nn.Sequential).images(0, 16)
    assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()
