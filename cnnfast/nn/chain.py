"""A chain of fused steps: channels-last inside, its last store in the memory format of eager mode, with gradients and
under autocast as PyTorch's modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import memory_format
from ..activations import Activation
from ..cpu import tuned
from ..dispatch import (
    Planned,
    Ready,
    autocast_dtype,
    by_kernels,
    by_loops,
    channels_last_inside,
    choose,
    gradient_channels_last,
    on_cpu,
    resolve_backend,
)
from ..gradients import enter, plain, squeezed
from ..memory_format import (
    format_of,
    has_both,
    in_format,
    in_rows,
    is_channels_last,
    new_strides,
    suggests_channels_last,
)
from ..ops.run import run_step
from ..reference import run_reference
from ..step import Operands, Step, one_of_equal
from .computed import ComputedWeight
from .eager_layout import eager_layout, one_value, pads, why_no_residual
from .fusion import FusedStep, Unfused
from .fusion_conv import DTYPES
from .modulation import modulated, vectors
from .modules import Reading

__all__ = ["Bound", "Chain", "Run", "chained"]


# --- how a chain runs on an input -------------------------------------------------------------------------------------

_MAX_BINDINGS = 64


class Run(NamedTuple):
    """How a step runs on inputs of one shape: whether its result is ``channels_last``; ``as_modules``: why its modules
    run as they stand, or None. ``wide``: what follows the convolution is computed, and returned, in float32 (autocast's
    rule). ``apart``: the activation runs by itself. ``measured``: a norm takes statistics. ``simple``: none of these,
    and no autocast; ``ready``: what then stands for `run_step`, where there is something; ``tuned``: its method, where
    tuning chose it (`dispatch.Arrangement`)."""

    channels_last: bool
    as_modules: str | None = None
    wide: bool = False
    apart: bool = False
    measured: bool = False
    simple: bool = False
    ready: Ready | None = None
    tuned: str | None = None


class Bound(NamedTuple):
    """How a chain runs: its steps; ``low``: autocast's dtype, or None; ``convert``: the input becomes channels-last;
    ``of_gradient``: the input's gradient is channels-last in eager mode; ``as_is``: an input with a
    gradient needs nothing for that; ``both``: the result's memory fits both formats; ``at_once``: slots whose weights
    are looked at together."""

    runs: tuple[Run, ...]
    low: torch.dtype | None
    convert: bool
    of_gradient: bool
    as_is: bool
    both: bool


@dataclass(frozen=True)
class Chain:
    """Consecutive fused steps of one dimensionality, dtype and device."""

    steps: tuple[FusedStep, ...]
    # Of inputs seen: (shape, strides, dtype, device, backend, autocast's dtype, gradient, ...) -> see `bind`.
    _bindings: dict[object, Bound | str] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def slots(self) -> range:
        return range(self.steps[0].slots[0], self.steps[-1].slots[-1] + 1)

    @property
    def latest(self) -> tuple[tuple[int, ...], bool, Bound | str] | None:
        """The shape (4-D) of the latest kind of input, whether that was contiguous, and how the chain runs on it."""
        if not self._bindings:
            return None
        key, bound = next(reversed(self._bindings.items()))
        (n, c, *size), strides = key[:2]  # type: ignore[index]
        contiguous = not suggests_channels_last((n, c, *size), strides)
        return (n, c, *(1,) * (2 - self.steps[0].ndim), *size), contiguous, bound

    @cached_property
    def _residuals(self) -> tuple[int, ...]:
        return tuple(s.residual for s in self.steps if s.residual is not None)

    def takes(self, step: FusedStep) -> bool:
        """Whether ``step``, which follows, belongs to the same chain."""
        last = self.steps[-1]
        return (last.ndim, last.dtype, last.device) == (step.ndim, step.dtype, step.device)

    def bind(self, x: Any, reading: Reading, last: bool | None = None) -> Bound | str:
        """How each step runs on x, or why all modules run as they stand."""
        if type(x) is not Tensor and type(x) is not nn.Parameter:
            return f"the input is a {type(x).__name__}, not a plain tensor"
        gradient, low = False, None
        if torch.is_grad_enabled():
            gradient = x.requires_grad or _any_gradient(self.slots, reading)
        if torch._C._is_any_autocast_enabled():
            low = autocast_dtype(x)
        backend = resolve_backend(None)
        # Of threads depend tuned methods and, in three dimensions, ATen's choice and with it the memory format.
        methods = 0 if gradient or by_kernels(x, backend) else tuned.generation()
        state = (torch.get_num_threads(), methods) if on_cpu(x) else None
        key: tuple[object, ...] = (x.shape, x.stride(), x.dtype, x.device, backend, low, gradient, last, state)
        for k in self._residuals:
            (r,) = reading.tensors[k]
            key = (*key, None if r is None else (type(r), r.shape, r.stride(), r.dtype, r.device))
        bound = self._bindings.get(key)
        if bound is None:
            if len(self._bindings) >= _MAX_BINDINGS:
                self._bindings.clear()
            bound = self._bindings[key] = self._bind(x, reading, backend, low, gradient, last)
        return bound

    def _bind(
        self, x: Tensor, reading: Reading, backend: str, low: torch.dtype | None, gradient: bool, last: bool | None
    ) -> Bound | str:
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
        eager = [is_channels_last(x.contiguous().unsqueeze(2) if first.ndim == 1 else x)]
        for s in self.steps:
            n, channels, *size = shapes[-1]
            if channels != s.step.spec.in_channels:
                return f"{channels} channels meet a convolution of {s.step.spec.in_channels}"
            try:
                out = s.step.output_size(size)
            except ValueError as error:
                return str(error)
            conv, entering = s.step.unfused(size)
            loops = on_cpu(x) and by_loops(conv, (n, channels, *entering), low or s.dtype)
            eager.append(eager_layout(s, eager[-1], size, out, loops))
            shapes.append(torch.Size((n, s.step.spec.out_channels, *out)))
            if s.modulation.samples not in (1, n):
                return f"a batch of {n} meets scales of {s.modulation.samples} samples"
            if s.residual is not None:
                (added,) = reading.tensors[s.residual]
                if reason := why_no_residual(s, added, x, low or x.dtype, shapes[-1], last):
                    return reason
                if s.leads:  # the result of a sum has its first operand's format
                    eager[-1] = s.ndim > 1 and is_channels_last(added)  # type: ignore[arg-type]
            if s.step.measured and one_value(s, shapes[-1]):
                return "a norm would measure one value"
        if last is not None:
            eager[-1] = last and not has_both(shapes[-1][1], shapes[-1][2:])
            if first.ndim == 1:  # between steps there is channels-last in one dimension, too
                eager[0] = in_format(x, True) and not has_both(shapes[0][1], shapes[0][2:])
        arrangement = channels_last_inside(eager)
        for by in choose(x, backend):
            planned = [self._planned(s, reading, low) for s in self.steps]
            found = by.arrange(planned, shapes, eager, gradient=gradient)
            if isinstance(found, str):
                return found
            arrangement = found
        inside, why, convert, ready, chosen = arrangement
        runs = [Run(*how) for how in zip(inside, why, strict=True)]
        if why[-1] is None:
            runs[-1] = self._last(runs[-1], x, backend, low, gradient)
        for i, (s, run) in enumerate(zip(self.steps, runs, strict=True)):
            simple = low is None and not (run.as_modules or s.step.measured or run.wide or run.apart)
            run = run._replace(measured=s.step.measured, simple=simple, tuned=chosen[i] if chosen else None)
            runs[i] = run._replace(ready=ready[i]) if simple and ready else run
        padded = any(pads(reading.modules[k]) for k in first.slots)
        formats = eager[0], first.weight_channels_last
        of_gradient = gradient_channels_last(
            first.step, shapes[0], low or first.dtype, *formats, padded=padded, cpu=on_cpu(x)
        )
        entered = x.unsqueeze(2) if first.ndim == 1 else x
        as_is = not convert and is_channels_last(entered) == of_gradient and not has_both(shapes[0][1], shapes[0][2:])
        both = has_both(shapes[-1][1], shapes[-1][2:])
        return Bound(tuple(runs), low, convert, of_gradient, as_is, both)

    def _last(self, run: Run, x: Tensor, backend: str, low: torch.dtype | None, gradient: bool) -> Run:
        """The last step's run, with what its user can tell from eager mode."""
        s = self.steps[-1]
        by_kernel = not on_cpu(x) or backend == "triton"  # with a norm, its backward reads the norm's input alone
        row = s.step.activation.row
        read_input = row.reads_input and (row.copies_input or not s.overwrites)  # the result may be overwritten
        group = s.rule is not None and s.rule.kind == "group"
        return run._replace(
            apart=gradient and read_input and not (by_kernel and s.rule is not None),
            # On CUDA, autocast runs group_norm in float32 and PReLU in its own dtype.
            wide=low is not None and not on_cpu(x) and group and s.step.activation.name != "prelu",
        )

    @staticmethod
    def _planned(s: FusedStep, reading: Reading, low: torch.dtype | None) -> Planned:
        slopes = 0 if s.slope is None else reading.tensors[s.slope][0].numel()  # type: ignore[union-attr]
        instance, synchronised = (s.rule.kind == "instance", s.rule.synchronised) if s.rule else (False, False)
        bias = reading.tensors[s.conv][1] is not None
        return Planned(s.step, s.ndim, low or s.dtype, slopes, instance, synchronised, s.weight_channels_last, bias)

    # --- running it ---------------------------------------------------------------------------------------------------

    def run(self, x: Any, reading: Reading, last: bool | None = None) -> Any:
        """The chain's modules on x, fused where that can be. ``last``: whether the result of fused ones is
        channels-last; None: as eager mode's."""
        return self.run_as(self.bind(x, reading, last), x, reading)

    def run_as(self, bound: Bound | str, x: Any, reading: Reading) -> Any:
        """As `bind` says."""
        if isinstance(bound, str):
            for k in self.slots:
                x = reading.modules[k](x)
            return x
        ndim = self.steps[0].ndim
        x = _enter(x, ndim, bound)
        for s, run in zip(self.steps, bound.runs, strict=True):
            if run.simple:  # the path that counts microseconds
                o = _operands(s, x, reading.tensors, False)
                y = None if run.ready is None else run.ready(o)
                x = run_step(s.step, o, channels_last=run.channels_last) if y is None else y
                continue
            if run.as_modules is None:
                x = _fused(s, x, run, reading, bound.low)
                continue
            for k in s.slots:
                x = reading.modules[k](x)
            x = memory_format.convert(x, x.dtype, run.channels_last)
        if bound.both:
            last = bound.runs[-1].channels_last
            if not x.requires_grad:
                x = plain(x, last)
            elif x.stride() != new_strides(x.shape, last):  # a copy: a backward may have saved x
                x = x.clone(memory_format=format_of(x.dim(), last))
        return squeezed(x, 2) if ndim == 1 else x


def _any_gradient(slots: range, reading: Reading) -> bool:
    for k in slots:
        for t in reading.tensors[k]:
            if t is not None and t.requires_grad:
                return True
    return False


def chained(items: Iterable[FusedStep | Unfused]) -> tuple[Chain | Unfused, ...]:
    """What `fusion.plan_parts` gives, with the steps that follow each other as one chain."""
    out: list[Chain | Unfused] = []
    for item in items:
        before = out[-1] if out else None
        if isinstance(item, Unfused):
            out.append(item)
            continue
        item = replace(item, step=one_of_equal(item.step))
        if isinstance(before, Chain) and before.takes(item):
            out[-1] = Chain((*before.steps, item))
        else:
            out.append(Chain((item,)))
    return tuple(out)


def _enter(x: Tensor, ndim: int, bound: Bound) -> Tensor:
    """x as the first step takes it: (N, C, L) as (N, C, 1, L), in autocast's dtype."""
    if ndim == 1:
        x = x.unsqueeze(2)
    dtype = bound.low or x.dtype
    if torch.is_grad_enabled() and x.requires_grad:
        if bound.as_is:
            return x if x.dtype == dtype else x.to(dtype, memory_format=format_of(x.dim(), bound.of_gradient))
        return enter(x, dtype, True if bound.convert else None, bound.of_gradient)
    if not bound.convert:
        return x if x.dtype == dtype else x.to(dtype)
    return memory_format.convert(x, dtype, True)


def _fused(s: FusedStep, x: Tensor, run: Run, reading: Reading, low: torch.dtype | None) -> Tensor:
    o = _operands(s, x, reading.tensors, run.measured)
    if run.measured:
        o = _with_running(s, o, reading.modules[s.norm], reading.tensors[s.norm])  # type: ignore[index]
    of = [reading.tensors[k] for k in s.modulation.slots]
    if of and low is None and s.modulation.samples == 1:
        scale, shift = vectors(
            o.scale, o.shift, [tuple([t if t is None else t.reshape(-1) for t in own]) for own in of]
        )
        o, of = o._replace(scale=scale, shift=shift), []
    if low is None:
        return _step(s.step, o, run, of)
    # Not through autocast's cache of weights: casts are of the present values (the weight's where it is used), and
    # gradients add up in float32.
    bias, slope = o.bias, o.slope
    if bias is not None or slope is not None:
        o = o._replace(bias=None if bias is None else bias.to(low), slope=None if slope is None else slope.to(low))
    with torch._C._DisableAutocast():  # operands are in their dtypes, and what runs inside chooses its own
        return _step(s.step, o, run, of)


def _step(step: Step, o: Operands, run: Run, of: Sequence[tuple[Tensor | None, ...]] = ()) -> Tensor:
    """The step, with what follows the convolution or its norm apart where ``run`` says so. ``of``: what scales and
    shifts the norm's result by itself."""
    last = run.channels_last
    if of:
        y = _step(step.until_norm, o._replace(residual=None, slope=None), run)
        y = modulated(y, of)
        y = run_reference(step.after_norm, Operands(y, residual=o.residual, slope=o.slope))
        return memory_format.convert(y, y.dtype, last)
    if not (run.wide or run.apart):
        return run_step(step, o, channels_last=last)
    activation = step.activation
    if not run.wide:
        return activation(run_step(_without_activation(step), o, channels_last=last))
    u = run_step(step.bare, Operands(o.x, o.weight, o.bias), channels_last=True).float()
    tail = _without_activation(step.tail) if run.apart else step.tail
    y = run_step(tail, o.after(u)._replace(slope=None), channels_last=last)
    return activation(y) if run.apart else y


@lru_cache(maxsize=4096)
def _without_activation(step: Step) -> Step:
    return replace(step, activation=Activation())


def _operands(s: FusedStep, x: Tensor, tensors: Sequence[tuple[Any, ...]], measured: bool) -> Operands:
    """Of a norm that is ``measured``, but for its running statistics (`_with_running`)."""
    weight, bias = tensors[s.conv]
    if type(weight) is ComputedWeight:
        weight = weight()
    slope = None if s.slope is None else tensors[s.slope][0]
    residual = None if s.residual is None else tensors[s.residual][0]
    if s.ndim == 1:  # (C_in, C_out/g, k) as (C_in, C_out/g, 1, k)
        weight = in_rows(weight)
        residual = None if residual is None else residual.unsqueeze(2)
    if s.norm is None:
        return Operands(x, weight, bias, residual=residual, slope=slope)
    mean, var, scale, shift = tensors[s.norm]
    if measured:
        mean = var = None
    return Operands(x, weight, bias, mean, var, scale, shift, residual, slope)


def _with_running(s: FusedStep, o: Operands, module: nn.Module, tensors: tuple[Tensor | None, ...]) -> Operands:
    """What a norm ``module`` that measures moves in this call."""
    rule = s.rule
    assert rule is not None
    mean, var = tensors[:2] if rule.updates else (None, None)
    momentum = rule.momentum
    batches: Any = None
    if rule.counts:
        batches = module.num_batches_tracked
        if batches is None and rule.synchronised:
            raise AssertionError("num_batches_tracked must not be None")  # SyncBatchNorm's own
        if batches is not None and (momentum is None or not _is_counter(batches, o.x)):
            batches.add_(1)
            momentum, batches = 1.0 / float(batches) if momentum is None else momentum, None
    group = _process_group(module) if rule.synchronised else None
    x, weight, bias, _, _, scale, shift, residual, slope, *_ = o
    momentum = 0.0 if momentum is None else momentum
    return Operands(x, weight, bias, mean, var, scale, shift, residual, slope, momentum, group, batches)


def _is_counter(t: Any, x: Tensor) -> bool:
    """Whether a kernel can add one to t."""
    return type(t) is Tensor and t.dtype is torch.int64 and t.numel() == 1 and t.device == x.device


def _process_group(module: nn.Module) -> Any:
    """The processes over which a SyncBatchNorm in training mode takes its statistics; None where it is one."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group: Any = module.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None
