"""Tuning: what is recorded, tried and kept, and that no record on disk can break a run. Times are stubbed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast import store
from cnnfast.__main__ import main
from cnnfast.activations import Activation
from cnnfast.gpu import guard, tuned, tuning
from cnnfast.gpu.conv_choice import candidates, choose_plan
from cnnfast.gpu.conv_plan import Plan
from cnnfast.gpu.devices import DEVICES
from cnnfast.spec import ConvSpec, Precision
from cnnfast.step import Step
from cnnfast.tasks import env
from cnnfast.timing import Timing

from ..cases import reference
from ..tolerance import assert_close
from .test_guard import silent

SPEC = ConvSpec.make(32, 32, 4, 2, 1)
STEP = Step(SPEC, Activation("relu"))
HALF, H100 = Precision(torch.float16), DEVICES[90]
HERE = {"gpu": "a GPU", "capability": "9.0", "torch": "2", "triton": "3", "cnnfast": "0", "kernels": "abc"}
SIZE = (SPEC, 2, (3, 4), HALF)


def forget() -> None:
    """As a new process starts."""
    from cnnfast.gpu import conv

    conv.prepare.cache_clear()
    guard.forget()
    store.forget()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CNNFAST_GUARD", "1")
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path))
    pytest.importorskip("triton", reason="triton is not installed")
    forget()
    yield tmp_path
    forget()


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Some GPU's name and versions: nothing is launched."""
    here = dict(HERE)
    monkeypatch.setattr(guard, "environment", lambda index: dict(here))
    yield here
    monkeypatch.undo()


def another_plan() -> Plan:
    plans = candidates(*SIZE, H100)
    return next(p for p in plans if p != choose_plan(*SIZE, H100))


def prepared() -> Plan:
    from cnnfast.gpu import conv

    conv.prepare.cache_clear()
    return conv.prepare(STEP, 2, (3, 4), HALF, H100, True, 0, None, (), 0).plan


def record_file(cache: Path) -> Path:
    (file,) = (cache / "plans").glob("*.json")
    return file


def test_a_tuned_plan_is_used_by_other_processes(a_gpu: dict[str, str]) -> None:
    from cnnfast.gpu import conv

    plan = another_plan()
    assert tuned.keep(*SIZE, 0, plan, {"seconds": {plan.name: 1e-5}})
    store.forget()
    assert prepared() == plan
    assert conv.prepare(STEP, 2, (3, 4), HALF, H100, True, 0).plan == choose_plan(*SIZE, H100), "no GPU there"
    explicit = choose_plan(*SIZE, H100)
    assert conv.prepare(STEP, 2, (3, 4), HALF, H100, True, 0, explicit, (), 0).plan == explicit


def test_a_tuned_plan_is_of_its_layer_and_size(a_gpu: dict[str, str]) -> None:
    tuned.keep(*SIZE, 0, another_plan(), {})
    assert tuned.stored(*SIZE, H100, 0) == another_plan()
    for other in (
        (replace(SPEC, out_channels=64), 2, (3, 4), HALF),
        (SPEC, 3, (3, 4), HALF),
        (SPEC, 2, (4, 3), HALF),
        (SPEC, 2, (3, 4), Precision(torch.bfloat16)),
        (SPEC, 2, (3, 4), Precision(torch.float32, True)),
    ):
        assert tuned.stored(*other, H100, 0) is None


def test_of_exact_float32_both_kinds_are_tried_in_turn_and_kept(a_gpu: dict[str, str]) -> None:
    """Plans of three products stand beside those of the CUDA cores; which is faster only the GPU says."""
    exact, tf32 = Precision(torch.float32), Precision(torch.float32, True)
    plans = tuning.tried(STEP, 2, (3, 4), exact, H100, True)
    assert plans[0] == choose_plan(SPEC, 2, (3, 4), exact, H100) and len(set(plans)) == len(plans)
    assert [p.three for p in plans[1:9]] == [True, False] * 4
    assert plans[1] == next(p for p in candidates(SPEC, 2, (3, 4), exact, H100) if p.three)
    assert not any(p.three for p in tuning.tried(STEP, 2, (3, 4), tf32, H100, True))
    asked = (SPEC, 2, (3, 4), exact)
    assert tuned.keep(*asked, 0, plans[1], {})
    store.forget()
    assert tuned.stored(*asked, H100, 0) == plans[1]
    tuned.keep(SPEC, 2, (3, 4), tf32, 0, plans[1], {})
    assert tuned.stored(SPEC, 2, (3, 4), tf32, H100, 0) is None, "no plan of that precision"


@pytest.mark.parametrize("what", HERE)
def test_a_tuned_plan_is_of_its_gpu_and_versions(what: str, a_gpu: dict[str, str]) -> None:
    tuned.keep(*SIZE, 0, another_plan(), {})
    a_gpu[what] = "another"
    assert tuned.stored(*SIZE, H100, 0) is None


def changed(**change: Any) -> dict[str, Any]:
    plan = another_plan()
    values = {name: getattr(plan, name) for name in tuned._FIELDS}
    return {"plan": {**values, **change}}


BAD_RECORDS: dict[str, Callable[[], dict[str, Any]]] = {
    "empty": dict,
    "plan-is-text": lambda: {"plan": "64x64"},
    "field-missing": lambda: {"plan": {"block_m": 64}},
    "field-too-many": lambda: changed(cluster=2),
    "text": lambda: changed(block_m="64"),
    "float": lambda: changed(block_m=64.0),
    "bool": lambda: changed(split_k=True),
    "none": lambda: changed(num_warps=None),
    "no-stages": lambda: changed(num_stages=0),
    "negative-stages": lambda: changed(num_stages=-3),
    "no-group": lambda: changed(group_m=0),
    "no-power-of-two": lambda: changed(block_m=48),
    "too-much-shared-memory": lambda: changed(num_stages=1000),
    "too-many-splits": lambda: changed(splits=True, split_k=10_000),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_record_that_is_no_valid_plan_is_ignored(name: str, a_gpu: dict[str, str]) -> None:
    store.put("plans", tuned.key(*SIZE, 0), BAD_RECORDS[name]())
    assert tuned.stored(*SIZE, H100, 0) is None
    assert prepared() == choose_plan(*SIZE, H100)
    store.put("plans", tuned.key(*SIZE, 0), changed())
    assert prepared() == another_plan()


def test_a_plan_of_a_larger_gpu_is_ignored(a_gpu: dict[str, str]) -> None:
    """is_valid decides, for the device at hand."""
    big = replace(another_plan(), block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=8)
    tuned.keep(*SIZE, 0, big, {})
    assert tuned.stored(*SIZE, H100, 0) == big and tuned.stored(*SIZE, DEVICES[86], 0) is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b'{"schema": 99}'])
def test_a_damaged_file_is_ignored_and_replaced(content: bytes, a_gpu: dict[str, str], cache: Path) -> None:
    tuned.keep(*SIZE, 0, another_plan(), {})
    record_file(cache).write_bytes(content)
    store.forget()
    assert prepared() == choose_plan(*SIZE, H100)
    assert tuned.keep(*SIZE, 0, another_plan(), {})
    store.forget()
    assert prepared() == another_plan()


WRITER = """
    import sys
    from cnnfast import store
    from cnnfast.gpu import guard, tuned
    from tests.gpu.test_tuning import HERE, H100, SIZE, candidates
    guard.environment = lambda index: dict(HERE)
    plans = candidates(*SIZE, H100)[:5]
    for i in range(100):
        assert tuned.keep(*SIZE, 0, plans[i % 5], {"writer": sys.argv[1]})
        store.forget()
        assert tuned.stored(*SIZE, H100, 0) in plans
"""


def test_processes_that_tune_at_once(a_gpu: dict[str, str], cache: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(WRITER)]
    root = Path(__file__).resolve().parents[2]
    writers = [subprocess.Popen([*command, me], cwd=root, stderr=subprocess.PIPE, text=True) for me in "ab"]
    for writer in writers:
        _, said = writer.communicate(timeout=120)
        assert writer.returncode == 0, said
    assert tuned.stored(*SIZE, H100, 0) == candidates(*SIZE, H100)[4]
    assert len(list(cache.rglob("*"))) == 2, "a temporary file was left"


# --- recording and tuning, on a device --------------------------------------------------------------------------------


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 32, 3, 1, 1))
    return cnnfast.Sequential(*layers, nn.ReLU()).half().eval().to(device)


def image(device: torch.device, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 32, 2, 3, generator=torch.Generator().manual_seed(0)).half().to(device)


@pytest.fixture
def triton_only(device: torch.device) -> Iterator[None]:
    with cnnfast.backend("triton"):  # a torch function mode, as ttsem is one, leaves no other way
        yield


class StubbedTimer:
    """Plans take a second, but for those whose time is given."""

    def __init__(self, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = seconds or {}
        self.asked: list[list[str]] = []

    def __call__(self, calls: Mapping[str, Callable[[], object]]) -> Mapping[str, Timing]:
        self.asked.append(list(calls))
        for call in calls.values():
            call()
        return {name: Timing((self.seconds.get(name, 1.0),), 1) for name in calls}


def tune(tasks: list[tuning.Task], timer: StubbedTimer, **options: Any) -> list[tuning.Result]:
    return tuning.tune_steps(tasks, timer, limit=3, tell=lambda line: None, **options)


@pytest.mark.usefixtures("triton_only")
def test_record(device: torch.device) -> None:
    model = network(device)
    tasks = tuning.record(model, image(device), batch_sizes=(2, 1))
    shapes = [tuple(dict(t.likes)["x"].shape) for t in tasks]
    assert shapes == [(1, 32, 2, 3), (1, 32, 4, 6), (2, 32, 2, 3), (2, 32, 4, 6)]
    assert tasks[0].title == "conv_transpose 32 -> 32, kernel 4x4, float16, input 1x32x2x3"
    assert [name for name, _ in tasks[0].likes] == ["x", "weight", "bias", "mean", "var", "scale", "shift"]
    o = tasks[1].operands()
    assert o.x.shape == (1, 32, 4, 6) and o.x.is_contiguous(memory_format=torch.channels_last) and o.x.isfinite().all()
    assert tuning.record(lambda x: x, image(device)) == []


@pytest.mark.usefixtures("triton_only")
def test_the_fastest_plan_is_kept_and_used(device: torch.device, launches: list[str]) -> None:
    model, x = network(device), image(device)
    task = tuning.record(model, x)[0]
    heuristic = launches[0]
    launches.clear()
    with torch.no_grad():
        before = model(x)
        model(image(device, 2))
    of_two_images = launches[2:]
    timer = StubbedTimer()
    tune([task], timer)
    (names,) = timer.asked
    assert names[0] == heuristic and 2 <= len(names) <= 3
    fast = StubbedTimer({names[-1]: 0.5})
    (result,) = tune([task], fast)
    assert result.best is not None and result.best.name == names[-1] and result.gain == 2.0 and result.kept
    assert str(result).startswith(f"{task.title}: 500000.0 us with {names[-1]}, 2.00x the heuristic's ({len(names)} ")
    for fresh in (False, True):
        if fresh:
            forget()
        launches.clear()
        with torch.no_grad():
            y = model(x)
        assert launches[0] == names[-1]
        torch.testing.assert_close(y, before, rtol=1e-2, atol=1e-2)
        with torch.no_grad():
            launches.clear()
            model(image(device, 2))
        assert launches == of_two_images, "another size"


@pytest.mark.usefixtures("triton_only")
def test_a_small_gain_is_noise(device: torch.device) -> None:
    (task, *_) = tuning.record(network(device), image(device))
    timer = StubbedTimer()
    tune([task], timer)
    (result,) = tune([task], StubbedTimer({timer.asked[0][-1]: 0.99}))
    assert result.best == result.heuristic and result.gain == 1.0
    assert "1.00x the heuristic's" in str(result)


@pytest.mark.usefixtures("triton_only")
def test_a_wrong_plan_is_not_timed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnfast.gpu import conv

    (task, *_) = tuning.record(network(device), image(device))
    timer = StubbedTimer()
    tune([task], timer)
    wrong = timer.asked[0][1]
    real = conv.constants
    monkeypatch.setattr(
        conv,
        "constants",
        lambda plan, *rest: {**real(plan, *rest), **({"PAD_W": 0} if plan.name == wrong else {})},
    )
    forget()
    with silent():
        (result,) = tune([task], timer)
    assert wrong not in timer.asked[1] and len(timer.asked[1]) == len(timer.asked[0]) - 1
    assert list(result.refused) == [wrong] and "gave wrong results" in result.refused[wrong]
    assert str(result).endswith(", 1 refused)")


@pytest.mark.usefixtures("triton_only")
def test_a_place_that_cannot_be_written(device: torch.device, cache: Path, launches: list[str]) -> None:
    model, x = network(device), image(device)
    (task, *_) = tuning.record(model, x)
    timer = StubbedTimer()
    tune([task], timer)
    (cache / "plans").rename(cache / "old")
    (cache / "plans").write_text("not a folder")
    fast = timer.asked[0][-1]
    (result,) = tune([task], StubbedTimer({fast: 0.1}))
    assert not result.kept and str(result).endswith("; NOT KEPT on disk")
    launches.clear()
    with torch.no_grad():
        model(x)
    assert launches[0] == fast, "it holds for this process"


@pytest.mark.usefixtures("triton_only")
def test_out_of_time(device: torch.device) -> None:
    tasks, said = tuning.record(network(device), image(device)), []
    assert tuning.tune_steps(tasks, StubbedTimer(), seconds=0, tell=said.append) == []
    assert said == ["out of time: 2 of 2 steps keep the plans they have"]


@pytest.mark.usefixtures("triton_only")
def test_tuned_plans_give_right_results(device: torch.device) -> None:
    """Every candidate that is timed was held against float64, and so is what runs afterwards."""
    from cnnfast.gpu import conv

    (task, *_) = tuning.record(network(device), image(device))
    tune([task], StubbedTimer())
    o = task.operands()
    y = conv.run(task.step, o, task.channels_last)
    exact, yardstick, before = reference(task.step, o, tf32=False)
    assert_close(y, exact, yardstick, "", before)


def test_the_command(device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main = network(device)

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            with cnnfast.backend("triton"):
                return self.main(z)

        def example_input(self, batch: int = 1) -> torch.Tensor:
            return image(device, batch)

    monkeypatch.setattr("cnnfast.tasks.tune.create_model", lambda name: Model())
    monkeypatch.setattr(env, "triton_off", lambda index: None)
    real = tuning.tune_steps
    monkeypatch.setattr(tuning, "tune_steps", lambda tasks, **k: real(tasks, StubbedTimer(), limit=2, **k))
    assert main(["tune", "dcgan", "--batch", "1", "2"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "dcgan, float16, batch 1, 2" and len(out) == 6
    assert out[-1] == f"4 steps tuned, median gain 1.00x; kept in {store.folder('plans')}"


# --- without a device -------------------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], status: int = 1) -> str:
    assert main(["tune", *arguments]) == status
    return capsys.readouterr().err


def test_the_command_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(env, "triton_off", lambda index: "no CUDA device")
    assert refused([], capsys) == "error: nothing can be tuned here: no CUDA device\n"


def test_the_command_s_mistakes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(env, "triton_off", lambda index: None)
    assert "unknown model stylegan9: expected some of dcgan" in refused(["stylegan9"], capsys, 2)
    assert "--device meta: what can be tuned is a CUDA device or the CPU" in refused(["--device", "meta"], capsys, 2)
    assert "--device gpu: Expected one of cpu, cuda" in refused(["--device", "gpu"], capsys, 2)
    monkeypatch.setenv("CNNFAST_GUARD", "0")
    assert "unset CNNFAST_GUARD" in refused([], capsys)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "nvidia_problem", lambda: None)
    monkeypatch.setattr(env, "cuda_error", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert env.triton_off(2) == "cuda:2 does not exist: there are 2 CUDA devices"


def test_nothing_to_tune() -> None:
    with pytest.raises(RuntimeError, match="nothing to tune: the forward launched no Triton kernel on a GPU"):
        cnnfast.tune(lambda x: x, torch.randn(1, 2))


def test_what_is_found_is_logged_and_not_printed(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level("INFO", "cnnfast"):
        assert tuning.tune_steps([None], seconds=0) == []  # type: ignore[list-item]
    assert caplog.messages == ["out of time: 1 of 1 steps keep the plans they have"]
    assert capfd.readouterr() == ("", "")


def test_tuning_needs_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNFAST_GUARD", "0")
    with pytest.raises(RuntimeError, match="tuning needs the check of kernels: unset CNNFAST_GUARD"):
        tuning.tune_steps([])
