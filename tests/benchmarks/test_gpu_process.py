"""Rows of the GPU run on disk: their time, crashes and hangs, parts side by side; the kernel tests among them."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from benchmarks.gpu import process as gpu_process
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import rows as gpu_rows

ROOT = Path(__file__).resolve().parents[2]
RUN = {"code": "abc"}


def environ():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


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
from benchmarks.gpu.rows import Item, Rows, work_through

def lose(steps):  # as after an illegal address: whatever waits raises
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    def kernel():
        torch.cuda.is_available, torch.cuda.synchronize = (lambda: True), synchronize
    steps.attempt("kernel", kernel)

def caught(steps, step, call):
    from benchmarks.gpu.rows import Failed
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


def test_crashes_and_hangs_cost_only_their_own_step(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(TOY)

    def command(seconds):
        return [sys.executable, str(script), str(tmp_path), str(seconds)]

    ending = gpu_process.supervise(command, tmp_path, "toy", 120.0, 3.0, environ(), ROOT)
    assert ending.status == "failed", (tmp_path / "toy.log").read_text()
    assert ending.crashes == (
        "dies, kernel: the process died of SIGKILL",
        "hangs, kernel: stopped: hung for 3 s",
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
    assert "## Steps that ended the process" in text and "- hangs, kernel: stopped: hung for 3 s" in text


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


def test_an_interrupt_stops_the_processes(tmp_path):
    stop = threading.Event()
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    threading.Timer(1.0, stop.set).start()
    start = time.monotonic()
    ending = gpu_process.supervise(lambda s: command, tmp_path, "x", 500.0, 500.0, environ(), ROOT, stop=stop)
    assert ending == gpu_process.Ending("failed") and time.monotonic() - start < 60


def test_a_lost_device_is_noticed(monkeypatch):
    assert gpu_rows.device_problem() is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu_rows.device_problem() is None

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be ...")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert gpu_rows.device_problem() == "RuntimeError: CUDA error: an illegal memory access was encountered"


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
        plain = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.plugin", "--continue-on-collection-errors"]
        return [sys.executable, "-m", "pytest", *plain, *(str(tmp_path / f) for f in files), *mine]

    ending = gpu_process.supervise(command, tmp_path, "tests", 300.0, 100.0, environ(), tmp_path)
    return ending, gpu_rows.read(tmp_path / "tests.json")


def test_kernel_tests_go_on_after_a_crash(tmp_path):
    (tmp_path / "test_a.py").write_text(TESTS)
    (tmp_path / "test_b.py").write_text("import no_such_module")
    (tmp_path / "test_c.py").write_text("import cnnfast.no_such_module")
    ending, data = run_tests(tmp_path, 300.0, ("test_a.py", "test_b.py", "test_c.py"))
    assert ending.status == "failed" and len(ending.crashes) == 2, (tmp_path / "tests.log").read_text()
    found = {row["key"].split("::")[-1]: (row["outcome"], row.get("note", "")) for row in data["rows"]}
    assert [found.pop(f"test_right[{i}]") for i in range(3)] == [("passed", "")] * 3
    assert found.pop("test_slow") == ("passed", "") and found.pop("test_skipped") == ("skipped", "")
    assert found.pop("test_wrong")[0] == "failed"
    assert found.pop("test_dies") == ("crashed", "the process died of SIGKILL")
    lost = found.pop("test_loses_the_device")
    assert lost == ("crashed", "RuntimeError: CUDA error: device-side assert triggered")
    assert [outcome for outcome, _ in found.values()] == 2 * ["not collected"]
    assert [note for _, note in found.values()] == [
        "ModuleNotFoundError: No module named 'no_such_module'",  # may be missing where cnnfast is all that is wanted
        "ModuleNotFoundError: No module named 'cnnfast.no_such_module'",
    ]
    failed = {row["key"].split("/")[-1].split("::")[-1] for row in data["rows"] if row.get("failures")}
    assert failed == {"test_wrong", "test_dies", "test_loses_the_device", "test_c.py"}
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
    from benchmarks.gpu.plugin import in_turn

    class Test:
        def __init__(self, path, name, slow=False):
            self.path, self.name, self.slow = path, name, slow

        def get_closest_marker(self, name):
            return self.slow or None

    items = [Test("a", "a1"), Test("a", "a2", True), Test("a", "a3"), Test("b", "b1"), Test("b", "b2")]
    assert [t.name for t in in_turn(items)] == ["a1", "b1", "a3", "b2", "a2"]
