"""`run_step`: one fused step on whatever backend applies. Fusion and the public functions both end here."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.autograd import forward_ad

from .. import cpu, cpu_training, dispatch
from ..block import Operands, Step, run_reference
from ..gradients import enter
from ..memory_format import is_channels_last
from ..norms import NormCall
from ..spec import Activation

__all__ = ["by_torch", "needs_gradient", "run_step", "to_format", "watched"]


def to_format(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def needs_gradient(o: Operands | NormCall) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in o)


def watched(x: torch.Tensor) -> bool:
    """Whether functorch, a tensor subclass, a tracer, a dispatch mode (fake tensors) or forward-mode differentiation
    takes part.

    They know the rules of PyTorch's own operators; a kernel launched from Python would pass them by.
    """
    return (
        type(x) not in (torch.Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


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
    the weight is). Where something watches, PyTorch's operators run; what `torch.compile` and `torch.export` trace
    is `library.traced_step`'s to say. RuntimeError where an explicit ``backend="triton"`` cannot
    run the step, with the reason.
    """
    if channels_last is None:
        channels_last = is_channels_last(o.x) or is_channels_last(o.weight)
    gradient = needs_gradient(o) or norm is not None and needs_gradient(norm)
    training = gradient or norm is not None
    if torch.compiler.is_compiling():
        from .library import traced_step

        return traced_step(step, o, norm, channels_last, backend)
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
        return by_torch(step, o, norm, channels_last)
    if not unseen and o.x.device.type == "cpu" and cpu.why_not(step, o, channels_last) is None:
        packed = cpu.run(step, o, channels_last)
        return cpu_training.run(step, o, None, channels_last, new=True) if packed is None else packed
    y = run_reference(step, o)
    if unseen or y.device.type != "cpu":
        return to_format(y, channels_last)
    return cpu.convert(y, y.dtype, channels_last)


def by_torch(step: Step, o: Operands, norm: NormCall | None, channels_last: bool) -> torch.Tensor:
    """The step by PyTorch's operators, which differentiate it."""
    if norm is None:
        return to_format(run_reference(step, o), channels_last)
    from .normalise import normalise

    u = run_reference(replace(step, activation=Activation()), o._replace(residual=None, slope=None))
    return normalise(
        u, norm, o.residual, step.activation, o.slope, partials=None, channels_last=channels_last, backend="aten"
    )
