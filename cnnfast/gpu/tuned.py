"""Plans that `cnnfast.tune` found faster than the heuristic's, kept on disk: read by every launch on a GPU, written by
tuning alone.

A record is of one layer at one batch and image size, on one GPU, under one torch, triton and cnnfast, for one source of
the kernels. One that `conv_plan.is_valid` refuses counts as none; one of boxes its launch holds against
`conv_hopper_plan.candidates`.

Of another kind are the records of steps for which `kernels/conv_hopper.py` was found right and faster on this GPU, by
`benchmarks.gpu` in a process that a hanging kernel would not outlive: without one, tuning does not try it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .. import store
from ..spec import ConvSpec, Precision
from ..step import Step
from . import guard
from .conv_hopper_plan import BoxPlan
from .conv_plan import Plan, is_valid, lower
from .devices import Device

__all__ = ["allow_hopper", "hopper_allowed", "keep", "key", "stored"]

KIND, HOPPER_KIND = "plans", "hopper"
_FIELDS = {f.name: bool if f.name in ("splits", "three") else int for f in fields(Plan) if f.name != "lowering"}
_BOX_FIELDS = {**_FIELDS, "box": list, "blocks": int}


def key(
    spec: ConvSpec,
    batch: int,
    input_size: tuple[int, ...],
    precision: Precision,
    index: int,
    channels_last: bool = True,
) -> dict[str, Any]:
    """Of the record for x (batch, C_in, *input_size) on CUDA device ``index``; ``channels_last``: the result."""
    numerics = {"dtype": str(precision.dtype), "tf32": precision.tf32, "channels_last": channels_last}
    return {**guard.environment(index), "spec": repr(spec), "batch": batch, "size": list(input_size), **numerics}


def stored(
    spec: ConvSpec,
    batch: int,
    input_size: tuple[int, ...],
    precision: Precision,
    device: Device,
    index: int,
    channels_last: bool = True,
) -> Plan | None:
    """The tuned plan, or None."""
    record = store.get(KIND, key(spec, batch, input_size, precision, index, channels_last))
    values = None if record is None else record.get("plan")
    of_boxes = isinstance(values, dict) and "box" in values
    kinds = _BOX_FIELDS if of_boxes else _FIELDS
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        return None
    if any(type(values[name]) is not kind for name, kind in kinds.items()):
        return None
    if values["num_stages"] < 1 or values["group_m"] < 1:
        return None
    low = lower(spec, tuple(input_size), channels_last)
    if of_boxes:
        return BoxPlan(low, **{**values, "box": tuple(values["box"])})
    plan = Plan(low, **values)
    return plan if is_valid(plan, precision, device) else None


def keep(
    spec: ConvSpec,
    batch: int,
    input_size: tuple[int, ...],
    precision: Precision,
    index: int,
    plan: Plan,
    about: Mapping[str, Any],
) -> bool:
    """Keep ``plan`` for this layer and size; ``about`` is for people who read the file. Returns whether it is on
    disk."""
    names = _BOX_FIELDS if isinstance(plan, BoxPlan) else _FIELDS
    values = {name: getattr(plan, name) for name in names}
    if isinstance(plan, BoxPlan):
        values["box"] = list(plan.box)
    record = {"plan": values, "about": dict(about)}
    channels_last = plan.lowering.channels_last
    return store.put(KIND, key(spec, batch, input_size, precision, index, channels_last), record)


def _hopper_key(
    step: Step, batch: int, input_size: tuple[int, ...], precision: Precision, index: int, channels_last: bool
) -> dict[str, Any]:
    return {**key(step.spec, batch, input_size, precision, index, channels_last), "step": repr(step)}


def allow_hopper(
    step: Step,
    batch: int,
    input_size: tuple[int, ...],
    precision: Precision,
    index: int,
    channels_last: bool,
    about: Mapping[str, Any],
) -> bool:
    """Say that the kernel was right and faster than the pointer one for ``step`` on x (batch, C_in, *input_size), the
    size with `Step.pad`. Returns whether that is on disk."""
    return store.put(HOPPER_KIND, _hopper_key(step, batch, input_size, precision, index, channels_last), about)


def hopper_allowed(
    step: Step, batch: int, input_size: tuple[int, ...], precision: Precision, index: int, channels_last: bool
) -> bool:
    """Whether that was said."""
    return store.get(HOPPER_KIND, _hopper_key(step, batch, input_size, precision, index, channels_last)) is not None
