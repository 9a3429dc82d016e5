"""Upsampling blocks under pytest-benchmark: `pytest benchmarks/test_upsample.py`. All: `python -m benchmarks`."""

from __future__ import annotations

import pytest

SUITE = "upsample"

pytestmark = pytest.mark.benchmark(min_rounds=5, max_time=0.3, warmup=False)


def test_upsample(bench, row, implementation):
    bench(row, implementation)
