"""Normalisation, residual and activation by PyTorch's operators: the path without kernels, and the differentiable
composition that a second derivative takes."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import Activation
from ..norms import NormCall

__all__ = ["composition", "per_channel", "run"]

# These save their result in either form. In place, other activations would keep a copy of their input, or save their
# result where eager's saves the input: a caller's own in-place operation on the result would then be an error.
_IN_PLACE = {"relu": torch.relu_, "tanh": torch.tanh_, "sigmoid": torch.sigmoid_}


def per_channel(v: Tensor, like: Tensor) -> Tensor:
    """(C,) as (C, 1, ...): broadcast against ``like``."""
    return v.reshape(-1, *(1,) * (like.dim() - 2))


def run(
    x: Tensor, call: NormCall | None, residual: Tensor | None, activation: Activation, slope: Tensor | None
) -> Tensor:
    """``act(norm(x) + residual)`` as an unfused model computes it, in place where autograd allows that."""
    from .norm_sync import shared, synchronised  # built on this file

    if call is None:
        y = x
    else:
        y = synchronised(x, call) if shared(call) else _norm(x, call)
    ours = call is not None and not y._is_view()
    if residual is not None:
        dtype = torch.promote_types(y.dtype, residual.dtype)
        # What computed y saved its input, not y.
        y = y.add_(residual) if ours and y.dtype == dtype else y + residual
        ours = True
    in_place = _IN_PLACE.get(activation.name)
    if in_place is not None and ours and not torch.compiler.is_compiling():
        return in_place(y)
    return activation(y, None if slope is None else slope.to(y.dtype))


def _norm(x: Tensor, call: NormCall) -> Tensor:
    kind = call.norm.kind
    if kind == "affine":
        return _affine(x, call.weight, call.bias)
    running = [t for t in (call.running_mean, call.running_var) if t is not None]
    vectors = {t.dtype for t in (*running, call.weight, call.bias) if t is not None}
    if vectors <= {x.dtype} or (x.dtype.itemsize == 2 and vectors == {torch.float32}):
        return _by_torch(x, call)
    # Dtypes that PyTorch does not combine: everything in the widest, running tensors written back.
    wide = torch.float64 if torch.float64 in {x.dtype, *vectors} else torch.float32
    tensors: dict[str, Any] = {k: v.to(wide) for k, v in call._asdict().items() if isinstance(v, Tensor)}
    y = _by_torch(x.to(wide), call._replace(**tensors)).to(x.dtype)
    if call.use_input_stats:
        for name in ("running_mean", "running_var"):
            given = getattr(call, name)
            if given is not None and tensors[name] is not given:
                given.copy_(tensors[name])
    return y


def _by_torch(x: Tensor, call: NormCall) -> Tensor:
    norm, weight, bias, mean, var, measured, momentum, _ = call
    if norm.kind == "group":
        # Of channels-last tensors, PyTorch's CPU kernel computes E[x^2] - E[x]^2.
        x = x.contiguous() if x.device.type == "cpu" else x
        return F.group_norm(x, norm.groups, weight, bias, norm.eps)
    if norm.kind == "instance" and measured and x.shape[0] != 1:
        return F.instance_norm(x, mean, var, weight, bias, measured, momentum, norm.eps)
    if norm.kind == "instance":
        # Of one image it is the batch norm (whose gradient is right where that of F.instance_norm is not, on a CPU, for
        # a channels-last gradient), without the check of F.batch_norm that eps is positive.
        cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(x, weight, bias, mean, var, measured, momentum, norm.eps, cudnn)
    return F.batch_norm(x, mean, var, weight, bias, measured, momentum, norm.eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x * weight + bias``, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if weight is not None:
        y = y * per_channel(weight.to(wide), x)
    if bias is not None:
        y = y + per_channel(bias.to(wide), x)
    return y.to(x.dtype, copy=y is x)


def composition(x: Tensor, call: NormCall | None) -> Tensor:
    """The norm of x (N, C, ...) made of elementary operations, in float32 or x's wider dtype; differentiable any
    number of times, its statistics included. Running tensors stay as they are."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    if call is None:
        return y
    norm = call.norm
    if call.measured:
        shape, dims = y.shape, tuple(range(2, y.dim()))
        if norm.kind == "group":
            y, dims = y.reshape(shape[0], norm.groups, math.prod(shape[1:]) // norm.groups), (2,)
        elif norm.kind == "batch":
            dims = (0, *dims)
        var, mean = torch.var_mean(y, dims, correction=0, keepdim=True)
        y = ((y - mean) * torch.rsqrt(var + norm.eps)).reshape(shape)
    elif norm.kind != "affine":
        assert call.running_mean is not None and call.running_var is not None
        mean, var = (per_channel(t.detach().to(y.dtype), y) for t in (call.running_mean, call.running_var))
        y = (y - mean) * torch.rsqrt(var + norm.eps)
    if call.weight is not None:
        y = y * per_channel(call.weight.to(y.dtype), y)
    if call.bias is not None:
        y = y + per_channel(call.bias.to(y.dtype), y)
    return y
