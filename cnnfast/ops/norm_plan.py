"""What the passes of a norm launch, but for the tensors: tiles, grids, binaries of their kernels, and their proof.

A plan is made once for tensors of one kind (shapes, layouts, dtypes) and looked up afterwards. Forward: one pass of
statistics (unless the convolution's epilogue gave them), a merge, one apply pass. Backward: one pass of sums, a finish,
one apply pass. What is proven (`cnnfast.guard`) are passes as a whole: a forward that updates running statistics cannot
be tried on the caller's, and its kernels stand or fall together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import dispatch, guard
from ..activations import Activation
from ..kernels import norm_act as forward_kernels
from ..kernels import norm_act_backward as backward_kernels
from ..norms import NormCall, Partials
from . import norm_sync
from .binary import Binary
from .launch import MAX_REGISTERS
from .norm_how import NormHow, NormPass
from .norm_tiles import TILE, Tiling, power, tiling

__all__ = [
    "ActivationPlan",
    "BackwardPlan",
    "ForwardPlan",
    "activation_plan",
    "backward_plan",
    "forget",
    "forward_plan",
    "is_last",
    "merge_of",
    "statistics_of",
    "will_be_last",
]


# --- launches ---------------------------------------------------------------------------------------------------------

_Types = tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class Start:
    """A launch but for its tensors, which come ahead of ``numbers``."""

    binary: Binary
    grid: tuple[int, int, int]
    numbers: tuple[float, ...]

    def __call__(self, *tensors: Tensor | None) -> None:
        self.binary(self.grid, *tensors, *self.numbers)


def _binary(kernel: Any, constants: dict[str, Any], num_warps: int = 4) -> Binary:
    """With fewer registers allowed, ptxas spills a few (seen for three channels on sm_86)."""
    return Binary(kernel, constants, num_warps=num_warps, maxnreg=MAX_REGISTERS)


def is_last(t: Tensor) -> bool:
    """Whether t (N, C, H, W) lies as (N, H, W, C)."""
    return t.is_contiguous(memory_format=torch.channels_last)


def will_be_last(t: Tensor) -> bool:
    """`is_last` of what `norm_launch.laid_out` makes of t."""
    return is_last(t) or not t.is_contiguous()


def _types(*tensors: Tensor | None) -> _Types:
    return tuple([None if t is None else t.dtype for t in tensors])


def _where(x: Tensor) -> tuple[int, int | None]:
    """Multiprocessors to fill, and the index of x's CUDA device (None where there is none: nothing is guarded)."""
    return dispatch.target_device(x).multiprocessors, (x.device.index or 0 if x.is_cuda else None)


def _tiles(
    kernel: Any,
    shape: torch.Size,
    each: bool,
    sms: int,
    last: tuple[bool, ...],
    consts: dict[str, Any],
    *numbers: float,
) -> tuple[Tiling, Start]:
    """The launch of a kernel over tensors of this shape, of which ``last`` says whether they are channels-last: its
    input, and its result."""
    n, c, h, w = shape
    inside = not all(last)
    t = tiling(n, c, h * w, each or inside, inside, sms)
    consts = {**consts, **t.constants, "C": c, "X_LAST": last[0], "Y_LAST": last[-1]}
    return t, Start(_binary(kernel, consts, t.num_warps), t.grid, (t.rows, t.parts, t.tiles, *numbers))


def _common(how: NormHow, channels: int, slopes: int) -> dict[str, Any]:
    var = how.norm is not None and not how.measured and how.norm.kind != "affine"
    return dict(
        JOIN=how.join(channels), EACH=how.each, VAR=var, SLOPES=slopes, OF=how.of, **_params(how.activation)
    )  # fmt: skip


def _params(activation: Activation) -> dict[str, Any]:
    p0, p1, *_ = (*activation.params, 0.0, 0.0)
    return dict(P0=p0, P1=p1, ACT=activation.name)


# --- proofs -----------------------------------------------------------------------------------------------------------


def _told(prefix: str, t: Tiling, last: tuple[bool, ...]) -> dict[str, Any]:
    """Tiles among the constants of a proof."""
    return {f"{prefix}.{k}": v for k, v in {**t.constants, "warps": t.num_warps, "last": last}.items()}


def _proof(subject: NormPass, name: str, index: int | None, dtype: Any, types: _Types, **constants: Any) -> guard.Proof:
    if index is None:
        return guard.UNGUARDED
    kept = {"dtype": str(dtype), "types": tuple(map(str, types))}  # as a record on disk can hold them
    return guard.proof(subject, name, index, {**kept, **constants})


# --- forward ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """The launch that takes the statistics of a tensor: (segments, parts of each, channels) of them."""

    start: Start
    shape: tuple[int, int, int]
    tiles: Tiling


@lru_cache(maxsize=4096)
def statistics_of(shape: torch.Size, each: bool, last: bool, dtype: torch.dtype, sms: int) -> Statistics:
    """Of a tensor (N, C, H, W): of each image, or of the batch."""
    t, start = _tiles(forward_kernels.partial_stats_kernel, shape, each, sms, (last,), {})
    segments = shape[0] if each else 1
    return Statistics(start, (segments, t.segments * t.parts // segments, shape[1]), t)


@dataclass(frozen=True)
class Merge:
    """The launch that joins the parts of each segment; its last two numbers are the momentum and what is kept."""

    start: Start
    shape: tuple[int, int, int]  # (2, or 3 with the variance), segments, C / join
    blocks: tuple[int, int]  # parts and channels of a tile


@lru_cache(maxsize=4096)
def merge_of(shape: torch.Size | tuple[int, ...], join: int, eps: float, var: bool, running: _Types) -> Merge:
    """Of (segments, parts, channels); ``running``: dtypes of the running tensors that move."""
    segments, count, c = shape
    block_c = power(c if join == 1 else join, 8)
    block_p = power(count, TILE // block_c)
    programs = segments * (-(-c // block_c) if join == 1 else c // join)
    binary = _binary(forward_kernels.merge_stats_kernel, dict(C=c, JOIN=join, BLOCK_P=block_p, BLOCK_C=block_c))
    return Merge(
        Start(binary, (programs, 1, 1), (count, float(eps))), (2 + var, segments, c // join), (block_p, block_c)
    )


@dataclass(frozen=True)
class ForwardPlan:
    """``moves``: the merge moves the running statistics."""

    statistics: Statistics | None
    merge: Merge | None
    moves: bool
    apply: Start
    y_last: bool
    proof: guard.Proof


def forward_plan(
    x: Tensor,
    call: NormCall | None,
    residual: Tensor | None,
    slope: Tensor | None,
    parts: Partials | None,
    how: NormHow,
) -> ForwardPlan:
    """Of `norm_autograd.forward` on these tensors."""
    vectors = (None,) * 4 if call is None else call[1:5]
    given = None if parts is None else parts.count.shape[1]
    if norm_sync.shared(call):
        given = dist.get_world_size(call.process_group)  # type: ignore[union-attr]
    return _forward(
        how,
        x.shape,
        will_be_last(x),
        _types(x, *vectors, residual, slope),
        0 if slope is None else slope.numel(),
        parts is not None,
        given,
        all([v is None or v.is_contiguous() for v in vectors[2:]]),
        *_where(x),
    )


@lru_cache(maxsize=4096)
def _forward(
    how: NormHow,
    shape: torch.Size,
    x_last: bool,
    types: _Types,
    slopes: int,
    measured_before: bool,
    given: int | None,
    flat: bool,
    sms: int,
    index: int | None,
) -> ForwardPlan:
    n, c, h, w = shape
    last = (x_last, how.channels_last or c == 1 or h * w == 1)
    kernel = forward_kernels.norm_act_kernel
    t, apply = _tiles(kernel, shape, how.each, sms, last, _common(how, c, slopes), how.eps)
    constants: dict[str, Any] = {"slopes": slopes, **_told("apply", t, last)}
    statistics = merge = None
    moves = False
    if how.measured and how.norm is not None:
        segments, count = n if how.each else 1, given
        if not measured_before:
            statistics = statistics_of(shape, how.each, x_last, types[0], sms)
            constants |= _told("statistics", statistics.tiles, (x_last,))
            count = count or statistics.shape[1]
        moves = how.norm.kind == "batch" and flat
        running = types[3:5]
        parts = (segments, count or 1, c)
        merge = merge_of(
            parts, how.join(c), how.norm.eps, not moves and running[1] is not None, running if moves else (None, None)
        )
        constants |= {"merge": merge.blocks, "merge.moves": flat}
    proof = _proof(NormPass("", how, c), "one pass", index, types[0], types, **constants)
    return ForwardPlan(statistics, merge, moves, apply, last[1], proof)


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
    """``means_shape``: (2, segments, C / join) where the gradient of x subtracts means that the finish takes."""

    sums: Start
    sums_shape: tuple[int, int, int, int]  # 2, or 3 with PReLU's slope; segments, parts, channels
    finish: Start
    means_shape: tuple[int, int, int] | None
    apply: Start
    proof: guard.Proof


def backward_plan(
    shape: torch.Size,
    x_last: bool,
    grad_last: bool,
    grad: Tensor,
    saved: tuple[Tensor | None, ...],
    slopes: int,
    how: NormHow,
    need: tuple[bool, ...],
    shared: bool,
) -> BackwardPlan:
    """Of `norm_launch.backward` for x of this ``shape``, on tensors that are channels-last, once arranged, as told."""
    return _backward(how, shape, x_last, grad_last, _types(grad, *saved), slopes, need, shared, *_where(grad))


@lru_cache(maxsize=4096)
def _backward(
    how: NormHow,
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
    n, c, h, w = shape
    last = (x_last, grad_last or c == 1 or h * w == 1)
    join, segments = how.join(c), n if how.each else 1
    means = how.measured and need[0] and not shared
    common = {**_common(how, c, slopes), "SLOPE_SUM": need[4]}
    t, sums = _tiles(backward_kernels.grad_sums_kernel, shape, how.each, sms, last, common, how.eps)
    _, apply = _tiles(backward_kernels.grad_apply_kernel, shape, how.each, sms, last, common, how.eps)
    parts = t.segments * t.parts // segments
    finish = _finish(segments, parts, c, join, means, float(n * h * w // segments * join))
    constants = {"slopes": slopes, "need": need, "shared": shared, **_told("tiles", t, last), "finish": finish.blocks}
    return BackwardPlan(
        sums,
        (2 + need[4], segments, parts, c),
        finish.start,
        (2, segments, c // join) if means else None,
        apply,
        _proof(NormPass("gradient of ", how, c), "two passes", index, types[1], types, **constants),
    )


# --- an activation's gradient -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActivationPlan:
    apply: Start
    sums_shape: tuple[int, int, int, int]
    finish: Start
    proof: guard.Proof


def activation_plan(
    grad: Tensor, saved: Tensor | None, last: bool, activation: Activation, bias: bool
) -> ActivationPlan:
    """Of `norm_launch.activation_pass` on these tensors, which are channels-last, once arranged, or not."""
    return _activation(activation, grad.shape, last, _types(grad, saved), bias, *_where(grad))


@lru_cache(maxsize=4096)
def _activation(
    activation: Activation, shape: torch.Size, last: bool, types: _Types, bias: bool, sms: int, index: int | None
) -> ActivationPlan:
    _, c, h, w = shape
    last = last or c == 1 or h * w == 1
    consts = {**_params(activation), "OF": activation.saves() if types[1] is not None else ""}
    t, apply = _tiles(backward_kernels.act_backward_kernel, shape, False, sms, (last,), consts)
    finish = _finish(1, t.segments * t.parts, c, 1, False, 1.0)
    constants = {"bias": bias, **_told("tiles", t, (last,)), "finish": finish.blocks}
    return ActivationPlan(
        apply,
        (1, 1, t.segments * t.parts, c),
        finish.start,
        _proof(NormPass("gradient of ", activation, c), "one pass", index, types[0], types, **constants),
    )


def forget() -> None:
    """Drop all plans (for tests)."""
    for cached in (statistics_of, merge_of, _forward, _backward, _activation):
        cached.cache_clear()
