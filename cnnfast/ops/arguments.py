"""Arguments of the public operators: checked, completed, brought to the form that `block.Step` and `block.Operands`
have."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from ..spec import Activation

__all__ = ["ActivationParam", "autocast", "check_residual", "check_slope", "check_vectors", "parse_activation"]

ActivationParam = float | Sequence[float] | torch.Tensor | None


_known_activation = lru_cache(maxsize=256)(Activation)


def _activation(name: str, params: tuple[float, ...]) -> Activation:
    return Activation(name, params) if torch.compiler.is_compiling() else _known_activation(name, params)


def parse_activation(
    activation: Activation | str | None, param: ActivationParam, out_channels: int
) -> tuple[Activation, torch.Tensor | None]:
    """(activation, PReLU's slope or None). ValueError for an unknown name or parameters that do not fit it."""
    if param is None and activation != "prelu" and not isinstance(activation, Activation):
        return _activation(activation or "identity", ()), None
    if isinstance(activation, Activation):
        if param is not None and activation.name != "prelu":
            raise ValueError(f"activation_param={param!r} is given twice: {activation} holds its own")
    else:
        params: tuple[float, ...] = ()
        if activation != "prelu" and param is not None:
            if isinstance(param, torch.Tensor):
                raise ValueError(
                    f"activation_param of {activation!r} must be a number, got a tensor (only prelu takes one)"
                )
            params = (float(param),) if isinstance(param, int | float) else tuple(float(p) for p in param)
        activation = _activation(activation or "identity", params)
    if activation.name != "prelu":
        return activation, None
    if not isinstance(param, torch.Tensor):
        raise ValueError(f"prelu needs activation_param, a tensor of 1 or {out_channels} elements, got {param!r}")
    if param.dim() > 1 or param.numel() not in (1, out_channels):
        raise ValueError(
            f"prelu's activation_param must have 1 or {out_channels} elements, got shape {tuple(param.shape)}"
        )
    return activation, param.reshape(-1)


def check_vectors(x: torch.Tensor, out_channels: int, **vectors: torch.Tensor | None) -> None:
    """Per-channel vectors: shape (out_channels,), floating, on x's device."""
    for name, v in vectors.items():
        if v is None:
            continue
        if v.shape != (out_channels,):
            raise ValueError(
                f"{name} must have shape ({out_channels},), one value per output channel, got {tuple(v.shape)}"
            )
        if not v.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {v.dtype}")
        if v.device != x.device:
            raise RuntimeError(f"expected {name} on {x.device} like the input, got {v.device}")


def check_slope(x: torch.Tensor, slope: torch.Tensor | None) -> None:
    """PReLU's weight (its shape is `parse_activation`'s affair): floating, on x's device."""
    if slope is None:
        return
    if not slope.is_floating_point():
        raise ValueError(f"activation_param must be floating point, got {slope.dtype}")
    if slope.device != x.device:
        raise RuntimeError(f"expected activation_param on {x.device} like the input, got {slope.device}")


def check_residual(x: torch.Tensor, residual: torch.Tensor, shape: Sequence[int]) -> None:
    """The output's shape, x's dtype and device."""
    if residual.shape != tuple(shape):
        raise ValueError(f"residual must have the output's shape {tuple(shape)}, got {tuple(residual.shape)}")
    if residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"residual must be {x.dtype} on {x.device} like the input, got {residual.dtype} on {residual.device}"
        )


def autocast(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The three in autocast's dtype where it is on for x's device, as it treats a convolution's arguments."""
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device_type)

    def cast(t: torch.Tensor) -> torch.Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), cast(weight), None if bias is None else cast(bias)
