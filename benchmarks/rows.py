"""One row of the comparison as values: the implementations' entries, and what follows from their times."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from cnnfast.timing import Timing

from .limits import Bound, Ceilings, bound
from .peers import EAGER
from .timers import Ratio, paired

__all__ = ["FROZEN", "OTHERS", "OURS", "RUNTIMES", "UNSTEADY", "Entry", "Row", "show"]

# Ours, and the eager implementations that each must not be slower than: those a user of its memory format would have.
OURS: dict[str, tuple[str, ...]] = {
    "cnnfast": EAGER,
    "cnnfast frozen": EAGER,
    "cnnfast NCHW": EAGER[:1],
    "cnnfast torch.compile": EAGER,
}
# What ours are set against: a label, and the implementations of which the fastest counts.
OTHERS: dict[str, tuple[str, ...]] = {
    "best eager": EAGER,
    "best torch.compile": ("torch.compile", "torch.compile channels_last", "torch.compile max-autotune"),
    "onnxruntime": ("onnxruntime",),
    "OpenVINO": ("OpenVINO",),
}
# Those that take weights for constant: compared with ours where they are.
RUNTIMES = ("onnxruntime", "OpenVINO")
FROZEN = "cnnfast frozen"
UNSTEADY = 0.25  # quartiles apart by this part of the median: other work ran


@dataclass(frozen=True)
class Entry:
    """One implementation in one row. ``status``: "timed", "checked" (and not timed), "not available", "wrong result",
    "failed"; only the first has a ``timing``. ``note`` is the reason of the others, ``path`` what ran, ``error``
    relative to float64; ``held`` and ``peak`` are of `memory`, in bytes."""

    name: str
    status: str
    note: str = ""
    path: str = ""
    error: float | None = None
    timing: Timing | None = None
    held: int | None = None
    peak: int | None = None


@dataclass(frozen=True)
class Row:
    """One workload. ``mm``: the time of the yardstick, a product of ``mm_size`` squared matrices, measured among the
    others; None where nothing was timed. ``tolerance`` is of the entries' ``error``; ``bandwidth`` is a copy's bytes
    per second, of the same run."""

    case: str
    suite: str
    title: str
    dtype: str
    batch: int
    macs: int
    tolerance: float
    entries: tuple[Entry, ...]
    mm_size: int = 0
    mm: Timing | None = None
    least_bytes: int = 0
    bandwidth: float | None = None

    @property
    def name(self) -> str:
        return f"{self.case}, {self.dtype}, batch {self.batch}"

    def entry(self, name: str) -> Entry | None:
        return next((e for e in self.entries if e.name == name), None)

    def tflops(self, entry: Entry) -> float | None:
        return None if entry.timing is None else 2 * self.macs / entry.timing.median / 1e12

    @property
    def mm_tflops(self) -> float | None:
        return None if self.mm is None else 2 * self.mm_size**3 / self.mm.median / 1e12

    def fraction(self, entry: Entry) -> float | None:
        """TFLOP/s over those of `torch.mm`."""
        rate, mm = self.tflops(entry), self.mm_tflops
        return None if rate is None or mm is None else rate / mm

    @property
    def limit(self) -> Bound | None:
        """The least time; None where a ceiling was not measured."""
        if self.mm_tflops is None or self.bandwidth is None:
            return None
        return bound(self.macs, self.least_bytes, Ceilings(1e12 * self.mm_tflops, self.bandwidth))

    def of_limit(self, entry: Entry) -> float | None:
        """The least time over this implementation's."""
        limit = self.limit
        return None if limit is None or entry.timing is None else limit.seconds / entry.timing.median

    def best(self, names: tuple[str, ...]) -> Entry | None:
        """The timed one of these implementations with the least median."""
        timed = [e for e in self.entries if e.name in names and e.timing is not None]
        return min(timed, key=lambda e: e.timing.median, default=None)  # type: ignore[union-attr]

    def speedup(self, entry: Entry, over: tuple[str, ...] = EAGER) -> Ratio | None:
        """How many times faster ``entry`` is than the best of ``over``, turn by turn."""
        best = self.best(over)
        if best is None or best.timing is None or entry.timing is None:
            return None
        return paired(best.timing, entry.timing)

    @property
    def spread(self) -> float:
        timings = [e.timing for e in self.entries if e.timing is not None]
        return max(((t.high - t.low) / t.median for t in timings), default=0.0)


def show(row: Row) -> int:
    """The row, for a reader at a terminal. Returns how many of cnnfast's implementations have no time."""
    bad = 0
    for e in row.entries:
        if e.timing is None:
            print(f"  {e.name:<28}{e.status}: {e.note}")
            bad += e.name.startswith("cnnfast") and e.status != "not available"
        else:
            of_limit, ratio = row.of_limit(e), row.speedup(e)
            part = "" if of_limit is None else f"{of_limit:5.2f} of the limit"
            peak = "" if e.peak is None else f"{e.peak / 1e6:7.1f} MB"
            over = "" if ratio is None else str(ratio)
            print(f"  {e.name:<28}{e.timing!s:<28}{part:<20}{peak:<12}{over:<22}{e.path}")
    sys.stdout.flush()
    return bad
