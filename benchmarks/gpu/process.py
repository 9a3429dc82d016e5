"""Runs the processes of a stage: bounded in time, watched for a step that hangs, started again after a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .rows import RESTART, blame, read

__all__ = ["Ending", "supervise", "supervise_all"]

GRACE = 30.0  # seconds after its time in which a stage may finish the row it is in
RESTARTS = 20
POLL = 0.1
OUT_OF_TIME, INTERRUPTED = "stopped: out of time", "stopped: interrupted"


@dataclass(frozen=True)
class Ending:
    """How the process of a stage ended for good. ``status``: "ok", "failed" or "timed out"; ``crashes``: a line for
    each step that brought one down."""

    status: str
    crashes: tuple[str, ...] = ()


def supervise(
    command: Callable[[float], Sequence[str]],
    folder: Path,
    name: str,
    seconds: float,
    stall: float,
    env: Mapping[str, str],
    cwd: Path,
    grace: float | None = None,
    stop: threading.Event | None = None,
) -> Ending:
    """Run ``command(seconds left)``; its output goes to ``NAME.log``.

    A process that dies, or stays longer than ``stall`` seconds in one step of its rows, is started again without that
    step, as long as there is time; what it finished is kept (`rows.Rows`). ``stop`` ends it at once.
    """
    log, marker, deadline = folder / f"{name}.log", folder / f"{name}.at.json", time.monotonic() + seconds
    marker.unlink(missing_ok=True)
    crashes: list[str] = []
    log.write_text("")
    grace = GRACE if grace is None else grace
    for _ in range(RESTARTS):
        left = deadline - time.monotonic()
        code, stopped = _once(command(max(left, 0)), log, marker, left + grace, stall, env, cwd, stop)
        data = read(folder / f"{name}.json")
        if code in (0, 1) and not stopped and (data is None or data["ended"]):
            return Ending("ok" if code == 0 else "failed", tuple(crashes))
        if stopped in (OUT_OF_TIME, INTERRUPTED):  # no fault of the step it was in
            marker.unlink(missing_ok=True)
            return Ending("timed out" if stopped == OUT_OF_TIME else "failed", tuple(crashes))
        line = blame(folder, name, stopped or _why(code))
        if line is None:  # in no step, or in one that was to be left out: again would be the same
            return Ending("failed", tuple(crashes))
        crashes.append(line)
        if deadline - time.monotonic() < 1:
            break
    return Ending("failed", tuple(crashes))


def _why(code: int) -> str:
    if code == RESTART:
        return "the CUDA context was lost"
    return f"the process died of {signal.Signals(-code).name}" if code < 0 else f"the process ended with status {code}"


def _once(
    command: Sequence[str],
    log: Path,
    marker: Path,
    limit: float,
    stall: float,
    env: Mapping[str, str],
    cwd: Path,
    stop: threading.Event | None,
) -> tuple[int, str]:
    """(exit status, why it was stopped or "")."""
    start, stopped = time.monotonic(), ""
    with log.open("a") as out:
        process = subprocess.Popen(
            command, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and not stopped:
                time.sleep(POLL)
                if stop is not None and stop.is_set():
                    stopped = INTERRUPTED
                elif time.monotonic() - start > limit:
                    stopped = OUT_OF_TIME
                elif _age(marker) > stall:
                    stopped = f"stopped: hung for {stall:.0f} s"
        finally:  # compilers that it started go with it, also at an interrupt
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return process.returncode, stopped


def _age(marker: Path) -> float:
    try:
        return time.time() - marker.stat().st_mtime
    except FileNotFoundError:  # in no step
        return 0.0


def supervise_all(runs: Sequence[Callable[[threading.Event], Ending]]) -> Ending:
    """Side by side, the worst status of all. An interrupt ends them."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(runs)) as pool:
        futures = [pool.submit(run, stop) for run in runs]
        try:
            endings = [f.result() for f in futures]
        except BaseException:
            stop.set()
            raise
    statuses = [e.status for e in endings]
    worst = next(s for s in ("timed out", "failed", "ok") if s in statuses)
    return Ending(worst, tuple(line for e in endings for line in e.crashes))
