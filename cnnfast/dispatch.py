"""Which backend runs a step, and why not another one."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

from .norms import NormCall
from .step import Operands

__all__ = ["BACKENDS", "backend", "check_backend", "is_batched", "needs_gradient", "resolve_backend", "watched"]


BACKENDS = ("auto", "triton", "aten")
_current: contextvars.ContextVar[str] = contextvars.ContextVar("cnnfast_backend", default="auto")


def check_backend(name: str | None) -> None:
    """ValueError for a backend that does not exist (None stands for the context's)."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")


def resolve_backend(name: str | None) -> str:
    """``name``, or the context's choice where it is None. ValueError for an unknown one."""
    if name is None:
        return _current.get()
    check_backend(name)
    return name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every cnnfast call inside the ``with`` block (per thread and task).

    ``"auto"`` takes Triton for CUDA tensors where it applies and PyTorch's operators otherwise (oneDNN's packed ones on
    a CPU where they are faster); ``"triton"`` launches the Triton kernel or raises with the reason; ``"aten"`` never
    uses Triton.
    ValueError for another name.
    """
    check_backend(name)
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def is_batched(grad: torch.Tensor) -> bool:
    """Whether a backward is of a batch of gradients at once (``is_grads_batched=True``, `torch.func.vmap`): PyTorch's
    operators know how, and such a tensor has no memory of its own."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.peek_interpreter_stack() is not None


def needs_gradient(o: Operands | NormCall) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in o)


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
