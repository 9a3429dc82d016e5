"""oneDNN's packed operators: five methods to run a convolution with them.

``mkldnn::_reorder_*`` and ``mkldnn::*_pointwise`` are what `torch.compile` itself calls on a CPU; they stand in this
file alone, behind `why_missing`. A method packs a weight once and runs it many times; `methods` names them all.

Every ``pack`` takes the weight of the convolution and its shift (C_out, or None) in float32, scales folded in, and
rounds once to the method's dtype; the shift stays float32, unless a pass of ours adds it. Every ``run`` takes x
(N, C_in, H, W) channels-last in that dtype.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..activations import Activation
from ..memory_format import format_of
from ..spec import DTYPES, ConvSpec, Phase
from .isa import InstructionSet, instruction_set

__all__ = [
    "Convolution",
    "Deconvolution",
    "Gathered",
    "Merged",
    "Method",
    "PostOp",
    "Projection",
    "adds_by_element",
    "layout",
    "passed_over",
    "post_op",
    "why_missing",
]


_mkldnn = torch.ops.mkldnn
_OPS = (
    "_convolution_pointwise",
    "_convolution_pointwise_",
    "_convolution_transpose_pointwise",
    "_get_mkldnn_serialized_md",
    "_linear_pointwise",
    "_reorder_convolution_transpose_weight",
    "_reorder_convolution_weight",
    "_reorder_linear_weight",
)


@lru_cache(maxsize=1)
def why_missing() -> str | None:
    """Why the packed operators cannot be used in this process at all, or None."""
    if not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN"
    for name in _OPS:
        if not hasattr(_mkldnn, name):
            return f"this build of PyTorch has no mkldnn::{name}"
    if instruction_set() < InstructionSet.AVX2:
        return "oneDNN's packed operators have been measured on x86 with AVX2 and above only"
    return None


# --- the activation on the accumulator --------------------------------------------------------------------------------


class PostOp(NamedTuple):
    """Arguments of the ``*_pointwise`` operators; ``fused`` is False where the activation is left to do afterwards."""

    attr: str = "none"
    scalars: tuple[float, ...] = ()
    algorithm: str = ""
    fused: bool = False


def post_op(activation: Activation) -> PostOp:
    """An activation as oneDNN has it; nothing where it has none."""
    form = activation.row.onednn
    return PostOp() if form is None else PostOp(form[0], activation.params, form[1], True)


# --- methods ----------------------------------------------------------------------------------------------------------


class Method(ABC):
    """Runs the convolution of a spec on an x of this shape, with products in this dtype."""

    dtype: torch.dtype
    takes_post: bool  # an activation; else it is left to the caller

    @abstractmethod
    def __init__(self, spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None: ...

    @abstractmethod
    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        """The weight as `run` wants it; see the head of this file."""

    @abstractmethod
    def run(self, x: torch.Tensor, packed: Any, post: PostOp, channels_last: bool) -> torch.Tensor | None:
        """(N, C_out, H_out, W_out), ours to overwrite; ``channels_last``: the format that costs the caller no copy.
        None where this x takes PyTorch's own operator."""

    def bound(self, packed: Any, post: PostOp, channels_last: bool) -> Callable[[torch.Tensor], torch.Tensor | None]:
        """`run` of any x with these."""
        return lambda x: self.run(x, packed, post, channels_last)


def layout(packed: Any) -> int:
    """A number for the memory layout that oneDNN chose for a pack: it depends on the sizes of the input, and a
    weight in another layout than the operator wants is reordered on every call (25 times slower was seen)."""
    return hash(tuple(_mkldnn._get_mkldnn_serialized_md(t).numpy().tobytes() for t in _weights(packed)))


def _weights(packed: Any) -> Iterator[torch.Tensor]:
    if isinstance(packed, list | tuple):
        for one in packed:
            yield from _weights(one)
    elif packed is not None and packed.is_mkldnn:
        yield packed


def passed_over(spec: ConvSpec, shape: tuple[int, ...]) -> bool:
    """Whether ATen takes a matrix product with im2col or col2im for a float32 x as small as this: its own condition
    (``use_mkldnn``)."""
    return shape[0] == 1 and math.prod(shape) <= 20480 and min(spec.kernel_size) <= 3


def adds_by_element(spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether oneDNN's deconvolution of an x of this shape adds a bias, and applies an activation, one element after
    the other, which takes several times as long as its products and two passes over the result (docs/facts.md): of
    groups, where the output is no multiple of the stride, or there is a dilation beside one. (In 16 bits with AMX it
    has other kernels, where every output has a tap.)"""
    if not spec.transposed or dtype not in DTYPES:
        return False
    out = spec.output_size(shape[2:])
    fits = all(n % s == 0 and (s == 1 or d == 1) for n, s, d in zip(out, spec.stride, spec.dilation, strict=True))
    covered = _covered(spec)
    if fits and covered and spec.groups == 1:
        return False
    return dtype == torch.float32 or not covered or instruction_set() < InstructionSet.AMX


def _covered(spec: ConvSpec) -> bool:
    """Whether every output has a tap."""
    return all(phase.taps for dim in spec.phases for phase in dim)


def _vectors(channels: int) -> int:
    return -(-channels // 16) * 16


class _Operator(Method):
    """A method that is one operator of oneDNN's: ``op``, which gets ``geometry`` behind the weight."""

    takes_post = True
    op: Any
    geometry: tuple[Any, ...]

    def run(self, x: torch.Tensor, packed: Any, post: PostOp, channels_last: bool) -> torch.Tensor:
        return self.op(x, *packed, *self.geometry, post.attr, post.scalars, post.algorithm)

    def bound(self, packed: Any, post: PostOp, channels_last: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        op, constant = self.op, (*packed, *self.geometry, post.attr, post.scalars, post.algorithm)
        return lambda x: op(x, *constant)


class Deconvolution(_Operator):
    """oneDNN's deconvolution."""

    def __init__(self, spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        s = spec
        self.dtype, self.shape = dtype, list(shape)
        self.takes_post = not adds_by_element(s, shape, dtype)
        self.geometry = (list(s.padding), list(s.output_padding), list(s.stride), list(s.dilation), s.groups)
        self.op = _mkldnn._convolution_transpose_pointwise.default

    @staticmethod
    def padded_macs(spec: ConvSpec) -> int:
        """Multiply-adds per input position and channel where output channels come in vectors of 16."""
        return math.prod(spec.kernel_size) * _vectors(spec.out_channels)

    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        weight = weight.to(self.dtype)
        if shift is not None and not self.takes_post:
            shift = shift.to(self.dtype).view(-1, *(1,) * (len(self.shape) - 2))
        return _mkldnn._reorder_convolution_transpose_weight(weight, *self.geometry, self.shape), shift

    def run(self, x: torch.Tensor, packed: Any, post: PostOp, channels_last: bool) -> torch.Tensor:
        return self.bound(packed, post, channels_last)(x)

    def bound(self, packed: Any, post: PostOp, channels_last: bool) -> Callable[[torch.Tensor], torch.Tensor]:
        weight, shift = packed
        if self.takes_post or shift is None:
            return super().bound(packed, post, channels_last)
        alone = super().bound((weight, None), PostOp(), channels_last)
        return lambda x: alone(x).add_(shift)


class Convolution(_Operator):
    """oneDNN's convolution."""

    def __init__(self, spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.dtype, self.shape = dtype, list(shape)
        self.geometry = (list(spec.padding), list(spec.stride), list(spec.dilation), spec.groups)
        self.op = _mkldnn._convolution_pointwise.default
        self.op_adding, self.op_onto = _mkldnn._convolution_pointwise.binary, _mkldnn._convolution_pointwise_.binary

    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        return _mkldnn._reorder_convolution_weight(weight.to(self.dtype), *self.geometry, self.shape), shift

    def run_adding(self, x: torch.Tensor, packed: Any, residual: torch.Tensor, onto: bool) -> torch.Tensor | None:
        """``run`` with ``residual`` (of the result's shape) added to the accumulator, ``onto`` that itself, and no
        activation (of those that keep a NaN, the operator has none behind the sum); None where it does not take these:
        it wants all tensors in one dtype, to which the shift must not be rounded, and would bring another memory format
        into its own."""
        weight, shift = packed
        if residual.dtype != self.dtype or not residual.is_contiguous(memory_format=format_of(residual.dim(), True)):
            return None
        low = shift
        if shift is not None and shift.dtype != self.dtype:
            low = shift.to(self.dtype)
            if not torch.equal(low.to(shift.dtype), shift):
                return None
        after = weight, low, *self.geometry, "add", None, None, (), None
        return self.op_onto(residual, x, *after) if onto else self.op_adding(x, residual, *after)


def _linear(x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor | None, post: PostOp) -> torch.Tensor:
    return _mkldnn._linear_pointwise.default(x, weight, shift, post.attr, post.scalars, post.algorithm)


class Projection(Method):
    """A transposed convolution of 1x1 inputs where each output has one tap: one matrix product,
    (N, C_in) x (C_in, H_out * W_out * C_out)."""

    takes_post = True

    def __init__(self, spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.dtype, self.rows = dtype, shape[0]
        self.out = (*spec.output_size((1, 1)), spec.out_channels)
        dims = zip(self.out, spec.padding, spec.dilation, strict=False)
        self.taps = [[(o + p) // d for o in range(n)] for n, p, d in dims]

    @staticmethod
    def applies(spec: ConvSpec, shape: tuple[int, ...]) -> bool:
        """Output ``o`` reads input 0 through tap ``(o + p) / d``: an integer, and one of the kernel's taps."""
        return (
            spec.transposed
            and spec.groups == 1
            and shape[2:] == (1, 1)
            and all(
                not any((o + p) % d or (o + p) // d >= k for o in range(n))
                for n, k, p, d in zip(
                    spec.output_size((1, 1)), spec.kernel_size, spec.padding, spec.dilation, strict=True
                )
            )
        )

    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        rows, cols = self.taps
        w = weight[:, :, rows][:, :, :, cols].permute(2, 3, 1, 0).flatten(0, 2)  # (H_out*W_out*C_out, C_in)
        shift = None if shift is None else shift.repeat(len(rows) * len(cols))
        return _mkldnn._reorder_linear_weight(w.to(self.dtype).contiguous(), self.rows), shift

    def run(self, x: torch.Tensor, packed: Any, post: PostOp, channels_last: bool) -> torch.Tensor:
        n = x.shape[0]
        weight, shift = packed
        return _linear(x.reshape(n, -1), weight, shift, post).view(n, *self.out).permute(0, 3, 1, 2)


class Gathered(Method):
    """One matrix product per phase on gathered patches, (N*Q_h*Q_w, taps * C_in) x (taps * C_in, C_out).

    Every phase has taps, groups is 1.
    """

    takes_post = True

    def __init__(self, spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.dtype, self.spec, self.batch = dtype, spec, shape[0]
        self.out = spec.output_size(shape[2:])
        pads = []
        for dim, n, out, stride in zip(spec.phases, shape[2:], self.out, spec.stride, strict=True):
            low = min(offset for ph in dim for _, offset in ph.pairs())
            high = max(offset + ph.size(out, stride) - 1 for ph in dim for _, offset in ph.pairs())
            pads.append((max(0, -low), max(0, high - (n - 1))))
        self.pads = (0, 0, *pads[1], *pads[0])  # of (N, H, W, C)
        # Per phase: residues, rows and columns, and per dimension (first offset, distance, taps) in rising offsets.
        self.phases = [
            (a, b, a.size(self.out[0], spec.stride[0]), b.size(self.out[1], spec.stride[1]))
            for a, b in itertools.product(*spec.phases)
        ]

    @staticmethod
    def applies(spec: ConvSpec) -> bool:
        return spec.transposed and spec.groups == 1 and _covered(spec)

    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        packs = []
        for a, b, qh, qw in self.phases:
            # ``pairs`` walks falling offsets; memory is read in rising ones.
            taps = [weight[:, :, th, tw] for th, _ in a.pairs()[::-1] for tw, _ in b.pairs()[::-1]]
            w = torch.cat(taps).t().to(self.dtype).contiguous()  # (C_out, taps * C_in)
            packs.append(_mkldnn._reorder_linear_weight(w, max(1, self.batch * qh * qw)))
        return packs, shift

    @staticmethod
    def product(patches: torch.Tensor, weight: Any, shift: torch.Tensor | None, post: PostOp) -> torch.Tensor:
        return _linear(patches, weight, shift, post)

    def run(self, x: torch.Tensor, packed: Any, post: PostOp, channels_last: bool) -> torch.Tensor:
        packs, shift = packed
        n, c = x.shape[:2]
        sh, sw = self.spec.stride
        padded = F.pad(x.permute(0, 2, 3, 1), self.pads)
        sn, srow, scol, _ = padded.stride()
        y = x.new_empty(n, *self.out, self.spec.out_channels)
        for (a, b, qh, qw), weight in zip(self.phases, packs, strict=True):
            if not qh or not qw:
                continue
            (_, fh), (_, fw) = a.pairs()[-1], b.pairs()[-1]
            start = (self.pads[4] + fh) * srow + (self.pads[2] + fw) * scol
            strides = (sn, srow, scol, -a.step * srow, -b.step * scol, 1)
            patches = padded.as_strided((n, qh, qw, a.taps, b.taps, c), strides, start).reshape(n * qh * qw, -1)
            y[:, a.residue :: sh, b.residue :: sw] = self.product(patches, weight, shift, post).view(n, qh, qw, -1)
        return y.permute(0, 3, 1, 2)


def _union(dim: tuple[Phase, ...]) -> tuple[int, int, int]:
    """(first, distance, number) of the input offsets that the phases of one dimension read together."""
    offsets = [offset for ph in dim for _, offset in ph.pairs()]
    low = min(offsets)
    step = math.gcd(*(offset - low for offset in offsets)) or 1
    return low, step, (max(offsets) - low) // step + 1


class Merged(Method):
    """Few output channels: all phases as the channels of one stride-1 convolution over the union of their
    neighbourhoods, then a pixel shuffle. groups is 1.
    """

    takes_post = True

    def __init__(self, spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.dtype, self.spec, self.shape = dtype, spec, list(shape)
        self.out = spec.output_size(shape[2:])
        self.union = [_union(dim) for dim in spec.phases]
        padding, self.crop = [], []
        for (low, step, k), n, out, stride in zip(self.union, shape[2:], self.out, spec.stride, strict=True):
            q = -(-out // stride)
            pad = max(-low, q - 1 + low + step * (k - 1) - (n - 1), 0)  # the operator pads both ends alike
            padding.append(pad)
            self.crop.append((pad + low, q))
        self.geometry = (padding, [1, 1], [step for _, step, _ in self.union], 1)

    @staticmethod
    def applies(spec: ConvSpec) -> bool:
        return spec.transposed and spec.groups == 1 and all(any(ph.taps for ph in dim) for dim in spec.phases)

    @staticmethod
    def padded_macs(spec: ConvSpec) -> int:
        """As `Deconvolution.padded_macs`: more taps, but the phases fill one another's vectors."""
        return math.prod(_union(dim)[2] for dim in spec.phases) * _vectors(math.prod(spec.stride) * spec.out_channels)

    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        s = self.spec
        (low_h, step_h, kh), (low_w, step_w, kw) = self.union
        merged = weight.new_zeros(*s.stride, s.out_channels, s.in_channels, kh, kw)
        for a, b in itertools.product(*s.phases):
            for (th, fh), (tw, fw) in itertools.product(a.pairs(), b.pairs()):
                i, j = (fh - low_h) // step_h, (fw - low_w) // step_w
                merged[a.residue, b.residue, :, :, i, j] = weight[:, :, th, tw].t()
        merged = merged.flatten(0, 2).to(self.dtype)
        shift = None if shift is None else shift.repeat(math.prod(s.stride))
        return _mkldnn._reorder_convolution_weight(merged, *self.geometry, self.shape), shift

    def run(self, x: torch.Tensor, packed: Any, post: PostOp, channels_last: bool) -> torch.Tensor:
        y = _mkldnn._convolution_pointwise.default(x, *packed, *self.geometry, post.attr, post.scalars, post.algorithm)
        (top, qh), (left, qw) = self.crop
        (sh, sw), c, n = self.spec.stride, self.spec.out_channels, x.shape[0]
        if y.shape[2:] != (qh, qw):
            y = y[:, :, top : top + qh, left : left + qw]
        y = y.unflatten(1, (sh, sw, c))
        if channels_last:
            y = y.permute(0, 4, 1, 5, 2, 3).reshape(n, qh * sh, qw * sw, c).permute(0, 3, 1, 2)
        else:
            y = y.permute(0, 3, 4, 1, 5, 2).reshape(n, c, qh * sh, qw * sw)
        return y if y.shape[2:] == self.out else y[:, :, : self.out[0], : self.out[1]]
