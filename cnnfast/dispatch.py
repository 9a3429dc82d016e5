"""Which backend runs a step, and why not another one."""

from __future__ import annotations

import contextvars
import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch

from .block import Operands, Step
from .devices import Device, device_for
from .plan import lower
from .spec import ConvSpec, Precision

__all__ = [
    "BACKENDS",
    "NO_DEVICE",
    "allocate",
    "backend",
    "check_backend",
    "conv_tf32",
    "cuda_why_not",
    "is_batched",
    "launch_why_not",
    "on_device",
    "precision_of",
    "resolve_backend",
    "spec_why_not",
    "target_device",
    "tf32_convolutions",
    "triton_why_not",
    "why_not",
]

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


# --- why not Triton ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def triton_why_not() -> str | None:
    """Why Triton cannot be used in this environment at all."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


@lru_cache(maxsize=64)
def cuda_why_not(index: int) -> str | None:
    """Why Triton's tensor-core code does not exist for the CUDA device ``index``."""
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"compute capability {major}.{minor} is below 8.0"
    return None


NO_DEVICE = "no CUDA device"


def launch_why_not(device: torch.device) -> str | None:
    """Why an explicit ``backend="triton"`` can launch nothing on tensors of ``device``, or None where it can: on a CUDA
    device, under Triton's interpreter, and on whatever Triton's active driver takes (one that emulates or records says
    so by its ``get_active_torch_device``)."""
    reason = triton_why_not()
    if reason is not None:
        return reason
    if device.type == "cuda":
        return cuda_why_not(device.index or 0)
    from triton import knobs
    from triton.runtime.driver import driver

    if knobs.runtime.interpret:
        return None if device.type == "cpu" else f"the tensors are on {device}, Triton's interpreter runs on the CPU"
    try:
        active = driver.active
    except RuntimeError:  # Triton finds no driver for this machine
        return NO_DEVICE
    taken = active.get_active_torch_device().type
    return None if taken == device.type else f"the tensors are on {device}, Triton launches on {taken}"


MIN_CHANNELS = 16  # of a group: one tensor-core fragment
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LIMIT = 2**31


def spec_why_not(spec: ConvSpec) -> str | None:
    """Why no kernel runs this convolution, whatever its input."""
    s = spec
    channels_in, channels_out = s.in_channels // s.groups, s.out_channels // s.groups
    if channels_in < MIN_CHANNELS:
        return f"{channels_in} input channels per group are fewer than {MIN_CHANNELS}"
    if s.groups > 1 and channels_out < MIN_CHANNELS:
        return f"{channels_out} output channels per group are fewer than {MIN_CHANNELS} (groups={s.groups})"
    if s.groups > 65535:
        return f"groups={s.groups} exceeds the grid limit of 65535"
    return None


@lru_cache(maxsize=4096)
def _step_why_not(
    step: Step, batch: int, input_size: tuple[int, int], dtype: torch.dtype, few_channels: bool
) -> str | None:
    s = step.spec
    if dtype not in _DTYPES:
        return f"dtype {dtype} is not one of {', '.join(str(d) for d in _DTYPES)}"
    reason = spec_why_not(s)
    if reason is not None and not few_channels:
        return reason
    padded = [n + 2 * p for n, p in zip(input_size, step.pad, strict=True)]
    out = s.output_size(padded)
    for what, channels, size in (("input", s.in_channels, padded), ("output", s.out_channels, out)):
        if channels * size[0] * size[1] >= _LIMIT:
            return f"one {what} image has 2^31 elements or more"
    low = lower(s, tuple(padded))
    if low.rows(batch, out) >= _LIMIT - 1024:
        return "2^31 output positions or more in a phase"
    return None


def why_not(step: Step, operands: Operands, few_channels: bool = False) -> str | None:
    """Why the Triton kernel cannot run this step on these tensors, or None. The one predicate that decides a
    fallback. ``few_channels``: fewer than a tensor core's fragment are right, if slow, and not refused. (Whether
    anything can be launched on tensors that are not on a CUDA device is `launch_why_not`'s to say.)"""
    x = operands.x
    reason = triton_why_not()
    if reason is None and x.is_cuda:
        reason = cuda_why_not(x.device.index or 0)
    return reason or _step_why_not(step, x.shape[0], (x.shape[2], x.shape[3]), x.dtype, few_channels)


# --- the device and its numerics --------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _cuda_device(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return device_for(p.major * 10 + p.minor, p.multi_processor_count)


def target_device(x: torch.Tensor) -> Device:
    """The GPU that a launch on ``x`` is planned for: its CUDA device; for other tensors what Triton's active driver
    stands for (an interpreter or emulator), or the table's first entry."""
    if x.is_cuda:
        return _cuda_device(x.device.index or 0)
    from triton.runtime.driver import driver

    try:
        target = driver.active.get_current_target()
    except RuntimeError:  # Triton's interpreter needs no driver, and there is none
        return device_for(80)
    return device_for(target.arch) if isinstance(target.arch, int) else device_for(80)


def conv_tf32() -> bool:
    """Whether PyTorch lets float32 convolutions use TF32 (its newer switch where it exists: mixing both raises)."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    if conv is not None and hasattr(conv, "fp32_precision"):
        return bool(conv.fp32_precision == "tf32")
    return bool(torch.backends.cudnn.allow_tf32)


@contextmanager
def tf32_convolutions(on: bool) -> Iterator[None]:
    """Let float32 convolutions on CUDA use TF32 inside the block, or not, whichever of PyTorch's switches were used
    before. Process-wide, as the switches are."""
    cudnn: Any = torch.backends.cudnn
    conv, rnn = cudnn.conv, cudnn.rnn
    before = conv.fp32_precision, rnn.fp32_precision
    try:
        old: bool | None = cudnn.allow_tf32
        cudnn.allow_tf32 = on  # sets both: code inside may ask either
    except RuntimeError:  # only the newer switches were set: asking the older one raises
        old = None
        conv.fp32_precision = "tf32" if on else "ieee"
    try:
        yield
    finally:
        if old is not None:
            cudnn.allow_tf32 = old
        if (conv.fp32_precision, rnn.fp32_precision) != before:
            conv.fp32_precision, rnn.fp32_precision = before


def precision_of(dtype: torch.dtype) -> Precision:
    """The numerics that PyTorch's switches ask for. The same object for equal ones: it is compared on every call."""
    return _precision(dtype, dtype is torch.float32 and conv_tf32())


_precision = lru_cache(maxsize=16)(Precision)


_here = nullcontext()


def on_device(x: torch.Tensor) -> AbstractContextManager[None]:
    """Launches inside the block go to x's device, whichever is the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _here


def allocate(
    like: torch.Tensor, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The one allocator of outputs: uninitialised, on ``like``'s device, in the memory format asked for."""
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=fmt)
