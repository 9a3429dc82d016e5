"""Convolutions with gradients on the Triton kernels, and fused steps made of them.

A convolution, its input gradient (the convolution of the adjoint geometry with the same weight) and its weight gradient
are linear in each of two tensors, and the derivative of each is made of the other two. So every backward here calls the
differentiable functions of this file, and derivatives of any order run on the same kernels.

`conv_setup`, `conv_backward`, `wgrad_setup` and `wgrad_backward` are the formulas; the `torch.autograd.Function`s of
eager mode use them, and so do the operators that `torch.compile` sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from .devices import precision_of
from .norm_act_autograd import activation_backward
from .why_not import launch_why_not, why_not

__all__ = [
    "OfConv",
    "Primitives",
    "conv_backward",
    "conv_forward",
    "conv_setup",
    "convolution",
    "input_format",
    "input_gradient_step",
    "launches",
    "recorded",
    "weight_gradient",
    "wgrad_backward",
    "wgrad_forward",
    "wgrad_setup",
]


@lru_cache(maxsize=4096)
def input_gradient_step(step: Step, size: torch.Size) -> Step:
    """The input gradient of a convolution of x with spatial ``size``."""
    return Step(step.spec.adjoint(size))


# --- the two operators, without gradients -----------------------------------------------------------------------------


def launches(x: Tensor, weight: Tensor, step: Step, required: bool) -> bool:
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
    launch: conv.Launch | None = None,
) -> tuple[Tensor, Partials | None]:
    """``act(conv(x) + bias)`` and, where tiles allow it, its statistics of the "batch" or each "image". ``launch``:
    that of the kernel, where it is known to run."""
    if launch is not None or launches(x, weight, step, required):
        o = Operands(x, weight, bias)
        both = conv.run_with_statistics(step, o, channels_last, statistics, None, required, launch)
        if both is not None:
            return both
    y = reference.conv_block(x, weight, bias, step.spec, activation=step.activation)
    return to_format(y, channels_last), None


def wgrad_forward(
    x: Tensor,
    grad: Tensor,
    like: Tensor,
    step: Step,
    required: bool,
    launch: conv_wgrad.WgradLaunch | None = None,
) -> Tensor:
    """Gradient of the convolution's weight, with the shape, dtype and strides of ``like``. ``launch``: as above."""
    if launch is not None or launches(x, like, step, required):
        dw = conv_wgrad.run(x, grad, step.spec, like, None, required, launch)
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
    grad: Tensor, weight: Tensor, size: torch.Size, channels_last: bool, step: Step, required: bool, by: Primitives
) -> Tensor:
    """Of a convolution of x with spatial ``size``, for the gradient of its result."""
    # Symbolic sizes have no hash.
    of_input = input_gradient_step if type(size[0]) is int else input_gradient_step.__wrapped__
    dx = by.convolution(grad, weight, None, of_input(step, size), channels_last, required)
    # An output padding that reaches the stride gives the adjoint positions that x does not have.
    if dx.shape[2:] == size:
        return dx
    for dim, n in enumerate(size, 2):
        dx = dx.narrow(dim, 0, n)
    return to_format(dx, channels_last)


def input_format(
    size: Sequence[int], strides: Sequence[int], weight: Sequence[int], weight_strides: Sequence[int]
) -> tuple[bool, bool]:
    """Whether the input's gradient is channels-last, as of torch's convolution, and whether the kernels store it so:
    always where its memory fits both formats."""
    last = suggests_channels_last(size, strides) or suggests_channels_last(weight, weight_strides)
    return last, last or has_both(size[1], size[2:])


class OfConv(NamedTuple):
    """What a backward knows beside the tensors that it saved."""

    step: Step
    required: bool
    x: torch.Size
    strides: tuple[tuple[int, ...], tuple[int, ...]]  # of x and the weight
    bias_dtype: torch.dtype | None  # None where the bias gets no gradient
    launch: conv.Launch | None


def conv_setup(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    step: Step,
    required: bool,
    need: Sequence[bool],
    launch: conv.Launch | None = None,
) -> tuple[OfConv, tuple[Tensor | None, ...]]:
    """What `conv_backward` takes of a forward: what it knows, and the tensors to save. ``need``: which of x, weight
    and bias get gradients. ``launch``: the forward's, which keeps those of its gradients."""
    need_x, need_weight, need_bias = need
    saved = (
        x if need_weight else None,
        weight if need_x or need_weight else None,  # the weight gradient has its strides
        y if step.saves == "y" else None,
    )
    bias_dtype = None if bias is None or not need_bias else bias.dtype
    return OfConv(step, required, x.shape, (x.stride(), weight.stride()), bias_dtype, launch), saved


def conv_backward(
    of: OfConv, tensors: Sequence[Tensor | None], need: Sequence[bool], grad: Tensor, by: Primitives | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, as ``need`` asks for each, differentiable where grad mode is on. ``of`` and
    ``tensors`` as `conv_setup` gave them. ``by``: operators of a traced backward."""
    x, weight, y = tensors
    step, required, size, (of_x, of_weight), bias_dtype, launch = of
    need_x, need_weight, *_ = need
    db: Tensor | None
    if by is None and (torch.is_grad_enabled() or dispatch.is_batched(grad)):
        by = EAGER
        if y is not None:
            grad = grad * activation_derivative(step.activation, y).to(grad.dtype)
        db = None if bias_dtype is None else grad.sum((0, *range(2, grad.dim())))
    else:
        backward = (by or EAGER).activation_backward
        grad, db = backward(grad, y, step.activation, bias=bias_dtype is not None, required=required)
    if by is None:
        by = EAGER if launch is None else _bound(launch.bound, required)
    dx = None
    if need_x:
        assert weight is not None
        last, stored = input_format(size, of_x, weight.shape, of_weight)
        dx = _input_gradient(grad, weight, size[2:], stored, step, required, by)
        if stored != last and not dispatch.is_batched(dx):
            dx = restrided(dx, new_strides(dx.shape, last))
    dw = by.weight_gradient(x, grad, weight, step.bare, required) if need_weight else None
    return dx, dw, None if db is None or bias_dtype is None else db.to(bias_dtype)


def wgrad_setup(ctx: Any, x: Tensor, grad: Tensor, step: Step, required: bool) -> None:
    ctx.step, ctx.required = step, required
    ctx.save_for_backward(x, grad)


def wgrad_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the convolution's input and of its result's gradient, for ``v`` like the weight."""
    x, grad = ctx.saved_tensors
    need_x, need_grad, *_ = ctx.needs_input_grad
    step, required = ctx.step, ctx.required
    dx = _input_gradient(grad, v, x.shape[2:], is_channels_last(x), step, required, EAGER) if need_x else None
    dg = convolution(x, v, None, step, is_channels_last(grad), required) if need_grad else None
    return dx, dg


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, step: Step, channels_last: bool, required: bool
    ) -> Tensor:
        launch = None
        if x.numel() and weight.numel() and launches(x, weight, step, required):
            launch = conv.lookup(step, Operands(x, weight, bias), channels_last)
        y, _ = conv_forward(x, weight, bias, step, channels_last, required, None, launch)
        ctx.of, saved = conv_setup(x, weight, bias, y, step, required, ctx.needs_input_grad[:3], launch)
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *conv_backward(ctx.of, ctx.saved_tensors, ctx.needs_input_grad[:3], grad), None, None, None


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, like: Tensor, step: Step, required: bool) -> Tensor:
        wgrad_setup(ctx, x, grad, step, required)
        return wgrad_forward(x, grad, like, step, required)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        return *wgrad_backward(ctx, v), None, None, None


def recorded(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, step: Step, channels_last: bool, required: bool
) -> Tensor:
    """``act(conv(x) + bias)``, a step that folds (`Step.folds`) and pads by zeros, differentiable any number of times.

    x (N, C_in, *size), weight as ``step.spec`` has it. ``required``: the kernels run or raise, otherwise PyTorch's
    operators stand in for them where they cannot.
    """
    if dispatch.is_batched(x) or dispatch.is_batched(weight):  # of gradients: PyTorch's operators take them
        return reference.conv_block(x, weight, bias, step.spec, activation=step.activation)
    if recorded(x, weight, bias):
        return _Convolution.apply(x, weight, bias, step, channels_last, required)
    return conv_forward(x, weight, bias, step, channels_last, required)[0]


def weight_gradient(x: Tensor, grad: Tensor, like: Tensor, step: Step, required: bool) -> Tensor:
    """The gradient of the convolution's weight, with the strides of ``like``; differentiable any number of times."""
    if dispatch.is_batched(x) or dispatch.is_batched(grad):
        return conv_wgrad.by_torch(x, grad, like, step.spec)
    if recorded(x, grad):
        return _WeightGradient.apply(x, grad, like.detach(), step, required)
    return wgrad_forward(x, grad, like, step, required)


EAGER = Primitives(convolution, weight_gradient, activation_backward)


def _bound(kept: dict[Any, Any], required: bool) -> Primitives:
    """Those of a backward that nothing differentiates, of a convolution whose tensors have one shape and device: what
    they launch is looked up once, and ``kept``."""
    by: Primitives | None = kept.get(required)
    if by is not None:
        return by

    def convolution(
        x: Tensor, weight: Tensor, bias: Tensor | None, step: Step, channels_last: bool, required: bool
    ) -> Tensor:
        key = (channels_last, required, precision_of(x.dtype), weight.dtype, weight.stride())
        launch = kept.get(key)
        if launch is None and x.shape[0] and launches(x, weight, step, required):
            launch = kept[key] = conv.lookup(step, Operands(x, weight), channels_last)
        return conv_forward(x, weight, bias, step, channels_last, required, None, launch)[0]

    def weight_gradient(x: Tensor, grad: Tensor, like: Tensor, step: Step, required: bool) -> Tensor:
        key = (required, precision_of(x.dtype), grad.dtype, like.dtype, like.stride())
        launch = kept.get(key)
        if launch is None and x.shape[0] and launches(x, like, step, required):
            launch = kept[key] = conv_wgrad.lookup(x, grad, step.spec, torch.empty_like(like, device="meta"))
        return wgrad_forward(x, grad, like, step, required, launch)

    by = kept[required] = Primitives(convolution, weight_gradient, activation_backward)
    return by
