"""A pytest plugin for the stage of the kernel tests: bounded in time, resumed after a crash, its results in JSON.

``-p benchmarks.gpu.plugin --gpu-output DIR --gpu-seconds S [--gpu-part I/N] [--gpu-limit N]``. Tests of different
files take turns, slow ones at the end, so that whatever time there is covers something of everything.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from .rows import RESTART, Rows, device_problem

KEY = pytest.StashKey["Recorder"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--gpu-output", type=Path, help="folder of the run (holds run.json)")
    group.addoption("--gpu-seconds", type=float, default=120.0, help="begin no test after them")
    group.addoption("--gpu-part", default="0/1", help="I/N: every N-th test from I on")
    group.addoption("--gpu-limit", type=int, help="at most so many tests, spread over all of them")
    group.addoption("--gpu-stubbed", action="store_true", help="say that there is no GPU")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--gpu-output")
    if folder is None:
        return
    part, parts = (int(n) for n in config.getoption("--gpu-part").split("/"))
    run = json.loads((folder / "run.json").read_text())
    rows = Rows(folder, "tests", run, part, parts, stubbed=config.getoption("--gpu-stubbed"))
    recorder = Recorder(rows, part, parts, config.getoption("--gpu-seconds"), config.getoption("--gpu-limit"))
    config.stash[KEY] = recorder
    config.pluginmanager.register(recorder, "gpu recorder")


def in_turn(items: list[pytest.Item]) -> list[pytest.Item]:
    """Those not marked slow first; files take turns."""
    seen: Counter[tuple[bool, Path]] = Counter()
    ranked = []
    for i, item in enumerate(items):
        place = (item.get_closest_marker("slow") is not None, item.path)
        ranked.append((place[0], seen[place], i))
        seen[place] += 1
    return [items[i] for *_, i in sorted(ranked)]


class Recorder:
    """One row a test: its outcome, seconds, and the first line of what went wrong."""

    def __init__(self, rows: Rows, part: int, parts: int, seconds: float, limit: int | None) -> None:
        self.rows, self.part, self.parts, self.limit = rows, part, parts, limit
        self.deadline = time.monotonic() + seconds
        self.outcome: dict[str, Any] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = in_turn(items)
        if self.limit is not None:
            chosen = chosen[:: max(1, len(chosen) // self.limit)][: self.limit]
        chosen = chosen[self.part :: self.parts]
        todo = []
        for item in chosen:
            reason = self.rows.crash(item.nodeid)
            if item.nodeid in self.rows:
                continue
            if reason is not None:
                self.rows.add({"key": item.nodeid, "outcome": "crashed", "note": reason, "seconds": 0, "failures": 1})
            else:
                todo.append(item)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(todo)])
        items[:] = todo

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if time.monotonic() > self.deadline:
            item.session.shouldstop = "out of time"
            return True  # nobody runs it
        self.rows.mark(item.nodeid)
        self.outcome = {"key": item.nodeid, "outcome": "passed", "seconds": 0.0}
        return None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self.rows:
            note = report.longreprtext.strip().splitlines()[-1].removeprefix("E").strip()[:300]
            missing = re.search(r"No module named '(\w+)", note)
            ours = missing is None or missing[1] in ("cnnfast", "benchmarks", "tests")
            row = {"key": report.nodeid, "outcome": "not collected", "note": note}
            self.rows.add(row | ({"failures": 1} if ours else {}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.outcome["seconds"] = round(self.outcome["seconds"] + report.duration, 2)
        if report.failed:
            line = getattr(getattr(report.longrepr, "reprcrash", None), "message", "") or report.longreprtext
            self.outcome |= {"outcome": "failed", "note": line.strip().splitlines()[0][:300], "failures": 1}
        elif report.skipped:
            self.outcome["outcome"] = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        lost = device_problem()
        if lost is not None:
            self.rows.mark(nodeid, reason=self.outcome.get("note", lost))
            os._exit(RESTART)  # fixtures of the session could not be torn down any more
        self.rows.add(self.outcome)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
            return
        left = [item.nodeid for item in session.items if item.nodeid not in self.rows]
        if exitstatus == pytest.ExitCode.INTERRUPTED and session.shouldstop != "out of time":
            return
        self.rows.end(left)
        # "Interrupted" for lack of time and "nothing left to run" are no failures.
        session.exitstatus = 1 if any(row.get("failures") for row in self.rows.data["rows"]) else 0
