"""How long to measure on a CPU, and what a ratio of two measurements is."""

from __future__ import annotations

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from cnnfast.timing import LONG, Timing, measure

__all__ = [
    "Calls",
    "RATIOS",
    "Ratio",
    "Timer",
    "captured",
    "cold",
    "host",
    "once",
    "paired",
    "stubbed",
    "wall_clock",
    "warm",
]


# Times every call of a mapping, in turn.
Timer = Callable[[Mapping[str, Callable[[], object]]], dict[str, Timing]]


SLOW = 1.0  # seconds of a call that is not repeated: minutes of a row otherwise


RATIOS = (
    "A ratio is the median over the turns of (the other's time / ours) in the same turn, with the 10th and 90th "
    "percentile of these paired ratios (rounded outwards to a turn; of five turns the least and the greatest) as its "
    "spread."
)


@dataclass(frozen=True)
class Ratio:
    """A ratio of times: median and spread over ``turns`` turns. Of calls that were not timed in the same turns
    (``turns`` 0) it is the ratio of their medians, without a spread (``low`` = ``high`` = ``median``)."""

    median: float
    low: float
    high: float
    turns: int

    def __str__(self) -> str:
        spread = f" [{self.low:.2f}, {self.high:.2f}]" if self.turns else ""
        return f"{self.median:.2f}x{spread}"


def paired(numerator: Timing, denominator: Timing) -> Ratio:
    """How many times longer ``numerator`` took, turn by turn."""
    if min(len(numerator.seconds), len(denominator.seconds)) < 2 or len(numerator.seconds) != len(denominator.seconds):
        value = numerator.median / denominator.median
        return Ratio(value, value, value, 0)
    ratios = sorted(a / b for a, b in zip(numerator.seconds, denominator.seconds, strict=True))
    last = len(ratios) - 1
    low, high = ratios[math.floor(0.1 * last)], ratios[math.ceil(0.9 * last)]
    return Ratio(statistics.median(ratios), low, high, len(ratios))


def once(call: Callable[[], object]) -> float:
    """Seconds of one call by the wall clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def wall_clock(seconds: float, block_seconds: float = 0.02, repeats: tuple[int, int] = (5, 20)) -> Timer:
    """A timer on the CPU that takes about ``seconds``, within the least and most ``repeats``, for calls that were made
    before. A call that takes a second, or a quarter of ``seconds``, is timed once, ahead of the others."""

    def timer(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        took = {name: once(call) for name, call in calls.items()}
        # The first call may have to fetch memory back from the system: where it is cheap, a second one counts.
        took |= {name: min(took[name], once(call)) for name, call in calls.items() if took[name] < LONG / 4}
        found = {name: Timing((s,), 1) for name, s in took.items() if s >= max(SLOW, seconds / 4)}
        rest = {name: call for name, call in calls.items() if name not in found}
        # The block, and the call ahead of it that is not counted.
        turn = sum(max(block_seconds, took[name]) + (took[name] if took[name] < LONG else 0) for name in rest)
        if rest:
            turns = max(repeats[0], min(repeats[1], round(seconds / turn)))
            found |= measure(rest, repeats=turns, block_seconds=block_seconds, once=took)
        return found

    return timer


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
