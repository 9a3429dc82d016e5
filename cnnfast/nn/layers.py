"""`Sequential`, the drop-in for `torch.nn.Sequential`, and blocks made of it.

A forward is: look at the modules (`modules.read`), plan anew if anything changed (`fusion.plan_modules`), run.
Consecutive fused steps are a `chain.Chain`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from ..cpu import tuned
from ..cpu.packing import PACKS
from ..dispatch import on_cpu, resolve_backend, watched
from ..gpu import guard
from ..gpu.why_not import launch_why_not, spec_why_not
from .chain import Bound, Chain, chained
from .computed import ComputedWeight, is_parametrized
from .fusion import FusedStep, Unfused, plan_modules
from .modules import Reading, read

__all__ = ["ConvTranspose2dNormActivation", "Sequential"]


# --- the whole Sequential ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """What to run for modules that read as ``facts``."""

    facts: list[object]
    items: tuple[Chain | Unfused, ...]

    @classmethod
    def make(cls, reading: Reading) -> Program:
        return cls(reading.facts, chained(plan_modules(reading.modules, reading)))


_MODULE_CALL = nn.Module.__call__


def why_not_now(x: Any) -> str | None:
    """Why nothing at all is fused at this moment with this input, or None."""
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if watched(x):
        return "a subclass of Tensor, tracing, compiling, a dispatch mode or a functorch transform is at work"
    if reason := why_not_here():
        return reason
    if x.layout is not torch.strided or x.is_nested or x.is_neg():
        return "the input is not a plain dense tensor"
    return None


def why_not_here() -> str | None:
    """Why nothing is fused at this moment, whatever the input: a mode, or hooks on every module."""
    if torch._C._len_torch_function_stack() and not _only_device_contexts() and resolve_backend(None) != "triton":
        return 'a torch function mode is active (only an explicit backend="triton" passes it by)'
    if _has_any_global_hook() or nn.Module.__call__ is not _MODULE_CALL:
        return "hooks on every module are active"
    return None


def plain_now() -> bool:
    """Whether something is at work that is to see the plain model."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or why_not_here() is not None
    )


def _only_device_contexts() -> bool:
    """``with torch.device(...)`` and `torch.set_default_device` change nothing for a forward."""
    n = torch._C._len_torch_function_stack()
    return all(type(torch._C._get_function_stack_at(k)) is DeviceContext for k in range(n))


class Sequential(nn.Sequential):
    """`torch.nn.Sequential` whose forward runs blocks of modules as one fused step, in inference and in training.

    ``ConvTranspose1d/2d/3d``, ``Conv1d/2d/3d`` or ``Upsample(nearest, integer factor) + Conv2d/3d``, with the norm
    (Batch-, SyncBatch-, Instance- or GroupNorm) and the activation that follow, become one step; every other module
    runs as it stands, a dropout in training mode among them, and so does everything under tracing, forward-mode
    differentiation or a functorch transform, and a module that has hooks. Constructor, children, ``state_dict``,
    indexing and hooks are those of `torch.nn.Sequential`, and so are results, gradients of any order and running
    statistics (within rounding), dtypes (of autocast too), memory formats and errors. Modules may be changed, replaced,
    frozen and switched between training and eval mode at any time. `explain` says what is fused, and why the rest is
    not.

    `torch.compile` sees fused steps as operators, on a CPU in inference and on a GPU in training too, and compiles anew
    after a change, but for hooks added to the modules inside (`torch.compile`'s own limit). Where more than 8 instances
    are compiled each by itself, raise ``torch._dynamo.config.recompile_limit``. Exported programs are PyTorch's
    operators alone.

    Three things differ. Under autocast a weight is cast anew on each use, where PyTorch keeps the cast for a whole
    autocast region: what several uses add to a gradient is summed in float32, and a weight that was written to inside
    the region is never served old. A SyncBatchNorm takes CPU tensors. And an infinity or NaN among the inputs of few
    output channels (an RGB head) may reach a few pixels more, which meet it with weights of zero.
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
        that come first. On a GPU, a step whose kernel failed at its first use says so (`cnnfast.gpu.guard`). Where the
        context's backend is "triton", what a step cannot run by, and would raise.
        """
        reading = read(self._modules.values(), _FORWARDS)
        why = None if input is None else why_not_now(input)
        lines = [] if why is None else [f"nothing is fused now: {why}"]
        for item in Program.make(reading).items:
            if isinstance(item, Unfused):
                lines.append(f"{item.slot}: {type(reading.modules[item.slot]).__name__} as it stands: {item.why_not}")
                continue
            known = input is not None and item.slots[0] == 0 and why is None
            bound = item.bind(input, reading) if known else None
            for i, s in enumerate(item.steps):
                names = " + ".join(_name(reading, k) for k in s.slots)
                reason = bound if bound is None or isinstance(bound, str) else bound.runs[i].as_modules
                if reason is None and resolve_backend(None) == "triton":
                    reason = _why_not_triton(s, reading)
                done = "fused" if reason is None else f"could be fused, but: {reason}"
                if reason is None and isinstance(bound, Bound) and bound.runs[i].tuned is not None:
                    done += f" (tuned: {bound.runs[i].tuned})"
                for failure in guard.failures(s.step, s.dtype, s.device):
                    done += f", but PyTorch's operators run: the kernel {failure}"
                lines.append(f"{s.slots[0]}-{s.slots[-1]}: {names} {done}")
        return "\n".join(lines)

    def train(self, mode: bool = True) -> Sequential:
        if mode:  # weights that `cnnfast.freeze` made constant are so no longer
            PACKS.thaw(self.parameters())
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Sequential:  # what to(), half(), cuda(), ... call
        PACKS.thaw(self.parameters())
        self.__dict__.pop("_stands", None)
        return super()._apply(fn, recurse)

    def __add__(self, other: nn.Sequential) -> Sequential:
        return Sequential(*super().__add__(other))

    def __mul__(self, other: int) -> Sequential:
        return Sequential(*super().__mul__(other))

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[assignment,no-untyped-call,unused-ignore]
        for name in ("_plan", "_stands"):
            state.pop(name, None)
        return state


def _name(reading: Reading, slot: int) -> str:
    cls, tensors = type(reading.modules[slot]), reading.tensors[slot]
    if not (tensors and isinstance(tensors[0], ComputedWeight)):
        return cls.__name__
    return f"{(cls.__bases__[0] if is_parametrized(cls) else cls).__name__} of a computed weight"


def _why_not_triton(s: FusedStep, reading: Reading) -> str | None:
    """Why an explicit ``backend="triton"`` would raise, as far as that does not depend on the input."""
    gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for k in s.slots for t in reading.tensors[k]
    )
    # Few channels are no obstacle to training (`run.run_step`).
    reason = None if gradient or s.step.measured else spec_why_not(s.step.spec)
    return reason or launch_why_not(s.device)


_FORWARDS = (nn.Sequential.forward, Sequential.forward)


def _forward(seq: Sequential, x: Any) -> Any:
    if torch.compiler.is_compiling():
        from .traced import forward  # imports torch._dynamo

        return forward(seq, x, _FORWARDS)
    state = seq.__dict__
    stands = state.get("_stands")
    if stands is not None and stands == _kind(state, x):
        return nn.Sequential.forward(seq, x)
    if type(seq).__iter__ is not nn.Sequential.__iter__ or why_not_now(x) is not None:
        return nn.Sequential.forward(seq, x)
    reading = read(seq._modules.values(), _FORWARDS)
    plan: Program | None = state.get("_plan")
    if plan is None or plan.facts != reading.facts:
        # Past Module.__setattr__: the plan is no part of the module's state (see __getstate__).
        plan = state["_plan"] = Program.make(reading)
    for item in plan.items:
        if isinstance(item, Chain):
            bound = item.bind(x, reading)
            if len(plan.items) == 1 and isinstance(bound, str) and on_cpu(x):
                state["_stands"] = _kind(state, x)
            if isinstance(bound, str):  # here: a frame more would hold x until the last of them is done
                for k in item.slots:
                    x = reading.modules[k](x)
            else:
                x = item.run_as(bound, x, reading)
            continue
        x = reading.modules[item.slot](x)
        if item.opaque:  # it may have changed the modules behind it
            reading = read(seq._modules.values(), _FORWARDS)
            if reading.facts != plan.facts:
                for module in reading.modules[item.slot + 1 :]:
                    x = module(x)
                return x
    return x


def _kind(state: dict[str, Any], x: Any) -> tuple[object, ...] | None:
    """What decides, on a CPU, whether all modules run as they stand: where they did for an input of this kind, the next
    ones do without being looked at. (A module that was changed in itself meanwhile might gain by a fused step, until an
    input of another kind comes; what is computed is right in any case.)"""
    if type(x) is not Tensor:
        return None
    modules = tuple(map(id, state["_modules"].values()))
    grad, autocast = torch.is_grad_enabled(), torch._C._is_any_autocast_enabled()
    threads, generation = torch.get_num_threads(), tuned.generation()
    return (
        *modules,
        state["training"],
        x.shape,
        x.stride(),
        x.dtype,
        grad,
        x.requires_grad,
        autocast,
        resolve_backend(None),
        threads,
        generation,
    )


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
