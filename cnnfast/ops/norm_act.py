"""norm_act, batch_norm, instance_norm and group_norm: a norm, a residual and an activation in one pass."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .. import dispatch
from ..memory_format import is_channels_last
from ..norms import Norm, NormCall
from ..spec import Activation
from .arguments import ActivationParam, check_residual, check_slope, check_vectors, parse_activation
from .norm_aten import run as run_by_torch
from .normalise import check_sizes, normalise

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
        input: (N, C), (N, C, L) or (N, C, H, W); float32, float16 or bfloat16 for the kernels.
        norm: what is normalised over what (`cnnfast.norms.Norm`).
        weight, bias: (C,), any floating dtype, or None.
        running_mean, running_var: (C,) or None. With ``use_input_stats`` they move by ``momentum`` in place as those of
            `torch.nn.functional.batch_norm` and ``instance_norm``; without, they are the statistics.
        process_group: statistics over all its processes (SyncBatchNorm; kind "batch"). Once differentiable.
        residual: the input's shape and dtype, or None.
        activation, activation_param, backend: as of `cnnfast.ops.conv_transpose2d`.

    Returns:
        The input's shape, dtype and memory format. (Under CUDA autocast a group norm gives float32, as torch's.)

    Raises:
        ValueError: statistics of a single value (torch's words); arguments of a wrong shape; unknown names.
        RuntimeError: what torch raises; ``backend="triton"`` where the kernels cannot run this, with the reason.
    """
    dispatch.check_backend(backend)
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, got {type(input).__name__}")
    if process_group is not None and norm.kind != "batch":
        raise ValueError(f"process_group takes a norm of kind 'batch', got {norm.kind!r}")
    call = NormCall(norm, weight, bias, running_mean, running_var, use_input_stats, momentum, process_group)
    channels = input.shape[1] if input.dim() > 1 else 1
    act, slope = parse_activation(activation, activation_param, channels)
    check_slope(input, slope)
    if residual is not None:
        check_residual(input, residual, input.shape)
    if input.dim() not in (2, 3, 4) or not input.is_floating_point() or not _fits(input, call):
        if dispatch.resolve_backend(backend) == "triton":
            raise RuntimeError(
                f'backend="triton" cannot run this: the input has shape {tuple(input.shape)} and dtype {input.dtype}'
            )
        return run_by_torch(input, call, residual, act, slope)
    check_sizes(input, call)  # which names the shape as the caller has it
    missing = 4 - input.dim()
    x, res = (_as_4d(t) for t in (input, residual))
    assert x is not None
    last = not missing and is_channels_last(x)  # torch gives three dimensions contiguous
    y = normalise(x, call, res, act, slope, channels_last=last, backend=backend)
    return y[:, :, 0, 0] if missing == 2 else y.squeeze(2) if missing else y


def _as_4d(t: Tensor | None) -> Tensor | None:
    """(N, C) or (N, C, L) as (N, C, 1, L)."""
    if t is None or t.dim() == 4:
        return t
    return t.unsqueeze(2) if t.dim() == 3 else t[:, :, None, None]


def _fits(x: Tensor, call: NormCall) -> bool:
    """Whether the vectors are of C elements on x's device, and all that the norm needs is there. What does not fit is
    torch's own function's to judge."""
    c, device = x.shape[1], x.device
    vectors = (call.weight, call.bias, call.running_mean, call.running_var)
    if call.norm.kind == "affine":
        check_vectors(x, c, weight=call.weight, bias=call.bias)
    elif (
        not call.use_input_stats
        and call.norm.kind != "group"
        and (call.running_mean is None or call.running_var is None)
    ):
        return False
    ok = all(v is None or v.shape == (c,) and v.device == device and v.is_floating_point() for v in vectors)
    return ok and c > 0 and c % call.norm.groups == 0


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
    if training and eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
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
    if type(num_groups) is not int or num_groups < 1:
        F.group_norm(input, num_groups, weight, bias, eps)
        raise ValueError(f"num_groups={num_groups} must be a positive int")
    return norm_act(
        input, Norm("group", num_groups, eps), weight, bias, residual=residual, activation=activation,
        activation_param=activation_param, backend=backend,
    )  # fmt: skip
