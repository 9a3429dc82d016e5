"""A chain of fused steps: channels-last inside, its last store in the memory format of eager mode, with gradients and
under autocast as PyTorch's modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import cpu, cpu_training
from .block import Operands
from .convolutions import DTYPES
from .dispatch import resolve_backend
from .fusion import FusedStep
from .gradients import enter, plain, squeezed
from .memory_format import has_both, is_channels_last, new_strides
from .modules import Reading
from .ops import core
from .ops.normalise import normalise
from .spec import Activation

__all__ = ["Bound", "Chain", "Run"]


# --- the memory format of eager mode ----------------------------------------------------------------------------------


def _eager_layout(step: FusedStep, channels_last: bool, size: Sequence[int], out: Sequence[int]) -> bool:
    """Whether eager mode's result suggests channels_last, for an input that does (``channels_last``) or doesn't.

    Convolutions follow input or weight, the rest mostly keeps what it gets; but a tensor that is contiguous as well
    comes out of a BatchNorm or an activation as contiguous, InstanceNorm makes its input contiguous, and so does
    GroupNorm on a GPU. In one dimension there is no channels_last: only a weight whose strides happen to say so has an
    effect, and a norm ends it. (Checked against torch 2.13 on a CPU.)
    """
    spec, rule = step.step.spec, step.rule
    if rule is not None and (rule.norm.kind == "instance" or rule.norm.kind == "group" and step.device.type != "cpu"):
        return False
    if step.ndim == 1:  # ATen makes 3-D inputs contiguous first, and so does padding
        channels_last = channels_last and has_both(spec.in_channels, size) and not any(step.step.pad)
        if step.norm is not None:
            return False
    channels_last = channels_last or step.weight_channels_last
    if has_both(spec.out_channels, out):
        return channels_last and step.in_place and not (spec.out_channels == 1 and all(n == 1 for n in out))
    return channels_last


def _one_value(step: FusedStep, shape: torch.Size) -> bool:
    """Whether the step's norm has one value of ``shape`` for each of its statistics: PyTorch's modules raise then."""
    assert step.rule is not None
    n, c, *size = shape
    norm, pixels = step.rule.norm, math.prod(size)
    values = {"batch": n * pixels, "instance": pixels, "group": n * c // norm.groups * pixels}[norm.kind]
    return values == 1 and not step.rule.synchronised


def _pads(module: nn.Module) -> bool:
    """Whether it pads by an operator whose gradient has its input's memory format, whatever the weight's."""
    return getattr(module, "padding_mode", "zeros") != "zeros" or isinstance(module, _PADS)


_PADS = (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d)


def _no_gain_in_training(step: FusedStep, channels_last: bool) -> str | None:
    """Why a step that needs a gradient gains nothing on a CPU: a plain convolution is ATen's in any case. (An
    InstanceNorm module would convert to NCHW, a SyncBatchNorm's wants a GPU. And of an input that is
    ``channels_last``, a module's weight that is contiguous as well would get a gradient in other strides.)"""
    spec, rule = step.step.spec, step.rule
    better = rule is not None and (rule.synchronised or rule.norm.kind == "instance" and step.ndim == 2)
    both = channels_last and has_both(spec.in_channels // spec.groups, spec.kernel_size)
    if spec.transposed or step.step.upsample is not None or better or both and not step.weight_channels_last:
        return None
    return "in training, PyTorch's modules of a plain convolution are as fast on a CPU"


# --- how a chain runs on an input -------------------------------------------------------------------------------------

_MAX_BINDINGS = 64
# PyTorch's derivatives of these read the input, unless in place: the result may be overwritten by whoever gets it.
_READ_INPUT = ("leaky_relu", "elu", "hardtanh")


class Run(NamedTuple):
    """How a step runs on inputs of one shape: whether its result is ``channels_last``; ``as_modules``: why its modules
    run as they stand, or None. ``wide``: what follows the convolution is computed, and returned, in float32 (autocast's
    rule). ``apart``: the activation runs by itself. ``simple``: none of these, no autocast, and no statistics taken."""

    channels_last: bool
    as_modules: str | None = None
    wide: bool = False
    apart: bool = False
    simple: bool = False


class Bound(NamedTuple):
    """How a chain runs: its steps; ``low``: autocast's dtype, or None; ``convert``: the input becomes channels-last;
    ``of_gradient``: the input's gradient is channels-last in eager mode."""

    runs: tuple[Run, ...]
    low: torch.dtype | None = None
    convert: bool = False
    of_gradient: bool = False


@dataclass(frozen=True)
class Chain:
    """Consecutive fused steps of one dimensionality, dtype and device."""

    steps: tuple[FusedStep, ...]
    # Of inputs seen: (shape, strides, dtype, device, backend, autocast's dtype, gradient) -> see `bind`.
    _bindings: dict[object, Bound | str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def slots(self) -> range:
        return range(self.steps[0].slots[0], self.steps[-1].slots[-1] + 1)

    def takes(self, step: FusedStep) -> bool:
        """Whether ``step``, which follows, belongs to the same chain."""
        last = self.steps[-1]
        return (last.ndim, last.dtype, last.device) == (step.ndim, step.dtype, step.device)

    def bind(self, x: Any, reading: Reading) -> Bound | str:
        """How each step runs on x, or why all modules run as they stand."""
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return f"the input is a {type(x).__name__}, not a plain tensor"
        gradient, low = False, None
        if torch.is_grad_enabled():
            tensors = (t for k in self.slots for t in reading.tensors[k])
            gradient = x.requires_grad or any(t is not None and t.requires_grad for t in tensors)
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
        backend = resolve_backend(None)
        key = (x.shape, x.stride(), x.dtype, x.device, backend, low, gradient)
        bound = self._bindings.get(key)
        if bound is None:
            if len(self._bindings) >= _MAX_BINDINGS:
                self._bindings.clear()
            bound = self._bindings[key] = self._bind(x, reading, backend, low, gradient)
        return bound

    def _bind(self, x: Tensor, reading: Reading, backend: str, low: torch.dtype | None, gradient: bool) -> Bound | str:
        first = self.steps[0]
        if low is not None:
            dtypes = {s.rule.dtype for s in self.steps if s.rule is not None} - {None, torch.float32, low}
            if low not in DTYPES or dtypes:
                return f"{[*dtypes, low][0]} under autocast to {low}"
        if x.device != first.device or x.dtype != first.dtype and (low is None or x.dtype not in DTYPES):
            return f"the input is {x.dtype} on {x.device}, the weight {first.dtype} on {first.device}"
        if x.dim() != first.ndim + 2 or x.numel() == 0:
            return f"an input of shape {tuple(x.shape)} is no batch for a {first.ndim}-D convolution"
        shapes = [torch.Size((*x.shape[:2], *(1,) * (2 - first.ndim), *x.shape[2:]))]
        eager = [is_channels_last(x if first.ndim == 2 else x.contiguous().unsqueeze(2))]
        for s in self.steps:
            n, channels, *size = shapes[-1]
            if channels != s.step.spec.in_channels:
                return f"{channels} channels meet a convolution of {s.step.spec.in_channels}"
            try:
                out = s.step.output_size(size)
            except ValueError as error:
                return str(error)
            eager.append(_eager_layout(s, eager[-1], size, out))
            shapes.append(torch.Size((n, s.step.spec.out_channels, *out)))
            if s.measured and _one_value(s, shapes[-1]):
                return "a norm would measure one value"
        inside = [True] * (len(self.steps) - 1) + eager[-1:]
        why: list[str | None] = [None] * len(self.steps)
        convert = False
        if x.device.type == "cpu" and backend != "triton":
            if not any(eager) and not self._saves_conversions([shape.numel() for shape in shapes], gradient):
                inside = eager[1:]
            # `run` converts the input where the first result is channels-last.
            reads = [inside[0] or eager[0], *inside]
            for i, s in enumerate(self.steps):
                how = reads[i : i + 2]
                if s.measured and any(how) and not eager[i + 1] and s.rule.norm.kind != "instance":  # type: ignore[union-attr]
                    continue  # ATen's statistics are less exact in channels-last, cpu_training's are not
                why[i] = _no_gain_in_training(s, how[0]) if gradient else self._no_gain(s, shapes[i], how, reading, low)
            if why[0] is not None and None not in why and (inside == eager[1:] or gradient and first.ndim == 1):
                return why[0]
            if first.ndim == 1:  # modules would convert on the way in and out
                why = [None] * len(why)
            # Whatever runs the first step: its result is likely to be larger.
            convert = inside[0] or gradient and why[0] is None
        runs = [Run(*how) for how in zip(inside, why, strict=True)]
        if why[-1] is None:
            runs[-1] = self._last(runs[-1], x.device.type, backend, low, gradient)
        runs = [
            run._replace(simple=low is None and not (run.as_modules or s.measured or run.wide or run.apart))
            for s, run in zip(self.steps, runs, strict=True)
        ]
        padded = any(_pads(reading.modules[k]) for k in first.slots)
        of_gradient = eager[0] or first.weight_channels_last and not padded
        return Bound(tuple(runs), low, convert, of_gradient)

    def _last(self, run: Run, device: str, backend: str, low: torch.dtype | None, gradient: bool) -> Run:
        """The last step's run, with what its user can tell from eager mode."""
        s = self.steps[-1]
        by_kernel = device != "cpu" or backend == "triton"  # with a norm, its backward reads the norm's input alone
        read_input = s.step.activation.name in _READ_INPUT and not s.overwrites
        group = s.rule is not None and s.rule.norm.kind == "group"
        return run._replace(
            apart=gradient and read_input and not (by_kernel and s.rule is not None),
            # On CUDA, autocast runs group_norm in float32 and PReLU in its own dtype.
            wide=low is not None and device == "cuda" and group and s.step.activation.name != "prelu",
        )

    @staticmethod
    def _no_gain(
        s: FusedStep, shape: torch.Size, channels_last: list[bool], reading: Reading, low: torch.dtype | None
    ) -> str | None:
        """Why a plain convolution's step gains nothing on a CPU; ``channels_last``: of its input and its result."""
        if s.rule is not None and s.rule.synchronised:  # its module wants a GPU
            return None
        slopes = 0 if s.slope is None else reading.tensors[s.slope][0].numel()  # type: ignore[union-attr]
        step, norm, nchw = s.step, s.rule is not None, not any(channels_last)
        if s.measured:  # what follows the convolution takes its passes anyway
            step, norm, slopes = replace(step, activation=Activation()), False, 0
        return cpu.why_slower_plain(step, shape, low or s.dtype, norm=norm, slopes=slopes, nchw=nchw)

    def _saves_conversions(self, elements: list[int], gradient: bool) -> bool:
        """Whether channels-last inside is worth the conversions at both ends: oneDNN, called from ATen, brings the
        input and the result of every convolution into a layout of its own, unless the kernel is 1x1. (Transposed
        convolutions and upsamplings were measured to gain.)"""
        saved = 0
        for s, before, after in zip(self.steps, elements[:-1], elements[1:], strict=True):
            if s.step.spec.transposed or s.step.upsample is not None:
                return True
            if not gradient and s.measured and s.rule.norm.kind == "instance":  # type: ignore[union-attr]
                continue  # its module returns NCHW
            saved += before + after if max(s.step.spec.kernel_size) > 1 else 0
        ends = elements[0] + elements[-1]
        return saved > ends or saved == ends and not gradient

    # --- running it ---------------------------------------------------------------------------------------------------

    def run(self, x: Any, reading: Reading) -> Any:
        """The chain's modules on x, fused where that can be."""
        bound = self.bind(x, reading)
        if isinstance(bound, str):
            for k in self.slots:
                x = reading.modules[k](x)
            return x
        ndim = self.steps[0].ndim
        x = _enter(x, ndim, bound)
        for s, run in zip(self.steps, bound.runs, strict=True):
            if run.simple:  # the path that counts microseconds
                x = core.run_step(s.step, _operands(s, x, reading.tensors), channels_last=run.channels_last)
                continue
            if run.as_modules is None:
                x = _fused(s, x, run, reading, bound.low)
                continue
            for k in s.slots:
                x = reading.modules[k](x)
            x = cpu.convert(x, x.dtype, run.channels_last)
        if has_both(x.shape[1], x.shape[2:]):
            last = bound.runs[-1].channels_last
            if not x.requires_grad:
                x = plain(x, last)
            elif x.stride() != new_strides(x.shape, last):  # a copy: a backward may have saved x
                x = x.clone(memory_format=torch.channels_last if last else torch.contiguous_format)
        return squeezed(x, 2) if ndim == 1 else x


def _enter(x: Tensor, ndim: int, bound: Bound) -> Tensor:
    """x as the first step takes it: (N, C, L) as (N, C, 1, L), in autocast's dtype."""
    if ndim == 1:
        x = x.unsqueeze(2)
    dtype = bound.low or x.dtype
    if torch.is_grad_enabled() and x.requires_grad:
        same = not bound.convert and x.dtype == dtype and is_channels_last(x) == bound.of_gradient
        if same and not has_both(x.shape[1], x.shape[2:]):
            return x
        return enter(x, dtype, True if bound.convert else None, bound.of_gradient)
    if not bound.convert:
        return x if x.dtype == dtype else x.to(dtype)
    if x.dtype == dtype:  # the cheaper call, on a path that counts microseconds
        return x.contiguous(memory_format=torch.channels_last)
    return x.to(dtype, memory_format=torch.channels_last)


def _fused(s: FusedStep, x: Tensor, run: Run, reading: Reading, low: torch.dtype | None) -> Tensor:
    o = _operands(s, x, reading.tensors)
    call = s.rule.call(reading.modules[s.norm], reading.tensors[s.norm]) if s.measured else None  # type: ignore[index, union-attr]
    if low is None:
        return _step(s, o, call, run)
    # Not through autocast's cache of weights: casts are of the present values, and gradients add up in float32.
    bias, slope = (None if t is None else t.to(low) for t in (o.bias, o.slope))
    o = o._replace(bias=bias, slope=slope)
    if not _packs(s, o, call, run):
        o = o._replace(weight=o.weight.to(low))
    with torch._C._DisableAutocast():  # operands are in their dtypes, and what runs inside chooses its own
        return _step(s, o, call, run)


def _packs(s: FusedStep, o: Operands, call: Any, run: Run) -> bool:
    """Whether the step runs with a packed weight, which is made of the Parameter as it is."""
    if o.x.device.type != "cpu" or run.apart or run.wide or resolve_backend(None) == "triton":
        return False
    if call is not None:
        return cpu_training.packs(s.step, o, call)
    return not core.needs_gradient(o) and cpu.why_not(s.step, o, run.channels_last) is None


def _step(s: FusedStep, o: Operands, call: Any, run: Run) -> Tensor:
    """The step, with what follows the convolution or its norm apart where ``run`` says so."""
    if not (run.wide or run.apart):
        return core.run_step(s.step, o, channels_last=run.channels_last, norm=call)
    bare = replace(s.step, activation=Activation())
    if run.wide:
        y = core.run_step(bare, o._replace(slope=None), channels_last=True).float()
        activation = Activation() if run.apart else s.step.activation
        y = normalise(y, call, None, activation, None, channels_last=run.channels_last, backend=None)
        return s.step.activation(y) if run.apart else y
    return s.step.activation(core.run_step(bare, o, channels_last=run.channels_last, norm=call))


def _operands(s: FusedStep, x: Tensor, tensors: Sequence[tuple[Any, ...]]) -> Operands:
    weight, bias = tensors[s.conv]
    slope = None if s.slope is None else tensors[s.slope][0]
    if s.ndim == 1:  # (C_in, C_out/g, k) as (C_in, C_out/g, 1, k)
        weight = weight.unsqueeze(2)
    if s.norm is None or s.measured:
        return Operands(x, weight, bias, slope=slope)
    mean, var, scale, shift = tensors[s.norm]
    return Operands(x, weight, bias, mean, var, s.eps, scale, shift, None, slope)
