"""Which backend runs a step, and why not another one."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["BACKENDS", "backend", "current_backend", "resolve_backend"]

BACKENDS = ("auto", "triton", "aten")
_current: contextvars.ContextVar[str] = contextvars.ContextVar("cnnfast_backend", default="auto")


def _check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}")
    return name


def current_backend() -> str:
    """The backend that calls without an explicit one use."""
    return _current.get()


def resolve_backend(name: str | None) -> str:
    """``name``, or the context's choice where it is None. ValueError for an unknown one."""
    return _current.get() if name is None else _check_backend(name)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the backend of every cnnfast call inside the ``with`` block (per thread and task).

    ``"auto"`` takes Triton for CUDA tensors where it applies and PyTorch's operators otherwise (oneDNN's packed ones on a
    CPU where they are faster); ``"triton"`` launches the Triton kernel or raises with the reason; ``"aten"`` never uses Triton.
    """
    token = _current.set(_check_backend(name))
    try:
        yield
    finally:
        _current.reset(token)
