"""A kernel on trial: a launch on noise, held against float64; and whose fault an exception is.

Operands have the caller's shapes, layouts and dtypes, and are filled with noise from a fixed seed: the first batch of a
program may be zeros or hold NaNs, and would prove nothing. The first and the last image are compared.
"""

from __future__ import annotations

import math
import subprocess
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .block import Operands, Step
from .tolerance import expected, verdict

__all__ = ["Undecided", "fill_with_noise", "is_kernel_failure", "noise", "problem", "said"]


class Undecided(Exception):
    """The trial could not be held, for want of memory or of a reference; the message says why."""


def problem(start: Callable[[Operands], torch.Tensor], step: Step, o: Operands, tf32: bool) -> str | None:
    """What is wrong with ``start``, which launches ``step`` on operands like ``o``; None where its results are right.

    Raises `Undecided`, and whatever ``start`` raises but for a GPU that is out of memory.
    """
    try:
        o = noise(step, o)
        y = start(o)
        ends = slice(None, None, max(1, y.shape[0] - 1))  # the first and the last image
        residual = None if o.residual is None else o.residual[ends]
        o, y = o._replace(x=o.x[ends], residual=residual), y[ends]
    except torch.OutOfMemoryError as error:
        raise Undecided(said(error)) from error
    try:
        with torch.no_grad(), torch.autocast(o.x.device.type, enabled=False):
            return verdict(y, *expected(step, o, tf32))
    except RuntimeError as error:  # of PyTorch's operators in float64: out of memory, or not implemented
        raise Undecided(said(error)) from error


_PERIOD = 65521  # a prime: repeats of the noise fall on no row, channel or image twice


def noise(step: Step, o: Operands) -> Operands:
    """Operands like ``o`` (shapes, layouts, dtypes) with `fill_with_noise`'s contents."""
    like: dict[str, Any] = {name: torch.empty_like(t) for name, t in o._asdict().items() if isinstance(t, torch.Tensor)}
    o = o._replace(**like)
    fill_with_noise(step, o)
    return o


def fill_with_noise(step: Step, o: Operands) -> None:
    """Fill dense operands with normal noise, the same in every run; weights such that results have about unit
    variance."""
    base = torch.randn(_PERIOD, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    s = step.spec
    taps = max(1, math.prod(o.weight.shape[2:]) // math.prod(s.stride if s.transposed else (1, 1)))
    gain = (s.in_channels // s.groups * taps) ** -0.5
    for i, (name, t) in enumerate(o._asdict().items()):
        if not isinstance(t, torch.Tensor):
            continue
        values = base.roll(7919 * i)
        if name == "weight":
            values = values * gain
        elif name == "var":
            values = values.abs() + 0.1
        flat = t.as_strided((t.numel(),), (1,))
        period = t.new_empty(_PERIOD).copy_(values)
        whole = flat.numel() // _PERIOD * _PERIOD
        flat[:whole].view(-1, _PERIOD).copy_(period)
        flat[whole:].copy_(period[: flat.numel() - whole])


# --- whose failure it is ----------------------------------------------------------------------------------------------


def is_kernel_failure(error: BaseException) -> bool:
    """Whether Triton's compiler, its driver or the tools it calls refused a kernel: not a user's mistake, and not a
    GPU that is out of memory at the moment."""
    from triton.errors import TritonError

    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return False
    if isinstance(error, TritonError):
        return True
    # Compiler passes, the CUDA driver and a missing C compiler raise plain exceptions, out of triton's own modules.
    plain = (RuntimeError, OSError, ImportError, ValueError, subprocess.CalledProcessError)
    return isinstance(error, plain) and any(name.startswith("triton.") for name in _modules(error.__traceback__))


def _modules(traceback: types.TracebackType | None) -> Iterable[str]:
    while traceback is not None:
        yield str(traceback.tb_frame.f_globals.get("__name__", ""))
        traceback = traceback.tb_next


def said(error: BaseException) -> str:
    """The kind of an exception and what it says, in a line: that of the first cause."""
    from triton.compiler.errors import CompilationError

    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, CompilationError):  # the source comes first
        lines = lines[-1:]
    return f"{type(error).__name__}: {'; '.join(lines)[:300]}"
