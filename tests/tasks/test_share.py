"""`train gan` by two processes (gloo): to rounding the training of one with the whole batch; they stop together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("tqdm", reason="tqdm is not installed")
from PIL import Image

from cnnfast.__main__ import main
from cnnfast.tasks import train as train_module
from cnnfast.tasks.checkpoint import load_checkpoint, load_generator
from cnnfast.tasks.losses import LOSSES
from cnnfast.tasks.share import Share
from tests import share_jobs

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not dist.is_available() or os.name != "posix", reason="no gloo")


def start(*command: str, **variables: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the jobs gave in each of two processes."""
    folder = tmp_path_factory.mktemp("share")
    processes = [start("-m", "tests.share_jobs", str(rank), str(folder)) for rank in range(2)]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("job", [*LOSSES, "grey"])
def test_the_training_of_one_process(both: list[dict[str, Any]], job: str) -> None:
    """Curves and weights, after steps with batches that two do not share evenly."""
    one = share_jobs.trained("bce", Share(), channels=1) if job == "grey" else share_jobs.trained(job, Share())
    for found in both:
        torch.testing.assert_close(found[job], one)
    assert torch.equal(both[0][job]["curves"], both[1][job]["curves"])


def test_statistics_of_one_process_would_show(both: list[dict[str, Any]]) -> None:
    one = share_jobs.trained("bce", Share())
    assert (both[0]["apart"]["curves"] - one["curves"]).abs().max() > 1e-3


def test_sums_and_questions(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert found["any"] == [False, True, True, True]
        assert torch.equal(found["sums"][0], torch.full((2, 3), 3.0))
        assert torch.equal(found["sums"][1], 2 * torch.arange(4.0).view(2, 2).t())


@pytest.mark.parametrize(("batch", "size"), [(5, 2), (8, 2), (7, 3), (3, 3), (64, 7)])
def test_parts(batch: int, size: int) -> None:
    shares = [Share(rank, size) for rank in range(size)]
    assert [k for s in shares for k in range(batch)[s.part(batch)]] == list(range(batch))
    assert sum(s.weight(batch) for s in shares) == pytest.approx(1)
    lengths = [len(range(batch)[s.part(batch)]) for s in shares]
    assert max(lengths) - min(lengths) <= 1


def test_alone() -> None:
    tensor, module = torch.ones(2), torch.nn.BatchNorm2d(2)
    alone = Share()
    alone.add_up([tensor])
    assert torch.equal(tensor, torch.ones(2)) and alone.synchronised(module) is module
    assert alone.first and alone.weight(5) == 1 and alone.any(True) and not alone.any(False)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 255 - 20 * i, 99)).save(folder / f"{i:02d}.png")
    return folder


def train(pictures: Path, output: Path, *more: str) -> list[str]:
    small = ["--batch-size", "4", "--width", "8", "--nz", "8", "--image-size", "16", "--device", "cpu"]
    return ["train", "gan", "--data", str(pictures), "--output", str(output), *small, *more]


def group() -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} for rank in range(2)]


def test_a_signal_to_one_stops_both_and_one_goes_on_alone(pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = ["-m", "cnnfast", *train(pictures, output, "--epochs", "100000")]
    first, second = (start(*command, **variables) for variables in group())
    try:
        assert first.stdout is not None
        lines = iter(first.stdout.readline, "")
        assert any(line.startswith("epoch 2/") for line in lines)
        second.send_signal(signal.SIGTERM)
        told = [line for line in lines if line.startswith("Stopped after step ")]
        errors = [process.communicate(timeout=120)[1] for process in (first, second)]
    finally:
        for process in (first, second):
            process.kill()
    assert (first.returncode, second.returncode) == (143, 143), errors
    state = load_checkpoint(output / "checkpoint.pt", "gan")
    assert len(told) == 1 and told[0].startswith(f"Stopped after step {state['steps']} of ")
    epochs = str(-(-state["steps"] // 3) + 1)
    assert main(["train", "gan", "--output", str(output), "--resume", "--epochs", epochs]) == 0
    assert load_checkpoint(output / "checkpoint.pt", "gan")["steps"] == 3 * int(epochs)
    assert load_generator(output / "checkpoint.pt")(torch.zeros(1, 8, 1, 1)).isfinite().all()


@pytest.mark.slow
def test_torchrun(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "two"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "cnnfast"]
    process = start(*launcher, *train(pictures, output, "--epochs", "2"))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("trained 2 epochs; ") == 1 and "batches of 4 by 2 processes" in out
    assert main(train(pictures, tmp_path / "one", "--epochs", "2")) == 0
    one, two = (load_checkpoint(tmp_path / name / "checkpoint.pt", "gan") for name in ("one", "two"))
    torch.testing.assert_close(two["curves"], one["curves"])
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--batch-size", "1"], "--batch-size 1: 2 processes want an image each, at least"),
        (["--layers", "torch"], "--layers torch: PyTorch's SyncBatchNorm is for GPUs"),
    ],
)
def test_what_two_cannot(
    pictures: Path,
    tmp_path: Path,
    more: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train_module, "together", lambda ranks: nullcontext(Share(1, 2)))
    assert main(train(pictures, tmp_path / "out", *more)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {said}") and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "out").exists()
