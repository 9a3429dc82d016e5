"""The compile cache for a GPU that is elsewhere: filled here, carried, found there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs  # noqa: E402
from triton.backends.nvidia import driver  # noqa: E402

from benchmarks import cases  # noqa: E402
from benchmarks.gpu import __main__ as gpu  # noqa: E402
from benchmarks.gpu import report as gpu_report  # noqa: E402
from benchmarks.gpu import rows as gpu_rows  # noqa: E402
from benchmarks.gpu import stages as gpu_stages  # noqa: E402
from benchmarks.gpu import tune as gpu_tune  # noqa: E402
from benchmarks.gpu import warm  # noqa: E402
from benchmarks.workload import Workload  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ONE = cases.find(["dcgan64.5"])
THERE = """
from benchmarks import cases
from benchmarks.gpu import warm
from benchmarks.rehearse.inspector import compile_job
with warm.counting() as found:
    for job in list(warm.recorded(90, cases.find(["dcgan64.5"]), ["fp16"]))[:1]:
        compile_job(job)
print(found["hits"], found["misses"])
"""


TUNED = """
import torch
from benchmarks import cases, timers
from benchmarks.gpu import tune, warm
from benchmarks.rehearse.inspector import target
from benchmarks.workload import Workload
from cnnfast.gpu import tuned, tuning

tuning.cuda_index = lambda x: 0  # of a CPU's tensors, of which every launch is compiled, and none proven
tuned.hopper_allowed, tuned.keep = lambda *a: False, lambda *a: False
with target(90), warm.counting() as found:
    tasks = tune.tasks(Workload(*cases.find(["dcgan64.5"]), 2, torch.float16))
    (result,) = tuning.tune_steps(tasks, timers.stubbed, limit=2)
print(found["hits"], found["misses"], len(result.seconds))
"""


def ran(code, folder):
    """What a process with the cache in ``folder`` prints."""
    variables = {**os.environ, **warm.variables(folder), "PYTHONPATH": str(ROOT), "CNNFAST_GUARD": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")


@needs_compiler
def test_tuning_finds_its_plans_in_the_cache(tmp_path):
    """Tuning itself, on a driver that launches nothing: every binary that it wants is there, whichever they are."""
    w = Workload(*ONE, 2, torch.float16)
    jobs = list(warm.tried(90, [w, w], 2))
    assert len({j.key for j in jobs}) == len(jobs) == 3  # two plans, and the weight's order
    filled = warm.fill(tmp_path, jobs, 1, 600, 2**30)
    assert filled.compiled == 3 and filled.failed == ()
    assert ran(TUNED, tmp_path) == ["3", "0", "2"]


def test_plans_are_recorded_in_the_precision_of_their_workload():
    for dtype, tf32, name in (
        (torch.float16, False, "fp16"),
        (torch.bfloat16, False, "bf16"),
        (torch.float32, True, "tf32"),
        (torch.float32, False, "fp32"),
    ):
        assert warm._numerics(Workload(*ONE, 2, dtype, "cuda", tf32)) == name


@needs_compiler
def test_a_cache_that_is_carried_is_found(tmp_path):
    jobs = list(warm.recorded(90, ONE, ["fp16"]))
    assert len({j.key for j in jobs}) == len(jobs) > 1
    here, there = tmp_path / "here", tmp_path / "there"
    filled = warm.fill(here, jobs[:1], 1, 600, 2**30)
    assert filled.compiled == 1 and filled.failed == () and 0 < filled.size < 2**18
    assert list(here.glob("*/*.cubin")) and list(here.glob("*/cuda_utils*.so"))
    assert list(here.glob("*/__triton_launcher*.so")) or not hasattr(driver, "make_launcher")
    assert not list(here.glob("*/*.source")) and "TRITON_CACHE_DIR" not in os.environ
    here.rename(there)

    warm.settle(there)
    assert ran(THERE, there) == ["1", "0"]
    assert ran(THERE, tmp_path / "empty") == ["0", "1"]


def test_time_and_room_end_it(tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "stub_of_libcuda", lambda folder: folder.mkdir(parents=True) or folder)
    jobs = list(warm.recorded(90, ONE, ["fp16"]))[:2]
    assert warm.fill(tmp_path / "a", jobs, 1, 0.0, 2**30) == warm.Filled(0, 2, (), 0)
    assert warm.fill(tmp_path / "b", jobs, 1, 600, 0).left_out == 2


def test_hits_and_misses_are_told(tmp_path):
    with warm.counting() as found:
        for hit in (True, False, True):
            knobs.compilation.listener(cache_hit=hit)
    assert found == {"hits": 2, "misses": 1} and knobs.compilation.listener is None
    for part in range(2):
        rows = gpu_rows.Rows(tmp_path, "check", {"code": "a"}, part, 2)
        rows.data["binaries"] = {"hits": 3, "misses": part}
        rows.end()
    text = gpu_report.digest(gpu_rows.collect(tmp_path, "check"))
    assert text == "0 rows, 0 failures; 6 binaries found in the cache, 1 compiled"


def test_the_command(tmp_path, monkeypatch, capsys):
    given = []
    jobs = {name: types.SimpleNamespace(key=name) for name in "abcdef"}
    monkeypatch.setattr(warm, "fill", lambda *a: given.append(a) or warm.Filled(2, 3, ("kernel: no",), 2**20))

    def recorded(arch, found):
        given.append((arch, len(found)))
        return map(jobs.get, "abc")

    def tried(arch, found, limit):
        given.append((arch, len(found), limit))
        return map(jobs.get, "bdef")

    monkeypatch.setattr(warm, "recorded", recorded)
    monkeypatch.setattr(warm, "tried", tried)
    assert gpu.main(["--compile", "--arch", "80", "--cache", str(tmp_path), "--minutes", "2"]) == 1
    stages, tuned, (folder, wanted, _, seconds, most) = given
    assert stages[0] == tuned[0] == 80 and stages[1] > len(cases.CASES)
    assert tuned[1] == len(gpu_stages.single_steps(False)) and tuned[2] == gpu_tune.PLANS
    assert folder == tmp_path and "".join(job.key for job in wanted) == "abcdef"
    assert seconds == 120 and most == 60 * 2**20
    said = capsys.readouterr().out
    assert "kernel: no\n2 binaries for sm_80" in said
    assert "left out: 0 of 3 that the stages launch, 3 of 3 more of the plans that tuning tries" in said
    with pytest.raises(SystemExit):
        gpu.main(["--compile"])
    assert "--compile needs --cache DIR" in capsys.readouterr().err


def test_make_gpu_uses_it(tmp_path, monkeypatch):
    listing = tmp_path / "abc" / "__grp__kernel.json"
    listing.parent.mkdir()
    listing.write_text(
        json.dumps({"child_paths": {"kernel.cubin": "/elsewhere/kernel.cubin", "gone": "/elsewhere/gone"}})
    )
    (listing.parent / "kernel.cubin").touch()
    monkeypatch.setattr(gpu, "obstacle", lambda dry_run: None)
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    monkeypatch.setenv("TRITON_STORE_BINARY_ONLY", "0")
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "0")
    monkeypatch.setattr(gpu, "run", lambda *a: int(os.environ["TRITON_CACHE_DIR"] != str(tmp_path)))
    assert gpu.main(["--cache", str(tmp_path)]) == 0
    assert json.loads(listing.read_text()) == {"child_paths": {"kernel.cubin": str(listing.parent / "kernel.cubin")}}
