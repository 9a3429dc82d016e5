"""Convolutions of one float32 sample in three dimensions, with gradients: as two samples, which share a border.

ATen leaves a batch of one to loops of its own (`dispatch.by_loops`: unfolded patches and a matrix product), and takes
oneDNN for a batch of two, which is several times as fast (docs/facts.md). So a sample is cut along its depth: each half
of a plain convolution's result reads a part of the input, and the two parts overlap by what the kernel reaches beyond
its stride. A transposed convolution is the adjoint: each half of the input writes such a part of the result, and where
they overlap they are summed. Tensors are contiguous or channels-last, as x is.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..dispatch import by_loops
from ..memory_format import is_channels_last, new_strides
from ..spec import ConvSpec

__all__ = ["applies", "backward", "forward"]


class _Cut(NamedTuple):
    """Of the depth: the side with the larger kernel's reach, ``whole`` positions, in two parts of ``size``, the second
    ``step`` behind the first, which starts ``before`` ahead of the whole; each part belongs to ``half`` positions of
    the other side, which has ``rows``."""

    whole: int
    size: int
    step: int
    before: int
    half: int
    rows: int

    def bounds(self, part: int) -> tuple[int, int, int]:
        """Where the part starts, and from where to where it meets the whole."""
        start = part * self.step - self.before
        return start, max(start, 0), min(start + self.size, self.whole)


@lru_cache(maxsize=4096)
def _cut(spec: ConvSpec, depth: int) -> _Cut:
    """For an x of this depth: of x for a plain convolution, of the result for a transposed one."""
    out = spec.output_size((depth, *(2**20,) * 2))[0]
    whole, rows = (out, depth) if spec.transposed else (depth, out)
    half, stride = -(-rows // 2), spec.stride[0]
    size = (half - 1) * stride + spec.dilation[0] * (spec.kernel_size[0] - 1) + 1
    return _Cut(whole, size, half * stride, spec.padding[0], half, rows)


@lru_cache(maxsize=4096)
def _inner(spec: ConvSpec) -> ConvSpec:
    """What runs on the halves: nothing is padded along the depth."""
    return replace(spec, padding=(0, *spec.padding[1:]), output_padding=(0, *spec.output_padding[1:]))


def applies(spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether ATen loops over an x of this shape, and would not over two halves."""
    if spec.ndim != 3 or shape[0] != 1 or not by_loops(spec, shape, dtype):
        return False
    cut = _cut(spec, shape[2])
    depth = cut.half if spec.transposed else cut.size
    return cut.rows > 1 and not by_loops(_inner(spec), (2, shape[1], depth, *shape[3:]), dtype)


def _new(like: Tensor, samples: int, depth: int) -> Tensor:
    """(samples, C, depth, H, W) in the format of ``like``."""
    shape = samples, like.shape[1], depth, *like.shape[3:]
    return torch.empty_strided(shape, new_strides(shape, is_channels_last(like)), dtype=like.dtype, device=like.device)


def _parts(x: Tensor, cut: _Cut) -> Tensor:
    """x (1, C, whole, H, W) as its two parts (2, C, size, H, W), zeros beyond its ends: a copy."""
    y = _new(x, 2, cut.size)
    for i, part in enumerate(y):
        start, low, high = cut.bounds(i)
        part[:, : low - start] = 0
        part[:, low - start : high - start] = x[0, :, low:high]
        part[:, max(high, low) - start :] = 0
    return y


def _summed(parts: Tensor, cut: _Cut) -> Tensor:
    """The adjoint of `_parts`: (2, C, size, H, W) as (1, C, whole, H, W)."""
    x = _new(parts, 1, cut.whole)
    done = 0
    for i, part in enumerate(parts):
        start, low, high = cut.bounds(i)
        x[0, :, done : max(low, done)] = 0
        both = min(max(low, done), high)
        x[0, :, low:both] += part[:, low - start : both - start]
        x[0, :, both:high] = part[:, both - start : high - start]
        done = max(done, high)
    x[0, :, done:] = 0
    return x


def _halved(g: Tensor, cut: _Cut) -> Tensor:
    """(1, C, rows, H, W) as (2, C, half, H, W): a view, but for an odd number of rows, behind which zeros come."""
    if cut.rows % 2:
        whole = _new(g, 1, 2 * cut.half)
        whole[:, :, : cut.rows] = g
        whole[:, :, cut.rows :] = 0
        g = whole
    return g[0].unflatten(1, (2, cut.half)).movedim(1, 0)


def _joined(y: Tensor, cut: _Cut) -> Tensor:
    """The inverse of `_halved`: a view of a channels-last y, where the depth comes first."""
    if is_channels_last(y):
        return y.transpose(0, 1).flatten(1, 2)[None, :, : cut.rows]
    x = _new(y, 1, cut.rows)
    x[0, :, : cut.half] = y[0]
    x[0, :, cut.half :] = y[1, :, : cut.rows - cut.half]
    return x


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """x (1, C_in, D, H, W) -> (1, C_out, OD, OH, OW), in its format or the weight's, where `applies` says so."""
    cut = _cut(spec, x.shape[2])
    if not spec.transposed:
        return _joined(reference.conv(_parts(x, cut), weight, bias, _inner(spec)), cut)
    y = _summed(reference.conv(_halved(x, cut), weight, None, _inner(spec)), cut)
    return y if bias is None else y.add_(bias.view(-1, 1, 1, 1))


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias_size: list[int] | None, spec: ConvSpec, need: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias that are needed, for one of the result."""
    s, cut, dx, dw = _inner(spec), _cut(spec, x.shape[2]), None, None
    if need[0] or need[1]:
        operands = (_parts(grad, cut), _halved(x, cut)) if s.transposed else (_halved(grad, cut), _parts(x, cut))
        dx, dw, _ = torch.ops.aten.convolution_backward(
            *operands, weight, None, s.stride, s.padding, s.dilation, s.transposed, s.output_padding, s.groups,
            (*need[:2], False),
        )  # fmt: skip
    if dx is not None:
        dx = _joined(dx, cut) if s.transposed else _summed(dx, cut)
    # Of a transposed convolution the parts overlap; of a plain one oneDNN's sum is less exact than ATen's.
    return dx, dw, grad.sum((0, 2, 3, 4)) if need[2] else None
