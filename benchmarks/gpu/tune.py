"""The GPU run's tuning: candidates compiled and proven side by side, then timed one step after the other.

The work is `cnnfast.gpu.tuning`'s; best plans end up in its cache on disk, where later calls of cnnfast find them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import cnnfast
from cnnfast.gpu import tuning
from cnnfast.gpu.conv_choice import candidates, modelled_clocks
from cnnfast.gpu.devices import precision_of, target_device, tf32_convolutions

from .. import timers
from ..peers import backend, fused
from ..workload import NotAvailable, Workload
from .compare import set_tf32
from .rows import Item, Steps, read

__all__ = ["PLANS", "candidate_items", "tune_items", "tuned_workloads"]

PLANS = 16  # of a step that are tried, the best by the model first
DRY_PLANS = 3


def tasks(w: Workload) -> list[tuning.Task]:
    """The fused steps of a workload. NotAvailable where none runs as a Triton kernel."""
    set_tf32(w.tf32)
    w = replace(w)
    model, x = fused(w), w.input(True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        with cnnfast.backend(backend()):
            return model(x)

    found = tuning.record(forward, x)
    if not found:
        raise NotAvailable("no step of it has a Triton kernel")
    return found


def modelled(task: tuning.Task) -> dict[str, float]:
    """The modelled clocks of every valid plan of a step, by its name."""
    x = dict(task.likes)["x"]
    spec = task.step.spec
    size = tuple(n + 2 * p for n, p in zip(x.shape[2:], task.step.pad, strict=True))
    with tf32_convolutions(task.tf32):
        precision = precision_of(x.dtype)
    device = target_device(torch.empty(0, device=task.device))
    plans = candidates(spec, x.shape[0], size, precision, device, task.channels_last)
    rows = [p.lowering.rows(x.shape[0], spec.output_size(size)) for p in plans]
    return {p.name: modelled_clocks(p, n, precision, device) for p, n in zip(plans, rows, strict=True)}


def _item(w: Workload, timer: tuning.Timer, limit: int, seconds: float, timed: bool) -> Item:
    """``seconds``: after which no further plan is compiled."""

    def work(steps: Steps) -> Mapping[str, Any]:
        row: dict[str, Any] = {"case": w.case.name, "dtype": w.dtype_name, "batch": w.batch}
        try:
            found = steps.attempt("record", lambda: tasks(w))
            done = steps.attempt(
                "plans", lambda: tuning.tune_steps(found, timer, seconds=seconds, limit=limit, tell=_quiet)
            )
        except NotAvailable as reason:
            return row | {"note": str(reason)}
        finally:
            if torch.version.cuda is not None:
                torch.cuda.empty_cache()
        wrong = [f"{name} {why}" for r in done for name, why in r.refused.items() if "wrong results" in why]
        refused = [f"{name}: {why}" for r in done for name, why in r.refused.items()]
        row |= {"refused": refused, "steps": [_step(r, timed) for r in done], "failures": len(wrong)}
        return row | ({"note": "; ".join(wrong)} if wrong else {})

    return Item(w.name, work, seconds / 2)


def _step(r: tuning.Result, timed: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"title": r.task.title, "heuristic": r.heuristic.name, "refused": len(r.refused)}
    if not timed:
        return found
    clocks = modelled(r.task)
    plans = [{"plan": p, "us": 1e6 * s, "clocks": clocks.get(p)} for p, s in r.seconds.items()]
    if r.best is not None:
        found |= {"best": r.best.name, "best_us": 1e6 * r.seconds[r.best.name], "kept": r.kept}
    heuristic = r.seconds.get(r.heuristic.name)
    return found | {
        "heuristic_us": None if heuristic is None else 1e6 * heuristic,
        "plans": plans,
        "valid": len(clocks),
    }


def _quiet(line: str) -> None:
    """The row says it, and whether its times are stubbed."""


def _untimed(calls: Mapping[str, Callable[[], object]]) -> dict[str, Any]:
    """No times: every plan is compiled and proven, and none is kept."""
    return {}


def candidate_items(found: list[Workload], dry_run: bool) -> Iterator[Item]:
    """Every plan that will be timed, compiled and proven."""
    return (_item(w, _untimed, DRY_PLANS if dry_run else PLANS, 40.0, False) for w in found)


def tune_items(found: list[Workload], dry_run: bool) -> Iterator[Item]:
    """The plans of each step, timed."""
    timer = timers.stubbed if dry_run else tuning.cuda_timer
    return (_item(w, timer, DRY_PLANS if dry_run else PLANS, 20.0, True) for w in found)


def tuned_workloads(folder: Path, found: list[Workload]) -> list[Workload]:
    """Those of ``found`` that were tuned, and whole generators of which a layer was."""
    data = read(folder / "tune.json")
    rows = [] if data is None else data["rows"]
    done = {(row["case"], row["dtype"], row["batch"]) for row in rows if "steps" in row}

    def was(w: Workload) -> bool:
        same = [case for case, dtype, batch in done if (dtype, batch) == (w.dtype_name, w.batch)]
        return any(case == w.case.name or case.startswith(f"{w.case.name}.") for case in same)

    return [w for w in found if was(w)]
