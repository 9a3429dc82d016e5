"""The benchmark of training steps, on layers in miniature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import train_step
from benchmarks.cases import CASES, MINI
from benchmarks.timers import wall_clock
from cnnfast.timing import Timing

NAMES = ("eager", "eager channels_last", "cnnfast", "cnnfast NCHW")
MINI_GAN = next(c for c in MINI if c.name == "mini_dcgan" and c.suite == "generator")


def no_timer(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    return {name: Timing((1.0, 1.0), 1) for name in calls}


@pytest.mark.parametrize("bfloat16", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", ["mini_dcgan", "mini_norm", "mini_upsample"])
def test_every_implementation_passes_the_check(name: str, bfloat16: bool) -> None:
    case = MINI_GAN if name == "mini_dcgan" else next(c for c in MINI if c.name == name)
    row = train_step.row(case, 2, bfloat16, NAMES, no_timer, False)
    assert [e.status for e in row.entries] == ["timed"] * len(NAMES), [e.note for e in row.entries]
    assert row.dtype == ("bfloat16 autocast" if bfloat16 else "float32")
    ours = row.entry("cnnfast")
    assert ours is not None and ours.path and row.speedup(ours) is not None


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = train_step.Training.results

    def results(self: train_step.Training) -> list[torch.Tensor]:
        found = real(self)
        if "cnnfast" in type(self.model).__module__:
            found[-1] = 1.1 * found[-1]
        return found

    monkeypatch.setattr(train_step.Training, "results", results)
    row = train_step.row(MINI_GAN, 2, False, NAMES, no_timer, False)
    assert [e.status for e in row.entries] == ["timed", "timed", "wrong result", "wrong result"]


def test_a_generators_noise_needs_no_gradient() -> None:
    container = torch.nn.Sequential
    assert not train_step._training(MINI_GAN, 2, False, False, container, False).x.requires_grad
    block = next(c for c in MINI if c.suite == "upsample")
    assert train_step._training(block, 2, False, False, container, False).x.requires_grad


def test_the_command_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(next(c for c in CASES if c.name == "dcgan64"), make=MINI_GAN.make, input_shape=MINI_GAN.input_shape)
    monkeypatch.setattr(train_step, "training_cases", lambda: ((case, (2,)),))
    monkeypatch.setattr(train_step, "wall_clock", lambda seconds: wall_clock(0.01, 0.001, (2, 2)))
    assert train_step.main(["--quick", "--output", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    text = (folder / "train_step.md").read_text()
    assert "bfloat16 autocast" in text and (folder / "train_step.json").is_file()


def test_an_unknown_case_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(["--case", "nothing"]) == 2
    assert "dcgan64 (16, 64)" in capsys.readouterr().err
