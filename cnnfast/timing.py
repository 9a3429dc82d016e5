"""Times of functions that are compared with each other: measured in turn, reported as medians with their spread.

Machines drift (clock rates, neighbours, caches), so candidates are never timed one after the other: every repeat times
a short block of calls of each of them, in an order that is shuffled anew (with a fixed seed: rotating it would leave
each candidate behind the same neighbour, whose threads may still be spinning), and the medians over the repeats are
compared. Each block follows a call of the same candidate that is not counted: times are of warm caches. (Not where a
call takes `LONG`: it has left no cache as it was by the time that it ends.)
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["LONG", "Timing", "measure"]

LONG = 0.2  # seconds


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one value per repeat (each the mean of a block of ``calls`` calls)."""

    seconds: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """The lower quartile (nearest rank)."""
        return self._rank(0.25)

    @property
    def high(self) -> float:
        """The upper quartile (nearest rank)."""
        return self._rank(0.75)

    def _rank(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[max(0, math.ceil(q * len(ordered)) - 1)]

    def __str__(self) -> str:
        return f"{1e3 * self.median:.2f} ms [{1e3 * self.low:.2f}, {1e3 * self.high:.2f}]"


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    block_seconds: float = 0.02,
    device: torch.device | str = "cpu",
    on_repeat: Callable[[], object] | None = None,
    once: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Time each candidate ``repeats`` times, interleaved. The keys of the result are those of ``candidates``.

    A block holds about as many calls as fit into ``block_seconds``, at least one and at most 1000. On a CUDA
    ``device`` blocks are timed by events on the current stream, otherwise by the wall clock. ``on_repeat`` is called
    after every repeat (a progress bar). ``once``: seconds of a call of each where they are known; otherwise each is
    called three times first. What a candidate raises is raised.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    clock = _cuda_block if torch.device(device).type == "cuda" else _wall_block
    if once is None:
        once = {}
        for name, call in candidates.items():
            clock(call, 1)  # packs weights, picks algorithms, compiles
            once[name] = min(clock(call, 1), clock(call, 1))
    calls = {name: max(1, min(1000, round(block_seconds / max(once[name], 1e-7)))) for name in candidates}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names, rng = list(candidates), random.Random(0)
    for _ in range(repeats):
        rng.shuffle(names)
        for name in names:
            # One call more, not counted: caches and thread pools still belong to the one before.
            if once[name] < LONG:
                candidates[name]()
            seconds[name].append(clock(candidates[name], calls[name]) / calls[name])
        if on_repeat is not None:
            on_repeat()
    return {name: Timing(tuple(values), calls[name]) for name, values in seconds.items()}


def _wall_block(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return time.perf_counter() - start


def _cuda_block(call: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
