"""conv1d and conv2d: `torch.nn.functional`'s signatures plus an epilogue."""

from __future__ import annotations

import torch

from ..spec import Activation
from .arguments import ActivationParam
from .convolution import Epilogue, Ints, convolve

__all__ = ["conv1d", "conv2d"]

_DOC = """{ndim}-D convolution, then ``act(scale * (conv + bias) + shift + residual)``.

    The positional arguments, their checks and errors are those of `torch.nn.functional.conv{ndim}d`. Sums,
    scale, shift, residual and activation are computed in float32 and rounded once, to the input's dtype.

    Args:
        input: ({batched}) or ({unbatched}); float32, float16 or bfloat16 for the fast paths (other dtypes run in ATen).
        weight: (C_out, C_in/groups, {kernel}), the input's dtype. On a GPU a channels_last weight is read in place.
        bias: (C_out,) or None.
        stride, padding, dilation, groups: as in torch (padding also "valid" and "same").
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


def conv1d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: Activation | str | None = None,
    activation_param: ActivationParam = None,
    backend: str | None = None,
) -> torch.Tensor:
    e = Epilogue(scale, shift, residual, activation, activation_param, backend)
    return convolve(1, False, input, weight, bias, stride, padding, 0, groups, dilation, e)


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: Activation | str | None = None,
    activation_param: ActivationParam = None,
    backend: str | None = None,
) -> torch.Tensor:
    e = Epilogue(scale, shift, residual, activation, activation_param, backend)
    return convolve(2, False, input, weight, bias, stride, padding, 0, groups, dilation, e)


conv1d.__doc__ = _DOC.format(ndim=1, batched="N, C_in, L", unbatched="C_in, L", kernel="k")
conv2d.__doc__ = _DOC.format(ndim=2, batched="N, C_in, H, W", unbatched="C_in, H, W", kernel="kh, kw")
