"""The GPUs that plans are made for: limits and rates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch

from ..memory_format import format_of
from ..spec import Precision

__all__ = [
    "DEVICES",
    "Device",
    "REGISTERS",
    "allocate",
    "cuda_index",
    "conv_tf32",
    "device_for",
    "on_device",
    "precision_of",
    "resident_blocks",
    "target_device",
    "tf32_convolutions",
    "triton_driver",
]


@dataclass(frozen=True)
class Device:
    """Limits and rates of a GPU.

    Sources: the table of compute capabilities in the CUDA programming guide (shared memory, warps and blocks), and the
    vendor's architecture white papers and data sheets (the rest; tensor rates are dense, with float32 accumulation,
    which GeForce cards run at half the rate of float16's).

    The L2 cache's rate is published for the A100 alone (5120 bytes a clock: 47 for each multiprocessor). Here stand
    what the public benchmark gpu-benches (te42kyfo, ``gpu-l2-cache``) read from it, over multiprocessors and boost
    clock: A100 5.4 TB/s (108, 1.41 GHz), H200 9.7 TB/s (132, 1.98 GHz), L40 5.2 TB/s (142, 2.49 GHz). The others are
    taken to be as their nearest relative: B200 as the H200, RTX 3090 and 5090 as the L40. `benchmarks.gpu`'s stage
    ``probes`` measures it and prints the line to paste here.

    How tensor cores round their sums is no column, as no plan depends on it: the same stage's summary says it.
    """

    arch: int
    name: str
    multiprocessors: int
    shared_memory: int  # bytes a block can have
    shared_per_multiprocessor: int
    warps: int  # resident per multiprocessor
    blocks: int
    mma_per_clock: int  # fp16/bf16 multiply-adds per clock and multiprocessor
    l2_bytes_per_clock: int  # from L2 per clock and multiprocessor
    l2_bytes: int
    dram_gb_per_second: int
    clock_mhz: int  # boost

    def __hash__(self) -> int:  # devices are part of keys on the path of every call
        return self.arch

    @property
    def dram_bytes_per_clock(self) -> float:
        """Of the whole GPU."""
        return 1e3 * self.dram_gb_per_second / self.clock_mhz


KIB, MIB = 1024, 1024**2
REGISTERS = 65536  # 32-bit registers of a multiprocessor, from compute capability 8.0 to 12.0
DEVICES: dict[int, Device] = {
    d.arch: d
    for d in (
        Device(80, "A100", 108, 163 * KIB, 164 * KIB, 64, 32, 1024, 35, 40 * MIB, 2039, 1410),
        Device(86, "RTX 3090", 82, 99 * KIB, 100 * KIB, 48, 16, 256, 15, 6 * MIB, 936, 1695),
        Device(89, "RTX 4090", 128, 99 * KIB, 100 * KIB, 48, 24, 256, 15, 72 * MIB, 1008, 2520),
        Device(90, "H100", 132, 227 * KIB, 228 * KIB, 64, 32, 2048, 37, 50 * MIB, 3350, 1830),
        Device(100, "B200", 148, 227 * KIB, 228 * KIB, 64, 32, 4096, 37, 126 * MIB, 8000, 1850),
        Device(120, "RTX 5090", 170, 99 * KIB, 100 * KIB, 48, 24, 256, 15, 96 * MIB, 1792, 2407),
    )
}


@cache
def device_for(arch: int, multiprocessors: int | None = None) -> Device:
    """The table's entry for a compute capability (87 -> 86, 121 -> 120), with the real number of multiprocessors if
    given."""
    known = max((a for a in DEVICES if a <= arch), default=80)
    d = DEVICES[known]
    if multiprocessors is None or multiprocessors == d.multiprocessors:
        return d
    return replace(d, multiprocessors=multiprocessors)


def resident_blocks(device: Device, num_warps: int, registers: int, shared_memory: int) -> int:
    """Programs that one multiprocessor holds at a time."""
    per_warp = -(-registers // 8) * 8 * 32  # registers are handed out by 256
    by_registers = REGISTERS // (per_warp * num_warps)
    by_memory = device.shared_per_multiprocessor // (shared_memory + KIB)  # the system keeps 1 KiB of each
    return max(1, min(by_registers, by_memory, device.warps // num_warps, device.blocks))


# --- the device and its numerics --------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _cuda_device(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return device_for(p.major * 10 + p.minor, p.multi_processor_count)


def cuda_index(x: torch.Tensor) -> int | None:
    """The index of x's CUDA device; None where there is none (an interpreter, an emulating driver): nothing is guarded
    then."""
    return x.device.index or 0 if x.is_cuda else None


def target_device(x: torch.Tensor) -> Device:
    """The GPU that a launch on ``x`` is planned for: its CUDA device; for other tensors what Triton's active driver
    stands for (an interpreter or emulator), or the table's first entry."""
    index = cuda_index(x)
    if index is not None:
        return _cuda_device(index)
    try:
        return _device_of(triton_driver())
    except RuntimeError:  # Triton's interpreter needs no driver, and there is none
        return device_for(80)


@cache
def _drivers() -> Any:
    from triton.runtime.driver import driver  # not everywhere installed

    return driver


def triton_driver() -> Any:
    """Triton's active driver. RuntimeError where it finds none for this machine."""
    return _drivers().active


@lru_cache(maxsize=64)
def _device_of(active: Any) -> Device:
    """What a driver of Triton's stands for."""
    arch = active.get_current_target().arch
    return device_for(arch) if isinstance(arch, int) else device_for(80)


def conv_tf32() -> bool:
    """Whether PyTorch lets float32 convolutions use TF32 (its newer switch where it exists: mixing both raises)."""
    precision = getattr(getattr(torch.backends.cudnn, "conv", None), "fp32_precision", None)
    return bool(torch.backends.cudnn.allow_tf32) if precision is None else bool(precision == "tf32")


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
    index = cuda_index(x)
    return _here if index is None or index == torch.cuda.current_device() else torch.cuda.device(x.device)


def allocate(
    like: torch.Tensor, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The one allocator of outputs: uninitialised, on ``like``'s device, in the memory format asked for."""
    fmt = format_of(len(shape), channels_last)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=fmt)
