"""One row of the GPU run: check every implementation, take its peak memory, time in turn those that are right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from cnnfast.timing import Timing

from .. import memory
from ..limits import Ceilings, bound, copy_bandwidth, yardstick
from ..timers import Calls
from ..workload import Implementation, NotAvailable, Prepared, Workload
from .rows import Failed, Steps

__all__ = ["Measure", "ceilings", "compare", "least_us", "set_tf32", "timing_values"]

Timer = Callable[[Calls], dict[str, Timing]]


@dataclass(frozen=True)
class Measure:
    """What is measured of each implementation. ``timer`` None: nothing is timed. ``stubbed``: there is no GPU; entries
    say so, and no memory is counted."""

    timer: Timer | None
    stubbed: bool = False


def set_tf32(on: bool) -> None:
    # The older switches: torch.compile reads them, and they raise once only the newer ones were set.
    torch.backends.cudnn.allow_tf32 = on
    torch.backends.cuda.matmul.allow_tf32 = on


def timing_values(t: Timing) -> dict[str, Any]:
    """Microseconds."""
    return {"median": 1e6 * t.median, "low": 1e6 * t.low, "high": 1e6 * t.high, "repeats": len(t.seconds)}


def _checked(i: Implementation, w: Workload, measure: Measure) -> tuple[Prepared, dict[str, Any]]:
    ready = i.prepare(w)
    error, wrong = w.check(ready)
    entry: dict[str, Any] = {"error": error, "path": ready.path()}
    if wrong is not None:
        return ready, entry | {"status": "wrong result", "note": wrong}
    if not measure.stubbed:
        with torch.inference_mode(not w.gradients):
            ready.call()
            entry["peak_bytes"] = memory.peak(ready.call, "cuda")
    return ready, entry | {"status": "checked"}


def _reference(w: Workload) -> Any:
    """The expected result, and how far off is allowed; without cuDNN's search, which in float64 takes seconds on most
    GPUs and gains nothing."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        return w.expected, w.tolerance
    finally:
        torch.backends.cudnn.benchmark = before


def compare(
    workload: Workload, implementations: tuple[Implementation, ...], measure: Measure, steps: Steps
) -> dict[str, Any]:
    """The row of ``workload``; what raises or is wrong is an entry that says so, without a time.

    ``row["failures"]`` counts entries of cnnfast that failed or are wrong.
    """
    set_tf32(workload.tf32)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # else each row's modules count as recompilations of one function
    w = replace(workload)  # its tensors are cached in it and go with it
    try:
        steps.attempt("float64", lambda: _reference(w))
    except NotAvailable as reason:
        return {"status": "not available", "note": str(reason)}
    entries: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for i in implementations:
        entries[i.name] = entry = {"name": i.name}
        try:
            ready, found = steps.attempt(i.name, lambda i=i: _checked(i, w, measure))  # type: ignore[misc]
        except NotAvailable as reason:
            entry |= {"status": "not available", "note": str(reason)}
        except Failed as failure:
            entry |= {"status": "failed", "note": str(failure)}
        else:
            entry |= found
            if entry["status"] == "checked":
                calls[i.name] = ready.call
    if measure.timer is not None and calls:
        _time(w, measure, calls, entries, steps)
    bad = sum(e["name"].startswith("cnnfast") and e["status"] in ("failed", "wrong result") for e in entries.values())
    case = workload.case
    return {
        "case": case.name,
        "suite": case.suite,
        "title": case.title,
        "dtype": workload.dtype_name,
        "batch": workload.batch,
        "macs": w.macs,
        "least_bytes": w.least_bytes,
        "tolerance": w.tolerance,
        "entries": list(entries.values()),
        "failures": bad,
    }


def _time(w: Workload, measure: Measure, calls: Calls, entries: dict[str, dict[str, Any]], steps: Steps) -> None:
    assert measure.timer is not None
    timer = measure.timer

    def timed() -> Mapping[str, Timing]:
        with torch.inference_mode(not w.gradients):
            return timer(calls)

    try:
        timings = steps.attempt("timing", timed)
    except Failed as failure:
        for name in calls:
            entries[name] |= {"note": f"not timed: {failure}"}
        return
    for name, t in timings.items():
        entries[name] |= {"status": "timed", "us": timing_values(t)}
        if measure.stubbed:
            entries[name]["stubbed"] = True


# --- ceilings ---------------------------------------------------------------------------------------------------------


def dtype_name(dtype: torch.dtype, tf32: bool) -> str:
    return "tf32" if tf32 else str(dtype).removeprefix("torch.")


def ceilings(numerics: tuple[tuple[torch.dtype, bool], ...], measure: Measure) -> dict[str, Any]:
    """What this GPU reaches: the rate of a product in each of ``numerics`` (dtype, TF32), the bandwidth of a copy."""
    assert measure.timer is not None
    timer, sizes, copied = measure.timer, (2048, 4096, 8192), None
    if measure.stubbed:
        sizes, copied = (64,), 4096
    found: dict[str, Any] = {"flops": {}, "bytes": copy_bandwidth("cuda", timer, copied), "stubbed": measure.stubbed}
    for dtype, tf32 in numerics:
        set_tf32(tf32)
        product = yardstick(dtype, "cuda", timer, sizes)
        seconds = timer({"": product.call})[""].median
        found["flops"][dtype_name(dtype, tf32)] = 2 * product.size**3 / seconds
    return found


def least_us(w: Workload, found: Mapping[str, Any]) -> float:
    """The least time of a workload by these ceilings: the sum of its blocks', each a pass of its own."""
    limit = Ceilings(found["flops"][w.dtype_name], found["bytes"])
    size = w.dtype.itemsize
    return 1e6 * sum(bound(b.macs(w.batch), b.least_bytes(w.batch, size), limit).seconds for b in w.case.blocks())
