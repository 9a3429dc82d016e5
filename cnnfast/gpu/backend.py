"""Fused steps on the Triton kernels, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import Activation
from ..gradients import enter
from ..memory_format import is_channels_last, to_format
from ..norms import Norm, NormCall, Partials, check_sizes
from ..reference import norm_by_torch
from ..step import Operands, Step
from . import norm_act_autograd
from .conv_autograd import _IDENTITY, _how, _recorded, _with_statistics, convolution
from .weight import summed_weight
from .why_not import norm_why_not

__all__ = ["normalise", "run"]


# --- fused steps ------------------------------------------------------------------------------------------------------


def _norm_of(o: Operands) -> NormCall | None:
    """What mean, var, scale and shift of a step stand for."""
    if o.mean is not None:
        return NormCall(Norm("batch", eps=o.eps), o.scale, o.shift, o.mean, o.var, use_input_stats=False)
    return None if o.scale is None and o.shift is None else NormCall(Norm("affine"), o.scale, o.shift)


def run(step: Step, o: Operands, norm: NormCall | None, channels_last: bool, required: bool) -> Tensor:
    """The step with gradients, and with a norm after the convolution, whose statistics come out of its epilogue where
    tiles allow it. ``required``: RuntimeError where a kernel cannot run, instead of PyTorch's operators."""
    x, weight = o.x, summed_weight(step, o.weight, required)
    if any(step.pad):
        x = enter(x, x.dtype, None, is_channels_last(x)) if _recorded(x) else x
        x = step.pad_input(x)
    call = _norm_of(o) if norm is None else norm
    if call is None and o.residual is None and step.activation.saves() != "x":
        return convolution(x, weight, o.bias, _how(step.spec, step.activation, channels_last, required))
    statistics = None
    if call is not None and call.use_input_stats and call.norm.kind != "affine":
        statistics = "batch" if call.norm.kind == "batch" else "image"
    how = _how(step.spec, _IDENTITY, True, required)
    u, partials = _with_statistics(x, weight, o.bias, how, statistics)
    check_sizes(u, call)
    return normalise(u, call, o.residual, step.activation, o.slope, partials, channels_last, required)


def normalise(
    x: Tensor,
    call: NormCall | None,
    residual: Tensor | None,
    activation: Activation,
    slope: Tensor | None,
    partials: Partials | None,
    channels_last: bool,
    required: bool,
) -> Tensor:
    """``act(norm(x) + residual)`` of a plain x, as `cnnfast.ops.run.normalise` has it. ``partials``: the statistics of
    x where they are known already, of a part for each segment of the norm. ``required``: RuntimeError where a kernel
    cannot run, instead of PyTorch's operators."""
    vectors = () if call is None else (call.weight, call.bias, call.running_mean, call.running_var)
    reason = norm_why_not(x, *vectors, residual, slope) if x.numel() else "it is empty"
    if reason is None:
        how = (channels_last, _output_dtype(x, call), required)
        y = norm_act_autograd.run(x, call, residual, activation, slope, partials, *how)
        if y is not None:
            return y
    elif required and x.numel():
        raise RuntimeError(f'backend="triton" cannot run this: {reason}')
    return to_format(norm_by_torch(x, call, residual, activation, slope), channels_last)


def _output_dtype(x: Tensor, call: NormCall | None) -> torch.dtype:
    """x's dtype, and float32 where autocast runs the norm in float32 (group norm on CUDA)."""
    low = x.dtype in (torch.float16, torch.bfloat16)
    group = call is not None and call.norm.kind == "group"
    return torch.float32 if low and group and x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype
