"""Convolutions with gradients as `torch.library` operators: ``cnnfast::conv``, ``conv_weight_grad`` and
``activation_backward``. Their derivatives are made of each other, so that a traced backward is made of operators, too;
formulas and launches are those of eager mode (`training`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import dispatch, reference
from ..activations import Activation
from ..dispatch import watched
from ..memory_format import to_format
from ..spec import ConvSpec

if TYPE_CHECKING:
    from .conv_autograd import How

__all__ = ["activation_backward", "conv", "conv_backward", "conv_weight_grad"]


# --- values as arguments of operators ---------------------------------------------------------------------------------


def geometry_of(s: ConvSpec) -> tuple[Any, ...]:
    return s.transposed, list(s.stride), list(s.padding), list(s.output_padding), list(s.dilation), s.groups


def spec_of(
    weight: Tensor,
    transposed: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvSpec:
    first, second, *kernel = weight.shape
    channels = (first, second * groups) if transposed else (second * groups, first)
    ints = (tuple(kernel), tuple(stride), tuple(padding), tuple(output_padding), tuple(dilation))
    return ConvSpec(transposed, *channels, *ints, groups)


def how_of(spec: ConvSpec, activation: Activation, channels_last: bool, backend: str | None) -> How:
    from .conv_autograd import How

    return How(spec, activation, channels_last, dispatch.resolve_backend(backend) == "triton")


def by_kernels(x: Tensor, backend: str | None) -> bool:
    name = dispatch.resolve_backend(backend)
    return name == "triton" or name == "auto" and x.is_cuda


def empty_of(x: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=fmt)


def own(t: Tensor, *others: Tensor) -> Tensor:
    """``t`` as a tensor of its own, which an operator may return."""
    pointer = t.untyped_storage().data_ptr()
    return t.clone() if any(o.untyped_storage().data_ptr() == pointer for o in others) and t.numel() else t


# --- convolution ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("cnnfast::conv", mutates_args=())
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    params: Sequence[float],
    channels_last: bool,
    backend: str | None,
) -> Tensor:
    spec = spec_of(weight, transposed, stride, padding, output_padding, dilation, groups)
    act = Activation(activation, tuple(params))
    if by_kernels(x, backend):
        from .conv_autograd import conv_forward

        return conv_forward(x, weight, bias, how_of(spec, act, channels_last, backend))[0]
    return to_format(reference.conv_block(x, weight, bias, spec, activation=act), channels_last)


@conv.register_fake
def conv_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    spec = spec_of(weight, *args[:6])
    return empty_of(x, (x.shape[0], spec.out_channels, *spec.output_size(x.shape[2:])), args[8])


@torch.library.custom_op("cnnfast::conv_weight_grad", mutates_args=())
def conv_weight_grad(
    x: Tensor,
    grad: Tensor,
    like: Tensor,
    transposed: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str | None,
) -> Tensor:
    from . import conv_wgrad
    from .conv_autograd import wgrad_forward

    spec = spec_of(like, transposed, stride, padding, output_padding, dilation, groups)
    if by_kernels(x, backend):
        return wgrad_forward(x, grad, like, how_of(spec, Activation(), True, backend))
    return torch.empty_like(like).copy_(conv_wgrad.by_torch(x, grad, like, spec))


@conv_weight_grad.register_fake
def conv_weight_grad_fake(x: Tensor, grad: Tensor, like: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(like)


@torch.library.custom_op("cnnfast::activation_backward", mutates_args=())
def activation_backward(
    grad: Tensor,
    saved: Tensor | None,
    activation: str,
    params: Sequence[float],
    bias: bool,
    channels_last: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    from . import norm_act_autograd

    act = Activation(activation, tuple(params))
    dz, db = norm_act_autograd.activation_backward(grad, saved, act, bias=bias, backend=backend)
    none = grad.new_empty(0, dtype=torch.float32)
    dz = grad.new_empty(0) if saved is None else own(to_format(dz, channels_last), grad)
    return dz, none if db is None else db.float()


@activation_backward.register_fake
def activation_backward_fake(
    grad: Tensor,
    saved: Tensor | None,
    activation: str,
    params: Sequence[float],
    bias: bool,
    channels_last: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    dz = grad.new_empty(0) if saved is None else empty_of(grad, grad.shape, channels_last)
    return dz, grad.new_empty(grad.shape[1] if bias else 0, dtype=torch.float32)


def _traced_conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`training.conv_backward` made of operators."""
    x, weight, y = ctx.saved_tensors
    how, (need_x, need_weight, *_), want_bias = ctx.how, ctx.needs_input_grad, ctx.bias_dtype is not None
    act, backend = how.activation, how.backend
    if y is not None or want_bias:
        dz, db = activation_backward(grad, y, act.name, list(act.params), want_bias, True, backend)
        grad = grad if y is None else dz
    dx = dw = None
    if need_x:
        spec = how.spec.adjoint(ctx.size)
        dx = conv(grad, weight, None, *geometry_of(spec), "identity", [], ctx.channels_last, backend)
        dx = dx[:, :, : ctx.size[0], : ctx.size[1]] if tuple(dx.shape[2:]) != tuple(ctx.size) else dx
    if need_weight:
        dw = conv_weight_grad(x, grad, weight, *geometry_of(how.spec), backend)
    return dx, dw, db.to(ctx.bias_dtype) if want_bias else None


def conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if watched(grad) or not by_kernels(grad, ctx.how.backend):
        return _traced_conv_backward(ctx, grad)
    from . import conv_autograd

    return conv_autograd.conv_backward(ctx, grad)


def _conv_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    from .conv_autograd import conv_setup

    x, weight, bias, *geometry, activation, params, channels_last, backend = inputs
    how = how_of(spec_of(weight, *geometry), Activation(activation, tuple(params)), channels_last, backend)
    conv_setup(ctx, x, weight, bias, output, how)


conv.register_autograd(lambda ctx, grad: (*conv_backward(ctx, grad), *(None,) * 10), setup_context=_conv_setup_context)


def _wgrad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    from .conv_autograd import wgrad_setup

    x, grad, like, *geometry, backend = inputs
    wgrad_setup(ctx, x, grad, how_of(spec_of(like, *geometry), Activation(), True, backend))


def _wgrad_backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
    from .conv_autograd import wgrad_backward

    return *wgrad_backward(ctx, v), *(None,) * 8


conv_weight_grad.register_autograd(_wgrad_backward, setup_context=_wgrad_setup_context)
