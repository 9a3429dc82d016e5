"""`run_step`: one fused step on whatever backend applies. Fusion and the public functions both end here."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, reference
from ..activations import Activation
from ..cpu import inference
from ..cpu import training as cpu_training
from ..dispatch import needs_gradient, watched
from ..gpu.why_not import launch_why_not, why_not
from ..gradients import enter
from ..memory_format import convert, is_channels_last, to_format
from ..norms import NormCall, check_sizes
from ..reference import run_reference, step_by_torch
from ..step import Operands, Step

__all__ = ["normalise", "run_step"]

WATCHED = "a tensor subclass, transform, tracer, dispatch mode or forward-mode AD is active"


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
            reason: str | None = WATCHED
        else:
            # A training step's convolutions of few channels run where they are asked for.
            reason = why_not(step, o, few_channels=training and name == "triton")
            if reason is None and name == "triton":
                reason = launch_why_not(o.x.device)
        if reason is None and training:
            from ..gpu import backend as gpu  # imports triton

            return gpu.run(step, o, norm, channels_last, required=name == "triton")
        if reason is None:
            from ..gpu import conv as launch  # imports triton

            y = launch.run(step, o, channels_last, required=name == "triton")
            if y is not None:
                return y
        elif name == "triton":
            raise RuntimeError(f'backend="triton" cannot run this: {reason}')
    if training:
        if o.x.device.type == "cpu" and not unseen:
            return cpu_training.run(step, o, norm, channels_last)
        return step_by_torch(step, o, norm, channels_last)
    if not unseen and o.x.device.type == "cpu" and inference.why_not(step, o, channels_last) is None:
        packed = inference.run(step, o, channels_last)
        return cpu_training.run(step, o, None, channels_last, new=True) if packed is None else packed
    y = run_reference(step, o)
    if unseen or y.device.type != "cpu":
        return to_format(y, channels_last)
    return convert(y, y.dtype, channels_last)


def normalise(
    x: Tensor,
    call: NormCall | None,
    residual: Tensor | None,
    activation: Activation,
    slope: Tensor | None,
    *,
    channels_last: bool,
    backend: str | None,
) -> Tensor:
    """``act(norm(x) + residual)`` of x (N, C, H, W), in x's dtype (float32 of a group norm under CUDA autocast, as
    eager's) and in the memory format asked for; differentiable any number of times (once where statistics are those of
    several processes).

    ``call`` None: no norm. ``slope``: PReLU's weight, of 1 or C elements. RuntimeError where an explicit
    ``backend="triton"`` cannot run this, with the reason; ValueError for statistics of a single value.
    """
    check_sizes(x, call)
    name = dispatch.resolve_backend(backend)
    if name != "aten" and x.numel() and not torch.compiler.is_compiling() and (name == "triton" or x.is_cuda):
        reason = WATCHED if watched(x) else None
        if reason is None and name == "triton":
            reason = launch_why_not(x.device)
        if reason is None:
            from ..gpu import backend as gpu  # imports triton

            return gpu.normalise(x, call, residual, activation, slope, None, channels_last, name == "triton")
        if name == "triton":
            raise RuntimeError(f'backend="triton" cannot run this: {reason}')
    return to_format(reference.norm_by_torch(x, call, residual, activation, slope), channels_last)
