"""conv_transpose1d and conv_transpose2d: `torch.nn.functional`'s signatures plus an epilogue."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from .. import dispatch, reference
from ..block import Operands, Step
from ..spec import Activation, ConvSpec
from .arguments import ActivationParam, autocast, check_residual, check_vectors, parse_activation
from .core import run_step

__all__ = ["conv_transpose1d", "conv_transpose2d"]

Ints = int | Sequence[int]


@lru_cache(maxsize=4096)
def _step(
    weight_shape: tuple[int, ...],
    stride: Ints,
    padding: Ints,
    output_padding: Ints,
    groups: int,
    dilation: Ints,
    activation: Activation,
) -> Step | None:
    """The step of these arguments; None where they describe no transposed convolution (torch then says why)."""
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
            ndim=len(weight_shape) - 2,
        )
    except ValueError:
        return None
    return Step(spec.as_2d(), activation)


def _fits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, step: Step | None, ndim: int) -> bool:
    """Whether the tensors are what the step expects. If not, torch's own function decides: it raises its own error."""
    if step is None or x.dim() not in (ndim + 1, ndim + 2) or x.shape[-ndim - 1] != step.spec.in_channels:
        return False
    if x.dtype != weight.dtype or x.device != weight.device or not x.is_floating_point():
        return False
    if bias is not None and (
        bias.shape != (step.spec.out_channels,) or bias.dtype != x.dtype or bias.device != x.device
    ):
        return False
    size = (1, x.shape[-1]) if ndim == 1 else x.shape[-2:]
    try:
        step.output_size(size)
    except ValueError:
        return False
    return min(size) > 0


def _hashable(value: Ints) -> Ints:
    return value if isinstance(value, int) else tuple(value)


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
    channels = weight.shape[1] * groups if weight.dim() == ndim + 2 and isinstance(groups, int) else 0
    act, slope = parse_activation(activation, activation_param, channels)
    x, w, b = autocast(input, weight, bias)
    assert x is not None and w is not None
    step = None
    if w.dim() == ndim + 2 and isinstance(groups, int) and groups > 0:
        geometry = [_hashable(v) for v in (stride, padding, output_padding, dilation)]
        step = _step(tuple(w.shape), geometry[0], geometry[1], geometry[2], groups, geometry[3], act)
    function = F.conv_transpose1d if ndim == 1 else F.conv_transpose2d
    if not _fits(x, w, b, step, ndim):
        y = function(x, w, b, stride, padding, output_padding, groups, dilation)
        if dispatch.resolve_backend(backend) == "triton":
            raise RuntimeError(f'backend="triton" cannot run this: dtype {x.dtype} or an empty input')
        unbatched = y.dim() == ndim + 1
        y = y.unsqueeze(0) if unbatched else y
        y = reference.epilogue(y, scale, shift, residual, act, slope)
        return y.squeeze(0) if unbatched else y
    assert step is not None
    check_vectors(x, channels, scale=scale, shift=shift)
    unbatched = x.dim() == ndim + 1
    size = step.output_size((1, x.shape[-1]) if ndim == 1 else x.shape[-2:])
    shape = (channels, *size[2 - ndim :]) if unbatched else (x.shape[0], channels, *size[2 - ndim :])
    check_residual(x, residual, shape)
    if unbatched:
        x, residual = x.unsqueeze(0), None if residual is None else residual.unsqueeze(0)
    if ndim == 1:
        x, w = x.unsqueeze(-2), w.unsqueeze(-2)
        residual = None if residual is None else residual.unsqueeze(-2)
    o = Operands(x, w, b, scale=scale, shift=shift, residual=residual, slope=slope)
    y = run_step(step, o, backend=backend)
    if ndim == 1:
        y = y.squeeze(-2)
    return y.squeeze(0) if unbatched else y


_DOC = """{ndim}-D transposed convolution with an epilogue: ``act(scale * (conv_transpose(input) + bias) + shift +
residual)``.

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
        tensor
            of 1 or C_out elements.
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
