"""The GPUs that plans are made for: limits and rates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

__all__ = ["DEVICES", "REGISTERS", "Device", "device_for", "resident_blocks"]


@dataclass(frozen=True)
class Device:
    """Limits and rates of a GPU.

    Sources: the table of compute capabilities in the CUDA programming guide (shared memory, warps and blocks), and the
    vendor's architecture white papers and data sheets (the rest; tensor rates are dense, with float32 accumulation,
    which GeForce cards run at half the rate of float16's).
    """

    arch: int
    name: str
    multiprocessors: int
    shared_memory: int  # bytes a block can have
    shared_per_multiprocessor: int
    warps: int  # resident per multiprocessor
    blocks: int
    mma_per_clock: int  # fp16/bf16 multiply-adds per clock and multiprocessor
    l2_bytes_per_clock: int  # from L2 per clock and multiprocessor (an assumption: nobody publishes it)
    l2_bytes: int
    dram_gb_per_second: int
    clock_mhz: int  # boost

    @property
    def dram_bytes_per_clock(self) -> float:
        """Of the whole GPU."""
        return 1e3 * self.dram_gb_per_second / self.clock_mhz


KIB, MIB = 1024, 1024**2
REGISTERS = 65536  # 32-bit registers of a multiprocessor, from compute capability 8.0 to 12.0
DEVICES: dict[int, Device] = {
    d.arch: d
    for d in (
        Device(80, "A100", 108, 163 * KIB, 164 * KIB, 64, 32, 1024, 64, 40 * MIB, 2039, 1410),
        Device(86, "RTX 3090", 82, 99 * KIB, 100 * KIB, 48, 16, 256, 48, 6 * MIB, 936, 1695),
        Device(89, "RTX 4090", 128, 99 * KIB, 100 * KIB, 48, 24, 256, 48, 72 * MIB, 1008, 2520),
        Device(90, "H100", 132, 227 * KIB, 228 * KIB, 64, 32, 2048, 64, 50 * MIB, 3350, 1830),
        Device(100, "B200", 148, 227 * KIB, 228 * KIB, 64, 32, 4096, 64, 126 * MIB, 8000, 1850),
        Device(120, "RTX 5090", 170, 99 * KIB, 100 * KIB, 48, 24, 256, 48, 96 * MIB, 1792, 2407),
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
