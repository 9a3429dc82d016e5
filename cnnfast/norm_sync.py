"""Statistics over the processes of a group (SyncBatchNorm): gathered as parts, then merged.

Counts, means and centred sums of squares cannot be all-reduced; they are gathered, and every process merges the same
parts in the same order. The backward all-reduces the two sums of a channel. Processes may have different batches, and
an empty one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .dispatch import on_cpu
from .norms import Norm, Partials, per_channel
from .step import Operands

__all__ = ["gather", "merged", "no_second_derivative", "shared", "synchronised"]


def shared(norm: Norm | None, o: Operands) -> bool:
    """Whether the statistics of ``norm`` are those of several processes."""
    if norm is None or o.group is None or not norm.measured:
        return False
    return dist.get_world_size(o.group) > 1


def merged(parts: Partials) -> Partials:
    """All parts of each segment as one, by PyTorch's operators in float64."""
    count, mean, m2 = (t.double() for t in parts.each)
    total = count.sum(1, keepdim=True)
    share = (count / total.clamp_min(1))[..., None]
    center = (mean * share).sum(1, keepdim=True)
    m2 = (m2 + (mean - center).square() * count[..., None]).sum(1, keepdim=True)
    dtype = parts.stats.dtype
    return Partials.of(total.to(dtype), center.to(dtype), m2.to(dtype))


def gather(parts: Partials, group: Any) -> Partials:
    """The parts (1, P, C) of all processes of ``group``: one for each, in the order of their ranks."""
    mine, c = merged(parts).stats, parts.shape[-1]
    size = dist.get_world_size(group)
    theirs = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(theirs, mine, group=group)
    count, mean, m2 = torch.stack(theirs).split((1, c, c), dim=1)
    total = count.sum()
    if not bool(total > 1) and on_cpu(mine):
        raise ValueError(f"Expected more than 1 value per channel when training, got {int(total)} in {size} processes")
    return Partials.of(count.reshape(1, size), mean.reshape(1, size, c), m2.reshape(1, size, c))


def no_second_derivative() -> None:
    """RuntimeError: what a backward of synchronised statistics says where its own graph is asked for."""
    raise RuntimeError(
        "a norm with statistics of several processes has no second derivative (create_graph=True): take the gradient "
        "penalty through a model without SyncBatchNorm, or with process_group=None"
    )


class _Synchronised(torch.autograd.Function):
    """``x -> (x - mean) / deviation * weight + bias`` by PyTorch's operators, mean and deviation of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: Norm, o: Operands) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = (0, *range(2, x.dim()))
        number = x.numel() // x.shape[1]
        if number:
            var, mean = torch.var_mean(wide, dims, correction=0)
        else:
            var = mean = wide.new_zeros(x.shape[1])
        mine = Partials.of(mean.new_full((1, 1), number), mean.view(1, 1, -1), (var * number).view(1, 1, -1))
        everyone = gather(mine, o.group)
        count, mean, m2 = (t[0, 0].to(wide.dtype) for t in merged(everyone).each)
        _update(o, mean, m2 / (count - 1).clamp_min(1))
        rstd = torch.rsqrt(m2 / count + norm.eps)
        y = (wide - per_channel(mean, x)) * per_channel(rstd, x)
        if weight is not None:
            y = y * per_channel(weight.to(y.dtype), x)
        if bias is not None:
            y = y + per_channel(bias.to(y.dtype), x)
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.group, ctx.bias_dtype = o.group, None if bias is None else bias.dtype
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            no_second_derivative()
        x, weight, mean, rstd, count = ctx.saved_tensors
        dims = (0, *range(2, x.dim()))
        dz = grad.to(mean.dtype)
        xhat = (x.to(mean.dtype) - per_channel(mean, x)) * per_channel(rstd, x)
        sums = torch.stack([dz.sum(dims), (dz * xhat).sum(dims)])
        db = None if ctx.bias_dtype is None else sums[0].to(ctx.bias_dtype)
        dw = None if weight is None else sums[1].to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, dw, db, None, None
        total = sums.clone()  # dw and db are this process's own
        dist.all_reduce(total, group=ctx.group)
        mean1, mean2 = total / count
        dx = dz - per_channel(mean1, x) - xhat * per_channel(mean2, x)
        scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
        return (dx * per_channel(scale, x)).to(x.dtype), dw, db, None, None


def _update(o: Operands, mean: Tensor, unbiased: Tensor) -> None:
    for running, new in ((o.mean, mean), (o.var, unbiased)):
        if running is not None:
            running.copy_(running.to(new.dtype) * (1 - o.momentum) + new * o.momentum)


def synchronised(norm: Norm, o: Operands) -> Tensor:
    """The batch norm of ``o.x`` with the statistics of all processes of its group, by PyTorch's operators; once
    differentiable."""
    # Beside its own arguments, only numbers and running tensors are read of the operands.
    return _Synchronised.apply(o.x, o.scale, o.shift, norm, o.after(None)._replace(scale=None, shift=None))  # type: ignore[arg-type]
