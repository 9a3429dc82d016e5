"""Norms in training on a CPU, channels-last: by ATen where its statistics bear that."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import is_batched
from ..memory_format import convert
from ..norms import Norm, per_channel
from ..reference import of_one_image
from ..step import Operands
from .norm_statistics import MOST, is_far, normalise, statistics

__all__ = ["normalised"]

# --- norm, residual, activation ---------------------------------------------------------------------------------------

# Channels-last, ATen adds a channel's values up one after the other (batch norm) or takes E[x^2] - E[x]^2 (group norm).
# Neither bears a mean of many deviations, so that a norm whose statistics say so is done again on the values less that
# mean, which it does not depend on.
_FAR_BATCH, _FAR_GROUP = 8.0, 2.0


def _shifted(o: Operands, mean: Tensor) -> Operands:
    """x less its ``mean`` (broadcast), in float32 at least, and vectors of that dtype."""
    wide = torch.promote_types(o.x.dtype, torch.float32)
    scale, shift = (None if t is None else t.to(wide) for t in (o.scale, o.shift))
    return o._replace(x=o.x.to(wide) - mean.detach().to(wide), scale=scale, shift=shift)


class _BatchNorm(torch.autograd.Function):
    """BatchNorm of a channels-last y by its ``mean`` and variance (C,), and one over its deviation, ``inverse``."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        inverse: Tensor,
        eps: float,
    ) -> Tensor:
        z, _, _ = torch.native_batch_norm(y, weight, bias, mean, var, False, 0.0, eps)
        ctx.eps = eps
        ctx.save_for_backward(y, weight, bias, mean, inverse)
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, mean, inverse = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled() and not is_batched(grad):
            given = convert(grad, y.dtype, True), convert(y, y.dtype, True), weight, None, None, mean, inverse
            found = torch.ops.aten.native_batch_norm_backward(*given, True, ctx.eps, need)
            return *(g if n else None for g, n in zip(found, need, strict=True)), *(None,) * 4

        def plainly(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return F.batch_norm(y.contiguous(), None, None, weight, bias, True, 0.0, ctx.eps)

        return *_differentiated(plainly, (y, weight, bias), need, grad), *(None,) * 4


def _by_parts(o: Operands, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm as `_batch_norm`, of so many values that their sums are taken by parts: with mean and one over the
    deviation."""
    x = o.x.detach()
    values = x.numel() // x.shape[1]
    mean, var = (torch.from_numpy(t).float() for t in statistics(x.movedim(1, -1).reshape(values, -1), 1))
    if o.mean is not None:
        o.mean.data.lerp_(mean, o.momentum)
    if o.var is not None:
        o.var.data.lerp_(var * (values / (values - 1)), o.momentum)
    inverse = (var + eps).rsqrt_()
    return _BatchNorm.apply(o.x, o.scale, o.shift, mean, var, inverse, eps), mean, inverse


def _long(x: Tensor, values: int) -> bool:
    """Whether sums of so many values, one after the other, are not exact of a map that is flat for the most part."""
    return x.dtype == torch.float32 and values > MOST * torch.get_num_threads()


def _batch_norm(o: Operands, eps: float, shifted: bool = False) -> Tensor:
    """BatchNorm by the statistics of x (N, C, *size), of more than one value per channel."""
    running = o.mean, o.var
    before = [None if t is None else t.detach().clone() for t in running]
    if _long(o.x, o.x.numel() // o.x.shape[1]):
        z, mean, inverse = _by_parts(o, eps)
    else:
        z, mean, inverse = torch.native_batch_norm(o.x, o.scale, o.shift, *running, True, o.momentum, eps)
    if shifted or not is_far(mean.detach(), inverse.detach(), _FAR_BATCH):
        return z
    # `data`: ATen's own updates are no new version to autograd either, which has the running tensors of earlier calls.
    for t, old in zip(running, before, strict=True):
        if t is not None and old is not None:
            t.data.copy_(old)
    z = _batch_norm(_shifted(o, per_channel(mean, o.x)), eps, shifted=True)
    if o.mean is not None:
        o.mean.data.add_(mean.detach(), alpha=o.momentum)
    return z.to(o.x.dtype)


def _instance_norm(o: Operands, eps: float) -> Tensor:
    """InstanceNorm as the BatchNorm of every image: ATen's own brings x into NCHW and back (and for a batch of one, its
    input gradient is wrong where the incoming gradient is channels-last)."""
    images = []
    for image in o.x.split(1):
        alone = o._replace(x=image)
        exact = of_one_image(alone, eps)
        images.append(_batch_norm(alone, eps) if exact is None else exact)
    return images[0] if len(images) == 1 else torch.cat(images)


class _GroupNorm(torch.autograd.Function):
    """`torch.native_group_norm` of a channels-last y. PyTorch's own derivative (2.13) ends the process where those of
    weight and bias are wanted and that of y is not: here it is always taken."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> tuple[Tensor, ...]:
        n, c, *size = y.shape
        if _long(y, math.prod(size)):
            z = torch.empty_like(y)
            each = normalise(norm, Operands(y, scale=weight, shift=bias), z)
            mean, var = (torch.from_numpy(np.stack(t)).float() for t in zip(*each, strict=True))
            rstd = (var + norm.eps).rsqrt_()
        else:
            z, mean, rstd = torch.native_group_norm(y, weight, bias, n, c, math.prod(size), norm.groups, norm.eps)
        ctx.norm = norm
        ctx.save_for_backward(y, weight, bias, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return z, mean, rstd

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        y, weight, bias, mean, rstd = ctx.saved_tensors
        need, norm = ctx.needs_input_grad[:3], ctx.norm
        if grad is None:
            return None, None, None, None
        if not torch.is_grad_enabled() and not is_batched(grad):
            n, c, *size = y.shape
            # Both channels-last, whatever hooks on saved tensors made of y: it reads memory as if they were alike.
            grad, y = (convert(t, y.dtype, True) for t in (grad, y))
            grads = torch.ops.aten.native_group_norm_backward(
                grad, y, mean, rstd, weight, n, c, math.prod(size), norm.groups, (True, *need[1:])
            )
            return grads[0] if need[0] else None, *grads[1:], None

        def plainly(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return F.group_norm(y.contiguous(), norm.groups, weight, bias, norm.eps)

        return *_differentiated(plainly, (y, weight, bias), need, grad), None


def _differentiated(
    function: Callable[..., Tensor], given: Sequence[Tensor | None], need: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The derivatives of ``function`` by what is needed of what it is ``given``, with a graph of their own."""
    # Aliases: y may depend on the vectors elsewhere.
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs: list[Any] = [None if t is None else t.view_as(t) for t in given]
        wanted = [t for t, n in zip(inputs, need, strict=True) if n]
        found = iter(torch.autograd.grad(function(*inputs), wanted, grad, create_graph=recorded))
    return tuple([next(found) if n else None for n in need])


def _group_norm(o: Operands, norm: Norm, shifted: bool = False) -> Tensor:
    z, mean, inverse = _GroupNorm.apply(o.x, o.scale, o.shift, norm)
    if shifted or _long(o.x, math.prod(o.x.shape[2:])) or not is_far(mean.detach(), inverse.detach(), _FAR_GROUP):
        return z
    n, c = o.x.shape[:2]
    mean = mean.repeat_interleave(c // norm.groups, 1).view(n, c, *(1,) * (o.x.dim() - 2))
    return _group_norm(_shifted(o, mean), norm, shifted=True).to(o.x.dtype)


def normalised(norm: Norm, o: Operands) -> Tensor | None:
    """The norm of a channels-last x; None where `reference` is to do it (it also has the errors for too few values)."""
    x = o.x
    n, c, *size = x.shape
    values = math.prod(size)
    wide = torch.promote_types(x.dtype, torch.float32)
    running = [t for t in (o.mean, o.var) if t is not None]
    affine = {t.dtype for t in (o.scale, o.shift) if t is not None}
    # Dtypes that ATen combines, here and in `_shifted`.
    fits = all(t.dtype == wide for t in running) and (affine <= {wide} or affine == {x.dtype} and not running)
    if not norm.measured or o.group is not None or not fits or x.numel() == 0:
        return None
    if norm.kind == "batch":
        return _batch_norm(o, norm.eps) if n * values > 1 else None
    if norm.kind == "group":
        return _group_norm(o, norm) if c // norm.groups * values > 1 else None
    if norm.kind != "instance" or values == 1 or (n > 1 and (running or c * values < 2**13)):
        return None
    return _instance_norm(o, norm.eps)
