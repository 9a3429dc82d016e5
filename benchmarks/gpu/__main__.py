"""``python -m benchmarks.gpu``: on a machine with an NVIDIA GPU, check the kernels there, tune them, time them.

Stages run one after the other, each in processes of its own, and write into one folder: a stage that fails, hangs or
takes its process down leaves what it had, and the others run. Each has a share of ``--minutes``, does the most
important first and says what it left out; time that a stage does not need is the later ones', and none starts that has
less than it needs. ``summary.md`` is written anew after each, and at the end one archive of the folder, beside it.
``--resume`` goes on where an earlier run of the same code on the same machine ended, with its proofs.
Needs torch >= 2.11 and triton >= 3.6 and downloads nothing; pytest only for the stage ``tests``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cnnfast.files import write_atomically
from cnnfast.gpu.devices import DEVICES
from cnnfast.tasks import env

from .. import cases
from ..report import environment
from . import process, warm
from .process import Ending, supervise, supervise_all
from .report import Outcome, digest, page, scrub, summary
from .rows import collect, part_name, read

ROOT = Path(__file__).resolve().parents[2]
OUTPUT, DRY_RUN = ROOT / "out" / "gpu", ROOT / "out" / "gpu-dry-run"  # what git ignores: publishing is a decision
WORKER = ROOT / "benchmarks" / "gpu" / "stages.py"
TTSEM = "pip install --no-deps --ignore-requires-python ttsem==0.1.0"
MINUTES = 10.0
CACHE_BYTES = 60 * 2**20
PROOFS = "proofs"  # in a run's folder: what is known of kernels (`cnnfast.store`)


@dataclass(frozen=True)
class Stage:
    """``share``: its part of the time, in minutes of ten. ``stall``: seconds after which a step counts as hung.
    ``least``: seconds without which it does not start.

    ``command``: arguments of Python, or None for the worker's stage of that name. ``parallel``: rows may be made side
    by side (compiling takes most of the time, and nothing is timed), each process with so many GiB of the GPU's memory;
    0: one process. ``plain``: without plans tuned earlier.
    ``proves``: needs `cnnfast.gpu.guard`, whatever the environment says. ``follows``: is of what other stages found, so
    that ``--resume`` runs it again.
    """

    name: str
    about: str
    share: float
    stall: float = 60.0
    command: tuple[str, ...] | None = None
    needs: str | None = None
    parallel: int = 0
    plain: bool = True
    proves: bool = False
    follows: bool = False
    least: float = 10.0


STAGES: tuple[Stage, ...] = (
    Stage("environment", "versions and devices", 0.2, command=("-m", "cnnfast", "env")),
    Stage(
        "check", "every regime, dtype and odd geometry, then every case, against float64", 1.2, parallel=12, least=30
    ),
    Stage("tests", "the kernel tests on the device", 1.6, 120.0, needs="pytest", parallel=4, least=30),
    Stage("probes", "rounding, L2 cache, equal bits in thousands of launches, compute-sanitizer", 0.5, 90.0),
    Stage("table", "layers, blocks and generators against cuDNN, cold L2 cache, with and without CUDA graphs", 1.3),
    Stage(
        "candidates", "plans of the cases' steps compiled and proven", 0.7, 120.0, None, None, 12, False, True, least=20
    ),
    Stage("tune", "those plans timed, the best ones kept", 0.6, 120.0, plain=False, proves=True),
    Stage("tuned", "the table's rows again, with the tuned plans", 0.6, plain=False, follows=True),
    Stage("back_to_back", "generators and blocks, calls in a row, with the host's time", 0.5),
    Stage("training_check", "training steps compiled and held against float64", 0.4, 120.0, parallel=12, least=20),
    Stage("training", "training steps of generators and blocks against cuDNN, with the host's time", 0.9, 120.0),
    Stage("compiled", "generators and blocks beside torch.compile", 0.7, 300.0, least=45),
    Stage(
        "prediction",
        "the model that chooses plans, and the limits, against what was measured",
        0.1,
        follows=True,
        least=3,
    ),
    Stage("host_time", "time on the host of a call", 0.3),
    Stage(
        "hopper", "the Gluon kernel of sm_90, last: a wrong barrier hangs a GPU", 0.4, 40.0, plain=False, proves=True
    ),
)


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


# --- what a run is ----------------------------------------------------------------------------------------------------


def identity(dry_run: bool) -> dict[str, Any]:
    """The code and the machine: results of another are not carried on. (The code itself, as a commit says nothing of
    what is not committed, and a copy may have no repository.)"""
    digest = hashlib.sha256()
    for folder in ("cnnfast", "kernels", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    gpu = "none" if dry_run else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": env.package_version("triton")}
    return {"code": digest.hexdigest()[:16], "gpu": gpu, "dry_run": dry_run, **versions}


def driver_facts() -> dict[str, str]:
    """What nvidia-smi says of the driver and the clocks; nothing where it does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    names = (
        "driver_version", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "clocks.mem", "power.limit", "power.draw",
        "ecc.mode.current", "persistence_mode", "temperature.gpu",
    )  # fmt: skip
    query = [tool, f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")]
    return dict(zip((f"GPU {name}" for name in names), values, strict=False))


def parts(stage: Stage, dry_run: bool) -> int:
    """Processes of a stage whose rows may be made side by side: as processors and the GPU's memory allow."""
    if dry_run or not stage.parallel:
        return 1
    memory = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(os.cpu_count() or 1, memory // (stage.parallel * 2**30)))


# --- a stage ----------------------------------------------------------------------------------------------------------


def _command(stage: Stage, folder: Path, dry_run: bool, part: int, of: int, seconds: float) -> list[str]:
    if stage.command is not None:
        return [sys.executable, *stage.command]
    ours = ["--part", f"{part}/{of}", "--output", str(folder), "--seconds", f"{seconds:.1f}"]
    on_cpu = ["-m", "benchmarks.gpu.on_cpu"] if dry_run else []
    if stage.name == "tests":
        options = [option.replace("--", "--gpu-") for option in ours[::2]]
        mine = [text for pair in zip(options, ours[1::2], strict=True) for text in pair]
        dry = ["--gpu-limit", "6", "--gpu-stubbed"] if dry_run else []
        marks = "kernel and not slow" if dry_run else "kernel"
        plain = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-m", marks, "tests"]
        return [sys.executable, *(on_cpu or ["-m"]), "pytest", "-p", "benchmarks.gpu.plugin", *plain, *mine, *dry]
    runner = [*on_cpu, str(WORKER), "--"] if dry_run else [str(WORKER)]
    return [sys.executable, *runner, stage.name, *ours, *(["--dry-run"] if dry_run else [])]


def run_stage(stage: Stage, folder: Path, dry_run: bool, seconds: float, cache: Mapping[bool, Path | None]) -> Outcome:
    """Runs a stage; its output goes to ``STAGE.log`` in ``folder``. Never raises for what the stage does.

    ``cache``: the folder of proofs and tuned plans, for stages without and with the latter; None for the user's own.
    """
    if stage.needs is not None and importlib.util.find_spec(stage.needs) is None:
        reason = f"{stage.needs} is not installed: pip install {stage.needs}"
        return Outcome(stage.name, stage.about, "skipped", 0.0, reason)
    of = parts(stage, dry_run)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    where = cache[not stage.plain]
    if where is not None:
        variables["CNNFAST_CACHE"] = str(where)
    if dry_run:
        variables["CUDA_VISIBLE_DEVICES"] = ""  # a real one would be taken for what the interpreter stands for
    if stage.proves:
        variables.pop("CNNFAST_GUARD", None)
    stall = stage.stall * (5 if dry_run else 1)  # an interpreter of kernels is slow
    start = time.monotonic()

    def one(part: int, stop: threading.Event) -> Ending:
        command = partial(_command, stage, folder, dry_run, part, of)
        return supervise(command, folder, part_name(stage.name, part, of), seconds, stall, variables, ROOT, stop=stop)

    ending = supervise_all([partial(one, part) for part in range(of)])
    log = folder / f"{stage.name}.log"
    if of > 1:
        _join_logs([folder / f"{part_name(stage.name, part, of)}.log" for part in range(of)], log)
    if stage.command is not None:
        detail, status = _last_line(log), ending.status
    else:
        data = collect(folder, stage.name)
        detail, status = digest(data), ending.status
        if data is not None:
            write_atomically(folder / f"{stage.name}.md", page(data))
            status = "partial" if status == "ok" and data["left_out"] else status
    seconds = time.monotonic() - start
    return Outcome(stage.name, stage.about, status, seconds, detail, log.name, tuple(map(scrub, ending.crashes)))


def _join_logs(logs: Sequence[Path], into: Path) -> None:
    into.write_text("".join(f"--- {log.stem}\n{log.read_text(errors='replace')}\n" for log in logs))
    for log in logs:
        log.unlink()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return scrub(lines[-1][:300]) if lines else "no output"


# --- the run ----------------------------------------------------------------------------------------------------------


def _earlier(folder: Path, run: Mapping[str, Any]) -> dict[str, Outcome]:
    """The outcomes of an earlier run of the same code on the same machine in this folder."""
    try:
        if json.loads((folder / "run.json").read_text()) != run:
            return {}
        stages = json.loads((folder / "summary.json").read_text())["stages"]
    except (OSError, ValueError, KeyError):
        return {}
    return {s["stage"]: Outcome(**{**s, "crashes": tuple(s["crashes"])}) for s in stages}


def run(
    stages: Sequence[Stage],
    folder: Path,
    dry_run: bool,
    minutes: float = MINUTES,
    resume: bool = False,
    everything: Sequence[Stage] = STAGES,
) -> int:
    """Every stage in turn. Returns 1 where one failed or had to be stopped, else 0."""
    folder.mkdir(parents=True, exist_ok=True)
    this = identity(dry_run)
    outcomes = _earlier(folder, this)
    if not outcomes:  # of other code or another machine: nothing of it belongs to this run
        stale, outcomes = [s.name for s in everything], {}
    else:
        stale = [] if resume else [s.name for s in stages]
    for name in stale:
        for path in [*folder.glob(f"{name}.*"), *folder.glob(f"{name}-*")]:
            path.unlink()
    write_atomically(folder / "run.json", json.dumps(this, indent=1) + "\n")
    facts = environment("cpu" if dry_run else "cuda") | ({} if dry_run else driver_facts())
    facts["guard"] = f"CNNFAST_GUARD={os.environ['CNNFAST_GUARD']}" if "CNNFAST_GUARD" in os.environ else "on"
    facts["minutes"] = f"{minutes:g}"

    def write() -> None:
        known = [outcomes[s.name] for s in everything if s.name in outcomes]
        known += [o for name, o in outcomes.items() if name not in {s.name for s in everything}]
        data, text = summary(facts, known, dry_run, folder)
        write_atomically(folder / "summary.json", json.dumps(data, indent=1) + "\n")
        write_atomically(folder / "summary.md", text)

    def kept(s: Stage) -> bool:
        return resume and not s.follows and s.name in outcomes and _finished(outcomes[s.name], folder)

    todo = [s for s in stages if not kept(s)]
    for stage in stages:
        if stage not in todo:
            print(f"{stage.name}: {outcomes[stage.name].status} in an earlier run, kept")
    proofs = folder / PROOFS
    if not resume:
        shutil.rmtree(proofs, ignore_errors=True)
    cache = {False: proofs / "plain", True: proofs / "tuned" if dry_run else None}
    deadline = time.monotonic() + 60 * minutes - process.GRACE  # in which the last stage may finish a row
    write()
    for i, stage in enumerate(todo):
        left = max(0.0, deadline - time.monotonic())
        seconds = max(left * stage.share / sum(s.share for s in todo[i:]), stage.least)
        if seconds > left:
            reason = f"needs {stage.least:.0f} s, {left:.0f} s were left"
            outcome = Outcome(stage.name, stage.about, "skipped", 0.0, reason)
        else:
            print(f"{stage.name}: {stage.about} ({seconds:.0f} s) ...", flush=True)
            outcome = run_stage(stage, folder, dry_run, seconds, cache)
        outcomes[stage.name] = outcome
        write()
        print(f"{stage.name}: {outcome.status} after {outcome.seconds:.0f} s: {outcome.detail}", flush=True)
    print(f"\nwrote {folder / 'summary.md'} and {_archive(folder)}")
    return 1 if any(outcomes[s.name].status in ("failed", "timed out") for s in stages) else 0


def _archive(folder: Path) -> Path:
    """All that the stages wrote, logs included, in one file beside the folder: to be taken from the machine."""
    path = folder.with_name(f"{folder.name}.tar.gz")

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return None if Path(entry.name).name == PROOFS else entry

    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        tar.add(folder, folder.name, filter=kept)
    write_atomically(path, data.getvalue())
    return path


def _finished(outcome: Outcome, folder: Path) -> bool:
    """Whether there is nothing to be had from running a stage again: it came to its end, and nothing was left out."""
    if outcome.status not in ("ok", "failed"):
        return False
    data = read(folder / f"{outcome.stage}.json")
    return outcome.status == "ok" if data is None else bool(data["ended"] and not data["left_out"])


def compile_ahead(folder: Path, arch: int, seconds: float) -> int:
    """Fill a compile cache for GPUs of ``arch``. Returns 1 where a binary does not compile."""
    found = cases.CASES + tuple(c for c in (*cases.TRAINING, *cases.MINI, *cases.GEOMETRIES) if c not in cases.CASES)
    filled = warm.fill(folder, warm.recorded(arch, found), os.cpu_count() or 1, seconds, CACHE_BYTES)
    print(*filled.failed, sep="\n", end="\n" if filled.failed else "")
    print(
        f"{filled.compiled} binaries for sm_{arch} in {folder}, {filled.size / 2**20:.1f} MiB; "
        f"{filled.left_out} left out, {len(filled.failed)} failed"
    )
    return 1 if filled.failed else 0


def main(argv: list[str] | None = None) -> int:
    names = [s.name for s in STAGES]
    p = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    p.add_argument("--dry-run", action="store_true", help="without a GPU: the stages under ttsem, times stubbed")
    p.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together (%(default)g)")
    p.add_argument("--resume", action="store_true", help="keep what an earlier run of the same code has finished here")
    p.add_argument(
        "--compile", action="store_true", help="without a GPU: only fill --cache with what the stages launch"
    )
    p.add_argument("--arch", type=int, default=90, choices=sorted(DEVICES), help="of --compile (%(default)s)")
    p.add_argument("--cache", type=Path, metavar="DIR", help="Triton's compile cache, as --compile filled it")
    p.add_argument("--stage", action="append", choices=names, help="only this one; may be repeated")
    p.add_argument("--output", type=Path, help="folder of the results (out/gpu; in a dry run out/gpu-dry-run)")
    arguments = p.parse_args(argv)
    if arguments.minutes <= 0:
        p.error(f"--minutes {arguments.minutes:g} must be more than 0")
    if arguments.compile:
        if arguments.cache is None:
            p.error("--compile needs --cache DIR")
        return compile_ahead(arguments.cache.resolve(), arguments.arch, 60 * arguments.minutes)
    problem = obstacle(arguments.dry_run)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    folder = arguments.output or (DRY_RUN if arguments.dry_run else OUTPUT)
    if shutil.which("nvidia-smi") is None and not arguments.dry_run:
        print("note: nvidia-smi is not on the path")
    if arguments.cache is not None:
        warm.settle(arguments.cache.resolve())
        os.environ.update(warm.variables(arguments.cache.resolve()))  # of the stages' processes
    chosen = [s for s in STAGES if s.name in (arguments.stage or names)]
    try:
        return run(chosen, folder.resolve(), arguments.dry_run, arguments.minutes, arguments.resume)
    except KeyboardInterrupt:
        print("\ninterrupted; what is finished is kept: --resume goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
