"""The GPU run's stage "hopper": whether `kernels/conv_hopper.py` is right on this sm_90, and faster than the pointer
kernel, layer by layer.

A wrong barrier would hang the device. So each plan's first launch is a step of its own (`rows.Steps`), in a process
that is ended where it stays there too long, and named in the results; the rest goes on without it. What a layer's row
says is kept for tuning (`cnnfast.gpu.tuned.allow_hopper`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from cnnfast.gpu import conv, conv_hopper_plan, guard, tuned, tuning
from cnnfast.gpu.conv_choice import choose_plan
from cnnfast.gpu.conv_plan import Plan
from cnnfast.gpu.devices import cuda_index, precision_of, target_device, tf32_convolutions
from cnnfast.step import Operands

from ..workload import NotAvailable, Workload
from .rows import Failed, Item, Steps
from .tune import tasks

__all__ = ["hopper_items", "judge"]

PLANS = 4  # of a step, the best by the model


def judge(task: tuning.Task, steps: Steps, timer: tuning.Timer) -> dict[str, Any]:
    """Every plan of boxes for a step held against float64, and those that are right timed beside the pointer kernel's.

    "failures": plans that were wrong, did not run or hung. "faster": the pointer kernel's time over the best of the
    right ones; "allowed": whether tuning may take them from now on.
    """
    o = task.operands()
    precision, device, index = precision_of(o.x.dtype), target_device(o.x), cuda_index(o.x) or 0
    batch, _, *image = o.x.shape
    size = tuple(n + 2 * p for n, p in zip(image, task.step.pad, strict=True))
    asked = (batch, size, precision, device, task.channels_last)
    found: dict[str, Any] = {"title": task.title, "failures": 0}
    reason = conv_hopper_plan.why_not(task.step, *asked)
    if reason is not None:
        return found | {"note": reason}
    pointer: Plan = choose_plan(task.step.spec, *asked)
    calls: dict[str, Callable[[], object]] = {}
    wrong = []
    for plan in (pointer, *conv_hopper_plan.candidates(task.step, *asked)[:PLANS]):
        try:
            steps.attempt(f"{task.title}: {plan.name}", lambda plan=plan: _prove(task, o, plan))
        except Failed as error:
            wrong.append(f"{plan.name}: {error}")
        else:
            calls[plan.name] = lambda plan=plan: conv.run(task.step, o, task.channels_last, plan)
    if wrong:
        found |= {"note": "; ".join(wrong), "failures": len(wrong)}
    if pointer.name not in calls or len(calls) < 2:
        return found
    times = {name: t.median for name, t in steps.attempt(f"{task.title}: times", lambda: timer(calls)).items()}
    best = min((name for name in times if name != pointer.name), key=lambda name: times[name])
    faster = times[pointer.name] / times[best]
    allowed = not wrong and faster >= 1 + tuning.GAIN
    about = {"pointer": pointer.name, "best": best, "us": {name: 1e6 * s for name, s in times.items()}}
    if allowed:
        tuned.allow_hopper(task.step, batch, size, precision, index, task.channels_last, about)
    return found | about | {"faster": faster, "allowed": allowed}


def _prove(task: tuning.Task, o: Operands, plan: Plan) -> None:
    """The plan's launch, compared with float64 by the guard. Raises what it finds."""
    conv.run(task.step, o, task.channels_last, plan)
    proof = conv.lookup(task.step, o, task.channels_last, plan).proof
    if not proof.ready:
        raise guard.Refused(proof.state)


def hopper_items(found: list[Workload], timer: tuning.Timer, dry_run: bool) -> Iterator[Item]:
    """A row for each workload in half precision; one that says why where there is nothing to be had."""
    arch = target_device(torch.empty(0, device="cuda")).arch
    reason = "a dry run: ttsem alone cannot read it; tests/gpu/test_conv_hopper.py can" if dry_run else None
    if arch != 90:
        reason = f"this GPU's compute capability is {arch // 10}.{arch % 10}; the kernel is written for 9.0"
    if reason is not None:
        yield Item("hopper", lambda steps: {"note": f"skipped: {reason}"}, 1.0)
        return
    for w in found:
        if w.dtype != torch.float32:
            yield Item(w.name, lambda steps, w=w: _row(w, steps, timer), 6.0)  # type: ignore[misc]


def _row(w: Workload, steps: Steps, timer: tuning.Timer) -> Mapping[str, Any]:
    row = {"case": w.case.name, "dtype": w.dtype_name, "batch": w.batch}
    try:
        recorded = steps.attempt("record", lambda: tasks(w))
    except NotAvailable as reason:
        return row | {"note": str(reason)}
    with torch.no_grad(), tf32_convolutions(w.tf32):
        layers = [judge(task, steps, timer) for task in recorded]
    torch.cuda.empty_cache()
    notes = [layer["note"] for layer in layers if "note" in layer]
    row |= {"layers": layers, "failures": sum(layer["failures"] for layer in layers)}
    return row | ({"note": "; ".join(notes)} if notes else {})
