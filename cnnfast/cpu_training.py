"""Training steps on a CPU: a convolution, a norm, a residual and an activation with gradients, by ATen's operators in
the memory format that suits them best."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu, reference
from .block import Operands, Step
from .cpu import products_dtype
from .cpu_convolution import convolution
from .norms import NormCall
from .onednn import instruction_set
from .spec import Activation, summed_taps

__all__ = ["collapses", "run"]


def run(step: Step, o: Operands, norm: NormCall | None, channels_last: bool) -> Tensor:
    """``step`` with ``norm`` after its convolution and ahead of residual and activation; differentiable any number of
    times. Dense CPU tensors, x, weight and bias of one floating dtype: (N, C_in, H, W) -> (N, C_out, OH, OW) in x's
    dtype and the memory format asked for."""
    x = cpu.convert(o.x, o.x.dtype, True)
    if o.mean is not None or o.scale is not None or o.shift is not None:
        y = _convolved(step, x, o)
        if o.mean is not None:
            y = F.batch_norm(y, o.mean, o.var, o.scale, o.shift, training=False, eps=o.eps)
            o = o._replace(scale=None, shift=None)
        y = reference.epilogue(y, o.scale, o.shift, o.residual, step.activation, o.slope)
    else:
        y = _finish(_convolved(step, x, o), norm, step.activation, o)
    return cpu.convert(y, y.dtype, channels_last)


def _convolved(step: Step, x: Tensor, o: Operands) -> Tensor:
    """The convolution of ``step`` and its bias."""
    u = step.upsample
    if u is None:
        return convolution(step.pad_input(x), o.weight, o.bias, step.spec)
    if not collapses(step, x.shape, x.dtype):
        return reference.upsample_conv(x, o.weight, o.bias, u.scale, u.padding, u.mode, step.spec.groups)
    weight = _summed_weight(o.weight, u.scale, step.spec.groups)
    return convolution(step.pad_input(x), weight, o.bias, step.spec)


# --- upsampling + convolution -----------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def collapses(step: Step, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether an upsampling and its convolution run as one transposed convolution, whose weight is summed anew in every
    step: where the maps have so many positions that the arithmetic saved outweighs that."""
    positions = shape[0] * math.prod(shape[2:])
    fast = products_dtype(dtype, instruction_set()) != torch.float32
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and positions >= (2048 if fast else 256)


@lru_cache(maxsize=64)
def _sums(kernel: tuple[int, ...], scale: tuple[int, ...]) -> Tensor:
    """(kh*kw, kh'*kw') zeros and ones: which taps each tap of the collapsed weight sums."""
    rows, columns = (
        torch.tensor([[float(t in taps) for t in range(k)] for taps in summed_taps(k, r)])
        for k, r in zip(kernel, scale, strict=True)
    )
    return torch.kron(rows, columns).t().contiguous()


def _summed_weight(weight: Tensor, scale: tuple[int, ...], groups: int) -> Tensor:
    """`reference.collapse_weight` as one matrix product, in float32 and rounded once."""
    c_out, c_in, kh, kw = weight.shape
    size = kh + scale[0] - 1, kw + scale[1] - 1
    w = weight.reshape(groups, c_out // groups, c_in, kh * kw).transpose(1, 2).float()
    w = torch.mm(w.reshape(-1, kh * kw), _sums((kh, kw), tuple(scale)))
    return w.to(weight.dtype).view(groups * c_in, c_out // groups, *size)


# --- norm, residual, activation ---------------------------------------------------------------------------------------

_FAR = 16  # deviations of a mean from zero

# In place, the backward of these needs their result alone.
_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
    "leaky_relu": F.leaky_relu_,
    "elu": F.elu_,
    "hardtanh": F.hardtanh_,
}


def _batch_norm(y: Tensor, call: NormCall) -> Tensor | None:
    """BatchNorm by the statistics of a channels-last y; None, running statistics untouched, where they would be poor:
    channels-last, ATen adds a channel's values up one after the other, which a mean of many deviations does not bear.
    """
    vectors = [t for t in (call.weight, call.bias, call.running_mean, call.running_var) if t is not None]
    low = y.dtype.itemsize == 2
    if any(t.dtype != y.dtype and not (low and t.dtype == torch.float32) for t in vectors) or y.numel() <= y.shape[1]:
        return None
    if len({t.dtype for t in vectors}) > 1:
        return None
    running = call.running_mean, call.running_var
    before = [None if t is None else t.detach().clone() for t in running]
    z, mean, inverse = torch.native_batch_norm(
        y, call.weight, call.bias, *running, True, call.momentum, call.norm.eps
    )  # fmt: skip
    if not bool((mean.detach().abs() * inverse.detach() > _FAR).any()):
        return z
    for t, old in zip(running, before, strict=True):
        if t is not None and old is not None:
            t.copy_(old)
    return None


def _finish(y: Tensor, norm: NormCall | None, activation: Activation, o: Operands) -> Tensor:
    """Norm, residual and activation of a channels-last y that is ours."""
    from .ops import norm_aten  # which needs nothing of this file; its package does

    if norm is not None and norm.measured and norm.process_group is None:
        z = _batch_norm(y, norm) if norm.norm.kind == "batch" else None
        if z is not None:
            y, norm = z, None
        elif norm.norm.kind != "instance":
            # Channels-last, ATen's group norm is E[x^2] - E[x]^2: at a mean of some hundred deviations nothing is left.
            y = y.contiguous()
    function = _IN_PLACE.get(activation.name) if activation.saves() == "y" else None
    if norm is None and o.residual is None and function is not None:
        return function(y, *activation.params)
    return norm_aten.run(y, norm, o.residual, activation, o.slope)
