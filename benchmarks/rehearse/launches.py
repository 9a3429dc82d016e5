"""What a case launches on a GPU that is not there: the real `cnnfast.Sequential` on tensors that nobody touches.

The modules, in channels_last as a user who wants speed has them, run with ``backend("triton")`` on a recording driver.
Modules that no fused step takes in are stood for by their output's shape. PyTorch's own operators are counted as they
are called: those inside a fused step (copies, packing of weights), those of eager mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cnnfast
from cnnfast import dispatch
from cnnfast.gpu import conv, conv_choice, conv_wgrad, why_not
from cnnfast.gpu.conv_plan import Plan
from cnnfast.gpu.devices import allocate, tf32_convolutions
from cnnfast.memory_format import format_of
from cnnfast.nn import chain
from cnnfast.nn.fusion import FusedStep, Unfused, plan_modules
from cnnfast.spec import Precision
from cnnfast.step import Operands, Step

from ..cases import Case
from .inspector import Call, recording

__all__ = [
    "CALLED",
    "NUMERICS",
    "Op",
    "Recorder",
    "StepRun",
    "Unrun",
    "counting",
    "eager_ops",
    "inductor_passes",
    "kinds",
    "precision",
]

# name -> (dtype, whether PyTorch lets float32 convolutions use TF32). "fp32x3": by three products of TF32 alone.
NUMERICS: dict[str, tuple[torch.dtype, bool]] = {
    "fp16": (torch.float16, True),
    "bf16": (torch.bfloat16, True),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
    "fp32x3": (torch.float32, False),
}
CALLED = ("fp16", "bf16", "tf32", "fp32")  # what calls take (`conv_choice.KINDS`)


@contextmanager
def kinds(numerics: str) -> Iterator[None]:
    """What is planned inside the block takes float32's products as ``numerics`` says."""
    if numerics in CALLED:
        yield
        return
    remembered = (conv.prepare, conv.choose_plan, conv_wgrad.prepare, conv_wgrad.choose_wgrad_plan)
    for f in remembered:
        f.cache_clear()
    try:
        with mock.patch.object(conv_choice, "KINDS", (True,)):
            yield
    finally:
        for f in remembered:
            f.cache_clear()


@dataclass(frozen=True)
class Op:
    """An operator of PyTorch that reads and writes device memory: one launch at least, one pass."""

    name: str
    read: int  # bytes
    written: int


@dataclass
class StepRun:
    """A fused step of one case, batch, dtype and architecture, and what it launched."""

    step: Step
    modules: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    itemsize: int
    vectors: int  # bytes of the vectors of the epilogue
    weight: int  # bytes of the layer's own weight
    plan: Plan | None = None
    calls: list[Call] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    why_not: str = ""  # why PyTorch's operators run it instead

    @property
    def main(self) -> Call:
        """The launch of the convolution itself."""
        return next(c for c in self.calls if c.job.function == "conv_transpose_kernel")


@dataclass(frozen=True)
class Unrun:
    """A module that is no part of a fused step: PyTorch runs it, in these passes."""

    module: str
    why_not: str
    ops: tuple[Op, ...]


# --- counting operators -----------------------------------------------------------------------------------------------

# Allocations, and a view that its schema does not call one.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}


class counting(TorchDispatchMode):
    """Operators that move data: neither views nor allocations."""

    def __init__(self, into: list[Op]) -> None:
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        view = all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = func._schema.name.split("::")[1]
        if returns and not view and name not in _FREE:
            read = sum(_bytes(t) for t in tree_leaves((args, kwargs or {})))
            self.into.append(Op(name, read, sum(_bytes(t) for t in tree_leaves(out))))
        return out


def _bytes(t: Any) -> int:
    return t.numel() * t.element_size() if isinstance(t, torch.Tensor) else 0


@lru_cache(maxsize=2)  # a generator's own initialisation is slow, even of tensors that are not there
def _made(case: Case) -> nn.Sequential:
    with torch.device("meta"):
        return case.make().eval()


def skeleton(case: Case, dtype: torch.dtype) -> nn.Sequential:
    """The modules on the meta device, in eval mode and channels_last."""
    return cnnfast.channels_last(deepcopy(_made(case)).to(dtype))


def _input(case: Case, batch: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Channels last, which is how a fused step leaves its result inside a chain; in one dimension too."""
    x = torch.empty((batch, *case.input_shape), dtype=dtype, device=device)
    if x.dim() == 3:
        return torch.empty((batch, *case.input_shape[::-1]), dtype=dtype, device=device).transpose(1, 2)
    return torch.empty(x.shape, dtype=dtype, device=device, memory_format=format_of(x.dim(), True))


def _like_a_gpu(y: torch.Tensor, device: str) -> torch.Tensor:
    """Memory of y's shape in the memory format that a GPU gives it where weights are channels_last."""
    fmt = format_of(y.dim(), y.dim() > 3)
    return torch.empty(y.shape, dtype=y.dtype, device=device, memory_format=fmt)


def eager_ops(case: Case, batch: int, dtype: torch.dtype) -> list[Op]:
    """The operators of the plain modules in inference. (On a GPU a convolution's bias is one more launch.)"""
    ops: list[Op] = []
    with torch.no_grad():  # not inference_mode, in which composite operators are not taken apart
        x = _input(case, batch, dtype, "meta")
        for module in skeleton(case, dtype):
            with counting(ops):
                x = module(x)
            x = _like_a_gpu(x, "meta")
    return ops


def inductor_passes(ops: list[Op]) -> int:
    """Launches of `torch.compile` at best: each convolution, and one kernel for all that stands between two of them
    (one more where an InstanceNorm takes the statistics of what is there only then)."""
    passes, pointwise = 0, False
    for op in ops:
        if "convolution" in op.name:
            passes, pointwise = passes + 1, False
        elif not pointwise:
            passes, pointwise = passes + 1, True
    return passes


# --- running the fused path -------------------------------------------------------------------------------------------


class _Stand(nn.Module):
    """In the place of a module that PyTorch runs: a result of its shape and memory format, untouched."""

    def __init__(self, module: nn.Module, why_not: str, into: list[StepRun | Unrun]) -> None:
        super().__init__()
        self.inner, self.why_not, self.into = [module], why_not, into  # in a list: no child of this module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops: list[Op] = []
        meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        with counting(ops):
            y = self.inner[0](meta)
        self.into.append(Unrun(repr(self.inner[0]), self.why_not, tuple(ops)))
        return _like_a_gpu(y, "cpu")


def precision(numerics: str) -> Precision:
    dtype, tf32 = NUMERICS[numerics]
    return Precision(dtype, dtype == torch.float32 and tf32)


class Recorder:
    """A case in one precision, built once; call it with a batch size and an architecture."""

    def __init__(self, case: Case, numerics: str) -> None:
        self.case = case
        self.numerics, (self.dtype, self.tf32) = numerics, NUMERICS[numerics]
        self.found: list[StepRun | Unrun] = []
        self.meta = skeleton(case, self.dtype)
        modules = list(skeleton(case, self.dtype).to_empty(device="cpu"))
        self.steps: list[FusedStep] = []
        for item in plan_modules(modules):
            if isinstance(item, Unfused):
                modules[item.slot] = _Stand(self.meta[item.slot], item.why_not, self.found)
            else:
                self.steps.append(item)
        self.model = cnnfast.Sequential(*modules).eval()
        self.warm = False

    def __call__(self, batch: int, arch: int) -> list[StepRun | Unrun]:
        """The steps and modules of one forward in order, as they are on every call but the first."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(tf32_convolutions(self.tf32))
            stack.enter_context(kinds(self.numerics))
            stack.enter_context(dispatch.backend("triton"))
            calls = stack.enter_context(recording(arch))
            for name, replacement in _hooks(self.found, self.meta, self.steps, calls).items():
                stack.enter_context(mock.patch(name, replacement))
            x = _input(self.case, batch, self.dtype, "cpu")
            for _ in range(1 if self.warm else 2):  # tables that are made once are no part of a call
                self.found.clear(), calls.clear()
                self.model(x)
        self.warm = True
        return list(self.found)


def _hooks(
    found: list[StepRun | Unrun], meta: nn.Sequential, steps: list[FusedStep], calls: list[Call]
) -> dict[str, Any]:
    """Wrappers of `run_step`, by which every step goes then, of the launch and of the kernels' launcher: they write to
    ``found``."""
    run_step, run, start = chain.run_step, conv.run, conv._launch

    def step_seen(step: Step, o: Operands, *, channels_last: bool | None = None, **rest: Any) -> torch.Tensor:
        shape = (o.x.shape[0], step.spec.out_channels, *step.output_size(tuple(o.x.shape[2:])))
        vectors = sum(_bytes(v) for v in (o.bias, o.mean, o.var, o.scale, o.shift, o.slope))
        fused = steps[sum(isinstance(f, StepRun) for f in found)]
        modules = [meta[k] for k in fused.slots]
        name = " + ".join(type(m).__name__ for m in modules)
        reason = why_not.why_not(step, o)
        seen = StepRun(step, name, tuple(o.x.shape), shape, o.x.element_size(), vectors, _bytes(o.weight))
        found.append(seen)
        if reason is not None:
            seen.why_not = reason
            x = torch.empty(o.x.shape, dtype=o.x.dtype, device="meta")
            with counting(seen.ops):
                nn.Sequential(*modules)(x.squeeze(2) if fused.ndim == 1 else x)
            return allocate(o.x, shape, bool(channels_last))
        before = len(calls)
        y = run_step(step, o, channels_last=channels_last, **rest)
        seen.calls.extend(calls[before:])
        return y

    def run_seen(*args: Any, **kwargs: Any) -> torch.Tensor:
        step = found[-1]
        assert isinstance(step, StepRun)
        with counting(step.ops):
            return run(*args, **kwargs)

    def started(*args: Any, **kwargs: Any) -> None:
        step = found[-1]
        assert isinstance(step, StepRun)
        step.plan = next(a.plan for a in (*args, *kwargs.values()) if hasattr(a, "plan"))
        start(*args, **kwargs)

    return {
        "cnnfast.nn.chain.run_step": step_seen,
        "cnnfast.gpu.backend._shorter": lambda *step: None,
        "cnnfast.gpu.conv.run": run_seen,
        "cnnfast.gpu.conv._launch": started,
    }
