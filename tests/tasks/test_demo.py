"""The demonstration end to end with a small random network: what it prints, writes and returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cnnfast import CnnfastWarning
from cnnfast.__main__ import main
from cnnfast.generators import DCGANConfig, DCGANGenerator
from cnnfast.messages import CnnfastError, UsageError
from cnnfast.tasks import demo, env
from cnnfast.tasks.demo import Options, Row
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


def rows(*seconds: float) -> list[Row]:
    """cnnfast three quarters of the time of the best of the others."""
    parts = {"eager": 2.0, "eager channels_last": 4 / 3, "cnnfast": 1.0}
    return [Row(torch.float32, 16, {name: Timing(tuple(p * t for t in seconds), 1) for name, p in parts.items()})]


def test_table_and_ratio() -> None:
    (row,) = rows(0.003)
    assert row.ratio == pytest.approx(4 / 3)
    head, line, note = demo.table(rows(*[0.003] * 5)).splitlines()
    assert head.split("  ")[-1] == "cnnfast against the best eager" and head.index("eager") == line.index("6.00")
    assert line == "float32, batch 16  6.00 [6.00, 6.00]  4.00 [4.00, 4.00]      3.00 [3.00, 3.00]  1.33x"
    assert note == "ms per batch: median [quartiles] of 5 interleaved repeats; above 1x cnnfast is faster"


@pytest.mark.parametrize("repeats", [1, 4])
def test_few_repeats_are_said_to_tell_little(repeats: int) -> None:
    text = demo.table(rows(*[0.003] * repeats))
    assert f"NOTE: too few repeats ({repeats}) to know the spread: take ratios from --repeats 5 or more" in text


def test_a_large_spread_is_said() -> None:
    assert "NOTE: the spread is large" in demo.table(rows(0.003, 0.003, 0.004, 0.006, 0.009))


def test_a_failed_drawing_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")

    def fail(self: object, buffer: object, **options: object) -> None:
        raise RuntimeError("no more ink")

    monkeypatch.setattr(image_module.Image, "save", fail)
    with pytest.raises(RuntimeError, match="no more ink"):
        demo.draw_faces(path, {"plain PyTorch": torch.zeros(1, 3, 4, 4)})
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def nothing(*args: object, **kwargs: object) -> None:
    raise AssertionError("the work has begun")


def test_an_output_that_cannot_be_written_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "create_model", nothing)
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        assert main(["demo", "--device", "cpu", "--output", str(tmp_path / name)]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith(f"error: {tmp_path}/file")
        assert captured.err.count("\n") == 1


def test_missing_weights_end_with_a_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cnnfast", "demo", "--weights-file", str(tmp_path / "none.whl"), "--output"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"error: --weights-file: {tmp_path}/none.whl is not a file\n"
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "REQUIRES", {"tqdm": "tqdm", "pillow": "no_such_module", "more": "nor_this_one"})
    with pytest.raises(CnnfastError, match="^the demo needs pillow, more: pip install pillow more$"):
        demo.run(options(tmp_path), small)
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_asked_for_and_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "cuda_error", lambda: "no driver")
    with pytest.raises(UsageError, match="^--device cuda:1: no driver$"):
        demo.run(Options(output=tmp_path, device="cuda:1"), small)
    with pytest.raises(UsageError, match="^--device gpu: Expected one of cpu, cuda"):
        demo.run(Options(output=tmp_path, device="gpu"), small)


def test_a_device_that_times_are_not_taken_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "choose_device", lambda device: torch.device("mps"))
    with pytest.raises(UsageError, match="^--device mps: times are taken on the CPU and on CUDA devices$"):
        demo.run(Options(output=tmp_path, device="mps"), small)


def test_a_cache_that_cannot_be_written_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning on the way does not stop the command, and is no two lines of Python's."""

    def warns(*args: object) -> int:
        import warnings

        warnings.warn("cnnfast: weights.bin is not kept", CnnfastWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(demo, "run", warns)
    assert main(["demo"]) == 0
    assert capsys.readouterr().err == "cnnfast: weights.bin is not kept\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(Options(output=tmp_path, repeats=2), small) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
