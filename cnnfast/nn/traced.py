"""`cnnfast.Sequential` under `torch.compile`: the same fused steps, each an operator in the traced graph.

Dynamo traces `forward`, and calls `_plan` once, at tracing, for what never changes without a guard noticing: `_tensors`
compares, in traced code, every attribute and tensor that the plan depends on with what the plan was made from, so that
each has a guard and a change compiles anew. Hooks are the exception, Dynamo's own: `torch.compile` does not see hooks
that are added to a compiled module's children.

Which steps are operators: on a CPU, in inference, transposed convolutions and upsamplings, whose packed form beats what
Inductor makes of the modules; on a GPU, whatever has a kernel, in training too. The rest is traced as it stands, for
Inductor to fuse, on a CPU steps of three dimensions too. `torch.export` always gets PyTorch's own operators: an
exported program does not need cnnfast.

The plan ties traced code to one Sequential, as Dynamo guards its identity: of models that are compiled each by itself,
more than ``torch._dynamo.config.recompile_limit`` (8) need a higher limit. Beyond it they run as in eager mode, fused.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import Activation
from ..dispatch import autocast_dtype, on_cpu
from ..gpu.why_not import cuda_why_not, spec_why_not, triton_why_not
from ..memory_format import has_both, is_channels_last, new_strides, to_format
from ..norms import Norm
from ..ops import traced
from ..spec import ConvSpec
from ..step import Step, Upsample, convolution_of
from .chain import _operands, _with_running
from .computed import HOOKS
from .eager_layout import eager_layout
from .fusion import FusedStep, Unfused, plan_modules
from .fusion_norm import NormRule
from .modules import KINDS, read

__all__ = ["forward"]

Containers = tuple[Callable[..., Any], ...]

# Whether Dynamo lets traced code hand a module to a function whose result is constant; a number it always does.
_TAKES_MODULES = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


# --- the plan, made at tracing ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """A module as it was at tracing: its attributes, and its tensors by name with their (shape, strides, dtype), None
    for one that it does not have; in the order of `modules.Reading`."""

    path: tuple[str, ...]
    cls: type
    attributes: tuple[tuple[str, object], ...]
    tensors: tuple[str, ...]
    described: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None, ...]


@dataclass(frozen=True)
class Traced:
    """What to run: steps that follow each other directly in one tuple. ``containers``: each Sequential that was
    flattened, and the names of its children; ``kernel``: of each slot, whether a step there is for the operator."""

    containers: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    leaves: tuple[Leaf, ...]
    items: tuple[tuple[FusedStep, ...] | Unfused, ...]
    kernel: tuple[bool, ...]


class _Names(dict[str, Any]):
    """Stands for a module's ``__dict__``, and records which names are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __missing__(self, name: str) -> Any:
        if name in ("_parameters", "_buffers"):
            return self
        self.asked.append(name)
        return ()


def _names(look: Callable[[dict[str, Any]], object] | None) -> tuple[str, ...]:
    """The attributes that ``look``, of a `modules.Kind`, reads."""
    record = _Names()
    if look is not None:
        look(record)
    return tuple(n for n in record.asked if n not in HOOKS)


def _described(t: Tensor | None) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None:
    return None if t is None else (tuple(t.shape), tuple(t.stride()), t.dtype)


def _leaf(path: tuple[str, ...], m: nn.Module) -> Leaf:
    kind = KINDS.get(type(m))
    if kind is None or any(m.__dict__.get(name) for name in HOOKS):
        return Leaf(path, type(m), (), (), ())
    attributes = tuple((n, m.__dict__[n]) for n in _names(kind.look) if n in m.__dict__)
    tensors = _names(kind.tensors)
    if kind.tensors is not None:  # what a kind never has stands first, as None
        tensors = ("",) * (len(kind.tensors(m.__dict__)) - len(tensors)) + tensors
    return Leaf(path, type(m), attributes, tensors, tuple(_described(getattr(m, n) if n else None) for n in tensors))


def _walk(
    m: nn.Module, path: tuple[str, ...], leaves: list[nn.Module], paths: list[tuple[str, ...]], found: list[Any]
) -> None:
    """The path of each of ``leaves``, the modules that `read` found, and of the containers between."""
    found.append((path, tuple(m._modules)))
    for name, child in m._modules.items():
        if len(paths) < len(leaves) and child is leaves[len(paths)]:
            paths.append((*path, name))
        elif isinstance(child, nn.Sequential):
            _walk(child, (*path, name), leaves, paths, found)


def _worth(s: FusedStep, backend: str | None) -> bool:
    """Whether the step is for the operator; see the head of this file."""
    cuda = s.device.index is not None  # of a CPU there is one, without a number
    if backend == "aten" or s.ndim == 3 and not (cuda or backend == "triton"):
        return False
    if cuda or backend == "triton":
        rule = s.rule
        # Eager mode's own graph break (a momentum that is read from the device), and collectives, stay theirs.
        plain = rule is None or not rule.synchronised and not (rule.counts and rule.momentum is None)
        why_not = triton_why_not() or (cuda_why_not(s.device.index or 0) if cuda else None)
        return plain and (why_not is None and spec_why_not(s.step.spec) is None or backend == "triton")
    return traced.pays_on_cpu(s.step)


@torch._dynamo.assume_constant_result  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
def _plan(seq: nn.Sequential, forwards: Containers, backend: str | None) -> Traced:
    reading = read(seq._modules.values(), forwards, computed=False)
    paths: list[tuple[str, ...]] = []
    containers: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    _walk(seq, (), reading.modules, paths, containers)
    items: list[tuple[FusedStep, ...] | Unfused] = []
    kernel = [False] * len(paths)
    for item in plan_modules(reading.modules, reading):
        before = items[-1] if items else None
        if isinstance(item, Unfused):
            items.append(item)
            continue
        for k in item.slots:
            kernel[k] = _worth(item, backend)
        if isinstance(before, tuple) and _follows(before[-1], item):
            items[-1] = (*before, item)
        else:
            items.append((item,))
    leaves = tuple(_leaf(path, m) for path, m in zip(paths, reading.modules, strict=True))
    return Traced(tuple(containers), leaves, tuple(items), tuple(kernel))


@torch._dynamo.assume_constant_result  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
def _plan_by_id(number: int, forwards: Containers, backend: str | None) -> Traced | None:
    """`_plan` of the module whose `id` that is; None where the garbage collector does not see it (`gc.freeze`)."""
    seq = next((o for o in gc.get_objects() if id(o) == number), None)
    return _plan(seq, forwards, backend) if isinstance(seq, nn.Sequential) else None


def _follows(last: FusedStep, step: FusedStep) -> bool:
    return (last.ndim, last.dtype, last.device) == (step.ndim, step.dtype, step.device)


# --- traced code ------------------------------------------------------------------------------------------------------


def _at(seq: nn.Module, path: tuple[str, ...]) -> nn.Module:
    m: Any = seq
    for name in path:
        m = m._modules[name]
    return m


def _same_children(seq: nn.Module, plan: Traced) -> bool:
    return all(tuple(_at(seq, path)._modules.keys()) == names for path, names in plan.containers)


def _tensors(m: nn.Module, leaf: Leaf) -> tuple[Tensor | None, ...] | None:
    """The module's tensors, or None where it is not as it was planned."""
    if type(m) is not leaf.cls or not callable(m.forward):  # looked at for the guard: none of its own has been set
        return None
    for name, value in leaf.attributes:
        if not (getattr(m, name) == value):  # before torch 2.13 Dynamo knows ``==`` of more than ``!=``
            return None
    found = []
    for name, described in zip(leaf.tensors, leaf.described, strict=True):
        t = getattr(m, name) if name else None
        if t is None or described is None:
            same = t is described
        else:
            shape, strides, dtype = described
            same = tuple(t.shape) == shape and tuple(t.stride()) == strides and t.dtype is dtype
        if not same:
            return None
        found.append(t)
    return tuple(found)


def _rebuilt(f: FusedStep) -> FusedStep:
    """The same step, made in traced code: Dynamo reads the attributes of a constant object, but calls no methods."""
    s, a, u, r = f.step.spec, f.step.activation, f.step.upsample, f.rule
    spec = ConvSpec(
        s.transposed, s.in_channels, s.out_channels, s.kernel_size, s.stride, s.padding, s.output_padding, s.dilation,
        s.groups,
    )  # fmt: skip
    upsample = None if u is None else Upsample(u.scale, u.padding, u.mode)
    rule, norm = None, None
    if r is not None:
        norm = Norm(r.norm.kind, r.norm.groups, r.norm.eps)
        rule = NormRule(norm, r.kind, r.dtype, r.contiguous, r.updates, r.counts, r.momentum, r.synchronised)
    step = Step(spec, Activation(a.name, a.params), upsample, f.step.pad, f.step.pad_mode, norm)
    return FusedStep(
        f.slots, step, f.ndim, f.dtype, f.device, f.conv, f.norm, rule, f.slope, f.weight_channels_last, f.in_place,
        f.overwrites,
    )  # fmt: skip


def forward(seq: nn.Sequential, x: Any, forwards: Containers) -> Any:
    """``seq`` on x, as Dynamo is to trace it. ``forwards``: those of Sequential classes that only run their children,
    which are planned together with ours."""
    if not torch.compiler.is_dynamo_compiling() or traced.exporting() or traced.transformed():
        return nn.Sequential.forward(seq, x)
    if type(seq).__iter__ is not nn.Sequential.__iter__ or not isinstance(x, Tensor):
        return nn.Sequential.forward(seq, x)
    backend = traced.chosen_backend()
    plan = _plan(seq, forwards, backend) if _TAKES_MODULES else _plan_by_id(id(seq), forwards, backend)
    if plan is None or not _same_children(seq, plan):
        return nn.Sequential.forward(seq, x)
    for item in plan.items:
        if isinstance(item, Unfused):
            x = _at(seq, plan.leaves[item.slot].path)(x)
        else:
            x = _run(seq, item, plan, x, backend)
    return x


def _modules(seq: nn.Sequential, slots: range, plan: Traced, x: Any) -> Any:
    for k in slots:
        x = _at(seq, plan.leaves[k].path)(x)
    return x


def _run(seq: nn.Sequential, steps: tuple[FusedStep, ...], plan: Traced, x: Any, backend: str | None) -> Any:
    """Steps that follow each other, by operators where that is worth it."""
    slots = range(steps[0].slots[0], steps[-1].slots[-1] + 1)
    tensors: list[Any] = [()] * (slots.stop)
    gradient = False
    for k in slots:
        own = _tensors(_at(seq, plan.leaves[k].path), plan.leaves[k])
        if own is None:
            return _modules(seq, slots, plan, x)
        tensors[k] = own
        for t in own:
            gradient = gradient or t is not None and t.requires_grad
    gradient = torch.is_grad_enabled() and (gradient or x.requires_grad)
    kernels = not on_cpu(x) or backend == "triton"
    if not any(plan.kernel[s.slots[0]] for s in steps) or not _takes(steps[0], x, gradient, kernels):
        return _modules(seq, slots, plan, x)
    low = autocast_dtype(x)
    ndim = steps[0].ndim
    channels_last = is_channels_last(x if ndim > 1 else x.contiguous().unsqueeze(2))
    for i, planned in enumerate(steps):
        s = _rebuilt(planned)
        own_slots = range(s.slots[0], s.slots[-1] + 1)
        size = x.shape[2:] if ndim > 1 else (1, *x.shape[2:])
        if x.shape[1] != s.step.spec.in_channels or not _reaches(s.step, size):
            return _modules(seq, range(s.slots[0], slots.stop), plan, x)  # which raise PyTorch's own errors
        out = s.step.output_size(size)
        channels_last = eager_layout(s, channels_last, size, out)
        last = i == len(steps) - 1
        measured = s.rule is not None and s.rule.norm.measured
        if plan.kernel[s.slots[0]] and measured and not kernels:
            # Inductor fuses a norm of the input's own statistics with the activation behind it.
            assert s.norm is not None and s.rule is not None
            bare = replace(s, step=convolution_of(s.step), rule=None, norm=None, slope=None)
            x = _step(seq, bare, plan, x, tensors, s.rule.kind in ("batch", "sync"), low)
            x = _modules(seq, range(s.conv + 1, s.slots[-1] + 1), plan, x)
            if last and ndim > 1:
                x = to_format(x, channels_last)
        elif plan.kernel[s.slots[0]] and not (low is not None and s.rule is not None and s.rule.kind == "group"):
            x = _step(seq, s, plan, x, tensors, channels_last or not last, low)
        else:
            x = _modules(seq, own_slots, plan, x)
            if last and ndim > 1:
                x = to_format(x, channels_last)
        if last and has_both(s.step.spec.out_channels, out):
            strides = new_strides((x.shape[0], s.step.spec.out_channels, *out), channels_last)
            x = x.as_strided(x.shape, strides if ndim > 1 else (*strides[:2], strides[3]))
    return x


def _takes(s: FusedStep, x: Tensor, gradient: bool, kernels: bool) -> bool:
    """Whether x is for operators at all."""
    if x.device != s.device or x.dim() != s.ndim + 2 or x.numel() == 0 or not x.is_floating_point():
        return False
    if not kernels:
        return not gradient and x.dtype == s.dtype and not torch.is_autocast_enabled("cpu")
    return x.dtype == s.dtype or autocast_dtype(x) is not None and x.dtype != torch.float64


def _reaches(step: Step, size: Any) -> bool:
    """Whether the step has an output for this size."""
    try:
        step.output_size(size)
    except ValueError:
        return False
    return True


def _step(
    seq: nn.Sequential,
    s: FusedStep,
    plan: Traced,
    x: Tensor,
    tensors: list[Any],
    channels_last: bool,
    low: torch.dtype | None,
) -> Tensor:
    """One step by its operator, (N, C, L) as (N, C, 1, L)."""
    measured = s.rule is not None and s.rule.norm.measured
    o = _operands(s, x if s.ndim > 1 else x.unsqueeze(2), tensors, measured)
    if measured:
        assert s.norm is not None
        o = _with_running(s, o, _at(seq, plan.leaves[s.norm].path), tensors[s.norm])
        if o.batches is not None:
            o.batches.add_(1)
    # The Parameter itself, of three dimensions too: what is packed for it is kept by its identity.
    o = o._replace(weight=tensors[s.conv][0])
    if low is not None:
        o = o._replace(x=o.x.to(low), weight=o.weight.to(low), bias=None if o.bias is None else o.bias.to(low))
        o = o._replace(slope=None if o.slope is None else o.slope.to(low))
    y = traced.traced_step(s.step, o, channels_last, None)
    return y if s.ndim > 1 else y.squeeze(2)
