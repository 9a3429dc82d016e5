"""`normalise`: norm + residual + activation of a 4-D tensor on whatever backend applies, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, guard
from ..activations import Activation, activation_derivative
from ..norms import NormCall, Partials
from . import norm_aten
from .core import to_format, watched

__all__ = ["activation_backward", "normalise", "why_not"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LIMIT = 2**31


def why_not(x: Tensor, *vectors: Tensor | None) -> str | None:
    """Why the kernels cannot take x (N, C, H, W) with these other tensors, or None."""
    reason = dispatch.triton_why_not()
    if reason is None and x.is_cuda:
        reason = dispatch.cuda_why_not(x.device.index or 0)
    if reason is not None:
        return reason
    n, c, h, w = x.shape
    if x.dtype not in _DTYPES:
        return f"dtype {x.dtype} is not one of {', '.join(str(d) for d in _DTYPES)}"
    if c * h * w >= _LIMIT:
        return "one image has 2^31 elements or more"
    if n * h * w >= _LIMIT - 1024:
        return "2^31 positions or more"
    for v in vectors:
        if v is not None and v.dtype not in _DTYPES:
            return f"a vector's dtype {v.dtype} is not one of {', '.join(str(d) for d in _DTYPES)}"
    return None


def output_dtype(x: Tensor, call: NormCall | None) -> torch.dtype:
    """x's dtype, and float32 where autocast runs the norm in float32 (group norm on CUDA)."""
    low = x.dtype in (torch.float16, torch.bfloat16)
    group = call is not None and call.norm.kind == "group"
    return torch.float32 if low and group and x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype


def normalise(
    x: Tensor,
    call: NormCall | None,
    residual: Tensor | None,
    activation: Activation,
    slope: Tensor | None,
    *,
    partials: Partials | None = None,
    channels_last: bool,
    backend: str | None,
) -> Tensor:
    """``act(norm(x) + residual)`` of x (N, C, H, W), in x's dtype (float32 of a group norm under CUDA autocast, as
    eager's) and in the memory format asked for; differentiable any number of times (once where statistics are those of
    several processes).

    ``call`` None: no norm. ``slope``: PReLU's weight, of 1 or C elements. ``partials``: the statistics of x where they
    are known already, of a part for each segment of the norm. RuntimeError where an explicit ``backend="triton"``
    cannot run this, with the reason; ValueError for statistics of a single value.
    """
    check_sizes(x, call)
    name = dispatch.resolve_backend(backend)
    if name != "aten" and x.numel() and not torch.compiler.is_compiling() and (name == "triton" or x.is_cuda):
        vectors = () if call is None else (call.weight, call.bias, call.running_mean, call.running_var)
        unseen = watched(x)
        reason = "a tensor subclass, transform, tracer, dispatch mode or forward-mode AD is active" if unseen else None
        reason = reason or why_not(x, *vectors, residual, slope)
        if reason is None and name == "triton":
            reason = dispatch.launch_why_not(x.device)
        if reason is None:
            from . import norm_autograd  # imports triton

            how = (channels_last, output_dtype(x, call), name == "triton")
            y = norm_autograd.run(x, call, residual, activation, slope, partials, *how)
            if y is not None:
                return y
        elif name == "triton":
            raise RuntimeError(f'backend="triton" cannot run this: {reason}')
    return to_format(norm_aten.run(x, call, residual, activation, slope), channels_last)


def check_sizes(x: Tensor, call: NormCall | None) -> None:
    """torch's own errors where statistics are of one value."""
    if call is None or not call.measured:
        return
    n, c, *size = x.shape
    values = 1
    for s in size:
        values *= s
    kind = call.norm.kind
    if kind == "instance" and values == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {x.shape}")
    if kind == "batch" and values * n == 1 and call.process_group is None:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    if kind == "group" and values * n * (c // call.norm.groups) == 1:
        shape = [n * c // call.norm.groups, call.norm.groups, *size]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")


def activation_backward(
    grad: Tensor, saved: Tensor | None, activation: Activation, *, bias: bool, backend: str | None
) -> tuple[Tensor, Tensor | None]:
    """``(grad * act'(saved), its sum over each channel in float32 or None)``, not differentiable. ``saved`` is the
    activation's input or output, as `Activation.saves` says."""
    if not bias and (saved is None or not activation.saves()):
        return grad, None
    name = dispatch.resolve_backend(backend)
    if name == "triton" or (name == "auto" and grad.is_cuda):
        reason = why_not(grad, saved)
        if reason is None and grad.numel():
            from . import norm_launch, norm_proof  # import triton

            plan = norm_launch.plan_of_activation(grad, saved, activation, bias)
            if plan.proof.ready:
                return norm_launch.activation_backward(grad, saved, activation, bias, plan)
            found = guard.first_use(
                plan.proof,
                lambda: norm_launch.activation_backward(grad, saved, activation, bias, plan),
                lambda: norm_proof.activation_problem(grad, saved, activation, bias),
                name == "triton",
            )
            if found is not None:
                return found
    dz = grad
    if saved is not None and activation.saves():
        dz = (grad * activation_derivative(activation, saved)).to(grad.dtype)
    wide = torch.promote_types(dz.dtype, torch.float32)
    return dz, dz.sum((0, *range(2, dz.dim())), dtype=wide) if bias else None
