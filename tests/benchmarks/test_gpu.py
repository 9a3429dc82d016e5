"""The GPU run (`benchmarks.gpu`): its stages and their time, resumption, a dry run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import cases, peers
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import process as gpu_process
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import rows as gpu_rows
from benchmarks.gpu import stages as gpu_stages
from cnnfast.tasks import env

ROOT = Path(__file__).resolve().parents[2]
RUN = {"code": "abc"}
TABLE = next(s for s in gpu.STAGES if s.name == "table")


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
        gpu.Stage("breaks", "a", 1, least=0, command=python("print('first'); raise SystemExit('the reason')")),
        gpu.Stage("dies", "b", 1, least=0, command=python("import os; os.kill(os.getpid(), 11)")),
        gpu.Stage("hangs", "c", 0.2, least=0, command=python("import time; time.sleep(600)")),
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
                assert argv[1] == "-m" and importlib.util.find_spec(argv[2]) is not None
            else:
                assert str(gpu.WORKER) in argv and gpu.WORKER.is_file() and stage.name in gpu_stages.STAGES


@pytest.mark.parametrize("on", [True, False])
def test_tf32_is_what_torch_and_cnnfast_read(on):
    from benchmarks.gpu.compare import set_tf32
    from cnnfast.gpu.devices import conv_tf32

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
        if path.name == gpu.PROOFS:
            continue
        text = path.read_text()
        if path.suffix == ".json" and path.stem not in ("run", "summary"):
            assert json.loads(text)["stubbed"] and json.loads(text)["rows"]
        if path.suffix == ".md":
            assert gpu_report.STUBBED in text
        if path.suffix != ".log":
            assert not [place for place in (str(ROOT), sys.prefix, str(tmp_path)) if place in text]
    assert "wrote" not in (out / "summary.md").read_text()
    # Nothing is left to do but what is of other stages' findings.
    before = {p.stem: p.stat().st_mtime_ns for p in out.glob("*.log")}
    rows = gpu_rows.read(out / "prediction.json")["rows"]
    assert gpu.main(["--dry-run", "--resume", "--output", str(out)]) == 0
    changed = {p.stem for p in out.glob("*.log") if p.stat().st_mtime_ns != before[p.stem]}
    assert changed == {s.name for s in gpu.STAGES if s.follows} == {"tuned", "prediction"}
    assert gpu_rows.read(out / "prediction.json")["rows"] == rows


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
    assert gpu.run([stage], out, True, 1, everything=[stage, TABLE]) == 0
    old.path.rename(out / "table.json")
    before = gpu.identity(True)
    monkeypatch.setattr(gpu, "identity", lambda dry_run: before | {"gpu": "another"})
    assert gpu.run([stage], out, True, 1, resume=True, everything=[stage, TABLE]) == 0
    assert len((tmp_path / "fine").read_text()) == 2 and not (out / "table.json").exists()
    assert json.loads((out / "run.json").read_text())["gpu"] == "another"


def test_identity_is_of_the_code():
    a = gpu.identity(True)
    assert a == gpu.identity(True) and len(a["code"]) == 16 and a["gpu"] == "none"


def test_time_that_is_not_used_is_the_later_stages(tmp_path, monkeypatch):
    given, clock = {}, iter([0.0, 0.0, 10.0, 10.0 + 25.0])
    monkeypatch.setattr(gpu_process, "GRACE", 0.0)

    def run_stage(stage, folder, dry_run, seconds, cache):
        given[stage.name] = seconds
        return gpu_report.Outcome(stage.name, "", "ok", 0.0, "")

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    stages = [gpu.Stage("a", "", 1), gpu.Stage("b", "", 1), gpu.Stage("c", "", 2)]
    assert gpu.run(stages, tmp_path, True, minutes=1, everything=stages) == 0
    assert given == {"a": 15.0, "b": 50.0 / 3, "c": 25.0}


def test_no_stage_starts_without_the_time_it_needs(tmp_path, monkeypatch, capsys):
    """And the last one has time for the row that it is in."""
    given, clock = {}, iter([0.0, 0.0, 5.0, 12.0])

    def run_stage(stage, folder, dry_run, seconds, cache):
        given[stage.name] = seconds
        return gpu_report.Outcome(stage.name, "", "ok", 0.0, "")

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    monkeypatch.setattr(gpu_process, "GRACE", 40.0)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    stages = [gpu.Stage("a", "", 1, least=15), gpu.Stage("b", "", 9, least=16), gpu.Stage("c", "", 5, least=1)]
    assert gpu.run(stages, tmp_path, True, minutes=1, everything=stages) == 0
    assert given == {"a": 15.0, "c": 8.0}  # of the 20 s, not its tenth; b would need 16 of 15
    data = json.loads((tmp_path / "summary.json").read_text())
    assert data["stages"][1]["status"] == "skipped" and data["stages"][1]["detail"] == "needs 16 s, 15 s were left"


def test_one_archive_at_the_end(tmp_path):
    out, stage = tmp_path / "out", gpu.Stage("works", "a", 1, command=python("print('fine')"))
    (out / gpu.PROOFS).mkdir(parents=True)
    assert gpu.run([stage], out, True, 1, resume=True, everything=[stage]) == 0
    with tarfile.open(tmp_path / "out.tar.gz") as tar:
        assert {"out/summary.md", "out/run.json", "out/works.log"} <= set(tar.getnames())
        assert not [name for name in tar.getnames() if gpu.PROOFS in name]
        assert {(m.uid, m.uname) for m in tar} == {(0, "")}


@pytest.mark.parametrize(("resume", "kept"), [(True, True), (False, False)])
def test_proofs_survive_into_what_resumes(resume, kept, tmp_path):
    code = "import os, pathlib; p = pathlib.Path(os.environ['CNNFAST_CACHE'], 'proof'); print(p.exists()); "
    code += "p.parent.mkdir(parents=True, exist_ok=True); p.touch(); raise SystemExit(1)"
    stage = gpu.Stage("proves", "a", 1, command=python(code))
    for _ in range(2):
        gpu.run([stage], tmp_path / "out", True, 1, resume=resume, everything=[stage])
    assert (tmp_path / "out" / "proves.log").read_text() == f"{kept}\n"


def test_results_are_written_where_git_does_not_see_them(monkeypatch):
    given = []
    monkeypatch.setattr(gpu, "obstacle", lambda dry_run: None)
    monkeypatch.setattr(gpu, "run", lambda stages, folder, *rest: given.append(folder) or 0)
    assert gpu.main([]) == gpu.main(["--dry-run"]) == 0
    assert given == [ROOT / "out" / "gpu", ROOT / "out" / "gpu-dry-run"]
    assert "/out/" in (ROOT / ".gitignore").read_text().splitlines()


def test_shares_are_ten_minutes():
    assert sum(s.share for s in gpu.STAGES) == pytest.approx(gpu.MINUTES, rel=0.02)
    assert [s.name for s in gpu.STAGES][:5] == ["environment", "check", "tests", "probes", "table"]


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


def test_what_the_driver_says(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.driver_facts() == {}
    answer = "570.1, 1980 MHz, 2619 MHz, 345 MHz, 2619 MHz, 700.00 W, 71.20 W, Enabled, Enabled, 31"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "{answer}"\n')
    tool.chmod(0o755)
    facts = gpu.driver_facts()
    assert facts["GPU driver_version"] == "570.1" and facts["GPU temperature.gpu"] == "31" and len(facts) == 10
    assert facts["GPU ecc.mode.current"] == "Enabled" and facts["GPU power.draw"] == "71.20 W"
    assert "--query-gpu=driver_version,clocks.max.sm," in (tmp_path / "asked").read_text()
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu.driver_facts() == {}


@pytest.mark.parametrize(
    ("cpus", "gib", "each", "expected"),
    [(1, 80, 12, 1), (4, 80, 12, 4), (64, 80, 12, 6), (16, 80, 4, 16), (64, 24, 12, 2), (64, 8, 12, 1), (64, 80, 0, 1)],
)
def test_processes_side_by_side(cpus, gib, each, expected, monkeypatch):
    class Properties:
        total_memory = gib * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: cpus)
    stage = gpu.Stage("a", "", 1, parallel=each)
    assert gpu.parts(stage, dry_run=False) == expected and gpu.parts(stage, dry_run=True) == 1


def test_wrong_arguments(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--minutes", "0"])
    assert "--minutes 0 must be more than 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown implementation TensorRT: expected some of eager"):
        peers.named("TensorRT", among=peers.GPU_IMPLEMENTATIONS)
