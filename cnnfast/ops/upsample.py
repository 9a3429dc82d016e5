"""upsample_conv2d, upsample_conv3d: nearest-neighbour upsampling and a convolution as one transposed convolution with
summed weights."""

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
from .convolution import finish, fused, takes, why_unseen

__all__ = ["upsample_conv2d", "upsample_conv3d"]


def _ints(name: str, value: Any, n: int) -> tuple[int, ...]:
    ints = as_ints(value)
    each = (ints,) * n if type(ints) is int else ints
    if not isinstance(each, tuple) or len(each) != n:
        several = value if isinstance(value, list | tuple) else (value,)
        kind = ValueError if all(isinstance(v, Integral) and type(v) is not bool for v in several) else TypeError
        raise kind(f"{name} must be an int or {('two', 'three')[n - 2]} ints, of 64 bits, got {value!r}")
    return each


def _factors(value: Any, n: int) -> tuple[int, ...]:
    """Whole floats are taken too: `torch.nn.Upsample` makes one of its factor."""

    def whole(v: Any) -> Any:
        return int(v) if isinstance(v, float) and v.is_integer() else v

    given = type(value)(map(whole, value)) if type(value) in (list, tuple) else whole(value)
    factors = _ints("scale_factor", given, n)
    if min(factors) < 1:
        raise ValueError(f"scale_factor must be positive, got {factors}")
    return factors


@lru_cache(maxsize=4096)
def _step(
    weight_shape: tuple[int, ...], upsample: Upsample, groups: int, activation: Activation, affine: bool, residual: bool
) -> Step:
    c_out, c_in, *kernel = weight_shape
    step = upsample_step(c_in * groups, c_out, tuple(kernel), upsample, groups, activation)
    return replace(step, norm=Norm("affine") if affine else None, residual=residual)


_DOC = """``act(scale * (conv{n}d(pad(interpolate(input, scale_factor, "nearest"))) + bias) + shift + residual)``.

    The upsampled tensor never exists: within a block of ``{block}`` outputs a kernel of ``k`` taps meets at most
    ``ceil((k - 1) / r) + 1`` inputs in each dimension, so the taps are summed first (x2 and {kernel}: {saved} per
    output). {where}

    Args:
        input: (N, C_in, {size}) or (C_in, {size}); float32, float16 or bfloat16 for the fast paths.
        weight: (C_out, C_in/groups, {taps}) with odd {odd}, the input's dtype, as `torch.nn.functional.conv{n}d`
            takes it.
        bias: (C_out,) or None.
        scale_factor: integer upsampling factor, or one per dimension.
        padding: of the convolution, in upsampled pixels, at most k - 1; None for (k - 1) / 2, which keeps the size.
        padding_mode: "zeros", "replicate" or "reflect" (that of at most scale_factor - 1 pixels is replication; a
            larger one runs unfused).
        groups: as in torch.
        scale, shift, residual, activation, activation_param, backend: as in `conv_transpose{n}d`.

    Returns:
        (N, C_out, {first} * r + 2 * padding - {tap} + 1, ...) in the input's dtype.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: an even kernel, a scale factor or padding that is no fit, an unknown padding mode, activation or
            backend.
        RuntimeError: what torch raises; ``backend="triton"`` where the kernel cannot run this, with the reason.
    """


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
    e = Epilogue(scale, shift, residual, activation, activation_param, backend)
    return _upsample_conv(2, input, weight, bias, scale_factor, padding, padding_mode, groups, e)


def upsample_conv3d(
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
    e = Epilogue(scale, shift, residual, activation, activation_param, backend)
    return _upsample_conv(3, input, weight, bias, scale_factor, padding, padding_mode, groups, e)


upsample_conv2d.__doc__ = _DOC.format(
    n=2, block="r x r", kernel="3x3", saved="4 products instead of 9", size="H, W", first="H", taps="kh, kw",
    odd="kh and kw", tap="kh", where="Differentiable any number of times.",
)  # fmt: skip
upsample_conv3d.__doc__ = _DOC.format(
    n=3, block="r x r x r", kernel="3x3x3", saved="8 products instead of 27", size="D, H, W", first="D",
    taps="kd, kh, kw", odd="kd, kh and kw", tap="kd",
    where="On a GPU PyTorch's\n    operators run it. Differentiable any number of times.",
)  # fmt: skip


def _upsample_conv(
    ndim: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale_factor: Ints,
    padding: Ints | None,
    padding_mode: str,
    groups: int,
    e: Epilogue,
) -> Tensor:
    """`upsample_conv2d` or `upsample_conv3d`."""
    dispatch.check_backend(e.backend)
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
        raise TypeError(f"input and weight must be tensors, got {type(input).__name__} and {type(weight).__name__}")
    check_types(bias, e)
    if weight.dim() != ndim + 2:
        taps = ", ".join(("kd", "kh", "kw")[3 - ndim :])
        raise ValueError(f"weight must be (C_out, C_in/groups, {taps}), got shape {tuple(weight.shape)}")
    kernel = tuple(weight.shape[2:])
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(f"kernel size must be odd, got {kernel}")
    factor = _factors(scale_factor, ndim)
    pad = tuple((k - 1) // 2 for k in kernel) if padding is None else _ints("padding", padding, ndim)
    if min(pad) < 0:
        raise ValueError(f"padding must not be negative, got {pad}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode={padding_mode!r} must be one of {PADDING_MODES}")
    act, slope = parse_activation(e.activation, e.activation_param, weight.shape[0])
    x, w, b = autocast(input, weight, bias)
    check_devices(x, w, b)
    if x.dim() not in (ndim + 1, ndim + 2):
        raise RuntimeError(
            f"expected {ndim + 1}D (unbatched) or {ndim + 2}D (batched) input to upsample_conv{ndim}d, "
            f"got shape {tuple(x.shape)}"
        )
    whole_groups = as_ints(groups)
    if type(whole_groups) is not int:
        (F.conv2d, F.conv3d)[ndim - 2](x, w, b, 1, 0, 1, groups)  # says what is wrong with it
        raise TypeError(f"groups must be an int, got {groups!r}")
    step = None
    try:
        make = _step.__wrapped__ if torch.compiler.is_compiling() else _step
        up, affine = Upsample(factor, pad, padding_mode), e.scale is not None or e.shift is not None
        step = make(tuple(w.shape), up, whole_groups, act, affine, e.residual is not None)
        reason = why_unseen(ndim, x) or takes(x, w, b, w.shape[0]) or _unfit(x, step)
    except ValueError as error:
        reason = str(error)
    if not torch.compiler.is_compiling() and (reason is not None or max(pad) > 2**16):
        _check_sizes(x, w, factor, pad)
    if step is not None and reason is None:
        return fused(step, ndim, x, w, b, e, slope)
    # torch's operators run it, or say what is wrong.
    batched = x.dim() == ndim + 2
    y = reference.upsample_conv(x if batched else x.unsqueeze(0), w, b, factor, pad, padding_mode, whole_groups)
    if dispatch.resolve_backend(e.backend) == "triton":
        raise dispatch.refusal(str(reason))
    return finish(y if batched else y.squeeze(0), ndim, e, act, slope)


def _unfit(x: Tensor, step: Step) -> str | None:
    """Why x (N, C, *size) or (C, *size) does not fit the step. ValueError where it has no output for x's size."""
    channels, *size = x.shape[-step.spec.ndim - 1 :]
    if channels != step.spec.in_channels:
        return f"input has {channels} channels, weight expects {step.spec.in_channels}"
    if min(size) < 1:
        return f"empty image of size {tuple(size)}"
    step.output_size(size)
    return None


def _check_sizes(x: Tensor, w: Tensor, factor: Sequence[int], pad: Sequence[int]) -> None:
    """RuntimeError where the upsampled and padded input is beyond 64 bits: torch's padding would end the process."""
    n = len(factor)
    size = [k * r for k, r in zip(x.shape[-n:], factor, strict=True)]
    check_reach(False, size, w.shape[2:], (1,) * n, pad, (0,) * n, (1,) * n)
    padded = [k + 2 * p for k, p in zip(size, pad, strict=True)]
    if math.prod((*x.shape[:-n], *padded, x.element_size())) >= INT64:
        raise RuntimeError(f"an input upsampled to {tuple(size)} and padded by {tuple(pad)} is larger than any memory")
