"""The benchmarks' own correctness: what they count, what they compare, what they write. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks import cases, compare, gpu, peers, report
from cnnfast import env
from cnnfast.timing import Timing

ROOT = Path(__file__).resolve().parent.parent
FAST = Timing((1e-3, 2e-3, 3e-3), 1)
GENERATOR, LAYER, UPSAMPLE = cases.MINI[-2], cases.MINI[1], cases.MINI[-1]


def fake_timer(calls):
    """Calls everything once; says 2 ms for each."""
    for call in calls.values():
        call()
    return dict.fromkeys(calls, FAST)


# --- cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*cases.CASES, *cases.MINI, *cases.GEOMETRIES], ids=lambda c: c.name)
def test_case_counts_and_names_what_its_modules_do(case):
    with torch.device("meta"):
        modules, x = case.make(), torch.empty(2, *case.input_shape)
        y = modules(x)
    assert case.title.split(":")[0].split(",")[0].endswith("x".join(map(str, y.shape[1:])))
    assert case.macs(2) == 2 * case.macs(1) > 0


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("dcgan64.1", 100 * 512 * 16),  # one tap per output
        ("dcgan64.2", 8 * 8 * 4 * 512 * 256),  # k4 s2: four taps
        ("dcgan64.5", 64 * 64 * 4 * 64 * 3),
        ("upsample256", 128 * 128 * 4 * 256 * 256),  # collapsed: four taps, not nine
    ],
)
def test_multiply_adds_by_hand(name, macs):
    assert cases.find([name])[0].macs(1) == macs


def test_generator_is_its_layers():
    layers, (generator,) = cases.find(["dcgan64.*"]), cases.find(["dcgan64"])
    assert [c.name for c in layers] == [f"dcgan64.{i}" for i in range(1, 6)]
    assert generator.macs(16) == sum(c.macs(16) for c in layers)
    assert generator.least_bytes(16, 2) == sum(c.least_bytes(16, 2) for c in layers)


def test_build_is_reproducible_and_normalises():
    a, b = LAYER.build(), LAYER.build()
    assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    norm = a[1]
    assert not a.training and norm.momentum == 0.1
    before_relu = a[:2](torch.randn(64, *LAYER.input_shape))
    assert before_relu.mean().abs() < 0.3 and 0.5 < before_relu.std() < 1.5  # running statistics are realistic
    assert torch.equal(LAYER.input(1), LAYER.input(2)[:1])


def test_unknown_case_names_the_known():
    with pytest.raises(ValueError, match="unknown case vae: expected some of .*dcgan64"):
        cases.find(["vae"])


# --- implementations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [GENERATOR, UPSAMPLE, *cases.GEOMETRIES], ids=lambda c: c.name)
def test_onnx_model_computes_the_same(case):
    pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    from benchmarks.onnx_graph import to_onnx

    modules = case.build()
    x = case.input(2)
    if any(isinstance(m, nn.LeakyReLU) for m in modules):
        with pytest.raises(ValueError, match="LeakyReLU.* has no translation to ONNX"):
            to_onnx(modules, tuple(x.shape))
        modules[2] = nn.ReLU()
    import onnx

    model = onnx.load_from_string(to_onnx(modules, tuple(x.shape)))
    with torch.no_grad():
        expected = modules(x)
    if any(m.groups > 1 for m in modules if isinstance(m, nn.ConvTranspose2d)):
        pytest.importorskip("onnxruntime")  # onnx's own evaluator has no groups here
        import onnxruntime

        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        y = session.run(None, {"x": x.numpy()})[0]
    else:
        y = ReferenceEvaluator(model).run(None, {"x": x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(y), expected, atol=1e-5, rtol=1e-5)


NOT_COMPILED = [i for i in peers.IMPLEMENTATIONS if not i.name.startswith("torch.compile")]


@pytest.mark.parametrize("dtype", cases.DTYPES["cpu"], ids=str)
@pytest.mark.parametrize("implementation", NOT_COMPILED, ids=lambda i: i.name)
@pytest.mark.parametrize("case", [GENERATOR, UPSAMPLE], ids=lambda c: c.name)
def test_implementation_passes_its_check(case, implementation, dtype):
    workload = peers.Workload(case, 2, dtype)
    try:
        prepared = implementation.prepare(workload)
    except peers.NotAvailable as reason:
        missing = [p for p in ("onnxruntime", "openvino", "onnx") if importlib.util.find_spec(p) is None]
        assert missing or (implementation.name == "onnxruntime" and dtype == torch.bfloat16)
        pytest.skip(str(reason))
    error, wrong = peers.check(prepared, workload)
    assert wrong is None and 0 < error <= workload.tolerance
    if implementation.name.startswith("cnnfast"):
        assert any(word in prepared.path() for word in ("oneDNN", "ATen", "mm"))


def test_path_is_what_ran():
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    path = peers.path_of(lambda: torch.mm(torch.nn.functional.conv2d(x, w)[0, 0], torch.ones(3, 3)))
    assert path == "ATen convolution, mm"


# --- the comparison ---------------------------------------------------------------------------------------------------


def off(scale, name="off"):
    def prepare(workload):
        model = workload.modules()
        return peers.Prepared(lambda: scale * model(workload.x), lambda y: y)

    return peers.Implementation(name, prepare)


def raising(exception):
    def prepare(workload):
        raise exception

    return peers.Implementation("raising", prepare)


def test_wrong_result_gets_no_time(capsys):
    w = peers.Workload(LAYER, 2, torch.float32)
    row = compare.compare(w, (off(1.0, "eager"), off(1.001)), fake_timer, compare.Yardstick(64, lambda: None))
    good, bad = row.entries
    assert good.status == "timed" and good.timing == FAST and row.speedup(good) == 1.0
    assert bad.status == "wrong result" and bad.timing is None and bad.error == pytest.approx(1e-3, rel=0.2)
    assert row.tflops(bad) is None and row.fraction(bad) is None and row.speedup(bad) is None
    text = report.Report({}, "x", (row,)).to_markdown()
    assert "| off | wrong result: relative error 0.001 is above 1e-05 |  |  |  |  | 1.0e-03 |  |" in text


def test_nan_is_a_wrong_result():
    w = peers.Workload(LAYER, 2, torch.float32)
    (entry,) = compare.compare(w, (off(float("nan")),), fake_timer, None).entries
    assert entry.status == "wrong result"


def test_failure_and_absence_are_entries(capsys):
    w = peers.Workload(LAYER, 2, torch.float32)
    implementations = (raising(peers.NotAvailable("no such package")), raising(RuntimeError("boom\nmore")))
    rows = [compare.compare(w, (i,), fake_timer, None) for i in implementations]
    assert [(r.entries[0].status, r.entries[0].note) for r in rows] == [
        ("not available", "no such package"),
        ("failed", "RuntimeError: boom"),
    ]
    assert "Traceback" in capsys.readouterr().err


def test_yardstick_is_the_fastest_product():
    def timer(calls):
        return {name: Timing((1e-6 if name == "8" else 1.0,), 1) for name in calls}

    assert compare.yardstick(torch.float32, "cpu", timer, (4, 8, 16)).size == 8


def test_a_slow_call_is_timed_once():
    import time

    calls = {"slow": lambda: time.sleep(0.1), "fast": lambda: None}
    timings = compare.wall_clock(0.2, block_seconds=0.001, repeats=(3, 4))(calls)
    assert len(timings["slow"].seconds) == 1 and timings["slow"].median >= 0.1
    assert len(timings["fast"].seconds) == 4


def test_tensors_of_a_row_do_not_outlive_it():
    w = peers.Workload(LAYER, 2, torch.float32)
    compare.compare(w, (off(1.0),), fake_timer, None)
    assert not {"x", "source", "expected"} & set(vars(w))


# --- the report -------------------------------------------------------------------------------------------------------


def entry(name, ms, **keywords):
    return report.Entry(name, "timed", timing=Timing((ms / 1e3,) * 3, 1), error=1e-7, **keywords)


def row(*entries, dtype="float32"):
    return report.Row("case", "layers", "title", dtype, 1, 10**9, 1e-5, entries, 1000, Timing((0.01,), 1))


def test_rates_and_ratios():
    r = row(entry("eager", 8), entry("eager channels_last", 4), entry("cnnfast", 2))
    ours = r.entry("cnnfast")
    assert r.mm_tflops == pytest.approx(0.2)
    assert r.tflops(ours) == pytest.approx(1.0) and r.fraction(ours) == pytest.approx(5.0)
    assert r.speedup(ours) == pytest.approx(2.0) and r.speedup(ours, ("eager",)) == pytest.approx(4.0)
    assert r.speedup(ours, ("torch.compile",)) is None


def test_markdown_says_where_we_are_slower():
    eager = entry("eager", 8), entry("eager channels_last", 4)
    fast, slow = row(*eager, entry("cnnfast", 2, path="oneDNN")), row(*eager, entry("cnnfast", 5), dtype="bfloat16")
    nchw = row(*eager, entry("cnnfast NCHW", 5), dtype="float16")  # against eager NCHW it is faster
    text = report.Report({"date": "today"}, "cmd", (fast, slow, nchw), complete=True).to_markdown()
    assert "eager NCHW): case, bfloat16, batch 1: cnnfast 0.80x." in text
    assert "| case, float32, batch 1 | 2.000 | 2.00x |" in text and "- date: today" in text
    assert "nowhere." in report.Report({}, "cmd", (fast,)).to_markdown()
    assert "incomplete" not in text and "incomplete" in report.Report({}, "cmd").to_markdown()


def test_unsteady_rows_are_named():
    shaky = report.Entry("eager", "timed", timing=Timing((1.0, 2.0, 3.0, 4.0), 1))
    assert "Unsteady" in report.Report({}, "cmd", (row(shaky),)).to_markdown()
    assert "Unsteady" not in report.Report({}, "cmd", (row(entry("eager", 1)),)).to_markdown()


def test_json_holds_the_figures_and_replaces_the_file(tmp_path):
    r = report.Report(report.environment(), "cmd", (row(entry("eager", 8), entry("cnnfast", 2)),), complete=True)
    (tmp_path / "bench.json").write_text("old")
    paths = r.write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.json", "bench.md"] == sorted(p.name for p in paths)
    data = json.loads(paths[0].read_text())
    assert data["complete"] and {"date", "processor", "instruction set", "threads", "torch", "commit"} <= set(
        data["environment"]
    )
    ours = data["rows"][0]["entries"][1]
    assert ours["speedup_over_best_eager"] == pytest.approx(4.0)
    assert ours["timing"]["median_ms"] == pytest.approx(2.0) and ours["fraction_of_mm"] == pytest.approx(5.0)


def test_results_do_not_name_the_host():
    import platform

    text = json.dumps(report.environment()) + report.machine_name()
    node = platform.node()
    assert not node or node not in text
    assert str(ROOT) not in text and report.machine_name() == report.machine_name().lower()


def test_quick_run_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cases, "CASES", cases.MINI)
    monkeypatch.setattr(cases.find, "__defaults__", (cases.MINI,))
    monkeypatch.setattr(command, "IMPLEMENTATIONS", tuple(NOT_COMPILED))
    monkeypatch.setattr(command, "yardstick", lambda dtype, device, timer: compare.Yardstick(8, lambda: None))
    monkeypatch.setattr(command, "wall_clock", lambda seconds: fake_timer)
    arguments = ["--case", "mini_dcgan.2", "--batch", "2", "--dtype", "float32", "--output", str(tmp_path)]
    assert command.main(arguments) == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name == report.machine_name() and "cnnfast" in (folder / "bench.md").read_text()
    assert "wrote" in capsys.readouterr().out
    assert command.main(["--case", "nonsense"]) == 2
    assert "unknown case nonsense" in capsys.readouterr().err


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
    chosen = {i.name: i for i in command.implementations(False, "AVX2")}
    with pytest.raises(peers.NotAvailable, match="does not limit"):
        chosen["onnxruntime"].prepare(peers.Workload(LAYER, 2, torch.float32))


# --- host time --------------------------------------------------------------------------------------------------------


def test_host_time_calls_reach_the_launch():
    pytest.importorskip("triton")
    from benchmarks import host_time
    from benchmarks.inspector import target

    with torch.inference_mode(), target(90):
        calls = {c.name: c for c in host_time.triton_calls()}
        latent = next(c for name, c in calls.items() if name.endswith("latent"))
        assert [plan.split()[0] for plan in host_time.launches(latent.call)] == ["latent"]


# --- the GPU run ------------------------------------------------------------------------------------------------------


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


def test_a_failing_stage_stops_nothing(tmp_path):
    def python(code):
        return ("-c", code)

    stages = (
        gpu.Stage("breaks", "a", 1, python("print('first'); raise SystemExit('the reason')")),
        gpu.Stage("dies", "b", 1, python("import os; os.kill(os.getpid(), 11)")),
        gpu.Stage("hangs", "c", 0.02, python("import time; time.sleep(600)")),
        gpu.Stage("absent", "d", 1, python(""), needs="no_such_module"),
        gpu.Stage("works", "e", 1, python("print('fine')")),
    )
    assert gpu.run(stages, tmp_path, dry_run=True) == 1
    data = json.loads((tmp_path / "summary.json").read_text())
    assert [s["status"] for s in data["stages"]] == ["failed", "failed", "timed out", "skipped", "ok"]
    assert data["stages"][3]["detail"] == "no_such_module is not installed: pip install no_such_module"
    text = (tmp_path / "summary.md").read_text()
    assert "the reason" in text and "first" in text and "dry run" in text
    assert (tmp_path / "works.log").read_text() == "fine\n"


@pytest.mark.parametrize("on", [True, False])
def test_tf32_is_what_torch_and_cnnfast_read(on):
    from benchmarks.gpu_stages import set_tf32
    from cnnfast.dispatch import conv_tf32

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        set_tf32(on)
        assert conv_tf32() is on and torch.backends.cudnn.allow_tf32 is on
        assert torch.backends.cuda.matmul.allow_tf32 is on
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_every_stage_command_exists():
    for stage in gpu.STAGES:
        argv = gpu._command(stage, Path("folder"), False)
        if argv[1] == "-m":
            assert importlib.util.find_spec(argv[2]) is not None or argv[2] == stage.needs
        else:
            assert Path(argv[1]).is_file() and f'"{stage.name}": {stage.name}' in Path(argv[1]).read_text()


@pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="ttsem is not installed")
def test_dry_run_executes_kernels(tmp_path):
    stage = next(s for s in gpu.STAGES if s.name == "table")
    outcome = gpu.run_stage(stage, tmp_path, dry_run=True)
    assert outcome.status == "ok", (tmp_path / "table.log").read_text()
    data = json.loads((tmp_path / "table.json").read_text())
    ours = data["rows"][0]["entries"][-1]
    assert ours["name"] == "cnnfast.ops" and ours["status"] == "checked" and ours["timing"] is None
    assert ours["path"].startswith("Triton phases")
    assert "times are stubbed" in (tmp_path / "table.md").read_text()
