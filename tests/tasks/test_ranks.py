"""ranks.py: the parts of several processes, and that they make what one makes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL.Image")
pytest.importorskip("tqdm")

from cnnfast.__main__ import main
from cnnfast.messages import UsageError
from cnnfast.tasks import machine, ranks, sampling
from cnnfast.tasks.ranks import Ranks

from ..rank_jobs import small_generator

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def among(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


# --- the place --------------------------------------------------------------------------------------------------------


def test_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.here() == Ranks(0, 1, 0, 1) and ranks.here().name == "" and ranks.here().bar_off is None
    among(monkeypatch, 5, 8)
    assert ranks.here() == Ranks(5, 8, 0, 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ranks.here() == Ranks(5, 8, 1, 4) and ranks.here().name == "rank 5 of 8: " and ranks.here().bar_off


@pytest.mark.parametrize(
    "given", [{"RANK": "0"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"},
              {"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "first"}]
)  # fmt: skip
def test_what_no_launcher_sets(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    said = " ".join(f"{name}={value}" for name, value in given.items())
    with pytest.raises(UsageError, match=f"^{said}: expected 0 <= RANK < WORLD_SIZE"):
        ranks.here()


def test_every_piece_is_one_process_s() -> None:
    parts = [Ranks(rank, 3).part(range(8)) for rank in range(3)]
    assert sorted(k for part in parts for k in part) == list(range(8))
    assert [len(part) for part in parts] == [3, 3, 2]
    assert Ranks().part("abc") == "abc"


@pytest.mark.parametrize("devices, chosen", [(0, None), (1, None), (2, 1), (8, 3)])
def test_each_has_its_device(devices: int, chosen: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    ranks.take_device(Ranks())
    ranks.take_device(Ranks(7, 16, 3, 4))
    assert taken == ([] if chosen is None else [chosen])


def test_memory_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    free = machine.memory_to_use(torch.device("cpu"))
    among(monkeypatch, 0, 64)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert 0 < machine.memory_to_use(torch.device("cpu")) < free / 8
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64.0, 80.0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert machine.memory_to_use(torch.device("cuda")) == 64 / 2 / 4


# --- the work ---------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("more", [["--count", "50"], ["--model", "eyes", "--count", "3", "--walk", "40"]])
def test_images_are_the_same_whatever_the_number_of_processes(
    more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sampling, "create_model", small_generator)

    def run(folder: str, *options: str) -> str:
        assert main(["generate", "--device", "cpu", *more, "--output", str(tmp_path / folder), *options]) == 0
        return capsys.readouterr().out

    run("one")
    one = files_of(tmp_path / "one")
    assert len(one) == len(set(one.values())) == (50 if "--count" == more[0] else 40)
    for rank in range(3):
        among(monkeypatch, rank, 3)
        assert run("three").startswith(f"rank {rank} of 3: wrote ")
    assert files_of(tmp_path / "three") == one
    # After a stop, with another number of processes: only what is missing is written.
    for k in (3, 17, 18, 39):
        (tmp_path / "three" / f"{k:06d}.png").unlink()
    (tmp_path / "three" / "000005.png").write_bytes(b"kept")
    said = []
    for rank in range(2):
        among(monkeypatch, rank, 2)
        said.append(run("three", "--skip-existing"))
    assert files_of(tmp_path / "three") == {**one, "000005.png": b"kept"}
    for text, part in zip(said, (32, 18) if len(one) == 50 else (24, 16), strict=True):
        assert ": wrote 2 images of " in text and text.endswith(f"; {part - 2} were there already\n"), text


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_and_going_on(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a file."""
    monkeypatch.setattr(sampling, "create_model", small_generator)
    synchronise, calls = os.fsync, []

    def stopped(file: int) -> None:
        calls.append(file)
        if len(calls) == 21:
            signal.raise_signal(number)
        synchronise(file)

    command = ["generate", "--device", "cpu", "--count", "40", "--output", str(tmp_path / "out")]
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", stopped)
        assert main(command) == status
    assert signal.getsignal(signal.SIGTERM) == before
    assert "stopped: 20 of 40 written; the same command with --skip-existing goes on" in capsys.readouterr().err
    assert sorted(files_of(tmp_path / "out")) == [f"{k:06d}.png" for k in range(20)], "no temporary file"
    assert main([*command, "--skip-existing"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("wrote 20 images of ") and said.endswith("; 20 were there already\n")
    assert len(files_of(tmp_path / "out")) == 40


def test_one_picture_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.png").write_bytes(b"kept")
    assert main(["generate", "--output", str(tmp_path / "x.png"), "--skip-existing"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/x.png is there already\n"
    assert (tmp_path / "x.png").read_bytes() == b"kept"


@pytest.mark.parametrize(
    "command, message",
    [
        ("generate --output x.png", "--output x.png: 2 processes do not share one picture: give a folder"),
        ("generate --walk 5 --output x.png", "--output x.png: 2 processes do not share one picture"),
        (
            "train text",
            "this command does not share its work (generate, enhance, repair, compose and train gan do): run it as one",
        ),
        ("draw heart", "this command does not share its work"),
        ("demo", "this command does not share its work"),
    ],
)
def test_what_is_not_shared(
    command: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    among(monkeypatch, 1, 2)
    assert main(command.split()) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
    assert not list(tmp_path.iterdir())


# --- processes of their own -------------------------------------------------------------------------------------------


def start(*command: str, **variables: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    # What torchrun would set: threads are the same then, and with them the bits.
    env = {**kept, "OMP_NUM_THREADS": "1", **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


JOB = (sys.executable, "-m", "tests.rank_jobs")
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "-m",
    "tests.rank_jobs",
)


def test_two_processes_at_once(tmp_path: Path) -> None:
    command = (*JOB, "generate", "--device", "cpu", "--count", "40", "--output")
    one = start(*command, str(tmp_path / "one"))
    two = [start(*command, str(tmp_path / "two"), RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for process in (one, *two):
        status, _, err = ended(process)
        assert status == 0, err
    assert len(files_of(tmp_path / "one")) == 40 and files_of(tmp_path / "two") == files_of(tmp_path / "one")


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    command = ("generate", "--device", "cpu", "--count", "40", "--output")
    one, two = start(*JOB, *command, str(tmp_path / "one")), start(*TORCHRUN, *command, str(tmp_path / "two"))
    status, out, err = ended(two)
    assert status == 0 and ended(one)[0] == 0, err
    assert "rank 0 of 2: wrote 24 images" in out and "rank 1 of 2: wrote 16 images" in out
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


@pytest.mark.slow
def test_a_damaged_picture_does_not_end_the_other_process(tmp_path: Path) -> None:
    """torchrun ends all others as soon as one has failed."""
    for name in "abcdef":
        (tmp_path / f"{name}.png").write_bytes(b"" if name in "ac" else name.encode())
    files = [str(tmp_path / f"{name}.png") for name in "abcdef"]
    status, out, err = ended(start(*TORCHRUN, "copy", "b.png", *files, str(tmp_path / "out")))
    assert status != 0
    assert "rank 0 of 2: 1 written, 2 failed" in out and "rank 1 of 2: 3 written" in out, out + err
    assert "rank 0 of 2: error: a.png is damaged" in err
    assert files_of(tmp_path / "out") == {f"{name}.png": name.encode() for name in "bdef"}
