"""The work of one stage of `benchmarks.gpu`: ``python benchmarks/gpu/stages.py STAGE --output DIR --seconds S``.

A script that `benchmarks.gpu` runs in a process of its own. In a dry run ttsem runs it: device "cuda" is then the CPU,
every launch is executed by an interpreter of Triton's intermediate language, and times are stubbed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, timers
from benchmarks.gpu import predict
from benchmarks.gpu.compare import Measure, ceilings, compare, least_us
from benchmarks.gpu.hopper import hopper_items
from benchmarks.gpu.probes import probe_items
from benchmarks.gpu.rows import Item, Rows, Steps, work_through
from benchmarks.gpu.tune import candidate_items, tune_items, tuned_workloads
from benchmarks.gpu.warm import counting
from benchmarks.peers import GPU_IMPLEMENTATIONS, GRAPH, named
from benchmarks.report import environment
from benchmarks.workload import TrainingWorkload, Workload
from cnnfast.gpu.tuning import cuda_timer

# The most important first.
NUMERICS: tuple[tuple[torch.dtype, bool], ...] = (
    (torch.float16, False),
    (torch.float32, True),
    (torch.bfloat16, False),
    (torch.float32, False),
)
GRAPHS = ("eager channels_last", "eager channels_last" + GRAPH, "cnnfast", "cnnfast" + GRAPH)
DRY = ("eager channels_last", "cnnfast")  # what a machine without a GPU can run


@dataclass(frozen=True)
class Context:
    """One process of a stage: its share of the rows is every ``parts``-th from ``part`` on."""

    folder: Path
    rows: Rows
    dry_run: bool
    part: int = 0
    parts: int = 1

    def measure(self, timer: Callable[[timers.Calls], Any] | None) -> Measure:
        return Measure(timers.stubbed if self.dry_run and timer is not None else timer, self.dry_run)

    def row(self, w: Workload, names: tuple[str, ...], timer: Any, seconds: float = 3.0, suffix: str = "") -> Item:
        """The item of a workload; ``suffix`` tells it from the same one with other implementations."""
        chosen = named(*(n for n in names if not self.dry_run or n in DRY), among=GPU_IMPLEMENTATIONS)
        limits = self.rows.data.get("ceilings")

        def work(steps: Steps) -> Mapping[str, Any]:
            row = compare(w, chosen, self.measure(timer), steps)
            if limits is not None:
                row["least_us"] = least_us(w, limits)
            if not self.dry_run:
                torch.cuda.empty_cache()
            return row

        return Item(w.name + suffix, work, seconds)


def workloads(found: Iterable[cases.Case], every_batch: bool = True, kind: type[Workload] = Workload) -> list[Workload]:
    """Those of all dtypes and batches, the most important first: the middle batch, then dtypes, then suites."""
    ranked = []
    for i, case in enumerate(found):
        suite = cases.SUITES.index(case.suite) if case.suite in cases.SUITES else len(cases.SUITES)
        for b, batch in enumerate(case.batches):
            other = b != len(case.batches) // 2
            if other and not every_batch:
                continue
            for n, (dtype, tf32) in enumerate(NUMERICS):
                ranked.append(((other, n, suite, i, b), kind(case, batch, dtype, "cuda", tf32)))
    return [w for _, w in sorted(ranked, key=lambda pair: pair[0])]


WHOLE = tuple(c for c in cases.CASES if c.suite != "layers")


def check(c: Context) -> Iterator[Item]:
    """Every regime, dtype and odd geometry at small sizes; then every benchmark case once, which compiles it."""
    if c.dry_run:
        small = (*cases.find(["mini_dcgan.2", "mini_1d"], cases.MINI), *cases.GEOMETRIES[:1])
    else:
        small = (*cases.GEOMETRIES, *cases.MINI)
    found = workloads(small)
    if not c.dry_run:
        found += workloads(cases.CASES, every_batch=False)
    for w in found[c.part :: c.parts]:
        yield c.row(w, ("cnnfast",), None, 5.0)


def table(c: Context) -> Iterator[Item]:
    """Layers, blocks and whole generators against cuDNN."""
    found = workloads(cases.MINI[1:2]) if c.dry_run else workloads(cases.CASES)
    names = ("eager", *GRAPHS)
    return (c.row(w, names, timers.cold) for w in found)


def single_steps(c: Context) -> list[Workload]:
    """What is tuned: layers and blocks, the most important first. A generator's steps are its layers'."""
    if c.dry_run:
        return workloads(cases.MINI[1:2])[:2]
    return [w for w in workloads(cases.CASES) if w.case.suite != "generator"]


def candidates(c: Context) -> Iterator[Item]:
    """The plans that `tune` will time, compiled and proven side by side."""
    return candidate_items(single_steps(c)[c.part :: c.parts], c.dry_run)


def tune(c: Context) -> Iterator[Item]:
    """The fastest plan of each step."""
    return tune_items(single_steps(c), c.dry_run)


def tuned(c: Context) -> Iterator[Item]:
    """The rows of the table whose steps were tuned, with the tuned plans."""
    names = GRAPHS[1::2] if not c.dry_run else DRY
    found = workloads(cases.MINI[1:2]) if c.dry_run else workloads(cases.CASES)
    return (c.row(w, names, timers.cold) for w in tuned_workloads(c.folder, found))


def back_to_back(c: Context) -> Iterator[Item]:
    """Whole generators with the host's time: what a user sees who calls them in a loop."""
    found = workloads(cases.MINI[1:2]) if c.dry_run else workloads(WHOLE)
    return (c.row(w, GRAPHS, timers.warm) for w in found)


def compiled(c: Context) -> Iterator[Item]:
    """Whole generators beside `torch.compile`; max-autotune, which takes its time, after all others."""
    found = workloads(cases.MINI[1:2])[:1] if c.dry_run else workloads(WHOLE, every_batch=False)
    default = ("eager channels_last", "torch.compile", "cnnfast", "cnnfast under torch.compile")
    longest = (*GRAPHS[1::2], "torch.compile max-autotune")  # which captures a graph itself
    for w in found:
        yield c.row(w, default, timers.cold, 20.0)
    if not c.dry_run:
        for w in found:
            yield c.row(w, longest, timers.cold, 60.0, " (max-autotune)")


def training_check(c: Context) -> Iterator[Item]:
    """The steps that `training` times, once each: side by side, as compiling and proving take most of a first one."""
    found = workloads(cases.MINI[1:2] if c.dry_run else cases.TRAINING, kind=TrainingWorkload)
    return (c.row(w, ("cnnfast",), None, 5.0) for w in found[c.part :: c.parts])


def training(c: Context) -> Iterator[Item]:
    """Training steps, calls in a row, with the host's time; in a CUDA graph without it."""
    found = workloads(cases.MINI[1:2] if c.dry_run else cases.TRAINING, kind=TrainingWorkload)
    for w in found:
        yield c.row(w, ("eager", *GRAPHS), timers.warm, 5.0)
    if not c.dry_run:
        names = ("eager channels_last", "torch.compile", "cnnfast")
        for w in found:
            if w.case.suite == "generator":
                yield c.row(w, names, timers.warm, 30.0, " (compiled)")


def host_time(c: Context) -> Iterator[Item]:
    """What a call costs the host, whose device work is small."""
    found = workloads(cases.MINI[1:2])[:1] if c.dry_run else workloads(WHOLE)
    least = [w for w in found if w.batch == min(w.case.batches)]
    return (c.row(w, GRAPHS, timers.host) for w in least)


def hopper(c: Context) -> Iterator[Item]:
    """The Gluon kernel of sm_90: right, and faster than the pointer kernel, layer by layer."""
    return hopper_items(single_steps(c), cuda_timer, c.dry_run)


Stage = Callable[[Context], Iterator[Item]]
STAGES: dict[str, Stage] = {
    "probes": lambda c: probe_items(NUMERICS, c.dry_run),
    "check": check,
    "table": table,
    "candidates": candidates,
    "tune": tune,
    "tuned": tuned,
    "back_to_back": back_to_back,
    "training_check": training_check,
    "training": training,
    "compiled": compiled,
    "prediction": lambda c: predict.prediction_items(c.folder),
    "host_time": host_time,
    "hopper": hopper,
}
MEASURED_LIMITS = ("table", "tuned")  # stages that give the least time beside each row


def show(row: Mapping[str, Any]) -> str:
    """A row in a few words, for the log."""
    parts = [f"{row['key']}:"]
    if "note" in row:
        parts.append(str(row["note"]))
    for step in row.get("steps", ()):
        best = f"best {step['best']}" if "best" in step else ""
        parts.append(f"[{step['title']}: heuristic {step['heuristic']} {best}, {step['refused']} refused]")
    for e in row.get("entries", ()):
        time = f" {e['us']['median']:.1f} us" if "us" in e and not e.get("stubbed") else ""
        error = f" error {e['error']:.1e}" if "error" in e else ""
        parts.append(f"[{e['name']}: {e['status']}{time}{error} {e.get('note', '')}{e.get('path', '')}]")
    return " ".join(parts)


def work(argv: list[str]) -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("stage", choices=STAGES)
    p.add_argument("--output", type=Path, required=True, help="folder of the run (holds run.json)")
    p.add_argument("--seconds", type=float, required=True, help="begin no row after them")
    p.add_argument("--part", default="0/1", help="I/N: every N-th row from I on")
    p.add_argument("--dry-run", action="store_true")
    a = p.parse_args(argv)
    part, parts = (int(n) for n in a.part.split("/"))
    torch.backends.cudnn.benchmark = True
    run = json.loads((a.output / "run.json").read_text())
    facts = environment("cuda") | {"guard": os.environ.get("CNNFAST_GUARD", "on")}
    rows = Rows(a.output, a.stage, run, part, parts, stubbed=a.dry_run, environment=facts)
    if a.stage == "prediction":
        rows.clear()
    c = Context(a.output, rows, a.dry_run, part, parts)
    if a.stage in MEASURED_LIMITS and "ceilings" not in rows.data:
        rows.data["ceilings"] = ceilings(NUMERICS, c.measure(timers.cold))
    with counting() as rows.data["binaries"]:
        return 1 if work_through(rows, STAGES[a.stage](c), a.seconds, show) else 0


if __name__ == "__main__":
    sys.exit(work(sys.argv[1:]))
