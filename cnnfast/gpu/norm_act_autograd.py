"""Norm + residual + activation on the Triton kernels, with gradients.

Mean and deviation that the forward saved are constants to a second derivative. So a backward that is itself recorded
(`torch.is_grad_enabled()`) differentiates the composition of `norm_aten` instead.

`forward`, `norm_setup` and `norm_backward` are the formulas, of the `torch.autograd.Function` of eager mode and of
the operators that `torch.compile` sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import dispatch, norm_sync
from ..activations import Activation, activation_derivative
from ..dispatch import is_batched
from ..norms import NormCall, Partials
from ..reference import Grads, Saved, backward_by_torch, composition
from ..step import NormHow, how_of
from . import guard, norm_act, norm_act_trial
from .norm_act_backward import activation_pass, backward, plan_of_activation, plan_of_backward
from .why_not import norm_why_not

__all__ = [
    "activation_backward",
    "forward",
    "norm_backward",
    "norm_setup",
    "proven_backward",
    "proven_forward",
    "run",
    "statistics",
]


class Shared(NamedTuple):
    """Of statistics of several processes: their group, and how many values they are of."""

    group: Any
    values: Tensor


def statistics(
    x: Tensor, call: NormCall, parts: Partials | None, plan: norm_act.ForwardPlan
) -> tuple[Tensor, Tensor, Shared | None]:
    """(mean, 1/deviation) of the input of ``call``, (S, C or groups) float32, and its running tensors moved."""
    assert plan.merge is not None
    if parts is None:
        parts = norm_act.partials(x, call.norm.per_image, plan.statistics)
    several = None
    if norm_sync.shared(call):
        parts = norm_sync.gather(parts, call.process_group)
        several = Shared(call.process_group, parts.count.sum())
    mean, var, momentum = call.running_mean, call.running_var, call.momentum
    if plan.moves:
        center, rstd, _ = norm_act.merge(parts, plan.merge, mean, var, momentum)
        _moved([t for t in (mean, var) if t is not None])
        return center, rstd, several
    center, rstd, unbiased = norm_act.merge(parts, plan.merge)
    # Each image's statistics count alike, as in torch.
    for old, new in ((mean, center), (var, unbiased)):
        if old is not None and new is not None:
            old.copy_(old.float() * (1 - momentum) + new.mean(0) * momentum)
    return center, rstd, several


def _moved(tensors: list[Tensor]) -> None:
    """Tell autograd of what a kernel wrote."""
    for t in tensors:
        torch.autograd.graph.increment_version(t)


def norm_setup(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    y: Tensor,
    how: NormHow,
    several: Shared | None,
    required: bool = False,
) -> None:
    ctx.how, ctx.several, ctx.required = how, several, required
    other = y if how.of == "y" else residual if how.of == "x" else None
    needs_x = how.norm is not None or how.of == "x"
    ctx.save_for_backward(x if needs_x else None, weight, bias, slope, mean, rstd, other)


def norm_backward(ctx: Any, grad: Tensor) -> Grads:
    """Gradients of x, weight, bias, residual and slope, differentiable where grad mode is on."""
    how: NormHow = ctx.how
    x, *rest = ctx.saved_tensors
    saved = Saved(grad if x is None else x, *rest)
    need = tuple(ctx.needs_input_grad[:5])
    if torch.is_grad_enabled() or is_batched(grad):
        if ctx.several is not None:
            norm_sync.no_second_derivative()
        with torch.enable_grad():
            return _recorded_backward(grad, saved, how, need)
    reduce = None if ctx.several is None else _reducer(ctx.several)
    return proven_backward(grad, saved, how, need, reduce, ctx.required)


def proven_backward(
    grad: Tensor,
    saved: Saved,
    how: NormHow,
    need: Grads | tuple[bool, ...],
    reduce: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    required: bool,
) -> Grads:
    """`norm_launch.backward`, or its equations by PyTorch's operators where `guard` finds that it must not run."""
    plan = plan_of_backward(grad, saved, how, need, reduce is not None)
    if plan.proof.ready:
        return backward(grad, saved, how, need, reduce, plan)
    found = guard.first_use(
        plan.proof,
        lambda: backward(grad, saved, how, need, reduce, plan),
        lambda: norm_act_trial.backward_problem(grad, saved, how, need, reduce is not None),
        required,
    )
    return backward_by_torch(grad, saved, how, need, reduce) if found is None else found


def _reducer(several: Shared) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def reduce(sums: Tensor) -> tuple[Tensor, Tensor]:
        total = sums.clone()
        dist.all_reduce(total, group=several.group)
        return total, several.values

    return reduce


def _recorded_backward(grad: Tensor, s: Saved, how: NormHow, need: tuple[bool, ...]) -> Grads:
    """By the composition. The norm is differentiated by aliases of its inputs: they may depend on each other elsewhere
    (a residual from which x was computed)."""
    x, weight, bias = (None if t is None else t.view_as(t) for t in (s.x, s.weight, s.bias))
    assert x is not None
    with torch.autocast(x.device.type, enabled=False):
        call = None
        if how.norm is not None:
            call = NormCall(how.norm, weight, bias, s.mean, s.rstd, use_input_stats=how.measured)
        u = composition(x, call)
        dz = grad.to(u.dtype)
        dslope = None
        if how.of == "y":
            assert s.other is not None
            dz = dz * activation_derivative(how.activation, s.other, of="y")
        elif how.of == "x":
            z = u if s.other is None else u + s.other.to(u.dtype)
            if need[4] and s.slope is not None:
                by_element = torch.where(z > 0, torch.zeros_like(z), z * dz)
                dims = (0, *range(2, z.dim())) if s.slope.numel() > 1 else tuple(range(z.dim()))
                dslope = by_element.sum(dims).reshape(s.slope.shape).to(s.slope.dtype)
            dz = dz * activation_derivative(how.activation, z, s.slope, of="x")
        if how.norm is None:
            return Grads(dz.to(grad.dtype), None, None, dz.to(grad.dtype) if need[3] else None, dslope)
        wanted = [t for t, n in zip((x, weight, bias), need[:3], strict=True) if n and t is not None]
        found = iter(torch.autograd.grad(u, wanted, dz, create_graph=True) if wanted else ())
        dx, dw, db = (
            next(found) if n and t is not None else None for t, n in zip((x, weight, bias), need, strict=False)
        )
    return Grads(dx, dw, db, dz.to(grad.dtype) if need[3] else None, dslope)


class Forward(NamedTuple):
    """What a forward gives: the result, and the statistics that it took."""

    y: Tensor
    mean: Tensor | None
    rstd: Tensor | None
    several: Shared | None


def forward(
    x: Tensor,
    call: NormCall | None,
    residual: Tensor | None,
    slope: Tensor | None,
    parts: Partials | None,
    how: NormHow,
    plan: norm_act.ForwardPlan | None = None,
) -> Forward:
    """A whole forward without gradients: statistics (unless ``parts`` holds them), running tensors, apply. ``plan``:
    where it is at hand."""
    plan = plan or norm_act.forward_plan(x, call, residual, slope, parts, how)
    mean = rstd = weight = bias = several = None
    with torch.no_grad():
        if call is not None:
            weight, bias = call.weight, call.bias
            if how.measured:
                mean, rstd, several = statistics(x, call, parts, plan)
            elif call.norm.kind != "affine":
                mean, rstd = call.running_mean, call.running_var
        y = norm_act.apply(x, weight, bias, residual, slope, mean, rstd, how, plan)
    return Forward(y, mean, rstd, several)


def proven_forward(
    x: Tensor,
    call: NormCall | None,
    residual: Tensor | None,
    slope: Tensor | None,
    parts: Partials | None,
    how: NormHow,
    required: bool,
) -> Forward | None:
    """`forward`, or None where PyTorch's operators must run."""
    plan = norm_act.forward_plan(x, call, residual, slope, parts, how)
    if plan.proof.ready:
        return forward(x, call, residual, slope, parts, how, plan)
    return guard.first_use(
        plan.proof,
        lambda: forward(x, call, residual, slope, parts, how, plan),
        lambda: norm_act_trial.forward_problem(forward, x, call, residual, slope, parts, how),
        required,
    )


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        slope: Tensor | None,
        done: Forward,
        how: NormHow,
        required: bool,
    ) -> Tensor:
        norm_setup(ctx, x, weight, bias, residual, slope, done.mean, done.rstd, done.y, how, done.several, required)
        return done.y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *norm_backward(ctx, grad), None, None, None


def run(
    x: Tensor,
    call: NormCall | None,
    residual: Tensor | None,
    activation: Activation,
    slope: Tensor | None,
    parts: Partials | None,
    channels_last: bool,
    dtype: torch.dtype,
    required: bool,
) -> Tensor | None:
    """`normalise` on the kernels; the caller asked `norm_why_not`. None where `guard` finds that they must not
    run; RuntimeError then if ``required``."""
    measured = call is not None and call.measured
    how = how_of(None if call is None else call.norm, measured, activation, channels_last, dtype, residual is not None)
    done = proven_forward(x, call, residual, slope, parts, how, required)
    if done is None:
        return None
    weight, bias = (None, None) if call is None else (call.weight, call.bias)
    tensors = (x, weight, bias, residual, slope)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _NormAct.apply(*tensors, done, how, required)
    return done.y


def activation_backward(
    grad: Tensor, saved: Tensor | None, activation: Activation, *, bias: bool, backend: str | None
) -> tuple[Tensor, Tensor | None]:
    """``(grad * act'(saved), its sum over each channel in float32 or None)``, not differentiable. ``saved`` is the
    activation's input or output, as `Activation.saves` says."""
    if not bias and (saved is None or not activation.saves()):
        return grad, None
    name = dispatch.resolve_backend(backend)
    if name == "triton" or (name == "auto" and grad.is_cuda):
        reason = norm_why_not(grad, saved)
        if reason is None and grad.numel():
            from . import norm_act_trial as norm_proof

            plan = plan_of_activation(grad, saved, activation, bias)
            if plan.proof.ready:
                return activation_pass(grad, saved, activation, bias, plan)
            found = guard.first_use(
                plan.proof,
                lambda: activation_pass(grad, saved, activation, bias, plan),
                lambda: norm_proof.activation_problem(grad, saved, activation, bias),
                name == "triton",
            )
            if found is not None:
                return found
    dz = grad
    if saved is not None and activation.saves():
        dz = (grad * activation_derivative(activation, saved)).to(grad.dtype)
    wide = torch.promote_types(dz.dtype, torch.float32)
    return dz, dz.sum((0, *range(2, dz.dim())), dtype=wide) if bias else None
