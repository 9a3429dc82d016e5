"""The passes of a norm on the Triton kernels: layouts, workspaces, launches.

What is launched is a plan's to say (`norm_plan`). The callers asked `normalise.norm_why_not`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..activations import Activation
from ..norms import Partials
from . import launch as block
from .norm_how import NormHow
from .norm_plan import (
    ActivationPlan,
    BackwardPlan,
    ForwardPlan,
    Merge,
    Statistics,
    activation_plan,
    backward_plan,
    is_last,
    statistics_of,
    will_be_last,
)

__all__ = [
    "Grads",
    "Saved",
    "activation_pass",
    "apply",
    "arrange",
    "backward",
    "merge",
    "partials",
    "plan_of_activation",
    "plan_of_backward",
]


# --- layouts ----------------------------------------------------------------------------------------------------------


def laid_out(t: Tensor) -> Tensor:
    """``t`` channels-last or, where it is that already, contiguous; at an address that 16 divides."""
    if not is_last(t) and not t.is_contiguous():
        t = t.contiguous(memory_format=torch.channels_last)
    return block.aligned(t)


def _as(t: Tensor, last: bool) -> Tensor:
    return block.aligned(t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format))


def _vector(v: Tensor | None) -> Tensor | None:
    return v if v is None else v.contiguous()


def _went(kernel: str) -> None:
    if block.LAUNCHES is not None:
        block.LAUNCHES.append(kernel)


# --- forward ----------------------------------------------------------------------------------------------------------


def partials(x: Tensor, each: bool, s: Statistics | None = None) -> Partials:
    """The statistics of x (N, C, H, W) by parts: of each image, or of the batch. ``s``: their plan, where it is at
    hand."""
    x = laid_out(x)
    s = s or statistics_of(x.shape, each, is_last(x), x.dtype, dispatch.target_device(x).multiprocessors)
    _, parts = block.empty_partials(x, s.shape)
    with dispatch.on_device(x):
        s.start(x, *parts)
    _went("norm-statistics")
    return parts


def merge(
    parts: Partials,
    m: Merge,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(mean, 1/deviation, unbiased variance or None), (S, C / join) float32. Running tensors (one segment) move."""
    mean, rstd, *more = parts.mean.new_empty(m.shape).unbind()
    unbiased = more[0] if more else None
    count, center, m2 = parts
    with dispatch.on_device(center):
        m.start.binary(
            m.start.grid, count.contiguous(), center.contiguous(), m2.contiguous(), mean, rstd, unbiased,
            running_mean, running_var, *m.start.numbers, float(momentum), 1.0 - momentum,
        )  # fmt: skip
    _went("norm-merge")
    return mean, rstd, unbiased


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    how: NormHow,
    plan: ForwardPlan,
) -> Tensor:
    """``act((x - mean) * rstd * weight + bias + residual)`` in ``how``'s dtype and memory format."""
    x = laid_out(x)
    y = dispatch.allocate(x, x.shape, how.channels_last, how.dtype)
    with dispatch.on_device(x):
        plan.apply(
            x, y, None if residual is None else _as(residual, plan.y_last), _vector(mean), _vector(rstd),
            _vector(weight), _vector(bias), _vector(slope),
        )  # fmt: skip
    _went("norm-apply")
    return y


# --- backward ---------------------------------------------------------------------------------------------------------


class Grads(NamedTuple):
    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    slope: Tensor | None = None


class Saved(NamedTuple):
    """Of the forward: its tensors, and ``other``, the result or the residual as `NormHow.of` says (or None)."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    slope: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    other: Tensor | None


def grad_last(grad: Tensor, s: Saved, how: NormHow) -> bool:
    """Whether the backward takes grad and ``other`` channels-last."""
    if s.other is not None and how.of == "y":
        return is_last(s.other)
    last = is_last(grad)
    return how.channels_last if s.other is None and not last and not grad.is_contiguous() else last


def arrange(grad: Tensor, s: Saved, how: NormHow) -> tuple[Tensor, Saved]:
    """Everything in a layout that the kernels take, grad and ``other`` in one."""
    last = grad_last(grad, s, how)
    other = None if s.other is None else _as(s.other, last)
    return _as(grad, last), Saved(
        laid_out(s.x), _vector(s.weight), _vector(s.bias), _vector(s.slope), _vector(s.mean), _vector(s.rstd), other
    )


def plan_of_backward(
    grad: Tensor, s: Saved, how: NormHow, need: Grads | tuple[bool, ...], shared: bool
) -> BackwardPlan:
    """Of `backward` on these tensors, arranged or not."""
    slopes, wanted = 0 if s.slope is None else s.slope.numel(), tuple([bool(n) for n in need])
    return backward_plan(s.x.shape, will_be_last(s.x), grad_last(grad, s, how), grad, s, slopes, how, wanted, shared)


def backward(
    grad: Tensor,
    s: Saved,
    how: NormHow,
    need: Grads | tuple[bool, ...],
    reduce: Any = None,
    plan: BackwardPlan | None = None,
) -> Grads:
    """The gradients that ``need`` (a truth value for each of `Grads`) asks for. ``reduce(sums) -> (sums, count)`` takes
    the float32 (2, C) sums of dz and dz * xhat through the processes that share a batch's statistics. ``plan``: where
    it is at hand."""
    plan = plan or plan_of_backward(grad, s, how, need, reduce is not None)
    need_x, need_weight, need_bias, need_residual, need_slope = need
    with dispatch.on_device(grad):
        grad_in = grad
        grad, s = arrange(grad, s, how)
        x = s.x
        vectors = (s.mean, s.rstd, s.weight, s.bias, s.slope)
        dw = db = ds = mean1 = mean2 = None
        if how.measured and need_x or need_weight or need_bias or need_slope:
            sums = x.new_empty(plan.sums_shape, dtype=torch.float32)
            plan.sums(x, grad, s.other, *vectors, sums)
            _went("norm-grad-sums")
            both = None
            if how.measured and need_x and reduce is not None:
                both = x.new_empty((2, x.shape[1]), dtype=torch.float32)
                db, dw = both.unbind()
            else:
                db, dw = _like(s.bias) if need_bias else None, _like(s.weight) if need_weight else None
                if plan.means_shape is not None:
                    mean1, mean2 = x.new_empty(plan.means_shape, dtype=torch.float32).unbind()
            ds = x.new_empty(x.shape[1], dtype=torch.float32) if need_slope else None
            plan.finish(sums, db, dw, ds, mean1, mean2, s.weight)
            _went("norm-grad-finish")
            if both is not None:
                total, number = reduce(both)
                mean1, mean2 = ((total if s.weight is None else total * s.weight.float()) / number).unbind()
                db = db.to(s.bias.dtype) if need_bias and db is not None and s.bias is not None else None
                dw = dw.to(s.weight.dtype) if need_weight and dw is not None and s.weight is not None else None
            if ds is not None and s.slope is not None:
                ds = (ds if s.slope.numel() > 1 else ds.sum(0, keepdim=True)).to(s.slope.dtype)
        dx = dz = None
        identity = how.activation.name == "identity"
        if need_x or need_residual and not identity:
            dx = torch.empty_like(x)
            dz = torch.empty_like(grad) if need_residual and not identity and how.norm is not None else None
            plan.apply(x, grad, s.other, *vectors, mean1, mean2, dx, dz)
            _went("norm-grad-apply")
    residual = None
    if need_residual:
        residual = grad_in if identity else dx if dz is None else dz
    return Grads(dx, dw, db, residual, ds)


def _like(v: Tensor | None) -> Tensor | None:
    return None if v is None else torch.empty_like(v, memory_format=torch.contiguous_format)


def _activation_last(grad: Tensor, saved: Tensor | None) -> bool:
    """Whether `activation_backward` takes its tensors channels-last."""
    return will_be_last(grad if saved is None else saved)


def plan_of_activation(grad: Tensor, saved: Tensor | None, activation: Activation, bias: bool) -> ActivationPlan:
    """Of `activation_backward` on these tensors."""
    return activation_plan(grad, saved, _activation_last(grad, saved), activation, bias)


def activation_pass(
    grad: Tensor, saved: Tensor | None, activation: Activation, bias: bool, plan: ActivationPlan | None = None
) -> tuple[Tensor, Tensor | None]:
    """`normalise.activation_backward` in one pass. ``plan``: where it is at hand."""
    of = activation.saves() if saved is not None else ""
    if not of and not bias:
        return grad, None
    plan = plan or plan_of_activation(grad, saved, activation, bias)
    last = _activation_last(grad, saved)
    with dispatch.on_device(grad):
        g = _as(grad, last)
        sums = g.new_empty(plan.sums_shape, dtype=torch.float32) if bias else None
        dz = torch.empty_like(g) if of else None
        plan.apply(g, _as(saved, last) if of and saved is not None else None, dz, sums)
        _went("activation-grad")
        db = None
        if sums is not None:
            db = g.new_empty(g.shape[1], dtype=torch.float32)
            plan.finish(sums, db, None, None, None, None, None)
            _went("norm-grad-finish")
    return grad if dz is None else dz, db
