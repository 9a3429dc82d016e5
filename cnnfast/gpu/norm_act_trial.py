"""The kernels of norms on trial (`cnnfast.gpu.guard`): a forward, a backward and an activation's gradient, each whole.

What is compared are a few channels, or groups of them: all that the others share with these is the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import norm_sync
from ..activations import Activation, activation_derivative
from ..norms import Norm, Partials
from ..reference import Grads, Saved, backward_by_torch, composition
from ..step import Operands, Step, norm_step
from . import norm_act, trial
from .norm_act_backward import activation_pass, arrange, backward
from .norm_act_plan import each

__all__ = ["activation_problem", "backward_problem", "forward_problem"]


# --- which channels are compared --------------------------------------------------------------------------------------

CHANNELS = 8


@dataclass(frozen=True)
class _Few:
    """The channels that are compared, and the groups that they are: the first and the last."""

    channels: list[int]
    groups: list[int]
    norm: Norm | None  # of these alone

    @classmethod
    def of(cls, norm: Norm | None, channels: int, whole: bool) -> _Few:
        join = 1 if norm is None else norm.join(channels)
        number = channels // join
        side = max(1, CHANNELS // join // 2)
        groups = [g for g in range(number) if whole or g < side or g >= number - side]
        if norm is not None and norm.kind == "group":
            norm = replace(norm, groups=len(groups))
        return cls([g * join + k for g in groups for k in range(join)], groups, norm)

    def __call__(self, name: str, t: Tensor) -> Tensor:
        if t.dim() > 3:
            return t[:, self.channels]
        if t.dim() == 3:  # (segments, 2, groups)
            return t[:, :, self.groups]
        return t if name == "slope" and t.numel() == 1 else t[self.channels]


# --- trials -----------------------------------------------------------------------------------------------------------


def forward_problem(
    forward: Callable[..., Any],
    step: Step,
    o: Operands,
    parts: Partials | None,
    channels_last: bool,
    dtype: torch.dtype,
) -> str | None:
    """What is wrong with ``forward``, which is `norm_act_autograd.forward`, on tensors like these."""
    norm, c = step.norm, o.x.shape[1]
    few, per_image = _Few.of(norm, c, False), each(norm)
    count = dist.get_world_size(o.group) if norm_sync.shared(norm, o) else None

    def known(x: Tensor) -> Partials | None:
        """Statistics as parts, where the forward does not take them from x itself."""
        if not step.measured or (parts is None and count is None):
            return None
        some = norm_act.partials(x, per_image) if parts is None else _split(x, per_image, parts.shape[1])
        if count is not None:
            return _spread(norm_sync.merged(some), count)
        return some if parts is None else _spread(some, parts.shape[1])

    def run(x: Tensor, **tensors: Tensor | None) -> dict[str, Tensor]:
        moved = {k: tensors[k] for k in ("mean", "var")}
        copies: Any = {**tensors, **{k: v if v is None else v.clone() for k, v in moved.items()}}
        counted = None if o.batches is None else o.batches.clone()
        done = forward(step, o._replace(x=x, group=None, batches=counted, **copies), known(x), channels_last, dtype)
        found = {"y": done.y}
        if step.measured:  # the statistics show in y; by themselves, sums that cancel are not known well
            found |= {k: copies[k] for k in moved if copies[k] is not None}
        if counted is not None and o.batches is not None:
            found["batches"] = (counted - o.batches).type(torch.float32).expand(c)
        return found

    def reference(x: Tensor, residual: Tensor | None, slope: Tensor | None, **vectors: Any) -> dict[str, Tensor]:
        z = composition(few.norm, Operands(x, **vectors))
        z = z if residual is None else z + residual
        found = {"y": step.activation(z, slope), "before y": z}
        if step.measured:
            n = x.shape[0] if per_image else 1
            rows = x.reshape(n, len(few.groups), -1) if per_image else x.transpose(0, 1).reshape(1, x.shape[1], -1)
            var, mean = torch.var_mean(rows, 2, correction=0)
            unbiased = var * (rows.shape[2] / max(1, rows.shape[2] - 1))
            for name, new in (("mean", mean), ("var", unbiased)):
                if vectors[name] is not None:
                    found[name] = vectors[name] * (1 - o.momentum) + new.mean(0) * o.momentum
        if o.batches is not None:
            found["batches"] = x.new_ones(x.shape[1])
        return found

    names = ("x", "residual", "slope", "scale", "shift", "mean", "var")
    return trial.problem_of(run, reference, {n: getattr(o, n) for n in names}, positive=("var",), some=few)


PARTS = 8


def _split(x: Tensor, each: bool, most: int) -> Partials:
    """Statistics of x by a few parts, by PyTorch's operators."""
    wide = x.type(torch.float32)
    segments = x.shape[0] if each else 1
    rows = wide.movedim(1, -1).reshape(segments, -1, x.shape[1])
    chunks = rows.chunk(min(PARTS, most), 1)
    moments = [torch.var_mean(rows, 1, correction=0) for rows in chunks]
    sizes = torch.tensor([float(rows.shape[1]) for rows in chunks], device=x.device)
    mean = torch.stack([mean for _, mean in moments], 1)
    m2 = torch.stack([var for var, _ in moments], 1) * sizes[:, None]
    return Partials.of(sizes.expand(segments, -1), mean, m2)


def _spread(some: Partials, count: int) -> Partials:
    """The same statistics as ``count`` parts of each segment, most of them empty."""
    segments, have, c = some.shape
    at = [k * count // have for k in range(have)]
    shape = (segments, count, c)
    spread = Partials(torch.zeros_like(Partials.empty(some.stats, shape).stats), shape)
    for whole, part in zip(spread.each, some.each, strict=True):
        whole[:, at] = part
    return spread


def _by_channel(t: Tensor) -> Tensor:
    return t.sum((0, *range(2, t.dim())))


def backward_problem(
    grad: Tensor, s: Saved, step: Step, channels_last: bool, need: Grads | tuple[bool, ...], shared: bool
) -> str | None:
    """What is wrong with `norm_act_backward.backward` on tensors like these."""
    grad, s = arrange(grad, s, step, channels_last)
    few = _Few.of(step.norm, s.x.shape[1], s.slope is not None and s.slope.numel() == 1)
    twice = 2.0 * s.x.numel() / s.x.shape[1]  # as if another process had as many values, all of them zero

    def reduce(sums: Tensor) -> tuple[Tensor, Tensor]:
        return sums.clone(), sums.new_tensor(twice)

    def named(grads: Grads) -> dict[str, Tensor]:
        return {name: t for name, t in grads._asdict().items() if t is not None}

    def run(grad: Tensor, **saved: Any) -> dict[str, Tensor]:
        return named(backward(grad, Saved(**saved), step, channels_last, need, reduce if shared else None))

    def reference(grad: Tensor, **saved: Any) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        some = norm_step(few.norm, step.residual, step.activation)
        found = backward_by_torch(grad, Saved(**saved), some, need, reduce if shared else None, terms)
        return {**named(found), **{f"before {name}": _by_channel(t.abs()) for name, t in terms.items()}}

    def deviations(operands: Mapping[str, Tensor]) -> None:
        if step.measured:
            operands["mean"][:, 1].abs_().add_(0.1)

    given = {"grad": grad, **s._asdict()}
    return trial.problem_of(run, reference, given, positive=("var",), adjust=deviations, some=few)


def activation_problem(grad: Tensor, saved: Tensor | None, activation: Activation, bias: bool) -> str | None:
    """What is wrong with `activation_pass` on tensors like these."""
    few, stored = _Few.of(None, grad.shape[1], False), grad.dtype

    def run(grad: Tensor, saved: Tensor | None) -> dict[str, Tensor]:
        dz, db = activation_pass(grad, saved, activation, bias)
        return {"gradient": dz} if db is None else {"gradient": dz, "sum": db}

    def reference(grad: Tensor, saved: Tensor | None) -> dict[str, Tensor]:
        of = activation.saves() if saved is not None else ""
        dz = grad * activation_derivative(activation, saved) if of and saved is not None else grad
        # The sum is of the gradient as it is stored, as in torch: the yardstick's, too.
        kept = dz if dz.dtype == torch.float64 else dz.type(stored).type(dz.dtype)
        return {"gradient": dz, "sum": _by_channel(kept), "before sum": _by_channel(dz.abs())}

    return trial.problem_of(run, reference, {"grad": grad, "saved": saved}, some=few)
