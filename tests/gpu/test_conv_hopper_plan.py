"""Plans of the Gluon kernel of sm_90: where it applies, when a call or tuning takes it, and the machine code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cnnfast import store
from cnnfast.activations import ACTIVATIONS, Activation
from cnnfast.gpu import conv_hopper_plan as plans
from cnnfast.gpu import guard, tuned
from cnnfast.gpu.conv_choice import choose_plan
from cnnfast.gpu.conv_hopper_plan import BoxPlan
from cnnfast.gpu.devices import DEVICES
from cnnfast.norms import Norm
from cnnfast.spec import ConvSpec, Precision
from cnnfast.step import Step

from ..cases import conv, upsample

HALF, H100 = Precision(torch.float16), DEVICES[90]
UP = conv("up", "phases", 128, 256, 4, 2, 1, size=(9, 7), batch=3)
ASKED = (3, (9, 7), HALF, H100)


def test_off() -> None:
    """No GPU has run it: calls take the pointer kernel."""
    assert plans.HOPPER is False and plans.chosen(UP.step, *ASKED) is None


# --- where it applies -------------------------------------------------------------------------------------------------

REASONS = {
    "float32": (Precision(torch.float32, tf32=True), conv("", "phases", 64, 64, 4, 2, 1, size=(4, 4))),
    "the regime is merged": (HALF, conv("", "merged", 64, 3, 4, 2, 1, size=(4, 4))),
    "the regime is latent": (HALF, conv("", "latent", 64, 64, 4, size=(1, 1))),
    "result is contiguous": (HALF, conv("", "phases", 64, 64, 4, 2, 1, size=(4, 4), channels_last=False)),
    "replicate padding": (HALF, upsample("", "phases", 64, 64, (3, 3), (2, 2), (1, 1), "replicate", size=(4, 4))),
    "16 -> 64 channels": (HALF, conv("", "phases", 16, 64, 4, 2, 1, size=(4, 4))),
    "68 -> 64 channels": (HALF, conv("", "phases", 68, 64, 4, 2, 1, size=(4, 4))),
    "40 input channels": (HALF, conv("", "phases", 40, 64, 4, 2, 1, transposed=False, size=(4, 4))),
    "72 output channels": (HALF, conv("", "phases", 64, 72, 4, 2, 1, size=(4, 4))),
    "an output of": (HALF, conv("", "phases", 64, 64, 3, 2, 1, size=(4, 4))),
    "an input of": (HALF, conv("", "phases", 64, 64, 4, 2, 1, transposed=False, size=(5, 4))),
}


@pytest.mark.parametrize("reason", REASONS)
def test_why_not(reason: str) -> None:
    precision, case = REASONS[reason]
    size = tuple(n + 2 * p for n, p in zip(case.size, case.step.pad, strict=True))
    asked = (case.step, 2, size, precision, DEVICES[90], case.channels_last)
    found = plans.why_not(*asked)
    assert found is not None and reason in found
    assert plans.candidates(*asked) == []


def test_other_architectures() -> None:
    for arch, device in DEVICES.items():
        found = plans.why_not(UP.step, 2, UP.size, HALF, device)
        assert (found is None) == (arch == 90), found


def test_boxes_cover_with_the_least() -> None:
    """The fewest boxes, of those the widest; each of as many rows as the tile."""
    for batch, size in ((1, (64, 64)), (16, (8, 8)), (5, (4, 4)), (3, (7, 9)), (1, (1, 4096)), (2, (512, 1))):
        for rows in (128, 256):
            n, h, w = plans.box_of(rows, batch, size)
            assert n * h * w == rows
            count = -(-batch // n) * -(-size[0] // h) * -(-size[1] // w)
            assert count * rows < 4 * max(rows, batch * size[0] * size[1])
    assert plans.box_of(128, 16, (64, 64)) == (1, 1, 128) or plans.box_of(128, 16, (64, 64))[2] == 64
    assert plans.box_of(128, 16, (8, 8)) == (2, 8, 8)


@pytest.mark.parametrize("channels", [64, 256, 512])
def test_plans_fit_the_device(channels: int) -> None:
    """Every candidate, with two programs a multiprocessor too."""
    for case in (UP, conv("plain", "phases", channels, channels, 3, 1, 1, transposed=False, size=(64, 64), batch=16)):
        found = plans.candidates(case.step, case.batch, case.size, HALF, H100)
        assert {(p.block_m, p.block_n, p.num_warps) for p in found} <= set(plans.TILES) and len(found) > 1
        for p in found:
            assert p.blocks * (p.shared_memory(2) + plans.SYSTEM) <= H100.shared_per_multiprocessor
            assert p.shared_memory(2) <= H100.shared_memory and 2 <= p.num_stages <= plans.MOST_STAGES
            assert p.blocks * 32 * (p.num_warps + plans.COPYING) * p.registers <= 65536
            assert len({p.name for p in found}) == len(found)


# --- when it is taken -------------------------------------------------------------------------------------------------


@pytest.fixture
def a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Some sm_90's name and versions: nothing is launched."""
    from cnnfast.gpu import conv as launch

    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(guard, "environment", lambda index: {"gpu": "H100"})
    for forget in (launch.prepare.cache_clear, plans.chosen.cache_clear, store.forget):
        forget()
    yield
    monkeypatch.undo()
    for forget in (launch.prepare.cache_clear, plans.chosen.cache_clear, store.forget):
        forget()


def prepared(step: Step, size: tuple[int, int] = (9, 7), statistics: str | None = None) -> Any:
    from cnnfast.gpu import conv as launch

    launch.prepare.cache_clear()
    return launch.prepare(step, 3, size, HALF, H100, True, 0, None, (), 0, statistics)


def test_on(a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one constant turns it on, forward and for input gradients, where it applies and nowhere else."""
    monkeypatch.setattr(plans, "HOPPER", True)
    launch = prepared(UP.step, statistics="batch")
    assert isinstance(launch.plan, BoxPlan) and launch.plan == plans.candidates(UP.step, *ASKED)[0]
    assert launch.grid[0] <= launch.plan.blocks * H100.multiprocessors and launch.reduce is None
    boxes = launch.plan.boxes(3, (18, 14))
    assert launch.parts == (1, boxes[0] * boxes[1] * boxes[2] * 4)
    assert not launch.proof.ready, "proven at its first use, like any kernel"
    of_input = Step(UP.step.spec.adjoint((9, 7)))
    assert isinstance(prepared(of_input, (18, 14)).plan, BoxPlan)
    odd = Step(ConvSpec.make(128, 256, 3, 2, 1))
    assert prepared(odd).plan == choose_plan(odd.spec, *ASKED)


def test_tuned_plans_of_boxes(a_gpu: None) -> None:
    """Kept, found again by another process, and believed only where they are one of the step's own."""
    plan = plans.candidates(UP.step, *ASKED)[1]
    spec = UP.step.spec
    assert tuned.keep(spec, 3, (9, 7), HALF, 0, plan, {})
    store.forget()
    assert tuned.stored(*(spec, *ASKED), 0) == plan == prepared(UP.step).plan
    for wrong in (replace(plan, num_stages=100), replace(plan, box=(1, 8, 8)), replace(plan, blocks=3)):
        tuned.keep(spec, 3, (9, 7), HALF, 0, wrong, {})
        assert prepared(UP.step).plan == choose_plan(spec, *ASKED)
    tuned.keep(spec, 3, (9, 7), HALF, 0, plan, {})
    padded = Step(replace(spec, padding=(0, 0)), pad=(1, 1))
    for step in (padded, replace(UP.step, pad=(1, 1))):  # the size is with the padding: another border, the same record
        tuned.keep(step.spec, 3, (9, 7), HALF, 0, plan, {})
        assert not isinstance(prepared(step).plan, BoxPlan)


@pytest.mark.parametrize("allowed", [False, True])
def test_tuning_tries_it_only_where_it_was_found_right(
    allowed: bool, a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cnnfast.gpu import tuning
    from cnnfast.step import Operands

    monkeypatch.setenv("CNNFAST_GUARD", "1")
    monkeypatch.setattr(tuning, "target_device", lambda x: H100)
    tried = []
    monkeypatch.setattr(tuning, "_refusal", lambda task, o, plan: tried.append(plan) or "not now")
    if allowed:
        tuned.allow_hopper(UP.step, 3, (9, 7), HALF, 0, True, {})
    x, weight = (
        torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last)
        for shape in ((3, 128, 9, 7), UP.step.spec.weight_shape)
    )
    tuning.tune_steps([tuning.Task.of(UP.step, Operands(x, weight), True)], tell=lambda line: None)
    assert any(isinstance(plan, BoxPlan) for plan in tried) is allowed
    assert tried[0] == choose_plan(UP.step.spec, *ASKED)


# --- the machine code -------------------------------------------------------------------------------------------------

WIDE = ConvSpec.make(256, 256, 4, 2, 1)


def compiled(step: Step, plan: BoxPlan, dtype: torch.dtype = torch.float16) -> Any:
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks.rehearse.hopper import job_of
    from benchmarks.rehearse.inspections import Inspections
    from benchmarks.rehearse.inspector import Report

    (report,) = Inspections(0).of([job_of(step, (16, step.spec.in_channels, 16, 16), plan, dtype)]).values()
    assert isinstance(report, Report), report
    return report


def plan_of(step: Step, tile: tuple[int, int, int] | None = None) -> BoxPlan:
    found = plans.candidates(step, 16, (16, 16), HALF, H100)
    return next(p for p in found if tile in (None, (p.block_m, p.block_n, p.num_warps)))


@pytest.mark.parametrize("tile", plans.TILES, ids=lambda t: "x".join(map(str, t)))
def test_machine_code(tile: tuple[int, int, int]) -> None:
    """wgmma and copies by descriptor, nothing on the stack, no wait for all products in the loop; a third of the
    pointer kernel's instructions."""
    from benchmarks.rehearse.hopper import rules

    step = Step(WIDE, Activation("relu"), norm=Norm("running"))
    plan = plan_of(step, tile)
    report = compiled(step, plan)
    assert rules(report, plan, H100) == []
    products = plan.block_m // (16 * plan.num_warps) * plan.block_k // 16  # of a warp, 64 rows x BLOCK_N x 16 of four
    assert report.mma == products, "a trip of the machine code is one of the source"
    assert report.instructions <= 66, report


def test_machine_code_of_a_plain_convolution() -> None:
    """And of an input gradient: K contiguous in the weight, a strided read, statistics of the result."""
    from benchmarks.rehearse.hopper import rules

    step = Step(WIDE.adjoint((16, 16)), norm=Norm("batch"))
    plan = plan_of(step)
    assert rules(compiled(step, plan, torch.bfloat16), plan, H100) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("tile", plans.TILES, ids=lambda t: "x".join(map(str, t)))
def test_no_activation_spills(tile: tuple[int, int, int], name: str) -> None:
    """With everything else that an epilogue may have."""
    from benchmarks.rehearse.hopper import rules

    params = {"leaky_relu": (0.2,), "elu": (1.5,), "hardtanh": (-0.5, 0.75)}.get(name, ())
    step = Step(WIDE, Activation(name, params), norm=Norm("running"), residual=True)
    plan = plan_of(step, tile)
    assert rules(compiled(step, plan), plan, H100) == []


def test_the_rules_find_what_is_wrong() -> None:
    from benchmarks.rehearse.hopper import rules

    step = Step(WIDE, Activation("relu"))
    plan = plan_of(step)
    report = compiled(step, plan)
    broken = {
        "no wgmma": dict(mma_kind="mma"),
        "no copy by descriptor": dict(bulk=0),
        "1 waits for all products": dict(drains=1),
        "global loads": dict(loads={"LDG.E": 1}),
        "spills: 8 bytes": dict(stack=8),
        "248 registers": dict(registers=248),
        "bytes of shared memory": dict(shared=300_000),
    }
    for text, change in broken.items():
        (found,) = rules(replace(report, **change), plan, H100)
        assert text in found
