"""Training steps on a CPU: a convolution (`conv_autograd`), a norm, a residual and an activation, with gradients.

All channels-last, but for volumes and for maps that a weight outweighs (`columns`): norms by ATen where its statistics
bear that, activations in place, an upsampling collapsed into its convolution where the weight's sums cost less than the
arithmetic they save (measured; docs/facts.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import reference
from ..dispatch import by_loops, gradient_channels_last, needs_gradient, outsized
from ..gradients import enter, keep_strides, plain
from ..memory_format import convert, is_channels_last
from ..reference import run_reference
from ..spec import DTYPES
from ..step import Operands, Step
from . import inference, norm_inference
from .conv_autograd import (
    Ways,
    by_aten,
    contiguous_convolution,
    contiguous_ways,
    convolution,
    suited,
    volume_convolution,
    ways,
)
from .isa import instruction_set, lowered_products, products_dtype
from .norm import normalised
from .packed import Packed
from .weight import KeptLike, summed_weight

__all__ = ["Ready", "collapses", "is_plain", "packs", "run", "stays_contiguous", "why_slower_3d"]


def run(step: Step, o: Operands, channels_last: bool, *, new: bool = False) -> Tensor:
    """``step`` with gradients, or with a norm that measures; differentiable any number of times. Dense CPU tensors, x
    and bias of one floating dtype (the weight may be float32): (N, C_in, *size) -> (N, C_out, *size) in x's dtype and
    the memory format asked for. Whoever calls it has cast for autocast. ``new``: the weight has just been met for the
    first time (`inference.run`), and is not packed."""
    if torch.is_autocast_enabled("cpu"):  # it would round what is done in float32 on purpose
        with torch.autocast("cpu", enabled=False):
            return run(step, o, channels_last, new=new)
    if step.spec.ndim == 3 and needs_gradient(o):
        return _volumes(step, o, channels_last)
    x = o.x
    of_gradient = _of_gradient(step, o)
    trained = torch.is_grad_enabled() and (x.requires_grad or o.weight.requires_grad)
    if trained and not (channels_last or of_gradient) and x.is_contiguous() and o.weight.is_contiguous():
        how = stays_contiguous(step, x.shape, x.dtype)
        if how is not None:
            return _contiguous(step, o, how)
    if not step.measured and not (channels_last or of_gradient) and _gains_nothing(step, x):
        return run_reference(step, o._replace(weight=keep_strides(o.weight.to(x.dtype), False)))
    if torch.is_grad_enabled() and x.requires_grad and not (of_gradient and is_channels_last(x)):
        x = enter(x, x.dtype, True, of_gradient)
    else:
        x = convert(x, x.dtype, True)
    o = o._replace(x=x)
    given = step.norm is not None and not step.measured
    packed = None
    if not (new or given):
        if packs(step, o):
            packed = inference.run(step.bare, _bare(o), True)
        elif step.upsample is None and not (torch.is_grad_enabled() and o.weight.requires_grad):
            o = o._replace(weight=KeptLike()(x, o.weight))
    y = _convolved(step, x, o) if packed is None else packed
    y = _finished(step, o._replace(x=y if step.norm is not None else plain(y, channels_last)))
    return convert(y, y.dtype, channels_last)


class Ready:
    """`run` without gradients of a step whose norm measures each image and moves no others, where everything is known
    that does not change from call to call, as `inference.Ready`, with which it shares who may use it (the bias may be
    float32, too)."""

    def __init__(self, step: Step, packed: inference.Ready | None, channels_last: bool) -> None:
        self._step, self._packed, self._channels_last = step, packed, channels_last
        self._kept = KeptLike() if packed is None and step.upsample is None else None

    @classmethod
    def of(cls, step: Step, o: Operands, channels_last: bool) -> Ready | None:
        """None for other steps."""
        if not _of_each_image(step, o):
            return None
        bare = _bare(o._replace(x=convert(o.x, o.x.dtype, True)))
        packed = inference.ready(step.bare, bare, True) if packs(step, bare) else None
        return cls(step, packed, channels_last)

    def held(self, *tensors: Tensor | None) -> Packed | Tensor | None:
        """As `inference.Ready.held`: what is packed or kept of these."""
        weight, bias, *_ = tensors
        assert weight is not None
        if self._packed is not None:
            return self._packed.held(weight, bias, None, None, None, None)
        return None if self._kept is None else self._kept.held(weight)

    def run(self, o: Operands, found: Packed | Tensor | None = None) -> Tensor:
        """``found``: what `held` just gave."""
        o = o._replace(x=convert(o.x, o.x.dtype, True))
        if self._kept is not None:
            o = o._replace(weight=self._kept(o.x, o.weight, found if isinstance(found, Tensor) else None))
        y = None
        if isinstance(found, Packed):
            assert self._packed is not None
            y = self._packed.run_with(found, o.x, None, None)
        elif self._packed is not None:
            y = self._packed.run(_bare(o))
        if y is None:
            o = o if o.bias is None else o._replace(bias=o.bias.to(o.x.dtype))
            y = _convolved(self._step, o.x, o)
        y = _finished(self._step, o._replace(x=y))
        return convert(y, y.dtype, self._channels_last)


def is_plain(step: Step, o: Operands) -> bool:
    """Whether `Ready` of a step in two dimensions is PyTorch's own convolution of channels-last maps and its norm, and
    an activation, if any, without weights: calls that who knows what the operands are can make one by one."""
    spec, dtypes = step.spec, {t.dtype for t in (o.x, o.weight, o.bias) if t is not None}
    if not _of_each_image(step, o) or spec.ndim != 2 or spec.transposed or step.upsample is not None or any(step.pad):
        return False
    plain = len(dtypes) == 1 and products_dtype(o.x.dtype, instruction_set()) == o.x.dtype
    return plain and o.residual is None and o.slope is None and not packs(step, o)


def _of_each_image(step: Step, o: Operands) -> bool:
    """Whether a norm measures each image and moves no others, and no gradient is wanted."""
    norm = step.norm
    moves = not (o.mean is o.var is o.batches is None)
    measures = step.spec is not None and norm is not None and norm.measured and norm.per_image
    return measures and not moves and not needs_gradient(o)


def stays_contiguous(step: Step, shape: Sequence[int], dtype: torch.dtype) -> Ways | None:
    """How the convolution of ``step`` runs on a contiguous x of this shape (N, C, *size) with gradients, where that is
    faster than PyTorch's modules; None where it is not, and for what is more than a convolution. The weight is
    contiguous."""
    if step.upsample is not None or step.spec.ndim != 2:
        return None
    padded = (*shape[:2], *(n + 2 * p for n, p in zip(shape[2:], step.pad, strict=True)))
    return contiguous_ways(step.spec, padded, dtype, lowered_products())


def _contiguous(step: Step, o: Operands, how: Ways) -> Tensor:
    """The step with gradients, in eager mode's format throughout."""
    x = o.x
    y = contiguous_convolution(step.pad_input(x), o.weight.to(x.dtype), o.bias, step.spec, how)
    y = reference.finish(step, o._replace(x=y))
    return convert(y, y.dtype, False)


def _bare(o: Operands) -> Operands:
    """Of the convolution alone."""
    return Operands(o.x, o.weight, o.bias)


def packs(step: Step, o: Operands) -> bool:
    """Whether the convolution of ``step`` runs with a packed weight: where no gradient of it is needed and that pays.
    (Not ahead of a BatchNorm in training: its weight is another in the next step, and would be packed anew.)"""
    if step.norm is not None and step.norm.kind == "batch":
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (o.x, o.weight, o.bias)):
        return False
    return inference.why_not(step.bare, _bare(o)) is None


def why_slower_3d(step: Step, shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why PyTorch's modules of a step of three dimensions are expected to be as fast with gradients, on an x of this
    shape."""
    return _why_slower_3d(step, tuple(shape), dtype, lowered_products())


@lru_cache(maxsize=4096)
def _why_slower_3d(step: Step, shape: tuple[int, ...], dtype: torch.dtype, lowered: bool) -> str | None:
    spec = step.spec
    if step.upsample is not None:
        gains = not lowered and collapses(step, shape, dtype)
        return None if gains else "in training, an upsampling's summed taps would save too little arithmetic"
    padded = (*shape[:2], *(n + 2 * p for n, p in zip(shape[2:], step.pad, strict=True)))
    if ways(spec, padded, dtype, lowered).forward == "halves":
        return None
    if not by_loops(spec, padded, dtype):
        return "in training, PyTorch's own convolution of three dimensions by oneDNN is as fast"
    if max(spec.kernel_size) == 1:
        return "in training, PyTorch's own product of a kernel of one position is as fast"
    return "in training, it is too little work for two halves by oneDNN"


def _of_gradient(step: Step, o: Operands) -> bool:
    """Whether x's gradient is channels-last, as torch's convolution has it, and its padding."""
    formats = is_channels_last(o.x), is_channels_last(o.weight)
    return gradient_channels_last(step, o.x.shape, o.x.dtype, *formats, padded=any(step.pad))


def _gains_nothing(step: Step, x: Tensor) -> bool:
    """Whether the convolution is ATen's in any case, and no faster channels-last than the conversions cost. (Tiny
    images are safer as they are, too: channels-last, oneDNN's convolutions read past the end of some, torch 2.13.)"""
    if step.upsample is not None:
        return lowered_products() or not collapses(step, x.shape, x.dtype)
    if step.spec.ndim == 3:
        return False
    n, c, h, w = x.shape
    return by_aten(step.spec, (n, c, h + 2 * step.pad[0], w + 2 * step.pad[1]), x.dtype)


def _convolved(step: Step, x: Tensor, o: Operands) -> Tensor:
    """The convolution of ``step`` and its bias."""
    if step.spec.ndim == 3:
        small = step.spec.transposed and outsized(step.spec.groups, step.spec.kernel_size, x.shape[2:])
        y = _convolved_volume(step, convert(x, x.dtype, False) if small else x, o)
        return convert(y, y.dtype, True)
    u, weight = step.upsample, o.weight.to(x.dtype)
    if u is None:
        return convolution(step.pad_input(x), weight, o.bias, step.spec)
    if lowered_products() or not collapses(step, x.shape, x.dtype):
        nchw = suited(x, weight, math.prod(u.scale))
        weight = keep_strides(weight, True if nchw is x else None)
        return reference.upsample_conv(nchw, weight, o.bias, u.scale, u.padding, u.mode, step.spec.groups)
    weight = summed_weight(keep_strides(weight, None), u.scale, step.spec.groups)
    return convolution(step.pad_input(x), weight, o.bias, step.spec)


def _volumes(step: Step, o: Operands, channels_last: bool) -> Tensor:
    """The step with gradients in three dimensions, where it gains by its convolution. Maps keep eager mode's formats:
    ATen adds the many values of a channels-last volume up one after the other, and its statistics are not exact."""
    x = o.x
    if x.requires_grad:  # its gradient, as eager mode has it
        x = enter(x, x.dtype, None, _of_gradient(step, o))
    y = _convolved_volume(step, x, o)
    y = reference.finish(step, o._replace(x=convert(y, y.dtype, channels_last)))
    return convert(y, y.dtype, channels_last)


def _convolved_volume(step: Step, x: Tensor, o: Operands) -> Tensor:
    """`_convolved` of three dimensions, in either format."""
    u, weight = step.upsample, o.weight.to(x.dtype)
    if u is None:
        return volume_convolution(step.pad_input(x), weight, o.bias, step.spec)
    if lowered_products() or not collapses(step, tuple(x.shape), x.dtype):
        return reference.upsample_conv(x, weight, o.bias, u.scale, u.padding, u.mode, step.spec.groups)
    dtype = products_dtype(x.dtype, instruction_set())  # the sums are not rounded where products are in float32
    weight, bias = keep_strides(weight, None).to(dtype), None if o.bias is None else o.bias.to(dtype)
    weight = summed_weight(weight, u.scale, step.spec.groups)
    return volume_convolution(step.pad_input(x).to(dtype), weight, bias, step.spec).to(x.dtype)


# --- upsampling + convolution -----------------------------------------------------------------------------------------


# In three dimensions, with products in float32 and in 16 bits: the multiply-adds that must be saved, by how much they
# must become fewer, and positions.
_LEAST_SAVED = ((1e7, 2, 64), (6e7, 3, 256))


@lru_cache(maxsize=4096)
def collapses(step: Step, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether an upsampling and its convolution run as one transposed convolution, whose weight is summed anew in every
    step: where the maps have so many positions that the arithmetic saved outweighs that. (In three dimensions oneDNN's
    transposed convolutions are slow for groups and one input channel; a kernel of one position saves none.)"""
    positions = shape[0] * math.prod(shape[2:])
    fast = products_dtype(dtype, instruction_set()) != torch.float32
    if step.spec.ndim == 3:
        s, (conv, size) = step.spec, step.unfused(shape[2:])
        padded = [n + 2 * p for n, p in zip(shape[2:], step.pad, strict=True)]
        before, after = conv.macs(shape[0], size), s.macs(shape[0], padded)
        least, times, few = _LEAST_SAVED[fast]
        gains = before - after >= least and before >= times * after and positions >= few
        return dtype in DTYPES and s.groups == 1 and s.in_channels > 1 and gains
    return dtype in DTYPES and positions >= (2048 if fast else 256)


def _finished(step: Step, o: Operands) -> Tensor:
    """Norm, residual and activation of a channels-last ``o.x`` that is ours."""
    tail, norm = step.tail, step.norm
    if norm_inference.why_not(norm, o) is None:
        assert norm is not None
        return norm_inference.finished(norm, o, step.activation, ours=True)
    if norm is not None and norm.measured:
        z = normalised(norm, o)
        if z is not None:
            tail, norm = step.after_norm, None
            o = o._replace(x=z, scale=None, shift=None)
    function = step.activation.row.in_place if step.activation.saves() == "y" else None
    if norm is None and o.residual is None and function is not None:
        return function(o.x, *step.activation.params)
    return reference.finish(tail, o)
