"""Benchmarks: `python -m benchmarks` (CPU), `python -m benchmarks.gpu`, `python -m benchmarks.host_time`."""
