"""One row of the comparison: prepare every implementation, check it, time in turn those that are right."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from cnnfast.timing import Timing, measure

from .peers import Implementation, NotAvailable, Prepared, Workload, check
from .report import Entry, Row

__all__ = ["Timer", "Yardstick", "compare", "wall_clock", "yardstick"]

# Times every call of a mapping, in turn.
Timer = Callable[[Mapping[str, Callable[[], object]]], dict[str, Timing]]

MM = "torch.mm"
SLOW = 0.2  # seconds of a product after which no larger one is tried


def _once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Yardstick:
    """The product that this machine does fastest, timed among the implementations of every row."""

    size: int
    call: Callable[[], object]


def yardstick(dtype: torch.dtype, device: str, timer: Timer, sizes: tuple[int, ...] = (512, 1024, 2048)) -> Yardstick:
    """`torch.mm` of square matrices of the size that reaches the highest rate."""

    def product(size: int) -> Callable[[], object]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return lambda: torch.mm(a, b)

    calls: dict[int, Callable[[], object]] = {}
    for size in sizes:
        calls[size] = product(size)
        calls[size]()
        if device == "cpu" and _once(calls[size]) > SLOW:  # bfloat16 without instructions for it: minutes otherwise
            break
    timings = timer({str(size): call for size, call in calls.items()})
    best = max(calls, key=lambda size: size**3 / timings[str(size)].median)
    return Yardstick(best, calls[best])


def wall_clock(seconds: float, block_seconds: float = 0.02, repeats: tuple[int, int] = (5, 20)) -> Timer:
    """A timer on the CPU that takes about ``seconds``, within the least and most ``repeats``, for calls that were made
    before. A call that takes a quarter of ``seconds`` or more is timed once, ahead of the others."""

    def timer(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        once = {name: _once(call) for name, call in calls.items()}
        found = {name: Timing((took,), 1) for name, took in once.items() if took >= seconds / 4}
        rest = {name: call for name, call in calls.items() if name not in found}
        turn = sum(max(block_seconds, once[name]) for name in rest)
        if rest:
            turns = max(repeats[0], min(repeats[1], round(seconds / turn)))
            found |= measure(rest, repeats=turns, block_seconds=block_seconds)
        return found

    return timer


def compare(
    workload: Workload, implementations: tuple[Implementation, ...], timer: Timer | None, mm: Yardstick | None
) -> Row:
    """The row of ``workload``. What does not pass the check is not timed; ``timer`` None: nothing is.

    An implementation that raises is an entry with status "failed"; its traceback goes to standard error.
    """
    workload = replace(workload)  # its tensors are cached in it: the caller's, which it keeps, stays without
    entries: dict[str, Entry] = {}
    prepared: dict[str, Prepared] = {}
    for implementation in implementations:
        name = implementation.name
        try:
            ready = implementation.prepare(workload)
            error, wrong = check(ready, workload)
            path = ready.path()
        except NotAvailable as reason:
            entries[name] = Entry(name, "not available", str(reason))
            continue
        except Exception as failure:  # a peer's failure is a result of the comparison
            print(f"{workload.name}: {name} failed", file=sys.stderr)
            traceback.print_exc()
            text = str(failure).strip().splitlines() or [""]
            entries[name] = Entry(name, "failed", f"{type(failure).__name__}: {text[0][:200]}")
            continue
        if wrong is not None:
            entries[name] = Entry(name, "wrong result", wrong, path, error)
            continue
        entries[name] = Entry(name, "checked", "not timed", path, error)
        prepared[name] = ready
    row = Row(
        workload.case.name, workload.case.suite, workload.case.title, workload.dtype_name, workload.batch,
        workload.case.macs(workload.batch), workload.tolerance, (),
    )  # fmt: skip
    if timer is not None and prepared:
        calls: dict[str, Callable[[], object]] = {name: ready.call for name, ready in prepared.items()}
        if mm is not None:
            calls[MM] = mm.call
        with torch.inference_mode():
            timings = timer(calls)
        if mm is not None:
            row = replace(row, mm_size=mm.size, mm=timings[MM])
        for name in prepared:
            entries[name] = replace(entries[name], status="timed", note="", timing=timings[name])
    return replace(row, entries=tuple(entries[i.name] for i in implementations))
