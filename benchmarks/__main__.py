"""``python -m benchmarks``: layers, generators and blocks by cnnfast and its peers, on the CPU, in one run."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from . import cases
from .compare import compare, wall_clock, yardstick
from .peers import IMPLEMENTATIONS, Implementation, NotAvailable, Prepared, Workload
from .report import Report, environment, machine_name

RESULTS = Path(__file__).resolve().parent / "results"
SCRATCH = Path("out") / "bench"  # of runs that are not the whole

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
    "Every implementation has the same weights and input, and is compared with float64 before it is timed; one that is "
    "off is not timed. Times are medians of interleaved repeats. TFLOP/s count two operations per multiply-add that is "
    "left after phase decomposition; torch.mm's rate is measured among the others, in every row. A call "
    "that takes long (a second; with --quick half of one) is timed once.",
)


AVX2_NOTE = "The upsample block in bfloat16 is left out: eager takes minutes a call without instructions for it."


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    p.add_argument("--quick", action="store_true", help="generator and upsample block, torch.compile once: 3 minutes")
    p.add_argument("--case", action="append", metavar="NAME", help="a case or suite; may be repeated")
    p.add_argument("--batch", action="append", type=int, metavar="N", help="only this batch size; may be repeated")
    p.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="only this one; may be repeated")
    p.add_argument("--isa", choices=sorted(ISAS), help="as on a processor with no more than this instruction set")
    p.add_argument("--seconds", type=float, default=None, help="of timing in each row (default 4, --quick 2)")
    p.add_argument(
        "--output",
        type=Path,
        help=f"folder for the results (default benchmarks/results; {SCRATCH} if only a part is run)",
    )
    p.add_argument("--list", action="store_true", help="list the cases and stop")
    return p


def _unlimited(w: Workload) -> Prepared:
    raise NotAvailable("--isa does not limit its instruction set")


def implementations(quick: bool, isa: str | None) -> tuple[Implementation, ...]:
    chosen = [i for i in IMPLEMENTATIONS if not (quick and i.name == "torch.compile")]
    if isa is None:
        return tuple(chosen)
    return tuple(Implementation(i.name, _unlimited) if i.name in ("onnxruntime", "OpenVINO") else i for i in chosen)


def workloads(arguments: argparse.Namespace) -> list[Workload]:
    """Every case, dtype and batch asked for. ValueError where nothing is left."""
    found = [
        Workload(case, batch, dtype)
        for case in cases.find(arguments.case)
        if case.quick or not arguments.quick or arguments.case
        for dtype in cases.DTYPES["cpu"]
        if not arguments.dtype or str(dtype).removeprefix("torch.") in arguments.dtype
        for batch in case.batches_on("cpu")
        if not arguments.batch or batch in arguments.batch
        if arguments.case or not (arguments.isa == "AVX2" and case.suite == "upsample" and dtype == torch.bfloat16)
    ]
    if not found:
        raise ValueError(f"no case of {arguments.case or 'all'} has a batch of {arguments.batch}")
    return found


def run(arguments: argparse.Namespace) -> int:
    """The comparison. Returns 1 where an implementation of cnnfast fails or is wrong, else 0."""
    todo = workloads(arguments)
    part = arguments.quick or bool(arguments.case or arguments.batch or arguments.dtype)
    folder = (arguments.output or (SCRATCH if part else RESULTS)) / machine_name()
    command = "python -m benchmarks " + " ".join(sys.argv[1:])
    notes = (*NOTES, AVX2_NOTE) if arguments.isa == "AVX2" and not arguments.case else NOTES
    report = Report(environment(), command.strip(), notes=notes)
    print("\n".join(f"{name}: {value}" for name, value in report.environment.items()))
    timer = wall_clock(arguments.seconds or (2.0 if arguments.quick else 4.0))
    products = {dtype: yardstick(dtype, "cpu", wall_clock(1.0)) for dtype in {w.dtype for w in todo}}
    chosen = implementations(arguments.quick, arguments.isa)
    bad, start = 0, time.monotonic()
    for i, workload in enumerate(todo):
        row = compare(workload, chosen, timer, products[workload.dtype])
        report = Report(report.environment, report.command, (*report.rows, row), report.notes, i == len(todo) - 1)
        report.write(folder)
        print(f"\n[{i + 1}/{len(todo)}, {time.monotonic() - start:.0f} s] {row.name}: {row.title}")
        for e in row.entries:
            if e.timing is None:
                print(f"  {e.name:<28}{e.status}: {e.note}")
                bad += e.name.startswith("cnnfast")
            else:
                part_of_mm, ratio = row.fraction(e) or 0.0, row.speedup(e)
                over = "" if ratio is None else f"{ratio:6.2f}x"
                print(f"  {e.name:<28}{e.timing!s:<28}{part_of_mm:6.2f} of mm {over:>8}  {e.path}")
        sys.stdout.flush()
    paths = report.write(folder)
    print("\nwrote " + " and ".join(map(str, paths)))
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.list:
        for case in cases.CASES:
            print(f"{case.name:<14}{case.suite:<11}batch {', '.join(map(str, case.batches)):<10}{case.title}")
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
