"""What a row of the GPU run holds: clocks, checks, predictions; the stages on a torch.cuda that only answers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import cases, peers, timers, workload
from benchmarks.gpu import compare as gpu_compare
from benchmarks.gpu import predict as gpu_predict
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu import stages as gpu_stages
from cnnfast.gpu import guard, observers

ROOT = Path(__file__).resolve().parents[2]
RUN = {"code": "abc"}


def environ():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# --- the clocks, on a torch.cuda that only writes down what it is asked -----------------------------------------------


@pytest.fixture
def fake_cuda(monkeypatch):
    """Every call of `torch.cuda` that the clocks make, in order; an event's time is the number of calls before it."""
    seen = []

    class Stream:
        def wait_stream(self, other):
            seen.append("wait")

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            self.at = len(seen)
            seen.append("record")

        def synchronize(self):
            seen.append("synchronize")

        def elapsed_time(self, end):
            return float(end.at - self.at)

    class Graph:
        def replay(self):
            seen.append("replay")

    @contextlib.contextmanager
    def within(name, *arguments, **keywords):
        seen.append(f"enter {name}")
        yield
        seen.append(f"leave {name}")

    side = Stream()
    for name, value in {
        "Stream": lambda: side,
        "current_stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "stream": lambda stream: within("side stream") if stream is side else within("another stream"),
        "graph": lambda graph, stream: within("capture" if stream is side else "capture elsewhere"),
        "synchronize": lambda: seen.append("synchronize"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return seen


@pytest.mark.parametrize("kind", [workload.Workload, workload.TrainingWorkload])
def test_a_graph_is_captured_after_warm_up_on_its_stream(kind, fake_cuda):
    y = torch.zeros(1)

    def call():
        fake_cuda.append("call")
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled() == kind.gradients
        return y

    prepared = workload.Prepared(call)
    implementation = peers._graph(lambda w: prepared)
    with torch.inference_mode():
        ready = implementation(kind(cases.MINI[1], 2, torch.float32))
    expected = ["wait", "enter side stream", "call", "call", "call", "leave side stream", "wait", "synchronize"]
    assert fake_cuda == [*expected, "enter capture", "call", "leave capture", "synchronize"]
    fake_cuda.clear()
    assert ready.result(ready.call()) is y and fake_cuda == ["replay"]


def test_host_time_waits_for_nothing_inside_a_block(fake_cuda):
    timings = timers.host({"a": lambda: fake_cuda.append("a"), "b": lambda: fake_cuda.append("b")}, 2, 3)
    block = ["synchronize", "a", "a", "a", "synchronize", "b", "b", "b"]
    assert fake_cuda == ["a", "b", *block, *block, "synchronize"]
    assert all(len(t.seconds) == 2 and t.calls == 3 and t.median > 0 for t in timings.values())


def test_calls_in_a_row_are_timed_by_events(fake_cuda):
    timings = timers.warm({"a": lambda: fake_cuda.append("a")})
    # An event's time is the number of calls between the two: ms for each call of the block, and the record itself.
    (timing,) = timings.values()
    assert timing.median == pytest.approx(1e-3 * (timing.calls + 1) / timing.calls) and len(timing.seconds) == 10


def test_cold_times_are_do_bench_in_turn(monkeypatch):
    testing = pytest.importorskip("triton").testing
    asked = []

    def do_bench(call, warmup, rep, return_mode):
        assert return_mode == "median"
        asked.append(call())
        return {"a": 2.0, "b": 4.0}[asked[-1]]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    timings = timers.cold({"a": lambda: "a", "b": lambda: "b"}, 2)
    assert asked == ["a", "b", "a", "b"]
    assert timings["a"].seconds == (2e-3, 2e-3) and timings["b"].median == 4e-3
    clock = iter(range(0, 1000, 3))  # 3 s a turn
    monkeypatch.setattr(timers.time, "monotonic", lambda: next(clock))
    assert len(timers.cold({"a": lambda: "a"}, 5, 5.0)["a"].seconds) == 3
    assert len(timers.cold({"a": lambda: "a"}, 5, 0.0)["a"].seconds) == 2


def test_a_kernel_that_was_given_up_is_a_failure(monkeypatch):
    w = workload.Workload(cases.MINI[1], 2, torch.float32)
    monkeypatch.setattr(peers, "backend", lambda: "auto")
    ours = peers.named("cnnfast", among=peers.GPU_IMPLEMENTATIONS)[0]
    with pytest.raises(RuntimeError, match="no step of it ran as a Triton kernel: ATen"):
        ours.prepare(w)  # on the CPU
    monkeypatch.setattr(guard, "failures", lambda *arguments: ["phases 64x64x64 gave wrong results"])
    with pytest.raises(RuntimeError, match="PyTorch's operators run: the kernel phases 64x64x64 gave wrong results"):
        ours.prepare(w)


def test_a_row_without_its_kernel_fails(tmp_path, monkeypatch):
    """`check` ends with status 1 where PyTorch's operators ran in a kernel's place."""
    monkeypatch.setattr(peers, "backend", lambda: "auto")
    (ours,) = peers.named("cnnfast", among=peers.GPU_IMPLEMENTATIONS)
    rows = gpu_rows.Rows(tmp_path, "check", RUN)
    context = gpu_stages.Context(tmp_path, rows, dry_run=True)
    w = workload.Workload(cases.MINI[1], 2, torch.float32)
    assert gpu_rows.work_through(rows, [context.row(w, ("cnnfast",), None)], 60, gpu_stages.show) == 1
    (entry,) = rows.data["rows"][0]["entries"]
    assert entry["status"] == "failed" and "no step of it ran as a Triton kernel" in entry["note"]


def test_a_compiled_row_without_our_kernels_is_a_failure(monkeypatch):
    """The time would be Inductor's, under our name."""
    monkeypatch.setattr(torch, "compile", lambda modules, **options: modules)
    (ours,) = peers.named("cnnfast under torch.compile", among=peers.GPU_IMPLEMENTATIONS)
    with pytest.raises(RuntimeError, match="no step of it ran as a Triton kernel"):
        ours.prepare(workload.Workload(cases.MINI[1], 2, torch.float32))


def test_which_kernels_cudnn_chose(monkeypatch):
    """By the device's events of a call, template arguments and everything that does not multiply left out."""

    class Event:
        def __init__(self, name, kind=DeviceType.CUDA):
            self.name, self.device_type = name, kind

    conv = "void sm90_xmma_dgrad_implicit_gemm_f16<a, b>(c)"
    events = [Event(conv), Event(conv), Event("cutlass_80_wgrad"), Event("void at::native::relu(x)")]
    events.append(Event("aten::convolution", DeviceType.CPU))

    @contextlib.contextmanager
    def profile(activities):
        yield types.SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(peers, "profile", profile)
    called = []
    assert peers.kernels_of(lambda: called.append(torch.is_inference_mode_enabled())) == (
        "2 sm90_xmma_dgrad_implicit_gemm_f16, cutlass_80_wgrad"
    )
    assert called == [True]


def test_a_step_without_its_launch_is_counted():
    def call():
        for launched in (True, False, True):
            observers.of_step(None, None, True)
            if launched:
                observers.of_launch("phases 64x64x64")
        observers.of_launch("a weight gradient")
        observers.of_step(None, None, True)

    assert peers._without_launch(call, gradients=False) == 2
    assert peers._without_launch(lambda: observers.of_launch("a norm"), gradients=True) == 0


def test_a_machine_that_pretends_asks_for_the_kernels(monkeypatch):
    """Whichever build of torch it has: the dry run of a CUDA build is one of kernels too."""
    for version, devices, expected in ((None, 0, "triton"), ("13.0", 0, "triton"), ("13.0", 1, "auto")):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda devices=devices: devices, raising=False)
        assert peers.backend() == expected


def test_memory_that_runs_out_in_float64_is_no_failure(tmp_path, monkeypatch):
    def expected(w):
        assert torch.backends.cudnn.benchmark is False
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(workload.Workload, "expected", property(expected))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    row = compared(tmp_path, None, ("eager", prepared()))
    assert row == {"status": "not available", "note": "the GPU has too little memory"}
    assert torch.backends.cudnn.benchmark is True


FAKE = """
import contextlib, sys
import torch

class Stream:
    def wait_stream(self, other): pass

class Event:
    def __init__(self, enable_timing=False): pass
    def record(self): pass
    def synchronize(self): pass
    def elapsed_time(self, end): return 1.0

class Graph:
    def replay(self): pass

def nothing(*arguments, **keywords): return contextlib.nullcontext()

for name, value in dict(
    Stream=Stream, current_stream=Stream, Event=Event, CUDAGraph=Graph, stream=nothing, graph=nothing,
    memory_allocated=lambda: 0, max_memory_allocated=lambda: 2**20, reset_peak_memory_stats=lambda: None,
).items():
    setattr(torch.cuda, name, value)

from benchmarks import cases, limits
from benchmarks.gpu import compare as gpu_compare, stages as gpu_stages, tune as gpu_tune

cases.CASES = cases.MINI[1:2]
gpu_stages.NUMERICS = gpu_stages.NUMERICS[:1]
gpu_tune.PLANS = 2
product, copy = gpu_compare.yardstick, gpu_compare.copy_bandwidth
gpu_compare.yardstick = lambda dtype, device, timer, sizes: product(dtype, device, timer, (64,))
gpu_compare.copy_bandwidth = lambda device, timer, size: copy(device, timer, 4096)
gpu_tune.tuning.cuda_timer = gpu_stages.timers.cold  # of which ttsem makes one call
sys.exit(gpu_stages.work(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="ttsem is not installed")
def test_stages_as_on_a_gpu(tmp_path):
    """Not the dry run but the code of a real one, on ttsem's kernels and a torch.cuda that answers and does nothing."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    variables = environ() | {"CNNFAST_CACHE": str(tmp_path / "cache"), "CNNFAST_GUARD": "1"}
    for stage in ("table", "candidates", "tune", "tuned", "prediction"):
        arguments = [
            "-m",
            "benchmarks.gpu.on_cpu",
            str(script),
            "--",
            stage,
            "--output",
            str(tmp_path),
            "--seconds",
            "300",
        ]
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    (row,) = gpu_rows.read(tmp_path / "table.json")["rows"]
    names = ("eager", *gpu_stages.GRAPHS)
    assert [(e["name"], e["status"], e["peak_bytes"]) for e in row["entries"]] == [(n, "timed", 2**20) for n in names]
    assert row["least_us"] > 0 and all("stubbed" not in e for e in row["entries"])
    text = gpu_report.page(gpu_rows.read(tmp_path / "table.json"))
    assert "| float16, over eager, both in CUDA graphs | 1 | 1.00x |" in text and "Of the limit: the least time" in text
    assert (
        "| 1000.0 | 1000.0 | 1000.0 | 1000.0 | 1000.0 | 1.00x | 1.00x |" in text and "| 1 / 1 | Triton phases" in text
    )
    (row,) = gpu_rows.read(tmp_path / "tune.json")["rows"]
    (step,) = row["steps"]
    assert len(step["plans"]) == 2 and step["kept"] and step["best"] == step["heuristic"] and step["valid"] >= 2
    (row,) = gpu_rows.read(tmp_path / "tuned.json")["rows"]
    assert step["best"] in row["entries"][-1]["path"]
    keys = {row["key"] for row in gpu_rows.read(tmp_path / "prediction.json")["rows"]}
    assert keys >= {f"{gpu_predict.HEURISTIC}, float16", f"{gpu_predict.LIMIT}, tuned, float16"}


# --- a row ------------------------------------------------------------------------------------------------------------


def prepared(scale=1.0, raises=None):
    def prepare(w):
        if raises is not None:
            raise raises
        model, x = w.modules(), w.input(False)
        return workload.Prepared(lambda: scale * model(x), path=lambda: "what ran")

    return prepare


def compared(tmp_path, timer, *implementations, problem=lambda: None):
    w = workload.Workload(cases.MINI[1], 2, torch.float32)
    steps = gpu_rows.Steps(gpu_rows.Rows(tmp_path, "table", RUN), "row", problem)
    chosen = tuple(workload.Implementation(name, prepare) for name, prepare in implementations)
    measure = gpu_compare.Measure(timer, stubbed=True)  # no memory is counted without a GPU
    return gpu_compare.compare(w, chosen, measure, steps)


def test_only_what_is_right_is_timed(tmp_path, capsys):
    timed = []

    def timer(calls):
        timed.extend(calls)
        return timers.stubbed(calls)

    row = compared(
        tmp_path,
        timer,
        ("eager", prepared()),
        ("cnnfast", prepared(1.01)),
        ("cnnfast, CUDA graph", prepared(raises=RuntimeError("no kernel image"))),
        ("torch.compile", prepared(raises=workload.NotAvailable("not here"))),
        ("eager channels_last", prepared(raises=torch.OutOfMemoryError("too large"))),
    )
    assert timed == ["eager"] and row["failures"] == 2
    entries = {e["name"]: (e["status"], e.get("note")) for e in row["entries"]}
    assert entries["eager"] == ("timed", None)
    assert entries["cnnfast"][0] == "wrong result" and "above" in entries["cnnfast"][1]
    assert entries["cnnfast, CUDA graph"] == ("failed", "RuntimeError: no kernel image")
    assert entries["torch.compile"] == ("not available", "not here")
    assert entries["eager channels_last"] == ("not available", "the GPU has too little memory")
    assert all("us" not in e for e in row["entries"] if e["status"] != "timed")
    data = {"stage": "table", "stubbed": True, "rows": [{"key": "row", **row}], "crashes": [], "left_out": []}
    text = gpu_report.page(data | {"ended": True})
    assert "- row: cnnfast: wrong result: relative error" in text and "RuntimeError: no kernel image" in text


def test_a_timer_that_fails_costs_the_times_only(tmp_path, capsys):
    def timer(calls):
        raise RuntimeError("event not ready")

    row = compared(tmp_path, timer, ("eager", prepared()))
    (entry,) = row["entries"]
    assert entry["status"] == "checked" and entry["note"] == "not timed: RuntimeError: event not ready"


def test_a_lost_device_ends_the_process_and_names_the_step(tmp_path, capsys):
    answers = iter([None, None, "RuntimeError: illegal address", "RuntimeError: illegal address"])
    with pytest.raises(SystemExit) as ended:
        compared(tmp_path, None, ("eager", prepared()), ("cnnfast", prepared()), problem=lambda: next(answers))
    assert ended.value.code == gpu_rows.RESTART
    at = json.loads((tmp_path / "table.at.json").read_text())
    assert at == {"key": "row", "step": "cnnfast", "reason": "RuntimeError: illegal address"}
    assert gpu_rows.blame(tmp_path, "table", "?") == "row, cnnfast: RuntimeError: illegal address"
    row = compared(tmp_path, None, ("eager", prepared()), ("cnnfast", prepared()))
    assert [e["status"] for e in row["entries"]] == ["checked", "failed"]
    # The same again would be for ever.
    gpu_rows.Rows(tmp_path, "table", RUN).mark("row", "cnnfast", "RuntimeError: illegal address")
    assert gpu_rows.blame(tmp_path, "table", "?") is None


# --- prediction -------------------------------------------------------------------------------------------------------


def test_rank_correlation():
    assert gpu_predict.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert gpu_predict.rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert gpu_predict.rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)  # 1 - 6*4 / (5*24)
    assert gpu_predict.rank_correlation([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1.0)
    assert gpu_predict.rank_correlation([1, 1, 1], [1, 2, 3]) is None
    assert gpu_predict.rank_correlation([1, 2], [1, 2]) is None


def test_prediction_reads_what_was_measured(tmp_path):
    tune = gpu_rows.Rows(tmp_path, "tune", RUN)
    for name, us in (("a", (2.0, 1.0, 3.0)), ("b", (2.0, 4.0, 8.0))):
        plans = [{"plan": str(i), "us": t, "clocks": float(i)} for i, t in enumerate(us)]
        plans.append({"plan": "unknown to the model", "us": 0.5, "clocks": None})
        step = {"plans": plans, "heuristic_us": us[0], "best_us": min(us)}
        tune.add({"key": name, "dtype": "float16", "steps": [step, {"plans": [], "heuristic_us": None}]})
    tune.add({"key": "c", "dtype": "float16", "note": "no step of it has a Triton kernel"})
    for stage, us in (("table", 20.0), ("tuned", 10.0)):
        entries = [{"name": "cnnfast", "us": {"median": us}}]
        row = {"key": "a", "dtype": "float16", "entries": entries, "least_us": 5.0}
        gpu_rows.Rows(tmp_path, stage, RUN).add(row)
    rows = {item.key: item.work(None) for item in gpu_predict.prediction_items(tmp_path)}
    over = rows[f"{gpu_predict.HEURISTIC}, float16"]
    assert over["count"] == 2 and over["mean"] == pytest.approx(2**0.5) and over["most"] == 2.0
    order = rows[f"{gpu_predict.ORDER}, float16"]
    assert order["mean"] == pytest.approx(0.75) and order["least"] == pytest.approx(0.5)
    assert rows[f"{gpu_predict.TUNED}, float16"]["mean"] == pytest.approx(2.0)
    assert rows[f"{gpu_predict.LIMIT}, table, float16"]["mean"] == pytest.approx(0.25)
    assert rows[f"{gpu_predict.LIMIT}, tuned, float16"]["mean"] == pytest.approx(0.5)
