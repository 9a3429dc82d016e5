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
from ..memory_format import has_both, new_strides
from ..norms import Partials
from ..step import Operands, Step
from . import guard
from .devices import on_device, target_device
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

__all__ = ["ForwardPlan", "apply", "forward_plan", "merge", "merge_of", "moved", "partials", "statistics_of"]


# --- forward ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """The launch that takes the statistics of a tensor: (segments, parts of each, channels) of them."""

    start: Start
    shape: tuple[int, int, int]
    tiles: Tiling


@lru_cache(maxsize=4096)
def statistics_of(shape: torch.Size, each: bool, last: bool, dtype: torch.dtype, sms: int) -> Statistics:
    """Of a tensor (N, C, *size): of each image, or of the batch."""
    t, start = _tiles(forward_kernels.partial_stats_kernel, shape, each, sms, (last,), {})
    segments = shape[0] if each else 1
    return Statistics(start, (segments, t.segments * t.parts // segments, shape[1]), t)


@dataclass(frozen=True)
class Merge:
    """The launch that joins the parts of each segment; momentum and what is kept follow its numbers."""

    start: Start
    shape: tuple[int, int, int]  # segments, 2, C / join
    var: bool
    blocks: tuple[int, int]  # parts and channels of a tile


@lru_cache(maxsize=4096)
def merge_of(shape: tuple[int, int, int], join: int, eps: float, var: bool, moved: _Types = ()) -> Merge:
    """Of (segments, parts, channels), with the unbiased variance if ``var``. ``moved``: dtypes of what it moves."""
    segments, count, c = shape
    block_c = power(c if join == 1 else join, 8)
    block_p = power(count, TILE // block_c)
    programs = segments * (-(-c // block_c) if join == 1 else c // join)
    binary = _binary(forward_kernels.merge_stats_kernel, dict(C=c, JOIN=join, BLOCK_P=block_p, BLOCK_C=block_c))
    start = Start(binary, (programs, 1, 1), (count, float(eps)))
    return Merge(start, (segments, 2, c // join), var, (block_p, block_c))


@dataclass(frozen=True)
class ForwardPlan:
    """``moves``: the merge moves the running statistics."""

    statistics: Statistics | None
    merge: Merge | None
    moves: bool
    apply: Start
    y_last: bool
    strides: tuple[int, ...]  # of the result
    proof: guard.Proof


def forward_plan(
    step: Step, o: Operands, parts: Partials | None, channels_last: bool, dtype: torch.dtype
) -> ForwardPlan:
    """Of `norm_act_autograd.forward` on these tensors."""
    given = None if parts is None else parts.shape[1]
    if o.group is not None and norm_sync.shared(step.norm, o):
        given = dist.get_world_size(o.group)
    x, mean, var, scale, shift, batches, residual, slope = (
        o.x, o.mean, o.var, o.scale, o.shift, o.batches, o.residual, o.slope,
    )  # fmt: skip
    return _forward(
        step,
        channels_last,
        dtype,
        x.shape,
        will_be_last(x),
        _types(x, scale, shift, mean, var, batches, residual, slope),
        0 if slope is None else slope.numel(),
        parts is not None,
        given,
        (mean is None or mean.is_contiguous()) and (var is None or var.is_contiguous()),
        *_where(x),
    )


@lru_cache(maxsize=4096)
def _forward(
    step: Step,
    channels_last: bool,
    dtype: torch.dtype,
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
    n, c, norm = shape[0], shape[1], step.norm
    last = (x_last, channels_last or has_both(c, shape[2:]))
    kernel = forward_kernels.norm_act_kernel
    t, apply = _tiles(kernel, shape, each(norm), sms, last, _common(step, c, slopes), eps_of(norm))
    constants: dict[str, Any] = {"slopes": slopes, **_told("apply", t, last)}
    statistics = merge = None
    moves = False
    if norm is not None and norm.measured:
        segments, count = n if norm.per_image else 1, given
        if not measured_before:
            statistics = statistics_of(shape, norm.per_image, x_last, types[0], sms)
            constants |= _told("statistics", statistics.tiles, (x_last,))
            count = count or statistics.shape[1]
        moves = norm.kind == "batch" and flat
        parts, var = (segments, count or 1, c), not moves and types[4] is not None
        merge = merge_of(parts, norm.join(c), norm.eps, var, types[3:6] if moves else ())
        constants |= {"merge": merge.blocks, "merge.moves": flat}
    constants |= {"y": str(dtype)}
    proof = _proof(NormPass("", step, c), "one pass", index, types[0], types, **constants)
    return ForwardPlan(statistics, merge, moves, apply, last[1], new_strides(shape, channels_last), proof)


# --- forward ----------------------------------------------------------------------------------------------------------


def partials(x: Tensor, each: bool, s: Statistics | None = None) -> Partials:
    """The statistics of x (N, C, *size) by parts: of each image, or of the batch. ``s``: their plan, where it is at
    hand."""
    x = laid_out(x)
    s = s or statistics_of(x.shape, each, is_last(x), x.dtype, target_device(x).multiprocessors)
    parts = Partials.empty(x, s.shape)
    with on_device(x):
        s.start(x, parts.stats)
    if OBSERVERS:
        of_launch("norm-statistics")
    return parts


def merge(
    parts: Partials,
    m: Merge,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    batches: Tensor | None = None,
    momentum: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """On the current device: (S, 2, C / join) means and 1/deviations, and (S, C / join) unbiased variances or None,
    float32. Running tensors (one segment) move, and ``batches`` goes up by one."""
    stats, start = parts.stats, m.start
    moments = stats.new_empty(m.shape)
    var = stats.new_empty((m.shape[0], m.shape[2])) if m.var else None
    start.binary(
        start.grid, stats, moments, var, running_mean, running_var, batches, *start.numbers, float(momentum),
        1.0 - momentum,
    )  # fmt: skip
    if OBSERVERS:
        of_launch("norm-merge")
    return moments, var


def moved(parts: Partials, m: Merge, o: Operands) -> Tensor:
    """`merge`'s moments, and the running tensors of ``o`` moved."""
    mean, var, batches = o.mean, o.var, o.batches
    moments, _ = merge(parts, m, mean, var, batches, o.momentum)
    if batches is not None:  # as autograd is told of it in eager mode, and not of running statistics that move
        torch.autograd.graph.increment_version(batches)
    return moments


def apply(o: Operands, mean: Tensor | None, var: Tensor | None, dtype: torch.dtype, plan: ForwardPlan) -> Tensor:
    """``act((x - mean) / deviation * scale + shift + residual)`` in ``dtype``, on the current device; ``mean`` and
    ``var`` as of `cnnfast.reference.Saved`."""
    x = laid_out(o.x)
    y = torch.empty_strided(x.shape, plan.strides, dtype=dtype, device=x.device)
    residual = None if o.residual is None else _as(o.residual, plan.y_last)
    plan.apply(x, y, residual, *_vectors(mean, var, o.scale, o.shift, o.slope))
    if OBSERVERS:
        of_launch("norm-apply")
    return y
