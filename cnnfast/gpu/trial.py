"""A kernel on trial: a launch on noise, held against float64; and whose fault an exception is.

Operands have the caller's shapes, layouts and dtypes, and are filled with noise from a fixed seed: the first batch of a
program may be zeros or hold NaNs, and would prove nothing. What is compared is bounded: the first and the last image of
a fused convolution (`problem`), the part that a caller names of any other kernel (`problem_of`).
"""

from __future__ import annotations

import math
import subprocess
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..norms import Partials
from ..step import Operands, Step
from ..tolerance import expected, round_tf32, verdict

__all__ = ["KernelError", "Undecided", "fill_with_noise", "is_kernel_failure", "noise", "problem", "problem_of", "said"]


class Undecided(Exception):
    """The trial could not be held, for want of memory or of a reference; the message says why."""


class KernelError(RuntimeError):
    """The device reported an error of the kernel on trial."""


@contextmanager
def _plain() -> Iterator[None]:
    """Neither gradients nor autocast nor cuDNN's search for the fastest algorithm, in which the caller may be: in
    float64 that search takes seconds."""
    cudnn = torch.backends.cudnn
    searches = cudnn.benchmark
    cudnn.benchmark = False
    try:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        cudnn.benchmark = searches


@contextmanager
def _launched() -> Iterator[None]:
    """What the device says of launches inside the block is waited for, and theirs: KernelError. An error of earlier
    work, the caller's, comes as it is."""
    _wait()
    try:
        yield
        _wait()
    except torch.AcceleratorError as error:
        if "out of memory" in str(error):
            raise Undecided(said(error)) from error
        raise KernelError("the device reported an error") from error


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Whatever else a launch raises is the kernel's."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Undecided(said(error)) from error


@contextmanager
def _a_reference() -> Iterator[None]:
    """PyTorch's operators in float64 may lack memory, or not be implemented."""
    try:
        yield
    except RuntimeError as error:
        raise Undecided(said(error)) from error


# --- a fused convolution ----------------------------------------------------------------------------------------------


def problem(
    start: Callable[[Operands], tuple[Tensor, Partials | None]], step: Step, o: Operands, tf32: bool
) -> str | None:
    """What is wrong with ``start``, which launches ``step`` on operands like ``o`` and gives its result and perhaps the
    statistics of that; None where both are right.

    Raises `Undecided`, and whatever ``start`` raises but for a GPU that is out of memory.
    """
    with _plain():
        with _enough_memory():
            o = noise(step, o)
            with _launched():
                y, partials = start(o)
            ends = slice(None, None, max(1, y.shape[0] - 1))  # the first and the last image
            residual = None if o.residual is None else o.residual[ends]
            o = o._replace(x=o.x[ends], residual=residual)
        with _a_reference():
            found = verdict(y[ends], *expected(step, o, tf32))
            if found is not None or partials is None:
                return found
            return _statistics_problem(y, partials)


def _statistics_problem(y: Tensor, partials: Partials) -> str | None:
    """What is wrong with ``partials`` as statistics of y (N, C, *size) as it is stored: of all images together, or of
    each."""
    count, mean, m2 = (t.type(torch.float64) for t in partials.each)
    segments = count.shape[0]
    rows = y.shape[0] // segments * y.shape[2:].numel()
    if not bool((count.sum(1) == rows).all()):
        return f"statistics of {count.sum(1).tolist()} values a channel, expected {rows}"
    whole = (count[..., None] * mean).sum(1) / rows
    spread = (m2 + count[..., None] * (mean - whole[:, None]).square()).sum(1)
    wanted, yardstick = (_moments(y, segments, dtype) for dtype in (torch.float64, torch.float32))
    largest = y.abs().max().item(), 0.0  # a mean may be far smaller than what it was rounded with
    for name, got, exact, near, before in zip(
        ("mean", "spread"), (whole, spread), wanted, yardstick, largest, strict=True
    ):
        found = verdict(got.type(torch.float32), exact, near, before)
        if found is not None:
            return f"{name} of the result: {found}"
    return None


def _moments(y: Tensor, segments: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(mean, centred sum of squares), each (segments, C), computed in ``dtype`` one image at a time."""
    rows = y.shape[0] // segments * y.shape[2:].numel()
    mean = y.new_zeros((segments, y.shape[1]), dtype=dtype)
    m2 = torch.zeros_like(mean)
    for n, image in enumerate(y):
        mean[n % segments] += image.type(dtype).flatten(1).sum(1) / rows
    for n, image in enumerate(y):
        m2[n % segments] += (image.type(dtype).flatten(1) - mean[n % segments, :, None]).square().sum(1)
    return mean, m2


# --- any other kernel -------------------------------------------------------------------------------------------------


def problem_of(
    run: Callable[..., Mapping[str, Tensor]],
    reference: Callable[..., Mapping[str, Tensor]],
    like: Mapping[str, Tensor | None],
    *,
    positive: Collection[str] = (),
    tf32: Collection[str] = (),
    adjust: Callable[[Mapping[str, Tensor]], None] | None = None,
    some: Callable[[str, Tensor], Tensor] = lambda name, t: t,
) -> str | None:
    """What is wrong with the results of ``run(**operands)``, which launches kernels; None where all are right.

    ``operands`` are like those of ``like`` (shapes, strides, dtypes; None stays None), filled with standard normal
    noise, those named in ``positive`` with its magnitude plus 0.1; then ``adjust(operands)`` may write to them.
    ``reference(**operands)`` is the same in plain torch, in whatever dtype it is given: it is run in float64 and, as
    the yardstick, in float32 (operands named in ``tf32`` rounded to that). Its results have the names of ``run``'s;
    "before y" may be what y was rounded as on the way (`tolerance.verdict`): an activation's input, or the sum of the
    magnitudes that y is the sum of.
    ``some(name, tensor)`` picks what is compared of an operand or a result: a reference takes four to ten times the
    memory of what it is given.

    Raises `Undecided`, and whatever ``run`` raises but for a GPU that is out of memory.
    """
    with _plain():
        with _enough_memory():
            given = {name: None if t is None else torch.empty_like(t.detach()) for name, t in like.items()}
            base = _base()
            for i, (name, t) in enumerate(given.items()):
                if t is not None:
                    values = base.roll(7919 * i)
                    _fill(t, values.abs() + 0.1 if name in positive else values)
            tensors = {name: t for name, t in given.items() if t is not None}
            if adjust is not None:
                adjust(tensors)
            with _launched():
                results = run(**given)
        with _a_reference():
            few = {name: some(name, t) for name, t in tensors.items()}
            nothing = dict.fromkeys(given.keys() - tensors.keys())
            exact = reference(**{name: t.type(torch.float64) for name, t in few.items()}, **nothing)
            few = {name: round_tf32(t) if name in tf32 else t.type(torch.float32) for name, t in few.items()}
            near = reference(**few, **nothing)
            for name, got in results.items():
                before = exact.get(f"before {name}")
                largest = 0.0 if before is None else before.abs().max().item()
                found = verdict(some(name, got), exact[name], near[name].type(got.dtype), largest)
                if found is not None:
                    return f"{name}: {found}"
    return None


# --- noise ------------------------------------------------------------------------------------------------------------

_PERIOD = 65521  # a prime: repeats of the noise fall on no row, channel or image twice


def noise(step: Step, o: Operands) -> Operands:
    """Operands like ``o`` (shapes, layouts, dtypes) with `fill_with_noise`'s contents."""
    like: dict[str, Any] = {name: torch.empty_like(t) for name, t in o._asdict().items() if isinstance(t, Tensor)}
    o = o._replace(**like)
    fill_with_noise(step, o)
    return o


def fill_with_noise(step: Step, o: Operands) -> None:
    """Fill dense operands with normal noise, the same in every run; weights such that results have about unit
    variance."""
    base = _base()
    s = step.spec
    taps = max(1, math.prod(o.weight.shape[2:]) // math.prod(s.stride if s.transposed else ()))
    gain = (s.in_channels // s.groups * taps) ** -0.5
    for i, (name, t) in enumerate(o._asdict().items()):
        if not isinstance(t, Tensor):
            continue
        values = base.roll(7919 * i)
        if name == "weight":
            values = values * gain
        elif name == "var":
            values = values.abs() + 0.1
        _fill(t, values)


def _base() -> Tensor:
    return torch.randn(_PERIOD, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


def _fill(t: Tensor, values: Tensor) -> None:
    """A dense tensor with these values over and over, in the order of its memory."""
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
    if isinstance(error, (TritonError, KernelError)):
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
