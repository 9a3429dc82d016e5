"""Clocks of the GPU run: device time with a cold L2 cache, calls back to back, the host's share; graphs.

In a dry run `stubbed` stands in their place: it calls everything once and gives figures that mean nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from cnnfast.timing import Timing, measure

__all__ = ["Calls", "captured", "cold", "host", "stubbed", "warm"]

T = TypeVar("T")
Calls = Mapping[str, Callable[[], object]]
WARM_UP = 3  # calls ahead of a capture: cuDNN's search, compilation and proofs are not for a graph


def cold(calls: Calls, repeats: int = 5, seconds: float = 5.0) -> dict[str, Timing]:
    """Device time per call, the L2 cache overwritten before each: medians of `triton.testing.do_bench`, in turn.
    ``repeats`` turns; of long calls, two at least and no more after ``seconds``."""
    from triton.testing import do_bench

    start = time.monotonic()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        if turn >= 2 and time.monotonic() - start > seconds:
            break
        for name, call in calls.items():
            found[name].append(do_bench(call, warmup=5, rep=20, return_mode="median") / 1e3)
    return {name: Timing(tuple(values), 1) for name, values in found.items()}


def warm(calls: Calls) -> dict[str, Timing]:
    """Calls back to back on one stream, by events: the host's time counts where it is the longer one."""
    return measure(calls, repeats=10, block_seconds=0.01, device="cuda")


def host(calls: Calls, repeats: int = 20, block: int = 10) -> dict[str, Timing]:
    """Time that the host needs to hand over one call: ``block`` calls onto an idle device, not waited for. (A block is
    short: once the device's queue is full, the host waits for it.)"""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(block):
                call()
            seconds[name].append((time.perf_counter() - start) / block)
    torch.cuda.synchronize()
    return {name: Timing(tuple(values), block) for name, values in seconds.items()}


def stubbed(calls: Calls) -> dict[str, Timing]:
    """No times: every call is made once, and its name says how long it took. For dry runs, whose files say so."""
    found = {}
    for name, call in calls.items():
        call()
        digit = hashlib.sha256(str(name).encode()).digest()[0]
        found[name] = Timing((1e-3 * (1 + digit / 256),), 1)
    return found


def captured(call: Callable[[], T]) -> Callable[[], T]:
    """A replay of ``call`` as a CUDA graph; its result is overwritten by the next one. As `torch.cuda.graph` asks:
    warmed up on a side stream, captured on the same."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = call()
    torch.cuda.synchronize()

    def replay() -> T:
        graph.replay()
        return y

    return replay
