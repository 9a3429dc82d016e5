"""The memory allocator of a process that computes images and does nothing else."""

from __future__ import annotations

import ctypes
import os
import platform
import sys

__all__ = ["CHOSEN", "keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>
_PIECE = 2**25  # bytes: the most that glibc takes for its M_MMAP_THRESHOLD
CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have this process keep the memory that it frees, in pieces of up to 32 MiB, for its next tensors.

    glibc hands much of it back to the system, which then brings in every page anew: up to a fifth of the time of the
    networks here. The most that the process ever holds stays the same. For programs, never for a library. False where
    nothing is changed: where the C library is another one, or whoever started the process has chosen.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in CHOSEN):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, _PIECE) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
