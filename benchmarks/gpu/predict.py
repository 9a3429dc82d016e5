"""Prediction against measurement: how good the heuristic's plans, the model's order and the limits are.

From the files of the stages `tune`, `table`, `tuned` and `probes`; nothing runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .report import fraction, mean, own
from .rows import Item, read

__all__ = ["prediction_items", "rank_correlation"]

HEURISTIC = "the heuristic's plan over the best one (time)"
ORDER = "rank correlation of modelled and measured time over all plans of a step"
TUNED = "cnnfast's rows: time with the heuristic's plans over time with tuned ones"
LIMIT = "of the limit: least time over measured"
L2 = "the L2 cache's rate over the one that the model assumes"


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's coefficient; equal values share their mean rank. None for fewer than three values, or where one side
    is constant."""

    def ranks(values: Sequence[float]) -> torch.Tensor:
        v = torch.tensor(values, dtype=torch.float64)
        return (v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2.0

    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return None
    return torch.corrcoef(torch.stack((ranks(a), ranks(b))).double())[0, 1].item()


def _by_dtype(found: Iterable[tuple[str, float | None]]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for dtype, value in found:
        if value is not None and math.isfinite(value):
            values.setdefault(dtype, []).append(value)
    return values


def _item(key: str, values: list[float], geometric: bool) -> Item:
    middle = mean(values) if geometric else sum(values) / len(values)
    row = {"count": len(values), "mean": middle, "least": min(values), "most": max(values)}
    return Item(key, lambda steps: row, 0.0)


def _files(folder: Path, stage: str) -> list[Mapping[str, Any]]:
    data = read(folder / f"{stage}.json")
    return [] if data is None else [row for row in data["rows"] if "dtype" in row]


def prediction_items(folder: Path) -> Iterator[Item]:
    """A row for each figure and dtype: how many, mean, least, most. Ratios have geometric means. Of stubbed times, too:
    the file says so."""
    steps = [(row["dtype"], step) for row in _files(folder, "tune") for step in row.get("steps", ())]
    for dtype, values in _by_dtype((d, _over_best(s)) for d, s in steps).items():
        yield _item(f"{HEURISTIC}, {dtype}", values, True)
    for dtype, values in _by_dtype((d, _order(s)) for d, s in steps).items():
        yield _item(f"{ORDER}, {dtype}", values, False)
    table = {row["key"]: row for row in _files(folder, "table")}
    tuned = {row["key"]: row for row in _files(folder, "tuned")}
    both = ((row["dtype"], _gain(table[key], row)) for key, row in tuned.items() if key in table)
    for dtype, values in _by_dtype(both).items():
        yield _item(f"{TUNED}, {dtype}", values, True)
    for name, rows in (("table", table), ("tuned", tuned)):
        for dtype, values in _by_dtype((r["dtype"], fraction(r, stubbed=True)) for r in rows.values()).items():
            yield _item(f"{LIMIT}, {name}, {dtype}", values, True)
    probes = read(folder / "probes.json")
    rates = [r["per_clock"] / r["assumed"] for r in (probes or {"rows": ()})["rows"] if "per_clock" in r]
    if rates:
        yield _item(L2, rates, True)


def _over_best(step: Mapping[str, Any]) -> float | None:
    us, best = step.get("heuristic_us"), step.get("best_us")
    return None if us is None or best is None else us / best


def _order(step: Mapping[str, Any]) -> float | None:
    known = [p for p in step.get("plans", ()) if p["clocks"] is not None]
    return rank_correlation([p["clocks"] for p in known], [p["us"] for p in known])


def _gain(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    a, b = own(before, stubbed=True), own(after, stubbed=True)
    return None if a is None or b is None else a / b
