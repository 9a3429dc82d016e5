"""The timing helper: candidates take turns, and the statistics are what they say."""

from __future__ import annotations

import pytest

from cnnfast import timing
from cnnfast.timing import Timing, measure


def test_statistics() -> None:
    five = Timing((5.0, 1.0, 2.0, 4.0, 3.0), calls=1)
    assert (five.low, five.median, five.high) == (2.0, 3.0, 4.0)
    assert str(Timing((0.0012,), calls=1)) == "1.20 ms [1.20, 1.20]"


def test_candidates_take_turns_in_a_shuffled_order() -> None:
    log: list[str] = []
    names = ["a", "b", "c"]
    times = measure({n: lambda n=n: log.append(n) for n in names}, repeats=30, block_seconds=0.0)
    assert log[:9] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    rounds = [log[k : k + 6] for k in range(9, len(log), 6)]
    assert len(rounds) == 30 and all(r[0::2] == r[1::2] and sorted(r[0::2]) == names for r in rounds)
    before_a = {r[r.index("a") - 1] for r in rounds if r[0] != "a"}
    assert before_a == {"b", "c"}, "nobody always follows the same neighbour"
    assert all(len(t.seconds) == 30 and t.calls == 1 for t in times.values())


class Clock:
    """A clock that only moves when a candidate spends time: the test does not depend on the machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_a_block_is_filled_with_calls_and_time_is_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock)
    candidates = {
        "fast": lambda: clock.spend(0.002),
        "slow": lambda: clock.spend(0.03),
        "free": lambda: None,
    }
    times = measure(candidates, repeats=3, block_seconds=0.02)
    assert {name: t.calls for name, t in times.items()} == {"fast": 10, "slow": 1, "free": 1000}
    assert times["fast"].seconds == pytest.approx((0.002,) * 3) and times["slow"].seconds == pytest.approx((0.03,) * 3)


def test_a_long_call_needs_no_other_ahead_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(), []
    monkeypatch.setattr(timing.time, "perf_counter", clock)

    def spend(name: str, seconds: float) -> None:
        log.append(name)
        clock.spend(seconds)

    candidates = {"long": lambda: spend("long", 0.3), "short": lambda: spend("short", 0.1)}
    times = measure(candidates, repeats=4, once={"long": 0.3, "short": 0.1})
    assert log.count("long") == 4 and log.count("short") == 8, "known times: no calls ahead of the first turn"
    assert times["long"].seconds == pytest.approx((0.3,) * 4) and times["short"].seconds == pytest.approx((0.1,) * 4)


def test_every_repeat_is_reported() -> None:
    seen: list[int] = []
    measure({"a": lambda: None}, repeats=4, block_seconds=0.0, on_repeat=lambda: seen.append(1))
    assert len(seen) == 4


def test_errors_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        measure({"a": lambda: 1 / 0})
    with pytest.raises(ValueError, match="repeats=0"):
        measure({}, repeats=0)
