"""A compile cache for a GPU that is elsewhere: ``python -m benchmarks.gpu --compile --arch 90 --cache DIR``.

What the stages launch is recorded as on that architecture (`benchmarks.rehearse`), tuning's plans too, and each
distinct binary compiled into a cache of Triton's, launcher and driver stubs included. The other machine needs the same
Triton for the same Python, and ``--cache DIR``; `counting` tells there how many binaries were found.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from triton import knobs

from cnnfast.files import write_atomically
from cnnfast.gpu import conv, tuning
from cnnfast.gpu.devices import precision_of, target_device, tf32_convolutions
from cnnfast.gpu.observers import observed
from cnnfast.step import Operands, Step

from .. import cases
from ..rehearse.inspector import Job, compile_job, recording
from ..rehearse.launches import CALLED, NUMERICS, Recorder, StepRun
from ..rehearse.training_launches import record
from ..workload import Workload

__all__ = ["Filled", "counting", "fill", "recorded", "settle", "tried", "variables"]

LIBCUDA = "libcuda.so.1"


def variables(folder: Path) -> dict[str, str]:
    """The environment of whoever uses the cache. Only what a launch needs is kept, without line numbers (which are part
    of the cache's key)."""
    return {"TRITON_CACHE_DIR": str(folder), "TRITON_STORE_BINARY_ONLY": "1", "TRITON_DISABLE_LINE_INFO": "1"}


# --- which binaries ---------------------------------------------------------------------------------------------------


def recorded(arch: int, found: Iterable[cases.Case], numerics: Iterable[str] = CALLED) -> Iterator[Job]:
    """The binaries of inference and training of these cases, the most common numerics first; each once."""
    found, known = tuple(found), set()
    for name in numerics:
        for case in found:
            calls = []
            recorder = Recorder(case, name)
            for batch in case.batches:
                calls += [call for run in recorder(batch, arch) if isinstance(run, StepRun) for call in run.calls]
            if case in cases.TRAINING:
                calls += [call for batch in case.batches for call in record(case, batch, name, arch).calls]
            for call in calls:
                if call.job.key not in known:
                    known.add(call.job.key)
                    yield call.job


def tried(arch: int, found: Iterable[Workload], limit: int) -> Iterator[Job]:
    """The binaries that tuning compiles of the steps of these workloads, in their order, ``limit`` plans of each step;
    each once."""
    known: set[str] = set()
    for w in found:
        steps: dict[tuning.Task, tuple[Step, Operands, bool]] = {}

        def see(step: Step, o: Operands, channels_last: bool, steps: Any = steps) -> None:
            steps[tuning.Task.of(step, o, channels_last)] = step, o, channels_last

        with observed(step=see):
            _recorder(w.case, _numerics(w))(w.batch, arch)
        with torch.no_grad(), tf32_convolutions(w.tf32), recording(arch) as calls:
            for step, o, channels_last in steps.values():
                batch, _, *image = o.x.shape
                size = tuple(n + 2 * p for n, p in zip(image, step.pad, strict=True))
                asked = (step, batch, size, precision_of(o.x.dtype), target_device(o.x), channels_last)
                for plan in tuning.tried(*asked)[:limit]:
                    conv.run(step, o, channels_last, plan)
        for call in calls:
            if call.job.key not in known:
                known.add(call.job.key)
                yield call.job


_recorder = cache(Recorder)


def _numerics(w: Workload) -> str:
    """The rehearsal's name for the precision of a workload on a GPU."""
    exact = w.dtype == torch.float32
    return next(n for n, (dtype, tf32) in NUMERICS.items() if dtype == w.dtype and not (exact and tf32 != w.tf32))


# --- compiling --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filled:
    """``left_out``: binaries that time or room did not allow; ``failed``: lines about those that did not compile."""

    compiled: int
    left_out: int
    failed: tuple[str, ...]
    size: int  # bytes of the whole cache


def stub_of_libcuda(folder: Path) -> Path:
    """A library that has the names of CUDA's driver and does nothing, to link launchers with where there is none."""
    from triton.backends.nvidia import driver

    here = Path(driver.__file__).parent
    text = "".join(p.read_text() for p in (here / "driver.py", here / "driver.c"))
    source = "".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(set(re.findall(r"\bcu[A-Z]\w+", text))))
    folder.mkdir(parents=True, exist_ok=True)
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", f"-Wl,-soname,{LIBCUDA}", "-x", "c", "-"]
    subprocess.run([*command, "-o", str(folder / LIBCUDA)], input=source.encode(), check=True)
    return folder


@cache
def _launcher(signature: tuple[tuple[str, str], ...], constants: tuple[Any, ...], names: tuple[str, ...]) -> None:
    """Triton's stub that hands such arguments to the driver; the first builds its own helper, too."""
    from types import SimpleNamespace

    from triton.backends.nvidia import driver

    driver.CudaUtils()
    if not hasattr(driver, "make_launcher"):  # since 3.7 one launcher, of the helper's, is for all
        return
    nothing = ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align")
    metadata = SimpleNamespace(
        **dict.fromkeys(nothing, 0), num_ctas=1, launch_cooperative_grid=False, launch_pdl=False, tensordesc_meta=None
    )
    source = SimpleNamespace(signature=dict(signature), constants=dict(constants), fn=SimpleNamespace(arg_names=names))
    driver.CudaLauncher(source, metadata)


def _compile(job: Job) -> str | None:
    try:
        compile_job(job)
        described = tuple((path, value) for path, value in job.constants.items())
        _launcher(tuple(job.signature.items()), described, tuple(job.argument_names))
    except Exception as error:  # whatever the compiler raises is told, and the others are compiled
        return f"{job.function}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def fill(folder: Path, jobs: Iterable[Job], workers: int, seconds: float, most: int) -> Filled:
    """Compile ``jobs`` in ``workers`` processes until ``seconds`` have passed or the cache has ``most`` bytes."""
    start, waiting, failed, done = time.monotonic(), list(jobs), [], 0
    stub = stub_of_libcuda(folder / "stub")
    given = {**variables(folder), "TRITON_LIBCUDA_PATH": str(stub), "OMP_NUM_THREADS": "1"}
    given["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [str(stub), os.environ.get("LD_LIBRARY_PATH")]))
    with _environment(given), ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while waiting and time.monotonic() - start < seconds and _size(folder) < most:
            some, waiting = waiting[: 4 * workers], waiting[4 * workers :]
            for said in pool.map(_compile, some):
                done += said is None
                failed += [] if said is None else [said]
            for path in folder.glob("*/*.source"):  # three quarters of the size, and no launch reads them
                path.unlink()
            text = f"{done} binaries, {_size(folder) / 2**20:.1f} MiB, {len(waiting)} to go"
            print(text, file=sys.stderr, flush=True)
    shutil.rmtree(stub)
    settle(folder)
    return Filled(done, len(waiting), tuple(failed), _size(folder))


@contextmanager
def _environment(given: Mapping[str, str]) -> Iterator[None]:
    """Of the processes that are started inside the block."""
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def settle(folder: Path) -> None:
    """After the cache was brought here from elsewhere: Triton's lists of files name them by their full paths."""
    for listing in folder.glob("*/__grp__*.json"):
        names = json.loads(listing.read_text())["child_paths"]
        here = {name: str(listing.parent / name) for name in names if (listing.parent / name).exists()}
        write_atomically(listing, json.dumps({"child_paths": here}))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- what was found ---------------------------------------------------------------------------------------------------


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Binaries that Triton found in its cache inside the block, and that it had to compile."""
    found = {"hits": 0, "misses": 0}
    before = knobs.compilation.listener

    def listener(*args: Any, **told: Any) -> None:
        found["hits" if told["cache_hit"] else "misses"] += 1
        if before is not None:
            before(*args, **told)

    knobs.compilation.listener = listener
    try:
        yield found
    finally:
        knobs.compilation.listener = before
