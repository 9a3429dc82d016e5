"""Which run of modules is one fused step: the rules, once.

A step is ``ConvTranspose1d/2d/3d``, ``Conv1d/2d/3d`` or ``Upsample(nearest) + Conv2d/3d``, then a norm (Batch-,
SyncBatch-, Instance- or GroupNorm, in training or eval mode), then an activation, both optional (in a traced graph also
a scale, a shift and something that is added, between these). Ahead of the latter two's convolution a module may pad by
zeros, reflection or replication. `plan_modules` gives steps for a list of modules, and for every other module the
reason why it runs as it stands. A step is made of values alone (slots in the list, geometry, numbers); whoever runs it
reads the tensors from the modules on every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..activations import Activation
from ..memory_format import is_channels_last
from ..step import Step
from .computed import HOOKS, ComputedWeight, by_parametrization, is_parametrized, is_patched
from .fusion_conv import (
    Part,
    check_vector,
    dense,
    following,
    is_identity,
    padded_conv,
    plain_conv_step,
    transposed_step,
    upsampled_step,
)
from .fusion_norm import NormRule, norm_rule
from .modulation import Modulation, modulation
from .modules import KINDS, SHADOWS, NotFused, Reading, kind_of, read

__all__ = ["FusedStep", "Unfused", "plan_modules", "plan_parts"]


@dataclass(frozen=True)
class FusedStep:
    """The modules at ``slots`` as one `Step`; ``conv``, ``norm`` and ``slope`` are those whose tensors it reads.

    ``weight_channels_last``, and ``in_place`` (in eager mode nothing after the convolution lays out a tensor anew),
    decide the memory format that eager mode would return. ``overwrites``: the activation module works in place.
    ``residual``: the slot whose tensor is added ahead of the activation; ``leads``: as the sum's first operand.
    ``modulation``: what scales and shifts the norm's result.
    """

    slots: tuple[int, ...]
    step: Step
    ndim: int
    dtype: torch.dtype
    device: torch.device
    conv: int
    norm: int | None
    rule: NormRule | None
    slope: int | None
    weight_channels_last: bool
    in_place: bool
    overwrites: bool
    residual: int | None = None
    leads: bool = False
    modulation: Modulation = Modulation()  # noqa: RUF009 (a tuple)


@dataclass(frozen=True)
class Unfused:
    """A module that runs as it stands. ``opaque``: it runs code that is not PyTorch's, which might change others."""

    slot: int
    why_not: str
    opaque: bool


_NOT_YET: dict[type[nn.Module], str] = {
    nn.PixelShuffle: "a convolution's store does not shuffle pixels yet: PixelShuffle runs after it"
}


def plan_modules(modules: Sequence[nn.Module], reading: Reading | None = None) -> tuple[FusedStep | Unfused, ...]:
    """Fused steps and single modules, in order, for modules that run one after the other.

    ``reading``: what ``read(modules)`` has just returned, to save reading again. A plan holds for as long as `read`
    returns equal facts, and for inputs of a step's dtype and device whose sizes its convolution accepts.
    """
    reading = read(modules) if reading is None else reading
    parts = [_part(m, t) for m, t in zip(reading.modules, reading.tensors, strict=True)]
    opaque = [is_patched(m) or not type(m).__module__.startswith("torch.nn.modules.") for m in reading.modules]
    return plan_parts(parts, opaque)


def plan_parts(parts: list[Part], opaque: Sequence[bool]) -> tuple[FusedStep | Unfused, ...]:
    """As `plan_modules`, of what is known of modules, or of the calls of a traced graph (`rewrite_calls`)."""
    out: list[FusedStep | Unfused] = []
    reasons: dict[int, str] = {}  # of modules that the step before them could not take in
    slot = 0
    while slot < len(parts):
        try:
            step = _step(parts, slot, reasons)
        except NotFused as refused:
            out.append(Unfused(slot, reasons.get(slot, str(refused)), opaque[slot]))
            slot += 1
        else:
            out.append(step)
            slot = step.slots[-1] + 1
    return tuple(out)


def _part(module: nn.Module, tensors: tuple[Tensor | None, ...]) -> Part:
    cls, d = type(module), module.__dict__
    if tensors and isinstance(tensors[0], ComputedWeight):
        kind = kind_of(cls)
        assert kind is not None
        tensors = (tensors[0].form(), *tensors[1:])
        shadows = SHADOWS - {"weight"}  # a hook has set it
    else:
        kind, shadows = KINDS.get(cls), SHADOWS
        if kind is None:
            return Part("", 0, _why_no_kind(module))
        if any(d.get(name) for name in HOOKS):
            return Part("", 0, "it has hooks")
        if "forward" in d or cls.forward is not kind.forward:
            return Part("", 0, "its forward has been replaced")
    if not shadows.isdisjoint(d):
        return Part("", 0, f"the instance itself holds {', '.join(sorted(shadows & d.keys()))}")
    try:
        training, *attributes = kind.look(d)[len(HOOKS) :]
        if kind.tensors is not None and shadows is SHADOWS:
            kind.tensors(d)
    except KeyError as missing:
        return Part("", 0, f"it has no {missing}")
    return Part(kind.role, kind.ndim, "", training, tuple(attributes), tensors, kind.activation)


def _why_no_kind(module: nn.Module) -> str:
    cls = type(module)
    if is_parametrized(cls) and isinstance(why := by_parametrization(module), str):
        return why
    known = [c.__name__ for c in cls.__mro__[1:] if c in KINDS]
    if known:
        return f"a subclass of {known[0]} (or parametrized): it may compute anything"
    return _NOT_YET.get(cls, f"{cls.__name__} is no part of a fused step")


def _step(parts: list[Part], slot: int, reasons: dict[int, str]) -> FusedStep:
    """The step that starts at ``slot``, as long as it gets. `NotFused` where none starts there."""
    part = parts[slot]
    if part.problem:
        raise NotFused(part.problem)
    if part.role == "transposed":
        conv, base = slot, transposed_step(part)
    elif part.role == "upsample":
        conv, base = upsampled_step(parts, slot)
    elif part.role == "conv" or part.role.startswith("pad"):
        conv, pad = padded_conv(parts, slot, part.ndim)
        base = plain_conv_step(parts[conv], pad)
    else:
        if part.role == "dropout" and part.training:
            raise NotFused("it is in training mode")
        raise NotFused("no convolution ahead of it that takes it in")
    weight, channels, ndim = dense(parts[conv].tensors[0]), base.spec.out_channels, parts[conv].ndim

    last, rule, in_place = conv, None, True
    norm = following(parts, last, ndim)
    if norm is not None and parts[norm].role.startswith("norm"):
        try:
            rule = norm_rule(parts[norm], ndim, channels, weight)
            # A GroupNorm on a CPU allocates like its input, too.
            last, in_place = norm, rule.kind == "group" and not rule.contiguous
            base = replace(base, norm=rule.norm)
        except NotFused as refused:
            reasons[norm] = str(refused)
    if last != norm:
        norm = None
    scaled, k = Modulation(), following(parts, last, ndim)
    while rule is not None and rule.norm.per_image and k is not None and parts[k].role == "affine":
        try:
            scaled = modulation(parts[k], k, scaled, ndim, channels, weight)
        except NotFused as refused:
            reasons[k] = str(refused)
            break
        last, in_place = k, False
        k = following(parts, last, ndim)

    residual = following(parts, last, ndim)
    if residual is not None and parts[residual].role == "add":
        base, last, in_place = replace(base, residual=True), residual, False
    else:
        residual = None

    slope, overwrites = None, False
    k = following(parts, last, ndim)
    if k is not None and parts[k].role == "activation":
        try:
            activation = _activation(parts[k], channels, weight)
            base, last = replace(base, activation=activation), k
            slope = k if parts[k].tensors else None
            overwrites = parts[k].attributes[:1] == (True,)
            in_place = in_place and (overwrites or activation.row.keeps_format)
        except NotFused as refused:
            reasons[k] = str(refused)
    while last + 1 < len(parts) and is_identity(parts[last + 1], ndim):
        last += 1
    return FusedStep(
        slots=tuple(range(slot, last + 1)),
        step=base,
        ndim=ndim,
        dtype=weight.dtype,
        device=weight.device,
        conv=conv,
        norm=norm,
        rule=rule,
        slope=slope,
        weight_channels_last=is_channels_last(weight.unsqueeze(2) if ndim == 1 else weight),
        in_place=in_place,
        overwrites=overwrites,
        residual=residual,
        leads=residual is not None and parts[residual].attributes == (True,),
        modulation=scaled,
    )


def _activation(part: Part, channels: int, weight: Tensor) -> Activation:
    if part.tensors:
        (slope,) = part.tensors
        length = 1 if slope is not None and slope.numel() == 1 else channels
        check_vector(dense(slope), length, (weight.dtype,), weight)
    assert part.activation is not None
    activation = part.activation(*part.attributes)
    if activation.saves() != activation.row.saves and part.attributes[0]:  # the result does not tell the derivative
        raise NotFused(f"in place with a parameter of {activation.params[0]}, it has no gradient")
    return activation
