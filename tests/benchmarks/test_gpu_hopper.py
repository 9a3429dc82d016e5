"""The stage "hopper" of the GPU run: what is right and faster is kept for tuning, what is wrong or hangs is named."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import cases, timers, workload  # noqa: E402
from benchmarks.gpu import hopper, rows  # noqa: E402
from benchmarks.gpu import report as gpu_report  # noqa: E402
from cnnfast import store  # noqa: E402
from cnnfast.activations import Activation  # noqa: E402
from cnnfast.gpu import conv, guard, tuned, tuning  # noqa: E402
from cnnfast.gpu.devices import DEVICES  # noqa: E402
from cnnfast.spec import ConvSpec, Precision  # noqa: E402
from cnnfast.step import Operands, Step  # noqa: E402
from cnnfast.timing import Timing  # noqa: E402

STEP = Step(ConvSpec.make(64, 64, 4, 2, 1), Activation("relu"))
HALF = Precision(torch.float16)
ASKED = (2, (8, 8), HALF)


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Plans of an sm_90 by their names as they are launched; nothing is."""
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(guard, "environment", lambda index: {"gpu": "H100"})
    store.forget()
    names: list[str] = []
    for module in (hopper, conv):
        monkeypatch.setattr(module, "target_device", lambda x: DEVICES[90])
    monkeypatch.setattr(conv, "run", lambda step, o, channels_last, plan: names.append(plan.name))
    yield names
    store.forget()


def a_task(step=STEP):
    x, weight = (
        torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last)
        for shape in ((2, 64, 8, 8), step.spec.weight_shape)
    )
    return tuning.Task.of(step, Operands(x, weight), True)


def timer(**seconds):
    """``boxes`` and ``pointer``: the time of such plans."""

    return lambda calls: {name: Timing((seconds["boxes" if "boxes" in name else "pointer"],), 1) for name in calls}


def steps(folder):
    return rows.Steps(rows.Rows(folder, "hopper", {}), "row", lambda: None)


def test_right_and_faster_is_kept_for_tuning(launched, tmp_path):
    found = hopper.judge(a_task(), steps(tmp_path), timer(boxes=1e-5, pointer=2e-5))
    assert found["allowed"] and found["faster"] == 2 and found["failures"] == 0
    assert "boxes" in found["best"] and "boxes" not in found["pointer"]
    assert launched[0] == found["pointer"] and all("boxes" in name for name in launched[1:]) and len(launched) > 2
    assert tuned.hopper_allowed(STEP, *ASKED, 0, True)
    assert not tuned.hopper_allowed(replace(STEP, activation=Activation("tanh")), *ASKED, 0, True), "another step"
    assert not tuned.hopper_allowed(STEP, 3, (8, 8), HALF, 0, True), "another size"


def test_what_is_no_faster_is_not(launched, tmp_path):
    found = hopper.judge(a_task(), steps(tmp_path), timer(boxes=2e-5, pointer=2e-5))
    assert not found["allowed"] and found["failures"] == 0 and not tuned.hopper_allowed(STEP, *ASKED, 0, True)


def test_what_is_wrong_is_named_and_not_timed(launched, tmp_path, monkeypatch):
    """One plan of several: the step is not allowed, whatever the times of the others."""

    def run(step, o, channels_last, plan):
        if "128x64" in plan.name and "boxes" in plan.name:
            raise guard.Refused("gave wrong results")

    monkeypatch.setattr(conv, "run", run)
    found = hopper.judge(a_task(), steps(tmp_path), timer(boxes=1e-5, pointer=2e-5))
    assert found["failures"] > 0 and "128x64x64 w4" in found["note"] and "gave wrong results" in found["note"]
    assert not any("128x64" in name and "boxes" in name for name in found["us"])
    assert not found["allowed"] and not tuned.hopper_allowed(STEP, *ASKED, 0, True)


def test_what_hung_is_not_launched_again(launched, tmp_path):
    """As the process that took over finds it: an earlier one was ended in that step."""
    file = rows.Rows(tmp_path, "hopper", {})
    plan = next(name for name in _names(tmp_path) if "boxes" in name)
    file.mark("row", f"{a_task().title}: {plan}")
    assert rows.blame(tmp_path, "hopper", "stopped: hung for 40 s") is not None
    launched.clear()
    found = hopper.judge(a_task(), steps(tmp_path), timer(boxes=1e-5, pointer=2e-5))
    assert plan not in launched and f"{plan}: stopped: hung for 40 s" in found["note"] and not found["allowed"]


def _names(tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    return hopper.judge(a_task(), steps(folder), timer(boxes=2e-5, pointer=1e-5))["us"]


def test_steps_that_it_does_not_take(launched, tmp_path):
    found = hopper.judge(a_task(Step(ConvSpec.make(64, 64, 3, 2, 1))), steps(tmp_path), timer(boxes=1.0, pointer=1.0))
    assert "no multiple of the stride" in found["note"] and found["failures"] == 0 and launched == []


@pytest.mark.parametrize(("arch", "dry_run", "reason"), [(80, False, "is 8.0"), (90, True, "dry run")])
def test_skipped_with_a_reason(arch, dry_run, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(hopper, "target_device", lambda x: DEVICES[arch])
    monkeypatch.setattr(torch, "empty", lambda *a, **k: None)  # a tensor on the device that is not there
    (item,) = hopper.hopper_items([], timers.stubbed, dry_run)
    note = item.work(None)["note"]
    assert note.startswith("skipped: ") and reason in note


def test_half_precision_alone(monkeypatch):
    monkeypatch.setattr(hopper, "target_device", lambda x: DEVICES[90])
    monkeypatch.setattr(torch, "empty", lambda *a, **k: None)
    found = [workload.Workload(cases.MINI[1], 2, dtype) for dtype in (torch.float16, torch.float32, torch.bfloat16)]
    keys = [item.key for item in hopper.hopper_items(found, timers.stubbed, False)]
    assert keys == [found[0].name, found[2].name]


def test_the_page(launched, tmp_path):
    fast = hopper.judge(a_task(), steps(tmp_path), timer(boxes=1e-5, pointer=2e-5))
    row = {"key": "dcgan64.3, float16", "layers": [fast], "failures": 0}
    other = {"key": "hopper", "note": "skipped: this GPU's compute capability is 8.0"}
    data = {"stage": "hopper", "rows": [row, other], "crashes": [], "left_out": [], "ended": True}
    text = gpu_report.page(json.loads(json.dumps(data)))
    assert f"| {fast['pointer']} | {fast['best']} | 20.0 | 10.0 | 2.00x |" in text and "skipped: this GPU" in text
