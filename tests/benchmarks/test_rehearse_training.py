"""The rehearsal of training steps: what it records, what it calls a finding. (test_compiled compiles some of it.)"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

pytest.importorskip("triton", reason="triton is not installed")
from benchmarks import cases  # noqa: E402
from benchmarks.rehearse import training as rehearse_training  # noqa: E402
from benchmarks.rehearse.inspections import Failed  # noqa: E402
from benchmarks.rehearse.inspector import Call, Report  # noqa: E402
from benchmarks.rehearse.training_launches import TrainingRun, eager_cost, moved, record  # noqa: E402

from .test_rehearse import GOOD  # noqa: E402


def block(norm: Any = nn.BatchNorm2d, size: int = 16) -> cases.Case:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), norm(32), nn.ReLU())

    return cases.Case("block", "layers", (64, size, size), (8,), make)


@pytest.fixture(scope="module")
def run() -> TrainingRun:
    return record(block(), 8, "fp16", 80)


def test_the_launches_of_a_step(run: TrainingRun) -> None:
    forward = [c.job.function for c in run.forward]
    assert [f for f in forward if f != "split_k_epilogue_kernel"] == [
        "conv_transpose_kernel",
        "merge_stats_kernel",
        "norm_act_kernel",
    ]
    backward = {c.job.function for c in run.backward} - {"split_k_epilogue_kernel", "sum_splits_kernel"}
    norm = {"grad_sums_kernel", "finish_sums_kernel", "grad_apply_kernel"}
    assert backward == norm | {"conv_transpose_kernel", "conv_wgrad_kernel"}
    assert run.by_torch == [], "num_batches_tracked moves in the merge"


def test_an_instance_norm_takes_no_statistics_kernel_where_tiles_end_at_images() -> None:
    run = record(block(lambda c: nn.InstanceNorm2d(c, affine=True)), 8, "fp16", 80)
    functions = [c.job.function for c in run.forward]
    assert "partial_stats_kernel" not in functions and "merge_stats_kernel" in functions


def test_bytes_and_peak(run: TrainingRun) -> None:
    result, x, weight = 8 * 32 * 32 * 32 * 2, 8 * 64 * 16 * 16 * 2, 64 * 32 * 16 * 2
    apply = next(c for c in run.forward if c.job.function == "norm_act_kernel")
    assert 2 * result <= moved(apply) <= 2 * result + 4096
    first = run.forward[0]
    stats = moved(first) - (x + weight + result)
    assert 0 <= stats < result, "input, weight, result and statistics; no workspace where K is in one part"
    # The convolution's result and the block's, at the least; gradients and workspaces beside them. What the norm saved
    # is free where the convolution's gradients are made: one result more otherwise.
    assert 2 * result < run.peak < 6 * result
    assert eager_cost(block(), 8, "fp32").moved > 14 * result


def judge(call: Call, report: Report | Failed, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The findings where a step is this one launch and its binary reads like this."""

    class Inspections:
        def of(self, jobs: list[Any]) -> dict[str, Report | Failed]:
            return {job.key: report for job in jobs}

    monkeypatch.setattr(rehearse_training, "record", lambda *_: TrainingRun(forward=[call]))
    result = rehearse_training.rehearse([block()], [80], ["fp16"], 8, Inspections())  # type: ignore[arg-type]
    return [f.text for f in result.findings]


def test_findings(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    wgrad = next(c for c in run.calls if c.job.function == "conv_wgrad_kernel")
    for function in ("conv_transpose_kernel", "conv_wgrad_kernel"):
        call = next(c for c in run.backward if c.job.function == function)
        assert judge(call, GOOD, monkeypatch) == []
        assert judge(call, replace(GOOD, mma=0, mma_kind="", macs=0), monkeypatch) == [
            "no tensor-core instruction in the main loop"
        ]
        narrow = judge(call, replace(GOOD, loads={"LDG.E.U16": 4}), monkeypatch)
        assert narrow == ["4 loads of 2 bytes or less in the main loop"]
        waits = judge(call, replace(GOOD, drains=GOOD.mma), monkeypatch)
        assert waits == [f"{GOOD.mma} waits for all of wgmma's products in the main loop"]
    assert "spills: 16 bytes of stack" in judge(wgrad, replace(GOOD, stack=16), monkeypatch)[0]
    assert judge(wgrad, Failed("no"), monkeypatch) == ["does not compile: no"]
    assert "exceeds" in judge(replace(wgrad, grid=(1, 70000, 1)), GOOD, monkeypatch)[0]
    apply = next(c for c in run.forward if c.job.function == "norm_act_kernel")
    assert judge(apply, replace(GOOD, mma=0, mma_kind="", macs=0), monkeypatch) == []
