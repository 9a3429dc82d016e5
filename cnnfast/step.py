"""One fused step: what it computes (`Step`) and the tensors it reads (`Operands`).

A step is ``act(norm(conv(x) + bias) + residual)``, every part optional: a BatchNorm in eval mode is a norm of kind
"running"; a scale and a shift that `cnnfast.ops` is given one of kind "affine". Fusion builds steps from modules, `ops`
from arguments; every backend runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .activations import Activation
from .norms import Norm
from .spec import ConvSpec, collapse_upsample

__all__ = [
    "Operands",
    "PADDING_MODES",
    "Step",
    "Upsample",
    "convolution_of",
    "norm_step",
    "one_of_equal",
    "output_padding_of",
    "plain_step",
    "step_key",
    "step_of",
    "upsample_step",
]


PADDING_MODES = ("zeros", "replicate", "reflect")


@dataclass(frozen=True)
class Upsample:
    """Nearest upsampling ahead of a stride-1 convolution that pads by ``padding`` in ``mode``; a number for each
    dimension."""

    scale: tuple[int, ...]
    padding: tuple[int, ...]
    mode: str = "zeros"


@dataclass(frozen=True)
class Step:
    """``spec`` is the 2-D or 3-D convolution that runs on the input padded by ``pad`` in ``pad_mode`` (replicate or
    reflect); None where the step is only what follows one.

    With ``upsample``, the step is an upsampling and a plain convolution whose weight (C_out, C_in/g, *kernel) is summed
    to the weight of ``spec`` (`reference.conv_weight`). ``residual``: something is added ahead of the activation.
    """

    spec: ConvSpec  # or None: see above
    activation: Activation = None  # type: ignore[assignment]  # identity: Dynamo (2.11) traces no objects as defaults
    upsample: Upsample | None = None
    pad: tuple[int, ...] = None  # type: ignore[assignment]  # none: a 0 for each dimension
    pad_mode: str = "replicate"
    norm: Norm | None = None
    residual: bool = False

    def __post_init__(self) -> None:
        if self.activation is None:
            object.__setattr__(self, "activation", Activation())
        if self.pad is None:
            object.__setattr__(self, "pad", (0, 0) if self.spec is None or self.spec.ndim < 3 else (0, 0, 0))

    @cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.activation, self.upsample, self.pad, self.pad_mode, self.norm, self.residual))

    def __hash__(self) -> int:  # steps are dictionary keys on the path of every call
        return self._hash

    @cached_property
    def measured(self) -> bool:
        """Whether it normalises by the statistics of what the convolution gives."""
        return self.norm is not None and self.norm.measured

    @cached_property
    def statistics(self) -> str | None:
        """What these are of: the "batch", each "image", or None."""
        if self.norm is None or not self.norm.measured:
            return None
        return "image" if self.norm.per_image else "batch"

    @cached_property
    def saves(self) -> str:
        """What a backward of its activation needs: `Activation.saves`."""
        return self.activation.saves()

    @cached_property
    def folds(self) -> bool:
        """Whether one kernel does the whole step with gradients: a convolution, and an activation whose derivative its
        result gives."""
        return self.norm is None and not self.residual and self.saves != "x"

    @cached_property
    def inner(self) -> Step:
        """What runs on the padded input, with the weight summed, where gradients are needed: the convolution, with the
        activation if the step folds."""
        return Step(self.spec, self.activation if self.folds else _IDENTITY)

    @cached_property
    def bare(self) -> Step:
        """The convolution alone."""
        return convolution_of(self)

    @cached_property
    def tail(self) -> Step:
        """What follows the convolution."""
        return norm_step(self.norm, self.residual, self.activation)

    @cached_property
    def until_norm(self) -> Step:
        """The convolution and the norm."""
        return replace(self, activation=_IDENTITY, residual=False)

    @cached_property
    def after_norm(self) -> Step:
        """What follows the norm."""
        return norm_step(None, self.residual, self.activation)

    @cached_property
    def of(self) -> str:
        """What a backward of ``tail`` takes the activation's derivative of: the result ("y"); the activation's input
        ("x"), which it computes again; or neither ("")."""
        return self.saves if self.residual or not self.saves else "x"

    def output_size(self, input_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial size of the output. ValueError where it would not be positive, or the input is too small to
        reflect."""
        if self.spec is None:
            return tuple(input_size)
        if self.pad_mode == "reflect" and any(p >= n for p, n in zip(self.pad, input_size, strict=True)):
            raise ValueError(f"reflecting {self.pad} pixels takes a larger input than {tuple(input_size)}")
        return self.spec.output_size([n + 2 * p for n, p in zip(input_size, self.pad, strict=True)])

    def pad_input(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, C, *size) padded by ``pad``."""
        if not any(self.pad):
            return x
        return F.pad(x, [p for p in reversed(self.pad) for _ in range(2)], mode=self.pad_mode)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the layer's own weight: the convolution's, ahead of which an upsampling may stand."""
        s: ConvSpec = self.spec
        if self.upsample is None:
            return s.weight_shape
        kernel = (k - r + 1 for k, r in zip(s.kernel_size, self.upsample.scale, strict=True))
        return (s.out_channels, s.in_channels // s.groups, *kernel)

    def unfused(self, input_size: Sequence[int]) -> tuple[ConvSpec, tuple[int, ...]]:
        """The convolution that its modules run, and the spatial size of what it gets there."""
        s, u = self.spec, self.upsample
        if u is None:
            return s, tuple(n + 2 * p for n, p in zip(input_size, self.pad, strict=True))
        zeros = u.mode == "zeros"
        padding, pad = (u.padding, (0,) * s.ndim) if zeros else ((0,) * s.ndim, u.padding)
        kernel, ones = self.weight_shape[2:], (1,) * s.ndim
        plain = ConvSpec(False, s.in_channels, s.out_channels, kernel, ones, padding, (0,) * s.ndim, ones, s.groups)
        return plain, tuple(n * r + 2 * p for n, r, p in zip(input_size, u.scale, pad, strict=True))

    def describe(self) -> str:
        """Which layer, for people."""
        s = self.spec
        if s is None:
            norm = [] if self.norm is None else [f"{self.norm.kind} norm"]
            return " + ".join([*norm, *["residual"] * self.residual, self.activation.name])
        kernel = self.weight_shape[2:]
        kind = "upsample + conv" if self.upsample is not None else "conv_transpose" if s.transposed else "conv"
        return f"{kind} {s.in_channels} -> {s.out_channels}, kernel {'x'.join(map(str, kernel))}"

    def concerns(self, step: Step) -> bool:
        """Whether ``step`` or its gradients run this step: itself, its convolution alone, or its input's gradient."""
        s = step.spec
        if self == step or s is None or self.spec is None:
            return self == step
        adjoint = replace(
            s,
            transposed=not s.transposed,
            in_channels=s.out_channels,
            out_channels=s.in_channels,
            output_padding=self.spec.output_padding,  # that of the input's size
        )
        return self in (Step(s, self.activation), Step(adjoint))


_IDENTITY = Activation()


@lru_cache(maxsize=4096)
def one_of_equal(step: Step) -> Step:
    """The first of equal steps that was asked for. They are dictionary keys on the path of every call: where a network
    repeats a block, finding the same object takes a glance, an equal one a comparison of all that it holds."""
    return step


def convolution_of(step: Step) -> Step:
    """`Step.bare`, for code that Dynamo traces."""
    return Step(step.spec, _IDENTITY, step.upsample, step.pad, step.pad_mode)


def norm_step(norm: Norm | None, residual: bool = False, activation: Activation = _IDENTITY) -> Step:
    """``act(norm(x) + residual)``, without a convolution."""
    return Step(None, activation, norm=norm, residual=residual)  # type: ignore[arg-type]


def plain_step(spec: ConvSpec, mode: str = "zeros", activation: Activation = Activation()) -> Step:  # noqa: B008
    """The step of a plain convolution that pads by ``spec.padding`` in ``mode``, one of `PADDING_MODES`."""
    if mode not in PADDING_MODES:
        raise ValueError(f"padding_mode={mode!r} must be one of {PADDING_MODES}")
    if mode == "zeros" or not any(spec.padding):
        return Step(spec, activation)
    return Step(replace(spec, padding=(0,) * spec.ndim), activation, None, spec.padding, mode)


def upsample_step(
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, ...],
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
    pad = none = (0,) * len(u.scale)
    padding = u.padding
    if u.mode != "zeros":
        pad, padding = tuple(-(-p // r) for p, r in zip(u.padding, u.scale, strict=True)), none
    spec = collapse_upsample(in_channels, out_channels, kernel_size, u.scale, padding, groups)
    if u.mode != "zeros":
        crop = tuple(m * r - p for m, r, p in zip(pad, u.scale, u.padding, strict=True))
        spec = replace(spec, padding=tuple(p + c for p, c in zip(spec.padding, crop, strict=True)))
    return Step(spec, activation, u, pad)


# --- steps by their keys ----------------------------------------------------------------------------------------------


def step_key(step: Step) -> str:
    """All of a step but the sizes of its weight and its output padding, which may be symbolic where this is traced
    (that of an input's gradient depends on the input's size): what `torch.library`'s operators take for it, and
    `step_of` reads. (Built of single numbers: Dynamo formats no tuples.)"""
    s, u, norm, act = step.spec, step.upsample, step.norm, step.activation
    conv = ""
    if s is not None and u is not None:
        conv = f"up {_numbers(u.scale)} {_numbers(u.padding)} {u.mode} {s.groups}"
    elif s is not None:
        kind, mode = "t" if s.transposed else "c", step.pad_mode if any(step.pad) else "zeros"
        conv = (
            f"{kind} {_numbers(s.stride)} {_numbers(s.padding)} {_numbers(s.dilation)} {_numbers(step.pad)} {mode} "
            f"{s.groups}"
        )
    after = "" if norm is None else f"{norm.kind} {norm.groups} {float(norm.eps)!r}"
    return f"{conv}|{after}|{'+' if step.residual else ''}|{act.name} {_numbers(act.params)}"


def _numbers(values: Sequence[float]) -> str:
    return ",".join([repr(v) for v in values])


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(v) for v in text.split(","))


def _made(key: str, weight_shape: Sequence[int], output_padding: Sequence[int]) -> Step:
    conv, after, residual, act = key.split("|")
    name, params = act.split(" ")
    activation = Activation(name, tuple(float(p) for p in params.split(",") if p))
    norm = None
    if after:
        kind, of, eps = after.split(" ")
        norm = Norm(kind, int(of), float(eps))
    if not conv:
        return norm_step(norm, bool(residual), activation)
    how, *numbers, groups = conv.split(" ")
    first, second, *kernel = weight_shape
    each = second * int(groups)
    if how == "up":
        scale, padding, mode = _ints(numbers[0]), _ints(numbers[1]), numbers[2]
        step = upsample_step(each, first, tuple(kernel), Upsample(scale, padding, mode), int(groups), activation)
    else:
        c_in, c_out = (first, each) if how == "t" else (each, first)
        stride, padding, dilation, pad = (_ints(n) for n in numbers[:4])
        ints = (tuple(kernel), stride, padding, tuple(output_padding), dilation)
        spec = ConvSpec(how == "t", c_in, c_out, *ints, int(groups))
        step = Step(spec, activation, None, pad, "replicate" if numbers[4] == "zeros" else numbers[4])
    return replace(step, norm=norm, residual=bool(residual))


_known_step = lru_cache(maxsize=4096)(_made)


def step_of(key: str, weight_shape: Sequence[int] = (), output_padding: Sequence[int] = ()) -> Step:
    """The step with this `step_key` and output padding whose layer has a weight of this (4-D or 5-D) shape."""
    symbolic = any(isinstance(n, torch.SymInt) for n in (*weight_shape, *output_padding))
    make = _made if symbolic else _known_step
    return make(key, tuple(weight_shape), tuple(output_padding))


def output_padding_of(step: Step) -> list[int]:
    """What goes with the `step_key`."""
    return [] if step.spec is None else list(step.spec.output_padding)


# --- tensors ----------------------------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """The tensors of one call. x (N, C_in, *size); weight in the layer's own shape; residual like the output; every
    other one of C_out elements (``slope``, PReLU's weight, of 1 or C_out).

    ``scale`` and ``shift`` are the norm's weight and bias; ``mean`` and ``var`` its statistics where it is of kind
    "running". A norm that measures moves them, in place, by ``momentum`` towards the input's statistics, as
    `torch.nn.functional.batch_norm` and ``instance_norm`` do it (the variance unbiased). ``group``: its statistics are
    those of all processes of this group together (SyncBatchNorm). ``batches`` (num_batches_tracked, one int64) goes up
    by one.
    """

    x: torch.Tensor
    weight: torch.Tensor = None  # type: ignore[assignment]  # of a step without a convolution
    bias: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    var: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    slope: torch.Tensor | None = None
    momentum: float = 0.1  # the factor itself, never None
    group: Any = None
    batches: torch.Tensor | None = None

    def after(self, u: torch.Tensor) -> Operands:
        """Of what follows the convolution, whose result is ``u``."""
        return self._replace(x=u, weight=None, bias=None)  # type: ignore[arg-type]

    def folded(
        self, norm: Norm | None, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(scale, shift) that stand for bias and ``norm``, of kind "running" or "affine", together, in ``dtype``."""
        scale = None if self.scale is None else self.scale.to(dtype)
        shift = None if self.shift is None else self.shift.to(dtype)
        offset = None if self.bias is None else self.bias.to(dtype)
        if norm is not None and self.var is not None:
            inv = torch.rsqrt(self.var.to(dtype) + norm.eps)
            scale = inv if scale is None else inv * scale
        if self.mean is not None:
            offset = -self.mean.to(dtype) if offset is None else offset - self.mean.to(dtype)
        if offset is not None:
            offset = offset if scale is None else offset * scale
            shift = offset if shift is None else shift + offset
        return scale, shift
