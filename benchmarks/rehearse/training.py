"""``python -m benchmarks.rehearse.training``: training steps of the benchmark cases on GPUs that are not here.

For every case, precision and architecture the real path is driven up to the launches (`training_launches.py`), each
distinct binary compiled and its machine code read, and judged: no spill, shared memory and registers within the chip,
grids within limits, tensor-core instructions in the loops of convolutions and weight gradients, no waits for all of
them there, and no loads of two bytes where the channels allow wider ones. Issue pressure of the weight gradient is
reported. Then what a training step launches and moves, beside eager's and Inductor's. Ends with status 1 where a binary
fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cnnfast.files import write_atomically
from cnnfast.gpu.devices import DEVICES

from .. import cases
from ..case import Case
from ..report import table
from .inspections import Failed, Inspections
from .inspector import ARCHS, Call, Report
from .launches import CALLED, NUMERICS, precision
from .model import rate
from .rules import drained, grids, limits
from .training_launches import Cost, eager_cost, inductor_cost, record

__all__ = ["Finding", "Result", "rehearse"]

LOOPS = ("conv_transpose_kernel", "conv_wgrad_kernel")


@dataclass(frozen=True)
class Finding:
    """A binary that fails: where it is launched, and why."""

    case: str
    numerics: str
    arch: int
    function: str
    text: str


@dataclass
class Result:
    launches: int = 0
    binaries: int = 0
    findings: list[Finding] = field(default_factory=list)
    unfused: dict[str, list[str]] = field(default_factory=dict)  # case -> PyTorch's operators in its step
    # Of the weight gradient: (precision, architecture) -> values
    pressure: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    passes: list[tuple[str, int, dict[str, Cost]]] = field(default_factory=list)  # case, batch, who -> cost


def loop(call: Call, report: Report, numerics: str) -> list[str]:
    """What is wrong with the main loop of a convolution or weight gradient."""
    if call.job.function not in LOOPS:
        return []
    c, found = call.job.named_constants, []
    exact = numerics == "fp32"
    if not exact and not report.mma:
        found.append("no tensor-core instruction in the main loop")
    found += drained(report, precision(numerics))
    wgrad = call.job.function == "conv_wgrad_kernel"
    channels = (c["CA"], c["CB"]) if wgrad else (c["CIN"], c["COLS"])
    strides = () if wgrad else (c["W_COL"] if c["W_K"] != 1 else 1,)
    wide = all(n % 8 == 0 for n in channels) and all(s == 1 for s in strides)
    if wide and report.looped and report.narrow_loads:
        found.append(f"{report.narrow_loads} loads of 2 bytes or less in the main loop")
    return found


def wgrad_pressure(call: Call, report: Report, numerics: str, arch: int) -> float | None:
    """Issue slots over tensor-core cycles of the main loop; None for channels that 16-byte loads do not divide, and
    where there are no tensor cores."""
    c = call.job.named_constants
    if call.job.function != "conv_wgrad_kernel" or c["CA"] % 8 or c["CB"] % 8 or not report.mma:
        return None
    macs = report.macs
    if report.mma_kind == "tcgen05":  # at most 128 rows and 256 columns, 32 bytes of k
        macs = report.mma * min(c["BLOCK_M"], 128) * min(c["BLOCK_N"], 256) * 32 // precision(numerics).itemsize
    cycles = macs / rate(report.mma_kind, precision(numerics), DEVICES[arch])
    return report.instructions * report.num_warps / 4 / cycles


def trainable(case: Case) -> bool:
    """Whether the case has a norm or activation to train with: all do, but whole generators are made of layers that
    stand as cases of their own."""
    return case.suite != "generator"


def rehearse(
    which: Iterable[Case], archs: Iterable[int], numerics: Iterable[str], batch: int, inspections: Inspections
) -> Result:
    result, seen = Result(), []
    for case in which:
        for name in numerics:
            for arch in archs:
                run = record(case, min(batch, max(case.batches)), name, arch)
                seen += [(case, name, arch, call) for call in run.calls]
                if run.by_torch:
                    result.unfused[case.name] = sorted(set(run.by_torch))
    result.launches = len(seen)
    reports = inspections.of([call.job for *_, call in seen])
    result.binaries = len(reports)
    judged = set()
    for case, name, arch, call in seen:
        report = reports[call.job.key]
        if call.job.key in judged:
            continue
        judged.add(call.job.key)
        if isinstance(report, Failed):
            texts = [f"does not compile: {report.message}"]
        else:
            texts = [*limits(report, DEVICES[arch]), *loop(call, report, name)]
            value = wgrad_pressure(call, report, name, arch)
            if value is not None:
                result.pressure[name, arch].append(value)
        texts += grids([call])
        result.findings += [Finding(case.name, name, arch, call.job.function, text) for text in texts]
    return result


def passes(which: Iterable[Case], batch: int) -> list[tuple[str, int, dict[str, Cost]]]:
    """fp32 on sm_80 (PyTorch on a CPU, whose Inductor is asked, has half precision by detours)."""
    out = []
    for case in which:
        run = record(case, batch, "tf32", 80)
        costs = {
            "eager": eager_cost(case, batch, "tf32"),
            "Inductor": inductor_cost(case, batch, "tf32"),
            "cnnfast": run.cost,
        }
        out.append((case.name, batch, costs))
    return out


def markdown(result: Result) -> str:
    lines = [
        "# Training steps, rehearsed\n",
        f"{result.launches} launches, {result.binaries} binaries, {len(result.findings)} findings. "
        "Written by `python -m benchmarks.rehearse.training`; nothing here was measured on a GPU.\n",
    ]
    if result.findings:
        rows = [[f.case, f.numerics, f"sm_{f.arch}", f.function, f.text] for f in result.findings]
        lines += table(["case", "precision", "GPU", "kernel", "finding"], rows)
    if result.pressure:
        rows = [
            [name, f"sm_{arch}", f"{sorted(v)[len(v) // 2]:.2f}", f"{max(v):.2f}"]
            for (name, arch), v in sorted(result.pressure.items())
        ]
        head = ["precision", "GPU", "median", "worst"]
        lines += ["\n## Issue pressure of the weight gradient\n", *table(head, rows)]
    if result.unfused:
        rows = [[case, ", ".join(ops)] for case, ops in result.unfused.items()]
        lines += ["\n## PyTorch's operators inside steps\n", *table(["case", "operators"], rows)]
    if result.passes:
        rows = []
        for case, batch, costs in result.passes:
            for who, cost in costs.items():
                peak = f"{cost.peak / 2**20:.1f}" if cost.peak else ""
                rows.append([case, str(batch), who, str(len(cost.launches)), f"{cost.moved / 2**20:.1f}", peak])
        lines += [
            "\n## Launches and memory of one training step (float32, batch and input gradient included)\n",
            "Bytes that all launches read and write, workspaces included; the peak beyond weights and input. Eager's "
            "and Inductor's are PyTorch's own lists of operators and of scheduled nodes, of its CPU build.\n",
            *table(["case", "batch", "by", "launches", "MiB moved", "MiB at most"], rows),
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.rehearse.training", description=__doc__)
    p.add_argument("--case", action="append", metavar="NAME", help="a case, suite or pattern; may be repeated")
    p.add_argument("--arch", action="append", type=int, choices=ARCHS, help="may be repeated")
    p.add_argument("--dtype", action="append", choices=tuple(NUMERICS), help="may be repeated")
    p.add_argument("--batch", type=int, default=16, help="(%(default)s)")
    p.add_argument("--jobs", type=int, default=2, help="worker processes (%(default)s; 0: none)")
    p.add_argument("--passes", action="append", metavar="NAME", help="cases whose launches and bytes are counted")
    p.add_argument("--output", type=Path, default=None, help="folder (default benchmarks/results/rehearsal)")
    a = p.parse_args(argv)
    try:
        which = [c for c in cases.find(a.case) if a.case or trainable(c)]
        blocks = cases.find(a.passes) if a.passes else []
    except ValueError as error:
        p.error(str(error))
    torch.manual_seed(0)
    numerics, archs = tuple(a.dtype or CALLED), tuple(a.arch or ARCHS)
    result = rehearse(which, archs, numerics, a.batch, Inspections(a.jobs))
    result.passes = passes(blocks, a.batch)
    text = markdown(result)
    print(text)
    part = bool(a.case or a.arch or a.dtype)
    output = a.output or (None if part else Path(__file__).resolve().parents[1] / "results" / "rehearsal")
    if output is not None:
        write_atomically(output / "training.md", text)
        found = [vars(f) for f in result.findings]
        pressure = {f"{name} sm_{arch}": v for (name, arch), v in result.pressure.items()}
        write_atomically(output / "training.json", json.dumps({"findings": found, "pressure": pressure}, indent=1))
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
