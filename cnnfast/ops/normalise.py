"""`normalise`: norm + residual + activation of a 4-D tensor on whatever backend applies, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..activations import Activation, activation_derivative
from ..norms import NormCall, Partials
from . import norm_aten
from .core import to_format

__all__ = ["activation_backward", "normalise"]


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
    check_sizes(x, call)
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
    dz = grad
    if saved is not None and activation.saves():
        dz = (grad * activation_derivative(activation, saved)).to(grad.dtype)
    wide = torch.promote_types(dz.dtype, torch.float32)
    return dz, dz.sum((0, *range(2, dz.dim())), dtype=wide) if bias else None
