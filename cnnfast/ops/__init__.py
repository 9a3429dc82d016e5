"""Operators: torch.nn.functional's signatures plus an epilogue, over Triton, oneDNN or ATen."""

from .conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from .norm_act import batch_norm, group_norm, instance_norm, norm_act
from .upsample import upsample_conv2d, upsample_conv3d

__all__ = [
    "batch_norm",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "group_norm",
    "instance_norm",
    "norm_act",
    "upsample_conv2d",
    "upsample_conv3d",
]
