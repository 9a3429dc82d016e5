"""One row of the comparison: prepare every implementation, check it, time in turn those that are right."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import replace

import torch

from . import memory
from .limits import Yardstick
from .rows import Entry, Row
from .timers import Timer
from .workload import Implementation, NotAvailable, Prepared, Workload

__all__ = ["compare"]

MM = "torch.mm"


def compare(
    workload: Workload,
    implementations: tuple[Implementation, ...],
    timer: Timer | None,
    mm: Yardstick | None,
    *,
    bandwidth: float | None = None,
    with_memory: bool = False,
) -> Row:
    """The row of ``workload``. What does not pass the check is not timed; ``timer`` None: nothing is.

    An implementation that raises is an entry with status "failed"; its traceback goes to standard error.
    ``bandwidth`` of a copy in bytes per second; ``with_memory``: also what each holds, and its peak (`memory`).
    """
    workload = replace(workload)  # its tensors are cached in it: the caller's, which it keeps, stays without
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # else each row's modules count as recompilations of one function
    _ = workload.allowed, workload.expected, workload.x  # here: no implementation is charged with their memory
    entries: dict[str, Entry] = {}
    prepared: dict[str, Prepared] = {}
    for implementation in implementations:
        entry, ready = _prepare(workload, implementation, with_memory)
        entries[entry.name] = entry
        if ready is not None:
            prepared[entry.name] = ready
    row = Row(
        workload.case.name, workload.case.suite, workload.case.title, workload.dtype_name, workload.batch,
        workload.macs, workload.tolerance, (), least_bytes=workload.least_bytes, bandwidth=bandwidth,
    )  # fmt: skip
    if timer is not None and prepared:
        calls: dict[str, Callable[[], object]] = {name: ready.call for name, ready in prepared.items()}
        if mm is not None:
            calls[MM] = mm.call
        with torch.inference_mode(not workload.gradients):
            timings = timer(calls)
        if mm is not None:
            row = replace(row, mm_size=mm.size, mm=timings[MM])
        for name in prepared:
            entries[name] = replace(entries[name], status="timed", note="", timing=timings[name])
    return replace(row, entries=tuple(entries[i.name] for i in implementations))


def _prepare(workload: Workload, implementation: Implementation, with_memory: bool) -> tuple[Entry, Prepared | None]:
    """Its entry, not timed yet, and what to time where it is right."""
    name, device = implementation.name, workload.device
    before = memory.held(device) if with_memory else 0
    try:
        ready = implementation.prepare(workload)
        error, wrong = workload.check(ready)
        path = ready.path()
        if wrong is not None:
            return Entry(name, "wrong result", wrong, path, error), None
        held = memory.held(device) - before if with_memory else None
        with torch.inference_mode(not workload.gradients):
            peak = memory.peak(ready.call, device) if with_memory else None
    except NotAvailable as reason:
        return Entry(name, "not available", str(reason)), None
    except Exception as failure:  # a peer's failure is a result of the comparison
        print(f"{workload.name}: {name} failed", file=sys.stderr)
        traceback.print_exc()
        text = str(failure).strip().splitlines() or [""]
        return Entry(name, "failed", f"{type(failure).__name__}: {text[0][:200]}"), None
    return Entry(name, "checked", "not timed", path, error, held=held, peak=peak), ready
