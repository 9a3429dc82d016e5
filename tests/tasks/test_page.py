"""Each button of the page, through gradio's own client: what the tasks give, bit for bit, or one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'cnnfast[app]'")
pytest.importorskip("skimage", reason="scikit-image is not installed")
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from cnnfast.fetch import WeightsError
from cnnfast.tasks import page, pictures, png16
from cnnfast.tasks.app import HOST
from cnnfast.tasks.data import photograph
from cnnfast.tasks.pictures import Picture
from cnnfast.tasks.pipelines import Pipelines


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        blocks = page.build(Pipelines(device="cpu"), str(folder))
        try:
            url = page.serve(blocks, HOST, None)
            yield Client(url, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))
        finally:
            blocks.close(verbose=False)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a person.png"
    photograph("astronaut").resize((96, 96)).save(path)
    return path


def expected(work: Any, *arguments: Any, **options: Any) -> Any:
    try:
        return work(*arguments, **options)[0]
    except WeightsError as error:
        pytest.skip(str(error).splitlines()[0])


def check(answer: Any, picture: Path, made: Picture, name: str) -> None:
    """(before, after), the download, what is said."""
    (before, after), file, remarks = answer
    assert Path(file).name == name
    np.testing.assert_array_equal(pictures.read(file).pixels, made.pixels)
    np.testing.assert_array_equal(pictures.read(before).pixels, pictures.read(picture).pixels)
    np.testing.assert_array_equal(pictures.read(after).pixels, made.pixels)
    h, w = made.pixels.shape[:2]
    assert remarks.startswith(f"{w}x{h}, ")


def test_generate(client: Client) -> None:
    made = expected(Pipelines(device="cpu").generate, "eyes", 3, 5, ["blue"])
    shown, together, remarks = client.predict("eyes", 3, 5, ["blue"], api_name="/generate")
    assert len(shown) == 3 and remarks.startswith("3 images, ")
    for item, image in zip(shown, made, strict=True):
        np.testing.assert_array_equal(pictures.read(item["image"]).pixels, image.pixels)
    assert pictures.read(together).pixels.shape == (2 * 130 + 2, 2 * 130 + 2, 3)


def test_draw(client: Client) -> None:
    drawing = Pipelines(device="cpu").draw("red heart", 0, 512)[0]
    shown, file, remarks = client.predict("red heart blurp", 0, api_name="/draw")
    for path in (shown, file):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(drawing.image))
    assert remarks.startswith("emoji, ") and "'blurp'" in remarks


@pytest.mark.parametrize(("denoise", "scale"), [("none", 2), ("1", 1)])
def test_enhance(client: Client, picture: Path, denoise: str, scale: int) -> None:
    options = {"scale": scale, "denoise": None if denoise == "none" else 1}
    made = expected(Pipelines(device="cpu").enhance, pictures.read(picture), **options)
    answer = client.predict(handle_file(picture), scale, denoise, "span", api_name="/enhance")
    check(answer, picture, made, "a person-enhanced.png")


def test_enhance_keeps_16_bits(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    deep = np.random.default_rng(0).integers(0, 65536, (12, 9, 3)).astype(np.uint16)
    path.write_bytes(png16.encode(deep, 1))
    made = expected(Pipelines(device="cpu").enhance, pictures.read(path), scale=2)
    assert made.pixels.dtype == np.uint16
    _, file, _ = client.predict(handle_file(path), 2, "none", "span", api_name="/enhance")
    np.testing.assert_array_equal(pictures.read(file).pixels, made.pixels)


def test_repair(client: Client, picture: Path, tmp_path: Path) -> None:
    layer = np.zeros((96, 96, 4), np.uint8)
    layer[40:46, 20:60] = (255, 32, 96, 255)
    Image.fromarray(layer).save(tmp_path / "layer.png")
    Image.fromarray(layer[..., 3]).save(tmp_path / "mask.png")
    made = Pipelines(device="cpu").repair(pictures.read(picture), layer[..., 3], 1)[0]
    painting = {"background": handle_file(picture), "layers": [handle_file(tmp_path / "layer.png")], "composite": None}
    nothing = {"background": None, "layers": [], "composite": None}
    mask = handle_file(tmp_path / "mask.png")
    for given in ((painting, None, 1), (nothing, mask, 1)):
        answer = client.predict(handle_file(picture), *given, api_name="/repair")
        check(answer, picture, made, "a person-repaired.png")


def test_style(client: Client, picture: Path) -> None:
    style = [("mosaic", 0.75), ("lace", 0.25)]
    made = expected(Pipelines(device="cpu").style, pictures.read(picture), style=style, strength=0.5)
    answer = client.predict(handle_file(picture), "mosaic", "lace", 0.25, None, 0.5, "all of it", api_name="/style")
    check(answer, picture, made, "a person-styled.png")


def test_a_picture_as_the_style(client: Client, picture: Path, tmp_path: Path) -> None:
    own = tmp_path / "coffee.png"
    photograph("coffee").save(own)
    made = expected(Pipelines(device="cpu").style, pictures.read(picture), style=str(own), only="background")
    answer = client.predict(
        handle_file(picture), "mosaic", "lace", 0.5, handle_file(own), 1, "background", api_name="/style"
    )
    check(answer, picture, made, "a person-styled.png")


@pytest.mark.parametrize("behind", ["nothing", "a colour", "a picture"])
def test_cut_out(client: Client, picture: Path, tmp_path: Path, behind: str) -> None:
    scene = tmp_path / "coffee.png"
    photograph("coffee").save(scene)
    background = {"nothing": None, "a colour": "#204060", "a picture": pictures.read(scene)}[behind]
    made = expected(Pipelines(device="cpu").cut_out, pictures.read(picture), background)
    answer = client.predict(handle_file(picture), behind, "#204060", handle_file(scene), api_name="/cut_out")
    check(answer, picture, made, "a person-cut-out.png")


ENHANCE = (2, "none", "span")
NO_PAINTING = {"background": None, "layers": [], "composite": None}


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("enhance", (None, *ENHANCE), "choose a picture first"),
        ("enhance", ("text.png", *ENHANCE), "text.png is no picture"),
        ("enhance", ("picture.png", 1, "none", "span"), "--scale 1 changes nothing by itself"),
        ("repair", ("picture.png", NO_PAINTING, None, 0), "the mask marks nothing: white is what is repaired"),
        ("repair", ("picture.png", NO_PAINTING, "text.png", 0), "text.png is no picture"),
        ("cut_out", ("picture.png", "a picture", "#204060", None), "choose a picture for the background first"),
        ("draw", ("<qqqq>", 0), "it knows none of the words"),
        ("draw", ("", 0), "the text has no words"),
    ],
)
def test_what_fails_is_one_line(
    client: Client, tmp_path: Path, name: str, arguments: tuple[Any, ...], said: str
) -> None:
    (tmp_path / "text.png").write_text("a text")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "picture.png")
    files = {n: handle_file(tmp_path / n) for n in ("text.png", "picture.png")}
    given = [files.get(a, a) if isinstance(a, str) else a for a in arguments]
    with pytest.raises(AppError) as caught:
        client.predict(*given, api_name=f"/{name}")
    message = str(caught.value)
    assert said in message and "\n" not in message and "<" not in message


def test_results_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "_KEPT", 3)
    answers = page.Answers(Pipelines(device="cpu"), str(tmp_path))
    files = [answers._file(f"{k}.png", Picture(np.zeros((2, 2, 3), np.uint8))) for k in range(5)]
    assert [Path(file).exists() for file in files] == [False, False, True, True, True]
    assert len(list(tmp_path.iterdir())) == 3


def test_the_page_asks_nothing_of_other_machines(client: Client) -> None:
    """Fonts, scripts and pictures of what is sent; the browser is told so besides, see `test_app`."""
    config = client.config
    assert not config["analytics_enabled"] and not config["stylesheets"]
    assert "share" not in {b for c in config["components"] for b in c["props"].get("buttons") or []}
    pictured = [c for c in config["components"] if c["type"] in ("image", "gallery", "imageslider", "imageeditor")]
    assert len(pictured) == 7
    # Where it is not said which buttons there are, "share" is among them.
    assert all(c["props"]["buttons"] is not None for c in pictured)
