"""Benchmarks: `python -m benchmarks` (CPU), `python -m benchmarks.gpu`, `python -m benchmarks.rehearse` (GPUs that are
not at hand), `python -m benchmarks.host_time`; of results: `benchmarks.plots`, `benchmarks.readme`, `benchmarks.agree`.
"""
