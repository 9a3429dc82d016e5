"""Plans that `cnnfast.tune` found faster than the heuristic's, kept on disk: read by every launch on a GPU, written by
tuning alone.

A record is of one layer at one batch and image size, on one GPU, under one torch, triton and cnnfast, for one source of
the kernels. One that `conv_plan.is_valid` refuses counts as none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from .. import store
from ..spec import ConvSpec, Precision
from . import guard
from .conv_plan import Plan, is_valid, lower
from .devices import Device

__all__ = ["keep", "key", "stored"]

KIND = "plans"
_FIELDS = {f.name: bool if f.name == "splits" else int for f in fields(Plan) if f.name != "lowering"}


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
    if not isinstance(values, dict) or values.keys() != _FIELDS.keys():
        return None
    if any(type(values[name]) is not kind for name, kind in _FIELDS.items()):
        return None
    if values["num_stages"] < 1 or values["group_m"] < 1:
        return None
    plan = Plan(lower(spec, tuple(input_size), channels_last), **values)
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
    record = {"plan": {name: getattr(plan, name) for name in _FIELDS}, "about": dict(about)}
    channels_last = plan.lowering.channels_last
    return store.put(KIND, key(spec, batch, input_size, precision, index, channels_last), record)
