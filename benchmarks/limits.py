"""What bounds a time: the machine's ceilings, measured in the same run (or a data sheet's), and a row's least time.

The two ceilings are the rate of a matrix product and the bandwidth of a copy. No time can be less than the arithmetic
at the one and the unavoidable bytes at the other. Maps that stay in a cache from one call to the next can be faster
than the copy's bandwidth, which is of main memory: a fraction above one says that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cnnfast.gpu.devices import Device

from .timers import Timer, once

__all__ = ["Bound", "Ceilings", "Yardstick", "bound", "copy_bandwidth", "copy_bytes", "datasheet", "yardstick"]

SLOW = 0.2  # seconds of a product after which no larger one is tried
MIB = 1024**2


@dataclass(frozen=True)
class Yardstick:
    """The product that this machine does fastest, timed among the implementations of every row."""

    size: int
    call: Callable[[], object]


@dataclass(frozen=True)
class Ceilings:
    """``flops`` per second (two per multiply-add) and ``bytes`` per second, and where they are from: "measured", or the
    data sheet of which GPU."""

    flops: float
    bytes: float
    source: str = "measured"


@dataclass(frozen=True)
class Bound:
    """The least time of some work and which ceiling gives it ("arithmetic" or "memory")."""

    seconds: float
    by: str


def bound(macs: int, least_bytes: int, ceilings: Ceilings) -> Bound:
    """max(2 macs / flops, bytes / bandwidth)."""
    arithmetic, memory = 2 * macs / ceilings.flops, least_bytes / ceilings.bytes
    return Bound(arithmetic, "arithmetic") if arithmetic >= memory else Bound(memory, "memory")


def datasheet(device: Device, dtype: torch.dtype, tf32: bool = False) -> Ceilings:
    """Of a GPU in `cnnfast.gpu.devices.DEVICES`. ValueError for float32 without TF32: the table has tensor cores'
    rates."""
    if dtype == torch.float32 and not tf32:
        raise ValueError(f"no rate of float32 without TF32 is known of {device.name}: give float16, bfloat16 or tf32")
    macs = device.mma_per_clock * device.multiprocessors * device.clock_mhz * 1e6 / (2 if tf32 else 1)
    return Ceilings(2 * macs, 1e9 * device.dram_gb_per_second, f"data sheet of {device.name}")


def yardstick(dtype: torch.dtype, device: str, timer: Timer, sizes: tuple[int, ...] = (512, 1024, 2048)) -> Yardstick:
    """`torch.mm` of square matrices of the size that reaches the highest rate."""

    def product(size: int) -> Callable[[], object]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return lambda: torch.mm(a, b)

    calls: dict[int, Callable[[], object]] = {}
    for size in sizes:
        calls[size] = product(size)
        calls[size]()
        if device == "cpu" and once(calls[size]) > SLOW:  # bfloat16 without instructions for it: minutes otherwise
            break
    timings = timer({str(size): call for size, call in calls.items()})
    best = max(calls, key=lambda size: size**3 / timings[str(size)].median)
    return Yardstick(best, calls[best])


def copy_bytes(device: str = "cpu") -> int:
    """The size of a tensor that no cache holds: twice the largest cache, at least 256 MiB, as memory allows."""
    if device != "cpu":
        return 1024 * MIB
    available = 2048 * MIB
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(16 * MIB, min(max(256 * MIB, 2 * _largest_cache()), available // 4))


def _largest_cache() -> int:
    """Bytes, by what Linux lists of the first CPU; 0 where it lists nothing."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((1024 * int(s[:-1]) for s in sizes if s.endswith("K")), default=0)


def copy_bandwidth(device: str, timer: Timer, size: int | None = None) -> float:
    """Bytes per second of a copy of ``size`` bytes, each byte counted twice: read and written."""
    size = copy_bytes(device) if size is None else size
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / timer({"copy": lambda: target.copy_(source)})["copy"].median
