"""user_models.py: spandrel's answers become jobs, and each way in which it cannot answer is one line."""

from __future__ import annotations

import importlib
import sys
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cnnfast.generators.rrdb import RRDB, RRDBConfig
from cnnfast.generators.srvgg import SRVGG, SRVGGConfig
from cnnfast.messages import CnnfastError, UsageError
from cnnfast.tasks import tiles, user_models


class Tiling(Enum):
    SUPPORTED = 1
    DISCOURAGED = 2
    INTERNAL = 3


class Descriptor(SimpleNamespace):
    pass


def descriptor(**changes: Any) -> Descriptor:
    model = nn.Sequential(nn.Conv2d(3, 12, 5, padding=2), nn.PixelShuffle(2))
    needs = SimpleNamespace(minimum=0, multiple_of=1, square=False)
    facts = dict(model=model, scale=2, input_channels=3, output_channels=3, tiling=Tiling.SUPPORTED, purpose="SR")
    facts |= dict(architecture=SimpleNamespace(name="Net"), size_requirements=needs)
    return Descriptor(**{**facts, **changes})


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, list[Any]]:
    """(a file, the list whose one element a stand-in for spandrel finds in it)."""
    answer: list[Any] = [descriptor()]

    class Loader:
        def __init__(self, device: str) -> None:
            pass

        def load_from_file(self, path: Path) -> Any:
            if isinstance(answer[0], Exception):
                raise answer[0]
            return answer[0]

    fake = SimpleNamespace(ModelLoader=Loader, ImageModelDescriptor=Descriptor, ModelTiling=Tiling)
    monkeypatch.setitem(sys.modules, "spandrel", fake)  # type: ignore[arg-type]
    (tmp_path / "mine.pth").write_bytes(b"x")
    return tmp_path / "mine.pth", answer


def test_a_job_of_what_it_says(found: tuple[Path, list[Any]]) -> None:
    path, answer = found
    job = user_models.load(path)
    assert (job.name, job.halo, job.scale, job.multiple) == ("mine.pth (Net)", 2, 2, 1)
    assert job.tiled and job.differs is None
    pixels = np.random.default_rng(0).random((50, 40, 3), dtype=np.float32)
    assert np.abs(tiles.run(job, pixels, side=16) - tiles.run(job, pixels, side=100)).max() <= 1e-5
    answer[0] = descriptor(tiling=Tiling.DISCOURAGED)
    assert user_models.load(path).differs == "its results depend on the whole picture"
    answer[0] = descriptor(tiling=Tiling.INTERNAL)
    assert not user_models.load(path).tiled


class Picky(nn.Module):
    """Takes squares of at least 32 pixels, multiples of 8."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == x.shape[-2] >= 32 and x.shape[-1] % 8 == 0, x.shape
        return x


def test_sizes_that_it_wants(found: tuple[Path, list[Any]]) -> None:
    path, answer = found
    needs = SimpleNamespace(minimum=32, multiple_of=8, square=True)
    answer[0] = descriptor(model=Picky(), scale=1, size_requirements=needs)
    job = user_models.load(path)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 21, 3)).astype(np.uint8)
    for side in (16, 100):
        np.testing.assert_array_equal(tiles.run(job, pixels, side=side), pixels)


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (
            ValueError("no such architecture"),
            UsageError,
            "mine.pth: spandrel does not read it: ValueError: no such",
        ),
        (descriptor(input_channels=4), UsageError, "mine.pth takes 4 channels and gives 3: 1 or 3 are taken"),
        (SimpleNamespace(architecture=SimpleNamespace(name="LaMa"), purpose="Inpainting"), UsageError, "is a LaMa for"),
    ],
    ids=["unknown", "channels", "inpainting"],
)
def test_what_is_refused(found: tuple[Path, list[Any]], answer: Any, error: type, said: str) -> None:
    path, answers = found
    answers[0] = answer
    with pytest.raises(error, match=said):
        user_models.load(path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'spandrel'", name="spandrel"), "pip install 'cnnfast\\[models\\]'"),
        (
            RuntimeError("operator torchvision::nms does not exist"),
            "nms does not exist; torchvision has to be the release that fits torch",
        ),
        (ModuleNotFoundError("No module named 'einops'", name="einops"), "spandrel cannot be imported: .*einops"),
    ],
    ids=["missing", "torchvision", "einops"],
)
def test_where_spandrel_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, said: str
) -> None:
    def fails(name: str) -> None:
        raise error

    monkeypatch.setattr(user_models, "importlib", SimpleNamespace(import_module=fails))
    path = tmp_path / "mine.pth"
    path.write_bytes(b"x")
    with pytest.raises(CnnfastError, match=said) as caught:
        user_models.load(path)
    assert "\n" not in str(caught.value)


def test_spandrel_itself_knows_published_layouts(tmp_path: Path) -> None:
    """Our RRDB and SRVGG, saved as Real-ESRGAN saves them, and their results."""
    try:
        importlib.import_module("spandrel")
    except Exception as error:
        pytest.skip(f"spandrel cannot be imported: {error}")
    torch.manual_seed(0)
    for key, network in (
        ("params", SRVGG(SRVGGConfig(4, 16, 4))),
        ("params_ema", RRDB(RRDBConfig(2, 16, 32))),
    ):
        path = tmp_path / f"{key}.pth"
        torch.save({key: network.state_dict()}, path)
        job = user_models.load(path)
        assert job.scale == 4 and job.tiled
        x = torch.rand(1, 3, 24, 20)
        with torch.inference_mode():
            torch.testing.assert_close(job.network(x), network(x), rtol=1e-4, atol=1e-5)
