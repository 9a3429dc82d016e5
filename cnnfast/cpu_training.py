"""Training steps on a CPU: a convolution (`cpu_convolution`), a norm, a residual and an activation, with gradients.

All channels-last: norms by ATen where its statistics bear that, activations in place, an upsampling collapsed into its
convolution where the weight's sums cost less than the arithmetic they save (measured; docs/facts.md).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, reference
from .activations import IN_PLACE
from .block import Operands, Step, run_reference
from .cpu import products_dtype
from .cpu_convolution import by_aten, convolution, suited
from .dispatch import is_batched
from .gradients import enter, keep_strides, plain
from .memory_format import is_channels_last
from .norms import Norm, NormCall
from .onednn import instruction_set, lowered_products
from .spec import Activation
from .summed_weight import summed_weight

__all__ = ["collapses", "packs", "run"]


def run(step: Step, o: Operands, norm: NormCall | None, channels_last: bool, *, new: bool = False) -> Tensor:
    """``step`` with ``norm`` after its convolution and ahead of residual and activation; differentiable any number of
    times. Dense CPU tensors, x, weight and bias of one floating dtype (a weight that `packs` may be float32):
    (N, C_in, H, W) -> (N, C_out, OH, OW) in x's dtype and the memory format asked for. Whoever calls it has cast for
    autocast. ``new``: the weight has just been met for the first time (`cpu.run`), and is not packed."""
    if torch.is_autocast_enabled("cpu"):  # it would round what is done in float32 on purpose
        with torch.autocast("cpu", enabled=False):
            return run(step, o, norm, channels_last, new=new)
    x = o.x
    # Of x's gradient: as torch's convolution has it, and its padding.
    of_gradient = is_channels_last(x) or is_channels_last(o.weight) and not any(step.pad)
    if norm is None and not (channels_last or of_gradient) and _gains_nothing(step, x):
        return run_reference(step, o._replace(weight=keep_strides(o.weight.to(x.dtype), False)))
    if torch.is_grad_enabled() and x.requires_grad and not (of_gradient and is_channels_last(x)):
        x = enter(x, x.dtype, True, of_gradient)
    else:
        x = cpu.convert(x, x.dtype, True)
    o = o._replace(x=x)
    if o.mean is not None or o.scale is not None or o.shift is not None:
        y = _convolved(step, x, o)
        if o.mean is not None:
            y = F.batch_norm(y, o.mean, o.var, o.scale, o.shift, training=False, eps=o.eps)
            o = o._replace(scale=None, shift=None)
        y = reference.epilogue(y, o.scale, o.shift, o.residual, step.activation, o.slope)
    else:
        packed = cpu.run(*_bare(step, o), True) if not new and packs(step, o, norm) else None
        y = _convolved(step, x, o) if packed is None else packed
        y = _finish(y if norm is not None else plain(y, channels_last), norm, step.activation, o)
    return cpu.convert(y, y.dtype, channels_last)


def _bare(step: Step, o: Operands) -> tuple[Step, Operands]:
    """The convolution of ``step`` and its bias."""
    return replace(step, activation=Activation()), Operands(o.x, o.weight, o.bias)


def packs(step: Step, o: Operands, norm: NormCall | None) -> bool:
    """Whether the convolution of ``step`` runs with a packed weight: where no gradient of it is needed and that pays.
    (Not ahead of a BatchNorm in training: its weight is another in the next step, and would be packed anew.)"""
    if norm is not None and norm.norm.kind == "batch":
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (o.x, o.weight, o.bias)):
        return False
    return cpu.why_not(*_bare(step, o)) is None


def _gains_nothing(step: Step, x: Tensor) -> bool:
    """Whether the convolution is ATen's in any case, and no faster channels-last than the conversions cost. (Tiny
    images are safer as they are, too: channels-last, oneDNN's convolutions read past the end of some, torch 2.13.)"""
    if step.upsample is not None:
        return lowered_products() or not collapses(step, x.shape, x.dtype)
    n, c, h, w = x.shape
    return by_aten(step.spec, (n, c, h + 2 * step.pad[0], w + 2 * step.pad[1]), x.dtype)


def _convolved(step: Step, x: Tensor, o: Operands) -> Tensor:
    """The convolution of ``step`` and its bias."""
    u, weight = step.upsample, o.weight.to(x.dtype)
    if u is None:
        return convolution(step.pad_input(x), weight, o.bias, step.spec)
    if lowered_products() or not collapses(step, x.shape, x.dtype):
        nchw = suited(x, weight, math.prod(u.scale))
        weight = keep_strides(weight, True if nchw is x else None)
        return reference.upsample_conv(nchw, weight, o.bias, u.scale, u.padding, u.mode, step.spec.groups)
    weight = summed_weight(keep_strides(weight, None), u.scale, step.spec.groups)
    return convolution(step.pad_input(x), weight, o.bias, step.spec)


# --- upsampling + convolution -----------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def collapses(step: Step, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether an upsampling and its convolution run as one transposed convolution, whose weight is summed anew in every
    step: where the maps have so many positions that the arithmetic saved outweighs that."""
    positions = shape[0] * math.prod(shape[2:])
    fast = products_dtype(dtype, instruction_set()) != torch.float32
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and positions >= (2048 if fast else 256)


# --- norm, residual, activation ---------------------------------------------------------------------------------------

# Channels-last, ATen adds a channel's values up one after the other (batch norm) or takes E[x^2] - E[x]^2 (group norm).
# Neither bears a mean of many deviations, so that a norm whose statistics say so is done again on the values less that
# mean, which it does not depend on.
_FAR_BATCH, _FAR_GROUP = 8.0, 2.0


def _is_far(mean: Tensor, inverse: Tensor, limit: float) -> bool:
    return bool((mean.detach().abs() * inverse.detach() > limit).any())


def _shifted(y: Tensor, mean: Tensor, call: NormCall) -> tuple[Tensor, NormCall]:
    """y less its ``mean`` (broadcast), in float32 at least, and ``call`` with vectors of that dtype."""
    wide = torch.promote_types(y.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(wide) for t in (call.weight, call.bias))
    return y.to(wide) - mean.detach().to(wide), call._replace(weight=weight, bias=bias)


def _batch_norm(y: Tensor, call: NormCall, shifted: bool = False) -> Tensor:
    """BatchNorm by the statistics of y (N, C, H, W), of more than one value per channel."""
    running = call.running_mean, call.running_var
    before = [None if t is None else t.detach().clone() for t in running]
    z, mean, inverse = torch.native_batch_norm(
        y, call.weight, call.bias, *running, True, call.momentum, call.norm.eps
    )  # fmt: skip
    if shifted or not _is_far(mean, inverse, _FAR_BATCH):
        return z
    # `data`: ATen's own updates are no new version to autograd either, which has the running tensors of earlier calls.
    for t, old in zip(running, before, strict=True):
        if t is not None and old is not None:
            t.data.copy_(old)
    z = _batch_norm(*_shifted(y, mean.view(-1, 1, 1), call), shifted=True)
    if call.running_mean is not None:
        call.running_mean.data.add_(mean.detach(), alpha=call.momentum)
    return z.to(y.dtype)


def _instance_norm(y: Tensor, call: NormCall) -> Tensor:
    """InstanceNorm as the BatchNorm of every image: ATen's own brings y into NCHW and back (and for a batch of one, its
    input gradient is wrong where the incoming gradient is channels-last)."""
    call = call._replace(norm=Norm("batch", eps=call.norm.eps))
    images = [_batch_norm(image, call) for image in y.split(1)]
    return images[0] if len(images) == 1 else torch.cat(images)


class _GroupNorm(torch.autograd.Function):
    """`torch.native_group_norm` of a channels-last y. PyTorch's own derivative (2.13) ends the process where those of
    weight and bias are wanted and that of y is not: here it is always taken."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm) -> tuple[Tensor, ...]:
        n, c, h, w = y.shape
        z, mean, rstd = torch.native_group_norm(y, weight, bias, n, c, h * w, norm.groups, norm.eps)
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
            n, c, h, w = y.shape
            # Both channels-last, whatever hooks on saved tensors made of y: it reads memory as if they were alike.
            grad, y = (cpu.convert(t, y.dtype, True) for t in (grad, y))
            grads = torch.ops.aten.native_group_norm_backward(
                grad, y, mean, rstd, weight, n, c, h * w, norm.groups, (True, *need[1:])
            )
            return grads[0] if need[0] else None, *grads[1:], None
        # Aliases: y may depend on the vectors elsewhere.
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs: list[Any] = [None if t is None else t.view_as(t) for t in (y, weight, bias)]
            y, weight, bias = inputs
            z = F.group_norm(y.contiguous(), norm.groups, weight, bias, norm.eps)
            wanted = [t for t, n in zip(inputs, need, strict=True) if n]
            found = iter(torch.autograd.grad(z, wanted, grad, create_graph=recorded))
        return *(next(found) if n else None for n in need), None


def _group_norm(y: Tensor, call: NormCall, shifted: bool = False) -> Tensor:
    z, mean, inverse = _GroupNorm.apply(y, call.weight, call.bias, call.norm)
    if shifted or not _is_far(mean, inverse, _FAR_GROUP):
        return z
    n, c = y.shape[:2]
    mean = mean.repeat_interleave(c // call.norm.groups, 1).view(n, c, 1, 1)
    return _group_norm(*_shifted(y, mean, call), shifted=True).to(y.dtype)


def _normalised(y: Tensor, call: NormCall) -> Tensor | None:
    """The norm of a channels-last y; None where `norm_aten` is to do it (it also has the errors for too few values)."""
    n, c, h, w = y.shape
    wide = torch.promote_types(y.dtype, torch.float32)
    running = [t for t in (call.running_mean, call.running_var) if t is not None]
    affine = {t.dtype for t in (call.weight, call.bias) if t is not None}
    # Dtypes that ATen combines, here and in `_shifted`.
    fits = all(t.dtype == wide for t in running) and (affine <= {wide} or affine == {y.dtype} and not running)
    if not call.measured or call.process_group is not None or not fits or y.numel() == 0:
        return None
    if call.norm.kind == "batch":
        return _batch_norm(y, call) if n * h * w > 1 else None
    if call.norm.kind == "group":
        return _group_norm(y, call) if c // call.norm.groups * h * w > 1 else None
    if h * w == 1 or (n > 1 and (running or c * h * w < 2**13)):
        return None
    return _instance_norm(y, call)


def _finish(y: Tensor, norm: NormCall | None, activation: Activation, o: Operands) -> Tensor:
    """Norm, residual and activation of a channels-last y that is ours."""
    from .ops import norm_aten  # which needs nothing of this file; its package does

    if norm is not None:
        z = _normalised(y, norm)
        if z is not None:
            y, norm = z, None
        elif norm.norm.kind == "instance" and not norm.measured:  # the same, and right for a batch of one
            norm = norm._replace(norm=Norm("batch", eps=norm.norm.eps))
    function = IN_PLACE.get(activation.name) if activation.saves() == "y" else None
    if norm is None and o.residual is None and function is not None:
        return function(y, *activation.params)
    return norm_aten.run(y, norm, o.residual, activation, o.slope)
