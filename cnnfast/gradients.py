"""Tensors on their way into a step and out of it, with gradients in the strides that PyTorch's own operators give.

A step computes in channels-last whatever its caller has. Its input's gradient goes back in the memory format of torch's
convolution (``.view(batch, -1)`` of a contiguous one must work), a weight's in the strides of the weight: autograd
copies what differs, and where sizes of one make several strides possible it keeps them as they come, which
DistributedDataParallel warns of at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import is_batched
from .memory_format import convert, has_both, is_channels_last, new_strides

__all__ = ["enter", "enter_residual", "keep_strides", "plain", "restrided", "squeezed"]


def restrided(t: Tensor, strides: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """``t`` with these strides, in ``dtype`` (None: its own): itself, an alias where they say the same of the memory,
    or a copy. Differentiable."""
    strides, dtype = tuple(strides), dtype or t.dtype
    if any(n > 1 and a != b for n, a, b in zip(t.shape, t.stride(), strides, strict=True)):
        return t.new_empty_strided(t.shape, strides, dtype=dtype).copy_(t)
    t = t.to(dtype)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, channels_last: bool | None, of_gradient: bool) -> Tensor:
        ctx.dtype, ctx.of_gradient = x.dtype, of_gradient
        y = x.to(dtype) if channels_last is None else convert(x, dtype, channels_last)
        return x.detach() if y is x else y  # an alias: `view_as` would change the strides of sizes of one

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if is_batched(grad):  # in no memory format
            return grad.to(ctx.dtype), None, None, None
        grad = convert(grad, ctx.dtype, ctx.of_gradient)
        return restrided(grad, new_strides(grad.shape, ctx.of_gradient)), None, None, None


def enter(x: Tensor, dtype: torch.dtype, channels_last: bool | None, of_gradient: bool) -> Tensor:
    """x (N, C, H, W), not empty, in ``dtype`` and the memory format asked for (None: its own); its gradient in x's
    dtype with the strides of a new tensor, channels-last where ``of_gradient``."""
    return _Entry.apply(x, dtype, channels_last, of_gradient)


def enter_residual(r: Tensor, channels_last: bool) -> Tensor:
    """r (N, C, *size), which is added to a map of ours that is ``channels_last`` or not; its gradient is contiguous
    unless both are channels-last. (Of one image and a channels-last gradient, the backwards of ATen's norms, which may
    have given a contiguous r, make something else: torch 2.13 and 2.14, on a CPU.)"""
    if not (torch.is_grad_enabled() and r.requires_grad) or channels_last and is_channels_last(r):
        return r
    return enter(r, r.dtype, None, False)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, strides: tuple[int, ...]) -> Tensor:
        ctx.strides = strides
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad if is_batched(grad) else restrided(grad, ctx.strides), None


def keep_strides(weight: Tensor, channels_last: bool | None) -> Tensor:
    """``weight`` (4-D) with the strides of a new tensor in the format that it suggests (ATen's derivatives refuse some
    others), whose gradient gets the weight's own strides (those of ``torch.empty_like``, where the weight has gaps in
    memory). ``channels_last``: the format in which its gradient comes, None for neither."""
    strides = weight.stride()
    formats = {last: new_strides(weight.shape, last) for last in (False, True)}
    # Where the memory fits both, a second derivative may come in the other one.
    if (
        channels_last is not None
        and strides == formats[channels_last]
        and not has_both(weight.shape[1], weight.shape[2:])
    ):
        return weight
    if torch.is_grad_enabled() and weight.requires_grad:
        weight = _Kept.apply(weight, torch.empty_like(weight, device="meta").stride())
    return weight if strides in formats.values() else restrided(weight, formats[is_channels_last(weight)])


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, strides: tuple[int, ...]) -> Tensor:
        return y.as_strided(y.shape, strides).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def plain(y: Tensor, channels_last: bool) -> Tensor:
    """A dense y (N, C, H, W) whose memory fits both formats, with the strides of a new tensor in the one asked for;
    another y as it is. No view in autograd's eyes. For a y that no backward has saved: what is written to the result
    in place would pass it by."""
    if not y.numel() or not has_both(y.shape[1], y.shape[2:]):
        return y
    strides = new_strides(y.shape, channels_last)
    return y if y.stride() == strides else _Plain.apply(y, strides)


def squeezed(y: Tensor, dim: int) -> Tensor:
    """y of ours without dimension ``dim`` of size 1. No view in autograd's eyes, as torch's own result is none: it may
    be detached in place; and what is written to it in place is seen by a backward that has saved y."""
    if y._is_view():
        return y.squeeze(dim)
    if not y.requires_grad:
        return y.squeeze_(dim)
    with torch.autograd._unsafe_preserve_version_counter(y):
        return y.squeeze_(dim)
