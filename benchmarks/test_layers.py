"""Layers under pytest-benchmark: `pytest benchmarks/test_layers.py`. All: `python -m benchmarks`."""

from __future__ import annotations

import pytest

SUITE = "layers"

pytestmark = pytest.mark.benchmark(min_rounds=5, max_time=0.3, warmup=False)


def test_layers(bench, row, implementation):
    bench(row, implementation)
