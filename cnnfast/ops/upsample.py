"""upsample_conv2d: nearest-neighbour upsampling and a convolution as one transposed convolution with summed weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, reference
from ..activations import Activation
from ..norms import Norm
from ..step import PADDING_MODES, Step, Upsample, upsample_step
from .arguments import (
    INT64,
    ActivationParam,
    Epilogue,
    Ints,
    as_ints,
    autocast,
    check_devices,
    check_reach,
    check_types,
    parse_activation,
)
from .convolution import finish, fused, takes

__all__ = ["upsample_conv2d"]


def _pair(name: str, value: Any) -> tuple[int, int]:
    ints = as_ints(value)
    pair = (ints, ints) if type(ints) is int else ints
    if not isinstance(pair, tuple) or len(pair) != 2:
        several = value if isinstance(value, list | tuple) else (value,)
        kind = ValueError if all(isinstance(v, Integral) and type(v) is not bool for v in several) else TypeError
        raise kind(f"{name} must be an int or two ints, of 64 bits, got {value!r}")
    return pair[0], pair[1]


def _factors(value: Any) -> tuple[int, int]:
    """Whole floats are taken too: `torch.nn.Upsample` makes one of its factor."""

    def whole(v: Any) -> Any:
        return int(v) if isinstance(v, float) and v.is_integer() else v

    factors = _pair("scale_factor", type(value)(map(whole, value)) if type(value) in (list, tuple) else whole(value))
    if min(factors) < 1:
        raise ValueError(f"scale_factor must be positive, got {factors}")
    return factors


@lru_cache(maxsize=4096)
def _step(
    weight_shape: tuple[int, ...], upsample: Upsample, groups: int, activation: Activation, affine: bool, residual: bool
) -> Step:
    c_out, c_in, kh, kw = weight_shape
    step = upsample_step(c_in * groups, c_out, (kh, kw), upsample, groups, activation)
    return replace(step, norm=Norm("affine") if affine else None, residual=residual)


def upsample_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale_factor: Ints = 2,
    padding: Ints | None = None,
    padding_mode: str = "zeros",
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | str | None = None,
    activation_param: ActivationParam = None,
    backend: str | None = None,
) -> Tensor:
    """``act(scale * (conv2d(pad(interpolate(input, scale_factor, "nearest"))) + bias) + shift + residual)``.

    The upsampled tensor never exists: within a block of ``r x r`` outputs a kernel of ``k`` taps meets at most
    ``ceil((k - 1) / r) + 1`` inputs, so the taps are summed first (x2 and 3x3: 4 products instead of 9 per output).
    Differentiable any number of times.

    Args:
        input: (N, C_in, H, W) or (C_in, H, W); float32, float16 or bfloat16 for the fast paths.
        weight: (C_out, C_in/groups, kh, kw) with odd kh and kw, the input's dtype, as `torch.nn.functional.conv2d`
            takes it.
        bias: (C_out,) or None.
        scale_factor: integer upsampling factor, or one per dimension.
        padding: of the convolution, in upsampled pixels, at most k - 1; None for (k - 1) / 2, which keeps the size.
        padding_mode: "zeros", "replicate" or "reflect" (that of at most scale_factor - 1 pixels is replication; a
            larger one runs unfused).
        groups: as in torch.
        scale, shift, residual, activation, activation_param, backend: as in `conv_transpose2d`.

    Returns:
        (N, C_out, H * r + 2 * padding - kh + 1, ...) in the input's dtype.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an even kernel, a scale factor or padding that is no fit, an unknown padding mode, activation or
            backend.
        RuntimeError: what torch raises; ``backend="triton"`` where the kernel cannot run this, with the reason.
    """
    dispatch.check_backend(backend)
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
        raise TypeError(f"input and weight must be tensors, got {type(input).__name__} and {type(weight).__name__}")
    e = Epilogue(scale, shift, residual, activation, activation_param, backend)
    check_types(bias, e)
    if weight.dim() != 4:
        raise ValueError(f"weight must be (C_out, C_in/groups, kh, kw), got shape {tuple(weight.shape)}")
    kh, kw = weight.shape[2:]
    if kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(f"kernel size must be odd, got {(kh, kw)}")
    factor = _factors(scale_factor)
    pad = ((kh - 1) // 2, (kw - 1) // 2) if padding is None else _pair("padding", padding)
    if min(pad) < 0:
        raise ValueError(f"padding must not be negative, got {pad}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode={padding_mode!r} must be one of {PADDING_MODES}")
    act, slope = parse_activation(activation, activation_param, weight.shape[0])
    x, w, b = autocast(input, weight, bias)
    check_devices(x, w, b)
    if x.dim() not in (3, 4):
        raise RuntimeError(
            f"expected 3D (unbatched) or 4D (batched) input to upsample_conv2d, got shape {tuple(x.shape)}"
        )
    whole_groups = as_ints(groups)
    if type(whole_groups) is not int:
        F.conv2d(x, w, b, 1, 0, 1, groups)  # says what is wrong with it
        raise TypeError(f"groups must be an int, got {groups!r}")
    step = None
    try:
        make = _step.__wrapped__ if torch.compiler.is_compiling() else _step
        up, affine = Upsample(factor, pad, padding_mode), scale is not None or shift is not None
        step = make(tuple(w.shape), up, whole_groups, act, affine, residual is not None)
        reason = takes(x, w, b, w.shape[0]) or _unfit(x, step)
    except ValueError as error:
        reason = str(error)
    if not torch.compiler.is_compiling() and (reason is not None or max(pad) > 2**16):
        _check_sizes(x, w, factor, pad)
    if step is not None and reason is None:
        return fused(step, 2, x, w, b, e, slope)
    # torch's operators run it, or say what is wrong.
    four = x if x.dim() == 4 else x.unsqueeze(0)
    y = reference.upsample_conv(four, w, b, factor, pad, padding_mode, whole_groups)
    if dispatch.resolve_backend(backend) == "triton":
        raise dispatch.refusal(str(reason))
    return finish(y if x.dim() == 4 else y.squeeze(0), 2, e, act, slope)


def _unfit(x: Tensor, step: Step) -> str | None:
    """Why x (N, C, H, W) or (C, H, W) does not fit the step. ValueError where it has no output for x's size."""
    if x.shape[-3] != step.spec.in_channels:
        return f"input has {x.shape[-3]} channels, weight expects {step.spec.in_channels}"
    if min(x.shape[-2:]) < 1:
        return f"empty image of size {tuple(x.shape[-2:])}"
    step.output_size((x.shape[-2], x.shape[-1]))
    return None


def _check_sizes(x: Tensor, w: Tensor, factor: Sequence[int], pad: Sequence[int]) -> None:
    """RuntimeError where the upsampled and padded input is beyond 64 bits: torch's padding would end the process."""
    size = [n * r for n, r in zip(x.shape[-2:], factor, strict=True)]
    check_reach(False, size, w.shape[2:], (1, 1), pad, (0, 0), (1, 1))
    padded = [n + 2 * p for n, p in zip(size, pad, strict=True)]
    if math.prod((*x.shape[:-2], *padded, x.element_size())) >= INT64:
        raise RuntimeError(f"an input upsampled to {tuple(size)} and padded by {tuple(pad)} is larger than any memory")
