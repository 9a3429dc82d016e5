"""Fused steps on the Triton kernels, with gradients: the three functions of a backend (`cnnfast.dispatch.Backend`).

Without Triton this file can still be imported, and says why it cannot run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import Arrangement, Planned, Ready, channels_last_inside, resolve_backend
from ..gradients import enter
from ..memory_format import is_channels_last, to_format
from ..reference import finish
from ..step import Operands, Step
from .why_not import launch_why_not, triton_why_not
from .why_not import why_not as step_why_not

if triton_why_not() is None:
    from . import conv, norm_act_autograd
    from .block import How, block
    from .conv_autograd import convolution, recorded
    from .weight import summed_weight

__all__ = ["arrange", "run", "why_not"]


def why_not(step: Step, o: Operands, *, channels_last: bool, training: bool, required: bool) -> str | None:
    """See `dispatch.Backend`. A training step's convolutions of few channels run where they are asked for."""
    reason = step_why_not(step, o, few_channels=training and required, training=training)
    return launch_why_not(o.x.device) if reason is None and required else reason


def run(step: Step, o: Operands, *, channels_last: bool, training: bool, required: bool) -> Tensor | None:
    """See `dispatch.Backend`."""
    x = o.x
    if step.spec is None:
        if not x.numel():
            return None
        return norm_act_autograd.run(step, o, None, channels_last, _output_dtype(step, x), required)
    if o.weight.dtype != x.dtype:
        o = o._replace(weight=o.weight.to(x.dtype))
    if not training:
        return conv.run(step, o, channels_last, required=required)
    weight = o.weight if step.upsample is None else summed_weight(step, o.weight, required)
    if any(step.pad):
        x = enter(x, x.dtype, None, is_channels_last(x)) if recorded(x) else x
        x = step.pad_input(x)
    if step.folds:
        return convolution(x, weight, o.bias, step.inner, channels_last, required)
    if x is not o.x or weight is not o.weight:
        o = o._replace(x=x, weight=weight)
    y, done = block(o, How(step, channels_last, _output_dtype(step, x), required))
    if done:
        return y
    if o.batches is not None:
        o.batches.add_(1)
    return to_format(finish(step.tail, o.after(y)), channels_last)


def _output_dtype(step: Step, x: Tensor) -> torch.dtype:
    """x's dtype, and float32 where autocast runs the norm in float32 (group norm on CUDA)."""
    group = step.norm is not None and step.norm.kind == "group"
    if group and x.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return x.dtype


def arrange(
    steps: Sequence[Planned], shapes: Sequence[torch.Size], eager: Sequence[bool], *, gradient: bool
) -> Arrangement | str:
    """Channels-last inside: the kernels read nothing else."""
    inside = channels_last_inside(eager)
    if gradient:
        return inside
    required = resolve_backend(None) == "triton"
    ready = [_shorter(s.step, last, required) for s, last in zip(steps, inside.channels_last, strict=True)]
    return inside._replace(ready=tuple(ready))


def _shorter(step: Step, last: bool, required: bool) -> Ready:
    """`run` without gradients, for operands of one kind: `why_not` is asked once."""
    refused: list[bool] = []

    def ready(o: Operands) -> Tensor | None:
        if not refused:
            refused.append(why_not(step, o, channels_last=last, training=False, required=required) is not None)
        return None if refused[0] else conv.run(step, o, last, required=required)

    return ready
