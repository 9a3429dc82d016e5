"""The timing helper: candidates take turns, and the statistics are what they say."""

from __future__ import annotations

import time

import pytest

from cnnfast.timing import Timing, measure


def test_statistics() -> None:
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0), calls=1)
    assert (timing.low, timing.median, timing.high) == (2.0, 3.0, 4.0)
    assert str(Timing((0.0012,), calls=1)) == "1.20 ms [1.20, 1.20]"


def test_candidates_take_turns_in_a_rotating_order() -> None:
    log: list[str] = []
    times = measure({"a": lambda: log.append("a"), "b": lambda: log.append("b")}, repeats=2, block_seconds=0.0)
    assert log == ["a"] * 3 + ["b"] * 3 + ["a", "b"] + ["b", "a"]
    assert all(len(t.seconds) == 2 and t.calls == 1 for t in times.values())


def test_a_block_is_filled_with_calls_and_time_is_per_call() -> None:
    times = measure(
        {"fast": lambda: time.sleep(0.002), "slow": lambda: time.sleep(0.03)}, repeats=3, block_seconds=0.02
    )
    assert times["slow"].calls == 1 and 2 <= times["fast"].calls <= 10
    assert times["slow"].median >= 0.03 and 0.002 <= times["fast"].median < 0.03


def test_every_repeat_is_reported() -> None:
    seen: list[int] = []
    measure({"a": lambda: None}, repeats=4, block_seconds=0.0, on_repeat=lambda: seen.append(1))
    assert len(seen) == 4


def test_errors_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        measure({"a": lambda: 1 / 0})
    with pytest.raises(ValueError, match="repeats=0"):
        measure({}, repeats=0)
