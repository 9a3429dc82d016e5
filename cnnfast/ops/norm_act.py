"""norm_act, batch_norm, instance_norm and group_norm: a norm, a residual and an activation in one pass."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..activations import Activation
from ..dispatch import watched
from ..gradients import enter, restrided
from ..memory_format import in_format, is_channels_last, new_strides
from ..norms import Norm, check_values
from ..reference import finish
from ..step import Operands, norm_step
from .arguments import (
    ActivationParam,
    as_ints,
    check_residual,
    check_slope,
    check_tensor,
    check_vectors,
    epilogue,
    mixes,
    parse_activation,
)
from .convolution import run

__all__ = ["batch_norm", "group_norm", "instance_norm", "norm_act"]


def norm_act(
    input: Tensor,
    norm: Norm,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    process_group: Any = None,
    residual: Tensor | None = None,
    activation: Activation | str | None = None,
    activation_param: ActivationParam = None,
    backend: str | None = None,
) -> Tensor:
    """``act(norm(input) * weight + bias + residual)``, differentiable any number of times.

    One pass of statistics over the input (none where they are given) and one that does the rest, in float32, rounded
    once; backward one pass that sums and one that applies. PyTorch's operators, which round in between, where Triton
    does not run.

    Args:
        input: (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W); float32, float16 or bfloat16 for the kernels.
        norm: what is normalised over what (`cnnfast.norms.Norm`).
        weight, bias: (C,), any floating dtype, or None.
        running_mean, running_var: (C,) or None. With ``use_input_stats`` they move by ``momentum`` in place as those of
            `torch.nn.functional.batch_norm` and ``instance_norm``; without, they are the statistics.
        process_group: statistics over all its processes (SyncBatchNorm; kind "batch"). Once differentiable.
        residual: the input's shape and dtype, or None. Under autocast any floating dtype: the result then has the wider
            one of the two, as of ``norm(input) + residual``.
        activation, activation_param, backend: as of `cnnfast.ops.conv_transpose2d`.

    Returns:
        The input's shape, dtype and memory format. (Under CUDA autocast a group norm gives float32, as torch's.)

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: statistics of a single value (torch's words); arguments of a wrong shape; unknown names.
        RuntimeError: what torch raises; ``backend="triton"`` where the kernels cannot run this, with the reason.
    """
    dispatch.check_backend(backend)
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if not isinstance(norm, Norm):
        raise TypeError(f"norm must be a cnnfast.norms.Norm, got {type(norm).__name__}")
    check_tensor("residual", residual, "a tensor of the input's shape")
    if process_group is not None and norm.kind != "batch":
        raise ValueError(f"process_group takes a norm of kind 'batch', got {norm.kind!r}")
    tracks = norm.kind in ("batch", "instance")
    running = (running_mean, running_var) if tracks else (None, None)
    o = Operands(input, None, None, *running, weight, bias, residual, None, momentum, process_group)  # type: ignore[arg-type]
    channels = input.shape[1] if input.dim() > 1 else 1
    act, slope = parse_activation(activation, activation_param, channels)
    check_slope(input, slope)
    if residual is not None:
        check_residual(input, residual, input.shape)
    unfit = _unfit(norm, o, use_input_stats)
    if unfit is not None and dispatch.resolve_backend(backend) == "triton":
        raise dispatch.refusal(unfit)
    if unfit is not None:
        return epilogue(_by_torch_itself(norm, o, use_input_stats), None, None, residual, act, slope)
    kind = Norm("running", eps=norm.eps) if tracks and not use_input_stats else norm
    check_values(input.shape, kind, several=process_group is not None)  # which names the shape as the caller has it
    mixed = mixes(input, residual)
    bare = (kind, False, Activation()) if mixed else (kind, residual is not None, act)
    step = norm_step(*bare) if torch.compiler.is_compiling() else _known_step(*bare)
    if input.dim() > 4:
        name = dispatch.resolve_backend(backend)
        if input.dim() > 5 or not dispatch.by_kernels(input, name):
            if name == "triton":
                raise dispatch.refusal(f"the input has shape {tuple(input.shape)}")
            y = finish(step, o._replace(residual=None if mixed else residual, slope=None if mixed else slope))
            return epilogue(y, None, None, residual, act, slope) if mixed else y
    missing = max(0, 4 - input.dim())
    x, res = (_as_4d(t) for t in (input, residual))
    assert x is not None
    last = not missing and _is_last(x, norm)  # torch gives three dimensions contiguous
    if not (torch.compiler.is_compiling() or watched(x)):
        x, res = _arranged(x, last, norm), res if res is None else _entered(res, last)
    o = o._replace(x=x, residual=None if mixed else res, slope=None if mixed else slope)
    y = run(step, o, last, backend)
    if mixed:
        y = epilogue(y, None, None, res, act, slope)
    return y[:, :, 0, 0] if missing == 2 else y.squeeze(2) if missing else y


_known_step = lru_cache(maxsize=4096)(norm_step)


def _as_4d(t: Tensor | None) -> Tensor | None:
    """(N, C) or (N, C, L) as (N, C, 1, L)."""
    if t is None or t.dim() > 3:
        return t
    return t.unsqueeze(2) if t.dim() == 3 else t[:, :, None, None]


def _entered(t: Tensor, last: bool) -> Tensor:
    return enter(t, t.dtype, None, last) if torch.is_grad_enabled() and t.requires_grad else t


def _arranged(x: Tensor, last: bool, norm: Norm) -> Tensor:
    """x as PyTorch's operators bear it, its gradient channels-last if ``last``."""
    # Where sizes of one have strides that say otherwise, the gradient of ATen's batch norm is wrong.
    odd = not x.is_contiguous() and in_format(x, True) and x.stride() != new_strides(x.shape, True)
    # Gradients inside may come in the other format: those of group and instance norms on a CPU are contiguous.
    if odd or is_channels_last(x) != last or last and norm.kind in ("group", "instance"):
        x = _entered(x, last)
    return restrided(x, new_strides(x.shape, True)) if odd else x


def _is_last(x: Tensor, norm: Norm) -> bool:
    """Whether torch's result is channels-last: its batch norm looks at the memory alone."""
    looks = norm.kind == "batch" and not x.is_contiguous() and in_format(x, True)
    return looks or is_channels_last(x)


_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _unfit(norm: Norm, o: Operands, use_input_stats: bool) -> str | None:
    """Why torch's own function is to judge the call, or to run it; None where x (N, C, ...) and the vectors, of C
    elements each on x's device, are there and real, and the numbers are numbers."""
    x = o.x
    if norm.kind == "affine":
        if not x.is_floating_point():
            raise ValueError(f"input must be floating point, got {x.dtype}")
        check_vectors(x, x.shape[1] if x.dim() > 1 else 1, weight=o.scale, bias=o.shift)
        return f"the input has shape {tuple(x.shape)}" if x.dim() < 2 else None
    plain = x.dtype in _DTYPES and x.layout is torch.strided and not x.is_meta and x.dim() > 1
    if not plain:
        return f"the input has shape {tuple(x.shape)} and dtype {x.dtype} on {x.device}"
    c, eps = x.shape[1], norm.eps
    vectors = {"weight": o.scale, "bias": o.shift, "running_mean": o.mean, "running_var": o.var}
    for name, v in vectors.items():
        if v is None:
            if name.startswith("running") and not use_input_stats and norm.kind != "group":
                return f"{name} is missing"
        elif not isinstance(v, Tensor) or v.shape != (c,) or v.device != x.device or v.dtype not in _DTYPES:
            return f"{name} is no real vector of {c} elements on {x.device}"
    if not all(type(v) in (int, float) for v in (eps, o.momentum)) or type(use_input_stats) is not bool:
        return f"eps={eps!r}, momentum={o.momentum!r} and use_input_stats={use_input_stats!r}"
    if not 0.0 < eps < float("inf"):
        return f"eps={eps}"
    return f"{norm.groups} groups of {c} channels" if c % norm.groups else None


def _by_torch_itself(norm: Norm, o: Operands, use_input_stats: bool) -> Tensor:
    if norm.kind == "group":
        return F.group_norm(o.x, norm.groups, o.scale, o.shift, norm.eps)
    if norm.kind == "affine":
        return finish(norm_step(norm), o._replace(residual=None))
    function = F.batch_norm if norm.kind == "batch" else F.instance_norm
    return function(o.x, o.mean, o.var, o.scale, o.shift, use_input_stats, o.momentum, norm.eps)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: Activation | str | None = None,
    activation_param: ActivationParam = None,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, then ``act(... + residual)`` (`norm_act` says how)."""
    return norm_act(
        input, Norm("batch", eps=eps), weight, bias, running_mean=running_mean, running_var=running_var,
        use_input_stats=training, momentum=momentum, residual=residual, activation=activation,
        activation_param=activation_param, backend=backend,
    )  # fmt: skip


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: Activation | str | None = None,
    activation_param: ActivationParam = None,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.instance_norm`, then ``act(... + residual)`` (`norm_act` says how)."""
    return norm_act(
        input, Norm("instance", eps=eps), weight, bias, running_mean=running_mean, running_var=running_var,
        use_input_stats=use_input_stats, momentum=momentum, residual=residual, activation=activation,
        activation_param=activation_param, backend=backend,
    )  # fmt: skip


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: Activation | str | None = None,
    activation_param: ActivationParam = None,
    backend: str | None = None,
) -> Tensor:
    """`torch.nn.functional.group_norm`, then ``act(... + residual)`` (`norm_act` says how)."""
    # A tensor of one dimension torch takes for a convolution's groups alone.
    groups = None if isinstance(num_groups, Tensor) and num_groups.dim() else as_ints(num_groups)
    if type(groups) is not int or groups < 1:
        F.group_norm(input, num_groups, weight, bias, eps)
        raise ValueError(f"num_groups={num_groups!r} must be a positive int")
    return norm_act(
        input, Norm("group", groups, eps), weight, bias, residual=residual, activation=activation,
        activation_param=activation_param, backend=backend,
    )  # fmt: skip
