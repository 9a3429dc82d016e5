"""One fused step: what it computes (`Step`) and the tensors it reads (`Operands`).

A step is ``act((conv(x) + bias - mean) * rsqrt(var + eps) * scale + shift + residual)`` where every part but the
convolution is optional: a BatchNorm in eval mode gives all of mean, var, scale and shift; `cnnfast.ops` gives scale and
shift alone. Fusion builds steps from modules, `ops` from arguments; every backend runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .activations import Activation
from .norms import Norm
from .spec import ConvSpec, collapse_upsample

__all__ = ["NormHow", "Operands", "PADDING_MODES", "Step", "Upsample", "how_of", "plain_step", "upsample_step"]


PADDING_MODES = ("zeros", "replicate", "reflect")


@dataclass(frozen=True)
class Upsample:
    """Nearest upsampling ahead of a stride-1 convolution that pads by ``padding`` in ``mode``."""

    scale: tuple[int, int]
    padding: tuple[int, int]
    mode: str = "zeros"


@dataclass(frozen=True)
class Step:
    """``spec`` is the 2-D convolution that runs on the input padded by ``pad`` in ``pad_mode`` (replicate or reflect).

    With ``upsample``, the step is an upsampling and a plain convolution whose weight (C_out, C_in/g, kh, kw) is summed
    to the weight of ``spec`` (`reference.conv_weight`).
    """

    spec: ConvSpec
    activation: Activation = None  # type: ignore[assignment]  # identity: Dynamo (2.11) traces no objects as defaults
    upsample: Upsample | None = None
    pad: tuple[int, int] = (0, 0)
    pad_mode: str = "replicate"

    def __post_init__(self) -> None:
        if self.activation is None:
            object.__setattr__(self, "activation", Activation())

    @cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.activation, self.upsample, self.pad, self.pad_mode))

    def __hash__(self) -> int:  # steps are dictionary keys on the path of every call
        return self._hash

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output. ValueError where it would not be positive, or the input is too small to
        reflect."""
        if self.pad_mode == "reflect" and any(p >= n for p, n in zip(self.pad, input_size, strict=True)):
            raise ValueError(f"reflecting {self.pad} pixels takes a larger input than {tuple(input_size)}")
        return self.spec.output_size([n + 2 * p for n, p in zip(input_size, self.pad, strict=True)])

    def pad_input(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, C, H, W) padded by ``pad``."""
        ph, pw = self.pad
        return F.pad(x, (pw, pw, ph, ph), mode=self.pad_mode) if ph or pw else x

    def describe(self) -> str:
        """Which layer, for people."""
        s, kernel = self.spec, self.spec.kernel_size
        if self.upsample is not None:
            kernel = tuple(k - r + 1 for k, r in zip(kernel, self.upsample.scale, strict=True))
        kind = "upsample + conv" if self.upsample is not None else "conv_transpose" if s.transposed else "conv"
        return f"{kind} {s.in_channels} -> {s.out_channels}, kernel {'x'.join(map(str, kernel))}"

    def concerns(self, step: Step) -> bool:
        """Whether ``step`` or its gradients run this step: itself, its convolution alone, or its input's gradient."""
        if self == step or self == Step(step.spec, self.activation):
            return True
        s, output_padding = step.spec, self.spec.output_padding
        adjoint = replace(
            s,
            transposed=not s.transposed,
            in_channels=s.out_channels,
            out_channels=s.in_channels,
            output_padding=output_padding,  # that of the input's size
        )
        return self == Step(adjoint)


def plain_step(spec: ConvSpec, mode: str = "zeros", activation: Activation = Activation()) -> Step:  # noqa: B008
    """The step of a plain convolution that pads by ``spec.padding`` in ``mode``, one of `PADDING_MODES`."""
    if mode not in PADDING_MODES:
        raise ValueError(f"padding_mode={mode!r} must be one of {PADDING_MODES}")
    if mode == "zeros" or not any(spec.padding):
        return Step(spec, activation)
    ph, pw = spec.padding
    return Step(replace(spec, padding=(0, 0)), activation, None, (ph, pw), mode)


def upsample_step(
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    upsample: Upsample,
    groups: int = 1,
    activation: Activation = Activation(),  # noqa: B008 (frozen)
) -> Step:
    """The step of nearest upsampling + convolution. ValueError where the collapse does not hold.

    Replicate padding commutes with nearest upsampling: the small input is padded by ``ceil(p/r)`` and the surplus
    cropped by the transposed convolution's own padding. Reflecting ``p <= r - 1`` pixels only meets copies of the
    border pixel, so it is replication there; a larger reflection is not.
    """
    u = upsample
    if u.mode not in PADDING_MODES:
        raise ValueError(f"padding_mode={u.mode!r} must be one of {PADDING_MODES}")
    if u.mode == "reflect" and any(p > r - 1 for p, r in zip(u.padding, u.scale, strict=True)):
        raise ValueError(
            f"reflect padding={u.padding} is larger than scale_factor - 1 = {tuple(r - 1 for r in u.scale)}"
        )
    pad = (0, 0)
    padding: tuple[int, ...] = u.padding
    if u.mode != "zeros":
        pad = tuple(-(-p // r) for p, r in zip(u.padding, u.scale, strict=True))  # type: ignore[assignment]
        padding = (0, 0)
    spec = collapse_upsample(in_channels, out_channels, kernel_size, u.scale, padding, groups)
    if u.mode != "zeros":
        crop = tuple(m * r - p for m, r, p in zip(pad, u.scale, u.padding, strict=True))
        spec = replace(spec, padding=tuple(p + c for p, c in zip(spec.padding, crop, strict=True)))
    return Step(spec, activation, u, pad)


class Operands(NamedTuple):
    """The tensors of one call. x (N, C_in, H, W); weight in the layer's own shape; residual like the output; every
    other one of C_out elements (``slope``, PReLU's weight, of 1 or C_out)."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    var: torch.Tensor | None = None
    eps: float = 0.0
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    slope: torch.Tensor | None = None

    def folded(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(scale, shift) that stand for bias, mean, var, scale and shift together, computed in ``dtype``."""
        scale = None if self.scale is None else self.scale.to(dtype)
        shift = None if self.shift is None else self.shift.to(dtype)
        offset = None if self.bias is None else self.bias.to(dtype)
        if self.var is not None:
            inv = torch.rsqrt(self.var.to(dtype) + self.eps)
            scale = inv if scale is None else inv * scale
        if self.mean is not None:
            offset = -self.mean.to(dtype) if offset is None else offset - self.mean.to(dtype)
        if offset is not None:
            offset = offset if scale is None else offset * scale
            shift = offset if shift is None else shift + offset
        return scale, shift


@dataclass(frozen=True)
class NormHow:
    """What a launch computes beside its tensors. ``norm`` None: residual and activation alone. ``measured``: the
    statistics are of the input, and depend on it; otherwise they are constants, and rstd is the running variance."""

    norm: Norm | None
    measured: bool
    activation: Activation
    channels_last: bool  # the result
    dtype: torch.dtype  # of the result
    residual: bool = False

    @cached_property
    def _hash(self) -> int:
        return hash((self.norm, self.measured, self.activation, self.channels_last, self.dtype, self.residual))

    def __hash__(self) -> int:  # a key on the path of every call
        return self._hash

    @cached_property
    def of(self) -> str:
        """What the activation's derivative is taken of: the result ("y"); the activation's input ("x"), which the
        backward computes again; or neither ("")."""
        saves = self.activation.saves()
        return saves if self.residual or not saves else "x"

    def join(self, channels: int) -> int:
        """Channels that share statistics."""
        return channels // self.norm.groups if self.norm is not None and self.norm.kind == "group" else 1

    @property
    def each(self) -> bool:
        """Whether every image has its own statistics."""
        return self.measured and self.norm is not None and self.norm.per_image

    @property
    def eps(self) -> float:
        return 0.0 if self.norm is None else float(self.norm.eps)


how_of = lru_cache(maxsize=4096)(NormHow)
"""The same object for equal arguments: its hash is known, and keys that hold it compare at once."""
