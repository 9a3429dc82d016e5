"""The norms of a fused step: from a module's attributes to what it computes and what it does beside, or why not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import on_cpu
from ..norms import Norm
from .fusion_conv import Part, check_vector
from .modules import NotFused

__all__ = ["NormRule", "norm_rule"]


@dataclass(frozen=True)
class NormRule:
    """A norm module in its present mode. ``norm``: what it computes then; ``kind``: "batch", "instance", "group" or
    "sync", whatever the mode; ``dtype``: of its vectors, None where it has none; ``contiguous``: its module's result is
    contiguous, whatever its input is.

    Of one that measures: ``updates``: running statistics move, by ``momentum`` (None: to the average of all batches,
    for which ``counts``, num_batches_tracked goes up, is needed); ``synchronised``: statistics are of all processes.
    """

    norm: Norm
    kind: str
    dtype: torch.dtype | None
    contiguous: bool = False
    updates: bool = False
    counts: bool = False
    momentum: float | None = None
    synchronised: bool = False


def norm_rule(part: Part, ndim: int, channels: int, weight: Tensor) -> NormRule:
    """Of the norm that follows an ``ndim``-dimensional convolution with this weight to ``channels``. `NotFused` where
    it cannot be taken in."""
    kind = part.role.removeprefix("norm ")
    if part.ndim not in (0, ndim):
        name = "BatchNorm" if kind == "batch" else "InstanceNorm"
        raise NotFused(f"{name}{part.ndim}d after a {ndim}-D convolution")
    mean, var, *affine = part.tensors
    vectors = [t for t in part.tensors if t is not None]
    dtype = vectors[0].dtype if vectors else None
    if dtype is not None:
        for t in vectors:
            check_vector(t, channels, (dtype,), weight)
        if dtype not in (weight.dtype, torch.float32):
            raise NotFused(f"a {dtype} norm after a {weight.dtype} convolution")
    eps = part.attributes[0]
    if type(eps) not in (int, float):
        raise NotFused(f"eps={eps!r} is not a number")
    if kind == "group":
        groups = part.attributes[1]
        if type(groups) is not int or groups < 1 or channels % groups:
            raise NotFused(f"num_groups={groups!r} does not divide {channels} channels")
        return NormRule(Norm("group", groups, float(eps)), kind, dtype, not on_cpu(weight))
    return _tracking_rule(kind, part, float(eps), dtype, channels)


def _tracking_rule(kind: str, part: Part, eps: float, dtype: torch.dtype | None, channels: int) -> NormRule:
    """Of a module that may keep running statistics."""
    _, momentum, tracks, *features = part.attributes
    if momentum is not None and type(momentum) not in (int, float):
        raise NotFused(f"momentum={momentum!r} is not a number")
    if features and features[0] != channels:
        raise NotFused(f"num_features={features[0]} is not the {channels} channels that the convolution gives")
    mean, var = part.tensors[:2]
    if (mean is None) != (var is None):
        raise NotFused("it has one of running_mean and running_var only")
    if kind == "instance":
        measured, updates = part.training or not tracks, mean is not None
        if not measured and mean is None:
            raise NotFused("it has no running statistics to normalise by")
    else:
        measured, updates = part.training or mean is None, part.training and bool(tracks) and mean is not None
    if kind != "instance" and (eps < 0 or measured and eps == 0):
        raise NotFused(f"eps={eps} must be positive in training")
    if not measured:
        return NormRule(Norm("running", eps=eps), kind, dtype, kind == "instance")
    return NormRule(
        Norm("instance" if kind == "instance" else "batch", eps=eps),
        kind,
        dtype,
        kind == "instance",
        updates,
        counts=kind != "instance" and part.training and bool(tracks),
        momentum=None if momentum is None else float(momentum),
        synchronised=kind == "sync" and part.training,
    )
