"""The tasks kept from call to call: one network each, one call at a time, what was to be said."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
from PIL import Image

from cnnfast import generators
from cnnfast.cpu import packing
from cnnfast.messages import UsageError
from cnnfast.nn.layers import Sequential
from cnnfast.tasks import cutting, enhancement, pixels, sampling, styling
from cnnfast.tasks.cutting import Cutter
from cnnfast.tasks.drawing import Drawer
from cnnfast.tasks.enhancement import Enhancer
from cnnfast.tasks.masks import painted
from cnnfast.tasks.pictures import Picture
from cnnfast.tasks.pipelines import Pipelines
from cnnfast.tasks.repairing import Repairer
from cnnfast.tasks.sampling import Sampler
from cnnfast.tasks.styling import Styler


class Repeats(nn.Module):
    """Enlarges by repeating pixels, slowly; counts how many calls are in it at once."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        from types import SimpleNamespace

        self.config = SimpleNamespace(scale=scale)

    inside = most = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        Repeats.inside += 1
        Repeats.most = max(Repeats.most, Repeats.inside)
        time.sleep(0.05)
        Repeats.inside -= 1
        return nn.functional.interpolate(x, scale_factor=self.config.scale)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The networks that were made, which are `Repeats`."""
    names: list[str] = []

    def create(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        names.append(name)
        return Repeats(int(name[-1]))

    monkeypatch.setattr(enhancement, "create_model", create)
    return names


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def test_a_network_is_made_once_for_the_same_options(made: list[str]) -> None:
    pipelines, picture = Pipelines(device="cpu"), Picture(noise(8, 9, 3))
    for scale in (2, 2, 4, 2):
        done, remarks = pipelines.enhance(picture, scale=scale)
        np.testing.assert_array_equal(done.pixels, picture.pixels.repeat(scale, 0).repeat(scale, 1))
        assert remarks == []
    assert made == ["span_x2", "span_x4", "span_x2"]


def test_a_failure_leaves_the_next_call_alone(made: list[str]) -> None:
    pipelines, picture = Pipelines(device="cpu"), Picture(noise(8, 9, 3))
    with pytest.raises(UsageError, match="scale=7"):
        pipelines.enhance(picture, scale=7)
    assert pipelines.enhance(picture, scale=2)[0].pixels.shape == (16, 18, 3)


def test_one_call_at_a_time(made: list[str]) -> None:
    pipelines, picture = Pipelines(device="cpu"), Picture(noise(8, 9, 3))
    Repeats.most = 0
    threads = [threading.Thread(target=pipelines.enhance, args=(picture,), kwargs={"scale": 2}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Repeats.most == 1 and made == ["span_x2"]


def test_progress_is_told(made: list[str]) -> None:
    parts: list[float] = []
    Pipelines(device="cpu").enhance(Picture(noise(8, 9, 3)), parts.append, scale=2)
    assert parts[-1] == 1


def test_the_backend_is_that_of_all(made: list[str]) -> None:
    with pytest.raises(ValueError, match="oneDNN"):
        Pipelines(device="cpu", backend="oneDNN").enhance(Picture(noise(8, 9, 3)), scale=2)


def test_drawings_and_their_remarks() -> None:
    drawing, remarks = Pipelines(device="cpu").draw("red heart blurp", 0, 128)
    assert drawing.image.size == (128, 128)
    assert any("blurp" in remark for remark in remarks)


def test_a_large_hole_is_a_remark() -> None:
    picture, mask = Picture(noise(120, 130, 3)), np.zeros((120, 130), bool)
    mask[10:100, 10:100] = True
    _, remarks = Pipelines(device="cpu").repair(picture, mask)
    assert len(remarks) == 1 and remarks[0].startswith("a hole is 90 pixels wide")


def test_a_painting_is_a_mask() -> None:
    """Painted on a picture shown half as large; the colour does not matter, what is half transparent or less does."""
    layer = np.zeros((30, 40, 4), np.uint8)
    layer[5:8, 10:14] = (0, 0, 0, 255)
    layer[20:22, 3:5] = (255, 255, 255, 127)
    layers = [Image.fromarray(layer), Image.new("RGBA", (40, 30))]
    expected = np.zeros((60, 80), bool)
    expected[10:16, 20:28] = True
    np.testing.assert_array_equal(painted(layers, (60, 80, 3)), expected)
    picture = Picture(noise(60, 80, 3))
    done, _ = Pipelines(device="cpu").repair(picture, layers)
    np.testing.assert_array_equal(done.pixels, Repairer(device="cpu").picture(picture, expected).pixels)
    with pytest.raises(UsageError, match="the mask marks nothing"):
        Pipelines(device="cpu").repair(picture, [])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_previews(dtype: type) -> None:
    picture = Picture(np.full((20, 60, 4), np.iinfo(dtype).max, dtype), {"icc_profile": b"profile"})
    shown = pixels.preview(picture, 30)
    np.testing.assert_array_equal(shown.pixels, np.full((10, 30, 4), 255, np.uint8))
    assert shown.info == picture.info and shown.pixels.dtype == np.uint8
    assert pixels.preview(picture, 60).pixels.shape == (20, 60, 4)


@pytest.mark.parametrize(
    "task",
    [
        lambda: Sampler("faces", device="cpu").network,
        lambda: Drawer(device="cpu").network,
        lambda: Enhancer(2, denoise=1, device="cpu").jobs[0].network,
        lambda: Enhancer(2, device="cpu").jobs[0].network,
        lambda: Repairer(device="cpu").network,
        lambda: Styler("mosaic", device="cpu").network,
        lambda: Cutter(device="cpu", sequential=Sequential).network,
    ],
    ids=["generate", "draw", "denoise", "enhance", "repair", "style", "cut out"],
)
def test_a_task_freezes_its_network(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(name: str, pretrained: bool = False, *rest: Any, **options: Any) -> nn.Module:
        return generators.create_model(name, **options).eval()

    for module in (cutting, enhancement, sampling, styling):
        monkeypatch.setattr(module, "create_model", untrained)
    assert packing.PACKS.freeze(task()) == []  # those that were not frozen
