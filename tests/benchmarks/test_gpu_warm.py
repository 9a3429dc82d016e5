"""The compile cache for a GPU that is elsewhere: filled here, carried, found there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from triton import knobs  # noqa: E402
from triton.backends.nvidia import driver  # noqa: E402

from benchmarks import cases  # noqa: E402
from benchmarks.gpu import __main__ as gpu  # noqa: E402
from benchmarks.gpu import report as gpu_report  # noqa: E402
from benchmarks.gpu import rows as gpu_rows  # noqa: E402
from benchmarks.gpu import warm  # noqa: E402

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


@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
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

    def counted(folder):
        variables = {**os.environ, **warm.variables(folder), "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", THERE], env=variables, capture_output=True, text=True, check=True)
        return done.stdout.split()

    warm.settle(there)
    assert counted(there) == ["1", "0"]
    assert counted(tmp_path / "empty") == ["0", "1"]


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
    monkeypatch.setattr(warm, "fill", lambda *a: given.append(a) or warm.Filled(3, 1, ("kernel: no",), 2**20))
    monkeypatch.setattr(warm, "recorded", lambda arch, found: [arch, len(found)])
    assert gpu.main(["--compile", "--arch", "80", "--cache", str(tmp_path), "--minutes", "2"]) == 1
    folder, jobs, _, seconds, most = given[0]
    assert folder == tmp_path and jobs[0] == 80 and jobs[1] > len(cases.CASES) and seconds == 120 and most == 60 * 2**20
    assert "kernel: no\n3 binaries for sm_80" in capsys.readouterr().out
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
