"""Compile and inspect many binaries: each distinct one once, in worker processes, with the results kept on disk.

A result depends on the kernel's source, Triton's version, the architecture, the compile-time arguments and options
(`Job.key`), and on how machine code is read (the text of `inspector.py`). It lies in ``$CNNFAST_CACHE/inspections``, a
small JSON file for each.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from cnnfast.files import cache_dir, make_cache_dir, write_atomically

from . import inspector
from .inspector import Job, Report, compile_job, inspect

__all__ = ["Failed", "Inspections", "folder"]


@dataclass(frozen=True)
class Failed:
    """A binary that could not be compiled. Never kept: what failed may have been the machine."""

    message: str


@cache
def folder() -> Path:
    """Where results of this version of the reader lie."""
    reader = hashlib.sha256(Path(inspector.__file__).read_bytes()).hexdigest()[:12]
    return cache_dir() / "inspections" / reader


def _load(path: Path) -> Report | None:
    try:
        return Report(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):  # not there, unreadable or of another form: inspect again
        return None


def _work(job: Job) -> Report | Failed:
    try:
        return inspect(compile_job(job))
    except Exception as error:  # whatever the compiler raises is a finding about the kernel
        text = " ".join(str(error).split())
        return Failed(f"{type(error).__name__}: {text[:300]}")


@dataclass
class Inspections:
    """``workers`` processes (0: this one). Counts of what the last `of` did."""

    workers: int = 2
    where: Path | None = None
    compiled: int = 0
    cached: int = 0

    def of(self, jobs: Iterable[Job], progress: Callable[[int, int], None] | None = None) -> dict[str, Report | Failed]:
        """The result of every job by its key. ``progress(done, all)`` is called after each that was not cached."""
        where = self.where or folder()
        distinct = {job.key: job for job in jobs}
        found: dict[str, Report | Failed] = {}
        for key in distinct:
            report = _load(where / key[:2] / f"{key}.json")
            if report is not None:
                found[key] = report
        missing = [job for key, job in distinct.items() if key not in found]
        self.cached, self.compiled = len(found), len(missing)
        for done, (job, result) in enumerate(self._run(missing), 1):
            found[job.key] = result
            if isinstance(result, Report):
                _keep(where / job.key[:2] / f"{job.key}.json", result)
            if progress is not None:
                progress(done, len(missing))
        return found

    def _run(self, jobs: list[Job]) -> Iterable[tuple[Job, Report | Failed]]:
        if self.workers == 0 or len(jobs) < 2:
            for job in jobs:
                yield job, _work(job)
            return
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
            waiting = {pool.submit(_work, job): job for job in jobs}
            for done in as_completed(waiting):
                yield waiting[done], done.result()


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"


def _keep(path: Path, report: Report) -> None:
    try:
        make_cache_dir()
        write_atomically(path, json.dumps(asdict(report)))
    except OSError:  # a read-only or full disk costs time at the next run, nothing else
        return
