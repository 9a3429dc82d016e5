"""Run the tests in their stages: ``python tests/run.py [--all] [STAGE ...]`` (``make test``, ``make test-all``).

cpu       everything that launches no kernel and compiles none ahead of time
kernels   every test that launches a Triton kernel: on a CUDA device where there is one, else on the CPU under ttsem
compiled  machine code of the plans, compiled ahead of time
avx512    the CPU paths as on a processor without AMX and bfloat16 instructions
avx2      the CPU paths as on a processor with AVX2 only

Each stage is a process of its own, and two lanes of them run side by side: the first two stages in one each, the others
in whichever is free. The first lane is shown as it runs, a stage of the other one when it ends. Ends with a line for
each stage and a count of all tests; the exit status is 0 if every stage passed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Whose paths depend on the processor's instructions.
CPU_TESTS = (
    "tests/cpu/test_inference.py",
    "tests/cpu/test_training.py",
    "tests/cpu/test_winograd.py",
    "tests/generators/test_dcgan.py",
    "tests/nn/test_drop_in.py",
    "tests/nn/test_sequential.py",
    "tests/nn/test_sequential_training.py",
)
COMPILED_TESTS = "tests/gpu/test_machine_code.py"


@dataclass(frozen=True)
class Stage:
    """``args`` go to pytest, ``marks`` is its -m without "not slow". A stage in which nothing runs has failed."""

    name: str
    args: tuple[str, ...]
    marks: str = "not kernel"
    env: dict[str, str] = field(default_factory=dict)
    ttsem: bool = False


@dataclass
class Result:
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    ok: bool = True
    note: str = ""

    @property
    def line(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def cuda() -> bool:
    """Asked in a process of its own: the stages must not share a CUDA context with this one."""
    code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def kernel_stage() -> tuple[Stage | None, str]:
    """(the stage, or None with the reason why no kernel can run here)."""
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"
    if os.environ.get("CNNFAST_TEST_DEVICE", "cuda") == "cpu":
        return Stage("kernels", ("tests",), "kernel"), "on CPU tensors, as CNNFAST_TEST_DEVICE=cpu asks"
    if cuda():
        return Stage("kernels", ("tests",), "kernel"), "on the CUDA device"
    if importlib.util.find_spec("ttsem") is None:
        return None, "no CUDA device, and ttsem, which runs them on a CPU, is not installed"
    return Stage("kernels", ("tests",), "kernel", ttsem=True), "on the CPU under ttsem"


def stages() -> tuple[list[Stage], dict[str, Result]]:
    """(the stages, the longest first; results of those that cannot run, with a note)."""
    none: dict[str, Result] = {}
    one_thread = {"OMP_NUM_THREADS": "1"}
    # A waiting thread must not spin on a core that another stage wants.
    found = [Stage("cpu", ("tests", f"--ignore={COMPILED_TESTS}"), env={"OMP_WAIT_POLICY": "PASSIVE"})]
    kernels, note = kernel_stage()
    if kernels is None:
        none["kernels"] = Result(note=f"Triton kernels: NOT RUN ({note})")
    else:
        print(f"Triton kernels run {note}", flush=True)
        found.append(replace(kernels, env=one_thread))
    if importlib.util.find_spec("triton") is None:
        none["compiled"] = Result(note="Plans: NOT COMPILED (triton is not installed)")
    else:
        found.append(Stage("compiled", (COMPILED_TESTS,), env=one_thread))
    # oneDNN uses what the processor has where that is less than the limit.
    for name, value in (("avx512", "AVX512_CORE"), ("avx2", "AVX2")):
        found.append(Stage(name, CPU_TESTS, env={"ONEDNN_MAX_CPU_ISA": value, **one_thread}))
    return found, none


def command(stage: Stage, report: Path, everything: bool, extra: list[str]) -> list[str]:
    marks = stage.marks if everything else f"{stage.marks} and not slow"
    runner = ["-m", "benchmarks.gpu.on_cpu", "pytest"] if stage.ttsem else ["-m", "pytest"]
    options = [
        "-q",
        "-m",
        marks,
        f"--junitxml={report}",
        "--durations=5",
        "--durations-min=5",
        "-p",
        "no:cacheprovider",
    ]
    return [sys.executable, *runner, *stage.args, *options, *extra]


def count(report: Path) -> Result:
    """Numbers of a JUnit file; nothing in it where pytest wrote none."""
    result = Result()
    if report.exists():
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            number = {k: int(suite.get(k, 0)) for k in ("tests", "failures", "errors", "skipped")}
            result.failed += number["failures"] + number["errors"]
            result.skipped += number["skipped"]
            result.passed += number["tests"] - sum(number[k] for k in ("failures", "errors", "skipped"))
    return result


def run(stage: Stage, folder: Path, everything: bool, extra: list[str], live: bool) -> Result:
    report = folder / f"{stage.name}.xml"
    arguments = command(stage, report, everything, extra)
    title = " ".join([*(f"{k}={v}" for k, v in stage.env.items()), "python", *arguments[1:]])
    start = time.monotonic()
    print(f"\n=== {stage.name}: {title}", flush=True)
    output = None if live else open(folder / f"{stage.name}.txt", "w+b")
    try:
        done = subprocess.run(
            arguments, cwd=ROOT, env={**os.environ, **stage.env}, stdout=output, stderr=subprocess.STDOUT
        )
        result = count(report)
        result.seconds = time.monotonic() - start
        if output is not None:
            output.seek(0)
            print(f"\n=== {stage.name} (output)\n" + output.read().decode(errors="replace"), flush=True)
    finally:
        if output is not None:
            output.close()
    result.ok = done.returncode == 0 and result.passed > 0
    if done.returncode != 0 and not result.failed:
        result.failed, result.note = 1, f"pytest ended with status {done.returncode}"
    elif not result.passed:
        result.failed, result.note = result.failed or 1, "no test ran"
    return result


def run_lanes(
    chosen: list[Stage], folder: Path, everything: bool, extra: list[str], results: dict[str, Result]
) -> None:
    lock, waiting = threading.Lock(), iter(chosen)

    def following() -> Stage | None:
        with lock:
            return next(waiting, None)

    def lane(stage: Stage | None, live: bool) -> None:
        while stage is not None:
            results[stage.name] = run(stage, folder, everything, extra, live)
            stage = following()

    first, second = following(), following()
    other = threading.Thread(target=lane, args=(second, False))
    other.start()
    lane(first, True)
    other.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the slow tests too: every dtype and architecture")
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="only these")
    parser.add_argument("--pytest", action="append", default=[], metavar="OPTION", help="hand OPTION on to pytest")
    options = parser.parse_args()
    found, results = stages()
    known = [stage.name for stage in found] + list(results)
    if unknown := sorted(set(options.stages) - set(known)):
        parser.error(f"unknown stage {', '.join(unknown)}: expected some of {', '.join(known)}")
    wanted = options.stages or known
    results = {name: result for name, result in results.items() if name in wanted}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        chosen = [stage for stage in found if stage.name in wanted]
        run_lanes(chosen, Path(folder), options.all, options.pytest, results)
    missing = [name for name in wanted if name not in results]
    print(f"\n=== summary, {time.monotonic() - start:.0f} s")
    for name in wanted:
        if name in missing:
            print(f"{name:9} interrupted")
            continue
        r = results[name]
        state = "passed" if r.ok and r.passed else "FAILED" if not r.ok else "not run"
        print(f"{name:9} {state:8} {r.seconds:5.0f} s  {r.line}" + (f"  {r.note}" if r.note else ""))
    for r in results.values():
        if r.note.startswith(("Triton kernels", "Plans")):
            print(r.note)
    total = Result(*(sum(getattr(r, k) for r in results.values()) for k in ("passed", "failed", "skipped")))
    print(total.line)
    return 0 if not missing and all(r.ok for r in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
