"""What a comparison found: as values and as JSON; `markdown` and `plots` show it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from cnnfast.cpu import inference
from cnnfast.files import write_atomically
from cnnfast.tasks import env
from cnnfast.timing import Timing

from .peers import EAGER
from .rows import FROZEN, OTHERS, OURS, RUNTIMES, UNSTEADY, Entry, Row

__all__ = ["Entry", "Report", "Row", "environment", "machine_name", "markdown"]


@dataclass(frozen=True)
class Report:
    """A whole run. ``complete`` is False while rows are still to come."""

    environment: Mapping[str, str]
    command: str
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    complete: bool = False
    schema: int = 2

    def to_json(self) -> str:
        """Indented down to the entries, of which each has one line; six digits."""
        top = {key: value for key, value in asdict(self).items() if key != "rows"}
        rows = [_row(row) for row in self.rows]
        return f"{json.dumps(top, indent=1)[:-2]},\n {_dumped('rows', rows)}\n}}\n"

    def write(self, folder: Path, name: str = "bench") -> tuple[Path, Path]:
        """``name.json`` and ``name.md`` in ``folder``, each replaced as a whole."""
        paths = folder / f"{name}.json", folder / f"{name}.md"
        write_atomically(paths[0], self.to_json())
        write_atomically(paths[1], markdown(self))
        return paths


def _row(row: Row) -> str:
    limit = row.limit
    data = {f.name: getattr(row, f.name) for f in fields(row) if f.name not in ("entries", "mm")}
    data |= {"mm_tflops": row.mm_tflops, "mm": _timing(row.mm)}
    data["limit"] = None if limit is None else {"ms": 1e3 * limit.seconds, "by": limit.by}
    entries = [json.dumps(_rounded(_entry(row, e))) for e in row.entries]
    return f"{json.dumps(_rounded(data))[:-1]},\n {_dumped('entries', entries)}}}"


def _dumped(key: str, items: list[str]) -> str:
    return f'"{key}": [\n' + ",\n".join(items) + "]"


def _entry(row: Row, entry: Entry) -> dict[str, Any]:
    """Ratios of ours over every other, of the others over the best eager."""
    labels = OTHERS if entry.name in OURS else [label for label in OTHERS if OTHERS[label] == EAGER]
    ratios = {label: row.speedup(entry, OTHERS[label]) for label in labels}
    data = {f.name: getattr(entry, f.name) for f in fields(entry)} | {"timing": _timing(entry.timing)}
    data |= {"tflops": row.tflops(entry), "fraction_of_mm": row.fraction(entry)}
    data |= {"fraction_of_limit": row.of_limit(entry)}
    return data | {"speedup_over": {label: asdict(r) for label, r in ratios.items() if r is not None}}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


def _timing(t: Timing | None) -> dict[str, Any] | None:
    if t is None:
        return None
    times = {"median": t.median, "low": t.low, "high": t.high}
    return {f"{k}_ms": 1e3 * v for k, v in times.items()} | {"repeats": len(t.seconds), "calls": t.calls}


# --- the machine ------------------------------------------------------------------------------------------------------


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git repository)"
    return f"{commit} and uncommitted changes" if changed else commit


def environment(device: str = "cpu") -> dict[str, str]:
    """Date, hardware, versions and commit, by name. Nothing that identifies the machine or its owner."""
    limits = {
        k: os.environ[k]
        for k in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
        if k in os.environ
    }
    isa = f"{inference.instruction_set().name} (oneDNN), {torch.backends.cpu.get_cpu_capability()} (ATen)"
    if limits:
        isa += ", limited by " + " ".join(f"{k}={v}" for k, v in limits.items())
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{env.cpu_name()}, {os.cpu_count()} CPUs",
        "instruction set": isa,
        "threads": str(torch.get_num_threads()),
        "load at the start": f"{os.getloadavg()[0]:.1f} (1 minute average)" if hasattr(os, "getloadavg") else "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    found |= {name: env.package_version(name) for name in ("triton", "onnxruntime", "openvino")}
    if device == "cuda":
        found |= {"GPU": "; ".join(env.cuda_devices()), "CUDA": str(torch.version.cuda)}
        found["cuDNN"] = str(torch.backends.cudnn.version())
    return found | {"cnnfast": env.__version__, "commit": _commit()}


def machine_name(device: str = "cpu") -> str:
    """The folder of this machine's results: the GPU, or the processor and its instruction set."""
    if device == "cuda":
        text = torch.cuda.get_device_name()
    else:
        text = f"{re.sub(r'@.*', '', env.cpu_name())} {inference.instruction_set().name}"
    text = re.sub(r"\((R|TM)\)|\bCPU\b", " ", text, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def markdown(report: Report) -> str:
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield "# cnnfast against its peers"
    yield ""
    yield f"Written by `{report.command}`. Do not edit."
    yield ""
    for name, value in report.environment.items():
        yield f"- {name}: {value}"
    if not report.complete:
        yield "- **incomplete: the run was interrupted**"
    yield ""
    for note in report.notes:
        yield f"{note}"
        yield ""
    if not report.rows:
        return
    yield "## Times cnnfast is faster"
    yield ""
    yield (
        "Median [10th, 90th percentile] of the paired ratios; below 1: slower. Best eager: NCHW or channels_last, "
        "whichever is faster in the row."
    )
    yield ""
    yield from _summary(report.rows)
    yield ""
    yield from _remarks(report.rows)
    if any(row.limit for row in report.rows):
        yield ""
        yield "## Against the limit"
        yield ""
        yield (
            "Least time: the larger of the arithmetic left after phase decomposition at the rate of torch.mm, and the "
            "unavoidable bytes at a copy's bandwidth. Each implementation: least time over its own (1: at the limit)."
        )
        yield ""
        yield from _limits(report.rows)
    if any(e.timing for row in report.rows for e in row.entries):
        yield ""
        yield "## Times"
        yield ""
        yield "Milliseconds: median [quartiles]. TFLOP/s and single figures are in the JSON file."
        yield ""
        yield from _by_implementation(report.rows, _milliseconds, titles=True)
    if any(e.peak is not None for row in report.rows for e in row.entries):
        yield ""
        yield "## Memory"
        yield ""
        yield "MB held + peak of a call."
        yield ""
        yield from _by_implementation(report.rows, _megabytes)
    yield ""
    yield "## Checks"
    yield ""
    yield from _checks(report.rows)


def _remarks(rows: tuple[Row, ...]) -> Iterator[str]:
    slower = [
        f"{row.name}: {name} {ratio}"
        for row in rows
        for name, eager in OURS.items()
        if (entry := row.entry(name)) is not None and (ratio := row.speedup(entry, eager)) is not None
        if ratio.median < 1
    ]
    if any(row.mm is not None for row in rows):
        yield f"Slower than eager (the best of both formats; in NCHW, eager NCHW): {'; '.join(slower) or 'nowhere'}."
    once = [f"{row.name}: {e.name}" for row in rows for e in row.entries if e.timing and len(e.timing.seconds) == 1]
    if once:
        yield ""
        yield f"Timed once, for being slow (no spread): {'; '.join(once)}."
    unsteady = [row.name for row in rows if row.spread > UNSTEADY]
    if unsteady:
        yield ""
        yield f"Unsteady (quartiles more than {UNSTEADY:.0%} apart, other work ran): {'; '.join(unsteady)}."


def table(head: Sequence[str], body: Iterable[Sequence[str]], text: Sequence[int] = (0,)) -> Iterator[str]:
    """A Markdown table; ``text``: the columns that are not numbers."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("---" if i in text else "---:" for i in range(len(head))) + "|"
    for line in body:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"


def _ours(rows: tuple[Row, ...]) -> str:
    return next((name for name in OURS if any(row.entry(name) for row in rows)), "cnnfast")


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _summary(rows: tuple[Row, ...]) -> Iterator[str]:
    ours, body = _ours(rows), []
    others = {label: names for label, names in OTHERS.items() if any(row.entry(name) for row in rows for name in names)}
    with_frozen = ours == "cnnfast" and any(row.entry(FROZEN) for row in rows)
    for row in rows:
        entry = row.entry(ours)
        if entry is None:
            continue
        frozen = row.entry(FROZEN) if ours == "cnnfast" else None
        cells = [_median(entry)]
        cells += [_ratio(row, frozen if label in RUNTIMES and frozen else entry, to) for label, to in others.items()]
        if with_frozen:
            cells += [_median(frozen), _ratio(row, frozen, OTHERS["best eager"])]
        body.append([row.name, *cells, _number(row.of_limit(entry)), entry.path])
    if with_frozen:
        head = [f"frozen over {label}" if label in RUNTIMES else f"over {label}" for label in others]
        head += ["frozen, ms", "frozen over best eager"]
    else:
        head = [f"over {label}" for label in others]
    yield from table(["", f"{ours}, ms", *head, "of the limit", "path"], body, (0, len(head) + 3))


def _median(entry: Entry | None) -> str:
    if entry is None:
        return ""
    return entry.status if entry.timing is None else f"{1e3 * entry.timing.median:.3f}"


def _ratio(row: Row, entry: Entry | None, over: tuple[str, ...]) -> str:
    ratio = None if entry is None else row.speedup(entry, over)
    return "" if ratio is None else str(ratio)


def _limits(rows: tuple[Row, ...]) -> Iterator[str]:
    names = list(dict.fromkeys(e.name for row in rows for e in row.entries if e.timing is not None))
    body = []
    for row in rows:
        limit = row.limit
        if limit is None or row.bandwidth is None:
            continue
        entries = [row.entry(name) for name in names]
        cells = ["" if e is None else _number(row.of_limit(e)) for e in entries]
        ceilings = f"{_number(row.mm_tflops)}, {row.bandwidth / 1e9:.1f}"
        least = [f"{2 * row.macs / 1e9:.3f}", f"{row.least_bytes / 1e6:.2f}", ceilings, f"{1e3 * limit.seconds:.3f}"]
        body.append([row.name, *least, limit.by, *cells])
    head = ["", "GFLOP", "least MB", "mm TFLOP/s, copy GB/s", "least ms", "bound", *names]
    yield from table(head, body)


def _by_implementation(rows: tuple[Row, ...], cell: Callable[[Entry], str], titles: bool = False) -> Iterator[str]:
    """A column for each implementation."""
    names = list(dict.fromkeys(e.name for row in rows for e in row.entries if cell(e)))
    body = []
    for row in rows:
        entries = [row.entry(name) for name in names]
        body.append([row.name, *([row.title] if titles else []), *("" if e is None else cell(e) for e in entries)])
    yield from table(["", *([""] if titles else []), *names], body, (0, 1) if titles else (0,))


def _milliseconds(e: Entry) -> str:
    return "" if e.timing is None else str(e.timing).replace(" ms", "")


def _megabytes(e: Entry) -> str:
    return "" if e.peak is None or e.held is None else f"{e.held / 1e6:.1f} + {e.peak / 1e6:.1f}"


def _checks(rows: tuple[Row, ...]) -> Iterator[str]:
    """The worst error of each implementation, and what has no time."""
    yield "Largest error over the largest value of the float64 result, and the error allowed:"
    yield ""
    dtypes = {d: max(row.tolerance for row in rows if row.dtype == d) for d in dict.fromkeys(r.dtype for r in rows)}
    names = list(dict.fromkeys(e.name for row in rows for e in row.entries if e.error is not None))
    body = []
    for name in names:
        worst = []
        for dtype in dtypes:
            entries = [e for row in rows if row.dtype == dtype for e in row.entries if e.name == name]
            errors = [e.error for e in entries if e.error is not None]
            worst.append(f"{max(errors):.1e}" if errors else "")
        body.append([name, *worst])
    yield from table(["", *(f"{dtype} (allowed {t:.1e} at most)" for dtype, t in dtypes.items())], body)
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for e in row.entries:
            if e.timing is None:
                reasons.setdefault((e.name, f"{e.status}: {e.note}"), []).append(row.name)
    if reasons:
        yield ""
        yield "Without a time:"
        yield ""
        for (name, reason), where in reasons.items():
            yield f"- {name}: {reason} ({'; '.join(where) if len(where) <= 4 else f'{len(where)} rows'})"
