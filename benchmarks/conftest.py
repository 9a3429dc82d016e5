"""What the pytest-benchmark suites share: one test per workload and implementation, checked before it is timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch

from benchmarks import cases
from benchmarks.peers import IMPLEMENTATIONS, SUITE_IMPLEMENTATIONS
from benchmarks.workload import Implementation, NotAvailable, Workload

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")


@lru_cache(maxsize=1)
def _cached(workload: Workload) -> Workload:
    """The workload whose tensors the tests of one row share; only the latest is kept."""
    return workload


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise by the cases of the module's ``SUITE``, with each case's middle batch size, and its peers."""
    suite = getattr(metafunc.module, "SUITE", None)
    if suite is None:
        return
    pairs = [
        pytest.param((case, batches[len(batches) // 2], dtype), implementation, id=_id(case, dtype, implementation))
        for case in cases.find([suite])
        if (batches := case.batches_on("cpu"))
        for dtype in cases.DTYPES["cpu"]
        for implementation in IMPLEMENTATIONS
        if implementation.name in SUITE_IMPLEMENTATIONS[suite]
    ]
    metafunc.parametrize(("row", "implementation"), pairs)


def _id(case: cases.Case, dtype: torch.dtype, implementation: Implementation) -> str:
    return f"{case.name}-{str(dtype).removeprefix('torch.')}-{implementation.name.replace(' ', '_')}"


@pytest.fixture
def bench(benchmark: object) -> Callable[[tuple[cases.Case, int, torch.dtype], Implementation], None]:
    """Check an implementation on a row, then time it; TFLOP/s, error and path go into the benchmark's extra_info."""

    def run(row: tuple[cases.Case, int, torch.dtype], implementation: Implementation) -> None:
        workload = _cached(Workload(*row))
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # else each test's modules count as recompilations of one function
        try:
            prepared = implementation.prepare(workload)
        except NotAvailable as reason:
            pytest.skip(str(reason))
        error, wrong = workload.check(prepared)
        assert wrong is None, f"{workload.name}: {implementation.name}: {wrong}"
        benchmark.group = workload.name  # type: ignore[attr-defined]
        benchmark.extra_info |= {"error": error, "path": prepared.path()}  # type: ignore[attr-defined]
        with torch.inference_mode():
            benchmark(prepared.call)  # type: ignore[operator]
        if benchmark.stats is not None:  # type: ignore[attr-defined]  # None under --benchmark-disable
            seconds = benchmark.stats.stats.median  # type: ignore[attr-defined]
            benchmark.extra_info["tflops"] = 2 * workload.macs / seconds / 1e12  # type: ignore[attr-defined]

    return run
