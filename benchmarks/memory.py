"""Peak memory of a call: the high-water mark of the process on a CPU, of torch's allocator on a GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["METHODS", "held", "peak", "unavailable"]

METHODS = {
    "cpu": (
        "Memory held: what the process keeps more after preparing and a first call than before (weights, packed copies "
        "and arenas, compiled code). Peak of a call: the high-water mark of resident memory (VmHWM, reset through "
        "/proc/self/clear_refs after malloc_trim) over what was resident before the call; the result is part of it. A "
        "runtime with an arena of its own shows under held what others show under peak."
    ),
    "cuda": (
        "Memory held and peak of a call: torch.cuda.memory_allocated and max_memory_allocated, the result included."
    ),
}

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def unavailable(device: str = "cpu") -> str:
    """Why memory is not measured on ``device``; empty where it is."""
    if device != "cpu":
        return "" if torch.cuda.is_available() else "torch has no GPU here"
    if not sys.platform.startswith("linux"):
        return f"the high-water mark of resident memory cannot be reset on {sys.platform}"
    try:
        _CLEAR.write_text("5")
        _status("VmHWM")
    except (OSError, KeyError) as error:
        return f"{_CLEAR} or {_STATUS} is not usable: {error}"
    return ""


def held(device: str = "cpu") -> int:
    """Bytes that are in use now, after handing back what is free."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    _trim()
    return _status("VmRSS")


def peak(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes by which memory in use grows during ``call`` at most; its result lives to the end of it."""
    before = held(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    _CLEAR.write_text("5")
    result = call()
    del result
    return max(0, _status("VmHWM") - before)


def _trim() -> None:
    """Hand free memory back (glibc); a C library without malloc_trim keeps it, and a peak is then too low."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int:
    """A field of /proc/self/status, in bytes. KeyError where it has none."""
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    raise KeyError(f"no {key} in {_STATUS}")
