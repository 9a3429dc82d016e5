"""``python -m benchmarks.agree A.json B.json``: whether two runs' ratios agree within their stated spread.

A ratio (ours over another's time in one row) agrees where the two runs' intervals, from the 10th to the 90th percentile
of the paired ratios, overlap. A ratio without a spread in either run (a call timed once) is listed and not judged.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import OURS
from .timers import Ratio

__all__ = ["Pair", "pairs"]


@dataclass(frozen=True)
class Pair:
    """One ratio in both runs."""

    name: str
    a: Ratio
    b: Ratio

    @property
    def judged(self) -> bool:
        return self.a.turns > 0 and self.b.turns > 0

    @property
    def agree(self) -> bool:
        return self.a.low <= self.b.high and self.b.low <= self.a.high

    @property
    def apart(self) -> float:
        """The medians' distance as a part of the smaller one."""
        return max(self.a.median, self.b.median) / min(self.a.median, self.b.median) - 1


def _ratios(results: dict[str, Any]) -> Iterator[tuple[str, Ratio]]:
    for row in results["rows"]:
        for entry in row["entries"]:
            if entry["name"] not in OURS:
                continue
            for label, ratio in entry["speedup_over"].items():
                yield (
                    f"{row['case']}, {row['dtype']}, batch {row['batch']}: {entry['name']} over {label}",
                    Ratio(**ratio),
                )


def pairs(a: dict[str, Any], b: dict[str, Any]) -> list[Pair]:
    """The ratios that both results have. ValueError for an old format, or where they have none in common."""
    for results in (a, b):
        if results.get("schema") != 2:
            raise ValueError(
                f"results of schema {results.get('schema')} have no spread of ratios: run the benchmarks again"
            )
    second = dict(_ratios(b))
    found = [Pair(name, ratio, second[name]) for name, ratio in _ratios(a) if name in second]
    if not found:
        raise ValueError("the two results have no ratio in common")
    return found


def _table(found: list[Pair]) -> Iterator[str]:
    judged = [p for p in found if p.judged]
    bad = [p for p in judged if not p.agree]
    yield f"{len(judged) - len(bad)} of {len(judged)} ratios agree within the stated spread"
    if judged:
        apart = sorted(p.apart for p in judged)
        middle, far = apart[len(apart) // 2], apart[int(0.9 * (len(apart) - 1))]
        yield f"medians apart: {middle:.1%} in the middle, {far:.1%} at the 90th percentile, {apart[-1]:.1%} at most"
    for title, some in (("do not agree", bad), ("timed once, not judged", [p for p in found if not p.judged])):
        if some:
            yield ""
            yield f"| {title} | first | second | medians apart |"
            yield "|---|---:|---:|---:|"
            yield from (f"| {p.name} | {p.a} | {p.b} | {p.apart:.1%} |" for p in some)


def main(argv: list[str] | None = None) -> int:
    """0 where at least ``--share`` of the judged ratios agree, 1 where fewer do, 2 for results without ratios."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.agree", description=__doc__)
    p.add_argument("results", nargs=2, type=Path, metavar="RESULTS.json")
    p.add_argument("--share", type=float, default=1.0, help="of the ratios that must agree (default all: %(default)s)")
    arguments = p.parse_args(argv)
    try:
        found = pairs(*(json.loads(path.read_text()) for path in arguments.results))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(_table(found)))
    judged = [pair for pair in found if pair.judged]
    return 0 if judged and sum(pair.agree for pair in judged) >= arguments.share * len(judged) else 1


if __name__ == "__main__":
    sys.exit(main())
