"""The GPU run (`benchmarks.gpu`): its stages and their time, crashes and resumption, a dry run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    cases,
    gpu,
    gpu_compare,
    gpu_peers,
    gpu_predict,
    gpu_process,
    gpu_report,
    gpu_rows,
    gpu_stages,
    gpu_timing,
    peers,
)
from cnnfast import env

ROOT = Path(__file__).resolve().parent.parent
RUN = {"code": "abc"}
NO_CACHE = {False: None, True: None}


def python(code):
    return ("-c", code)


@pytest.mark.skipif(env.cuda_error() is None, reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path / "new")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "no NVIDIA GPU that torch can use" in done.stderr and "--dry-run" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "new").exists()


# --- stages -----------------------------------------------------------------------------------------------------------


def test_a_failing_stage_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_process, "GRACE", 0.0)
    stages = (
        gpu.Stage("breaks", "a", 1, command=python("print('first'); raise SystemExit('the reason')")),
        gpu.Stage("dies", "b", 1, command=python("import os; os.kill(os.getpid(), 11)")),
        gpu.Stage("hangs", "c", 0.2, command=python("import time; time.sleep(600)")),
        gpu.Stage("absent", "d", 1, command=python(""), needs="no_such_module"),
        gpu.Stage("works", "e", 1, command=python("print('fine')")),
    )
    assert gpu.run(stages, tmp_path, dry_run=True, minutes=0.3) == 1
    data = json.loads((tmp_path / "summary.json").read_text())
    assert [s["status"] for s in data["stages"]] == ["failed", "failed", "timed out", "skipped", "ok"]
    assert data["stages"][3]["detail"] == "no_such_module is not installed: pip install no_such_module"
    text = (tmp_path / "summary.md").read_text()
    assert "the reason" in text and "first" in text and "dry run" in text
    assert (tmp_path / "works.log").read_text() == "fine\n"


def test_every_stage_command_exists():
    for stage in gpu.STAGES:
        for dry_run in (False, True):
            argv = gpu._command(stage, Path("folder"), dry_run, 0, 1, 5.0)
            if stage.command is not None or stage.name == "tests":
                assert argv[1] == "-m" and importlib.util.find_spec(argv[2].split(".")[0]) is not None
            else:
                assert str(gpu.WORKER) in argv and gpu.WORKER.is_file() and stage.name in gpu_stages.STAGES


@pytest.mark.parametrize("on", [True, False])
def test_tf32_is_what_torch_and_cnnfast_read(on):
    from benchmarks.gpu_compare import set_tf32
    from cnnfast.dispatch import conv_tf32

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        set_tf32(on)
        assert conv_tf32() is on and torch.backends.cudnn.allow_tf32 is on
        assert torch.backends.cuda.matmul.allow_tf32 is on
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="ttsem is not installed")
def test_dry_run_executes_kernels_and_marks_its_files(tmp_path):
    stages = [s for s in gpu.STAGES if s.name == "table"]
    assert gpu.run(stages, tmp_path, dry_run=True) == 0, (tmp_path / "table.log").read_text()
    data = json.loads((tmp_path / "table.json").read_text())
    ours = data["rows"][0]["entries"][-1]
    assert ours["name"] == "cnnfast" and ours["status"] == "timed" and ours["stubbed"]
    assert ours["path"].startswith("Triton phases") and data["stubbed"]
    page = (tmp_path / "table.md").read_text()
    assert gpu_report.STUBBED in page and "| stub | stub |" in page
    assert gpu_report.STUBBED in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="ttsem is not installed")
def test_dry_run_of_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CNNFAST_GUARD", raising=False)
    run = gpu.identity(True)  # the same at both runs, whatever is edited meanwhile
    monkeypatch.setattr(gpu, "identity", lambda dry_run: run)
    out = tmp_path / "out"
    assert gpu.main(["--dry-run", "--minutes", "30", "--output", str(out)]) == 0, (out / "summary.md").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert [s["stage"] for s in summary["stages"]] == [s.name for s in gpu.STAGES]
    assert {s["status"] for s in summary["stages"]} == {"ok"} and summary["dry_run"]
    assert not (tmp_path / "cache").exists()  # plans of stubbed times must not reach a user's cache
    for path in out.iterdir():
        text = path.read_text()
        if path.suffix == ".json" and path.stem not in ("run", "summary"):
            assert json.loads(text)["stubbed"] and json.loads(text)["rows"]
        if path.suffix == ".md":
            assert gpu_report.STUBBED in text
        if path.suffix != ".log":
            assert not [place for place in (str(ROOT), sys.prefix, str(tmp_path)) if place in text]
    assert "wrote" not in (out / "summary.md").read_text()
    # Nothing is left to do.
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.log")}
    assert gpu.main(["--dry-run", "--resume", "--output", str(out)]) == 0
    assert before == {p.name: p.stat().st_mtime_ns for p in out.glob("*.log")}


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_of_other_code_are_not_carried_on(tmp_path):
    rows = gpu_rows.Rows(tmp_path, "table", RUN)
    rows.add({"key": "a"})
    assert "a" in gpu_rows.Rows(tmp_path, "table", RUN)
    assert "a" not in gpu_rows.Rows(tmp_path, "table", {"code": "other"})


def test_time_bounds_the_rows_and_names_what_is_left_out(tmp_path, capsys):
    rows = gpu_rows.Rows(tmp_path, "table", RUN)
    made = []

    def item(key, seconds=0.1):
        return gpu_rows.Item(key, lambda steps: made.append(key) or {"failures": key == "bad"}, seconds)

    items = [item("a"), item("long", 1e6), item("bad"), item("b")]
    assert gpu_rows.work_through(rows, items, 60.0, str) == 1
    assert made == ["a", "bad", "b"]
    data = gpu_rows.read(rows.path)
    assert data["ended"] and data["left_out"] == ["long"] and [r["key"] for r in data["rows"]] == made
    # A second run makes what is missing, and nothing else.
    again = gpu_rows.Rows(tmp_path, "table", RUN)
    gpu_rows.work_through(again, [*items, item("new")], 2e6, str)
    assert made == ["a", "bad", "b", "long", "new"] and not gpu_rows.read(rows.path)["left_out"]
    assert "2 rows" not in capsys.readouterr().out


def test_a_row_that_raises_is_a_failed_row(tmp_path, capsys):
    def raising(steps):
        raise RuntimeError("no such thing\nat all")

    rows = gpu_rows.Rows(tmp_path, "table", RUN)
    assert gpu_rows.work_through(rows, [gpu_rows.Item("a", raising)], 60.0, str) == 1
    (row,) = gpu_rows.read(rows.path)["rows"]
    assert row == {"key": "a", "status": "failed", "note": "RuntimeError: no such thing", "failures": 1}
    assert "Traceback" in capsys.readouterr().err


TOY = """
import os, sys, time, torch
from pathlib import Path
from benchmarks.gpu_rows import Item, Rows, work_through

def lose(steps):  # as after an illegal address: whatever waits raises
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    def kernel():
        torch.cuda.is_available, torch.cuda.synchronize = (lambda: True), synchronize
    steps.attempt("kernel", kernel)

def caught(steps, step, call):
    from benchmarks.gpu_rows import Failed
    try:
        steps.attempt(step, call)
    except Failed as failure:
        return {"note": str(failure)}
    return {}

rows = Rows(Path(sys.argv[1]), "toy", {"code": "abc"})
die = lambda: os.kill(os.getpid(), 9)
items = [
    Item("fine", lambda steps: caught(steps, "kernel", lambda: None)),
    Item("dies", lambda steps: caught(steps, "kernel", die) | caught(steps, "other", lambda: None)),
    Item("hangs", lambda steps: caught(steps, "kernel", lambda: time.sleep(600))),
    Item("dies outside a step", lambda steps: die()),
    Item("loses the device", lose),
    Item("last", lambda steps: {}),
]
sys.exit(1 if work_through(rows, items, float(sys.argv[2]), str) else 0)
"""


def environ():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_crashes_and_hangs_cost_only_their_own_step(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(TOY)

    def command(seconds):
        return [sys.executable, str(script), str(tmp_path), str(seconds)]

    ending = gpu_process.supervise(command, tmp_path, "toy", 120.0, 6.0, environ(), ROOT)
    assert ending.status == "failed", (tmp_path / "toy.log").read_text()
    assert ending.crashes == (
        "dies, kernel: the process died of SIGKILL",
        "hangs, kernel: stopped: hung for 6 s",
        "dies outside a step: the process died of SIGKILL",
        "loses the device, kernel: RuntimeError: CUDA error: an illegal memory access was encountered",
    )
    data = gpu_rows.read(tmp_path / "toy.json")
    notes = {row["key"]: row.get("note") for row in data["rows"]}
    assert list(notes) == ["fine", "dies", "hangs", "dies outside a step", "loses the device", "last"]
    assert notes["fine"] is None and notes["last"] is None
    assert notes["dies"] == "the process died of SIGKILL" and "hung" in notes["hangs"]
    assert "illegal memory access" in notes["loses the device"]
    assert data["ended"] and not (tmp_path / "toy.at.json").exists()
    text = gpu_report.page(data)
    assert "## Steps that ended the process" in text and "- hangs, kernel: stopped: hung for 6 s" in text


def test_out_of_time_is_no_fault_of_the_row(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(
        TOY.replace('Item("fine"', 'Item("slow", lambda s: caught(s, "", lambda: time.sleep(600))), Item("f"')
    )

    def command(seconds):
        return [sys.executable, str(script), str(tmp_path), str(seconds)]

    ending = gpu_process.supervise(command, tmp_path, "toy", 4.0, 60.0, environ(), ROOT, grace=1.0)
    assert ending == gpu_process.Ending("timed out")
    data = gpu_rows.read(tmp_path / "toy.json")
    assert not data["ended"] and not data["crashes"] and not (tmp_path / "toy.at.json").exists()


def test_parts_share_the_rows_and_are_merged(tmp_path):
    whole = gpu_rows.Rows(tmp_path, "check", RUN)
    whole.add({"key": "before"})
    for part in range(2):
        rows = gpu_rows.Rows(tmp_path, "check", RUN, part, 2)
        assert "before" in rows
        rows.add({"key": f"row {part}"})
        rows.end([f"left {part}"])
    data = gpu_rows.collect(tmp_path, "check")
    assert [row["key"] for row in data["rows"]] == ["before", "row 0", "row 1"]
    assert data["left_out"] == ["left 0", "left 1"] and data["ended"]
    assert [p.name for p in tmp_path.iterdir()] == ["check.json"]
    assert gpu_rows.collect(tmp_path, "check") == gpu_rows.read(tmp_path / "check.json")


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


def test_a_graph_is_captured_after_warm_up_on_its_stream(fake_cuda):
    y = torch.zeros(1)

    def call():
        fake_cuda.append("call")
        assert not torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
        return y

    prepared = peers.Prepared(call, lambda y: y)
    implementation = gpu_peers._graph(lambda w: prepared)
    with torch.inference_mode():
        ready = implementation(None)
    expected = ["wait", "enter side stream", "call", "call", "call", "leave side stream", "wait", "synchronize"]
    assert fake_cuda == [*expected, "enter capture", "call", "leave capture", "synchronize"]
    fake_cuda.clear()
    assert ready.result(ready.call()) is y and fake_cuda == ["replay"]


def test_host_time_waits_for_nothing_inside_a_block(fake_cuda):
    timings = gpu_timing.host({"a": lambda: fake_cuda.append("a"), "b": lambda: fake_cuda.append("b")}, 2, 3)
    block = ["synchronize", "a", "a", "a", "synchronize", "b", "b", "b"]
    assert fake_cuda == ["a", "b", *block, *block, "synchronize"]
    assert all(len(t.seconds) == 2 and t.calls == 3 and t.median > 0 for t in timings.values())


def test_calls_in_a_row_are_timed_by_events(fake_cuda):
    timings = gpu_timing.warm({"a": lambda: fake_cuda.append("a")})
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
    timings = gpu_timing.cold({"a": lambda: "a", "b": lambda: "b"}, 2)
    assert asked == ["a", "b", "a", "b"]
    assert timings["a"].seconds == (2e-3, 2e-3) and timings["b"].median == 4e-3


def test_a_lost_device_is_noticed(monkeypatch):
    assert gpu_rows.device_problem() is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu_rows.device_problem() is None

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert gpu_rows.device_problem() == "RuntimeError: CUDA error: an illegal memory access was encountered"


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

from benchmarks import cases, gpu_compare, gpu_stages, gpu_tune, limits

cases.CASES = cases.MINI[1:2]
gpu_stages.NUMERICS = gpu_stages.NUMERICS[:1]
gpu_tune.PLANS = 2
product, copy = gpu_compare.yardstick, gpu_compare.copy_bandwidth
gpu_compare.yardstick = lambda dtype, device, timer, sizes: product(dtype, device, timer, (64,))
gpu_compare.copy_bandwidth = lambda device, timer, size: copy(device, timer, 4096)
gpu_tune.tuning.cuda_timer = gpu_stages.gpu_timing.cold  # of which ttsem makes one call
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
        arguments = ["-m", "ttsem.sanitize", str(script), "--", stage, "--output", str(tmp_path), "--seconds", "300"]
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
        return peers.Prepared(lambda: scale * model(x), lambda y: y, lambda: "what ran")

    return prepare


def compared(tmp_path, timer, *implementations, problem=lambda: None):
    w = peers.Workload(cases.MINI[1], 2, torch.float32)
    steps = gpu_rows.Steps(gpu_rows.Rows(tmp_path, "table", RUN), "row", problem)
    chosen = tuple(peers.Implementation(name, prepare) for name, prepare in implementations)
    measure = gpu_compare.Measure(timer, stubbed=True)  # no memory is counted without a GPU
    return gpu_compare.compare(w, chosen, measure, steps)


def test_only_what_is_right_is_timed(tmp_path, capsys):
    timed = []

    def timer(calls):
        timed.extend(calls)
        return gpu_timing.stubbed(calls)

    row = compared(
        tmp_path,
        timer,
        ("eager", prepared()),
        ("cnnfast", prepared(1.01)),
        ("cnnfast, CUDA graph", prepared(raises=RuntimeError("no kernel image"))),
        ("torch.compile", prepared(raises=peers.NotAvailable("not here"))),
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


# --- the kernel tests' plugin -----------------------------------------------------------------------------------------

TESTS = """
import os, time
import pytest

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.parametrize("i", range(3))
def test_right(i): pass

def test_wrong(): assert 1 == 2, "what is wrong"

def test_skipped(): pytest.skip("not here")

def test_dies(): os.kill(os.getpid(), 9)

def test_loses_the_device(monkeypatch):
    import torch
    def synchronize():
        raise RuntimeError("CUDA error: device-side assert triggered")
    torch.cuda.is_available, torch.cuda.synchronize = (lambda: True), synchronize
"""


def run_tests(tmp_path, seconds=300.0, files=("test_a.py",), *options):
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: slow\n")

    def command(left):
        mine = ["--gpu-output", str(tmp_path), "--gpu-seconds", str(min(seconds, left)), *options]
        plain = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_pytest", "--continue-on-collection-errors"]
        return [sys.executable, "-m", "pytest", *plain, *(str(tmp_path / f) for f in files), *mine]

    ending = gpu_process.supervise(command, tmp_path, "tests", 300.0, 100.0, environ(), tmp_path)
    return ending, gpu_rows.read(tmp_path / "tests.json")


def test_kernel_tests_go_on_after_a_crash(tmp_path):
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "test_b.py").write_text("import no_such_module")
    ending, data = run_tests(tmp_path, 300.0, ("test_a.py", "test_b.py"))
    assert ending.status == "failed" and len(ending.crashes) == 2, (tmp_path / "tests.log").read_text()
    found = {row["key"].split("::")[-1]: (row["outcome"], row.get("note", "")) for row in data["rows"]}
    assert [found.pop(f"test_right[{i}]") for i in range(3)] == [("passed", "")] * 3
    assert found.pop("test_slow") == ("passed", "") and found.pop("test_skipped") == ("skipped", "")
    assert found.pop("test_wrong")[0] == "failed"
    assert found.pop("test_dies") == ("crashed", "the process died of SIGKILL")
    lost = found.pop("test_loses_the_device")
    assert lost == ("crashed", "RuntimeError: CUDA error: device-side assert triggered")
    ((outcome, note),) = found.values()
    assert outcome == "not collected" and "no_such_module" in note
    assert data["ended"] and list(data["left_out"]) == []
    assert [row["key"].endswith("test_slow") for row in data["rows"] if row["outcome"] == "passed"][-1]
    text = gpu_report.page(data)
    assert "4 passed" in text and "test_wrong: AssertionError: what is wrong" in text
    # All is done: nothing runs again.
    again, same = run_tests(tmp_path, 300.0, ("test_a.py",))
    assert same["rows"] == data["rows"] and again.status == "failed"


def test_kernel_tests_stop_at_their_time(tmp_path):
    (tmp_path / "test_a.py").write_text("def test_one(): pass\ndef test_two(): pass\n")
    ending, data = run_tests(tmp_path, -1.0)
    assert ending.status == "ok" and not data["rows"] and len(data["left_out"]) == 2 and data["ended"]
    assert "2, from " in gpu_report.digest(data) and "test_one" in gpu_report.digest(data)
    ending, data = run_tests(tmp_path, 300.0, ("test_a.py",), "--gpu-limit", "1")
    assert ending.status == "ok" and len(data["rows"]) == 1 and not data["left_out"]


def test_files_take_turns():
    from benchmarks.gpu_pytest import in_turn

    class Test:
        def __init__(self, path, name, slow=False):
            self.path, self.name, self.slow = path, name, slow

        def get_closest_marker(self, name):
            return self.slow or None

    items = [Test("a", "a1"), Test("a", "a2", True), Test("a", "a3"), Test("b", "b1"), Test("b", "b2")]
    assert [t.name for t in in_turn(items)] == ["a1", "b1", "a3", "b2", "a2"]


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


# --- a run ------------------------------------------------------------------------------------------------------------


def counting(name, folder, fails_first=False):
    """A stage that counts its runs in a file; the first one may fail."""
    code = f"n = len(p.read_text()) if p.exists() else 0; p.write_text('x' * (n + 1)); sys.exit({int(fails_first)} > n)"
    code = f"import sys, pathlib; p = pathlib.Path({str(folder / name)!r}); {code}"
    return gpu.Stage(name, "counts", 1, command=python(code))


def test_resume_keeps_what_is_finished(tmp_path, capsys):
    out, count = tmp_path / "out", tmp_path
    stages = (counting("fine", count), counting("flaky", count, fails_first=True))

    def runs():
        return [len((count / s.name).read_text()) for s in stages]

    def go(resume, chosen=stages):
        return gpu.run(chosen, out, dry_run=True, minutes=1, resume=resume, everything=stages)

    assert go(resume=True) == 1 and runs() == [1, 1]  # nothing there to go on with
    assert go(resume=True) == 0 and runs() == [1, 2]
    assert "fine: ok in an earlier run, kept" in capsys.readouterr().out
    assert go(resume=False) == 0 and runs() == [2, 3]
    assert go(resume=False, chosen=stages[1:]) == 0 and runs() == [2, 4]  # the other's result stays in the summary
    data = json.loads((out / "summary.json").read_text())
    assert [(s["stage"], s["status"]) for s in data["stages"]] == [("fine", "ok"), ("flaky", "ok")]


def test_another_machine_or_code_begins_anew(tmp_path, monkeypatch):
    out, stage = tmp_path / "out", counting("fine", tmp_path)
    old = gpu_rows.Rows(tmp_path, "table", RUN)
    assert gpu.run([stage], out, True, 1, everything=[stage, gpu.STAGES[3]]) == 0
    old.path.rename(out / "table.json")
    before = gpu.identity(True)
    monkeypatch.setattr(gpu, "identity", lambda dry_run: before | {"gpu": "another"})
    assert gpu.run([stage], out, True, 1, resume=True, everything=[stage, gpu.STAGES[3]]) == 0
    assert len((tmp_path / "fine").read_text()) == 2 and not (out / "table.json").exists()
    assert json.loads((out / "run.json").read_text())["gpu"] == "another"


def test_identity_is_of_the_code():
    a = gpu.identity(True)
    assert a == gpu.identity(True) and len(a["code"]) == 16 and a["gpu"] == "none"


def test_time_that_is_not_used_is_the_later_stages(tmp_path, monkeypatch):
    given, clock = {}, iter([0.0, 0.0, 10.0, 10.0 + 25.0])

    def run_stage(stage, folder, dry_run, seconds, cache):
        given[stage.name] = seconds
        return gpu_report.Outcome(stage.name, "", "ok", 0.0, "")

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    stages = [gpu.Stage("a", "", 1), gpu.Stage("b", "", 1), gpu.Stage("c", "", 2)]
    assert gpu.run(stages, tmp_path, True, minutes=1, everything=stages) == 0
    assert given == {"a": 15.0, "b": 50.0 / 3, "c": 25.0}


def test_shares_are_ten_minutes():
    assert sum(s.share for s in gpu.STAGES) == pytest.approx(gpu.MINUTES, rel=0.02)
    assert [s.name for s in gpu.STAGES][:4] == ["environment", "check", "tests", "table"]


def test_rows_come_in_order_of_importance():
    found = gpu_stages.workloads(cases.CASES)
    assert len({w.name for w in found}) == len(found)
    first = found[0]
    assert first.case.suite == "generator" and first.dtype == torch.float16 and first.batch == 16
    half = [w.dtype_name for w in found[: len(cases.CASES) * 4]]
    assert list(dict.fromkeys(half)) == ["float16", "tf32", "bfloat16", "float32"]
    assert {w.case.name for w in found[: len(cases.CASES)]} == {c.name for c in cases.CASES}
    assert {(w.case.name, w.batch) for w in found} == {(c.name, b) for c in cases.CASES for b in c.batches}


def test_published_text_has_no_paths_of_this_machine():
    text = gpu_report.scrub(f"{ROOT}/x.py {Path.home()}/y {sys.prefix}/lib")
    assert str(ROOT) not in text and "REPOSITORY/x.py" in text and "PYTHON/lib" in text
    ignored = (ROOT / ".gitignore").read_text()
    assert "/benchmarks/results/**/*.log" in ignored


def test_an_interrupt_ends_the_stage_and_keeps_what_is_there(tmp_path, monkeypatch, capsys):
    started = []

    def interrupt(*arguments, **keywords):
        started.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_stage", interrupt)
    monkeypatch.setattr(gpu, "obstacle", lambda dry_run: None)
    assert gpu.main(["--dry-run", "--stage", "check", "--output", str(tmp_path)]) == 130 and started
    assert "--resume goes on" in capsys.readouterr().err and (tmp_path / "summary.md").exists()


def test_an_interrupt_stops_the_processes(tmp_path):
    import threading
    import time

    stop = threading.Event()
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    threading.Timer(1.0, stop.set).start()
    start = time.monotonic()
    ending = gpu_process.supervise(lambda s: command, tmp_path, "x", 500.0, 500.0, environ(), ROOT, stop=stop)
    assert ending == gpu_process.Ending("failed") and time.monotonic() - start < 60


def test_what_the_driver_says(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.driver_facts() == {}
    answer = "570.1, 1980 MHz, 2619 MHz, 700.00 W, Enabled, 31"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "{answer}"\n')
    tool.chmod(0o755)
    facts = gpu.driver_facts()
    assert facts["GPU driver_version"] == "570.1" and facts["GPU temperature.gpu"] == "31" and len(facts) == 6
    assert "--query-gpu=driver_version,clocks.max.sm," in (tmp_path / "asked").read_text()
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu.driver_facts() == {}


@pytest.mark.parametrize(("cpus", "gib", "expected"), [(1, 80, 1), (4, 80, 2), (64, 80, 6), (64, 24, 2), (64, 8, 1)])
def test_processes_side_by_side(cpus, gib, expected, monkeypatch):
    class Properties:
        total_memory = gib * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: cpus)
    assert gpu.parts(dry_run=False) == expected and gpu.parts(dry_run=True) == 1


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--minutes", "0"])
    assert "--minutes 0 must be more than 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown implementation TensorRT: expected some of eager"):
        gpu_peers.find("TensorRT")
