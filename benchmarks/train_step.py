"""``python -m benchmarks.train_step``: forward and backward of generators and blocks in training, on the CPU.

What `python -m benchmarks` is to inference: every implementation has the same float32 weights and input, its result and
gradients are compared with float64's before it is timed, and times are of interleaved repeats. bfloat16 is autocast.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from . import cases, memory
from .compare import compare
from .peers import named
from .report import Report, environment, machine_name
from .rows import show
from .timers import RATIOS, wall_clock
from .workload import TrainingWorkload

RESULTS = Path(__file__).resolve().parent / "results"
SCRATCH = Path("out") / "bench"
SECONDS = 8.0
NAMES = ("eager", "eager channels_last", "torch.compile channels_last", "cnnfast", "cnnfast NCHW")

NOTES = (
    "A step is a forward in training mode and the backward of a given gradient of its result; the gradients start as "
    "None. In generators the input needs no gradient, in blocks (the middle of a network) it does. bfloat16 is "
    "autocast: float32 parameters and gradients.",
    "Every implementation has the same weights and input. It is timed if no gradient, nor the result, is off from "
    "float64's by more than four times what eager NCHW's is, as it is or with parameters off by some roundings "
    "(gradients jump at the kinks of activations), or a forward's tolerance if that is more (2-norm of the difference "
    "over that of float64's, the worst of all tensors). Times are medians of interleaved repeats.",
    RATIOS,
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    p.add_argument("--quick", action="store_true", help="the least batches, half the time, no torch.compile")
    p.add_argument("--case", action="append", metavar="NAME", help="only this case; may be repeated")
    p.add_argument("--batch", action="append", type=int, metavar="N", help="only this batch; may be repeated")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="only this one")
    p.add_argument("--seconds", type=float, default=SECONDS, help="of timing in each row (default %(default)s)")
    p.add_argument("--output", type=Path, help=f"folder (default benchmarks/results; {SCRATCH} if only a part is run)")
    return p


def workloads(arguments: argparse.Namespace) -> list[TrainingWorkload]:
    """Every case, dtype and batch asked for. ValueError where nothing is left."""
    found = [
        TrainingWorkload(case, batch, dtype)
        for case in cases.find(arguments.case, cases.TRAINING)
        for dtype in cases.DTYPES["cpu"]
        if arguments.dtype in (None, str(dtype).removeprefix("torch."))
        for batch in case.batches_on("cpu")[: 1 if arguments.quick else None]
        if not arguments.batch or batch in arguments.batch
    ]
    if not found:
        raise ValueError(f"no case of {arguments.case or 'all'} has a batch of {arguments.batch} on a CPU")
    return found


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 where an implementation of cnnfast fails or is wrong, else 0. ValueError for an unknown case."""
    start = time.monotonic()
    todo = workloads(arguments)
    chosen = named(*(n for n in NAMES if not (arguments.quick and "compile" in n)))
    part = arguments.quick or arguments.case or arguments.batch or arguments.dtype
    folder = (arguments.output or (SCRATCH if part else RESULTS)) / machine_name()
    no_memory = memory.unavailable()
    note = f"Memory was not measured: {no_memory}." if no_memory else memory.METHODS["cpu"]
    command = f"python -m benchmarks.train_step {' '.join(sys.argv[1:])}".strip()
    report = Report(environment(), command, notes=(*NOTES, note))
    print("\n".join(f"{name}: {value}" for name, value in report.environment.items()))
    timer = wall_clock(arguments.seconds / (2 if arguments.quick else 1))
    bad = 0
    for i, workload in enumerate(todo):
        row = compare(workload, chosen, timer, None, with_memory=not no_memory)
        report = replace(report, rows=(*report.rows, row), complete=i == len(todo) - 1)
        paths = report.write(folder, "train_step")
        print(f"\n[{i + 1}/{len(todo)}, {time.monotonic() - start:.0f} s] {row.name}: {row.title}")
        bad += show(row)
    print(f"\nwrote {', '.join(map(str, paths))}\nelapsed: {(time.monotonic() - start) / 60:.1f} minutes")
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parser().parse_args(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
