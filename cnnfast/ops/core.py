"""`run_step`: one fused step on whatever backend applies. Fusion and the public functions both end here."""

from __future__ import annotations

from dataclasses import replace

import torch

from .. import cpu, cpu_training, dispatch
from ..activations import Activation
from ..block import Operands, Step, run_reference
from ..dispatch import needs_gradient, watched
from ..gradients import enter
from ..memory_format import is_channels_last, to_format
from ..norms import NormCall
from . import norm_aten
from .normalise import check_sizes

__all__ = ["step_by_torch", "run_step"]


def run_step(
    step: Step,
    o: Operands,
    *,
    channels_last: bool | None = None,
    backend: str | None = None,
    norm: NormCall | None = None,
) -> torch.Tensor:
    """Run ``step`` on ``o`` (x (N, C, H, W)) -> (N, C_out, OH, OW) in x's dtype; differentiable any number of times.

    ``norm`` comes after the convolution and its bias (``o`` has no mean, var, scale and shift then), ahead of residual
    and activation. ``channels_last`` forces the result's memory format; None takes eager's (channels_last where x or
    the weight is). Where something watches, PyTorch's operators run. Not for code that `torch.compile` or
    `torch.export` trace (`library.traced_step`). RuntimeError where an explicit ``backend="triton"`` cannot run the
    step, with the reason.
    """
    if channels_last is None:
        channels_last = is_channels_last(o.x) or is_channels_last(o.weight)
    gradient = needs_gradient(o) or norm is not None and needs_gradient(norm)
    training = gradient or norm is not None
    name = dispatch.resolve_backend(backend)
    unseen = watched(o.x)
    if gradient and not (channels_last or unseen) and o.residual is not None and o.residual.requires_grad:
        o = o._replace(residual=enter(o.residual, o.residual.dtype, None, False))  # gradients inside are channels-last
    if name == "triton" or (name == "auto" and o.x.is_cuda and not unseen):
        if unseen:
            reason: str | None = "a tensor subclass, transform, tracer, dispatch mode or forward-mode AD is active"
        else:
            # A training step's convolutions of few channels run where they are asked for.
            reason = dispatch.why_not(step, o, few_channels=training and name == "triton")
            if reason is None and name == "triton":
                reason = dispatch.launch_why_not(o.x.device)
        if reason is None and training:
            from . import training as with_gradients  # imports triton

            return with_gradients.run(step, o, norm, channels_last, required=name == "triton")
        if reason is None:
            from . import launch  # imports triton

            y = launch.run(step, o, channels_last, required=name == "triton")
            if y is not None:
                return y
        elif name == "triton":
            raise RuntimeError(f'backend="triton" cannot run this: {reason}')
    if training:
        if o.x.device.type == "cpu" and not unseen:
            return cpu_training.run(step, o, norm, channels_last)
        return step_by_torch(step, o, norm, channels_last)
    if not unseen and o.x.device.type == "cpu" and cpu.why_not(step, o, channels_last) is None:
        packed = cpu.run(step, o, channels_last)
        return cpu_training.run(step, o, None, channels_last, new=True) if packed is None else packed
    y = run_reference(step, o)
    if unseen or y.device.type != "cpu":
        return to_format(y, channels_last)
    return cpu.convert(y, y.dtype, channels_last)


def step_by_torch(step: Step, o: Operands, norm: NormCall | None, channels_last: bool) -> torch.Tensor:
    """The step by PyTorch's operators, which differentiate it."""
    if norm is None:
        return to_format(run_reference(step, o), channels_last)
    u = run_reference(replace(step, activation=Activation()), o._replace(residual=None, slope=None))
    check_sizes(u, norm)
    return to_format(norm_aten.norm_by_torch(u, norm, o.residual, step.activation, o.slope), channels_last)
