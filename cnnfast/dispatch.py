"""Which backend runs a step: the context's choice, and the backends to ask."""

from __future__ import annotations

import contextvars
import ctypes
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib import import_module
from typing import NamedTuple, Protocol

import torch
from torch.autograd import forward_ad

from .spec import ConvSpec
from .step import Operands, Step

__all__ = [
    "Arrangement",
    "BACKENDS",
    "Backend",
    "Planned",
    "WATCHED",
    "autocast_dtype",
    "backend",
    "by_kernels",
    "by_loops",
    "channels_last_inside",
    "check_backend",
    "choose",
    "gradient_channels_last",
    "is_batched",
    "needs_gradient",
    "on_cpu",
    "refusal",
    "resolve_backend",
    "watched",
]


BACKENDS = ("auto", "triton", "aten")
WATCHED = "a tensor subclass, transform, tracer, dispatch mode or forward-mode AD is active"
_current: contextvars.ContextVar[str | None] = contextvars.ContextVar("cnnfast_backend", default=None)
_KEY = "cnnfast_backend"  # of what autograd takes along to its threads: (the choice, the thread that made it)
_NONE: tuple[str | None, int] = (None, 0)


def check_backend(name: str | None) -> None:
    """ValueError for a backend that does not exist (None stands for the context's)."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")


def resolve_backend(name: str | None) -> str:
    """``name``, or the context's choice where it is None. ValueError for an unknown one."""
    if name is None:
        return _current.get() or _of_backward() or "auto"
    check_backend(name)
    return name


def _of_backward() -> str | None:
    """In a thread of autograd's, which knows no context variable: the choice where backward was called."""
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0 or not torch._C._is_key_in_tls(_KEY):
        return None
    name, thread = torch._C._get_obj_in_tls(_KEY)
    return name if thread != threading.get_ident() else None  # else of another task of this thread


@cache
def _steals() -> bool:
    """Whether this torch takes over the reference to what it stashes, as 2.11 does, instead of one of its own."""
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls(f"{_KEY}_probe", probe)
    stolen = sys.getrefcount(probe) == before
    if stolen:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    return stolen


def _stash(choice: tuple[str | None, int]) -> None:
    if _steals():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(choice))
    torch._C._stash_obj_in_tls(_KEY, choice)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every cnnfast call inside the ``with`` block (per thread and task), and of what backwards
    that are called inside it run in autograd's threads, as `torch.utils.checkpoint` does. (A checkpointed forward whose
    backward is called outside is computed again by that place's choice: ``context_fn`` of PyTorch's function is for
    such.)

    ``"auto"`` takes Triton for CUDA tensors where it applies and PyTorch's operators otherwise (oneDNN's packed ones on
    a CPU where they are faster); ``"triton"`` launches the Triton kernel or raises with the reason; ``"aten"`` never
    uses Triton.
    ValueError for another name.
    """
    check_backend(name)
    token = _current.set(name)
    before = torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else _NONE
    _stash((name, threading.get_ident()))
    try:
        yield
    finally:
        _stash(before)
        _current.reset(token)


def refusal(reason: str) -> RuntimeError:
    """What an explicit ``backend="triton"`` raises where it cannot run."""
    return RuntimeError(f'backend="triton" cannot run this: {reason}')


# --- what a backend is ------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """A step of a chain, as a backend arranges it. ``slopes``: elements of PReLU's weight; ``instance_norm``: that is
    its norm's module, in either mode; ``synchronised``: statistics are of all processes, as PyTorch's module takes them
    on a GPU only; ``bias``: its convolution has one."""

    step: Step
    ndim: int
    dtype: torch.dtype
    slopes: int
    instance_norm: bool
    synchronised: bool
    weight_channels_last: bool
    bias: bool


Ready = Callable[[Operands], "torch.Tensor | None"]


class Arrangement(NamedTuple):
    """How a chain of steps runs: whether each result is channels-last; why the modules of a step run as they stand, or
    None; whether the input is brought to channels-last. ``ready``: for each step, or for none, a shorter way than
    to ask the backend anew, for operands of these shapes, or None; it gives None where that has to be asked after
    all. ``tuned``: for each step, or for none, the method that `cnnfast.tune` found, or None."""

    channels_last: tuple[bool, ...]
    as_modules: tuple[str | None, ...]
    convert: bool = False
    ready: tuple[Ready | None, ...] = ()
    tuned: tuple[str | None, ...] = ()


class Backend(Protocol):
    """`cnnfast.gpu.backend` and `cnnfast.cpu.backend`: modules. PyTorch's operators come after them, always."""

    def why_not(self, step: Step, o: Operands, *, channels_last: bool, training: bool, required: bool) -> str | None:
        """Why `run` should not take these operands, or None. ``training``: with gradients, or with statistics of what
        the convolution gives. ``required``: an explicit ``backend="triton"``, which takes what is right, if slow."""

    def run(
        self, step: Step, o: Operands, *, channels_last: bool, training: bool, required: bool
    ) -> torch.Tensor | None:
        """The step on operands that nobody watches: x (N, C, H, W) -> the result in x's dtype and the memory format
        asked for, differentiable any number of times. The weight may be in a wider dtype than x. None where it turns
        out here that PyTorch's operators must run; RuntimeError then if ``required``."""

    def arrange(
        self, steps: Sequence[Planned], shapes: Sequence[torch.Size], eager: Sequence[bool], *, gradient: bool
    ) -> Arrangement | str:
        """``shapes`` and ``eager`` (whether eager mode's tensor is channels-last) of the input and of each result. A
        string: why all modules run as they stand."""


def channels_last_inside(eager: Sequence[bool]) -> Arrangement:
    """Channels-last but for the last result, which is as eager mode's."""
    steps = len(eager) - 1
    return Arrangement((*(True,) * (steps - 1), eager[-1]), (None,) * steps)


def on_cpu(x: torch.Tensor) -> bool:
    """Whether PyTorch's CPU operators run on x. (``is_cpu`` is not asked: interpreters that stand in for a GPU
    answer for ``device`` alone.)"""
    return x.device.type == "cpu"


def by_kernels(x: torch.Tensor, name: str | None) -> bool:
    """Whether the GPU's kernels are asked for x under a backend's ``name`` (None: "auto")."""
    return name == "triton" or name != "aten" and x.is_cuda


def by_loops(spec: ConvSpec, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether ATen runs this convolution of a CPU tensor (N, C_in, *size), of three dimensions, by loops of its own
    instead of oneDNN: they are slow, and their result is contiguous, whatever they get. ATen is asked for its choice,
    which depends on the number of threads, too."""
    if spec.ndim != 3:
        return False
    x, weight = (torch.empty(tuple(n), dtype=dtype, device="cpu") for n in (shape, spec.weight_shape))
    s, kinds = spec, torch._C._ConvBackend  # type: ignore[attr-defined]
    found = torch._C._select_conv_backend(
        x, weight, None, s.stride, s.padding, s.dilation, s.transposed, s.output_padding, s.groups, None
    )
    return found in (kinds.Slow3d, kinds.SlowDilated3d, kinds.SlowTranspose3d)


def outsized(groups: int, kernel: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a transposed convolution of a volume (D, H, W) has groups, and a kernel of more positions than that: of a
    channels-last one oneDNN then takes up to 80 times as long as of a contiguous one (docs/facts.md)."""
    return groups > 1 and math.prod(kernel) > math.prod(size)


def gradient_channels_last(
    step: Step, shape: Sequence[int], dtype: torch.dtype, x: bool, weight: bool, *, padded: bool, cpu: bool = True
) -> bool:
    """Whether eager mode's gradient of an input (N, C, *size) of this shape and dtype is channels-last, by whether
    ``x`` and ``weight`` are. ``padded``: by an operator of its own, whose gradient has its input's format. (ATen's
    loops on a CPU and its upsampling of three dimensions give a contiguous one.)"""
    three = step.spec.ndim == 3
    if three and step.upsample is not None:
        return False
    if padded or not (three and (x or weight)):
        return x or weight and not padded
    conv, size = step.unfused(shape[2:])
    return not (cpu and by_loops(conv, (*shape[:2], *size), dtype))


def choose(x: torch.Tensor, name: str) -> tuple[Backend, ...]:
    """The backends to ask for x where the context's choice, or the caller's, is ``name``. The only place where one is
    imported: the GPU's needs Triton."""
    if name == "triton" or name == "auto" and x.is_cuda:
        return _backends(".gpu.backend")
    return _backends(".cpu.backend") if on_cpu(x) else ()


@lru_cache
def _backends(name: str) -> tuple[Backend, ...]:
    return (import_module(name, __package__),)


# --- what takes part in a call ----------------------------------------------------------------------------------------


def is_batched(grad: torch.Tensor) -> bool:
    """Whether a backward is of a batch of gradients at once (``is_grads_batched=True``, `torch.func.vmap`): PyTorch's
    operators know how, and such a tensor has no memory of its own."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.peek_interpreter_stack() is not None


def needs_gradient(o: Operands) -> bool:
    if torch.is_grad_enabled():
        for t in o:
            if isinstance(t, torch.Tensor) and t.requires_grad:
                return True
    return False


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """Autocast's dtype for x's device; None where it is off."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):  # which Dynamo cannot always trace
        return None
    if not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def watched(x: torch.Tensor) -> bool:
    """Whether functorch, a tensor subclass, a tracer, a dispatch mode (fake tensors) or forward-mode differentiation
    takes part.

    They know the rules of PyTorch's own operators; a kernel launched from Python would pass them by.
    """
    return (
        type(x) not in (torch.Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )
