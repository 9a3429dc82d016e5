"""conv1d, conv2d and conv3d: `torch.nn.functional`'s signatures plus an epilogue."""

from __future__ import annotations

import torch

from ..activations import Activation
from .arguments import ActivationParam, Epilogue, Ints
from .convolution import DOC, convolve

__all__ = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]


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


def conv3d(
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
    return convolve(3, False, input, weight, bias, stride, padding, 0, groups, dilation, e)


_NOTE_3D = """
    In three dimensions, packed operators run on a CPU in inference, and with gradients one float32 sample as two halves
    by oneDNN where PyTorch loops; a GPU's kernels take them as they take two dimensions. On a CPU, traced code gets
    PyTorch's own operators.
    """
_PLAIN = dict(
    kind="convolution",
    function="conv",
    channels="C_out, C_in/groups",
    geometry='stride, padding, dilation, groups: as in torch (padding also "valid" and "same").',
)
conv1d.__doc__ = DOC.format(ndim=1, batched="N, C_in, L", unbatched="C_in, L", kernel="k", **_PLAIN)
conv2d.__doc__ = DOC.format(ndim=2, batched="N, C_in, H, W", unbatched="C_in, H, W", kernel="kh, kw", **_PLAIN)
conv3d.__doc__ = (
    DOC.format(ndim=3, batched="N, C_in, D, H, W", unbatched="C_in, D, H, W", kernel="kd, kh, kw", **_PLAIN) + _NOTE_3D
)


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
    e = Epilogue(scale, shift, residual, activation, activation_param, backend)
    return convolve(1, True, input, weight, bias, stride, padding, output_padding, groups, dilation, e)


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
    e = Epilogue(scale, shift, residual, activation, activation_param, backend)
    return convolve(2, True, input, weight, bias, stride, padding, output_padding, groups, dilation, e)


def conv_transpose3d(
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
    e = Epilogue(scale, shift, residual, activation, activation_param, backend)
    return convolve(3, True, input, weight, bias, stride, padding, output_padding, groups, dilation, e)


_TRANSPOSED = dict(
    kind="transposed convolution",
    function="conv_transpose",
    channels="C_in, C_out/groups",
    geometry="stride, padding, output_padding, groups, dilation: as in torch.",
)
conv_transpose1d.__doc__ = DOC.format(ndim=1, batched="N, C_in, L", unbatched="C_in, L", kernel="k", **_TRANSPOSED)
conv_transpose2d.__doc__ = DOC.format(
    ndim=2, batched="N, C_in, H, W", unbatched="C_in, H, W", kernel="kh, kw", **_TRANSPOSED
)
conv_transpose3d.__doc__ = (
    DOC.format(ndim=3, batched="N, C_in, D, H, W", unbatched="C_in, D, H, W", kernel="kd, kh, kw", **_TRANSPOSED)
    + _NOTE_3D
)
