"""Arguments of the public operators: checked, completed, brought to the form that `step.Step` and `step.Operands`
have."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations import Activation
from ..dispatch import autocast_dtype

__all__ = [
    "ActivationParam",
    "Epilogue",
    "Ints",
    "as_ints",
    "autocast",
    "check_devices",
    "check_reach",
    "check_residual",
    "check_slope",
    "check_tensor",
    "check_types",
    "check_vectors",
    "epilogue",
    "mixes",
    "parse_activation",
]

ActivationParam = float | Sequence[float] | Tensor | None
Ints = int | Sequence[int]


class Epilogue(NamedTuple):
    """The keyword arguments that all convolutions have."""

    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    activation: Activation | str | None
    activation_param: ActivationParam
    backend: str | None


# --- whole numbers ----------------------------------------------------------------------------------------------------

INT64 = 2**63


def _index(value: Any) -> int | None:
    if type(value) is int:
        return value
    whole = isinstance(value, Tensor) and not (value.is_floating_point() or value.dtype == torch.bool)
    if isinstance(value, bool) or isinstance(value, Tensor) and not whole:
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # no whole number, or a tensor without a value: torch's to judge
        return None


def as_ints(value: Any) -> Ints | None:
    """An int or a tuple of ints from what torch takes for one (NumPy's integers, integer tensors of one element, in a
    sequence whatever has ``__index__``); None for anything else, which torch's own function judges: numbers beyond 64
    bits, booleans and floats, which a cache would confuse with an int that equals them."""
    if type(value) is int:
        return value if value < INT64 else None
    if isinstance(value, list | tuple):
        ints = tuple(_index(v) for v in value)
        return None if any(v is None or v >= INT64 for v in ints) else ints  # type: ignore[return-value]
    whole = _index(value) if isinstance(value, Integral | Tensor) else None
    return None if whole is None or whole >= INT64 else whole


def check_reach(
    transposed: bool,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """RuntimeError where a convolution of an input of this size computes with numbers beyond 64 bits: torch's own
    arithmetic wraps around, to a wrong size or the end of the process."""
    rows = zip(size, kernel, stride, padding, output_padding, dilation, strict=True)
    for d, (n, k, s, p, op, dil) in enumerate(rows):
        if p > (INT64 - 1) // 2:
            raise RuntimeError(
                f"Given padding={p} at dimension {d} , expected padding to be at most {(INT64 - 1) // 2}"
            )
        reach = dil * (k - 1) + 1
        whole = (n - 1) * s + reach + op if transposed else n + 2 * p
        if max(reach, whole) >= INT64:
            raise RuntimeError(
                f"Given stride={s}, padding={p}, output_padding={op}, dilation={dil} and a kernel of {k} at dimension "
                f"{d}, an input of size {n} would give sizes of more than 64 bits"
            )


# --- activations ------------------------------------------------------------------------------------------------------

_known_activation = lru_cache(maxsize=256)(Activation)


def _activation(name: str, params: tuple[float, ...]) -> Activation:
    return Activation(name, params) if torch.compiler.is_compiling() else _known_activation(name, params)


def _numbers(name: str, param: Any) -> tuple[float, ...]:
    """The parameters of activation ``name``."""
    if isinstance(param, Tensor):
        raise ValueError(f"activation_param of {name!r} must be a number, got a tensor (only prelu takes one)")
    several = isinstance(param, Iterable) and not isinstance(param, str | bytes | dict | set)
    params = tuple(param) if several else (param,)
    if not all(isinstance(p, Real) for p in params):
        raise TypeError(f"activation_param of {name!r} must be a number or numbers, got {param!r}")
    return tuple(float(p) for p in params)


def parse_activation(
    activation: Activation | str | None, param: ActivationParam, out_channels: int | None
) -> tuple[Activation, Tensor | None]:
    """(activation, PReLU's slope or None); ``out_channels`` None: not known. ValueError for an unknown name or
    parameters that do not fit it, TypeError for what is neither a name nor a parameter."""
    if activation is None:
        activation = "identity"
    if not isinstance(activation, str | Activation):
        raise TypeError(f"activation must be a name, an Activation or None, got {type(activation).__name__}")
    if isinstance(activation, Activation):
        if param is not None and activation.name != "prelu":
            raise ValueError(f"activation_param={param!r} is given twice: {activation} holds its own")
    else:
        activation = _activation(
            activation, () if param is None or activation == "prelu" else _numbers(activation, param)
        )
    if activation.name != "prelu":
        return activation, None
    wanted = f"a tensor of 1 or {'C_out' if out_channels is None else out_channels} elements"
    if param is None:
        raise ValueError(f"prelu needs activation_param, {wanted}, got None")
    if not isinstance(param, Tensor):
        raise TypeError(f"prelu needs activation_param, {wanted}, got {type(param).__name__}")
    if param.dim() > 1 or out_channels is not None and param.numel() not in (1, out_channels):
        raise ValueError(
            f"prelu's activation_param must have 1 or {out_channels} elements, got shape {tuple(param.shape)}"
        )
    return activation, param.reshape(-1)


# --- tensors ----------------------------------------------------------------------------------------------------------


def check_tensor(name: str, value: Any, wanted: str) -> None:
    """TypeError for what is neither a tensor nor None."""
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name} must be {wanted} or None, got {type(value).__name__}")


def check_types(bias: Any, e: Epilogue) -> None:
    """TypeError where a convolution's optional tensors are none."""
    if bias is not None:
        check_tensor("bias", bias, "a tensor of one value per output channel")
    if e.scale is not None:
        check_tensor("scale", e.scale, "a tensor of one value per output channel")
    if e.shift is not None:
        check_tensor("shift", e.shift, "a tensor of one value per output channel")
    if e.residual is not None:
        check_tensor("residual", e.residual, "a tensor of the output's shape")


def check_devices(x: Tensor, *others: Tensor | None) -> None:
    """torch's own error where tensors are on several devices, which its kernels for meta tensors forget to say."""
    for t in others:
        if t is not None and t.device != x.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{x.device} and {t.device}!"
            )


def check_vectors(x: Tensor, out_channels: int, **vectors: Tensor | None) -> None:
    """Per-channel vectors: shape (out_channels,), floating, on x's device."""
    for name, v in vectors.items():
        if v is None:
            continue
        check_tensor(name, v, "a tensor of one value per output channel")
        if v.shape != (out_channels,):
            raise ValueError(
                f"{name} must have shape ({out_channels},), one value per output channel, got {tuple(v.shape)}"
            )
        if not v.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {v.dtype}")
        if v.device != x.device:
            raise RuntimeError(f"expected {name} on {x.device} like the input, got {v.device}")


def check_slope(x: Tensor, slope: Tensor | None) -> None:
    """PReLU's weight (its shape is `parse_activation`'s affair): floating, on x's device."""
    if slope is None:
        return
    if not slope.is_floating_point():
        raise ValueError(f"activation_param must be floating point, got {slope.dtype}")
    if slope.device != x.device:
        raise RuntimeError(f"expected activation_param on {x.device} like the input, got {slope.device}")


def mixes(x: Tensor, residual: Tensor | None) -> bool:
    """Whether autocast is on for x and the residual has another dtype: they are added as torch adds them."""
    return residual is not None and residual.dtype != x.dtype and _autocasts(x)


def check_residual(x: Tensor, residual: Tensor, shape: Sequence[int]) -> None:
    """The output's shape, x's device and x's dtype, or, under autocast, any floating one."""
    if residual.shape != tuple(shape):
        raise ValueError(f"residual must have the output's shape {tuple(shape)}, got {tuple(residual.shape)}")
    if residual.device == x.device and (
        residual.dtype == x.dtype or mixes(x, residual) and residual.is_floating_point()
    ):
        return
    wanted = "floating point" if _autocasts(x) else str(x.dtype)
    raise ValueError(
        f"residual must be {wanted} on {x.device} like the input, got {residual.dtype} on {residual.device}"
    )


def _autocasts(x: Tensor) -> bool:
    return torch._C._is_any_autocast_enabled() and autocast_dtype(x) is not None


def autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in autocast's dtype where it is on for x's device, as it treats a convolution's arguments."""
    dtype = autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
    if dtype is None:
        return x, weight, bias

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t

    return cast(x), cast(weight), None if bias is None else cast(bias)


def epilogue(
    y: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: Activation,
    slope: Tensor | None,
) -> Tensor:
    """``activation(y * scale + shift + residual)`` as torch computes it, by its rules for dtypes: y (N, C, *size), in
    the wider dtype of the two where the residual has another one than y."""
    column = (-1, *(1,) * (y.dim() - 2))
    wide = torch.promote_types(y.dtype, torch.float32)
    if scale is not None:
        y = y.to(wide) * scale.to(wide).reshape(column)
    if shift is not None:
        y = y.to(wide) + shift.to(wide).reshape(column)
    if residual is not None:
        y = y + residual
    return activation(y, None if slope is None else slope.to(y.dtype))
