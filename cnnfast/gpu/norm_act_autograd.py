"""Norm + residual + activation on the Triton kernels, with gradients.

Mean and deviation that the forward saved are constants to a second derivative. So a backward that is itself recorded
(`torch.is_grad_enabled()`) differentiates the composition of `reference` instead.

`forward`, `norm_setup` and `norm_backward` are the formulas, of the `torch.autograd.Function`s of eager mode and of
the operators that `torch.compile` sees. Every step here is one without a convolution (`Step.tail`), of ``o.x``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import norm_sync
from ..activations import Activation, activation_derivative
from ..dispatch import is_batched
from ..norms import Partials
from ..reference import Grads, Saved, backward_by_torch, composition
from ..spec import DTYPES, INT32
from ..step import Operands, Step, norm_step
from . import guard, norm_act, norm_act_trial
from .devices import on_device
from .norm_act_backward import activation_pass, backward, plan_of_activation, plan_of_backward
from .why_not import why_not

__all__ = [
    "Forward",
    "OfNorm",
    "activation_backward",
    "activation_backward_by_torch",
    "forward",
    "norm_backward",
    "norm_setup",
    "proven_backward",
    "proven_forward",
    "run",
    "statistics",
]


# --- forward ----------------------------------------------------------------------------------------------------------


class Shared(NamedTuple):
    """Of statistics of several processes: their group, and how many values they are of."""

    group: Any
    values: Tensor


def statistics(
    step: Step, o: Operands, parts: Partials | None, plan: norm_act.ForwardPlan
) -> tuple[Tensor, Shared | None]:
    """Means and 1/deviations of the input (S, 2, C or groups) float32, and its running tensors moved."""
    assert plan.merge is not None and step.norm is not None
    if parts is None:
        parts = norm_act.partials(o.x, step.statistics == "image", plan.statistics)
    several = None
    if o.group is not None and norm_sync.shared(step.norm, o):
        parts = norm_sync.gather(parts, o.group)
        several = Shared(o.group, parts.each[0].sum())
    if plan.moves:
        return norm_act.moved(parts, plan.merge, o), several
    mean, var, batches, momentum = o.mean, o.var, o.batches, o.momentum
    moments, unbiased = norm_act.merge(parts, plan.merge)
    # Each image's statistics count alike, as in torch.
    for old, new in ((mean, moments[:, 0]), (var, unbiased)):
        if old is not None and new is not None:
            old.copy_(old.float() * (1 - momentum) + new.mean(0) * momentum)
    if batches is not None:
        batches.add_(1)
    return moments, several


class Forward(NamedTuple):
    """What a forward gives: the result, and the statistics that it took or was given, as of `Saved`."""

    y: Tensor
    mean: Tensor | None
    var: Tensor | None
    several: Shared | None


def forward(
    step: Step,
    o: Operands,
    parts: Partials | None,
    channels_last: bool,
    dtype: torch.dtype,
    plan: norm_act.ForwardPlan | None = None,
) -> Forward:
    """A whole forward without gradients: statistics (unless ``parts`` holds them), running tensors, apply. ``plan``:
    where it is at hand."""
    plan = plan or norm_act.forward_plan(step, o, parts, channels_last, dtype)
    mean, var, several = o.mean, o.var, None
    with on_device(o.x):
        if step.measured:
            mean, several = statistics(step, o, parts, plan)
            var = None
        y = norm_act.apply(o, mean, var, dtype, plan)
    return Forward(y, mean, var, several)


def proven_forward(
    step: Step, o: Operands, parts: Partials | None, channels_last: bool, dtype: torch.dtype, required: bool
) -> Forward | None:
    """`forward`, or None where PyTorch's operators must run."""
    plan = norm_act.forward_plan(step, o, parts, channels_last, dtype)
    if plan.proof.ready:
        return forward(step, o, parts, channels_last, dtype, plan)
    return guard.first_use(
        plan.proof,
        lambda: forward(step, o, parts, channels_last, dtype, plan),
        lambda: norm_act_trial.forward_problem(forward, step, o, parts, channels_last, dtype),
        required,
    )


def run(
    step: Step, o: Operands, parts: Partials | None, channels_last: bool, dtype: torch.dtype, required: bool
) -> Tensor | None:
    """The step on the kernels, its result in ``dtype``; the caller asked `why_not`. ``parts``: the statistics of x
    where they are known already, of a part for each segment of the norm. None where `guard` finds that they must not
    run; RuntimeError then if ``required``."""
    with torch.no_grad():
        done = proven_forward(step, o, parts, channels_last, dtype, required)
    if done is None:
        return None
    tensors = (o.x, o.scale, o.shift, o.residual, o.slope)
    if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]):
        return _NormAct.apply(*tensors, done, step, channels_last, required)
    return done.y


# --- backward ---------------------------------------------------------------------------------------------------------


class OfNorm(NamedTuple):
    """What a backward knows beside the tensors that it saved."""

    step: Step
    channels_last: bool
    several: Shared | None
    required: bool


def norm_setup(
    step: Step, tensors: tuple[Tensor | None, ...], done: Forward, channels_last: bool, required: bool
) -> tuple[OfNorm, tuple[Tensor | None, ...]]:
    """What `norm_backward` takes of a forward on ``tensors``, x, scale, shift, residual and slope: what it knows, and
    the tensors to save."""
    x, scale, shift, residual, slope = tensors
    other = done.y if step.of == "y" else residual if step.of == "x" else None
    needs_x = step.norm is not None or step.of == "x"
    saved = (x if needs_x else None, scale, shift, slope, done.mean, done.var, other)
    return OfNorm(step, channels_last, done.several, required), saved


# (grad, saved, step, channels_last, which gradients, the sums through all processes, required) -> the gradients
Pass = Callable[[Tensor, Saved, Step, bool, tuple[bool, ...], Any, bool], Grads]


def norm_backward(
    of: OfNorm, tensors: Sequence[Tensor | None], need: tuple[bool, ...], grad: Tensor, by: Pass | None = None
) -> Grads:
    """Gradients of x, scale, shift, residual and slope, as ``need`` asks for each, differentiable where grad mode is
    on. ``of`` and ``tensors`` as `norm_setup` gave them. ``by``: what computes gradients that are not
    differentiable."""
    x, *rest = tensors
    saved = Saved(grad if x is None else x, *rest)
    if by is None and (torch.is_grad_enabled() or is_batched(grad)):
        if of.several is not None:
            norm_sync.no_second_derivative()
        with torch.enable_grad():
            return _recorded_backward(grad, saved, of.step, need)
    reduce = None if of.several is None else _reducer(of.several)
    return (by or proven_backward)(grad, saved, of.step, of.channels_last, need, reduce, of.required)


def proven_backward(
    grad: Tensor,
    saved: Saved,
    step: Step,
    channels_last: bool,
    need: tuple[bool, ...],
    reduce: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    required: bool,
) -> Grads:
    """`norm_act_backward.backward`, or its equations by PyTorch's operators where `guard` finds that it must not
    run."""
    plan = plan_of_backward(grad, saved, step, channels_last, need, reduce is not None)
    if plan.proof.ready:
        return backward(grad, saved, step, channels_last, need, reduce, plan)
    found = guard.first_use(
        plan.proof,
        lambda: backward(grad, saved, step, channels_last, need, reduce, plan),
        lambda: norm_act_trial.backward_problem(grad, saved, step, channels_last, need, reduce is not None),
        required,
    )
    return backward_by_torch(grad, saved, step, need, reduce) if found is None else found


def _reducer(several: Shared) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def reduce(sums: Tensor) -> tuple[Tensor, Tensor]:
        total = sums.clone()
        dist.all_reduce(total, group=several.group)
        return total, several.values

    return reduce


def _recorded_backward(grad: Tensor, s: Saved, step: Step, need: tuple[bool, ...]) -> Grads:
    """By the composition. The norm is differentiated by aliases of its inputs: they may depend on each other elsewhere
    (a residual from which x was computed)."""
    x, scale, shift = (None if t is None else t.view_as(t) for t in (s.x, s.weight, s.bias))
    assert x is not None
    with torch._C._DisableAutocast():
        u = composition(step.norm, Operands(x, mean=s.mean, var=s.var, scale=scale, shift=shift))
        dz = grad.to(u.dtype)
        dslope = None
        if step.of == "y":
            assert s.other is not None
            dz = dz * activation_derivative(step.activation, s.other, of="y")
        elif step.of == "x":
            z = u if s.other is None else u + s.other.to(u.dtype)
            if need[4] and s.slope is not None:
                by_element = torch.where(z > 0, torch.zeros_like(z), z * dz)
                dims = (0, *range(2, z.dim())) if s.slope.numel() > 1 else tuple(range(z.dim()))
                dslope = by_element.sum(dims).reshape(s.slope.shape).to(s.slope.dtype)
            dz = dz * activation_derivative(step.activation, z, s.slope, of="x")
        if step.norm is None:
            return Grads(dz.to(grad.dtype), None, None, dz.to(grad.dtype) if need[3] else None, dslope)
        wanted = [t for t, n in zip((x, scale, shift), need[:3], strict=True) if n and t is not None]
        found = iter(torch.autograd.grad(u, wanted, dz, create_graph=True) if wanted else ())
        dx, dw, db = (
            next(found) if n and t is not None else None for t, n in zip((x, scale, shift), need, strict=False)
        )
    return Grads(dx, dw, db, dz.to(grad.dtype) if need[3] else None, dslope)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        slope: Tensor | None,
        done: Forward,
        step: Step,
        channels_last: bool,
        required: bool,
    ) -> Tensor:
        ctx.of, saved = norm_setup(step, (x, scale, shift, residual, slope), done, channels_last, required)
        ctx.save_for_backward(*saved)
        return done.y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *norm_backward(ctx.of, ctx.saved_tensors, ctx.needs_input_grad[:5], grad), None, None, None, None


# --- an activation by itself ------------------------------------------------------------------------------------------


def activation_backward(
    grad: Tensor, saved: Tensor | None, activation: Activation, *, bias: bool, required: bool
) -> tuple[Tensor, Tensor | None]:
    """``(grad * act'(saved), its sum over each channel in float32 or None)`` on the kernels, not differentiable.
    ``saved`` is the activation's input or output, as `Activation.saves` says."""
    if not bias and (saved is None or not activation.saves()):
        return grad, None
    n = grad.numel()
    if n and (n < INT32 - 1024 or why_not(_IDENTITY, Operands(grad)) is None) and _fits(grad) and _fits(saved):
        plan = plan_of_activation(grad, saved, activation, bias)
        if plan.proof.ready:
            return activation_pass(grad, saved, activation, bias, plan)
        found = guard.first_use(
            plan.proof,
            lambda: activation_pass(grad, saved, activation, bias, plan),
            lambda: norm_act_trial.activation_problem(grad, saved, activation, bias),
            required,
        )
        if found is not None:
            return found
    return activation_backward_by_torch(grad, saved, activation, bias=bias)


_IDENTITY = norm_step(None)


def _fits(t: Tensor | None) -> bool:
    return t is None or t.dtype in DTYPES


def activation_backward_by_torch(
    grad: Tensor, saved: Tensor | None, activation: Activation, *, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """`activation_backward` by PyTorch's operators."""
    dz = grad
    if saved is not None and activation.saves():
        dz = (grad * activation_derivative(activation, saved)).to(grad.dtype)
    wide = torch.promote_types(dz.dtype, torch.float32)
    return dz, dz.sum((0, *range(2, dz.dim())), dtype=wide) if bias else None
