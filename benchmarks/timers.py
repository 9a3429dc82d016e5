"""How long to measure on a CPU, and what a ratio of two measurements is."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cnnfast.timing import LONG, Timing, measure

__all__ = ["RATIOS", "Ratio", "Timer", "once", "paired", "wall_clock"]

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
