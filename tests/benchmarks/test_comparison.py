"""The benchmarks' own correctness: what they count, what they compare, what they write. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cases, compare, limits, memory, peers, report, timers
from benchmarks.report import markdown
from benchmarks.workload import TOLERANCES, Implementation, NotAvailable, Prepared, Workload
from cnnfast.timing import Timing

ROOT = Path(__file__).resolve().parents[2]
FAST = Timing((1e-3, 2e-3, 3e-3), 1)
GENERATOR, LAYER, UPSAMPLE = cases.MINI[-2], cases.MINI[1], cases.MINI[-1]
KINDS = {c.name: c for c in cases.MINI}


def fake_timer(calls):
    """Calls everything once; says 2 ms for each."""
    for call in calls.values():
        call()
    return dict.fromkeys(calls, FAST)


# --- implementations --------------------------------------------------------------------------------------------------


NOT_COMPILED = [i for i in peers.IMPLEMENTATIONS if "torch.compile" not in i.name]


@pytest.mark.parametrize("dtype", cases.DTYPES["cpu"], ids=str)
@pytest.mark.parametrize("implementation", NOT_COMPILED, ids=lambda i: i.name)
@pytest.mark.parametrize("case", [GENERATOR, UPSAMPLE, *cases.MINI[3:-2]], ids=lambda c: c.name)
def test_implementation_passes_its_check(case, implementation, dtype):
    workload = Workload(case, 2, dtype)
    try:
        prepared = implementation.prepare(workload)
    except NotAvailable as reason:
        if "1-D" in str(reason):
            assert case.name == "mini_1d" and ("channels_last" in implementation.name or "NCHW" in implementation.name)
            return
        missing = [p for p in ("onnxruntime", "openvino", "onnx") if importlib.util.find_spec(p) is None]
        no_bfloat16 = implementation.name == "onnxruntime" or "AVX2 only" in str(reason)
        assert missing or no_bfloat16 and dtype == torch.bfloat16
        pytest.skip(str(reason))
    error, wrong = workload.check(prepared)
    assert wrong is None and 0 < error <= workload.tolerance
    if implementation.name.startswith("cnnfast"):
        assert any(word in prepared.path() for word in ("oneDNN", "ATen", "mm"))


def test_channels_last_is_what_its_peers_get():
    w = Workload(UPSAMPLE, 2, torch.float32)
    assert w.input(True).is_contiguous(memory_format=torch.channels_last) and w.has_formats
    one = Workload(KINDS["mini_1d"], 2, torch.float32)
    assert one.input(True).is_contiguous() and not one.has_formats


def test_path_is_what_ran():
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    path = peers.path_of(lambda: torch.mm(torch.nn.functional.conv2d(x, w)[0, 0], torch.ones(3, 3)))
    assert path == "ATen convolution, mm"


# --- the comparison ---------------------------------------------------------------------------------------------------


def off(scale, name="off"):
    def prepare(workload):
        model = workload.modules()
        return Prepared(lambda: scale * model(workload.x))

    return Implementation(name, prepare)


def raising(exception):
    def prepare(workload):
        raise exception

    return Implementation("raising", prepare)


def test_wrong_result_gets_no_time(capsys):
    w = Workload(LAYER, 2, torch.float32)
    timed = []

    def timer(calls):
        timed.extend(calls)
        return fake_timer(calls)

    row = compare.compare(
        w, (off(1.0, "eager"), off(1.001)), timer, limits.Yardstick(64, lambda: None), bandwidth=1e9, with_memory=True
    )
    assert timed == ["eager", compare.MM]
    good, bad = row.entries
    assert good.status == "timed" and good.timing == FAST and row.speedup(good).median == 1.0
    assert row.least_bytes == LAYER.least_bytes(2, 4) and 0 < row.of_limit(good)
    assert bad.status == "wrong result" and bad.timing is None and bad.error == pytest.approx(1e-3, rel=0.2)
    assert row.tflops(bad) is row.fraction(bad) is row.speedup(bad) is row.of_limit(bad) is bad.peak is None
    text = markdown(report.Report({}, "x", (row,)))
    assert "- off: wrong result: relative error 0.001 is above 1e-05 (mini_dcgan.2, float32, batch 2)" in text
    assert "| off | 1.0e-03 |" in text


def test_nan_is_a_wrong_result():
    w = Workload(LAYER, 2, torch.float32)
    (entry,) = compare.compare(w, (off(float("nan")),), fake_timer, None).entries
    assert entry.status == "wrong result"


def test_failure_and_absence_are_entries(capsys):
    w = Workload(LAYER, 2, torch.float32)
    implementations = (raising(NotAvailable("no such package")), raising(RuntimeError("boom\nmore")))
    rows = [compare.compare(w, (i,), fake_timer, None) for i in implementations]
    assert [(r.entries[0].status, r.entries[0].note) for r in rows] == [
        ("not available", "no such package"),
        ("failed", "RuntimeError: boom"),
    ]
    assert "Traceback" in capsys.readouterr().err


def test_tensors_of_a_row_do_not_outlive_it():
    w = Workload(LAYER, 2, torch.float32)
    compare.compare(w, (off(1.0),), fake_timer, None)
    assert not {"x", "source", "expected"} & set(vars(w))


# --- limits and memory ------------------------------------------------------------------------------------------------


def test_yardstick_is_the_fastest_product():
    def timer(calls):
        return {name: Timing((1e-6 if name == "8" else 1.0,), 1) for name in calls}

    assert limits.yardstick(torch.float32, "cpu", timer, (4, 8, 16)).size == 8


def test_a_copy_counts_what_is_read_and_written():
    assert limits.copy_bandwidth("cpu", fake_timer, 1000) == pytest.approx(2 * 1000 / FAST.median)
    assert limits.copy_bytes() >= 16 * limits.MIB


@pytest.mark.parametrize(("macs", "least", "seconds", "by"), [(500, 1, 1.0, "arithmetic"), (5, 20, 2.0, "memory")])
def test_least_time_is_the_larger_of_two(macs, least, seconds, by):
    assert limits.bound(macs, least, limits.Ceilings(1000.0, 10.0)) == limits.Bound(seconds, by)


def test_a_data_sheet_says_that_it_is_one():
    from cnnfast.gpu.devices import DEVICES

    found = limits.datasheet(DEVICES[80], torch.float16)
    assert found.source == "data sheet of A100" and found.flops == pytest.approx(312e12, rel=0.01)
    assert found.bytes == pytest.approx(2.039e12)
    assert limits.datasheet(DEVICES[80], torch.float32, tf32=True).flops == pytest.approx(156e12, rel=0.01)
    with pytest.raises(ValueError, match="no rate of float32 without TF32 is known of A100"):
        limits.datasheet(DEVICES[80], torch.float32)


@pytest.mark.skipif(bool(memory.unavailable()), reason=memory.unavailable() or "measured")
def test_peak_is_what_a_call_needs_and_held_what_stays():
    size = 64 << 20
    kept = []
    before = memory.held()
    assert 0.9 * size < memory.peak(lambda: torch.ones(size, dtype=torch.uint8)) < 1.5 * size
    assert memory.held() - before < size / 4, "the call's own memory was given back"
    kept.append(torch.ones(size, dtype=torch.uint8))
    assert 0.9 * size < memory.held() - before < 1.5 * size
    assert memory.peak(lambda: None) < size / 4, "the high-water mark was reset"


def test_where_memory_cannot_be_measured_that_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    assert "is not usable" in memory.unavailable()
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.unavailable() == "the high-water mark of resident memory cannot be reset on darwin"


# --- times and ratios -------------------------------------------------------------------------------------------------


def test_a_slow_call_is_timed_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timers.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    timings = timers.wall_clock(1.0, repeats=(3, 4))({"slow": lambda: spend(2.0), "fast": lambda: spend(0.001)})
    assert len(timings["slow"].seconds) == 1 and timings["slow"].median == pytest.approx(2.0)
    assert len(timings["fast"].seconds) == 4


def test_ratio_is_paired_turn_by_turn():
    # The machine slows down twofold and back: times spread, ratios do not.
    ours = Timing((1.0, 2.0, 1.0, 2.0, 1.0), 1)
    theirs = Timing(tuple(3 * s for s in ours.seconds), 1)
    assert timers.paired(theirs, ours) == timers.Ratio(3.0, 3.0, 3.0, 5)
    shaky = Timing((1.0, 2.0, 1.5, 1.0, 1.25), 1)
    ratio = timers.paired(shaky, Timing((1.0,) * 5, 1))
    assert (ratio.median, ratio.low, ratio.high) == (1.25, 1.0, 2.0), "of five turns the extremes"
    many = timers.paired(Timing(tuple(map(float, range(1, 22))), 1), Timing((1.0,) * 21, 1))
    assert (many.low, many.median, many.high) == (3.0, 11.0, 19.0)
    assert str(ratio) == "1.25x [1.00, 2.00]"


def test_ratio_of_what_was_timed_once_has_no_spread():
    ratio = timers.paired(Timing((4.0,), 1), Timing((1.0, 2.0, 3.0), 1))
    assert ratio == timers.Ratio(2.0, 2.0, 2.0, 0) and str(ratio) == "2.00x"


# --- the command line -------------------------------------------------------------------------------------------------


def test_quick_run_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cases, "CASES", cases.MINI)
    monkeypatch.setattr(cases.find, "__defaults__", (cases.MINI,))
    monkeypatch.setattr(command, "IMPLEMENTATIONS", tuple(NOT_COMPILED))
    small = {i.name: i for i in NOT_COMPILED}
    monkeypatch.setattr(command, "SUITE_IMPLEMENTATIONS", {suite: tuple(small) for suite in cases.SUITES})
    monkeypatch.setattr(command, "yardstick", lambda dtype, device, timer: limits.Yardstick(8, lambda: None))
    monkeypatch.setattr(command, "copy_bandwidth", lambda device, timer: 1e10)
    monkeypatch.setattr(command, "wall_clock", lambda seconds: fake_timer)
    arguments = ["--case", "mini_dcgan.2", "--batch", "2", "--dtype", "float32", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name == report.machine_name() and "cnnfast" in (folder / "bench.md").read_text()
    out = capsys.readouterr().out
    assert "wrote" in out and "elapsed: 0." in out and "of the limit" in out
    data = json.loads((folder / "bench.json").read_text())
    assert data["complete"] and "GB/s" in data["environment"]["copy"] and "minutes" in data["environment"]["elapsed"]
    peak = [e["peak"] for e in data["rows"][0]["entries"] if e["name"] == "cnnfast"]
    assert (peak[0] is None) == bool(memory.unavailable())
    assert command.main(["--case", "nonsense"]) == 2
    assert "unknown case nonsense" in capsys.readouterr().err


def parsed(*argv):
    return command.parser().parse_args(list(argv))


def test_which_rows_run():
    rows = command.workloads(parsed())
    assert [w.case.suite for w in rows] == sorted((w.case.suite for w in rows), key=cases.SUITES.index)
    assert {(w.case.name, w.batch) for w in rows if w.case.name == "vocoder"} == {("vocoder", 1), ("vocoder", 16)}
    assert not [w for w in rows if w.case.name == "vae.up3"]
    asked = command.workloads(parsed("--case", "vae.up3", "--batch", "2", "--dtype", "bfloat16"))
    assert [(w.case.name, w.batch, w.dtype) for w in asked] == [("vae.up3", 2, torch.bfloat16)]
    quick = command.workloads(parsed("--quick"))
    assert {"generator", "upsample", "layers"} == {w.case.suite for w in quick} and len(quick) < len(rows) / 4
    with pytest.raises(ValueError, match="has a batch of"):
        command.workloads(parsed("--case", "vae.*", "--batch", "77"))


def test_which_implementations_run():
    def names(suite, *argv):
        return [i.name for i in command.implementations(suite, parsed(*argv))]

    assert names("generator") == [i.name for i in peers.IMPLEMENTATIONS]
    assert "torch.compile max-autotune" not in names("upsample") and "torch.compile" in names("upsample")
    assert [n for n in names("generator", "--quick") if "compile" in n] == ["torch.compile channels_last"]
    assert not [n for n in names("layers", "--quick") if "compile" in n]
    asked = "--implementation", "cnnfast torch.compile", "--implementation", "eager"
    assert names("layers", *asked) == ["eager", "cnnfast torch.compile"]


def test_limited_instruction_set_reexecutes(monkeypatch):
    seen = {}

    def replace_process(program, argv, env):
        seen.update(argv=argv, env=env)
        raise SystemExit(7)

    monkeypatch.setattr(command.os, "execve", replace_process)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    with pytest.raises(SystemExit):
        command.main(["--isa", "AVX2", "--quick"])
    assert seen["argv"][1:] == ["-m", "benchmarks", "--isa", "AVX2", "--quick"]
    assert seen["env"]["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert seen["env"]["TORCHINDUCTOR_CACHE_DIR"].endswith("_AVX2")  # another's compiled code would be wrong here
    rows = command.workloads(command.parser().parse_args(["--isa", "AVX2"]))
    assert not [w for w in rows if w.case.suite == "upsample" and w.dtype == torch.bfloat16]  # minutes a call
    chosen = {i.name: i for i in command.implementations("generator", command.parser().parse_args(["--isa", "AVX2"]))}
    with pytest.raises(NotAvailable, match="does not limit"):
        chosen["onnxruntime"].prepare(Workload(LAYER, 2, torch.float32))


# --- host time --------------------------------------------------------------------------------------------------------


def test_host_time_calls_reach_the_launch():
    pytest.importorskip("triton")
    from benchmarks import host_time

    with torch.inference_mode(), host_time.triton_path():
        calls = {c.name: c for c in host_time.triton_calls()}
        latent = next(c for name, c in calls.items() if name.endswith("latent"))
        assert [plan.split()[0] for plan in host_time.launches(latent.call)] == ["latent"]


def test_host_time_of_training_is_of_the_kernels():
    pytest.importorskip("triton")
    from benchmarks import host_time

    with host_time.triton_path():
        for c in host_time.training_calls():
            kernels = [plan.split()[0] for plan in host_time.launches(c.call)]
            assert "wgrad" in kernels if c.name.endswith("backward") else kernels[0] == "phases", c.name
    eager = [c.name for c in host_time.eager_training_calls()]
    assert eager == [f"{block}, {way}" for block in host_time.BLOCKS for way in ("forward", "backward")]


# --- the pytest-benchmark suites --------------------------------------------------------------------------------------


def test_suites_check_before_they_time(tmp_path):
    pytest.importorskip("pytest_benchmark")
    rows = "rrdb.1-float32-eager or rrdb.1-float32-cnnfast"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/test_layers.py", "-k", rows]
        + [f"--benchmark-json={tmp_path / 'layers.json'}", "--benchmark-max-time=0.01", "--benchmark-min-rounds=2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found = {b["name"]: b["extra_info"] for b in json.loads((tmp_path / "layers.json").read_text())["benchmarks"]}
    assert len(found) == 4  # eager in both formats, and ours, frozen and not
    assert all(0 < info["error"] < TOLERANCES[torch.float32] and info["tflops"] > 0 for info in found.values())


def test_every_suite_has_a_file():
    for suite in cases.SUITES:
        assert f'SUITE = "{suite}"' in (ROOT / "benchmarks" / f"test_{suite}.py").read_text()
