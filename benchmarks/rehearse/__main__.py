"""``python -m benchmarks.rehearse``: what every benchmark case will be on GPUs that are not here.

For every case, batch, dtype and architecture the real path is driven up to the launch (`launches.py`), each distinct
binary compiled and its machine code read (`inspections.py`), and plan, occupancy, issue pressure, bytes and the bound
worked out and judged (`analysis.py`). Writes a table, JSON and plots; ends with status 1 where a plan fails.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from cnnfast.gpu.devices import DEVICES

from .. import cases
from ..cases import Case
from .analysis import Passes, Rehearsal, Row, analyse
from .inspections import Inspections
from .inspector import ARCHS
from .launches import CALLED, NUMERICS, Op, Recorder, StepRun, Unrun, eager_ops, inductor_passes, precision

__all__ = ["rehearse"]


QUICK = dict(archs=(80, 90), numerics=("fp16",))


Progress = Callable[[str, int, int], None]


def rehearse(
    which: Iterable[Case],
    archs: Iterable[int] = ARCHS,
    numerics: Iterable[str] = CALLED,
    batches: Iterable[int] | None = None,
    inspections: Inspections | None = None,
    progress: Progress | None = None,
) -> Rehearsal:
    """All of it for these cases. ``batches``: only these of each case's. ``progress(stage, done, all)``."""
    start = time.monotonic()
    which, archs, numerics = tuple(which), tuple(archs), tuple(numerics)
    wanted = None if batches is None else set(batches)
    inspections = inspections or Inspections()
    out, rows, runs = Rehearsal(), {}, []
    for number, case in enumerate(which, 1):
        chosen = [b for b in case.batches if wanted is None or b in wanted]
        for name in numerics if chosen else ():
            recorder = Recorder(case, name)
            for batch, arch in itertools.product(chosen, archs):
                found = recorder(batch, arch)
                runs += _rows(case, name, arch, found, rows)
                for u in found:
                    if isinstance(u, Unrun):
                        out.unrun.setdefault(case.name, {})[u.module] = u.why_not
        if chosen:
            out.passes.append(_passes(case, chosen[-1]))
        if progress is not None:
            progress("launches", number, len(which))
    jobs = [call.job for _, run in runs for call in run.calls]
    reports = inspections.of(jobs, None if progress is None else lambda done, n: progress("binaries", done, n))
    for row, run in runs:
        if run.calls:
            found_reports = [reports[c.job.key] for c in run.calls]
            row.result = analyse(run, found_reports, precision(row.numerics), DEVICES[row.arch])
    out.rows = list(rows.values())
    out.binaries, out.compiled = len(reports), inspections.compiled
    out.seconds = time.monotonic() - start
    return out


def _rows(
    case: Case, numerics: str, arch: int, found: list[StepRun | Unrun], rows: dict[object, Row]
) -> list[tuple[Row, StepRun]]:
    """New rows, with the step that each is about; steps that are known already only add the case's name."""
    new = []
    for run in found:
        if not isinstance(run, StepRun):
            continue
        traffic = tuple((op.name, op.read, op.written) for op in run.ops)
        key = run.step, run.input_shape, numerics, arch, tuple(c.job.key for c in run.calls), traffic
        if key not in rows:
            binaries = tuple(c.job.key[:16] for c in run.calls)
            rows[key] = Row(
                [], run.modules, run.input_shape, run.output_shape, numerics, arch, binaries, None, run.why_not
            )
            new.append((rows[key], run))
        if case.name not in rows[key].cases:
            rows[key].cases.append(case.name)
    return new


def _passes(case: Case, batch: int) -> Passes:
    name, arch = "fp16", 90
    ours: list[Op] = []
    launches = 0
    size = 0
    for part in Recorder(case, name)(batch, arch):
        ours += part.ops
        if isinstance(part, StepRun) and part.calls:
            launches += len(part.calls)
            # The tensors that the launches read and write, each once; what is read again is in the rows.
            for call in part.calls:
                partial = call is part.main and call.arguments["SPLITS"] > 1  # y is the second pass's
                size += sum(call.bytes_of(n) for n in call.tensors if not (partial and n == "y_ptr"))
    eager = eager_ops(case, batch, NUMERICS[name][0])
    return Passes(
        case.name,
        batch,
        launches + len(ours),
        len(eager),
        inductor_passes(eager),
        size + sum(op.read + op.written for op in ours),
        sum(op.read + op.written for op in eager),
    )


# --- the command ------------------------------------------------------------------------------------------------------


class _Line:
    """Progress in one line, with the time that is left."""

    def __init__(self) -> None:
        self.stage, self.start, self.shown = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.start, self.shown = stage, now, 0.0
        if done < total and now - self.shown < (0.5 if sys.stderr.isatty() else 20):
            return
        self.shown = now
        left = (now - self.start) / done * (total - done)
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        print(f"{stage}: {done}/{total}, about {left:.0f} s left   ", end=end, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.rehearse", description=__doc__)
    p.add_argument("--case", action="append", metavar="NAME", help="a case, suite or pattern; may be repeated")
    p.add_argument("--arch", action="append", type=int, choices=ARCHS, help="an architecture; may be repeated")
    p.add_argument("--dtype", action="append", choices=tuple(NUMERICS), help="may be repeated")
    p.add_argument("--batch", action="append", type=int, help="only this batch size; may be repeated")
    p.add_argument("--quick", action="store_true", help="float16 on sm_80 and sm_90")
    p.add_argument("--jobs", type=int, default=2, help="worker processes (%(default)s; 0: none)")
    p.add_argument("--output", type=Path, default=None, help="folder (default benchmarks/results/rehearsal)")
    a = p.parse_args(argv)
    try:
        which = cases.find(a.case)
    except ValueError as error:
        p.error(str(error))
    from .report import summary, write

    archs = tuple(a.arch or (QUICK["archs"] if a.quick else ARCHS))
    numerics = tuple(a.dtype or (QUICK["numerics"] if a.quick else CALLED))
    result = rehearse(which, archs, numerics, a.batch, Inspections(a.jobs), _Line())
    if not result.rows:
        p.error("no case has such a batch size")
    print(summary(result))
    part = bool(a.case or a.arch or a.dtype or a.batch or a.quick)
    output = a.output or (None if part else Path(__file__).resolve().parents[1] / "results" / "rehearsal")
    if output is None:
        print("(a part of the rehearsal: written only with --output)")
    else:
        print(f"wrote {', '.join(str(path) for path in write(result, output))}")
    return 1 if result.failing else 0


if __name__ == "__main__":
    sys.exit(main())
