"""What the passes of a norm launch, but for the tensors: tiles, grids, binaries of their kernels, and their proof.

A plan is made once for tensors of one kind (shapes, layouts, dtypes) and looked up afterwards. Forward: one pass of
statistics (unless the convolution's epilogue gave them), a merge, one apply pass. Backward: one pass of sums, a finish,
one apply pass. What is proven (`guard`) are passes as a whole: a forward that updates running statistics cannot
be tried on the caller's, and its kernels stand or fall together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import norm_sync
from ..kernels import norm_act as forward_kernels
from ..norms import NormCall, Partials
from ..step import NormHow
from . import guard
from .binary import empty_partials
from .devices import allocate, on_device, target_device
from .guard import NormPass
from .norm_act_plan import (
    TILE,
    Start,
    Tiling,
    _as,
    _binary,
    _common,
    _proof,
    _tiles,
    _told,
    _Types,
    _types,
    _vector,
    _went,
    _where,
    is_last,
    laid_out,
    power,
    will_be_last,
)

__all__ = ["ForwardPlan", "apply", "forward_plan", "merge", "merge_of", "partials", "statistics_of"]


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


# --- forward ----------------------------------------------------------------------------------------------------------


def partials(x: Tensor, each: bool, s: Statistics | None = None) -> Partials:
    """The statistics of x (N, C, H, W) by parts: of each image, or of the batch. ``s``: their plan, where it is at
    hand."""
    x = laid_out(x)
    s = s or statistics_of(x.shape, each, is_last(x), x.dtype, target_device(x).multiprocessors)
    _, parts = empty_partials(x, s.shape)
    with on_device(x):
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
    with on_device(center):
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
    y = allocate(x, x.shape, how.channels_last, how.dtype)
    with on_device(x):
        plan.apply(
            x, y, None if residual is None else _as(residual, plan.y_last), _vector(mean), _vector(rstd),
            _vector(weight), _vector(bias), _vector(slope),
        )  # fmt: skip
    _went("norm-apply")
    return y
