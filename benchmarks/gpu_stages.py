"""The work of one stage of `benchmarks.gpu`: ``python benchmarks/gpu_stages.py STAGE --output DIR [--dry-run]``.

A script that `benchmarks.gpu` runs in a process of its own. In a dry run ttsem runs it: device "cuda" is then the CPU,
every launch is executed by an interpreter of Triton's intermediate language, and no time is taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from benchmarks import cases
from benchmarks.compare import Timer, compare, yardstick
from benchmarks.peers import GPU_IMPLEMENTATIONS, Implementation, Workload
from benchmarks.report import Report, environment
from cnnfast.timing import Timing, measure

CHECKED = (
    "Every implementation has the same weights, input and TF32 setting, and is compared with float64 before it is "
    "timed; one that is off is not timed. cuDNN's own search is on (`torch.backends.cudnn.benchmark`)."
)
COLD = (
    "Times are of the device (CUDA events), the L2 cache overwritten before every call, so that the host's time is "
    "hidden: medians of `triton.testing.do_bench`, repeated in turn."
)
WARM = (
    "Times are of calls back to back on one stream (CUDA events), the host's time included where it is the longer one."
)
STUBBED = (
    "**Dry run: the kernels ran in an interpreter on a CPU. Results are checked; times are stubbed (there are none).**"
)


def cold(repeats: int = 5) -> Timer:
    """Device time with a cold L2 cache."""
    from triton.testing import do_bench

    def timer(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(repeats):
            for name, call in calls.items():
                seconds[name].append(do_bench(call, warmup=5, rep=20, return_mode="median") / 1e3)
        return {name: Timing(tuple(values), 1) for name, values in seconds.items()}

    return timer


def warm(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    """Calls back to back."""
    return measure(calls, repeats=10, device="cuda")


def numerics() -> Iterator[tuple[torch.dtype, bool]]:
    """(dtype, TF32), the common ones first."""
    yield torch.float16, False
    yield torch.bfloat16, False
    yield torch.float32, True
    yield torch.float32, False


def set_tf32(on: bool) -> None:
    # The older switches: torch.compile reads them, and they raise once only the newer ones were set.
    torch.backends.cudnn.allow_tf32 = on
    torch.backends.cuda.matmul.allow_tf32 = on


def _implementations(names: tuple[str, ...]) -> tuple[Implementation, ...]:
    return tuple(i for i in GPU_IMPLEMENTATIONS if i.name in names)


def _report(name: str, workloads: list[Workload], timer: Timer | None, notes: tuple[str, ...], folder: Path,
            chosen: Callable[[Workload], tuple[Implementation, ...]]) -> int:  # fmt: skip
    """Compares, writing the report after every row. Returns how many of cnnfast's entries failed or are wrong."""
    report, bad, products = Report(environment("cuda"), f"python -m benchmarks.gpu ({name})", notes=notes), 0, {}
    for i, w in enumerate(workloads):
        set_tf32(w.tf32)
        if timer is not None and (w.dtype, w.tf32) not in products:
            products[w.dtype, w.tf32] = yardstick(w.dtype, "cuda", timer, (2048, 4096, 8192))
        row = compare(w, chosen(w), timer, products.get((w.dtype, w.tf32)))
        report = Report(report.environment, report.command, (*report.rows, row), notes, i == len(workloads) - 1)
        report.write(folder, name)
        for e in row.entries:
            wrong = e.name.startswith("cnnfast") and e.status not in ("timed", "checked")
            bad += wrong
            time = "" if e.timing is None else f" {e.timing}"
            error = "" if e.error is None else f" error {e.error:.1e}"
            print(
                f"{row.name}: {e.name}: {'WRONG: ' if wrong else ''}{e.status}{time}{error} {e.note} {e.path}",
                flush=True,
            )
    print(f"{len(report.rows)} rows, {bad} failures of cnnfast")
    return bad


def check(folder: Path, dry_run: bool) -> int:
    """Every regime and dtype at small sizes against float64, through the functions and (on a GPU) the modules."""
    names = ("cnnfast.ops",) if dry_run else ("cnnfast", "cnnfast.ops")
    found = (*cases.MINI[-2:], *cases.GEOMETRIES[:1]) if dry_run else (*cases.MINI, *cases.GEOMETRIES)
    todo = [Workload(c, c.batches[0], dtype, "cuda", tf32) for dtype, tf32 in numerics() for c in found]
    notes = (STUBBED,) if dry_run else ("Only checked, not timed.",)
    return _report("check", todo, None, notes, folder, lambda w: _implementations(names))


def table(folder: Path, dry_run: bool) -> int:
    """The comparison with cuDNN, the generator first."""
    if dry_run:
        todo = [Workload(cases.MINI[1], 2, torch.float16, "cuda")]
        names = ("eager", "eager channels_last", "cnnfast.ops")
        return _report("table", todo, None, (STUBBED,), folder, lambda w: _implementations(names))
    torch.backends.cudnn.benchmark = True
    order = sorted(cases.CASES, key=lambda c: c.suite == "layers")
    todo = [Workload(c, n, dtype, "cuda", tf32) for c in order for dtype, tf32 in numerics() for n in c.batches]

    def chosen(w: Workload) -> tuple[Implementation, ...]:
        compiled = ("torch.compile channels_last",) if w.case.suite != "layers" else ()
        return _implementations(("eager", "eager channels_last", *compiled, "cnnfast"))

    return _report("table", todo, cold(), (CHECKED, COLD), folder, chosen)


def back_to_back(folder: Path, dry_run: bool) -> int:
    """Whole generators with the host's time: what a user sees who calls them in a loop."""
    if dry_run:
        todo = [Workload(cases.MINI[-1], 2, torch.float16, "cuda")]
        return _report("back_to_back", todo, None, (STUBBED,), folder, lambda w: _implementations(("cnnfast.ops",)))
    torch.backends.cudnn.benchmark = True
    found = [c for c in cases.CASES if c.suite != "layers"]
    todo = [Workload(c, n, dtype, "cuda", tf32) for c in found for dtype, tf32 in numerics() for n in c.batches]
    names = ("eager", "eager channels_last", "torch.compile channels_last", "cnnfast")
    return _report("back_to_back", todo, warm, (CHECKED, WARM), folder, lambda w: _implementations(names))


STAGES = {"check": check, "table": table, "back_to_back": back_to_back}


def work(argv: list[str]) -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("stage", choices=STAGES)
    p.add_argument("--output", type=Path, required=True)
    p.add_argument("--dry-run", action="store_true")
    arguments = p.parse_args(argv)
    return 1 if STAGES[arguments.stage](arguments.output, arguments.dry_run) else 0


if __name__ == "__main__":
    sys.exit(work(sys.argv[1:]))
