"""A step with gradients in one node of autograd: a convolution, and a norm, a residual or an activation that need
passes of their own.

There are two ways through. The general one (`block_forward`, `block_backward`) is made of the formulas of
`conv_autograd` and `norm_act_autograd`: it proves kernels, falls back, arranges layouts, is differentiable, and is what
a compiler sees. What it launches for tensors of one kind stays with the convolution's launch (`conv.Launch.bound`).
Where that is known and nothing is odd, `_straight_forward` and `_straight_backward` allocate and launch the same, and
ask no more: Python takes longer than the kernels of small layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import is_batched
from ..memory_format import LAST
from ..norms import Partials, check_values
from ..reference import Grads, Saved
from ..step import Operands, Step
from . import conv, conv_wgrad, norm_act
from .conv_autograd import (
    OfConv,
    Primitives,
    conv_backward,
    conv_forward,
    conv_setup,
    input_format,
    input_gradient_step,
    launches,
    recorded,
)
from .devices import on_device, precision_of
from .norm_act_autograd import Forward, OfNorm, Pass, norm_backward, norm_setup, proven_forward
from .norm_act_backward import BackwardPlan, plan_of_backward
from .norm_act_plan import is_last
from .observers import OBSERVERS

__all__ = ["How", "block", "block_backward", "block_setup"]


class How(NamedTuple):
    """Of a step that does not fold: ``dtype`` of the result; ``required`` as of `convolution`."""

    step: Step
    channels_last: bool
    dtype: torch.dtype
    required: bool


# --- the general way --------------------------------------------------------------------------------------------------


def block_forward(tensors: tuple[Any, ...], o: Operands, how: How) -> tuple[conv.Launch | None, Tensor, Forward | None]:
    """The convolution's launch, its result u, channels-last, and what follows it; None where that is PyTorch's
    operators' to run. Without gradients; the caller asked `why_not`. ``tensors``: x (padded), weight (of
    ``step.spec``), bias, scale, shift, residual and slope; the rest is in ``o``."""
    step, channels_last, dtype, required = how
    x, weight, bias, scale, shift, residual, slope = tensors
    launch = None
    if x.numel() and weight.numel():
        launch = conv.lookup(step.inner, Operands(x, weight, bias), True, None, step.statistics)
        straight = _straight_forward(launch, tensors, o, how)
        if straight is not None:
            return launch, *straight
    # The statistics of a norm come out of the convolution's epilogue where tiles allow it.
    u, parts = conv_forward(x, weight, bias, step.inner, True, required, step.statistics, launch)
    if u.shape[2:].numel() == 1:
        check_values(u.shape, step.norm, several=o.group is not None)
    if not u.numel():
        return launch, u, None
    rest = Operands(
        u, None, None, o.mean, o.var, scale, shift, residual, slope, o.momentum, o.group, o.batches  # type: ignore[arg-type]
    )  # fmt: skip
    done = proven_forward(step.tail, rest, parts, channels_last, dtype, required)
    if launch is not None and done is not None and launch.proof.ready and step.measured and o.group is None:
        plan = norm_act.forward_plan(step.tail, rest, parts, channels_last, dtype)
        if plan.moves or o.mean is o.var is o.batches is None:
            launch.bound[_kind(how, scale, shift, o)] = plan
    return launch, u, done


def block_setup(
    tensors: tuple[Any, ...],
    u: Tensor,
    done: Forward,
    how: How,
    need: Sequence[bool],
    launch: conv.Launch | None = None,
) -> tuple[tuple[OfConv, OfNorm], tuple[Tensor | None, ...]]:
    """What `block_backward` takes of a forward: what it knows, and the tensors to save. ``need``: which of the
    ``tensors`` get gradients."""
    x, weight, bias, *others = tensors
    of_conv, saved = conv_setup(x, weight, bias, u, how.step.inner, how.required, need[:3], launch)
    of_norm, more = norm_setup(how.step.tail, (u, *others), done, how.channels_last, how.required)
    return (of_conv, of_norm), saved + more


def block_backward(
    of: tuple[OfConv, OfNorm],
    tensors: list[Tensor | None],
    need: Sequence[bool],
    grad: Tensor | None,
    of_u: Tensor | None = None,
    by: tuple[Primitives, Pass] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the forward's tensors for those of its result and of u, one of which may be None. Takes
    ``tensors`` out of their list, so that what the norm saved is free where the convolution's turn comes."""
    of_conv, of_norm = of
    plain = by is None and of_u is None and grad is not None and not (torch.is_grad_enabled() or is_batched(grad))
    if plain and grad is not None:
        straight = _straight_backward(of_conv, of_norm, tensors, need, grad)
        if straight is not None:
            return straight
    primitives, norm_pass = by or (None, None)
    through = any(need[:3])
    g = Grads(of_u)
    if grad is not None:
        g = norm_backward(of_norm, tensors[3:], (through, *need[3:]), grad, norm_pass)
        if of_u is not None:
            g = g._replace(x=of_u if g.x is None else of_u + g.x)
    del tensors[3:]
    of_x: tuple[Tensor | None, ...] = (None, None, None)
    if through and g.x is not None:
        of_x = conv_backward(of_conv, tensors, need[:3], g.x, primitives)
    return *of_x, g.weight, g.bias, g.residual, g.slope


# --- the straight way -------------------------------------------------------------------------------------------------


def _kind(how: How, scale: Tensor | None, shift: Tensor | None, o: Operands) -> tuple[object, ...]:
    """What the plan of a norm depends on beside the convolution's launch."""
    mean, var, batches = o.mean, o.var, o.batches
    return (
        how,
        None if scale is None else scale.dtype,
        None if shift is None else shift.dtype,
        None if mean is None else (mean.dtype, mean.is_contiguous()),
        None if var is None else (var.dtype, var.is_contiguous()),
        batches is not None,
    )


def _odd(*tensors: Tensor | None) -> bool:
    """Whether a tensor is not channels-last at an address that 16 divides."""
    for t in tensors:
        if t is not None and (t.data_ptr() & 15 or not t.is_contiguous(memory_format=LAST[t.dim()])):
            return True
    return False


def _scattered(*vectors: Tensor | None) -> bool:
    for v in vectors:
        if v is not None and (v.data_ptr() & 15 or not v.is_contiguous()):
            return True
    return False


def _straight_forward(
    launch: conv.Launch, tensors: tuple[Any, ...], o: Operands, how: How
) -> tuple[Tensor, Forward] | None:
    """u and what follows it, or None where the general way must run."""
    x, weight, bias, scale, shift, residual, slope = tensors
    plan: norm_act.ForwardPlan | None = launch.bound.get(_kind(how, scale, shift, o))
    if plan is None or not plan.proof.ready or OBSERVERS or launch.gathers or o.group is not None:
        return None
    if residual is not None or slope is not None or _odd(x, weight) or _scattered(bias, scale, shift):
        return None
    assert plan.merge is not None
    with on_device(x):
        u = torch.empty_strided(launch.output_shape, launch.output_strides, dtype=x.dtype, device=x.device)
        parts = None if launch.parts is None else Partials.empty(u, (*launch.parts, launch.output_shape[1]))
        stats = None if parts is None else parts.stats
        conv._launch(x, weight, u, None, (bias, None, None, None, None, None), stats, 0.0, launch)
        if parts is None:
            parts = norm_act.partials(u, how.step.statistics == "image", plan.statistics)
        moments = norm_act.moved(parts, plan.merge, o)
        y = torch.empty_strided(launch.output_shape, plan.strides, dtype=how.dtype, device=x.device)
        apply = plan.apply
        apply.binary(apply.grid, u, y, None, moments, None, scale, shift, None, *apply.numbers)
    return u, Forward(y, moments, None, None)


class Plans(NamedTuple):
    """Of a backward: the norm's passes, and the gradients of x and of the weight, where they are wanted."""

    norm: BackwardPlan
    of_x: conv.Launch | None
    of_weight: conv_wgrad.WgradLaunch | None


def _straight_backward(
    of_conv: OfConv, of_norm: OfNorm, tensors: list[Tensor | None], need: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...] | None:
    """As `block_backward`, or None where the general way must run."""
    x, weight, _, u, scale, shift, _, moments, var, other = tensors
    need_x, need_weight, need_bias, need_scale, need_shift, need_residual, need_slope = need
    launch, step = of_conv.launch, of_norm.step
    if launch is None or weight is None or u is None or moments is None or not (need_x or need_weight):
        return None
    if OBSERVERS or of_norm.several is not None or var is not None or other is not None or not step.measured:
        return None
    if need_bias or need_residual or need_slope or x is not None and x.dtype != u.dtype:
        return None
    last = is_last(grad)  # or contiguous, as eager mode's result of an InstanceNorm: the norm's passes read both
    if grad.data_ptr() & 15 or not (last or grad.is_contiguous()):
        return None
    if _odd(x, weight, u) or _scattered(scale, shift, moments):
        return None
    types = (grad.dtype, weight.dtype, scale if scale is None else scale.dtype, shift if shift is None else shift.dtype)
    key = (step, need, types, last, of_conv.strides[0], of_conv.required, precision_of(u.dtype))
    plans: Plans | None = launch.bound.get(key)
    if plans is None:
        plans = _plans(of_conv, of_norm, tensors, need, grad)
        if plans is None:
            return None
        launch.bound[key] = plans
    norm, of_x, of_weight = plans
    with on_device(grad):
        sums = u.new_empty(norm.partial, dtype=torch.float32)
        norm.sums(u, grad, None, moments, None, scale, shift, None, sums)
        dscale = None if scale is None or not need_scale else torch.empty_like(scale)
        dshift = None if shift is None or not need_shift else torch.empty_like(shift)
        means = torch.empty_like(moments)
        norm.finish(sums, dshift, dscale, None, means, scale)
        du = torch.empty_like(u)
        norm.apply(u, grad, None, moments, None, scale, shift, None, means, du, None)
        del u, tensors[3:]
        dx = dweight = None
        if of_x is not None:
            dx = torch.empty_strided(of_x.output_shape, of_x.output_strides, dtype=du.dtype, device=du.device)
            conv._launch(du, weight, dx, None, (None,) * 6, None, 0.0, of_x)
        if of_weight is not None and x is not None:
            dweight = torch.empty_like(weight)
            a, b = (x, du) if of_weight.plan.spec.transposed else (du, x)
            conv_wgrad._launch(a, b, dweight, of_weight)
    return dx, dweight, None, dscale, dshift, None, None


def _plans(
    of_conv: OfConv, of_norm: OfNorm, tensors: list[Tensor | None], need: Sequence[bool], grad: Tensor
) -> Plans | None:
    """None where they are not all proven, or do more than `_straight_backward` does."""
    x, weight, _, u, scale, shift, slope, moments, *_ = tensors
    assert weight is not None and u is not None
    need_x, need_weight, _, *need_vectors = need
    step, required, size, (of_x, of_weight), *_ = of_conv
    wanted = (True, *need_vectors)
    saved = Saved(u, scale, shift, slope, moments, None, None)
    norm = plan_of_backward(grad, saved, of_norm.step, of_norm.channels_last, wanted, False)
    if not norm.proof.ready:
        return None
    by_x = by_weight = None
    if need_x:
        last, stored = input_format(size, of_x, weight.shape, of_weight)
        adjoint = input_gradient_step(step, size[2:])
        if last != stored or not launches(u, weight, adjoint, required):
            return None
        by_x = conv.lookup(adjoint, Operands(u, weight), stored)
        if by_x.output_shape[2:] != size[2:] or by_x.gathers or not by_x.proof.ready:
            return None
    if need_weight:
        if x is None or not launches(x, weight, step.bare, required):
            return None
        by_weight = conv_wgrad.lookup(x, u, step.spec, weight)
        if not by_weight.proof.ready:
            return None
    return Plans(norm, by_x, by_weight)


# --- the node ---------------------------------------------------------------------------------------------------------


class _Block(torch.autograd.Function):
    """The result and u, which nobody but a second derivative uses; u alone where `block_forward` gives nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        slope: Tensor | None,
        o: Operands,
        how: How,
    ) -> Any:
        ctx.set_materialize_grads(False)
        tensors, need = (x, weight, bias, scale, shift, residual, slope), ctx.needs_input_grad[:7]
        launch, u, done = block_forward(tensors, o, how)
        if done is None:
            of, saved = conv_setup(x, weight, bias, u, how.step.inner, how.required, need[:3], launch)
            ctx.of = of, None
            ctx.save_for_backward(*saved)
            return u
        ctx.of, saved = block_setup(tensors, u, done, how, need, launch)
        ctx.save_for_backward(*saved)
        return done.y, u

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, of_u: Tensor | None = None) -> Any:
        if ctx.of[1] is None:
            grad, of_u = None, grad
        need, saved = ctx.needs_input_grad, list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # where the graph is not kept
        return *block_backward(ctx.of, saved, need[:7], grad, of_u), None, None


def block(o: Operands, how: How) -> tuple[Tensor, bool]:
    """The whole step, differentiable any number of times, and True; the convolution alone and False where what follows
    is PyTorch's operators' to run."""
    tensors = (o.x, o.weight, o.bias, o.scale, o.shift, o.residual, o.slope)
    if not recorded(*tensors):
        _, u, done = block_forward(tensors, o, how)
        return (u, False) if done is None else (done.y, True)
    out = _Block.apply(*tensors, o, how)
    return (out, False) if isinstance(out, Tensor) else (out[0], True)
