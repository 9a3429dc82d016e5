"""The convolutions that start a fused step: from a module's attributes and weight to the geometry, or why not.

Every function raises `NotFused` with the reason where PyTorch's own modules have to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activations import Activation
from ..dispatch import choose, on_cpu
from ..gpu.why_not import spec_why_not
from ..spec import DTYPES, MAX_SCALE, ConvSpec
from ..step import PADDING_MODES, Step, Upsample, plain_step, upsample_step
from .modules import NotFused

__all__ = [
    "MAX_SCALE",
    "Part",
    "check_vector",
    "dense",
    "following",
    "is_identity",
    "padded_conv",
    "plain_conv_step",
    "transposed_step",
    "upsampled_step",
]


class Part(NamedTuple):
    """A module as planning sees it; ``role`` is empty where ``problem`` says why it takes no part."""

    role: str
    ndim: int
    problem: str
    training: bool = False
    attributes: tuple[Any, ...] = ()
    tensors: tuple[Tensor | None, ...] = ()
    activation: Callable[..., Activation] | None = None


def is_identity(part: Part, ndim: int) -> bool:
    """Whether the module returns its (ndim + 2)-dimensional input as it is: Identity, or a dropout in eval mode."""
    return part.role == "identity" or (part.role == "dropout" and part.ndim in (0, ndim) and not part.training)


def following(parts: list[Part], slot: int, ndim: int) -> int | None:
    """The next slot after ``slot`` that computes something."""
    return next((k for k in range(slot + 1, len(parts)) if not is_identity(parts[k], ndim)), None)


def dense(t: Tensor | None) -> Tensor:
    """A plain dense tensor: no subclass may be looked through."""
    if type(t) not in (nn.Parameter, Tensor) or t.layout is not torch.strided:  # type: ignore[union-attr]
        raise NotFused(f"it holds a {type(t).__name__} where a dense tensor is needed")
    return t  # type: ignore[return-value]


def check_vector(t: Tensor | None, length: int, dtypes: tuple[torch.dtype, ...], weight: Tensor) -> None:
    """Check a vector that goes with ``weight``; None is one that is left out."""
    if t is None:
        return
    if dense(t).shape != (length,):
        raise NotFused(f"a vector of shape {tuple(t.shape)} does not fit {length} channels")
    if t.dtype not in dtypes or t.device != weight.device:
        raise NotFused(f"a {t.dtype} vector on {t.device} does not go with a {weight.dtype} weight on {weight.device}")


def _pair(name: str, value: object, n: int) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) != n or not all(type(v) is int for v in value):
        raise NotFused(f"{name}={value!r} is not a tuple of {n} ints")
    return value


def _conv_weight(part: Part) -> Tensor:
    weight = dense(part.tensors[0])
    if weight.dtype not in DTYPES or not choose(weight, "auto"):
        raise NotFused(f"{weight.dtype} on {weight.device} has no fused path")
    if weight.dim() != part.ndim + 2 or weight.numel() == 0:
        raise NotFused(f"a weight of shape {tuple(weight.shape)} is no {part.ndim}-D convolution's")
    return weight


def transposed_step(part: Part) -> Step:
    stride, padding, output_padding, dilation, groups, padding_mode = part.attributes
    weight = _conv_weight(part)
    if padding_mode != "zeros":
        raise NotFused(f"padding_mode={padding_mode!r}: a transposed convolution has zeros only")
    if type(groups) is not int:
        raise NotFused(f"groups={groups!r} is not an int")
    n = part.ndim
    for name, value in (("stride", stride), ("padding", padding), ("output_padding", output_padding)):
        _pair(name, value, n)
    # By the weight's shape, as torch does: pruning leaves in_channels and kernel_size as they were.
    c_in, per_group, *kernel = weight.shape
    try:
        spec = ConvSpec.make(
            c_in,
            per_group * groups,
            kernel,
            stride,
            padding,
            output_padding,
            groups,
            _pair("dilation", dilation, n),
            ndim=n,
        )
    except ValueError as error:
        raise NotFused(str(error)) from None
    check_vector(part.tensors[1], spec.out_channels, (weight.dtype,), weight)
    return Step(spec.as_2d())


def _plain_padding(part: Part, kernel: Sequence[int]) -> tuple[int, ...]:
    """What a Conv1d or Conv2d pads on both sides of each dimension."""
    stride, padding, _, dilation, _, mode, reversed_padding = part.attributes
    n = part.ndim
    if mode != "zeros":  # by this list, last dimension first; the convolution itself then pads nothing
        before, after = tuple(reversed_padding[::2])[::-1], tuple(reversed_padding[1::2])[::-1]
        if before != after:
            raise NotFused(f"it pads unevenly: {reversed_padding}")
        padding = before
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(_pair("dilation", dilation, n), kernel, strict=True)]
        if any(r % 2 for r in reach):
            raise NotFused(f"padding='same' with kernel_size={tuple(kernel)} pads unevenly")
        if _pair("stride", stride, n) != (1,) * n:
            raise NotFused(f"padding='same' with stride={stride}")
        padding = tuple(r // 2 for r in reach)
    elif padding == "valid":
        padding = (0,) * n
    padding = _pair("padding", padding, n)
    if min(padding) < 0:
        raise NotFused(f"negative padding {padding}")
    return padding


class _Pad(NamedTuple):
    """A module that pads both sides of each dimension alike."""

    mode: str
    padding: tuple[int, ...]


def padded_conv(parts: list[Part], slot: int | None, ndim: int) -> tuple[int, _Pad | None]:
    """The slot of a Conv1d or Conv2d at ``slot`` or after a padding module there, and what that pads."""
    pad = None
    if slot is not None and parts[slot].role.startswith("pad") and parts[slot].ndim == ndim:
        (padding,) = parts[slot].attributes
        before, after = _pair("padding", padding, 2 * ndim)[::2][::-1], padding[1::2][::-1]
        if before != after or min(before) < 0:
            raise NotFused(f"padding={padding}: only the same on both sides goes into a convolution")
        pad = _Pad(parts[slot].role.removeprefix("pad "), before)
        slot = following(parts, slot, ndim)
    if slot is None or parts[slot].role != "conv" or parts[slot].ndim != ndim:
        raise NotFused(f"no Conv{ndim}d follows that could take it in")
    return slot, pad


def _all_padding(part: Part, kernel: Sequence[int], pad: _Pad | None) -> _Pad:
    """What is padded ahead of the convolution by it and the module before it."""
    mode, padding = part.attributes[5], _plain_padding(part, kernel)
    if mode not in PADDING_MODES:  # also where nothing is padded: PyTorch's circular padding of nothing is a copy
        raise NotFused(f"padding_mode={mode!r} must be one of {PADDING_MODES}")
    if pad is None or not any(pad.padding):
        return _Pad(mode, padding)
    if any(padding) and (mode, pad.mode) != ("zeros", "zeros"):
        raise NotFused("the convolution that follows pads, too")
    return _Pad(pad.mode, tuple(p + q for p, q in zip(padding, pad.padding, strict=True)))


def plain_conv_step(part: Part, pad: _Pad | None) -> Step:
    """The step of a Conv1d or Conv2d without an upsampling ahead of it."""
    stride, _, _, dilation, groups, _, _ = part.attributes
    weight, n = _conv_weight(part), part.ndim
    c_out, per_group, *kernel = weight.shape
    if type(groups) is not int:
        raise NotFused(f"groups={groups!r} is not an int")
    mode, padding = _all_padding(part, kernel, pad)
    try:
        step = plain_step(
            ConvSpec.make(
                per_group * groups,
                c_out,
                kernel,
                _pair("stride", stride, n),
                padding,
                groups=groups,
                dilation=_pair("dilation", dilation, n),
                transposed=False,
                ndim=n,
            ).as_2d(),
            mode,
        )
    except ValueError as error:
        raise NotFused(str(error)) from None
    reason = None if on_cpu(weight) else spec_why_not(step.spec)
    if reason is not None:  # PyTorch's own modules do it as well
        raise NotFused(f"no kernel: {reason}")
    check_vector(part.tensors[1], c_out, (weight.dtype,), weight)
    return step


def _ndim_after(parts: list[Part], slot: int) -> int:
    """How many dimensions an Upsample at ``slot`` has: 2, or 3 where that is what follows."""
    after = next((p for p in parts[slot + 1 :] if p.role == "conv" or p.role.startswith("pad")), None)
    return 3 if after is not None and after.ndim == 3 else 2


def upsampled_step(parts: list[Part], slot: int) -> tuple[int, Step]:
    """The convolution's slot and the step of an Upsample at ``slot`` with the Conv2d or Conv3d that follows it."""
    size, scale_factor, mode, align_corners = parts[slot].attributes
    if mode not in ("nearest", "nearest-exact") or align_corners is not None:
        raise NotFused(f"mode={mode!r} is not nearest")
    if size is not None:
        raise NotFused("it goes to a fixed size, not by a scale_factor")
    n = parts[slot].ndim or _ndim_after(parts, slot)
    factors = scale_factor if type(scale_factor) is tuple else (scale_factor,) * n
    if len(factors) != n or not all(f in range(1, MAX_SCALE + 1) for f in factors):
        raise NotFused(
            f"scale_factor={scale_factor!r} is not one or {('two', 'three')[n - 2]} integers from 1 to {MAX_SCALE}"
        )
    conv, pad = padded_conv(parts, following(parts, slot, n), n)
    part = parts[conv]
    stride, _, _, dilation, groups, _, _ = part.attributes
    weight = _conv_weight(part)
    c_out, per_group, *kernel = weight.shape
    if type(groups) is not int:
        raise NotFused(f"groups={groups!r} is not an int")
    if _pair("stride", stride, n) != (1,) * n or _pair("dilation", dilation, n) != (1,) * n:
        raise NotFused(f"the Conv{n}d that follows has stride={stride} and dilation={dilation}: 1 and 1 are collapsed")
    if not all(k % 2 for k in kernel):
        raise NotFused(f"the Conv{n}d that follows has kernel_size={tuple(kernel)}: odd ones are collapsed")
    mode, padding = _all_padding(part, kernel, pad)
    upsample = Upsample(tuple(map(int, factors)), padding, mode)
    try:
        step = upsample_step(per_group * groups, c_out, tuple(kernel), upsample, groups)
    except ValueError as error:
        raise NotFused(str(error)) from None
    check_vector(part.tensors[1], c_out, (weight.dtype,), weight)
    return conv, step
