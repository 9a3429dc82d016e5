"""What is computed: the geometry of a convolution, its activation (`activations.py`) and its precision, as frozen
values.

Everything else (plans, kernels, the CPU path, the reference) asks this file; no other file holds a geometry formula.

Geometry. An output position ``o`` of a transposed convolution (kernel ``k``, stride ``s``, padding ``p``, dilation
``d``) receives input ``i`` through tap ``t`` where ``o + p = s*i + d*t``. With ``g = gcd(s, d)``, the positions with
one residue ``r = o mod s`` use the taps ``t0, t0 + s/g, t0 + 2s/g, ...`` and read ``i = q + off0 - j*d/g`` where ``o =
s*q + r``: they form one *phase*, an ordinary stride-1 gather. A phase whose ``r + p`` is no multiple of ``g`` has no
taps at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

import torch

__all__ = [
    "DTYPES",
    "INT32",
    "ConvSpec",
    "MAX_SCALE",
    "MAX_STRIDE",
    "Phase",
    "Precision",
    "collapse_upsample",
    "phases_1d",
    "summed_taps",
    "tap_inverse",
]


# --- geometry ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """The outputs ``o = stride*q + residue`` of one dimension: output ``q`` reads input ``q + off0 + j*step`` through
    tap ``tap0 + j*tap_step``, for ``0 <= j < taps``."""

    residue: int
    taps: int
    tap0: int
    tap_step: int
    off0: int
    step: int

    def pairs(self) -> list[tuple[int, int]]:
        """``[(tap, input offset), ...]`` in the order in which the kernels walk them."""
        return [(self.tap0 + j * self.tap_step, self.off0 + j * self.step) for j in range(self.taps)]

    def size(self, output_size: int, stride: int) -> int:
        """How many of ``output_size`` positions belong to this phase."""
        return max(0, -(-(output_size - self.residue) // stride))


def tap_inverse(stride: int, dilation: int) -> int:
    """Inverse of ``d/g`` modulo ``s/g``: solves ``d*t = c (mod s)`` for the first tap of a phase."""
    g = math.gcd(stride, dilation)
    return pow(dilation // g, -1, stride // g) if stride > g else 0


@cache
def phases_1d(kernel: int, stride: int, padding: int, dilation: int, transposed: bool) -> tuple[Phase, ...]:
    """The phases of one dimension: ``stride`` of them for a transposed convolution, one for a plain one.

    A plain convolution of stride ``s`` reads ``s*q - p + d*j``: one phase whose ``q`` counts in steps of ``s``.
    """
    if not transposed:
        return (Phase(residue=0, taps=kernel, tap0=0, tap_step=1, off0=-padding, step=dilation),)
    g = math.gcd(stride, dilation)
    tap_step, inverse = stride // g, tap_inverse(stride, dilation)
    out = []
    for r in range(stride):
        c = r + padding
        tap0 = (c // g) * inverse % tap_step
        if c % g or tap0 >= kernel:
            out.append(Phase(r, 0, 0, tap_step, 0, -(dilation // g)))
            continue
        taps = -(-(kernel - tap0) // tap_step)
        out.append(Phase(r, taps, tap0, tap_step, (c - dilation * tap0) // stride, -(dilation // g)))
    return tuple(out)


MAX_STRIDE = 4096  # of a transposed convolution: its phases are written out, and there are as many
# Nearest upsampling reads floor(o * float32(1/r)): it repeats each pixel r times for every r up to 40, not for r = 41.
MAX_SCALE = 32


def _tuple(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) * (n if len(value) == 1 else 1)


@dataclass(frozen=True)
class ConvSpec:
    """Geometry of a 1-, 2- or 3-D convolution, transposed or plain; sizes of the input are not part of it.

    Weights have torch's shapes: ``(in_channels, out_channels/groups, *kernel_size)`` when ``transposed``,
    ``(out_channels, in_channels/groups, *kernel_size)`` otherwise.
    """

    transposed: bool
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @classmethod
    def make(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
        *,
        transposed: bool = True,
        ndim: int = 2,
    ) -> ConvSpec:
        """A spec from ints or sequences. ValueError for what no convolution can be (the wording is torch's where it has
        one)."""

        def per_dim(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
            out = _tuple(value, ndim)
            if len(out) != ndim:
                raise ValueError(f"{name} must be an int or {ndim} ints, got {value}")
            return out

        spec = cls(
            transposed,
            in_channels,
            out_channels,
            per_dim("kernel_size", kernel_size),
            per_dim("stride", stride),
            per_dim("padding", padding),
            per_dim("output_padding", output_padding),
            per_dim("dilation", dilation),
            groups,
        )
        spec._check()
        return spec

    def _check(self) -> None:
        if min(self.kernel_size) < 1:
            raise ValueError(f"kernel_size must be positive, got {self.kernel_size}")
        if min(self.stride) < 1:
            raise ValueError(f"non-positive stride is not supported, got {self.stride}")
        if self.transposed and max(self.stride) > MAX_STRIDE:
            raise ValueError(f"a transposed convolution's stride may be {MAX_STRIDE} at most, got {self.stride}")
        if min(self.dilation) < 1:
            raise ValueError(f"dilation should be greater than zero, got {self.dilation}")
        if min(self.padding) < 0:
            raise ValueError(f"negative padding is not supported, got {self.padding}")
        if min(self.output_padding) < 0:
            raise ValueError(f"negative output_padding is not supported, got {self.output_padding}")
        if self.groups < 1:
            raise ValueError(f"groups must be a positive integer, got {self.groups}")
        for name, channels in (("in_channels", self.in_channels), ("out_channels", self.out_channels)):
            if channels % self.groups:
                raise ValueError(f"groups={self.groups} does not divide {name}={channels}")
        if not self.transposed and any(self.output_padding):
            raise ValueError(f"output_padding belongs to transposed convolutions, got {self.output_padding}")
        for op, s, d in zip(self.output_padding, self.stride, self.dilation, strict=True):
            if op >= max(s, d):
                raise ValueError(
                    "output padding must be smaller than either stride or dilation, "
                    f"got output_padding={self.output_padding}, stride={self.stride}, dilation={self.dilation}"
                )

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, name) for name in self.__dataclass_fields__))

    def __hash__(self) -> int:  # specs are dictionary keys on the path of every call
        return self._hash

    @property
    def ndim(self) -> int:
        return len(self.kernel_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        first, second = (
            (self.in_channels, self.out_channels) if self.transposed else (self.out_channels, self.in_channels)
        )
        return (first, second // self.groups, *self.kernel_size)

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output for a spatial ``input_size``. ValueError where it would not be positive."""
        out = []
        for n, k, s, p, op, d in zip(
            input_size, self.kernel_size, self.stride, self.padding, self.output_padding, self.dilation, strict=True
        ):
            reach = d * (k - 1) + 1
            out.append((n - 1) * s - 2 * p + reach + op if self.transposed else (n + 2 * p - reach) // s + 1)
        if any(n < 1 for n in out):  # without min(): sizes may be symbolic, and are not to be compared with each other
            raise ValueError(
                f"given input size per channel {tuple(input_size)}, calculated output size {tuple(out)} is too small"
            )
        return tuple(out)

    @cached_property
    def phases(self) -> tuple[tuple[Phase, ...], ...]:
        """Per dimension, its phases; the phases of the convolution are their product."""
        return tuple(
            phases_1d(k, s, p, d, self.transposed)
            for k, s, p, d in zip(self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        )

    @property
    def max_phase_taps(self) -> int:
        return math.prod(max(ph.taps for ph in dim) for dim in self.phases)

    def macs(self, batch: int, input_size: Sequence[int]) -> int:
        """Multiply-adds after phase decomposition, border taps included (what a matrix-product formulation does)."""
        per_dim = 1
        for dim, out, s in zip(self.phases, self.output_size(input_size), self.stride, strict=True):
            step = s if self.transposed else 1
            per_dim *= sum(ph.taps * ph.size(out, step) for ph in dim)
        return batch * per_dim * self.in_channels * self.out_channels // self.groups

    def adjoint(self, input_size: Sequence[int] | None = None) -> ConvSpec:
        """The spec of the transposed linear map: same weight, channels swapped.

        A strided plain convolution forgets up to ``stride - 1`` trailing inputs; ``input_size`` (of this spec's input)
        says how many, and becomes the adjoint's output padding. A transposed convolution whose output padding reaches
        its stride (possible with a dilation) has an adjoint that yields trailing positions too many: crop to the input
        size.
        """
        if self.transposed:
            output_padding = (0,) * self.ndim
        elif input_size is None:
            output_padding = (0,) * self.ndim
            if any(s > 1 for s in self.stride):
                raise ValueError("the adjoint of a strided convolution needs input_size")
        else:
            output_padding = tuple(
                (n + 2 * p - d * (k - 1) - 1) % s
                for n, k, s, p, d in zip(
                    input_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
                )
            )
        return replace(
            self,
            transposed=not self.transposed,
            in_channels=self.out_channels,
            out_channels=self.in_channels,
            output_padding=output_padding,
        )

    def as_2d(self) -> ConvSpec:
        """A 1-D spec as the 2-D spec of height 1; others as they are."""
        if self.ndim > 1:
            return self
        return replace(
            self,
            kernel_size=(1, *self.kernel_size),
            stride=(1, *self.stride),
            padding=(0, *self.padding),
            output_padding=(0, *self.output_padding),
            dilation=(1, *self.dilation),
        )


def summed_taps(k: int, r: int) -> list[list[int]]:
    """For each tap j of the collapsed kernel, the taps of a k-tap convolution after an upsampling by r that it sums:
    those t with k-1-j <= t < k-1-j+r."""
    return [[t for t in range(k) if k - 1 - j <= t < k - 1 - j + r] for j in range(k + r - 1)]


def collapse_upsample(
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    scale: Sequence[int],
    padding: Sequence[int],
    groups: int = 1,
) -> ConvSpec:
    """The transposed convolution that equals nearest-neighbour upsampling by ``scale`` followed by a stride-1
    convolution.

    ``y[o] = sum_t W[t] x[(o + t - p) // r]``: tap ``j`` of the result holds the sum of the taps ``t`` with
    ``k-1-j <= t < k-1-j+r`` (`reference.collapse_weight`), its kernel is ``k + r - 1``, its stride ``r`` and its
    padding ``k - 1 - p``. ValueError unless ``p <= k - 1`` and ``r <= MAX_SCALE``.
    """
    for k, p in zip(kernel_size, padding, strict=True):
        if p > k - 1:
            raise ValueError(f"padding={tuple(padding)} must be smaller than kernel_size={tuple(kernel_size)}")
    if max(scale) > MAX_SCALE:
        raise ValueError(f"scale_factor={tuple(scale)} is larger than {MAX_SCALE}")
    return ConvSpec.make(
        in_channels,
        out_channels,
        [k + r - 1 for k, r in zip(kernel_size, scale, strict=True)],
        list(scale),
        [k - 1 - p for k, p in zip(kernel_size, padding, strict=True)],
        groups=groups,
        ndim=len(list(kernel_size)),
    )


# --- precision --------------------------------------------------------------------------------------------------------


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of what any fast path runs: kernels, and oneDNN's packed operators."""

INT32 = 2**31
"""Elements of a tensor from which on its offsets do not fit 32 bits."""


class Precision(NamedTuple):
    """Numerics of a launch: storage dtype and, for float32, whether products are taken in TF32 (operands rounded).

    Sums, scale, shift, residual and activation are float32 in every case, and the result is rounded once.
    """

    dtype: torch.dtype
    tf32: bool = False

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize
