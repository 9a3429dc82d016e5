"""repair: the command on pictures and masks, good and odd; the same from Python; tiles and the whole; the figures.

Most run on a network of random weights in the layout of ``train repair``, as its results need not be good here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")
from PIL import Image

import cnnfast.tasks
from cnnfast import trained
from cnnfast.__main__ import main
from cnnfast.fetch import WeightsError
from cnnfast.generators import RepairConfig, RepairUNet
from cnnfast.messages import CnnfastWarning, UsageError
from cnnfast.tasks import damage, pictures, repair_training
from cnnfast.tasks.data import HELD_OUT, TRAINING
from cnnfast.tasks.filling import fill
from cnnfast.tasks.masks import mask_for
from cnnfast.tasks.pictures import Picture
from cnnfast.tasks.repair_weights import load_network, save_network
from cnnfast.tasks.repairing import Repairer, Row, evaluate, mask_of, table


def random_network(widths: tuple[int, int, int] = (12, 16, 24), seed: int = 0) -> RepairUNet:
    """One that changes what it is given."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RepairUNet(RepairConfig(widths))
        nn.init.normal_(network.leave[0].weight, 0, 0.02)
    return network.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "repair.npz"
    save_network(path, random_network(), {})
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def spot(h: int = 60, w: int = 80, y: int = 20, x: int = 30, side: int = 7) -> np.ndarray:
    mask = np.zeros((h, w), np.uint8)
    mask[y : y + side, x : x + side] = 255
    return mask


def command(weights: Path, *arguments: str) -> int:
    return main(["repair", *arguments, "--weights-file", str(weights)])


# --- pictures and what is kept of them --------------------------------------------------------------------------------

KINDS: dict[str, tuple[str, np.ndarray]] = {
    "rgb": ("in.png", noise(60, 80, 3)),
    "grey": ("in.png", noise(60, 80, 1)),
    "rgba": ("in.png", noise(60, 80, 4)),
    "grey-alpha": ("in.png", noise(60, 80, 2)),
    "rgb16": ("in.png", noise(60, 80, 3, dtype=np.uint16)),
    "grey16": ("in.png", noise(60, 80, 1, dtype=np.uint16)),
    "rgba16": ("in.png", noise(60, 80, 4, dtype=np.uint16)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_outside_the_mask_stay_bit_for_bit(here: Path, weights: Path, kind: str) -> None:
    name, pixels = KINDS[kind]
    pictures.write(Path(name), Picture(pixels))
    Image.fromarray(spot()).save("mask.png")
    assert command(weights, name, "--mask", "mask.png", "--output", "out.png") == 0
    done, inside = pictures.read("out.png").pixels, spot() > 0
    assert done.dtype == pixels.dtype and done.shape == pixels.shape
    np.testing.assert_array_equal(done[~inside], pixels[~inside])
    assert (done[inside] != pixels[inside]).any(1).mean() > 0.9


def test_metadata_and_profile_go_along(here: Path, weights: Path) -> None:
    from PIL import ImageCms

    tags = Image.Exif()
    tags[0x010E], tags[0x0112] = "a description", 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(noise(80, 60, 3)).save("in.png", exif=tags, icc_profile=profile, dpi=(300, 300))
    Image.fromarray(spot()).save("mask.png")  # of the picture as it is seen
    assert command(weights, "in.png", "--mask", "mask.png", "--output", "out.png") == 0
    before, after = pictures.read("in.png"), pictures.read("out.png")
    assert after.info == before.info and after.info["icc_profile"] == profile
    np.testing.assert_array_equal(after.pixels[spot() == 0], before.pixels[spot() == 0])
    assert Image.open("out.png").getexif()[0x010E] == "a description" and after.orientation == 1


def test_what_lay_under_the_mask_does_not_matter(weights: Path) -> None:
    repairer, pixels = Repairer(weights_file=weights), noise(60, 80, 3)
    other = pixels.copy()
    other[spot() > 0] = (255, 0, 255)
    np.testing.assert_array_equal(repairer(pixels, spot()), repairer(other, spot()))


def test_arrays_and_pillow_give_the_same(weights: Path) -> None:
    repairer, pixels = Repairer(weights_file=weights), noise(60, 80, 3)
    done = repairer(pixels, spot())
    image = repairer(Image.fromarray(pixels), Image.fromarray(spot()))
    assert isinstance(image, Image.Image)
    np.testing.assert_array_equal(np.asarray(image), done)
    np.testing.assert_array_equal(cnnfast.tasks.repair(pixels, spot() > 0, weights_file=weights), done)
    grey = repairer(pixels[..., 0], spot())
    assert grey.shape == (60, 80) and grey.dtype == np.uint8
    floats = repairer(pixels / 255, spot())
    assert floats.dtype == np.float64
    np.testing.assert_allclose(floats * 255, done, rtol=0, atol=0.51)


def test_a_new_network_gives_the_biharmonic_filling(tmp_path: Path) -> None:
    save_network(tmp_path / "new.npz", RepairUNet(RepairConfig((6, 8, 12))), {})
    pixels = noise(60, 80, 3) / 255
    done = Repairer(weights_file=tmp_path / "new.npz")(pixels, spot())
    np.testing.assert_allclose(done, fill(pixels.astype(np.float32), spot() > 0), rtol=0, atol=1e-6)


def test_tiles_give_what_the_whole_would(weights: Path) -> None:
    rng, pixels = np.random.default_rng(3), noise(300, 420, 3) / 255
    mask = np.zeros((300, 420), np.uint8)
    for _ in range(40):
        y, x = rng.integers(0, 290), rng.integers(0, 410)
        mask[y : y + 6, x : x + 6] = 255
    repairer = Repairer(weights_file=weights)
    by_tiles = repairer(pixels, mask)
    tight = Repairer(weights_file=weights, memory=4 * 350 * 150**2)(pixels, mask)  # and those in tiles once more
    filled = fill(pixels.astype(np.float32), mask > 0)
    x = torch.from_numpy(np.dstack([filled, mask > 0]).astype(np.float32)).permute(2, 0, 1)[None]
    x = nn.functional.pad(x, (0, -420 % 8, 0, -300 % 8), mode="replicate")
    with torch.inference_mode():
        whole = repairer.network(x)[0, :, :300, :420].permute(1, 2, 0).clamp(0, 1).numpy()
    inside = mask > 0
    np.testing.assert_allclose(by_tiles[inside], whole[inside], rtol=0, atol=1e-5)
    np.testing.assert_allclose(tight[inside], whole[inside], rtol=0, atol=1e-5)


def test_only_the_surroundings_are_computed(weights: Path) -> None:
    seen: list[int] = []
    repairer, pixels = Repairer(weights_file=weights), np.full((2000, 3000, 3), 100, np.uint8)
    repairer.network.register_forward_hook(lambda module, inputs, result: seen.append(inputs[0][0, 0].numel()))
    mask = spot(2000, 3000, 1000, 1500) | spot(2000, 3000, 30, 2980)
    done = repairer(pixels, mask)
    assert len(seen) == 2 and max(seen) < 150**2
    np.testing.assert_array_equal(done[mask == 0], pixels[mask == 0])


def test_a_halo_holds_what_the_network_sees() -> None:
    network = random_network((4, 4, 4)).double()
    x = torch.rand(1, 4, 256, 256, dtype=torch.float64)
    x[:, 3] = 1
    reaches = []
    for offset in range(RepairUNet.multiple):
        at = 128 + offset
        (g,) = torch.autograd.grad(network(x.requires_grad_())[..., at, at].sum(), x)
        lines = (g.abs().sum((0, 1)) > 0).nonzero()
        reaches += [int((lines - at).abs().max())]
    assert RepairUNet.halo - RepairUNet.multiple < max(reaches) <= RepairUNet.halo


# --- transparency -----------------------------------------------------------------------------------------------------


def test_the_same_transparency_around_goes_on_inside(weights: Path) -> None:
    pixels, inside = noise(60, 80, 4), spot() > 0
    pixels[..., 3] = np.where(inside, 255, 130)  # a text written on it
    done = Repairer(weights_file=weights)(pixels, spot())
    assert (done[..., 3] == 130).all()


def test_transparency_that_differs_is_repaired(tmp_path: Path) -> None:
    save_network(tmp_path / "new.npz", RepairUNet(RepairConfig((6, 8, 12))), {})
    pixels, inside = np.full((60, 80, 4), 200, np.uint8), spot() > 0
    pixels[..., 3] = np.linspace(100, 250, 80).round()
    truth = pixels.copy()
    pixels[inside] = 0
    done = Repairer(weights_file=tmp_path / "new.npz")(pixels, spot())
    assert np.abs(done.astype(int) - truth).max() <= 1


def test_colours_that_nobody_sees_do_not_come_in(tmp_path: Path) -> None:
    """Half of the picture is transparent, and black behind that."""
    save_network(tmp_path / "new.npz", RepairUNet(RepairConfig((6, 8, 12))), {})
    pixels = np.full((60, 80, 4), 200, np.uint8)
    pixels[:, 33:] = 0
    done = Repairer(weights_file=tmp_path / "new.npz")(pixels, spot())
    assert (done[spot() > 0][:, :3] > 195).all()
    assert (done[:, 40:] == 0).all()  # as it was, unseen


# --- masks ------------------------------------------------------------------------------------------------------------


def test_kinds_of_masks() -> None:
    expected = spot() > 0
    for mask in (
        spot(),
        expected,
        expected.astype(np.float32),
        spot()[..., None].repeat(3, 2),
        spot().astype(np.uint16) * 257,
        np.dstack([np.full_like(spot(), 255), spot()]),  # white, transparent but for the spot
        Image.fromarray(spot()),
        Image.fromarray(spot()).convert("1"),
        Image.fromarray(spot()).convert("P"),
        Image.fromarray(spot()).convert("RGB"),
        Picture(spot()[..., None]),
    ):
        np.testing.assert_array_equal(mask_for(Picture(noise(60, 80, 3)), mask), expected)


def test_soft_edges_count_from_half_on() -> None:
    mask = np.zeros((10, 256), np.uint8)
    mask[:] = np.arange(256)
    found = mask_for(Picture(noise(10, 256, 3)), mask)
    np.testing.assert_array_equal(found, mask >= 128)


def test_growing() -> None:
    found = mask_for(Picture(noise(60, 80, 3)), spot(), grow=2)
    np.testing.assert_array_equal(found, spot(y=18, x=28, side=11) > 0)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_of_the_picture_as_it_lies_in_the_file_is_turned(here: Path, weights: Path, orientation: int) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    stored = noise(80, 60, 3)  # seen, it is 80 pixels wide
    Image.fromarray(stored).save("in.png", exif=tags)
    lies = spot(80, 60)
    Image.fromarray(lies).save("lies.png")
    Image.fromarray(lies).save("turned.png", exif=tags)
    Image.fromarray(pictures.turned(lies, orientation)).save("seen.png")
    for mask in ("lies.png", "turned.png", "seen.png"):
        assert command(weights, "in.png", "--mask", mask, "--output", mask.replace(".", "-out.")) == 0
    results = [pictures.read(f"{mask}-out.png").pixels for mask in ("lies", "turned", "seen")]
    for found in results[1:]:
        np.testing.assert_array_equal(found, results[0])
    changed = (results[0] != pictures.turned(stored, orientation)).any(2)
    assert changed[pictures.turned(lies, orientation) > 0].mean() > 0.9


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (spot(80, 60), "the mask is 60x80 pixels, the picture 80x60: they have to be of one size"),
        (spot(30, 40, 5, 5), "the mask is 40x30 pixels, the picture 80x60"),
        (np.zeros((60, 80), np.uint8), "the mask marks nothing: white is what is repaired"),
        (np.full((60, 80), 127, np.uint8), "the mask marks nothing"),
        (np.full((60, 80), 255, np.uint8), "the mask marks the whole picture"),
        (spot().astype(np.float32), "a mask of floats has values from 0 to 1"),
        (spot().astype(np.int32), "expected a mask of bool, uint8, uint16 or floats from 0 to 1, got int32"),
        (np.zeros((60, 80, 5), np.uint8), r"expected a mask \(H, W\) or \(H, W, 1 to 4\), got \(60, 80, 5\)"),
    ],
)
def test_masks_that_do_not_fit(mask: np.ndarray, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        mask_for(Picture(noise(60, 80, 3)), mask)


def test_a_hole_that_is_not_small_is_told(weights: Path) -> None:
    mask = spot(200, 200, 40, 40, 120)
    with pytest.warns(CnnfastWarning, match=r"a hole is 12\d pixels wide: this is for small ones, up to 64"):
        Repairer(weights_file=weights)(noise(200, 200, 3), mask)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["in.png", "--mask", "none.png"], 2, "--mask none.png does not exist"),
        (["none.png", "--mask", "mask.png"], 2, "none.png does not exist"),
        (["in.png", "--mask", "small.png"], 2, "in.png and small.png: the mask is 40x30 pixels, the picture 80x60"),
        (["in.png", "--mask", "black.png"], 2, "in.png and black.png: the mask marks nothing"),
        (["in.png", "--mask", "text.png"], 1, "text.png is no picture"),
        (["text.png", "--mask", "mask.png"], 1, "text.png is no picture"),
        (["in.png", "--mask", "mask.png", "--grow", "-1"], 2, "--grow -1: expected 0 to 64 pixels"),
        (["in.png", "--mask", "mask.png", "--dtype", "float16", "--device", "meta"], 2, "--device meta"),
    ],
)
def test_one_line_and_nothing_written(
    here: Path, weights: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, said: str
) -> None:
    Image.fromarray(noise(60, 80, 3)).save("in.png")
    Image.fromarray(spot()).save("mask.png")
    Image.fromarray(spot(30, 40, 5, 5)).save("small.png")
    Image.new("L", (80, 60)).save("black.png")
    Path("text.png").write_text("a text")
    before = sorted(os.listdir())
    assert command(weights, *arguments, "--output", "out.png") == status
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0]
    assert sorted(os.listdir()) == before


def test_a_folder_and_its_masks(here: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("in/a.png", "in/more/b.jpg", "in/c.png"):
        os.makedirs(os.path.dirname(name), exist_ok=True)
        Image.fromarray(noise(60, 80, 3)).save(name)
    os.makedirs("masks/more")
    Image.fromarray(spot()).save("masks/a.png")
    Image.fromarray(spot()).save("masks/more/b.webp", lossless=True)
    assert command(weights, "in", "--recursive", "--mask", "masks", "--output", "out") == 1
    said = capsys.readouterr()
    assert said.out == "2 written, 1 failed\n"
    assert "in/c.png: --mask masks has no c (.bmp" in said.err
    assert Path("out/a.png").is_file() and Path("out/more/b.jpg").is_file()
    assert mask_of(Path("in/a.png"), [Path("in/a.png")], Path("masks")) == Path("masks/a.png")


def test_weights_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    with pytest.raises(WeightsError, match="cannot be read"):
        Repairer(weights_file=path)
    path.write_text("a text")
    with pytest.raises(WeightsError, match="holds no weights of 'repair'"):
        Repairer(weights_file=path)
    trained.save(path, nn.Linear(2, 2).state_dict(), {"config": np.array('{"widths": [4, 4, 4]}')})
    with pytest.raises(WeightsError, match="of its sizes: weight is unknown"):
        Repairer(weights_file=path)


def test_weights_come_back_in_half_precision(weights: Path) -> None:
    network = random_network()
    for name, tensor in load_network(weights).state_dict().items():
        torch.testing.assert_close(tensor, network.state_dict()[name].half().float(), rtol=0, atol=0)


def test_the_network_in_plain_pytorch() -> None:
    ours, plain = random_network(), RepairUNet(RepairConfig((12, 16, 24)), sequential=nn.Sequential).eval()
    plain.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        x = ours.example_input(2)
        torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="expected three positive numbers"):
        RepairConfig((1, 2))  # type: ignore[arg-type]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_no_picture_is_both_trained_and_measured_on() -> None:
    assert not set(HELD_OUT) & set(TRAINING)
    assert not {p.file.sha256 for p in HELD_OUT.values()} & {p.file.sha256 for p in TRAINING.values()}


def test_the_shipped_weights() -> None:
    """Small, and of the recipe as it stands, with what the command says."""
    assert len(resources.files(trained).joinpath(trained.SHIPPED["repair"].file).read_bytes()) < 3_000_000
    about = json.loads(str(trained.load("repair")["about"]))
    before, _, epochs = trained.SHIPPED["repair"].command.partition(" --epochs ")
    assert before == "python -m cnnfast train repair"
    recipe = asdict(repair_training.Options(epochs=int(epochs)))
    assert about["options"] == {k: v for k, v in recipe.items() if k not in repair_training.CHANGEABLE}
    assert about["steps"] == int(epochs) * repair_training.STEPS_PER_EPOCH


def rows_of(names: list[str], turns: int) -> list[Row]:
    try:
        return evaluate(names, turns)
    except WeightsError as error:
        pytest.skip(f"the photographs cannot be had: {error}")


def test_figures() -> None:
    rows = rows_of(["camera"], 1)
    assert [(row.damage, row.photograph) for row in rows] == [(kind, "camera") for kind in damage.KINDS]
    assert all(20 < row.biharmonic < 40 and row.gain == row.repaired - row.biharmonic for row in rows)
    assert sum(row.gain for row in rows) / len(rows) > 0.7
    said = table(rows)
    assert len(said.splitlines()) == 2 + len(rows) + 1
    assert said.endswith(f"better in {sum(row.gain > 0 for row in rows)} of 3 cases")
