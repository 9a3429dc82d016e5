"""The activation after a convolution or a norm in inference on a CPU, of a tensor that is ours: in place where it can
be."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..activations import Activation
from ..memory_format import format_of

__all__ = ["activated"]


def activated(y: torch.Tensor, activation: Activation, slope: torch.Tensor | None) -> torch.Tensor:
    """The activation of y, which may be overwritten; ``slope``: PReLU's weight."""
    row = activation.row
    function = row.without_gradient or row.in_place
    if function is not None:
        return function(y, *activation.params)
    return activation(y) if slope is None else _prelu(y, slope.to(y.dtype))


def _prelu(y: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """`F.prelu` of a channels-last y. Its loop runs over the channels: in 16 bits, where a vector has 32 of them, a
    number that is no multiple of 32 is left to scalar code (18 times slower was seen for 16 channels), so that several
    pixels are taken as the channels of one."""
    c = y.shape[1]
    pixels = 32 // math.gcd(c, 32)
    suits = y.element_size() == 2 and slope.numel() == c and pixels > 1 and y.numel() // c % pixels == 0
    if not suits or not y.is_contiguous(memory_format=format_of(y.dim(), True)):
        return F.prelu(y, slope)
    last = y.movedim(1, -1)
    rows = F.prelu(last.reshape(-1, pixels * c), slope.repeat(pixels))
    return rows.view(last.shape).movedim(-1, 1)
