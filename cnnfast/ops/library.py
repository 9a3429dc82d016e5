"""The fused step as a `torch.library` operator: what tracing, compiling and fake tensors see in place of a launch.

``cnnfast::conv_block`` runs `run_step` without gradients; its backward recomputes the step by PyTorch's operators, so
that no caller ever gets a silently detached result. Plain eager calls skip this boundary (it costs 14 to 60 us).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..block import Operands, Step, Upsample, plain_step, run_reference, upsample_step
from ..spec import Activation, ConvSpec

__all__ = ["conv_block", "conv_block_op"]


def _step(
    weight: Tensor,
    transposed: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    upsample: Sequence[int],
    padding_mode: str,
    activation: str,
    params: Sequence[float],
) -> Step:
    act = Activation(activation, tuple(params))
    first, second, *kernel = (int(n) for n in weight.shape)
    if upsample:
        up = Upsample((upsample[0], upsample[1]), (padding[0], padding[1]), padding_mode)
        return upsample_step(second * groups, first, (kernel[0], kernel[1]), up, groups, act)
    spec = ConvSpec(
        transposed,
        first if transposed else second * groups,
        second * groups if transposed else first,
        tuple(kernel),
        tuple(stride),
        tuple(padding),
        tuple(output_padding),
        tuple(dilation),
        groups,
    )
    return plain_step(spec, padding_mode, act)


@torch.library.custom_op("cnnfast::conv_block", mutates_args=())
def conv_block_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    eps: float,
    transposed: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    upsample: Sequence[int],
    padding_mode: str,
    activation: str,
    params: Sequence[float],
    channels_last: bool,
    backend: str | None,  # None: the context's at run time
) -> Tensor:
    from .core import run_step

    step = _step(
        weight,
        transposed,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        upsample,
        padding_mode,
        activation,
        params,
    )
    o = Operands(x, weight, bias, mean, var, eps, scale, shift, residual, slope)
    with torch.no_grad():
        y = run_step(step, o, channels_last=channels_last, backend=backend)
    # An operator's result must be a tensor of its own: identity steps may hand back an operand.
    return y.clone() if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and y.numel() else y


@conv_block_op.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    step = _step(weight, *args[8:18])
    size = step.output_size((x.shape[2], x.shape[3]))
    fmt = torch.channels_last if args[18] else torch.contiguous_format
    return torch.empty((x.shape[0], step.spec.out_channels, *size), dtype=x.dtype, device=x.device, memory_format=fmt)


_TENSORS = 9  # the leading tensor arguments


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.rest = inputs[_TENSORS:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    eps, *geometry = ctx.rest
    tensors = ctx.saved_tensors
    with torch.enable_grad():
        # Detached copies: the step is differentiated here, with respect to exactly what the caller asked for.
        leaves = [
            None if t is None else t.detach().requires_grad_(need and t.is_floating_point())
            for t, need in zip(tensors, ctx.needs_input_grad, strict=False)
        ]
        x, weight, bias, mean, var, scale, shift, residual, slope = leaves
        assert x is not None and weight is not None  # the schema says so
        step = _step(weight, *geometry[:10])
        y = run_reference(step, Operands(x, weight, bias, mean, var, eps, scale, shift, residual, slope))
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        grads = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
    return tuple(next(grads) if t is not None and t.requires_grad else None for t in leaves) + (None,) * len(ctx.rest)


conv_block_op.register_autograd(_backward, setup_context=_setup_context)


def conv_block(step: Step, o: Operands, channels_last: bool, backend: str | None) -> Tensor:
    """``step`` through the operator."""
    s, up = step.spec, step.upsample
    # The layer's own padding and mode: a step pads its input ahead of the convolution in other modes than zeros.
    padding = [p + q for p, q in zip(s.padding, step.pad, strict=True)] if up is None else list(up.padding)
    mode = up.mode if up is not None else step.pad_mode if any(step.pad) else "zeros"
    return conv_block_op(
        o.x,
        o.weight,
        o.bias,
        o.mean,
        o.var,
        o.scale,
        o.shift,
        o.residual,
        o.slope,
        o.eps,
        s.transposed,
        list(s.stride),
        padding,
        list(s.output_padding),
        list(s.dilation),
        s.groups,
        [] if up is None else list(up.scale),
        mode,
        step.activation.name,
        list(step.activation.params),
        channels_last,
        backend,
    )
