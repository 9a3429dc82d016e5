"""gallery: the sheet of stand-ins."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
from PIL import Image

from cnnfast.__main__ import main
from cnnfast.tasks import gallery
from cnnfast.tasks.gallery import Tile, encoded, sheet

COLOURS = ("red", "lime", "blue", "yellow", "black")


def shown() -> list[Tile]:
    return [Tile(Image.new("RGB", (30, 30 + k), colour), (colour, "a" * 99)) for k, colour in enumerate(COLOURS)]


def test_the_sheet_shows_every_tile_in_its_place() -> None:
    whole = sheet(shown())
    assert whole.size == (4 * 250 + 10, 2 * 286 + 10)
    for k, tile in enumerate(shown()):
        left, top = 10 + k % 4 * 250, 10 + k // 4 * 286
        assert whole.getpixel((left + 120, top + 120)) == tile.image.getpixel((0, 0))
        caption = np.asarray(whole.crop((left, top + 240, left + 250, top + 276)))
        assert caption[:18].min() == 0 and caption[18:].min() == 0, "two lines"
        assert caption[:, 241:].min() == 255, "not beyond the tile"


def test_a_jpeg_within_its_size() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8))
    large, small = encoded(noise), encoded(noise, 60_000)
    assert len(small) <= 60_000 < len(large)
    assert Image.open(io.BytesIO(small)).format == "JPEG"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gallery, "tiles", lambda device: iter(shown()))
    output = tmp_path / "made" / "gallery.jpg"
    assert main(["gallery", "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"wrote {output}: 5 pictures, {output.stat().st_size:,} bytes\n"
    assert Image.open(output).size == sheet(shown()).size and output.stat().st_size < gallery.LARGEST
    assert main(["gallery", "--output", str(tmp_path / "gallery.png")]) == 2
    assert not (tmp_path / "gallery.png").exists()
