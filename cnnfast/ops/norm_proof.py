"""The kernels of norms on trial (`cnnfast.guard`): a forward, a backward and an activation's gradient are proven whole.

A forward that updates running statistics cannot be tried on the caller's, and its kernels stand or fall together. What
is compared are a few channels, or groups of them: all that the others share with these is the program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import dispatch, guard, trial
from ..activations import Activation, activation_derivative
from ..block import Step
from ..norms import NormCall, Partials
from . import norm_launch, norm_sync
from .norm_aten import composition
from .norm_equations import backward_by_torch
from .norm_launch import Grads, NormHow, Saved, is_last

__all__ = [
    "NormPass",
    "activation_problem",
    "activation_proof",
    "backward_problem",
    "backward_proof",
    "forward_problem",
    "forward_proof",
]


@dataclass(frozen=True)
class NormPass:
    """What the kernels of one pass compute, for `guard`. ``what``: ahead of the operation's name."""

    what: str
    how: NormHow | Activation
    channels: int

    def describe(self) -> str:
        how = self.how
        if isinstance(how, Activation):
            parts = [how.name]
        else:
            norm = [] if how.norm is None else [f"{how.norm.kind} norm"]
            parts = [*norm, *["residual"] * how.residual, how.activation.name]
        return f"{self.what}{' + '.join(parts)} of {self.channels} channels"

    def concerns(self, step: Step) -> bool:
        """The norm that follows a step is not part of it: one of as many channels, and its activation."""
        activation = self.how if isinstance(self.how, Activation) else self.how.activation
        return self.channels == step.spec.out_channels and activation == step.activation


# --- proofs -----------------------------------------------------------------------------------------------------------

_Types = tuple[torch.dtype | None, ...]


def _types(*tensors: Tensor | None) -> _Types:
    return tuple(None if t is None else t.dtype for t in tensors)


def _named(dtype: torch.dtype | None, types: _Types) -> dict[str, Any]:
    """As a record on disk can hold them."""
    return {"dtype": str(dtype), "types": tuple(map(str, types))}


def _index(x: Tensor) -> int | None:
    return x.device.index or 0 if x.is_cuda else None


def _tiles(shape: Sequence[int], each: bool, sms: int, *last: bool) -> tuple[norm_launch.Tiling, dict[str, Any]]:
    n, c, h, w = shape
    inside = not all(last)
    t = norm_launch.tiling(n, c, h * w, each or inside, inside, sms)
    return t, {**t.constants, "warps": t.num_warps, "last": last}


def forward_proof(
    x: Tensor,
    call: NormCall | None,
    residual: Tensor | None,
    slope: Tensor | None,
    parts: Partials | None,
    how: NormHow,
) -> guard.Proof:
    """Of `norm_autograd.forward` on these tensors. A dictionary's look-up after the first time."""
    index = _index(x)
    if index is None:
        return guard.UNGUARDED
    vectors = (None,) * 4 if call is None else call[1:5]
    given = None if parts is None else parts.count.shape[1]
    if norm_sync.shared(call):
        given = dist.get_world_size(call.process_group)  # type: ignore[union-attr]
    flat = all(v is None or v.is_contiguous() for v in vectors[2:])
    return _forward_proof(
        how,
        x.shape,
        is_last(x) or not x.is_contiguous(),
        _types(x, *vectors, residual, slope),
        0 if slope is None else slope.numel(),
        parts is not None,
        given,
        flat,
        dispatch.target_device(x).multiprocessors,
        index,
    )


@lru_cache(maxsize=4096)
def _forward_proof(
    how: NormHow,
    shape: torch.Size,
    x_last: bool,
    types: _Types,
    slopes: int,
    measured_before: bool,
    given: int | None,
    flat: bool,
    sms: int,
    index: int,
) -> guard.Proof:
    n, c, h, w = shape
    y_last = how.channels_last or c == 1 or h * w == 1
    _, apply = _tiles(shape, how.each, sms, x_last, y_last)
    constants: dict[str, Any] = {**_named(types[0], types), "slopes": slopes, **_flat("apply", apply)}
    if how.measured:
        count = given
        if not measured_before:
            t, tiles = _tiles(shape, how.each, sms, x_last)
            constants |= _flat("statistics", tiles)
            count = count or t.segments * t.parts // (n if how.each else 1)
        join = how.join(c)
        blocks = norm_launch.merge_blocks(count or 1, c, join)
        constants |= {"merge": blocks, "merge.moves": flat}
    return guard.proof(NormPass("", how, c), "one pass", index, constants)


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{k}": v for k, v in values.items()}


def backward_proof(grad: Tensor, s: Saved, how: NormHow, need: Grads | tuple[bool, ...], shared: bool) -> guard.Proof:
    """Of `norm_launch.backward` on these tensors."""
    index = _index(grad)
    if index is None:
        return guard.UNGUARDED
    return _backward_proof(
        how,
        s.x.shape,
        is_last(s.x) or not s.x.is_contiguous(),
        norm_launch.grad_last(grad, s, how),
        _types(grad, *s),
        0 if s.slope is None else s.slope.numel(),
        tuple(bool(n) for n in need),
        shared,
        dispatch.target_device(grad).multiprocessors,
        index,
    )


@lru_cache(maxsize=4096)
def _backward_proof(
    how: NormHow,
    shape: torch.Size,
    x_last: bool,
    grad_last: bool,
    types: _Types,
    slopes: int,
    need: tuple[bool, ...],
    shared: bool,
    sms: int,
    index: int,
) -> guard.Proof:
    n, c, h, w = shape
    t, tiles = _tiles(shape, how.each, sms, x_last, grad_last or c == 1 or h * w == 1)
    join, segments = how.join(c), n if how.each else 1
    constants = {
        **_named(types[1], types),
        "slopes": slopes,
        "need": need,
        "shared": shared,
        **_flat("tiles", tiles),
        "finish": norm_launch.finish_blocks(segments, t.segments * t.parts // segments, c, join),
    }
    return guard.proof(NormPass("gradient of ", how, c), "two passes", index, constants)


def activation_proof(grad: Tensor, saved: Tensor | None, activation: Activation, bias: bool) -> guard.Proof:
    """Of `norm_launch.activation_backward` on these tensors."""
    index = _index(grad)
    if index is None:
        return guard.UNGUARDED
    last = norm_launch.activation_last(grad, saved)
    sms = dispatch.target_device(grad).multiprocessors
    return _activation_proof(activation, grad.shape, last, _types(grad, saved), bias, sms, index)


@lru_cache(maxsize=4096)
def _activation_proof(
    activation: Activation, shape: torch.Size, last: bool, types: _Types, bias: bool, sms: int, index: int
) -> guard.Proof:
    t, tiles = _tiles(shape, False, sms, last)
    finish = norm_launch.finish_blocks(1, t.segments * t.parts, shape[1], 1)
    constants = {**_named(types[0], types), "bias": bias, **_flat("tiles", tiles), "finish": finish}
    return guard.proof(NormPass("gradient of ", activation, shape[1]), "one pass", index, constants)


# --- which channels are compared --------------------------------------------------------------------------------------

CHANNELS = 8


@dataclass(frozen=True)
class _Few:
    """The channels that are compared, and the groups that they are: the first and the last."""

    channels: list[int]
    groups: list[int]
    how: NormHow  # of these alone

    @classmethod
    def of(cls, how: NormHow, channels: int, whole: bool) -> _Few:
        join = how.join(channels)
        number = channels // join
        each = max(1, CHANNELS // join // 2)
        groups = [g for g in range(number) if whole or g < each or g >= number - each]
        norm = how.norm if how.norm is None or how.norm.kind != "group" else replace(how.norm, groups=len(groups))
        return cls([g * join + k for g in groups for k in range(join)], groups, replace(how, norm=norm))

    def __call__(self, name: str, t: Tensor) -> Tensor:
        if t.dim() == 4:
            return t[:, self.channels]
        if t.dim() == 2:  # (segments, groups)
            return t[:, self.groups]
        return t if name == "slope" and t.numel() == 1 else t[self.channels]


# --- trials -----------------------------------------------------------------------------------------------------------


def forward_problem(
    forward: Callable[..., Any],
    x: Tensor,
    call: NormCall | None,
    residual: Tensor | None,
    slope: Tensor | None,
    parts: Partials | None,
    how: NormHow,
) -> str | None:
    """What is wrong with ``forward``, which is `norm_autograd.forward`, on tensors like these."""
    few = _Few.of(how, x.shape[1], False)
    count = dist.get_world_size(call.process_group) if call is not None and norm_sync.shared(call) else None

    def known(x: Tensor) -> Partials | None:
        """Statistics as parts, where the forward does not take them from x itself."""
        if not how.measured or (parts is None and count is None):
            return None
        some = norm_launch.partials(x, how.each) if parts is None else _split(x, how.each, parts.count.shape[1])
        if count is not None:
            return _spread(norm_sync.merged(some), count)
        return some if parts is None else _spread(some, parts.count.shape[1])

    def run(x: Tensor, residual: Tensor | None, slope: Tensor | None, **vectors: Tensor | None) -> dict[str, Tensor]:
        copies: dict[str, Any] = {k: v if v is None else v.clone() for k, v in vectors.items()}
        mine = None if call is None else call._replace(**copies, process_group=None)
        done = forward(x, mine, residual, slope, known(x), how)
        found = {"y": done.y}
        if how.measured:  # the statistics show in y; by themselves, sums that cancel are not known well
            found |= {k: v for k, v in copies.items() if k.startswith("running") and v is not None}
        return found

    def reference(
        x: Tensor, residual: Tensor | None, slope: Tensor | None, **vectors: Tensor | None
    ) -> dict[str, Tensor]:
        norm = few.how.norm
        mine = None if norm is None else NormCall(norm, **vectors, use_input_stats=how.measured)  # type: ignore[arg-type]
        z = composition(x, mine)
        z = z if residual is None else z + residual
        found = {"y": how.activation(z, slope), "before y": z}
        if how.measured and norm is not None:
            n = x.shape[0] if how.each else 1
            rows = x.reshape(n, len(few.groups), -1) if how.each else x.transpose(0, 1).reshape(1, x.shape[1], -1)
            var, mean = torch.var_mean(rows, 2, correction=0)
            unbiased = var * (rows.shape[2] / max(1, rows.shape[2] - 1))
            for name, new in (("running_mean", mean), ("running_var", unbiased)):
                old = vectors[name]
                if old is not None and call is not None:
                    found[name] = old * (1 - call.momentum) + new.mean(0) * call.momentum
        return found

    vectors = {} if call is None else dict(zip(_VECTORS, call[1:5], strict=True))
    like = {"x": x, "residual": residual, "slope": slope, **vectors}
    return trial.problem_of(run, reference, like, positive=("running_var",), some=few)


_VECTORS = ("weight", "bias", "running_mean", "running_var")
PARTS = 8


def _split(x: Tensor, each: bool, most: int) -> Partials:
    """Statistics of x by a few parts, by PyTorch's operators."""
    wide = x.type(torch.float32)
    segments = x.shape[0] if each else 1
    rows = wide.permute(0, 2, 3, 1).reshape(segments, -1, x.shape[1])
    chunks = rows.chunk(min(PARTS, most), 1)
    moments = [torch.var_mean(rows, 1, correction=0) for rows in chunks]
    sizes = torch.tensor([float(rows.shape[1]) for rows in chunks], device=x.device)
    mean = torch.stack([mean for _, mean in moments], 1)
    m2 = torch.stack([var for var, _ in moments], 1) * sizes[:, None]
    return Partials(sizes.expand(segments, -1), mean, m2)


def _spread(some: Partials, count: int) -> Partials:
    """The same statistics as ``count`` parts of each segment, most of them empty."""
    segments, have, c = some.mean.shape
    at = [k * count // have for k in range(have)]
    empty = some.mean.new_zeros
    spread = Partials(empty((segments, count)), empty((segments, count, c)), empty((segments, count, c)))
    for whole, part in zip(spread, some, strict=True):
        whole[:, at] = part
    return spread


def backward_problem(grad: Tensor, s: Saved, how: NormHow, need: Grads | tuple[bool, ...], shared: bool) -> str | None:
    """What is wrong with `norm_launch.backward` on tensors like these."""
    grad, s = norm_launch.arrange(grad, s, how)
    few = _Few.of(how, s.x.shape[1], s.slope is not None and s.slope.numel() == 1)
    twice = 2.0 * s.x.numel() / s.x.shape[1]  # as if another process had as many values, all of them zero

    def reduce(sums: Tensor) -> tuple[Tensor, Tensor]:
        return sums.clone(), sums.new_tensor(twice)

    def named(grads: Grads) -> dict[str, Tensor]:
        return {name: t for name, t in grads._asdict().items() if t is not None}

    def run(grad: Tensor, **saved: Any) -> dict[str, Tensor]:
        return named(norm_launch.backward(grad, Saved(**saved), how, need, reduce if shared else None))

    def reference(grad: Tensor, **saved: Any) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        found = backward_by_torch(grad, Saved(**saved), few.how, need, reduce if shared else None, terms)
        return {**named(found), **{f"before {name}": t.abs().sum((0, 2, 3)) for name, t in terms.items()}}

    return trial.problem_of(run, reference, {"grad": grad, **s._asdict()}, positive=("rstd",), some=few)


def activation_problem(grad: Tensor, saved: Tensor | None, activation: Activation, bias: bool) -> str | None:
    """What is wrong with `norm_launch.activation_backward` on tensors like these."""
    few = _Few.of(NormHow(None, False, activation, True, grad.dtype), grad.shape[1], False)

    def run(grad: Tensor, saved: Tensor | None) -> dict[str, Tensor]:
        dz, db = norm_launch.activation_backward(grad, saved, activation, bias)
        return {"gradient": dz} if db is None else {"gradient": dz, "sum": db}

    def reference(grad: Tensor, saved: Tensor | None) -> dict[str, Tensor]:
        of = activation.saves() if saved is not None else ""
        dz = grad * activation_derivative(activation, saved) if of and saved is not None else grad
        return {"gradient": dz, "sum": dz.sum((0, 2, 3)), "before sum": dz.abs().sum((0, 2, 3))}

    return trial.problem_of(run, reference, {"grad": grad, "saved": saved}, some=few)
