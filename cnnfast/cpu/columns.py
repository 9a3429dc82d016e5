"""A convolution with gradients of contiguous maps whose weight is larger than they are: products of the weight as it
lies in memory with columns of the maps (im2col), and columns that are added up (col2im).

oneDNN's convolutions bring such a weight into a layout of their own in the forward and twice in the backward, and its
gradient back, which takes longer than the arithmetic: the inner layers of a U-Net at a batch of 1 (docs/facts.md). The
batch's positions are one dimension of each product, and its first: products with few columns are slow in MKL.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import ConvSpec

__all__ = ["backward", "faster", "forward"]

# Numbers of a weight, and positions of the batch that each of them is multiplied with, for which columns are faster
# (measured with AVX512_BF16 and AVX2, one and two threads, float32 and bfloat16); a transposed convolution's backward
# alone is up to more positions where the weight is larger still.
_WEIGHT, _POSITIONS = 2**22, 64
_LARGE_WEIGHT, _MORE_POSITIONS = 2**23, 256


def faster(spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether the forward and the backward of ``spec`` are expected to be faster by columns than by ATen's convolution,
    on a contiguous x of this shape (N, C_in, H, W) and a contiguous weight, with products in ``dtype``. (In 16 bits
    columns that are to be added up would be rounded first: never there.)"""
    if spec.ndim != 2 or spec.groups > 1 or dtype != torch.float32 and not spec.transposed:
        return False, False
    weight = math.prod(spec.weight_shape)
    size = shape[2:] if spec.transposed else spec.output_size(shape[2:])
    positions = shape[0] * math.prod(size)
    few = weight >= _WEIGHT and positions <= _POSITIONS
    larger = spec.transposed and weight >= _LARGE_WEIGHT and positions <= _MORE_POSITIONS
    return few and dtype == torch.float32, few or larger


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """x (N, C_in, H, W) -> (N, C_out, OH, OW), all contiguous and of one dtype."""
    size = spec.output_size(x.shape[2:])
    matrix = weight.view(weight.shape[0], -1)
    if spec.transposed:
        y = _spread(torch.mm(_rows(x), matrix), x.shape[0], size, spec)
    else:
        y = _maps(torch.mm(_patches(x, spec), matrix.t()), x.shape[0], size)
    return y if bias is None else y.add_(bias.view(-1, 1, 1))


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_size: list[int] | None, spec: ConvSpec, need: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias that are needed, for one of the result."""
    matrix = weight.view(weight.shape[0], -1)
    dx = dw = None
    if spec.transposed:
        patches = _patches(grad, spec)
        if need[0]:
            dx = _maps(torch.mm(patches, matrix.t()), x.shape[0], x.shape[2:])
        if need[1]:
            dw = torch.mm(_rows(x).t(), patches).view(weight.shape)
    else:
        rows = _rows(grad)
        if need[0]:
            dx = _spread(torch.mm(rows, matrix), x.shape[0], x.shape[2:], spec)
        if need[1]:
            dw = torch.mm(rows.t(), _patches(x, spec)).view(weight.shape)
    return dx, dw, grad.sum((0, 2, 3)) if need[2] else None


def _rows(t: Tensor) -> Tensor:
    """(N, C, H, W) as (N*H*W, C)."""
    return t.flatten(2).transpose(1, 2).reshape(-1, t.shape[1])


def _maps(rows: Tensor, n: int, size: tuple[int, ...]) -> Tensor:
    """`_rows`, undone."""
    return rows.view(n, -1, rows.shape[1]).transpose(1, 2).reshape(n, rows.shape[1], *size)


def _patches(t: Tensor, spec: ConvSpec) -> Tensor:
    """What the taps of each position meet: (N*positions, C*kh*kw)."""
    columns = F.unfold(t, spec.kernel_size, spec.dilation, spec.padding, spec.stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def _spread(patches: Tensor, n: int, size: tuple[int, ...], spec: ConvSpec) -> Tensor:
    """The sum of what the taps of each position add to a map of this size, (N, C, *size)."""
    columns = patches.view(n, -1, patches.shape[1]).transpose(1, 2)
    return F.fold(columns, size, spec.kernel_size, spec.dilation, spec.padding, spec.stride)
