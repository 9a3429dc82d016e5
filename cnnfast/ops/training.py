"""Convolutions with gradients on the Triton kernels, and fused steps made of them.

A convolution, its input gradient (the convolution of the adjoint geometry with the same weight) and its weight gradient
are linear in each of two tensors, and the derivative of each is made of the other two. So every backward here calls the
differentiable functions of this file, and derivatives of any order run on the same kernels.

`conv_setup`, `conv_backward`, `wgrad_setup` and `wgrad_backward` are the formulas; the `torch.autograd.Function`s of
eager mode use them, and so do the operators that `torch.compile` sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, reference
from ..activations import activation_derivative
from ..block import Operands, Step
from ..gradients import enter, restrided
from ..memory_format import has_both, is_channels_last, new_strides
from ..norms import Norm, NormCall, Partials
from ..spec import Activation, ConvSpec
from . import launch, wgrad
from .core import to_format
from .normalise import activation_backward, normalise
from .weights import summed_weight

__all__ = [
    "How",
    "conv_backward",
    "conv_forward",
    "conv_setup",
    "convolution",
    "run",
    "weight_gradient",
    "wgrad_backward",
    "wgrad_forward",
    "wgrad_setup",
]


@dataclass(frozen=True)
class How:
    """A convolution that pads by zeros, with an activation whose derivative its result gives; ``required``: the kernels
    run or raise, otherwise PyTorch's operators stand in for them where they cannot."""

    spec: ConvSpec
    activation: Activation = Activation()
    channels_last: bool = True
    required: bool = False

    @property
    def backend(self) -> str:
        return "triton" if self.required else "auto"

    @cached_property
    def step(self) -> Step:
        return Step(self.spec, self.activation)

    @cached_property
    def bare(self) -> Step:
        """Without the activation."""
        return Step(self.spec)


# The same objects in every step of a training: what they keep is found once.
_IDENTITY = Activation()
_how = lru_cache(maxsize=4096)(How)


@lru_cache(maxsize=4096)
def _how_of_input(spec: ConvSpec, size: tuple[int, int], channels_last: bool, required: bool) -> How:
    """The input gradient of a convolution of x with spatial ``size``."""
    return How(spec.adjoint(size), _IDENTITY, channels_last, required)


# --- the two operators, without gradients -----------------------------------------------------------------------------


def _launches(x: Tensor, weight: Tensor, how: How) -> bool:
    """Whether the kernel is to run. Few channels are no obstacle to it where it is required."""
    reason = dispatch.why_not(how.bare, Operands(x, weight), few_channels=how.required)
    if reason is None and how.required:
        reason = dispatch.launch_why_not(x.device)
    if reason is not None and how.required:
        raise RuntimeError(f'backend="triton" cannot run this: {reason}')
    return reason is None


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, how: How, statistics: str | None = None
) -> tuple[Tensor, Partials | None]:
    """``act(conv(x) + bias)`` and, where tiles allow it, its statistics of the "batch" or each "image"."""
    if _launches(x, weight, how):
        o = Operands(x, weight, bias)
        both = launch.run_with_statistics(how.step, o, how.channels_last, statistics, required=how.required)
        if both is not None:
            return both
    y = reference.conv_block(x, weight, bias, how.spec, activation=how.activation)
    return to_format(y, how.channels_last), None


def wgrad_forward(x: Tensor, grad: Tensor, like: Tensor, how: How) -> Tensor:
    """Gradient of the convolution's weight, with the shape, dtype and strides of ``like``."""
    if _launches(x, like, how):
        dw = wgrad.run(x, grad, how.spec, like, required=how.required)
        if dw is not None:
            return dw
    return torch.empty_like(like).copy_(wgrad.by_torch(x, grad, like, how.spec))


# --- their derivatives ------------------------------------------------------------------------------------------------


def _input_gradient(grad: Tensor, weight: Tensor, size: tuple[int, int], channels_last: bool, how: How) -> Tensor:
    """Of a convolution of x with spatial ``size``, for the gradient of its result."""
    dx = convolution(grad, weight, None, _how_of_input(how.spec, size, channels_last, how.required))
    # An output padding that reaches the stride gives the adjoint positions that x does not have.
    return to_format(dx[:, :, : size[0], : size[1]], channels_last) if dx.shape[2:] != size else dx


def conv_setup(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, how: How) -> None:
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    ctx.how, ctx.size = how, tuple(x.shape[2:])
    # Of x's gradient, as of torch's convolution. Where its memory fits both formats, the kernels store channels-last.
    ctx.like_torch = is_channels_last(x) or is_channels_last(weight)
    ctx.channels_last = ctx.like_torch or has_both(x.shape[1], x.shape[2:])
    ctx.bias_dtype = None if bias is None or not need_bias else bias.dtype
    ctx.save_for_backward(
        x if need_weight else None,
        weight if need_x or need_weight else None,  # the weight gradient has its strides
        y if how.activation.saves() == "y" else None,
    )


def conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, differentiable where grad mode is on."""
    x, weight, y = ctx.saved_tensors
    how, bias_dtype = ctx.how, ctx.bias_dtype
    need_x, need_weight, *_ = ctx.needs_input_grad
    db: Tensor | None
    if torch.is_grad_enabled() or dispatch.is_batched(grad):
        if y is not None:
            grad = grad * activation_derivative(how.activation, y).to(grad.dtype)
        db = None if bias_dtype is None else grad.sum((0, 2, 3))
    else:
        grad, db = activation_backward(grad, y, how.activation, bias=bias_dtype is not None, backend=how.backend)
    dx = _input_gradient(grad, weight, ctx.size, ctx.channels_last, how) if need_x else None
    if dx is not None and ctx.channels_last != ctx.like_torch and not dispatch.is_batched(dx):
        dx = restrided(dx, new_strides(dx.shape, ctx.like_torch))
    dw = weight_gradient(x, grad, weight, _how(how.spec, _IDENTITY, True, how.required)) if need_weight else None
    return dx, dw, None if db is None or bias_dtype is None else db.to(bias_dtype)


def wgrad_setup(ctx: Any, x: Tensor, grad: Tensor, how: How) -> None:
    ctx.how = how
    ctx.save_for_backward(x, grad)


def wgrad_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the convolution's input and of its result's gradient, for ``v`` like the weight."""
    x, grad = ctx.saved_tensors
    need_x, need_grad, *_ = ctx.needs_input_grad
    dx = _input_gradient(grad, v, tuple(x.shape[2:]), is_channels_last(x), ctx.how) if need_x else None
    if not need_grad:
        return dx, None
    how = _how(ctx.how.spec, _IDENTITY, is_channels_last(grad), ctx.how.required)
    return dx, convolution(x, v, None, how)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: How, statistics: str | None) -> Any:
        y, partials = conv_forward(x, weight, bias, how, statistics)
        conv_setup(ctx, x, weight, bias, y, how)
        if partials is None:
            return y
        ctx.mark_non_differentiable(*partials)
        ctx.set_materialize_grads(False)  # of the statistics, which have none
        return y, *partials

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *of_partials: None) -> Any:
        return (None,) * 5 if grad is None else (*conv_backward(ctx, grad), None, None)


class _WeightGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, like: Tensor, how: How) -> Tensor:
        wgrad_setup(ctx, x, grad, how)
        return wgrad_forward(x, grad, like, how)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Any:
        return *wgrad_backward(ctx, v), None, None


def _recorded(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, how: How) -> Tensor:
    """``act(conv(x) + bias)``, differentiable any number of times. x (N, C_in, H, W), weight as ``how.spec`` has it."""
    if dispatch.is_batched(x) or dispatch.is_batched(weight):  # of gradients: PyTorch's operators take them
        return reference.conv_block(x, weight, bias, how.spec, activation=how.activation)
    if _recorded(x, weight, bias):
        return _Convolution.apply(x, weight, bias, how, None)
    return conv_forward(x, weight, bias, how)[0]


def weight_gradient(x: Tensor, grad: Tensor, like: Tensor, how: How) -> Tensor:
    """The gradient of the convolution's weight, with the strides of ``like``; differentiable any number of times."""
    if dispatch.is_batched(x) or dispatch.is_batched(grad):
        return wgrad.by_torch(x, grad, like, how.spec)
    if _recorded(x, grad):
        return _WeightGradient.apply(x, grad, like.detach(), how)
    return wgrad_forward(x, grad, like, how)


def _with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, how: How, statistics: str | None
) -> tuple[Tensor, Partials | None]:
    if not _recorded(x, weight, bias):
        return conv_forward(x, weight, bias, how, statistics)
    out = _Convolution.apply(x, weight, bias, how, statistics)
    return (out, None) if isinstance(out, Tensor) else (out[0], Partials(*out[1:]))


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
    return normalise(
        u,
        call,
        o.residual,
        step.activation,
        o.slope,
        partials=partials,
        channels_last=channels_last,
        backend=how.backend,
    )
