"""evaluate: targets held and missed, what could not be had, the files; times of small networks. On stand-ins of the
tasks' own figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("PIL", reason="Pillow is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")

from cnnfast.__main__ import main
from cnnfast.fetch import WeightsError
from cnnfast.nn.layers import Sequential
from cnnfast.tasks import composing, drawing, enhancement, evaluation, figures, repairing
from cnnfast.tasks.figures import Figure
from cnnfast.tasks.speed import WORKLOADS, Speed, Workload, speed
from cnnfast.timing import Timing


class Network(nn.Module):
    def __init__(self, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        self.layers = sequential(nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.ReLU())
        self.given: list[tuple[int, ...]] = []

    def example_input(self, batch: int = 1) -> Tensor:
        return torch.rand(batch, 4, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.given.append((*x.shape, x.is_contiguous(memory_format=torch.channels_last)))
        return self.layers(x)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every task is a stand-in whose targets are held; how networks were built."""
    asked: list[dict[str, Any]] = []

    def build(**options: Any) -> nn.Module:
        asked.append(options)
        return Network(options.get("sequential", Sequential)).eval()

    tones = evaluation.Row("skin tones, unseen", 183, 0.96, 0.99, 25.0, 0.1, 13.0)
    seen = evaluation.Row("seen in training", 700, 0.5, 0.9, 25.0, None, None)
    cases = [repairing.Row("holes", "chelsea", 20.0, 20.7 if k % 5 else 19.9) for k in range(20)]
    gains = (("x2", 1.0), ("x4", 0.9), ("JPEG 30", 0.5))
    monkeypatch.setattr(drawing, "evaluate", lambda **options: [tones, seen])
    monkeypatch.setattr(
        enhancement, "evaluate", lambda **options: [(what, "coffee", 0.0, gain) for what, gain in gains]
    )
    monkeypatch.setattr(repairing, "evaluate", lambda **options: cases)
    monkeypatch.setattr(composing, "evaluate", lambda **options: [("edge", "astronaut", 0.2, 0.1)])
    monkeypatch.setattr(figures, "WORKLOADS", (Workload("generate", "small", build, 2),))
    monkeypatch.setattr(Speed, "held", True)  # of times nothing is asserted
    return asked


def test_all_held(built: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--output", str(tmp_path), "--repeats", "2", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "8 of 8 targets are held" in told and "NO" not in told
    record = json.loads((tmp_path / figures.JSON).read_text())
    held = {row["what"]: row["held"] for row in record["figures"] if row["held"] is not None}
    assert held == {
        "skin tones, unseen: the right one of all is the nearest": True,
        "x2, coffee: PSNR": True,
        "x4, coffee: PSNR": True,
        "JPEG 30, coffee: PSNR": True,
        "number of cases": True,
        "mean of all cases: PSNR inside": True,
        "better than the plain way": True,
    }
    (row,) = record["speed"]
    assert row["images"] == 2 and record["missing"] == []
    assert {name: len(seconds) for name, seconds in row["seconds"].items()} == {
        "eager": 2, "eager channels_last": 2, "cnnfast": 2,
    }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == [figures.JSON, figures.MARKDOWN]
    page = (tmp_path / figures.MARKDOWN).read_text()
    assert "| draw" in page and "| generate" in page and "- Plain, repair: scikit-image's biharmonic filling." in page


@pytest.mark.parametrize(
    ("gain", "status", "said"), [(0.99, 1, "missed: enhance, x2, coffee: PSNR"), (1.0, 0, "1 of 1 targets")]
)
def test_a_target_is_missed(
    built: list[dict[str, Any]],
    gain: float,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(enhancement, "evaluate", lambda **options: [("x2", "coffee", 0.0, gain)])
    assert main(["evaluate", "enhance", "--output", str(tmp_path)]) == status
    assert said in capsys.readouterr().out
    assert json.loads((tmp_path / figures.JSON).read_text())["figures"][0]["held"] is (status == 0)


def test_what_cannot_be_had_is_said_and_the_rest_goes_on(
    built: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_weights(**options: Any) -> nn.Module:
        raise WeightsError("no network")

    def no_font(**options: Any) -> list[evaluation.Row]:
        raise WeightsError("no such font")

    monkeypatch.setattr(drawing, "evaluate", no_font)
    other = Workload("repair", "other", no_weights)
    monkeypatch.setattr(figures, "WORKLOADS", (other, *figures.WORKLOADS))
    assert main(["evaluate", "--output", str(tmp_path), "--repeats", "1"]) == 1
    told = capsys.readouterr().out.splitlines()
    missing = ["draw, figures: could not be had: no such font"]
    missing.append("repair, speed of other: could not be had: no network")
    assert [line for line in told if "could not" in line] == [
        *missing,
        "7 of 7 targets are held; 2 of the above could not be had",
    ]
    record = json.loads((tmp_path / figures.JSON).read_text())
    assert {row["task"] for row in record["figures"]} == {"enhance", "repair", "compose"} and len(record["speed"]) == 1
    assert [f"{m['task']}, {m['what']}: could not be had: {m['why']}" for m in record["missing"]] == missing
    assert all(f"{line}." in (tmp_path / figures.MARKDOWN).read_text() for line in missing)


def test_a_bug_is_not_taken_for_that(
    built: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composing, "evaluate", lambda **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        figures.run(["compose"], tmp_path)


@pytest.mark.parametrize("line", ["evaluate paint", "evaluate --device nonsense", "evaluate draw --repeats 0"])
def test_what_cannot_be_asked_for(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(line.split())
    except SystemExit as error:  # argparse's
        status = int(str(error.code))
    assert status == 2 and not list(tmp_path.iterdir())


def test_the_same_network_in_each_layout(built: list[dict[str, Any]]) -> None:
    made: list[Network] = []

    def build(**options: Any) -> nn.Module:
        built.append(options)
        made.append(Network(options.get("sequential", Sequential)).eval())
        return made[-1]

    found = speed(Workload("enhance", "small", build, side=12), "cpu", repeats=1)
    plain = {"device": "cpu", "sequential": nn.Sequential}
    assert built == [plain, plain, {"device": "cpu"}] and list(found.times) == [
        "eager",
        "eager channels_last",
        "cnnfast",
    ]
    assert [network.given[0] for network in made] == [(1, 4, 12, 12, last) for last in (False, True, True)]
    assert [type(network.layers) for network in made] == [nn.Sequential, nn.Sequential, Sequential]
    assert not found.same
    own = Workload("enhance", "small", lambda **o: build(**{"sequential": nn.Sequential, **o}), side=12)
    assert speed(own, "cpu", repeats=1).same, "the task chose PyTorch's containers"


def test_ratios_are_of_the_best_and_of_the_same_repeat() -> None:
    times = {
        "eager": (3.0, 3.0, 3.0, 3.0),
        "eager channels_last": (1.0, 2.0, 2.0, 4.0),
        "cnnfast": (1.0, 1.0, 4.0, 2.0),
    }
    row = Speed("draw", "", 8, {name: Timing(seconds, 1) for name, seconds in times.items()})
    assert row.best == "eager channels_last" and row.ratio.seconds == (1.0, 2.0, 0.5, 2.0) and row.held
    assert row.rates("eager channels_last") == (4.0, 4.0, 8.0)
    slower = Speed("draw", "", 8, {**row.times, "cnnfast": Timing((4.1,) * 4, 1)})
    assert slower.held is False and slower.cells()[-1] == "NO"
    unclear = Speed("draw", "", 8, {**row.times, "cnnfast": Timing((2.1, 2.1, 2.0, 0.4), 1)})
    assert unclear.ratio.median < 1 and unclear.held is None and unclear.cells()[-1] == "unclear"
    same = Speed("draw", "", 8, unclear.times, same=True)
    assert same.ratio.median < 1 and same.held and same.cells()[-1] == "the same network"
    times = {**unclear.times, "eager": Timing((0.1,) * 4, 1)}
    assert Speed("draw", "", 8, times, same=True).held is False, "in the slower layout"


def test_targets() -> None:
    assert Figure("draw", "", None, 5.0, "%").held is None and Figure("draw", "", None, 5.0, "%").target == ""
    assert Figure("draw", "", 9.0, 95.0, "%", 95).held and not Figure("draw", "", 9.0, 94.99, "%", 95).held
    gain = Figure("enhance", "", 30.0, 31.0, "dB", 1.0, by_gain=True)
    assert gain.held and gain.cells() == ("enhance", "", "30.00", "31.00", "dB", "gain >= 1 dB", "yes")


def test_every_task_has_a_speed() -> None:
    assert {workload.task for workload in WORKLOADS} == set(figures.TASKS)
