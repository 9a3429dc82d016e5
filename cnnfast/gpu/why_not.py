"""Which backend runs a step, and why not another one."""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from typing import Any

import torch

from ..spec import DTYPES, INT32, ConvSpec
from ..step import Operands, Step
from .conv_plan import lower
from .devices import cuda_index, triton_driver

__all__ = ["NO_DEVICE", "cuda_why_not", "launch_why_not", "spec_why_not", "triton_why_not", "why_not"]


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
    kind = device.type
    if kind == "cuda":
        return cuda_why_not(device.index or 0)
    try:
        taken = _takes(triton_driver())
    except RuntimeError:  # Triton finds no driver for this machine
        taken = None
    if taken == kind:
        return None
    from triton import knobs

    if knobs.runtime.interpret:
        return None if kind == "cpu" else f"the tensors are on {device}, Triton's interpreter runs on the CPU"
    return NO_DEVICE if taken is None else f"the tensors are on {device}, Triton launches on {taken}"


@lru_cache(maxsize=64)
def _takes(active: Any) -> str:
    """The type of the devices whose tensors a driver of Triton's takes."""
    return str(active.get_active_torch_device().type)


MIN_CHANNELS = 16  # of a group: one tensor-core fragment


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
    step: Step, batch: int, input_size: tuple[int, ...], dtype: torch.dtype, few_channels: bool, tail: bool
) -> str | None:
    s = step.spec
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(str(d) for d in DTYPES)}"
    reason = spec_why_not(s)
    if reason is not None and not few_channels:
        return reason
    padded = [n + 2 * p for n, p in zip(input_size, step.pad, strict=True)]
    out = s.output_size(padded)
    for what, channels, size in (("input", s.in_channels, padded), ("output", s.out_channels, out)):
        if channels * math.prod(size) >= INT32:
            return f"one {what} image has 2^31 elements or more"
    low = lower(s, tuple(padded))
    if low.rows(batch, out) >= INT32 - 1024:
        return "2^31 output positions or more in a phase"
    return "2^31 positions or more" if tail and batch * math.prod(out) >= INT32 - 1024 else None


def why_not(step: Step, o: Operands, few_channels: bool = False, training: bool = False) -> str | None:
    """Why the Triton kernels cannot run this step on these tensors, or None. The one predicate that decides a
    fallback. ``few_channels``: fewer than a tensor core's fragment are right, if slow, and not refused. ``training``:
    what follows the convolution runs apart. (Whether anything can be launched on tensors that are not on a CUDA device
    is `launch_why_not`'s to say.)"""
    x = o.x
    reason = triton_why_not()
    index = cuda_index(x)
    if reason is None and index is not None:
        reason = cuda_why_not(index)
    if reason is not None:
        return reason
    apart = step.spec is None or training and (step.norm is not None or step.residual)
    if step.spec is None:
        reason = _norm_why_not(x.shape, x.dtype) if x.numel() else None
    else:
        reason = _step_why_not(step, x.shape[0], tuple(x.shape[2:]), x.dtype, few_channels, apart)
    if reason is not None or not apart:
        return reason
    for v in (o.scale, o.shift, o.mean, o.var, o.residual, o.slope):
        if v is not None and v.dtype not in DTYPES:
            return f"a vector's dtype {v.dtype} is not one of {', '.join(str(d) for d in DTYPES)}"
    return None


def _norm_why_not(shape: torch.Size, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take an x (N, C, *size)."""
    image = shape[1:].numel()
    if dtype not in DTYPES:
        return f"dtype {dtype} is not one of {', '.join(str(d) for d in DTYPES)}"
    if image >= INT32:
        return "one image has 2^31 elements or more"
    return "2^31 positions or more" if shape[0] * shape[2:].numel() >= INT32 - 1024 else None
