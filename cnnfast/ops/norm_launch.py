"""Launches of the kernels of `norm_act.py` and `norm_act_backward.py`: layouts, tiles and workspaces.

Forward: one pass of statistics (unless the convolution's epilogue gave them), a merge, one apply pass. Backward: one
pass of sums, a finish, one apply pass. The callers asked `normalise.why_not`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..activations import Activation
from ..kernels import norm_act as forward_kernels
from ..kernels import norm_act_backward as backward_kernels
from ..norms import Norm, Partials
from . import launch as block
from .norm_tiles import TILE, Tiling, power, tiling

__all__ = ["Grads", "NormHow", "activation_backward", "apply", "backward", "grad_sums", "merge", "partials"]


@dataclass(frozen=True)
class NormHow:
    """What a launch computes beside its tensors. ``norm`` None: residual and activation alone. ``measured``: the
    statistics are of the input, and depend on it; otherwise they are constants, and rstd is the running variance."""

    norm: Norm | None
    measured: bool
    activation: Activation
    channels_last: bool  # the result
    dtype: torch.dtype  # of the result
    residual: bool = False

    @property
    def of(self) -> str:
        """What the activation's derivative is taken of: the result ("y"); the activation's input ("x"), which the
        backward computes again; or neither ("")."""
        saves = self.activation.saves()
        return saves if self.residual or not saves else "x"

    def join(self, channels: int) -> int:
        """Channels that share statistics."""
        return channels // self.norm.groups if self.norm is not None and self.norm.kind == "group" else 1

    @property
    def each(self) -> bool:
        """Whether every image has its own statistics."""
        return self.measured and self.norm is not None and self.norm.per_image


# --- layouts ----------------------------------------------------------------------------------------------------------


def is_last(t: Tensor) -> bool:
    """Whether t (N, C, H, W) lies as (N, H, W, C)."""
    return t.is_contiguous(memory_format=torch.channels_last)


def laid_out(t: Tensor) -> Tensor:
    """``t`` channels-last or, where it is that already, contiguous; at an address that 16 divides."""
    if not is_last(t) and not t.is_contiguous():
        t = t.contiguous(memory_format=torch.channels_last)
    return block.aligned(t)


def _as(t: Tensor, last: bool) -> Tensor:
    return block.aligned(t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format))


def _vector(v: Tensor | None) -> Tensor | None:
    return v if v is None else v.contiguous()


def _tiling(x: Tensor, each: bool, *last: bool) -> Tiling:
    n, c, h, w = x.shape
    rows_inside = not all(last)
    sms = dispatch.target_device(x).multiprocessors
    return tiling(n, c, h * w, each or rows_inside, rows_inside, sms)


def _options(num_warps: int) -> dict[str, int]:
    """Of a launch. With fewer registers allowed, ptxas spills a few (seen for three channels on sm_86)."""
    return dict(num_warps=num_warps, maxnreg=block.MAX_REGISTERS)


def _params(activation: Activation) -> dict[str, Any]:
    p0, p1, *_ = (*activation.params, 0.0, 0.0)
    return dict(P0=p0, P1=p1, ACT=activation.name)


def _went(kernel: str) -> None:
    if block.LAUNCHES is not None:
        block.LAUNCHES.append(kernel)


# --- forward ----------------------------------------------------------------------------------------------------------


def partials(x: Tensor, each: bool) -> Partials:
    """The statistics of x (N, C, H, W) by parts: of each image, or of the batch."""
    x = laid_out(x)
    last = is_last(x)
    t = _tiling(x, each, last)
    c, total = x.shape[1], t.segments * t.parts
    stats = x.new_empty(total * (1 + 2 * c), dtype=torch.float32)
    count, mean, m2 = stats.split((total, total * c, total * c))
    with dispatch.on_device(x):
        forward_kernels.partial_stats_kernel[t.grid](
            x,
            count,
            mean,
            m2,
            t.rows,
            t.parts,
            t.tiles,
            C=c,
            X_LAST=last,
            **t.constants,
            **_options(t.num_warps),
        )
    _went("norm-statistics")
    segments = x.shape[0] if each else 1
    shape = (segments, total // segments, c)
    return Partials(count.view(shape[:2]), mean.view(shape), m2.view(shape))


def merge_blocks(count: int, channels: int, join: int) -> tuple[int, int]:
    """Parts and channels of a tile, for ``count`` parts of each segment."""
    block_c = power(channels if join == 1 else join, 8)
    return power(count, TILE // block_c), block_c


def merge(
    parts: Partials,
    join: int,
    eps: float,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.0,
    var: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(mean, 1/deviation, unbiased variance if ``var``), each (S, C / join) float32. Running tensors (one segment)
    move."""
    segments, count, c = parts.mean.shape
    out = parts.mean.new_empty((2 + var, segments, c // join))
    block_p, block_c = merge_blocks(count, c, join)
    grid = segments * (-(-c // block_c) if join == 1 else c // join)
    with dispatch.on_device(parts.mean):
        forward_kernels.merge_stats_kernel[(grid,)](
            parts.count.contiguous(), parts.mean.contiguous(), parts.m2.contiguous(), out[0], out[1],
            out[2] if var else None, running_mean, running_var, count, eps, momentum, 1 - momentum,
            C=c, JOIN=join, BLOCK_P=block_p, BLOCK_C=block_c, **_options(4),
        )  # fmt: skip
    _went("norm-merge")
    return out[0], out[1], out[2] if var else None


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    how: NormHow,
) -> Tensor:
    """``act((x - mean) * rstd * weight + bias + residual)`` in ``how``'s dtype and memory format."""
    x = laid_out(x)
    y = dispatch.allocate(x, tuple(x.shape), how.channels_last, how.dtype)
    x_last, y_last = is_last(x), is_last(y)
    t = _tiling(x, how.each, x_last, y_last)
    with dispatch.on_device(x):
        forward_kernels.norm_act_kernel[t.grid](
            x, y, None if residual is None else _as(residual, y_last), _vector(mean), _vector(rstd), _vector(weight),
            _vector(bias), _vector(slope), t.rows, t.parts, t.tiles, _eps(how),
            **_common(x, how, slope), X_LAST=x_last, Y_LAST=y_last, **t.constants, **_options(t.num_warps),
        )  # fmt: skip
    _went("norm-apply")
    return y


def _eps(how: NormHow) -> float:
    return 0.0 if how.norm is None else how.norm.eps


def _common(x: Tensor, how: NormHow, slope: Tensor | None) -> dict[str, Any]:
    var = how.norm is not None and not how.measured and how.norm.kind != "affine"
    return dict(
        C=x.shape[1], JOIN=how.join(x.shape[1]), EACH=how.each, VAR=var, SLOPES=0 if slope is None else slope.numel(),
        **_params(how.activation),
    )  # fmt: skip


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


def grad_sums(grad: Tensor, s: Saved, how: NormHow, slope_sum: bool) -> Tensor:
    """(2 or 3, S, P, C) float32 by parts: the sums of dz, of dz * xhat and, with ``slope_sum``, of PReLU's slope."""
    x_last, y_last = is_last(s.x), is_last(grad)
    t = _tiling(s.x, how.each, x_last, y_last)
    n, c = s.x.shape[:2]
    segments = n if how.each else 1
    sums = s.x.new_empty((2 + slope_sum, segments, t.segments * t.parts // segments, c), dtype=torch.float32)
    backward_kernels.grad_sums_kernel[t.grid](
        s.x, grad, s.other, s.mean, s.rstd, s.weight, s.bias, s.slope, sums, t.rows, t.parts, t.tiles, _eps(how),
        **_common(s.x, how, s.slope), OF=how.of, SLOPE_SUM=slope_sum, X_LAST=x_last, Y_LAST=y_last, **t.constants,
        **_options(t.num_warps),
    )  # fmt: skip
    _went("norm-grad-sums")
    return sums


def finish_blocks(segments: int, parts: int, channels: int, join: int) -> tuple[int, int]:
    """Parts and channels of a tile."""
    block_c = power(channels if join == 1 else max(8, join), 8)
    return power(segments * parts, TILE // block_c), block_c


def finish(
    sums: Tensor,
    bias: Tensor | None,
    weight: Tensor | None,
    slope: Tensor | None,
    means: Tensor | None,
    scale: Tensor | None,
    count: float,
    join: int,
) -> None:
    """Fill the gradients ``bias``, ``weight`` and ``slope`` (C,), and ``means`` (2, S, C / join)."""
    _, segments, parts, c = sums.shape
    block_p, block_c = finish_blocks(segments, parts, c, join)
    blocks = -(-c // block_c) if join == 1 else c // join
    grid = -(-c // block_c) + (0 if means is None else segments * blocks)
    mean1, mean2 = (None, None) if means is None else (means[0], means[1])
    backward_kernels.finish_sums_kernel[(grid,)](
        sums, bias, weight, slope, mean1, mean2, scale, segments, parts, count,
        C=c, JOIN=join, BLOCK_P=block_p, BLOCK_C=block_c, **_options(4),
    )  # fmt: skip
    _went("norm-grad-finish")


def backward(grad: Tensor, s: Saved, how: NormHow, need: Grads | tuple[bool, ...], reduce: Any = None) -> Grads:
    """The gradients that ``need`` (a truth value for each of `Grads`) asks for. ``reduce(sums) -> (sums, count)`` takes
    the float32 (2, C) sums of dz and dz * xhat through the processes that share a batch's statistics."""
    need_x, need_weight, need_bias, need_residual, need_slope = need
    with dispatch.on_device(grad):
        grad_in = grad
        grad, s = arrange(grad, s, how)
        x, c = s.x, s.x.shape[1]
        centred = how.measured and need_x
        out: dict[str, Tensor | None] = {}
        means = None
        if centred or need_weight or need_bias or need_slope:
            sums = grad_sums(grad, s, how, bool(need_slope))
            segments, join = sums.shape[1], how.join(c)
            shared = centred and reduce is not None
            both = x.new_empty((2, c), dtype=torch.float32) if shared else None
            db = both[0] if both is not None else _like(s.bias) if need_bias else None
            dw = both[1] if both is not None else _like(s.weight) if need_weight else None
            ds = x.new_empty(c, dtype=torch.float32) if need_slope else None
            if centred and not shared:
                means = x.new_empty((2, segments, c // join), dtype=torch.float32)
            count = float(x.numel() // c // segments * join)
            finish(sums, db, dw, ds, means, s.weight, count, join)
            if both is not None:
                total, number = reduce(both)
                means = (total if s.weight is None else total * s.weight.float()) / number
            out["bias"] = (
                None if db is None or not need_bias else db.to(s.bias.dtype if s.bias is not None else db.dtype)
            )
            out["weight"] = (
                None if dw is None or not need_weight else dw.to(s.weight.dtype if s.weight is not None else dw.dtype)
            )
            if ds is not None and s.slope is not None:
                out["slope"] = (ds if s.slope.numel() > 1 else ds.sum(0, keepdim=True)).to(s.slope.dtype)
        identity = how.activation.name == "identity"
        dz = torch.empty_like(grad) if need_residual and not identity and how.norm is not None else None
        if need_x or need_residual and not identity:
            dx = torch.empty_like(x)
            x_last, y_last = is_last(x), is_last(grad)
            t = _tiling(x, how.each, x_last, y_last)
            backward_kernels.grad_apply_kernel[t.grid](
                x, grad, s.other, s.mean, s.rstd, s.weight, s.bias, s.slope,
                None if means is None else means[0], None if means is None else means[1], dx, dz,
                t.rows, t.parts, t.tiles, _eps(how),
                **_common(x, how, s.slope), OF=how.of, X_LAST=x_last, Y_LAST=y_last, **t.constants,
                **_options(t.num_warps),
            )  # fmt: skip
            _went("norm-grad-apply")
            out["x"] = dx
        if need_residual:
            out["residual"] = grad_in if identity else out["x"] if dz is None else dz
    return Grads(**out)


def _like(v: Tensor | None) -> Tensor | None:
    return None if v is None else torch.empty_like(v, memory_format=torch.contiguous_format)


def activation_last(grad: Tensor, saved: Tensor | None) -> bool:
    """Whether `activation_backward` takes its tensors channels-last."""
    t = grad if saved is None else saved
    return is_last(t) or not t.is_contiguous()


def activation_backward(
    grad: Tensor, saved: Tensor | None, activation: Activation, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """`normalise.activation_backward` in one pass."""
    of = activation.saves() if saved is not None else ""
    if not of and not bias:
        return grad, None
    with dispatch.on_device(grad):
        g = _as(grad, activation_last(grad, saved))
        last = is_last(g)
        t = _tiling(g, False, last)
        c = g.shape[1]
        sums = g.new_empty((1, 1, t.segments * t.parts, c), dtype=torch.float32) if bias else None
        dz = torch.empty_like(g) if of else None
        backward_kernels.act_backward_kernel[t.grid](
            g, _as(saved, last) if of and saved is not None else None, dz, sums, t.rows, t.parts, t.tiles,
            C=c, **_params(activation), OF=of, Y_LAST=last, **t.constants, **_options(t.num_warps),
        )  # fmt: skip
        _went("activation-grad")
        db = None
        if sums is not None:
            db = g.new_empty(c, dtype=torch.float32)
            finish(sums, db, None, None, None, None, 1.0, 1)
    return grad if dz is None else dz, db
