"""The benchmark of training steps, on layers in miniature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import cases, train_step
from benchmarks.compare import compare
from benchmarks.peers import named
from benchmarks.timers import wall_clock
from benchmarks.workload import Implementation, Prepared, TrainingWorkload
from cnnfast.timing import Timing

PEERS = named(*(name for name in train_step.NAMES if "compile" not in name))
MINI_GAN = next(c for c in cases.MINI if c.name == "mini_dcgan" and c.suite == "generator")
BLOCK = next(c for c in cases.MINI if c.name == "mini_upsample")


def no_timer(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    return {name: Timing((1.0, 1.0), 1) for name in calls}


@pytest.mark.parametrize("dtype", cases.DTYPES["cpu"], ids=str)
@pytest.mark.parametrize("name", ["mini_dcgan", "mini_norm", "mini_upsample"])
def test_every_implementation_passes_the_check(name: str, dtype: torch.dtype) -> None:
    case = MINI_GAN if name == "mini_dcgan" else next(c for c in cases.MINI if c.name == name)
    row = compare(TrainingWorkload(case, 2, dtype), PEERS, no_timer, None)
    assert [e.status for e in row.entries] == ["timed"] * len(PEERS), [e.note for e in row.entries]
    assert row.dtype == ("float32" if dtype == torch.float32 else "bfloat16 autocast")
    ours = row.entry("cnnfast")
    assert ours is not None and ours.path and row.speedup(ours) is not None
    assert row.macs == 3 * case.macs(2)


@pytest.mark.parametrize("index", [0, 1, -1], ids=["result", "first gradient", "last gradient"])
def test_what_is_wrong_is_not_timed(index: int) -> None:
    def spoilt(w: TrainingWorkload) -> Prepared:
        step = w.call(w.modules(), False)

        def call() -> list[torch.Tensor]:
            found = step()
            found[index] = 1.1 * found[index]
            return found

        return Prepared(call)

    chosen = (*PEERS[:1], Implementation("spoilt", spoilt))
    row = compare(TrainingWorkload(MINI_GAN, 2, torch.float32), chosen, no_timer, None)
    assert [e.status for e in row.entries] == ["timed", "wrong result"]


def test_kinks_widen_the_limits_of_gradients_alone() -> None:
    w = TrainingWorkload(MINI_GAN, 2, torch.float32)
    assert w.allowed[0] == w.tolerance and min(w.allowed) >= w.tolerance
    step = w.call(w.modules(), False)
    error, wrong = w.check(Prepared(lambda: [(1 + 2 * w.tolerance) * t if k == 0 else t for k, t in enumerate(step())]))
    assert error > w.tolerance and wrong is not None


def test_a_missing_gradient_is_wrong() -> None:
    w = TrainingWorkload(BLOCK, 2, torch.float32)
    step = w.call(w.modules(), False)
    error, wrong = w.check(Prepared(lambda: [*step()[:-1], None]))
    assert error == float("inf") and wrong is not None and "instead of" in wrong


def test_a_step_leaves_no_gradient_behind() -> None:
    w = TrainingWorkload(BLOCK, 2, torch.float32)
    model = w.modules()
    first, second = (w.call(model, True)() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_generators_noise_needs_no_gradient() -> None:
    assert len(TrainingWorkload(MINI_GAN, 2, torch.float32).expected) == 1 + len(list(MINI_GAN.build().parameters()))
    assert len(TrainingWorkload(BLOCK, 2, torch.float32).expected) == 2 + len(list(BLOCK.build().parameters()))


def test_every_case_can_be_trained_with() -> None:
    for case in cases.TRAINING:
        assert case.batches and all(p.requires_grad for p in case.build().parameters()), case.name
    assert {"generator", "upsample", "layers"} == {case.suite for case in cases.TRAINING}


def test_the_command_writes_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "TRAINING", (replace(MINI_GAN, cpu_batches=(2, 4)),))
    monkeypatch.setattr(train_step, "wall_clock", lambda seconds: wall_clock(0.01, 0.001, (2, 2)))
    assert train_step.main(["--quick", "--output", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    text = (folder / "train_step.md").read_text()
    assert "bfloat16 autocast" in text and (folder / "train_step.json").is_file()
    assert "batch 2" in text and "batch 4" not in text


def test_an_unknown_case_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(["--case", "nothing"]) == 2
    assert "expected some of" in capsys.readouterr().err
    assert train_step.main(["--batch", "7"]) == 2
    assert "batch of [7]" in capsys.readouterr().err
