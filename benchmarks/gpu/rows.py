"""The rows of one stage of the GPU run: kept on disk after each, resumed after a crash, bounded in time.

``STAGE.json`` holds what is finished, ``STAGE.at.json`` what is under way: a process that dies or hangs is known by it
(`blame`), and the next process neither repeats the finished rows nor enters the step that brought the last one down.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from cnnfast.files import write_atomically

from ..workload import NotAvailable

__all__ = [
    "RESTART",
    "Failed",
    "Item",
    "Rows",
    "Steps",
    "blame",
    "collect",
    "device_problem",
    "part_name",
    "read",
    "work_through",
]

SCHEMA = 2
RESTART = 75  # exit status of a process whose CUDA context is lost: nothing it launches can succeed any more
T = TypeVar("T")


class Failed(Exception):
    """A step failed; the message is one line for its row."""


def one_line(error: BaseException, limit: int = 300) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:limit]}"


def device_problem() -> str | None:
    """Why the CUDA context is of no use any more; None while it is (and on a machine without CUDA).

    An illegal address or a failed device assertion is reported by whatever waits next, and again for ever.
    """
    if not torch.cuda.is_available():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # torch.AcceleratorError is one
        return one_line(error)
    return None


def part_name(stage: str, part: int, parts: int) -> str:
    return stage if parts == 1 else f"{stage}-{part}"


def read(path: Path) -> dict[str, Any] | None:
    """A stage's file, or None where there is none of this schema."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and data.get("schema") == SCHEMA else None


class Rows:
    """``NAME.json`` in ``folder``. ``run`` identifies code and machine: a file of another run is begun anew.

    Each row is a dictionary with a unique "key". ``facts`` are further entries of the file (versions, ceilings). One of
    several ``parts`` of a stage has a file of its own until `collect`, and knows what the stage's file holds.
    """

    def __init__(
        self, folder: Path, stage: str, run: Mapping[str, Any], part: int = 0, parts: int = 1, **facts: Any
    ) -> None:
        name = part_name(stage, part, parts)
        self.path, self.marker = folder / f"{name}.json", folder / f"{name}.at.json"
        empty = {"schema": SCHEMA, "stage": stage, "run": dict(run), "crashes": [], "rows": []}
        known = [found for found in (read(self.path), read(folder / f"{stage}.json")) if found is not None]
        known = [found for found in known if found["run"] == dict(run)]
        self._keys = {row["key"] for found in known for row in found["rows"]}
        self._crashes = [c for found in known for c in found["crashes"]]
        own = known[0] if known and known[0] == read(self.path) else empty
        self.data: dict[str, Any] = own | facts | {"ended": False, "left_out": []}
        self.write()

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def write(self) -> None:
        write_atomically(self.path, json.dumps(self.data, indent=1) + "\n")

    def mark(self, key: str, step: str = "", reason: str = "") -> None:
        """Say on disk what is about to run."""
        write_atomically(self.marker, json.dumps({"key": key, "step": step, "reason": reason}) + "\n")

    def crash(self, key: str, step: str = "") -> str | None:
        """How an earlier process ended in this step; None where none did."""
        return next((c["reason"] for c in self._crashes if (c["key"], c["step"]) == (key, step)), None)

    def add(self, row: Mapping[str, Any]) -> None:
        self.data["rows"].append(dict(row))
        self._keys.add(row["key"])
        self.write()

    def clear(self) -> None:
        """Begin anew: rows of figures that have changed."""
        self.data["rows"], self._keys = [], set()

    def end(self, left_out: Iterable[str] = ()) -> None:
        """The stage came to its end by itself, without the rows ``left_out``."""
        self.data |= {"ended": True, "left_out": list(left_out)}
        self.write()
        self.marker.unlink(missing_ok=True)


def blame(folder: Path, name: str, reason: str) -> str | None:
    """After the process of a stage died or was stopped: record the step it was in. Returns a line about it, or None
    where it was in none."""
    path, marker = folder / f"{name}.json", folder / f"{name}.at.json"
    data = read(path)
    try:
        at = json.loads(marker.read_text())
    except (OSError, ValueError):
        return None
    marker.unlink()
    if data is None:
        return None
    entry = {"key": at["key"], "step": at["step"], "reason": at["reason"] or reason}
    if entry in data["crashes"]:  # it would come back for ever
        return None
    data["crashes"].append(entry)
    write_atomically(path, json.dumps(data, indent=1) + "\n")
    return f"{at['key']}{', ' if at['step'] else ''}{at['step']}: {entry['reason']}"


def collect(folder: Path, stage: str) -> dict[str, Any] | None:
    """The stage's file, with the files of its parts merged into it (and removed); None where there is none."""
    paths = sorted(p for p in folder.glob(f"{stage}-*.json") if p.stem.removeprefix(f"{stage}-").isdecimal())
    found = [data for p in paths if (data := read(p)) is not None]
    whole = read(folder / f"{stage}.json")
    if whole is None or any(data["run"] != whole["run"] for data in found):
        whole = None
    if not found:
        return whole
    merged = dict(found[0]) | {"rows": [], "crashes": [], "left_out": [], "ended": all(d["ended"] for d in found)}
    for data in ([whole] if whole is not None else []) + found:
        for entry in ("rows", "crashes"):
            merged[entry] = merged[entry] + data[entry]
    counts = [data.get("binaries", {}) for data in found]
    merged["binaries"] = {name: sum(c.get(name, 0) for c in counts) for name in ("hits", "misses")}
    merged["left_out"] = [key for data in found for key in data["left_out"]]
    write_atomically(folder / f"{stage}.json", json.dumps(merged, indent=1) + "\n")
    for p in paths:
        p.unlink()
    return merged


# --- the work ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One row to make. ``seconds``: what it is expected to take; it is left out where less is left."""

    key: str
    work: Callable[[Steps], Mapping[str, Any]]
    seconds: float = 3.0


@dataclass(frozen=True)
class Steps:
    """Runs the steps of one row, each known on disk before it starts."""

    rows: Rows
    key: str
    problem: Callable[[], str | None] = field(default=device_problem)

    def attempt(self, step: str, call: Callable[[], T]) -> T:
        """The result of ``call``, the device's work included.

        Raises Failed with the reason (also where an earlier process died in this step), and NotAvailable as it comes.
        Ends the process with RESTART where the CUDA context is lost.
        """
        reason = self.rows.crash(self.key, step)
        if reason is not None:
            raise Failed(reason)
        self.rows.mark(self.key, step)
        cause: Exception | None
        try:
            result = call()
        except NotAvailable:
            raise
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise NotAvailable("the GPU has too little memory") from error
        except Exception as error:  # a failing kernel is a result; the other rows follow
            print(f"{self.key}: {step} failed", file=sys.stderr)
            traceback.print_exc()
            cause, reason = error, one_line(error)
        else:
            reason = self.problem()  # waits: a fault of this step is not to be another's
            if reason is None:
                return result
            cause = None
        if self.problem() is not None:
            self.rows.mark(self.key, step, reason)
            print(f"{self.key}: {step}: the CUDA context is lost: {reason}", flush=True)
            raise SystemExit(RESTART) from cause
        raise Failed(reason) from cause


def work_through(rows: Rows, items: Iterable[Item], seconds: float, show: Callable[[Mapping[str, Any]], str]) -> int:
    """Make the rows that are missing, for about ``seconds``; what does not fit is named in the file. Returns how many
    rows of the stage say that something of cnnfast failed (``row["failures"]``)."""
    start, left_out = time.monotonic(), []
    for item in items:
        if item.key in rows:
            continue
        if time.monotonic() - start + item.seconds > seconds:
            left_out.append(item.key)
            continue
        print(show(_row(rows, item)), flush=True)
    rows.end(left_out)
    bad = sum(row.get("failures", 0) for row in rows.data["rows"])
    print(f"{len(rows.data['rows'])} rows, {len(left_out)} left out for lack of time, {bad} failures of cnnfast")
    return bad


def _row(rows: Rows, item: Item) -> Mapping[str, Any]:
    reason = rows.crash(item.key)
    if reason is None:
        rows.mark(item.key)
        try:
            row = item.work(Steps(rows, item.key))
        except Exception as error:  # outside the steps: memory for the input, say; the other rows follow
            traceback.print_exc()
            reason = str(error) if isinstance(error, Failed) else one_line(error)
            if device_problem() is not None:
                rows.mark(item.key, "", reason)
                raise SystemExit(RESTART) from error
    if reason is not None:
        row = {"status": "failed", "note": reason, "failures": 1}
    row = {"key": item.key, **row}
    rows.add(row)
    return row
