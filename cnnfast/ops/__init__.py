"""Operators: torch.nn.functional's signatures plus an epilogue, over Triton, oneDNN or ATen."""

from .conv import conv1d, conv2d
from .conv_transpose import conv_transpose1d, conv_transpose2d
from .upsample import upsample_conv2d

__all__ = ["conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d", "upsample_conv2d"]
