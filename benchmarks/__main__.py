"""``python -m benchmarks``: layers, generators and blocks by cnnfast and its peers, on the CPU, in one run."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from . import cases, memory, plots
from .compare import compare
from .limits import copy_bandwidth, copy_bytes, yardstick
from .peers import IMPLEMENTATIONS, SUITE_IMPLEMENTATIONS
from .report import Report, environment, machine_name
from .rows import show
from .timers import RATIOS, wall_clock
from .workload import Implementation, NotAvailable, Prepared, Workload

RESULTS = Path(__file__).resolve().parent / "results"
SCRATCH = Path("out") / "bench"  # of runs that are not the whole

# Seconds of timing in a row, by suite; --quick takes half.
SECONDS = {"generator": 2.0, "upsample": 2.0, "layers": 1.0}

# What stands for a processor with less: limits of oneDNN, of ATen's own loops and of MKL. The two runtimes of other
# projects and torch.compile's generated loops do not follow them.
ISAS: dict[str, dict[str, str]] = {
    isa: {"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": aten, "MKL_ENABLE_INSTRUCTIONS": mkl}
    for isa, aten, mkl in (
        ("AVX2", "avx2", "AVX2"),
        ("AVX512_CORE", "avx512", "AVX512"),
        ("AVX512_CORE_BF16", "avx512", "AVX512"),
    )
}

NOTES = (
    "Every implementation has the same weights, input and precision, and is compared with float64 before it is timed; "
    "one that is off is not timed. Times are medians of interleaved repeats, caches warm: every turn times a block of "
    "calls of each (at least one call, about 20 ms) behind a call of the same that is not counted (none where a call "
    "takes 0.2 s); five turns at least. A call that takes a second is timed once, ahead of the others. The two "
    "runtimes of other projects take and return contiguous float32.",
    RATIOS,
    "TFLOP/s count two operations per multiply-add that is left after phase decomposition (of an upsampling, after "
    "it is collapsed into its convolution). torch.mm's rate is measured among the others, in every row.",
    "Least bytes: every block of a convolution, its norm and its activation reads its input and parameters once and "
    "writes its output once (with InstanceNorm, whose statistics need the whole map, the output three times). A copy's "
    "bandwidth is main memory's; where maps stay in a cache a time can be below the limit.",
)
AVX2_NOTE = "Upsample blocks in bfloat16 are left out: eager takes minutes a call without instructions for it."


def _implementations_note(suites: dict[str, tuple[Implementation, ...]]) -> str:
    rows = [f"{suite}: {', '.join(i.name for i in chosen)}" for suite, chosen in suites.items()]
    return f"Implementations, by suite: {'; '.join(rows)}. `--implementation` runs any."


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    p.add_argument("--quick", action="store_true", help="a few cases, the least batch, torch.compile once: 3 minutes")
    p.add_argument("--case", action="append", metavar="NAME", help="a case, suite or pattern; may be repeated")
    p.add_argument("--batch", action="append", type=int, metavar="N", help="only this batch size; may be repeated")
    p.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="only this one; may be repeated")
    p.add_argument(
        "--implementation",
        action="append",
        metavar="NAME",
        choices=[i.name for i in IMPLEMENTATIONS],
        help="this one in every row, in place of the suite's own; may be repeated",
    )
    p.add_argument("--isa", choices=sorted(ISAS), help="as on a processor with no more than this instruction set")
    p.add_argument("--seconds", type=float, help="of timing in each row (default 2, layers 1; --quick: half of it)")
    p.add_argument(
        "--output",
        type=Path,
        help=f"folder for the results (default benchmarks/results; {SCRATCH} if only a part is run)",
    )
    p.add_argument("--list", action="store_true", help="list the cases and stop")
    return p


def _unlimited(w: Workload) -> Prepared:
    raise NotAvailable("--isa does not limit its instruction set")


def implementations(suite: str, arguments: argparse.Namespace) -> tuple[Implementation, ...]:
    """What the rows of ``suite`` compare."""
    names = tuple(arguments.implementation or SUITE_IMPLEMENTATIONS[suite])
    if arguments.quick and not arguments.implementation:
        compiled = [n for n in names if "torch.compile" in n and n != "torch.compile channels_last"]
        names = tuple(n for n in names if n not in compiled and (suite != "layers" or "torch.compile" not in n))
    chosen = tuple(i for i in IMPLEMENTATIONS if i.name in names)
    if arguments.isa is None:
        return chosen
    return tuple(Implementation(i.name, _unlimited) if i.name in ("onnxruntime", "OpenVINO") else i for i in chosen)


def batches(case: cases.Case, arguments: argparse.Namespace) -> tuple[int, ...]:
    """Those asked for, if the case has them; any, for a case that is asked for by its name."""
    own = case.batches_on("cpu")
    if arguments.batch and case.name in (arguments.case or ()):
        return tuple(arguments.batch)
    if arguments.quick and not arguments.case and not arguments.batch:
        own = own[:2] if case.suite == "generator" else own[:1]
    return tuple(n for n in own if not arguments.batch or n in arguments.batch)


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """Every case, dtype and batch asked for, generators first. ValueError where nothing is left."""
    no_bfloat16 = "upsample" if arguments.isa == "AVX2" and not arguments.case else None
    found = [
        Workload(case, batch, dtype)
        for case in sorted(cases.find(arguments.case), key=lambda c: cases.SUITES.index(c.suite))
        if case.quick or not arguments.quick or arguments.case
        for dtype in cases.DTYPES["cpu"]
        if not arguments.dtype or str(dtype).removeprefix("torch.") in arguments.dtype
        if not (case.suite == no_bfloat16 and dtype == torch.bfloat16)
        for batch in batches(case, arguments)
    ]
    if not found:
        raise ValueError(f"no case of {arguments.case or 'all'} has a batch of {arguments.batch} on a CPU")
    return found


def _load(chosen: tuple[Implementation, ...]) -> None:
    """Go once through all that a first use loads, so that no row is charged with that memory."""
    quick = tuple(i for i in chosen if "torch.compile" not in i.name)
    compare(Workload(cases.MINI[0], 1, torch.float32), quick, None, None)
    if len(quick) < len(chosen):
        importlib.import_module("torch._inductor.compile_fx")


def run(arguments: argparse.Namespace) -> int:
    """The comparison. Returns 1 where an implementation of cnnfast fails or is wrong, else 0."""
    start = time.monotonic()
    todo = workloads(arguments)
    part = arguments.quick or any((arguments.case, arguments.batch, arguments.dtype, arguments.implementation))
    folder = (arguments.output or (SCRATCH if part else RESULTS)) / machine_name()
    no_memory = memory.unavailable()
    memory_note = f"Memory was not measured: {no_memory}." if no_memory else memory.METHODS["cpu"]
    suites = {w.case.suite: implementations(w.case.suite, arguments) for w in todo}
    notes = (*NOTES, _implementations_note(suites), memory_note)
    if arguments.isa == "AVX2" and not arguments.case:
        notes = (*notes, AVX2_NOTE)
    report = Report(environment(), f"python -m benchmarks {' '.join(sys.argv[1:])}".strip(), notes=notes)
    print("\n".join(f"{name}: {value}" for name, value in report.environment.items()))
    _load(max(suites.values(), key=len))
    bandwidth = copy_bandwidth("cpu", wall_clock(3.0))
    products = {dtype: yardstick(dtype, "cpu", wall_clock(1.0)) for dtype in {w.dtype for w in todo}}
    copied = f"{bandwidth / 1e9:.1f} GB/s (of {copy_bytes() >> 20} MiB, read and written)"
    report = replace(report, environment={**report.environment, "copy": copied})
    bad = 0
    for i, workload in enumerate(todo):
        seconds = arguments.seconds or SECONDS[workload.case.suite] / (2 if arguments.quick else 1)
        row = compare(
            workload, suites[workload.case.suite], wall_clock(seconds), products[workload.dtype],
            bandwidth=bandwidth, with_memory=not no_memory,
        )  # fmt: skip
        elapsed = time.monotonic() - start
        report = replace(report, rows=(*report.rows, row), complete=i == len(todo) - 1)
        if report.complete:
            report = replace(report, environment={**report.environment, "elapsed": f"{elapsed / 60:.1f} minutes"})
        paths = report.write(folder)
        print(f"\n[{i + 1}/{len(todo)}, {elapsed:.0f} s] {row.name}: {row.title}")
        bad += show(row)
    paths += plots.write(report.to_json(), folder)
    print(f"\nwrote {', '.join(map(str, paths))}\nelapsed: {(time.monotonic() - start) / 60:.1f} minutes")
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.list:
        for case in cases.CASES:
            on = [", ".join(map(str, case.batches_on(device))) or "-" for device in ("cpu", "cuda")]
            print(f"{case.name:<14}{case.suite:<11}batch {on[0]:<10} GPU {on[1]:<10} {case.title}")
        return 0
    limits = ISAS.get(arguments.isa, {})
    if any(os.environ.get(k) != v for k, v in limits.items()):  # the libraries read them when they are loaded
        rest = sys.argv[1:] if argv is None else argv
        # Code that Inductor cached for the whole processor is not found unfit, and gives wrong results.
        user = os.getuid() if hasattr(os, "getuid") else 0
        cache = Path(tempfile.gettempdir()) / f"torchinductor_{user}_{arguments.isa}"
        env = {**os.environ, **limits, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *rest], env)
    try:
        return run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
