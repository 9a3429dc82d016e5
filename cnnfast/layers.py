"""`Sequential`, the drop-in for `torch.nn.Sequential`, and blocks made of it.

A forward is: look at the modules (`modules.read`), plan anew if anything changed (`fusion.plan_modules`), run.
Consecutive fused steps are a *chain*: channels-last inside, its last store in the memory format of eager mode.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from . import cpu, guard
from .block import Operands
from .dispatch import resolve_backend
from .fusion import FusedStep, Unfused, plan_modules
from .modules import Reading, read
from .ops import core

__all__ = ["ConvTranspose2dNormActivation", "Sequential"]


# --- the memory format of eager mode ----------------------------------------------------------------------------------


def _both_layouts(channels: int, size: Sequence[int]) -> bool:
    """Whether a tensor of these sizes is contiguous and channels-last at once."""
    return channels == 1 or all(n == 1 for n in size)


def _eager_layout(step: FusedStep, channels_last: bool, size: Sequence[int], out: Sequence[int]) -> bool:
    """Whether eager mode's result suggests channels_last, for an input that does (``channels_last``) or doesn't.

    Convolutions follow input or weight, the rest mostly keeps what it gets; but a tensor that is contiguous as well
    comes out of a BatchNorm or an activation as contiguous. In one dimension there is no channels_last: only a weight
    whose strides happen to say so has an effect, and BatchNorm ends it. (Checked against torch 2.13 on a CPU.)
    """
    spec = step.step.spec
    if step.ndim == 1:  # ATen makes 3-D inputs contiguous first, and so does padding
        channels_last = channels_last and _both_layouts(spec.in_channels, size) and not any(step.step.pad)
        if step.norm is not None:
            return False
    channels_last = channels_last or step.weight_channels_last
    if _both_layouts(spec.out_channels, out):
        return channels_last and step.in_place and not (spec.out_channels == 1 and all(n == 1 for n in out))
    return channels_last


# --- chains of fused steps --------------------------------------------------------------------------------------------

_MAX_BINDINGS = 64


class Run(NamedTuple):
    """How a step runs on inputs of one shape: whether its result is ``channels_last``; ``as_modules``: why its modules
    run as they stand, or None."""

    channels_last: bool
    as_modules: str | None = None


@dataclass(frozen=True)
class Chain:
    """Consecutive fused steps of one dimensionality, dtype and device."""

    steps: tuple[FusedStep, ...]
    # Of inputs seen: (shape, strides, dtype, device, backend) -> see `bind`.
    _bindings: dict[object, tuple[Run, ...] | str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def slots(self) -> range:
        return range(self.steps[0].slots[0], self.steps[-1].slots[-1] + 1)

    def takes(self, step: FusedStep) -> bool:
        """Whether ``step``, which follows, belongs to the same chain."""
        last = self.steps[-1]
        return (last.ndim, last.dtype, last.device) == (step.ndim, step.dtype, step.device)

    def bind(self, x: Tensor, reading: Reading) -> tuple[Run, ...] | str:
        """How each step runs on an input like x, or why all modules run as they stand."""
        backend = resolve_backend(None)
        key = (x.shape, x.stride(), x.dtype, x.device, backend)
        bound = self._bindings.get(key)
        if bound is None:
            if len(self._bindings) >= _MAX_BINDINGS:
                self._bindings.clear()
            bound = self._bindings[key] = self._bind(x, reading, backend)
        return bound

    def _bind(self, x: Tensor, reading: Reading, backend: str) -> tuple[Run, ...] | str:
        first = self.steps[0]
        if x.dtype != first.dtype or x.device != first.device:
            return f"the input is {x.dtype} on {x.device}, the weight {first.dtype} on {first.device}"
        if x.dim() != first.ndim + 2 or x.numel() == 0:
            return f"an input of shape {tuple(x.shape)} is no batch for a {first.ndim}-D convolution"
        shapes = [torch.Size((*x.shape[:2], *(1,) * (2 - first.ndim), *x.shape[2:]))]
        eager = [core.is_channels_last(x if first.ndim == 2 else x.contiguous().unsqueeze(2))]
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
        inside = [True] * (len(self.steps) - 1) + eager[-1:]
        if x.device.type != "cpu" or backend == "triton":
            return tuple(Run(channels_last) for channels_last in inside)
        if not any(eager) and not self._saves_conversions([shape.numel() for shape in shapes]):
            inside = eager[1:]
        inside = [inside[0] or eager[0], *inside]  # `run` converts the input where the first result is channels-last
        why = [self._why_as_modules(s, shapes[i], inside[i : i + 2], reading) for i, s in enumerate(self.steps)]
        if why[0] is not None and None not in why and inside[1:] == eager[1:]:
            return why[0]
        if first.ndim == 1:  # modules would convert on the way in and out
            why = [None] * len(why)
        return tuple(Run(*how) for how in zip(inside[1:], why, strict=True))

    @staticmethod
    def _why_as_modules(s: FusedStep, shape: torch.Size, channels_last: list[bool], reading: Reading) -> str | None:
        """Why a plain convolution's step gains nothing on a CPU; ``channels_last``: of its input and its result."""
        slopes = 0 if s.slope is None else reading.tensors[s.slope][0].numel()  # type: ignore[union-attr]
        nchw = not any(channels_last)
        return cpu.why_slower_plain(s.step, shape, s.dtype, norm=s.norm is not None, slopes=slopes, nchw=nchw)

    def _saves_conversions(self, elements: list[int]) -> bool:
        """Whether channels-last inside is worth the conversions at both ends: oneDNN, called from ATen, brings the
        input and the result of every convolution into a layout of its own, unless the kernel is 1x1. (Transposed
        convolutions and upsamplings were measured to gain.)"""
        saved = 0
        for s, before, after in zip(self.steps, elements[:-1], elements[1:], strict=True):
            if s.step.spec.transposed or s.step.upsample is not None:
                return True
            saved += before + after if max(s.step.spec.kernel_size) > 1 else 0
        return saved >= elements[0] + elements[-1]

    def runs(self, x: Any, reading: Reading) -> tuple[Run, ...] | str:
        """What `bind` says, or another reason why the modules run as they stand on x."""
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return f"the input is a {type(x).__name__}, not a plain tensor"
        if torch.is_grad_enabled():
            tensors = (t for k in self.slots for t in reading.tensors[k])
            if x.requires_grad or any(t is not None and t.requires_grad for t in tensors):
                return "a gradient is needed (torch.no_grad or torch.inference_mode switch that off)"
        return self.bind(x, reading)

    def run(self, x: Any, reading: Reading) -> Any:
        """The chain's modules on x, fused where that can be."""
        runs = self.runs(x, reading)
        if isinstance(runs, str):
            for k in self.slots:
                x = reading.modules[k](x)
            return x
        ndim = self.steps[0].ndim
        if ndim == 1:  # (N, C, L) as (N, C, 1, L)
            x = x.unsqueeze(2)
        on_cpu = x.device.type == "cpu"
        if on_cpu and runs[0].channels_last:  # whatever runs the first step: its result is likely to be larger
            x = x.contiguous(memory_format=torch.channels_last)
        for s, (channels_last, as_modules) in zip(self.steps, runs, strict=True):
            if as_modules is None:
                x = core.run_step(s.step, _operands(s, x, reading.tensors), channels_last=channels_last)
                continue
            for k in s.slots:
                x = reading.modules[k](x)
            x = cpu.convert(x, x.dtype, channels_last)
        if _both_layouts(x.shape[1], x.shape[2:]):
            x = x.as_strided(x.shape, _strides(x.shape, runs[-1].channels_last))
        return x.squeeze(2) if ndim == 1 else x


def _operands(s: FusedStep, x: Tensor, tensors: Sequence[tuple[Any, ...]]) -> Operands:
    weight, bias = tensors[s.conv]
    mean, var, scale, shift = (None, None, None, None) if s.norm is None else tensors[s.norm]
    slope = None if s.slope is None else tensors[s.slope][0]
    if s.ndim == 1:  # (C_in, C_out/g, k) as (C_in, C_out/g, 1, k)
        weight = weight.unsqueeze(2)
    return Operands(x, weight, bias, mean, var, s.eps, scale, shift, None, slope)


def _strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Those of a new tensor in this format: where it has both, they tell the next convolution which one to take."""
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


# --- the whole Sequential ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What to run for modules that read as ``facts``."""

    facts: list[object]
    items: tuple[Chain | Unfused, ...]

    @classmethod
    def make(cls, reading: Reading) -> Plan:
        items: list[Chain | Unfused] = []
        for item in plan_modules(reading.modules, reading):
            before = items[-1] if items else None
            if isinstance(item, Unfused):
                items.append(item)
            elif isinstance(before, Chain) and before.takes(item):
                items[-1] = Chain((*before.steps, item))
            else:
                items.append(Chain((item,)))
        return cls(reading.facts, tuple(items))


_MODULE_CALL = nn.Module.__call__


def why_not_now(x: Any) -> str | None:
    """Why nothing at all is fused at this moment with this input, or None."""
    if core.watched(x):
        return "a subclass of Tensor, tracing, compiling, a dispatch mode or a functorch transform is at work"
    if torch._C._len_torch_function_stack() and not _only_device_contexts() and resolve_backend(None) != "triton":
        return 'a torch function mode is active (only an explicit backend="triton" passes it by)'
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._is_any_autocast_enabled():
        return "autocast is active"
    if _has_any_global_hook() or nn.Module.__call__ is not _MODULE_CALL:
        return "hooks on every module are active"
    if x.layout is not torch.strided or x.is_nested or x.is_neg():
        return "the input is not a plain dense tensor"
    return None


def _only_device_contexts() -> bool:
    """``with torch.device(...)`` and `torch.set_default_device` change nothing for a forward."""
    n = torch._C._len_torch_function_stack()
    return all(type(torch._C._get_function_stack_at(k)) is DeviceContext for k in range(n))


class Sequential(nn.Sequential):
    """`torch.nn.Sequential` whose forward runs blocks of modules as one fused step in inference.

    ``ConvTranspose1d/2d``, ``Conv1d/2d`` or ``Upsample(nearest, integer factor) + Conv2d``, with the eval-mode
    BatchNorm and the activation that follow, become one step; every other module runs as it stands, and so does
    everything in training mode, where a gradient is needed, under autocast, tracing or `torch.compile`. Constructor,
    children, ``state_dict``, indexing and hooks are those of `torch.nn.Sequential`, and so are results (within
    rounding), dtypes, memory formats and errors. Modules may be changed or replaced at any time. `explain` says what is
    fused, and why the rest is not.

    A write through ``.data`` to a few elements of a weight may go unseen on a CPU: call `cnnfast.invalidate` after it.
    """

    # Without annotations, which TorchScript would take literally.
    def forward(self, input):  # type: ignore[no-untyped-def]
        if torch.jit.is_scripting():
            for module in self:
                input = module(input)
            return input
        else:
            return _forward(self, input)

    def explain(self, input: Tensor | None = None) -> str:
        """What is fused and why the rest is not, a line for each step or module. ``input`` is not run.

        With an ``input``, also what depends on it (its dtype, a gradient, autocast): for the whole, and for the steps
        that come first. On a GPU, a step whose kernel failed at its first use says so (`cnnfast.guard`).
        """
        reading = read(self._modules.values(), _FORWARDS)
        why = None if input is None else why_not_now(input)
        lines = [] if why is None else [f"nothing is fused now: {why}"]
        for item in Plan.make(reading).items:
            if isinstance(item, Unfused):
                lines.append(f"{item.slot}: {type(reading.modules[item.slot]).__name__} as it stands: {item.why_not}")
                continue
            runs = item.runs(input, reading) if input is not None and item.slots[0] == 0 and why is None else ()
            for i, s in enumerate(item.steps):
                names = " + ".join(type(reading.modules[k]).__name__ for k in s.slots)
                reason = runs if isinstance(runs, str) else runs[i].as_modules if runs else None
                done = "fused" if reason is None else f"could be fused, but: {reason}"
                for failure in guard.failures(s.step, s.dtype, s.device):
                    done += f", but PyTorch's operators run: the kernel {failure}"
                lines.append(f"{s.slots[0]}-{s.slots[-1]}: {names} {done}")
        return "\n".join(lines)

    def __add__(self, other: nn.Sequential) -> Sequential:
        return Sequential(*super().__add__(other))

    def __mul__(self, other: int) -> Sequential:
        return Sequential(*super().__mul__(other))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_plan", None)
        return state


_FORWARDS = (nn.Sequential.forward, Sequential.forward)


def _forward(seq: Sequential, x: Any) -> Any:
    if torch.compiler.is_compiling() or type(seq).__iter__ is not nn.Sequential.__iter__ or why_not_now(x) is not None:
        return nn.Sequential.forward(seq, x)
    reading = read(seq._modules.values(), _FORWARDS)
    plan: Plan | None = seq.__dict__.get("_plan")
    if plan is None or plan.facts != reading.facts:
        # Past Module.__setattr__: the plan is no part of the module's state (see __getstate__).
        plan = seq.__dict__["_plan"] = Plan.make(reading)
    for item in plan.items:
        if isinstance(item, Chain):
            x = item.run(x, reading)
            continue
        x = reading.modules[item.slot](x)
        if item.opaque:  # it may have changed the modules behind it
            reading = read(seq._modules.values(), _FORWARDS)
            if reading.facts != plan.facts:
                for module in reading.modules[item.slot + 1 :]:
                    x = module(x)
                return x
    return x


class ConvTranspose2dNormActivation(Sequential):
    """ConvTranspose2d, normalisation, activation: what torchvision's ``Conv2dNormActivation`` is to Conv2d.

    Args: those of `torch.nn.ConvTranspose2d`, and
        norm_layer: called with ``out_channels``; None for no normalisation.
        activation_layer: called with ``inplace=inplace``, or without arguments where that is None; None for none.
        bias: of the convolution; None means that it has one only where there is no normalisation.

    x (N, in_channels, H, W) -> (N, out_channels, H_out, W_out). The children are ``0``, ``1``, ``2``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 4,
        stride: int | tuple[int, int] = 2,
        padding: int | tuple[int, int] = 1,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        norm_layer: Callable[..., nn.Module] | None = nn.BatchNorm2d,
        activation_layer: Callable[..., nn.Module] | None = nn.ReLU,
        dilation: int | tuple[int, int] = 1,
        inplace: bool | None = None,
        bias: bool | None = None,
    ) -> None:
        bias = norm_layer is None if bias is None else bias
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(
                in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation
            )
        ]
        if norm_layer is not None:
            layers.append(norm_layer(out_channels))
        if activation_layer is not None:
            layers.append(activation_layer() if inplace is None else activation_layer(inplace=inplace))
        super().__init__(*layers)

    def __getitem__(self, idx: int | slice) -> Any:
        # A slice is a Sequential: this class's constructor takes no modules.
        if isinstance(idx, slice):
            return Sequential(OrderedDict(list(self._modules.items())[idx]))
        return super().__getitem__(idx)
