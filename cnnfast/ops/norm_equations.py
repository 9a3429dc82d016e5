"""The backward of norm + residual + activation by PyTorch's operators: what the kernels are held against, and what runs
where they must not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import activation_derivative
from ..norms import per_channel
from .norm_how import NormHow
from .norm_launch import Grads, Saved

__all__ = ["backward_by_torch"]


def backward_by_torch(
    grad: Tensor,
    s: Saved,
    how: NormHow,
    need: Grads | tuple[bool, ...],
    reduce: Any = None,
    terms: dict[str, Tensor] | None = None,
) -> Grads:
    """`norm_launch.backward` by its equations, in float32 or x's wider dtype. Not differentiable: mean and deviation
    are constants here. ``terms`` gets what the gradients of the vectors are sums of."""
    need_x, need_weight, need_bias, need_residual, need_slope = need
    wide = torch.promote_types(s.x.dtype, torch.float32)
    x, dz = s.x.to(wide), grad.to(wide)
    (n, c), dims, join = x.shape[:2], (0, 2, 3), how.join(x.shape[1])

    def spread(v: Tensor) -> Tensor:
        """(S, C / join) or (C,) against x."""
        return v.to(wide).reshape(-1, c // join).repeat_interleave(join, 1)[..., None, None]

    rstd, xhat = torch.ones((), dtype=wide, device=x.device), x
    if s.mean is not None and s.rstd is not None and how.norm is not None:
        rstd = spread(s.rstd) if how.measured else torch.rsqrt(spread(s.rstd) + how.norm.eps)
        xhat = (x - spread(s.mean)) * rstd
    weight = torch.ones_like(rstd) if s.weight is None else per_channel(s.weight.to(wide), x)
    out: dict[str, Tensor | None] = {}
    if how.of:
        at = s.other
        if how.of == "x":
            z = xhat * weight if s.bias is None else xhat * weight + per_channel(s.bias.to(wide), x)
            at = z if s.other is None else z + s.other.to(wide)
            if need_slope and s.slope is not None:
                by_element = torch.where(at > 0, torch.zeros_like(at), at * dz)
                out["slope"] = by_element.sum().reshape(1) if s.slope.numel() == 1 else by_element.sum(dims)
                if terms is not None:
                    terms["slope"] = by_element
        assert at is not None
        dz = dz * activation_derivative(how.activation, at.to(wide), s.slope, of=how.of)
    sums = torch.stack([dz.sum(dims), (dz * xhat).sum(dims)])
    if terms is not None:
        terms |= {"bias": dz, "weight": dz * xhat}
    if need_bias:
        out["bias"] = sums[0]
    if need_weight:
        out["weight"] = sums[1]
    if need_residual:
        out["residual"] = dz
    if need_x:
        dx = dz * weight
        if how.measured:
            if reduce is not None:
                total, number = reduce(sums)
                mean1, mean2 = (per_channel(v, x) * weight / number for v in total)
            else:
                segments = n if how.each else 1
                mean1, mean2 = (spread(_means(v, segments, c // join)) for v in (dx, dx * xhat))
            dx = dx - mean1 - xhat * mean2
        out["x"] = dx * rstd
    like = {"x": s.x, "weight": s.weight, "bias": s.bias, "residual": grad, "slope": s.slope}
    return Grads(**{k: v if v is None or like[k] is None else v.to(like[k].dtype) for k, v in out.items()})  # type: ignore[union-attr]


def _means(v: Tensor, segments: int, groups: int) -> Tensor:
    """(segments, groups) of v (N, C, H, W): over the batch, or over each image's groups of channels."""
    rows = v.transpose(0, 1).reshape(1, groups, -1) if segments == 1 else v.reshape(segments, groups, -1)
    return rows.mean(2)
