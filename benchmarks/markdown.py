"""A report as Markdown, one line a row in every table: ours against the others, limits, times, memory, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .rows import FROZEN, OTHERS, OURS, RUNTIMES, UNSTEADY, Entry, Row

if TYPE_CHECKING:
    from .report import Report

__all__ = ["markdown"]


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


def _table(head: list[str], body: list[list[str]], text: tuple[int, ...] = (0,)) -> Iterator[str]:
    """``text``: the columns that are not numbers."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("---" if i in text else "---:" for i in range(len(head))) + "|"
    for line in body:
        yield "| " + " | ".join(line) + " |"


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
    yield from _table(["", f"{ours}, ms", *head, "of the limit", "path"], body, (0, len(head) + 3))


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
    yield from _table(head, body)


def _by_implementation(rows: tuple[Row, ...], cell: Callable[[Entry], str], titles: bool = False) -> Iterator[str]:
    """A column for each implementation."""
    names = list(dict.fromkeys(e.name for row in rows for e in row.entries if cell(e)))
    body = []
    for row in rows:
        entries = [row.entry(name) for name in names]
        body.append([row.name, *([row.title] if titles else []), *("" if e is None else cell(e) for e in entries)])
    yield from _table(["", *([""] if titles else []), *names], body, (0, 1) if titles else (0,))


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
    yield from _table(["", *(f"{dtype} (allowed {t:.1e} at most)" for dtype, t in dtypes.items())], body)
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
