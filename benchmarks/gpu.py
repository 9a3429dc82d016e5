"""``python -m benchmarks.gpu``: on a machine with an NVIDIA GPU, check the kernels there and time them against cuDNN.

Stages run one after the other, each in a process of its own with a time limit, and write into one folder: a stage that
fails, hangs or takes the process down leaves its log, and the others run. ``summary.md`` is written anew after each.
Needs torch >= 2.11 and triton >= 3.6 and downloads nothing; pytest only for the stage ``tests``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cnnfast import env

from .report import environment, machine_name, write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DRY_RUN = Path("out") / "gpu-dry-run"
WORKER = ROOT / "benchmarks" / "gpu_stages.py"
TTSEM = "pip install --no-deps --ignore-requires-python ttsem==0.1.0"


@dataclass(frozen=True)
class Stage:
    """``command``: arguments of Python, or None for the worker's stage of that name. ``needs``: a module."""

    name: str
    about: str
    minutes: float
    command: tuple[str, ...] | None = None
    needs: str | None = None


STAGES: tuple[Stage, ...] = (
    Stage("environment", "versions and devices", 2, ("-m", "cnnfast", "env")),
    Stage("check", "every regime, dtype and some odd geometry against float64", 10),
    Stage("table", "layers, generator and upsample block against cuDNN, cold L2 cache", 25),
    Stage("back_to_back", "the generator and the block with the host's time", 10),
    Stage("host_time", "time on the host of one fused call", 5, ("-m", "benchmarks.host_time")),
    Stage("tests", "the kernel tests on the device", 30, ("-m", "pytest", "tests", "-q", "-m", "kernel"), "pytest"),
)
DRY_STAGES = ("environment", "check", "table", "back_to_back")


@dataclass(frozen=True)
class Outcome:
    """``status``: "ok", "failed", "timed out" or "skipped"; ``detail`` the last line of the log, or the reason."""

    stage: str
    about: str
    status: str
    seconds: float
    detail: str
    log: str = ""


def obstacle(dry_run: bool) -> str | None:
    """Why the stages cannot run here, with what to do; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if dry_run:
        return None if importlib.util.find_spec("ttsem") else f"a dry run needs ttsem: {TTSEM}"
    error = env.nvidia_problem() or env.cuda_error()
    if error is None:
        return None
    return (
        f"no NVIDIA GPU that torch can use: {error}\n"
        "Run this on a machine with a GPU of compute capability 8.0 or more and a CUDA build of torch >= 2.11.\n"
        "`python -m benchmarks.gpu --dry-run` goes through the stages without one (results checked, times stubbed)."
    )


def _command(stage: Stage, folder: Path, dry_run: bool) -> list[str]:
    if stage.command is not None:
        extra = ("--output", str(folder)) if stage.name == "host_time" else ()
        return [sys.executable, *stage.command, *extra]
    arguments = [stage.name, "--output", str(folder), *(["--dry-run"] if dry_run else [])]
    runner = ["-m", "ttsem.sanitize", str(WORKER), "--"] if dry_run else [str(WORKER)]
    return [sys.executable, *runner, *arguments]


def run_stage(stage: Stage, folder: Path, dry_run: bool) -> Outcome:
    """Runs a stage; its output goes to ``STAGE.log`` in ``folder``. Never raises for what the stage does."""
    if stage.needs is not None and importlib.util.find_spec(stage.needs) is None:
        reason = f"{stage.needs} is not installed: pip install {stage.needs}"
        return Outcome(stage.name, stage.about, "skipped", 0.0, reason)
    log = folder / f"{stage.name}.log"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start = time.monotonic()
    with log.open("w") as out:
        process = subprocess.Popen(
            _command(stage, folder, dry_run),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(60 * stage.minutes)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:  # compilers that it started go with it, also at an interrupt
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(stage.name, stage.about, status, time.monotonic() - start, _last_line(log), log.name)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def _tail(log: Path, lines: int = 25) -> str:
    return "\n".join(log.read_text(errors="replace").rstrip().splitlines()[-lines:])


def write_summary(folder: Path, facts: dict[str, str], outcomes: Sequence[Outcome], dry_run: bool) -> None:
    """``summary.json`` and ``summary.md``."""
    data = {"dry_run": dry_run, "environment": facts, "stages": [asdict(o) for o in outcomes]}
    write_atomically(folder / "summary.json", json.dumps(data, indent=1) + "\n")
    lines = ["# cnnfast on a GPU" + (" (dry run: no GPU, times stubbed)" if dry_run else ""), ""]
    lines += ["Written by `python -m benchmarks.gpu`. Do not edit.", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| stage | what | result | seconds | |", "|---|---|---|---:|---|"]
    for o in outcomes:
        cells = (o.stage, o.about, o.status, f"{o.seconds:.0f}", o.detail.replace("|", "\\|"))
        lines.append("| " + " | ".join(cells) + " |")
    tables = [name for name in ("check", "table", "back_to_back") if (folder / f"{name}.md").exists()]
    if tables:
        lines += ["", "Tables: " + ", ".join(f"[{name}]({name}.md)" for name in tables)]
    for o in outcomes:
        if o.status in ("failed", "timed out") and o.log:
            lines += ["", f"## {o.stage}: {o.status}", "", f"The end of `{o.log}`:", "", "```"]
            lines += [_tail(folder / o.log), "```"]
    write_atomically(folder / "summary.md", "\n".join(lines) + "\n")


def run(stages: Sequence[Stage], folder: Path, dry_run: bool) -> int:
    """Every stage in turn. Returns 1 where one failed or ran out of time, else 0."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("check", "table", "back_to_back"):  # of an earlier run: not this run's results
        for suffix in (".md", ".json", ".log"):
            (folder / f"{old}{suffix}").unlink(missing_ok=True)
    facts = environment("cpu" if dry_run else "cuda")
    outcomes: list[Outcome] = []
    write_summary(folder, facts, outcomes, dry_run)
    for stage in stages:
        print(f"{stage.name}: {stage.about} (at most {stage.minutes:g} minutes) ...", flush=True)
        outcome = run_stage(stage, folder, dry_run)
        outcomes.append(outcome)
        write_summary(folder, facts, outcomes, dry_run)
        print(f"{stage.name}: {outcome.status} after {outcome.seconds:.0f} s: {outcome.detail}", flush=True)
    print(f"\nwrote {folder / 'summary.md'}")
    return 1 if any(o.status in ("failed", "timed out") for o in outcomes) else 0


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    p.add_argument("--dry-run", action="store_true", help="without a GPU: the stages under ttsem, times stubbed")
    p.add_argument("--stage", action="append", choices=[s.name for s in STAGES], help="only this one; may be repeated")
    p.add_argument("--output", type=Path, help="folder of the results (benchmarks/results/GPU; dry run: out)")
    arguments = p.parse_args(argv)
    problem = obstacle(arguments.dry_run)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    names = arguments.stage or (DRY_STAGES if arguments.dry_run else [s.name for s in STAGES])
    folder = arguments.output or (DRY_RUN if arguments.dry_run else RESULTS / machine_name("cuda"))
    if shutil.which("nvidia-smi") is None and not arguments.dry_run:
        print("note: nvidia-smi is not on the path")
    return run([s for s in STAGES if s.name in names], folder.resolve(), arguments.dry_run)


if __name__ == "__main__":
    sys.exit(main())
