"""How a convolution is launched: the form the kernel sees (`Lowering`), the tile (`Plan`), and the choice of both.

Everything here is pure: no tensor, no GPU, no Triton. `choose_plan` is a model of time that compares candidates on the
same work (tensor-core time, L2 time and latency per trip of the main loop, waves of programs); it was fitted to no GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

from .spec import ConvSpec, Phase, Precision

__all__ = ["DEVICES", "Device", "Lowering", "Plan", "choose_plan", "device_for", "is_valid", "lower", "tap_map"]


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


# --- lowering: which gather the kernel runs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Lowering:
    """A 2-D convolution as `kernels/conv_transpose.py` runs it.

    ``regime`` "phases": every phase of ``spec`` on the grid. "merged": one gather over the union of the phases' input
    neighbourhoods, columns (a, b, channel). "latent": the same for a 1x1 input, every output position a column block.
    """

    regime: str
    spec: ConvSpec
    merge: tuple[int, int]
    kernel: tuple[int, int]  # taps of the gather: spec's own, or the union neighbourhood's
    padding: tuple[int, int]

    @property
    def merged(self) -> bool:
        return self.regime != "phases"

    @property
    def transposed(self) -> bool:
        return self.spec.transposed and not self.merged

    @property
    def phases(self) -> tuple[int, int]:
        """Phases on the grid per dimension."""
        return (self.spec.stride[0], self.spec.stride[1]) if self.transposed else (1, 1)

    @property
    def columns(self) -> int:
        return self.merge[0] * self.merge[1] * (self.spec.out_channels // self.spec.groups)

    @property
    def channels_in(self) -> int:
        return self.spec.in_channels // self.spec.groups

    @property
    def max_taps(self) -> int:
        return math.prod(self.kernel) if self.merged else self.spec.max_phase_taps

    def uniform_taps(self, dim: int) -> int:
        """Taps per phase along a dimension if all phases have the same number, else 0."""
        if self.merged:
            return self.kernel[dim]
        counts = {ph.taps for ph in self.spec.phases[dim]}
        return counts.pop() if len(counts) == 1 else 0

    def rows(self, batch: int, output_size: tuple[int, ...]) -> int:
        """Rows of the largest phase."""
        step = [p * m for p, m in zip(self.phases, self.merge, strict=True)]
        return batch * math.prod(-(-o // s) for o, s in zip(output_size, step, strict=True))


def _reach(phases: tuple[Phase, ...]) -> tuple[int, int]:
    """Smallest and largest input offset of a dimension's phases (0, 0 if no phase has a tap)."""
    offsets = [off for ph in phases for _, off in ph.pairs()] or [0]
    return min(offsets), max(offsets)


def tap_map(low: Lowering) -> tuple[list[list[int]], list[list[int]]]:
    """For a merged lowering, per dimension ``map[a][u]``: the tap of ``spec`` that column block ``a`` applies at union
    tap ``u``, or -1 where it has none."""
    s = low.spec
    out = []
    for dim in (0, 1):
        if low.regime == "latent":
            # The one input position 0: output a takes the tap t with a + p = d*t.
            p, d, k = s.padding[dim], s.dilation[dim], s.kernel_size[dim]
            if not s.transposed:
                raise ValueError("a latent lowering is of a transposed convolution")
            rows = [[(a + p) // d if (a + p) % d == 0 and (a + p) // d < k else -1] for a in range(low.merge[dim])]
        else:
            lo, _ = _reach(s.phases[dim])
            rows = [[-1] * low.kernel[dim] for _ in range(low.merge[dim])]
            for a, ph in enumerate(s.phases[dim]):
                for tap, off in ph.pairs():
                    rows[a][off - lo] = tap
        out.append(rows)
    return out[0], out[1]


def _phases(spec: ConvSpec) -> Lowering:
    return Lowering("phases", spec, (1, 1), spec.kernel_size, spec.padding)  # type: ignore[arg-type]


def _merged(spec: ConvSpec) -> Lowering:
    reach = [_reach(dim) for dim in spec.phases]
    kernel = tuple(hi - lo + 1 for lo, hi in reach)
    return Lowering("merged", spec, spec.stride, kernel, tuple(-lo for lo, _ in reach))  # type: ignore[arg-type]


FEW_COLUMNS = 16  # output channels below which phases share a tile


@lru_cache(maxsize=4096)
def lower(spec: ConvSpec, input_size: tuple[int, ...]) -> Lowering:
    """The form of ``spec`` (2-D) for an input of this size."""
    if not spec.transposed:
        return _phases(spec)
    if tuple(input_size) == (1, 1):
        return Lowering("latent", spec, spec.output_size(input_size), (1, 1), (0, 0))  # type: ignore[arg-type]
    if spec.stride != (1, 1):
        merged = _merged(spec)
        wasted = math.prod(merged.kernel) * math.prod(spec.stride) > math.prod(spec.kernel_size)
        if spec.out_channels // spec.groups < FEW_COLUMNS or not wasted:
            return merged
    return _phases(spec)


# --- plan: the tile ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A tile and its schedule, for one lowering."""

    lowering: Lowering
    block_m: int
    block_n: int
    block_k: int
    unroll: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    group_m: int = 8

    @property
    def name(self) -> str:
        split = f" split{self.split_k}" if self.split_k > 1 else ""
        return (
            f"{self.lowering.regime} {self.block_m}x{self.block_n}x{self.block_k}*{self.unroll} "
            f"w{self.num_warps} s{self.num_stages}{split}"
        )

    def tiles(self, batch: int, output_size: tuple[int, ...]) -> int:
        """Programs along the grid's x axis."""
        low = self.lowering
        rows, phases = low.rows(batch, output_size), math.prod(low.phases)
        return -(-rows // self.block_m) * -(-low.columns // self.block_n) * phases

    def grid(self, batch: int, output_size: tuple[int, ...]) -> tuple[int, int, int]:
        return self.tiles(batch, output_size), self.split_k, self.lowering.spec.groups

    def steps(self) -> int:
        """Trips of the main loop of the largest phase, before splitting."""
        return self.lowering.max_taps * -(-self.lowering.channels_in // (self.block_k * self.unroll))

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of the pipeline's buffers (an upper bound of what the compiler takes, which a test compares)."""
        buffers = self.num_stages * self.unroll * (self.block_m + self.block_n) * self.block_k * itemsize
        return buffers + 64  # barriers (sm_100 has 16 bytes of them)


def is_valid(plan: Plan, precision: Precision, device: Device) -> bool:
    """Whether a plan can run at all: the one predicate of the heuristic and of tuning."""
    m, n, k = plan.block_m, plan.block_n, plan.block_k
    if any(v & (v - 1) or v < 1 for v in (m, n, k, plan.num_warps, plan.unroll)) or min(m, n, k) < 16:
        return False
    threads = plan.num_warps * 32
    # 128 accumulators a thread leave room for operands and addresses; a CUDA-core product (float32 exact) needs more of
    # those.
    exact = precision.dtype == torch.float32 and not precision.tf32
    if m * n > threads * (32 if exact else 128) or m * n < threads * 2:
        return False
    if plan.num_warps > (m // 16) * (n // 16):  # the surplus warps would repeat the work of the others
        return False
    if plan.unroll > 1 and device.arch // 10 == 10:
        # Two pipelined tcgen05 products a trip: the compiled code gave wrong sums when executed in emulation (triton
        # 3.7.1); whether compiler or emulator is at fault is open. One product a trip is right.
        return False
    # Seen by compiling (tests/test_compiled.py): here the compiler saves registers for occupancy and spills a few.
    if device.arch == 89 and (m, n, k, plan.unroll) == (64, 32, 64, 2):
        return False
    if device.arch // 10 == 10 and plan.split_k > 1 and m >= 64:
        return False
    if device.arch // 10 == 12 and precision.itemsize == 4 and plan.split_k > 1 and n == 16 and m * k >= 1024:
        return False
    if plan.shared_memory(precision.itemsize) > device.shared_memory:
        return False
    return 1 <= plan.split_k <= max(1, plan.steps()) and plan.split_k < 65536


def _tiles(precision: Precision, device: Device) -> Iterator[tuple[int, int, int, int, int]]:
    """Candidate (block_m, block_n, num_warps, num_stages, bytes of k per block), tried in this order."""
    if precision.dtype == torch.float32 and not precision.tf32:
        yield from ((64, 64, 8, 2, 64), (32, 64, 4, 2, 64), (32, 32, 4, 2, 64), (16, 32, 2, 2, 64), (16, 16, 1, 2, 64))
        return
    wide = precision.itemsize == 4
    for m, n in itertools.product((128, 64, 32, 16), (128, 64, 32, 16)):
        if wide and m * n > 64 * 64:
            continue
        warps = 8 if m * n >= 128 * 128 else 4 if m * n >= 32 * 64 else 2 if m * n > 16 * 16 else 1
        yield m, n, warps, 3, 64
        if m * n <= 64 * 64:
            yield m, n, warps, 3, 128


def _seconds(plan: Plan, batch: int, output_size: tuple[int, ...], precision: Precision, device: Device) -> float:
    """Modelled time in clocks (only comparisons mean anything)."""
    trip_k = plan.block_k * plan.unroll
    rate = device.mma_per_clock / (1 if precision.itemsize == 2 else 2)
    if precision.dtype == torch.float32 and not precision.tf32:
        rate = 64.0
    mma = plan.block_m * plan.block_n * trip_k / rate
    load = (plan.block_m + plan.block_n) * trip_k * precision.itemsize / device.l2_bytes_per_clock
    resident = max(
        1, min(device.shared_per_multiprocessor // (plan.shared_memory(precision.itemsize) + KIB), 16 // plan.num_warps)
    )
    steps = -(-plan.steps() // plan.split_k)
    programs = math.prod(plan.grid(batch, output_size))
    per_sm = -(-programs // device.multiprocessors)
    concurrent = min(resident, per_sm)
    # A program alone cannot overlap its latency: a trip takes at least a share of the memory latency over the pipeline
    # depth.
    latency = 700.0 / (plan.num_stages - 1) / concurrent
    tile = steps * max(mma, load, latency)
    prologue = 1500.0 / concurrent
    store = plan.block_m * plan.block_n * (4 if plan.split_k > 1 else precision.itemsize) / 32
    total = per_sm * (tile + prologue + store)
    if plan.split_k > 1:
        out = plan.lowering.spec.out_channels * batch * math.prod(output_size)
        total += 4000.0 + out * 4 * (plan.split_k + 1) / (device.l2_bytes_per_clock * device.multiprocessors)
    return total


@lru_cache(maxsize=4096)
def choose_plan(spec: ConvSpec, batch: int, input_size: tuple[int, ...], precision: Precision, device: Device) -> Plan:
    """The plan for x (batch, C_in, *input_size) on ``device``. Deterministic: the same arguments give the same plan."""
    low = lower(spec, input_size)
    output_size = spec.output_size(input_size)
    rows, columns = low.rows(batch, output_size), low.columns
    best: tuple[float, Plan] | None = None
    for m, n, warps, stages, k_bytes in _tiles(precision, device):
        if (m > 16 and m >= 2 * rows) or (n > 16 and n >= 2 * columns):
            continue
        if m >= 4 * n and columns > n:  # a tall tile spends its loop on row addresses
            continue
        block_k = k_bytes // precision.itemsize
        while block_k > 16 and block_k >= 2 * low.channels_in:
            block_k //= 2
        # Two channel blocks of a tap share a trip's addresses, where the channels fill them.
        pairs = low.channels_in % (2 * block_k) == 0 and precision.itemsize == 2
        unroll = 2 if pairs and is_valid(Plan(low, m, n, block_k, 2, warps, stages), precision, device) else 1
        for split in (1, 2, 4, 8, 16, 32):
            plan = Plan(low, m, n, block_k, unroll, warps, stages, split)
            if not is_valid(plan, precision, device) or (split > 1 and plan.steps() < 2 * split):
                continue
            time = _seconds(plan, batch, output_size, precision, device)
            if best is None or time < best[0]:
                best = (time, plan)
    if best is None:
        raise RuntimeError(f"no valid plan for {spec} in {precision.dtype} on {device.name}")
    return best[1]
