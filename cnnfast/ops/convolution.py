"""What the four public convolutions share: arguments to a step, torch's own function where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .. import dispatch, reference
from ..block import Operands, Step
from ..spec import Activation, ConvSpec
from .arguments import ActivationParam, autocast, check_residual, check_slope, check_vectors, parse_activation
from .core import run_step

__all__ = ["DOC", "Epilogue", "Ints", "convolve"]

Ints = int | Sequence[int]

_TORCH: dict[tuple[int, bool], Callable[..., torch.Tensor]] = {
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (1, False): F.conv1d,
    (2, False): F.conv2d,
}


DOC = """{ndim}-D {kind}, then ``act(scale * (conv + bias) + shift + residual)``.

    The positional arguments, their checks and errors are those of `torch.nn.functional.{function}{ndim}d`. Sums,
    scale, shift, residual and activation are computed in float32 and rounded once, to the input's dtype.

    Args:
        input: ({batched}) or ({unbatched}); float32, float16 or bfloat16 for the fast paths (other dtypes run in ATen).
        weight: ({channels}, {kernel}), the input's dtype. On a GPU a channels_last weight is read in place.
        bias: (C_out,) or None.
        {geometry}
        scale, shift: (C_out,), any floating dtype, or None.
        residual: the output's shape and the input's dtype, or None.
        activation: an `Activation`, or its name in `cnnfast.spec.ACTIVATIONS`, or None.
        activation_param: a number (slope of leaky_relu, alpha of elu), two (bounds of hardtanh), or prelu's weight, a
            tensor of 1 or C_out elements.
        backend: "auto", "triton", "aten", or None for the context's (`cnnfast.backend`).

    Returns:
        The output in the input's dtype, channels_last where input or weight is (as torch's).

    Raises:
        RuntimeError: what torch raises; ``backend="triton"`` where the kernel cannot run this, with the reason.
        ValueError: an unknown activation or backend; scale, shift, residual or activation_param of a wrong shape.

    Differentiable any number of times.
    """


class Epilogue(NamedTuple):
    """The keyword arguments that all of them have."""

    scale: torch.Tensor | None
    shift: torch.Tensor | None
    residual: torch.Tensor | None
    activation: Activation | str | None
    activation_param: ActivationParam
    backend: str | None


class _Call(NamedTuple):
    step: Step
    size: tuple[int, ...]  # of the output


@lru_cache(maxsize=4096)
def _resolve(
    ndim: int,
    transposed: bool,
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: Ints | None,
    padding: Ints | str | None,
    output_padding: Ints | None,
    groups: int | None,
    dilation: Ints | None,
    activation: Activation,
) -> _Call | None:
    """The step of these arguments and its output size; None where they describe no convolution of a non-empty image:
    torch's own function then decides, and raises its own error."""
    if len(weight_shape) != ndim + 2 or len(input_shape) not in (ndim + 1, ndim + 2):
        return None
    if stride is None or padding is None or output_padding is None or groups is None or dilation is None:
        return None
    if isinstance(padding, str):
        if transposed:
            return None
        padding = _named_padding(padding, weight_shape[2:], stride, dilation)
        if padding is None:
            return None
    first, second = weight_shape[0], weight_shape[1] * groups
    try:
        spec = ConvSpec.make(
            *((first, second) if transposed else (second, first)),
            weight_shape[2:],
            stride,
            padding,
            output_padding,
            groups,
            dilation,
            transposed=transposed,
            ndim=ndim,
        )
        spec.output_size(input_shape[-ndim:])
    except ValueError:
        return None
    if input_shape[-ndim - 1] != spec.in_channels or min(input_shape[-ndim:]) < 1:
        return None
    return _Call(Step(spec.as_2d(), activation), spec.output_size(input_shape[-ndim:]))


def _named_padding(name: str, kernel: Sequence[int], stride: Ints, dilation: Ints) -> tuple[int, ...] | None:
    """The padding that "valid" and an even-sided "same" stand for; None for what torch itself does or refuses."""
    if name == "valid":
        return (0,) * len(kernel)
    steps = dilation if isinstance(dilation, tuple) else (dilation,)
    strides = stride if isinstance(stride, tuple) else (stride,)
    reach = [d * (k - 1) for d, k in zip(steps * (len(kernel) // len(steps)), kernel, strict=False)]
    if name != "same" or len(reach) != len(kernel) or any(s != 1 for s in strides) or any(r % 2 for r in reach):
        return None
    return tuple(r // 2 for r in reach)


def _hashable(value: Any) -> Ints | None:
    """An int or a tuple of ints; None for anything else, which torch's own function judges (and which a cache
    would confuse with an int that equals it)."""
    if type(value) is int:
        return value
    if isinstance(value, list | tuple) and all(type(v) is int for v in value):
        return tuple(value)
    return None


def _by_torch(y: torch.Tensor, ndim: int, e: Epilogue, activation: Activation, slope: Any) -> torch.Tensor:
    """The epilogue on what torch's own convolution gave, with the checks of a fused step."""
    unbatched = y.dim() == ndim + 1
    residual = e.residual
    check_vectors(y, y.shape[-ndim - 1], scale=e.scale, shift=e.shift)
    check_slope(y, slope)
    if residual is not None:
        check_residual(y, residual, y.shape)
        residual = residual.unsqueeze(0) if unbatched else residual
    y = reference.epilogue(y.unsqueeze(0) if unbatched else y, e.scale, e.shift, residual, activation, slope)
    return y.squeeze(0) if unbatched else y


def convolve(
    ndim: int,
    transposed: bool,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Ints,
    padding: Ints | str,
    output_padding: Ints,
    groups: int,
    dilation: Ints,
    e: Epilogue,
) -> torch.Tensor:
    """``act(scale * (conv(input) + bias) + shift + residual)``; ``output_padding`` is 0 for a plain convolution."""
    dispatch.check_backend(e.backend)
    geometry = (
        (stride, padding, output_padding, groups, dilation) if transposed else (stride, padding, dilation, groups)
    )
    function = _TORCH[ndim, transposed]
    if not isinstance(input, torch.Tensor) or not isinstance(weight, torch.Tensor):
        function(input, weight, bias, *geometry)
        raise TypeError(f"input and weight must be tensors, got {type(input).__name__} and {type(weight).__name__}")
    weight_shape, channels = weight.shape, 0
    if len(weight_shape) > 1 and type(groups) is int:
        channels = weight_shape[1] * groups if transposed else weight_shape[0]
    act, slope = parse_activation(e.activation, e.activation_param, channels)
    x, w, b = autocast(input, weight, bias)
    resolve = _resolve.__wrapped__ if torch.compiler.is_compiling() else _resolve  # symbolic sizes have no hash
    call = resolve(
        ndim,
        transposed,
        x.shape,
        weight_shape,
        _hashable(stride),
        padding if type(padding) is str else _hashable(padding),
        _hashable(output_padding),
        groups if type(groups) is int else None,
        _hashable(dilation),
        act,
    )
    dtype, device = x.dtype, x.device
    if (
        call is None
        or not dtype.is_floating_point
        or w.dtype != dtype
        or w.device != device
        or (b is not None and (b.shape != (channels,) or b.dtype != dtype or b.device != device))
    ):
        if w.device != device:  # torch's own words, which its meta kernels forget to say
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{device} and {w.device}!"
            )
        y = function(x, w, b, *geometry)
        if dispatch.resolve_backend(e.backend) == "triton":
            raise RuntimeError(
                f'backend="triton" cannot run this: dtype {dtype}, an empty input or an uneven padding={padding!r}'
            )
        return _by_torch(y, ndim, e, act, slope)
    residual = e.residual
    if e.scale is not None or e.shift is not None:
        check_vectors(x, channels, scale=e.scale, shift=e.shift)
    if slope is not None:
        check_slope(x, slope)
    if residual is not None:
        check_residual(x, residual, (*x.shape[: -ndim - 1], channels, *call.size))
    unbatched = x.dim() == ndim + 1
    if unbatched:
        x, residual = x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
    if ndim == 1:
        x, w = x.unsqueeze(-2), w.unsqueeze(-2)
        residual = None if residual is None else residual.unsqueeze(-2)
    o = Operands(x, w, b, None, None, 0.0, e.scale, e.shift, residual, slope)
    y = run_step(call.step, o, backend=e.backend)
    if ndim == 1:
        y = y.squeeze(-2)
    return y.squeeze(0) if unbatched else y
