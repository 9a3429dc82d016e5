"""conv_transpose1d and conv_transpose2d: `torch.nn.functional`'s signatures plus an epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import dispatch, reference
from ..block import Operands, Step
from ..spec import Activation, ConvSpec
from .arguments import ActivationParam, autocast, check_residual, check_slope, check_vectors, parse_activation
from .core import run_step

__all__ = ["conv_transpose1d", "conv_transpose2d"]

Ints = int | Sequence[int]


class _Call(NamedTuple):
    step: Step
    size: tuple[int, ...]  # of the output


@lru_cache(maxsize=4096)
def _resolve(
    ndim: int,
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    stride: Ints | None,
    padding: Ints | None,
    output_padding: Ints | None,
    groups: int | None,
    dilation: Ints | None,
    activation: Activation,
) -> _Call | None:
    """The step of these arguments and its output size; None where they describe no transposed convolution of a
    non-empty image: torch's own function then decides, and raises its own error."""
    if len(weight_shape) != ndim + 2 or len(input_shape) not in (ndim + 1, ndim + 2):
        return None
    if stride is None or padding is None or output_padding is None or groups is None or dilation is None:
        return None
    try:
        spec = ConvSpec.make(
            weight_shape[0],
            weight_shape[1] * groups,
            weight_shape[2:],
            stride,
            padding,
            output_padding,
            groups,
            dilation,
            ndim=ndim,
        )
        spec.output_size(input_shape[-ndim:])
    except ValueError:
        return None
    if input_shape[-ndim - 1] != spec.in_channels or min(input_shape[-ndim:]) < 1:
        return None
    return _Call(Step(spec.as_2d(), activation), spec.output_size(input_shape[-ndim:]))


def _hashable(value: Ints) -> Ints | None:
    """An int or a tuple of ints; None for anything else, which torch's own function judges (and which a cache would
    confuse with an int that equals it)."""
    if type(value) is int:
        return value
    if isinstance(value, list | tuple) and all(type(v) is int for v in value):
        return tuple(value)
    return None


def _by_torch(
    y: torch.Tensor,
    ndim: int,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: Activation,
    slope: torch.Tensor | None,
) -> torch.Tensor:
    """The epilogue on what torch's own convolution gave, with the checks of a fused step."""
    unbatched = y.dim() == ndim + 1
    check_vectors(y, y.shape[-ndim - 1], scale=scale, shift=shift)
    check_slope(y, slope)
    if residual is not None:
        check_residual(y, residual, y.shape)
        residual = residual.unsqueeze(0) if unbatched else residual
    y = reference.epilogue(y.unsqueeze(0) if unbatched else y, scale, shift, residual, activation, slope)
    return y.squeeze(0) if unbatched else y


def _conv_transpose(
    ndim: int,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Ints,
    padding: Ints,
    output_padding: Ints,
    groups: int,
    dilation: Ints,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: Activation | str | None,
    activation_param: ActivationParam,
    backend: str | None,
) -> torch.Tensor:
    dispatch.check_backend(backend)
    function = F.conv_transpose1d if ndim == 1 else F.conv_transpose2d
    if not isinstance(input, torch.Tensor) or not isinstance(weight, torch.Tensor):
        function(input, weight, bias, stride, padding, output_padding, groups, dilation)
        raise TypeError(f"input and weight must be tensors, got {type(input).__name__} and {type(weight).__name__}")
    weight_shape = weight.shape
    channels = weight_shape[1] * groups if len(weight_shape) > 1 and type(groups) is int else 0
    act, slope = parse_activation(activation, activation_param, channels)
    x, w, b = autocast(input, weight, bias)
    call = _resolve(
        ndim,
        x.shape,
        weight_shape,
        _hashable(stride),
        _hashable(padding),
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
        y = function(x, w, b, stride, padding, output_padding, groups, dilation)
        if dispatch.resolve_backend(backend) == "triton":
            raise RuntimeError(f'backend="triton" cannot run this: dtype {dtype} or an empty input')
        return _by_torch(y, ndim, scale, shift, residual, act, slope)
    if scale is not None or shift is not None:
        check_vectors(x, channels, scale=scale, shift=shift)
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
    o = Operands(x, w, b, None, None, 0.0, scale, shift, residual, slope)
    y = run_step(call.step, o, backend=backend)
    if ndim == 1:
        y = y.squeeze(-2)
    return y.squeeze(0) if unbatched else y


_DOC = """{ndim}-D transposed convolution, then ``act(scale * (conv + bias) + shift + residual)``.

    The positional arguments, their checks and errors are those of `torch.nn.functional.conv_transpose{ndim}d`. Sums,
    scale, shift, residual and activation are computed in float32 and rounded once, to the input's dtype.

    Args:
        input: ({batched}) or ({unbatched}); float32, float16 or bfloat16 for the fast paths (other dtypes run in ATen).
        weight: (C_in, C_out/groups, {kernel}), the input's dtype. On a GPU a channels_last weight is read in place.
        bias: (C_out,) or None.
        stride, padding, output_padding, groups, dilation: as in torch.
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

    Where a gradient is needed, PyTorch's operators run.
    """


def conv_transpose1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: Activation | str | None = None,
    activation_param: ActivationParam = None,
    backend: str | None = None,
) -> torch.Tensor:
    return _conv_transpose(
        1, input, weight, bias, stride, padding, output_padding, groups, dilation,
        scale, shift, residual, activation, activation_param, backend,
    )  # fmt: skip


def conv_transpose2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Ints = 1,
    padding: Ints = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: Activation | str | None = None,
    activation_param: ActivationParam = None,
    backend: str | None = None,
) -> torch.Tensor:
    return _conv_transpose(
        2, input, weight, bias, stride, padding, output_padding, groups, dilation,
        scale, shift, residual, activation, activation_param, backend,
    )  # fmt: skip


conv_transpose1d.__doc__ = _DOC.format(ndim=1, batched="N, C_in, L", unbatched="C_in, L", kernel="k")
conv_transpose2d.__doc__ = _DOC.format(ndim=2, batched="N, C_in, H, W", unbatched="C_in, H, W", kernel="kh, kw")
