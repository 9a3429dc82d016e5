"""`run_step`: one fused step on whatever backend applies. Fusion and the public functions all end here."""

from __future__ import annotations

import torch

from .. import dispatch
from ..dispatch import WATCHED, by_kernels, choose, needs_gradient, refusal, watched
from ..gradients import enter_residual
from ..memory_format import convert, is_channels_last, to_format
from ..reference import run_reference
from ..step import Operands, Step

__all__ = ["run_step"]


def run_step(step: Step, o: Operands, *, channels_last: bool | None = None, backend: str | None = None) -> torch.Tensor:
    """Run ``step`` on ``o`` (x (N, C, H, W)) -> (N, C_out, OH, OW) in x's dtype; differentiable any number of times.

    (A group norm on CUDA gives float32 under autocast, as eager's does.) ``channels_last`` forces the result's memory
    format; None takes eager's (channels_last where x or the weight is). A weight may be in a wider dtype than x. Where
    something watches, PyTorch's operators run. Not for code that `torch.compile` or `torch.export` trace
    (`traced.traced_step`). RuntimeError where an explicit ``backend="triton"`` cannot run the step, with the reason:
    here alone. ValueError where ``o`` holds a residual or a norm's tensors that ``step`` does not read.
    """
    if o.residual is not None and not step.residual:
        raise ValueError("the operands hold a residual, but the step adds none (Step.residual is False)")
    if step.norm is None and not (o.mean is o.var is o.scale is o.shift is None):
        raise ValueError("the operands hold a norm's tensors, but the step has no norm (Step.norm is None)")
    if channels_last is None:
        channels_last = is_channels_last(o.x) or o.weight is not None and is_channels_last(o.weight)
    gradient, unseen = needs_gradient(o), watched(o.x)
    training = gradient or step.measured
    name = dispatch.resolve_backend(backend)
    required = name == "triton"
    if gradient and not unseen and o.residual is not None:
        o = o._replace(residual=enter_residual(o.residual, channels_last))
    if o.batches is not None and (unseen or not by_kernels(o.x, name)):  # the kernels count batches themselves
        o.batches.add_(1)
        o = o._replace(batches=None)
    if not unseen or required:
        for by in choose(o.x, name):
            reason: str | None = WATCHED
            if not unseen:
                reason = by.why_not(step, o, channels_last=channels_last, training=training, required=required)
            if reason is None:
                y = by.run(step, o, channels_last=channels_last, training=training, required=required)
                if y is not None:
                    return y
            elif required:
                raise refusal(reason)
    if o.batches is not None:
        o.batches.add_(1)
    y = run_reference(step, o)
    return to_format(y, channels_last) if unseen else convert(y, y.dtype, channels_last)
