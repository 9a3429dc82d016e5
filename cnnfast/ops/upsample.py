"""upsample_conv2d: nearest-neighbour upsampling and a convolution as one transposed convolution with summed weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from .. import dispatch, reference
from ..block import Operands, Step, Upsample, upsample_step
from ..spec import Activation
from .arguments import ActivationParam, autocast, check_residual, check_slope, check_vectors, parse_activation
from .core import run_step

__all__ = ["upsample_conv2d"]

Ints = int | Sequence[int]


def _pair(name: str, value: Ints) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        raise ValueError(f"{name} must be an int or two ints, got {value!r}")
    return pair[0], pair[1]


@lru_cache(maxsize=4096)
def _step(weight_shape: tuple[int, ...], upsample: Upsample, groups: int, activation: Activation) -> Step:
    c_out, c_in, kh, kw = weight_shape
    return upsample_step(c_in * groups, c_out, (kh, kw), upsample, groups, activation)


def upsample_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_factor: Ints = 2,
    padding: Ints | None = None,
    padding_mode: str = "zeros",
    groups: int = 1,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: Activation | str | None = None,
    activation_param: ActivationParam = None,
    backend: str | None = None,
) -> torch.Tensor:
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
        ValueError: an even kernel, a scale factor or padding that is no fit, an unknown padding mode, activation or
        backend.
        RuntimeError: what torch raises; ``backend="triton"`` where the kernel cannot run this, with the reason.
    """
    dispatch.check_backend(backend)
    if weight.dim() != 4:
        raise ValueError(f"weight must be (C_out, C_in/groups, kh, kw), got shape {tuple(weight.shape)}")
    kh, kw = weight.shape[2:]
    if kh % 2 == 0 or kw % 2 == 0:
        raise ValueError(f"kernel size must be odd, got {(kh, kw)}")
    factor = _pair("scale_factor", scale_factor)
    if min(factor) < 1:
        raise ValueError(f"scale_factor must be positive, got {factor}")
    pad = ((kh - 1) // 2, (kw - 1) // 2) if padding is None else _pair("padding", padding)
    if min(pad) < 0:
        raise ValueError(f"padding must not be negative, got {pad}")
    act, slope = parse_activation(activation, activation_param, weight.shape[0])
    x, w, b = autocast(input, weight, bias)
    if x.dim() not in (3, 4):
        raise RuntimeError(
            f"expected 3D (unbatched) or 4D (batched) input to upsample_conv2d, got shape {tuple(x.shape)}"
        )
    upsample = Upsample(factor, pad, padding_mode)
    unbatched = x.dim() == 3
    x = x.unsqueeze(0) if unbatched else x
    residual = residual.unsqueeze(0) if unbatched and residual is not None else residual
    reason = None
    try:
        make = _step.__wrapped__ if torch.compiler.is_compiling() else _step
        step = make(tuple(w.shape), upsample, groups, act)
    except ValueError as error:
        if padding_mode != "reflect" and not (
            padding_mode == "zeros" and any(p > k - 1 for p, k in zip(pad, (kh, kw), strict=True))
        ):
            raise
        reason = str(error)
    if reason is None:
        reason = _unfit(x, w, b, step)
    if reason is not None:  # torch's operators run it, or say what is wrong
        y = reference.upsample_conv(x, w, b, factor, pad, padding_mode, groups)
        if dispatch.resolve_backend(backend) == "triton":
            raise RuntimeError(f'backend="triton" cannot run this: {reason}')
        check_vectors(y, y.shape[1], scale=scale, shift=shift)
        check_slope(y, slope)
        if residual is not None:
            check_residual(y, residual, y.shape)
        y = reference.epilogue(y, scale, shift, residual, act, slope)
        return y.squeeze(0) if unbatched else y
    check_vectors(x, step.spec.out_channels, scale=scale, shift=shift)
    check_slope(x, slope)
    if residual is not None:
        check_residual(x, residual, (x.shape[0], step.spec.out_channels, *step.output_size((x.shape[2], x.shape[3]))))
    o = Operands(x, w, b, scale=scale, shift=shift, residual=residual, slope=slope)
    y = run_step(step, o, backend=backend)
    return y.squeeze(0) if unbatched else y


def _unfit(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, step: Step) -> str | None:
    if x.shape[1] != step.spec.in_channels:
        return f"input has {x.shape[1]} channels, weight expects {step.spec.in_channels}"
    if x.dtype != w.dtype or x.device != w.device:
        return f"input is {x.dtype} on {x.device}, weight {w.dtype} on {w.device}"
    if b is not None and (b.shape != (step.spec.out_channels,) or b.dtype != x.dtype or b.device != x.device):
        return f"bias of shape {tuple(b.shape)}, {b.dtype} on {b.device}"
    if min(x.shape[2:]) < 1:
        return f"empty image of size {tuple(x.shape[2:])}"
    try:
        step.output_size((x.shape[2], x.shape[3]))
    except ValueError as error:
        return str(error)
    return None
