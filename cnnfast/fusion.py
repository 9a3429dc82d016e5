"""Which run of modules is one fused step: the rules, once.

A step is ``ConvTranspose1d/2d``, ``Conv1d/2d`` or ``Upsample(nearest) + Conv2d``, then a BatchNorm in eval mode, then
an activation, both optional. Ahead of the latter two's convolution a module may pad by zeros, reflection or
replication. `plan_modules` gives steps for a list of modules, and for every other module the reason why it runs as it
stands. A step is made of values alone (slots in the list, geometry, numbers); whoever runs it reads the tensors from
the modules on every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block import Step, Upsample, plain_step, upsample_step
from .modules import HOOKS, KINDS, SHADOWS, Reading, Refused, is_patched, read
from .ops.core import is_channels_last
from .spec import Activation, ConvSpec

__all__ = ["FusedStep", "Unfused", "plan_modules"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DEVICES = ("cpu", "cuda")
# Nearest upsampling reads floor(o * float32(1/r)): it repeats each pixel r times for every r up to 40, not for r = 41.
MAX_SCALE = 32


@dataclass(frozen=True)
class FusedStep:
    """The modules at ``slots`` as one `Step`; ``conv``, ``norm`` and ``slope`` are those whose tensors it reads.

    ``weight_channels_last``, and ``in_place`` (in eager mode nothing after the convolution lays out a tensor anew),
    decide the memory format that eager mode would return.
    """

    slots: tuple[int, ...]
    step: Step
    ndim: int
    dtype: torch.dtype
    device: torch.device
    conv: int
    norm: int | None
    eps: float
    slope: int | None
    weight_channels_last: bool
    in_place: bool


@dataclass(frozen=True)
class Unfused:
    """A module that runs as it stands. ``opaque``: it runs code that is not PyTorch's, which might change others."""

    slot: int
    why_not: str
    opaque: bool


_NOT_YET: dict[type[nn.Module], str] = {
    nn.PixelShuffle: "a convolution's store does not shuffle pixels yet: PixelShuffle runs after it"
}


class _Part(NamedTuple):
    """A module as planning sees it; ``role`` is empty where ``problem`` says why it takes no part."""

    role: str
    ndim: int
    problem: str
    training: bool = False
    attributes: tuple[Any, ...] = ()
    tensors: tuple[Tensor | None, ...] = ()
    activation: Callable[..., Activation] | None = None


def plan_modules(modules: Sequence[nn.Module], reading: Reading | None = None) -> tuple[FusedStep | Unfused, ...]:
    """Fused steps and single modules, in order, for modules that run one after the other.

    ``reading``: what ``read(modules)`` has just returned, to save reading again. A plan holds for as long as `read`
    returns equal facts, and for inputs of a step's dtype and device whose sizes its convolution accepts.
    """
    reading = read(modules) if reading is None else reading
    parts = [_part(m, t) for m, t in zip(reading.modules, reading.tensors, strict=True)]
    out: list[FusedStep | Unfused] = []
    reasons: dict[int, str] = {}  # of modules that the step before them could not take in
    slot = 0
    while slot < len(parts):
        try:
            step = _step(parts, slot, reasons)
        except Refused as refused:
            module = reading.modules[slot]
            opaque = is_patched(module) or not type(module).__module__.startswith("torch.nn.modules.")
            out.append(Unfused(slot, reasons.get(slot, str(refused)), opaque))
            slot += 1
        else:
            out.append(step)
            slot = step.slots[-1] + 1
    return tuple(out)


def _part(module: nn.Module, tensors: tuple[Tensor | None, ...]) -> _Part:
    cls = type(module)
    kind = KINDS.get(cls)
    if kind is None:
        known = [c.__name__ for c in cls.__mro__[1:] if c in KINDS]
        if known:
            return _Part("", 0, f"a subclass of {known[0]} (or parametrized): it may compute anything")
        return _Part("", 0, _NOT_YET.get(cls, f"{cls.__name__} is no part of a fused step"))
    d = module.__dict__
    if any(d.get(name) for name in HOOKS):
        return _Part("", 0, "it has hooks")
    if "forward" in d or cls.forward is not kind.forward:
        return _Part("", 0, "its forward has been replaced")
    if not SHADOWS.isdisjoint(d):
        return _Part("", 0, f"the instance itself holds {', '.join(sorted(SHADOWS & d.keys()))}")
    try:
        training, *attributes = kind.look(d)[len(HOOKS) :]
        if kind.tensors is not None:
            kind.tensors(d)
    except KeyError as missing:
        return _Part("", 0, f"it has no {missing}")
    return _Part(kind.role, kind.ndim, "", training, tuple(attributes), tensors, kind.activation)


def _is_identity(part: _Part, ndim: int) -> bool:
    """Whether the module returns its (ndim + 2)-dimensional input as it is: Identity, or a dropout in eval mode."""
    return part.role == "identity" or (part.role == "dropout" and part.ndim in (0, ndim) and not part.training)


def _following(parts: list[_Part], slot: int, ndim: int) -> int | None:
    """The next slot after ``slot`` that computes something."""
    return next((k for k in range(slot + 1, len(parts)) if not _is_identity(parts[k], ndim)), None)


def _step(parts: list[_Part], slot: int, reasons: dict[int, str]) -> FusedStep:
    """The step that starts at ``slot``, as long as it gets. `Refused` where none starts there."""
    part = parts[slot]
    if part.problem:
        raise Refused(part.problem)
    if part.role == "transposed":
        conv, base = slot, _transposed(part)
    elif part.role == "upsample":
        conv, base = _upsampled(parts, slot)
    elif part.role == "conv" or part.role.startswith("pad"):
        conv, pad = _padded(parts, slot, part.ndim)
        base = _plain(parts[conv], pad)
    else:
        raise Refused("no convolution ahead of it that takes it in")
    weight, channels, ndim = _tensor(parts[conv].tensors[0]), base.spec.out_channels, parts[conv].ndim

    last, eps, in_place = conv, 0.0, True
    norm = _following(parts, last, ndim)
    if norm is not None and parts[norm].role == "norm":
        try:
            eps = _norm_eps(parts[norm], ndim, channels, weight)
            last, in_place = norm, False
        except Refused as refused:
            reasons[norm] = str(refused)
    if last != norm:
        norm = None

    slope = None
    k = _following(parts, last, ndim)
    if k is not None and parts[k].role == "activation":
        try:
            activation = _activation(parts[k], channels, weight)
            base, last = replace(base, activation=activation), k
            slope = k if parts[k].tensors else None
            # hardtanh and prelu allocate like their input; the others ask TensorIterator, which may choose anew.
            in_place = in_place and (parts[k].attributes[:1] == (True,) or activation.name in ("hardtanh", "prelu"))
        except Refused as refused:
            reasons[k] = str(refused)
    while last + 1 < len(parts) and _is_identity(parts[last + 1], ndim):
        last += 1
    return FusedStep(
        slots=tuple(range(slot, last + 1)),
        step=base,
        ndim=ndim,
        dtype=weight.dtype,
        device=weight.device,
        conv=conv,
        norm=norm,
        eps=eps,
        slope=slope,
        weight_channels_last=is_channels_last(weight if ndim == 2 else weight.unsqueeze(2)),
        in_place=in_place,
    )


def _tensor(t: Tensor | None) -> Tensor:
    """A plain dense tensor: no subclass may be looked through."""
    if type(t) not in (nn.Parameter, Tensor) or t.layout is not torch.strided:  # type: ignore[union-attr]
        raise Refused(f"it holds a {type(t).__name__} where a dense tensor is needed")
    return t  # type: ignore[return-value]


def _vector(t: Tensor | None, length: int, dtypes: tuple[torch.dtype, ...], weight: Tensor) -> None:
    """Check a vector that goes with ``weight``; None is one that is left out."""
    if t is None:
        return
    if _tensor(t).shape != (length,):
        raise Refused(f"a vector of shape {tuple(t.shape)} does not fit {length} channels")
    if t.dtype not in dtypes or t.device != weight.device:
        raise Refused(f"a {t.dtype} vector on {t.device} does not go with a {weight.dtype} weight on {weight.device}")


def _pair(name: str, value: object, n: int) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) != n or not all(type(v) is int for v in value):
        raise Refused(f"{name}={value!r} is not a tuple of {n} ints")
    return value


def _conv_weight(part: _Part) -> Tensor:
    weight = _tensor(part.tensors[0])
    if part.training:
        raise Refused("it is in training mode")
    if weight.dtype not in DTYPES or weight.device.type not in DEVICES:
        raise Refused(f"{weight.dtype} on {weight.device} has no fused path")
    if weight.dim() != part.ndim + 2 or weight.numel() == 0:
        raise Refused(f"a weight of shape {tuple(weight.shape)} is no {part.ndim}-D convolution's")
    return weight


def _transposed(part: _Part) -> Step:
    stride, padding, output_padding, dilation, groups, padding_mode = part.attributes
    weight = _conv_weight(part)
    if padding_mode != "zeros":
        raise Refused(f"padding_mode={padding_mode!r}: a transposed convolution has zeros only")
    if type(groups) is not int:
        raise Refused(f"groups={groups!r} is not an int")
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
        raise Refused(str(error)) from None
    _vector(part.tensors[1], spec.out_channels, (weight.dtype,), weight)
    return Step(spec.as_2d())


def _plain_padding(part: _Part, kernel: Sequence[int]) -> tuple[int, ...]:
    """What a Conv1d or Conv2d pads on both sides of each dimension."""
    stride, padding, _, dilation, _, mode, reversed_padding = part.attributes
    n = part.ndim
    if mode != "zeros":  # by this list, last dimension first; the convolution itself then pads nothing
        before, after = tuple(reversed_padding[::2])[::-1], tuple(reversed_padding[1::2])[::-1]
        if before != after:
            raise Refused(f"it pads unevenly: {reversed_padding}")
        padding = before
    elif padding == "same":
        reach = [d * (k - 1) for d, k in zip(_pair("dilation", dilation, n), kernel, strict=True)]
        if any(r % 2 for r in reach):
            raise Refused(f"padding='same' with kernel_size={tuple(kernel)} pads unevenly")
        if _pair("stride", stride, n) != (1,) * n:
            raise Refused(f"padding='same' with stride={stride}")
        padding = tuple(r // 2 for r in reach)
    elif padding == "valid":
        padding = (0,) * n
    padding = _pair("padding", padding, n)
    if min(padding) < 0:
        raise Refused(f"negative padding {padding}")
    return padding


class _Pad(NamedTuple):
    """A module that pads both sides of each dimension alike."""

    mode: str
    padding: tuple[int, ...]


def _padded(parts: list[_Part], slot: int | None, ndim: int) -> tuple[int, _Pad | None]:
    """The slot of a Conv1d or Conv2d at ``slot`` or after a padding module there, and what that pads."""
    pad = None
    if slot is not None and parts[slot].role.startswith("pad") and parts[slot].ndim == ndim:
        (padding,) = parts[slot].attributes
        before, after = _pair("padding", padding, 2 * ndim)[::2][::-1], padding[1::2][::-1]
        if before != after or min(before) < 0:
            raise Refused(f"padding={padding}: only the same on both sides goes into a convolution")
        pad = _Pad(parts[slot].role.removeprefix("pad "), before)
        slot = _following(parts, slot, ndim)
    if slot is None or parts[slot].role != "conv" or parts[slot].ndim != ndim:
        raise Refused(f"no Conv{ndim}d follows that could take it in")
    return slot, pad


def _all_padding(part: _Part, kernel: Sequence[int], pad: _Pad | None) -> _Pad:
    """What is padded ahead of the convolution by it and the module before it."""
    mode, padding = part.attributes[5], _plain_padding(part, kernel)
    if pad is None or not any(pad.padding):
        return _Pad(mode, padding)
    if any(padding) and (mode, pad.mode) != ("zeros", "zeros"):
        raise Refused("the convolution that follows pads, too")
    return _Pad(pad.mode, tuple(p + q for p, q in zip(padding, pad.padding, strict=True)))


def _plain(part: _Part, pad: _Pad | None) -> Step:
    """The step of a Conv1d or Conv2d without an upsampling ahead of it."""
    stride, _, _, dilation, groups, _, _ = part.attributes
    weight, n = _conv_weight(part), part.ndim
    c_out, per_group, *kernel = weight.shape
    if type(groups) is not int:
        raise Refused(f"groups={groups!r} is not an int")
    if _pair("stride", stride, n) != (1,) * n and weight.device.type != "cpu":
        raise Refused(f"stride={stride}: there is no kernel for strided convolutions yet")
    mode, padding = _all_padding(part, kernel, pad)
    try:
        step = plain_step(
            ConvSpec.make(
                per_group * groups,
                c_out,
                kernel,
                stride,
                padding,
                groups=groups,
                dilation=_pair("dilation", dilation, n),
                transposed=False,
                ndim=n,
            ).as_2d(),
            mode,
        )
    except ValueError as error:
        raise Refused(str(error)) from None
    _vector(part.tensors[1], c_out, (weight.dtype,), weight)
    return step


def _upsampled(parts: list[_Part], slot: int) -> tuple[int, Step]:
    """The convolution's slot and the step of an Upsample at ``slot`` with the Conv2d that follows it."""
    size, scale_factor, mode, align_corners = parts[slot].attributes
    if mode not in ("nearest", "nearest-exact") or align_corners is not None:
        raise Refused(f"mode={mode!r} is not nearest")
    if size is not None:
        raise Refused("it goes to a fixed size, not by a scale_factor")
    factors = scale_factor if type(scale_factor) is tuple else (scale_factor, scale_factor)
    if len(factors) != 2 or not all(f in range(1, MAX_SCALE + 1) for f in factors):
        raise Refused(f"scale_factor={scale_factor!r} is not one or two integers from 1 to {MAX_SCALE}")
    conv, pad = _padded(parts, _following(parts, slot, 2), 2)
    part = parts[conv]
    stride, _, _, dilation, groups, _, _ = part.attributes
    weight = _conv_weight(part)
    c_out, per_group, *kernel = weight.shape
    if type(groups) is not int:
        raise Refused(f"groups={groups!r} is not an int")
    if _pair("stride", stride, 2) != (1, 1) or _pair("dilation", dilation, 2) != (1, 1):
        raise Refused(f"the Conv2d that follows has stride={stride} and dilation={dilation}: 1 and 1 are collapsed")
    if not all(k % 2 for k in kernel):
        raise Refused(f"the Conv2d that follows has kernel_size={tuple(kernel)}: odd ones are collapsed")
    mode, padding = _all_padding(part, kernel, pad)
    upsample = Upsample((int(factors[0]), int(factors[1])), padding, mode)  # type: ignore[arg-type]
    try:
        step = upsample_step(per_group * groups, c_out, (kernel[0], kernel[1]), upsample, groups)
    except ValueError as error:
        raise Refused(str(error)) from None
    _vector(part.tensors[1], c_out, (weight.dtype,), weight)
    return conv, step


def _norm_eps(part: _Part, ndim: int, channels: int, weight: Tensor) -> float:
    """eps of a BatchNorm that can be taken in."""
    (eps,) = part.attributes
    if part.training:
        raise Refused("it is in training mode")
    if part.ndim != ndim:
        raise Refused(f"BatchNorm{part.ndim}d after a {ndim}-D convolution")
    mean, var, scale, shift = part.tensors
    if mean is None or var is None:
        raise Refused("it has no running statistics: it normalises by the batch, in eval mode too")
    if type(eps) not in (int, float):
        raise Refused(f"eps={eps!r} is not a number")
    for t in part.tensors:
        _vector(t, channels, (mean.dtype,), weight)
    if mean.dtype not in (weight.dtype, torch.float32):
        raise Refused(f"{mean.dtype} statistics after a {weight.dtype} convolution")
    return float(eps)


def _activation(part: _Part, channels: int, weight: Tensor) -> Activation:
    if part.tensors:
        (slope,) = part.tensors
        length = 1 if slope is not None and slope.numel() == 1 else channels
        _vector(_tensor(slope), length, (weight.dtype,), weight)
    assert part.activation is not None
    return part.activation(*part.attributes)
