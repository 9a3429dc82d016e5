"""Convolutions with gradients on the Triton kernels, and fused steps made of them.

A convolution, its input gradient (the convolution of the adjoint geometry with the same weight) and its weight gradient
are linear in each of two tensors, and the derivative of each is made of the other two. So every backward here calls the
differentiable functions of this file, and derivatives of any order run on the same kernels.

`conv_setup`, `conv_backward`, `wgrad_setup` and `wgrad_backward` are the formulas; the `torch.autograd.Function`s of
eager mode use them, and so do the operators that `torch.compile` sees.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch, reference
from ..activations import activation_derivative
from ..gradients import restrided
from ..memory_format import has_both, is_channels_last, new_strides, suggests_channels_last, to_format
from ..norms import Partials
from ..step import Operands, Step
from . import conv, conv_wgrad
from .norm_act_autograd import activation_backward
from .why_not import launch_why_not, why_not

__all__ = [
    "Primitives",
    "conv_backward",
    "conv_forward",
    "conv_setup",
    "convolution",
    "recorded",
    "weight_gradient",
    "wgrad_backward",
    "wgrad_forward",
    "wgrad_setup",
    "with_statistics",
]


@lru_cache(maxsize=4096)
def _of_input(step: Step, size: torch.Size) -> Step:
    """The input gradient of a convolution of x with spatial ``size``."""
    return Step(step.spec.adjoint(size))


# --- the two operators, without gradients -----------------------------------------------------------------------------


def _launches(x: Tensor, weight: Tensor, step: Step, required: bool) -> bool:
    """Whether the kernel is to run. Few channels are no obstacle to it where it is required."""
    reason = why_not(step.bare, Operands(x, weight), few_channels=required)
    if reason is None and required:
        reason = launch_why_not(x.device)
    if reason is not None and required:
        raise dispatch.refusal(reason)
    return reason is None


def conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step: Step,
    channels_last: bool,
    required: bool,
    statistics: str | None = None,
) -> tuple[Tensor, Partials | None]:
    """``act(conv(x) + bias)`` and, where tiles allow it, its statistics of the "batch" or each "image"."""
    if _launches(x, weight, step, required):
        both = conv.run_with_statistics(step, Operands(x, weight, bias), channels_last, statistics, required=required)
        if both is not None:
            return both
    y = reference.conv_block(x, weight, bias, step.spec, activation=step.activation)
    return to_format(y, channels_last), None


def wgrad_forward(x: Tensor, grad: Tensor, like: Tensor, step: Step, required: bool) -> Tensor:
    """Gradient of the convolution's weight, with the shape, dtype and strides of ``like``."""
    if _launches(x, like, step, required):
        dw = conv_wgrad.run(x, grad, step.spec, like, required=required)
        if dw is not None:
            return dw
    return torch.empty_like(like).copy_(conv_wgrad.by_torch(x, grad, like, step.spec))


# --- their derivatives ------------------------------------------------------------------------------------------------


class Primitives(NamedTuple):
    """What backwards are made of: functions of this file in eager mode, operators where a compiler looks on.

    ``convolution(x, weight, bias, step, channels_last, required)``, ``weight_gradient(x, grad, like, step, required)``
    and ``activation_backward(grad, saved, activation, *, bias, required)``.
    """

    convolution: Callable[..., Tensor]
    weight_gradient: Callable[..., Tensor]
    activation_backward: Callable[..., tuple[Tensor, Tensor | None]]


def _input_gradient(
    grad: Tensor, weight: Tensor, size: torch.Size, channels_last: bool, ctx: Any, by: Primitives
) -> Tensor:
    """Of a convolution of x with spatial ``size``, for the gradient of its result."""
    of_input = _of_input if by is EAGER else _of_input.__wrapped__  # symbolic sizes have no hash
    dx = by.convolution(grad, weight, None, of_input(ctx.step, size), channels_last, ctx.required)
    # An output padding that reaches the stride gives the adjoint positions that x does not have.
    return to_format(dx[:, :, : size[0], : size[1]], channels_last) if dx.shape[2:] != size else dx


def conv_setup(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, step: Step, required: bool) -> None:
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    ctx.step, ctx.required, ctx.x, ctx.strides = step, required, x.shape, (x.stride(), weight.stride())
    ctx.bias_dtype = None if bias is None or not need_bias else bias.dtype
    ctx.save_for_backward(
        x if need_weight else None,
        weight if need_x or need_weight else None,  # the weight gradient has its strides
        y if step.saves == "y" else None,
    )


def conv_backward(
    ctx: Any, grad: Tensor, by: Primitives | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, differentiable where grad mode is on. ``by``: operators of a traced backward."""
    x, weight, y = ctx.saved_tensors
    step, bias_dtype, required = ctx.step, ctx.bias_dtype, ctx.required
    need_x, need_weight, *_ = ctx.needs_input_grad
    db: Tensor | None
    if by is None and (torch.is_grad_enabled() or dispatch.is_batched(grad)):
        if y is not None:
            grad = grad * activation_derivative(step.activation, y).to(grad.dtype)
        db = None if bias_dtype is None else grad.sum((0, 2, 3))
    else:
        backward = (by or EAGER).activation_backward
        grad, db = backward(grad, y, step.activation, bias=bias_dtype is not None, required=required)
    made = by or EAGER
    dx = None
    if need_x:
        # As of torch's convolution. Where its memory fits both formats, the kernels store channels-last.
        of_x, of_weight = ctx.strides
        last = suggests_channels_last(ctx.x, of_x) or suggests_channels_last(weight.shape, of_weight)
        stored = last or has_both(ctx.x[1], ctx.x[2:])
        dx = _input_gradient(grad, weight, ctx.x[2:], stored, ctx, made)
        if stored != last and not dispatch.is_batched(dx):
            dx = restrided(dx, new_strides(dx.shape, last))
    dw = made.weight_gradient(x, grad, weight, step.bare, required) if need_weight else None
    return dx, dw, None if db is None or bias_dtype is None else db.to(bias_dtype)


def wgrad_setup(ctx: Any, x: Tensor, grad: Tensor, step: Step, required: bool) -> None:
    ctx.step, ctx.required = step, required
    ctx.save_for_backward(x, grad)


def wgrad_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the convolution's input and of its result's gradient, for ``v`` like the weight."""
    x, grad = ctx.saved_tensors
    need_x, need_grad, *_ = ctx.needs_input_grad
    dx = _input_gradient(grad, v, x.shape[2:], is_channels_last(x), ctx, EAGER) if need_x else None
    dg = convolution(x, v, None, ctx.step, is_channels_last(grad), ctx.required) if need_grad else None
    return dx, dg


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        step: Step,
        channels_last: bool,
        required: bool,
        statistics: str | None,
    ) -> Any:
        y, partials = conv_forward(x, weight, bias, step, channels_last, required, statistics)
        conv_setup(ctx, x, weight, bias, y, step, required)
        if partials is None:
            return y
        ctx.mark_non_differentiable(*partials)
        ctx.set_materialize_grads(False)  # of the statistics, which have none
        return y, *partials

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_partials: None) -> Any:
        return (None,) * 7 if grad is None else (*conv_backward(ctx, grad), None, None, None, None)


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, like: Tensor, step: Step, required: bool) -> Tensor:
        wgrad_setup(ctx, x, grad, step, required)
        return wgrad_forward(x, grad, like, step, required)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        return *wgrad_backward(ctx, v), None, None, None


def recorded(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, step: Step, channels_last: bool, required: bool
) -> Tensor:
    """``act(conv(x) + bias)``, a step that folds (`Step.folds`) and pads by zeros, differentiable any number of times.

    x (N, C_in, H, W), weight as ``step.spec`` has it. ``required``: the kernels run or raise, otherwise PyTorch's
    operators stand in for them where they cannot.
    """
    if dispatch.is_batched(x) or dispatch.is_batched(weight):  # of gradients: PyTorch's operators take them
        return reference.conv_block(x, weight, bias, step.spec, activation=step.activation)
    if recorded(x, weight, bias):
        return _Convolution.apply(x, weight, bias, step, channels_last, required, None)
    return conv_forward(x, weight, bias, step, channels_last, required)[0]


def weight_gradient(x: Tensor, grad: Tensor, like: Tensor, step: Step, required: bool) -> Tensor:
    """The gradient of the convolution's weight, with the strides of ``like``; differentiable any number of times."""
    if dispatch.is_batched(x) or dispatch.is_batched(grad):
        return conv_wgrad.by_torch(x, grad, like, step.spec)
    if recorded(x, grad):
        return _WeightGradient.apply(x, grad, like.detach(), step, required)
    return wgrad_forward(x, grad, like, step, required)


EAGER = Primitives(convolution, weight_gradient, activation_backward)


def with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, step: Step, required: bool, statistics: str | None
) -> tuple[Tensor, Partials | None]:
    """The convolution channels-last, and its statistics as of `conv_forward`."""
    if not recorded(x, weight, bias):
        return conv_forward(x, weight, bias, step, True, required, statistics)
    out = _Convolution.apply(x, weight, bias, step, True, required, statistics)
    return (out, None) if isinstance(out, Tensor) else (out[0], Partials(*out[1:]))
