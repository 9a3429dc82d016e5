"""The passes of a norm on the Triton kernels: layouts, workspaces, launches.

What is launched is a plan's to say (`norm_act_plan`). The callers asked `why_not`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..kernels import norm_act_backward as backward_kernels
from ..memory_format import has_both
from ..reference import Grads, Saved
from ..step import Step, norm_step
from . import guard
from .devices import on_device
from .guard import NormPass
from .norm_act import _forward, merge_of, statistics_of
from .norm_act_plan import (
    TILE,
    Start,
    _as,
    _binary,
    _common,
    _params,
    _proof,
    _tiles,
    _told,
    _Types,
    _types,
    _vectors,
    _where,
    each,
    eps_of,
    is_last,
    laid_out,
    power,
    will_be_last,
)
from .observers import OBSERVERS, of_launch

__all__ = [
    "ActivationPlan",
    "BackwardPlan",
    "activation_pass",
    "activation_plan",
    "arrange",
    "backward",
    "forget",
    "plan_of_activation",
    "plan_of_backward",
]


def grad_last(grad: Tensor, s: Saved, step: Step, channels_last: bool) -> bool:
    """Whether the backward takes grad and ``other`` channels-last."""
    if s.other is not None and step.of == "y":
        return is_last(s.other)
    last = is_last(grad)
    return channels_last if s.other is None and not last and not grad.is_contiguous() else last


def arrange(grad: Tensor, s: Saved, step: Step, channels_last: bool) -> tuple[Tensor, Saved]:
    """Everything in a layout that the kernels take, grad and ``other`` in one."""
    last = grad_last(grad, s, step, channels_last)
    other = None if s.other is None else _as(s.other, last)
    return _as(grad, last), Saved(laid_out(s.x), *_vectors(*s[1:6]), other)  # type: ignore[call-arg]


def plan_of_backward(
    grad: Tensor, s: Saved, step: Step, channels_last: bool, need: Grads | tuple[bool, ...], shared: bool
) -> BackwardPlan:
    """Of `backward` on these tensors, arranged or not."""
    slopes, last = 0 if s.slope is None else s.slope.numel(), grad_last(grad, s, step, channels_last)
    types, wanted = _types(grad, *s), tuple(map(bool, need))
    return _backward(step, s.x.shape, will_be_last(s.x), last, types, slopes, wanted, shared, *_where(grad))


def backward(
    grad: Tensor,
    s: Saved,
    step: Step,
    channels_last: bool,
    need: Grads | tuple[bool, ...],
    reduce: Any = None,
    plan: BackwardPlan | None = None,
) -> Grads:
    """The gradients that ``need`` (a truth value for each of `Grads`) asks for, of a step without a convolution whose
    result is ``channels_last`` or not. ``reduce(sums) -> (sums, count)`` takes the float32 (2, C) sums of dz and
    dz * xhat through the processes that share a batch's statistics. ``plan``: where it is at hand."""
    plan = plan or plan_of_backward(grad, s, step, channels_last, need, reduce is not None)
    need_x, need_weight, need_bias, need_residual, need_slope = need
    with on_device(grad):
        grad_in = grad
        grad, s = arrange(grad, s, step, channels_last)
        x = s.x
        vectors = (s.mean, s.var, s.weight, s.bias, s.slope)
        dw = db = ds = means = None
        if step.measured and need_x or need_weight or need_bias or need_slope:
            sums = x.new_empty(plan.partial, dtype=torch.float32)
            plan.sums(x, grad, s.other, *vectors, sums)
            if OBSERVERS:
                of_launch("norm-grad-sums")
            both = None
            if step.measured and need_x and reduce is not None:
                both = x.new_empty((2, x.shape[1]), dtype=torch.float32)
                db, dw = both.unbind()
            else:
                db, dw = _like(s.bias) if need_bias else None, _like(s.weight) if need_weight else None
                if plan.means_shape is not None:
                    means = x.new_empty(plan.means_shape, dtype=torch.float32)
            ds = x.new_empty(x.shape[1], dtype=torch.float32) if need_slope else None
            plan.finish(sums, db, dw, ds, means, s.weight)
            if OBSERVERS:
                of_launch("norm-grad-finish")
            if both is not None:
                total, number = reduce(both)
                means = (total if s.weight is None else total * s.weight.float()) / number
                db = db.to(s.bias.dtype) if need_bias and db is not None and s.bias is not None else None
                dw = dw.to(s.weight.dtype) if need_weight and dw is not None and s.weight is not None else None
            if ds is not None and s.slope is not None:
                ds = (ds if s.slope.numel() > 1 else ds.sum(0, keepdim=True)).to(s.slope.dtype)
        dx = dz = None
        identity = step.activation.name == "identity"
        if need_x or need_residual and not identity:
            dx = torch.empty_like(x)
            dz = torch.empty_like(grad) if need_residual and not identity and step.norm is not None else None
            plan.apply(x, grad, s.other, *vectors, means, dx, dz)
            if OBSERVERS:
                of_launch("norm-grad-apply")
    residual = None
    if need_residual:
        residual = grad_in if identity else dx if dz is None else dz
    return Grads(dx, dw, db, residual, ds)


def _like(v: Tensor | None) -> Tensor | None:
    return None if v is None else torch.empty_like(v, memory_format=torch.contiguous_format)


def _activation_last(grad: Tensor, saved: Tensor | None) -> bool:
    """Whether `activation_pass` takes its tensors channels-last."""
    return will_be_last(grad if saved is None else saved)


def plan_of_activation(grad: Tensor, saved: Tensor | None, activation: Activation, bias: bool) -> ActivationPlan:
    """Of `activation_pass` on these tensors."""
    return activation_plan(grad, saved, _activation_last(grad, saved), activation, bias)


def activation_pass(
    grad: Tensor, saved: Tensor | None, activation: Activation, bias: bool, plan: ActivationPlan | None = None
) -> tuple[Tensor, Tensor | None]:
    """`norm_act_autograd.activation_backward` in one pass. ``plan``: where it is at hand."""
    of = activation.saves() if saved is not None else ""
    if not of and not bias:
        return grad, None
    plan = plan or plan_of_activation(grad, saved, activation, bias)
    last = _activation_last(grad, saved)
    with on_device(grad):
        g = _as(grad, last)
        sums = g.new_empty(plan.partial, dtype=torch.float32) if bias else None
        dz = torch.empty_like(g) if of else None
        plan.apply(g, _as(saved, last) if of and saved is not None else None, dz, sums)
        if OBSERVERS:
            of_launch("activation-grad")
        db = None
        if sums is not None:
            db = g.new_empty(g.shape[1], dtype=torch.float32)
            plan.finish(sums, db, None, None, None, None)
            if OBSERVERS:
                of_launch("norm-grad-finish")
    return grad if dz is None else dz, db


# --- backward ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finish:
    """The launch that adds up the sums of parts."""

    start: Start
    blocks: tuple[int, int]  # parts and channels of a tile


def _finish(segments: int, parts: int, channels: int, join: int, means: bool, count: float) -> Finish:
    """``means``: also those over what shares statistics, of ``count`` values."""
    block_c = power(channels if join == 1 else max(8, join), 8)
    block_p = power(segments * parts, TILE // block_c)
    blocks = -(-channels // block_c) if join == 1 else channels // join
    programs = -(-channels // block_c) + (segments * blocks if means else 0)
    consts = dict(C=channels, JOIN=join, BLOCK_P=block_p, BLOCK_C=block_c)
    binary = _binary(backward_kernels.finish_sums_kernel, consts)
    return Finish(Start(binary, (programs, 1, 1), (segments, parts, count)), (block_p, block_c))


@dataclass(frozen=True)
class BackwardPlan:
    """``means_shape``: (segments, 2, C / join) where the gradient of x subtracts means that the finish takes."""

    sums: Start
    partial: int  # sums of parts: 2, or 3 with PReLU's slope, times segments, parts and channels
    finish: Start
    means_shape: tuple[int, int, int] | None
    apply: Start
    proof: guard.Proof


@lru_cache(maxsize=4096)
def _backward(
    step: Step,
    shape: torch.Size,
    x_last: bool,
    grad_last: bool,
    types: _Types,
    slopes: int,
    need: tuple[bool, ...],
    shared: bool,
    sms: int,
    index: int | None,
) -> BackwardPlan:
    n, c, norm = shape[0], shape[1], step.norm
    last = (x_last, grad_last or has_both(c, shape[2:]))
    join, segments = 1 if norm is None else norm.join(c), n if each(norm) else 1
    means = step.measured and need[0] and not shared
    common = {**_common(step, c, slopes), "SLOPE_SUM": need[4]}
    t, sums = _tiles(backward_kernels.grad_sums_kernel, shape, each(norm), sms, last, common, eps_of(norm))
    _, apply = _tiles(backward_kernels.grad_apply_kernel, shape, each(norm), sms, last, common, eps_of(norm))
    parts = t.segments * t.parts // segments
    finish = _finish(segments, parts, c, join, means, float(shape.numel() // c // segments * join))
    constants = {"slopes": slopes, "need": need, "shared": shared, **_told("tiles", t, last), "finish": finish.blocks}
    return BackwardPlan(
        sums,
        (2 + need[4]) * segments * parts * c,
        finish.start,
        (segments, 2, c // join) if means else None,
        apply,
        _proof(NormPass("gradient of ", step, c), "two passes", index, types[1], types, **constants),
    )


# --- an activation's gradient -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationPlan:
    apply: Start
    partial: int  # sums of parts
    finish: Start
    proof: guard.Proof


def activation_plan(
    grad: Tensor, saved: Tensor | None, last: bool, activation: Activation, bias: bool
) -> ActivationPlan:
    """Of `activation_pass` on these tensors, which are channels-last, once arranged, or not."""
    return _activation(activation, grad.shape, last, _types(grad, saved), bias, *_where(grad))


@lru_cache(maxsize=4096)
def _activation(
    activation: Activation, shape: torch.Size, last: bool, types: _Types, bias: bool, sms: int, index: int | None
) -> ActivationPlan:
    c = shape[1]
    last = last or has_both(c, shape[2:])
    consts = {**_params(activation), "OF": activation.saves() if types[1] is not None else ""}
    t, apply = _tiles(backward_kernels.act_backward_kernel, shape, False, sms, (last,), consts)
    finish = _finish(1, t.segments * t.parts, c, 1, False, 1.0)
    constants = {"bias": bias, **_told("tiles", t, (last,)), "finish": finish.blocks}
    NormPass("gradient of ", norm_step(None, False, activation), c)
    return ActivationPlan(
        apply,
        t.segments * t.parts * c,
        finish.start,
        _proof(
            NormPass("gradient of ", norm_step(None, False, activation), c),
            "one pass",
            index,
            types[0],
            types,
            **constants,
        ),
    )


def forget() -> None:
    """Drop all plans (for tests)."""
    for cached in (statistics_of, merge_of, _forward, _backward, _activation):
        cached.cache_clear()
