"""How a convolution is launched: the form the kernel sees (`Lowering`), the tile (`Plan`), and the choice of both.

Everything here is pure: no tensor, no GPU, no Triton. `choose_plan` compares plans by a model of time (tensor-core
time, L2 time and latency per trip of the main loop, waves of programs) that was fitted to no GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .devices import DEVICES, Device, device_for, resident_blocks
from .spec import ConvSpec, Phase, Precision

__all__ = [
    "BINARIES",
    "DEVICES",
    "Device",
    "Lowering",
    "Plan",
    "broken_rules",
    "candidates",
    "choose_plan",
    "device_for",
    "is_valid",
    "lower",
    "modelled_clocks",
    "tap_map",
]


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
    channels_last: bool = True  # the layout of the result

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
def lower(spec: ConvSpec, input_size: tuple[int, ...], channels_last: bool = True) -> Lowering:
    """The form of ``spec`` (2-D) for an input of this size and a result in this layout."""
    return replace(_lower(spec, input_size), channels_last=channels_last)


def _lower(spec: ConvSpec, input_size: tuple[int, ...]) -> Lowering:
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
    """A tile and its schedule, for one lowering. ``splits``: whether the binary can cut K in parts at all (their number
    is a run-time argument)."""

    lowering: Lowering
    block_m: int
    block_n: int
    block_k: int
    unroll: int
    num_warps: int
    num_stages: int
    splits: bool = False
    split_k: int = 1
    group_m: int = 8

    @property
    def name(self) -> str:
        split = f" split{self.split_k}" if self.splits else ""
        return (
            f"{self.lowering.regime} {self.block_m}x{self.block_n}x{self.block_k}*{self.unroll} "
            f"w{self.num_warps} s{self.num_stages}{split}"
        )

    def tiles(self, batch: int, output_size: tuple[int, ...]) -> int:
        """Programs along the grid's x axis."""
        return self.tiles_of(self.lowering.rows(batch, output_size))

    def tiles_of(self, rows: int) -> int:
        """The same, for ``rows`` rows of the largest phase."""
        low = self.lowering
        return -(-rows // self.block_m) * -(-low.columns // self.block_n) * math.prod(low.phases)

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
    if any(v & (v - 1) or v < 1 for v in (m, n, k, plan.num_warps)) or min(m, n, k) < 16 or plan.unroll < 1:
        return False
    threads = plan.num_warps * 32
    # 128 accumulators a thread leave room for operands and addresses. A CUDA-core product (float32 exact) needs more of
    # those, and so does a store that finds no two elements of a row together.
    if m * n > threads * (32 if _exact(precision) or not plan.lowering.channels_last else 128) or m * n < threads * 2:
        return False
    if plan.num_warps > (m // 16) * (n // 16):  # the surplus warps would repeat the work of the others
        return False
    if plan.unroll > 1 and device.arch // 10 == 10:
        # Two pipelined tcgen05 products a trip: the compiled code gave wrong sums when executed in emulation (triton
        # 3.7.1); whether compiler or emulator is at fault is open. One product a trip is right.
        return False
    # Seen by compiling: ptxas unrolls short loops of these, and spills a few registers.
    if device.arch // 10 == 8 and (m, n, k, plan.unroll) == (128, 32, 32, 2) and not plan.splits:
        return False
    if device.arch == 89 and (m, n, k, plan.unroll) == (64, 64, 64, 2) and not plan.lowering.channels_last:
        return False
    if plan.shared_memory(precision.itemsize) > device.shared_memory:
        return False
    most = max(1, plan.steps()) if plan.splits else 1
    return 1 <= plan.split_k <= min(most, 65535)


# --- the choice -------------------------------------------------------------------------------------------------------

SPLITS = (2, 4, 8, 16, 32)
UNROLLS, MAX_TRIP = (2, 3, 5, 7), 192  # channel blocks of a trip, and its channels


def _tiles(low: Lowering, precision: Precision, device: Device) -> Iterator[tuple[int, int, int, int, int]]:
    """(block_m, block_n, num_warps, num_stages, bytes of k per block) that are tried, in this order."""
    if _exact(precision):
        yield from ((64, 64, 8, 2, 64), (32, 64, 4, 2, 64), (32, 32, 4, 2, 64), (16, 32, 2, 2, 64), (16, 16, 1, 2, 64))
        return
    wide = precision.itemsize == 4
    if device.arch // 10 == 10 and not wide:  # its tensor cores outrun the instructions of shorter trips
        yield from ((128, 128, 8, 2, 256), (128, 64, 4, 3, 256), (64, 128, 4, 3, 256))
    for m, n in itertools.product((128, 64, 32, 16), (128, 64, 32, 16)):
        if wide and m * n > 64 * 64:
            continue
        largest = 8 if device.arch // 10 != 9 else 4  # wgmma keeps a warp's 128 x 32 of the tile without a spill
        warps = largest if m * n >= 128 * 128 else 4 if m * n >= 32 * 64 else 2 if m * n > 16 * 16 else 1
        yield m, n, warps, 3, 64
        if m * n <= 64 * 64:
            yield m, n, warps, 3, 128


def _plans(low: Lowering, precision: Precision, device: Device) -> Iterator[Plan]:
    """Every tile for a lowering, K in one piece."""
    for m, n, warps, stages, k_bytes in _tiles(low, precision, device):
        if n > 16 and n >= 2 * low.columns:
            continue
        if m >= 4 * n and low.columns > n:  # a tall tile spends its loop on row addresses
            continue
        block_k, channels, unroll = k_bytes // precision.itemsize, low.channels_in, 1
        while block_k > 16 and block_k >= 2 * channels:
            block_k //= 2
        # Several channel blocks of a tap share a trip's addresses, where the channels fill them.
        part = block_k
        while part > 16 and channels % part:
            part //= 2
        fits = [u for u in UNROLLS if channels % (u * part) == 0 and u * part <= MAX_TRIP and precision.itemsize == 2]
        for u in fits:
            if is_valid(Plan(low, m, n, part, u, warps, stages), precision, device):
                block_k, unroll = part, u
                break
        plan = Plan(low, m, n, block_k, unroll, warps, stages)
        if is_valid(plan, precision, device):
            yield plan


def _split(plan: Plan, precision: Precision, device: Device) -> list[Plan]:
    """The tile with K in one part, and in parts of at least two trips; empty where no split is possible."""
    parts = [replace(plan, splits=True, split_k=n) for n in (1, *SPLITS) if plan.steps() >= 2 * n]
    parts = [p for p in parts if is_valid(p, precision, device)]
    return parts if len(parts) > 1 else []


def _exact(precision: Precision) -> bool:
    """float32 on the CUDA cores: no tensor core multiplies it exactly."""
    return precision.dtype == torch.float32 and not precision.tf32


def _registers(plan: Plan) -> int:
    """Of a thread, about: twice the accumulators, and 48 (seen in compiled plans from 16x16 to 128x128)."""
    return min(255, 48 + 2 * plan.block_m * plan.block_n // (32 * plan.num_warps))


def trip_rate(plan: Plan, precision: Precision, device: Device) -> float:
    """Multiply-adds per clock of a multiprocessor with this tile's instructions."""
    if _exact(precision):
        return 64.0
    rate = device.mma_per_clock * 2 / precision.itemsize
    wide = plan.block_m >= 64 and plan.num_warps >= 4  # wgmma and tcgen05; mma.sync stays at the rate of sm_80
    return rate if wide else min(rate, 1024 * 2 / precision.itemsize)


def trip_clocks(plan: Plan, precision: Precision, device: Device) -> dict[str, float]:
    """Modelled clocks of a multiprocessor that one trip through the main loop takes of each of its parts: "tensor",
    "issue" (of instructions), "shared" (memory) and "l2"."""
    m, n, k, warps, size = plan.block_m, plan.block_n, plan.block_k * plan.unroll, plan.num_warps, precision.itemsize
    copies = (m + n) * k * size / 16 / (32 * warps)  # 16-byte copies of a thread
    written = (m + n) * k * size
    macs = m * n * k
    generation = device.arch // 10
    tensor = macs / trip_rate(plan, precision, device)
    if _exact(precision):
        issue, read = 1.3 * macs / 128, written
    elif generation == 9 and m >= 64 and warps >= 4:  # wgmma: operands straight from shared memory
        products = m // 64 * k * size // 32 / (warps // 4)
        issue = (4 * products + 4 * copies + 68) * warps / 4
        read = m // 64 * (64 + n) * k * size
    elif generation == 10 and m >= 64 and warps >= 4:  # tcgen05: likewise, issued by one thread
        issue = (6.3 * copies + 80) * warps / 4
        read = written
    else:  # mma.sync: each warp reads the rows and columns of its own part of the tile
        per_product = 1.5 if size == 2 else 3.5  # TF32's operands are rounded
        issue = (per_product * macs / (4096 / size) / warps + 4.5 * copies + 48) * warps / 4
        shapes = [(a, warps // a) for a in (1, 2, 4, 8) if a <= warps and a * 16 <= m]
        read = min(warps * (m // a + max(n // b, 8)) * k * size for a, b in shapes)
    return {
        "tensor": tensor,
        "issue": issue,
        "shared": (written + read) / 128,
        "l2": written / device.l2_bytes_per_clock,
    }


SECOND_PASS = 2000.0  # clocks until a dependent kernel has started
FULL_WAVE = 0.95  # of the multiprocessors


def programs_of(plan: Plan, rows: int) -> int:
    """Programs of a launch whose largest phase has ``rows`` rows."""
    return plan.tiles_of(rows) * plan.split_k * plan.lowering.spec.groups


def modelled_clocks(plan: Plan, rows: int, precision: Precision, device: Device) -> float:
    """Modelled time of a plan whose largest phase has ``rows`` rows (only comparisons mean anything)."""
    resident = resident_blocks(device, plan.num_warps, _registers(plan), plan.shared_memory(precision.itemsize))
    per_sm = -(-programs_of(plan, rows) // device.multiprocessors)
    concurrent = min(resident, per_sm)
    # A program alone cannot hide its latency: a trip takes at least a share of the memory's, by depth of the pipeline.
    latency = 700.0 / (plan.num_stages - 1) / concurrent
    steps = -(-plan.steps() // plan.split_k)
    parts = trip_clocks(plan, precision, device).values()
    # The parts overlap, but not wholly.
    tile = steps * (max(*parts, latency) + (sum(parts) - max(parts)) / 10)
    prologue = 1500.0 / concurrent
    store = plan.block_m * plan.block_n * (4 if plan.split_k > 1 else precision.itemsize) / 32
    busy = per_sm * (tile + prologue + store)
    moved, sums = _moved(plan, rows, precision.itemsize)
    total = max(busy, (moved + sums) / device.dram_bytes_per_clock)
    if plan.split_k > 1:
        total += SECOND_PASS + sums / device.dram_bytes_per_clock
    return total + busy / 100  # of two that wait for memory, the one that computes less


def _moved(plan: Plan, rows: int, itemsize: int) -> tuple[float, float]:
    """Bytes to and from DRAM, about: of the operands, each once, and of the partial sums, one way."""
    low = plan.lowering
    s = low.spec
    out = rows * math.prod(low.phases) * low.columns * s.groups
    weight = low.channels_in * low.columns * s.groups if low.regime == "latent" else math.prod(s.weight_shape)
    sums = 4 * plan.split_k * out if plan.split_k > 1 else 0
    return (rows * s.in_channels + weight + out) * itemsize, sums


PRESSURE = 0.75  # of issue slots, as modelled; compiled code stays below 0.8 then


def broken_rules(plan: Plan, rows: int, precision: Precision, device: Device) -> int:
    """How many rules a plan breaks whose largest phase has ``rows`` rows.

    A wave of programs, or K in parts. Where a layer waits for memory, no partial sums of more than 15 % of what must be
    moved anyway. Where it waits for tensor cores (an implicit GEMM of 32 channels and more in and out, with enough
    rows), no more instructions than leave them busy.
    """
    low = plan.lowering
    idle = plan.split_k == 1 and programs_of(plan, rows) < FULL_WAVE * device.multiprocessors
    moved, sums = _moved(plan, rows, precision.itemsize)
    macs = rows * math.prod(low.phases) * low.columns * low.spec.groups * low.channels_in * low.max_taps
    rate = device.mma_per_clock * 2 / precision.itemsize * device.multiprocessors
    heavy = 2 * sums > 0.15 * moved and (moved + 2 * sums) / device.dram_bytes_per_clock > macs / rate
    gemm = low.regime == "phases" and min(low.channels_in, low.columns) >= 32 and precision.itemsize == 2
    enough = -(-rows // 64) * -(-low.columns // 64) * math.prod(low.phases) >= device.multiprocessors
    tensor = plan.block_m * plan.block_n * plan.block_k * plan.unroll / device.mma_per_clock
    busy = gemm and enough and macs / rate >= moved / device.dram_bytes_per_clock
    crowded = busy and trip_clocks(plan, precision, device)["issue"] > PRESSURE * tensor
    return idle + heavy + crowded


PENALTY = 1.5  # a rule is broken where keeping it would take longer than this by the model


def _cost(plan: Plan, rows: int, precision: Precision, device: Device) -> float:
    """What the choice minimises."""
    return modelled_clocks(plan, rows, precision, device) * PENALTY ** broken_rules(plan, rows, precision, device)


BINARIES = 3  # of a layer, over all sizes of batch and image
_SIZES = (1, *(4**e for e in range(2, 8)))  # rows for which a menu is composed: more of them want what 16384 want


@lru_cache(maxsize=4096)
def _menu(low: Lowering, precision: Precision, device: Device) -> tuple[tuple[Plan, ...], ...]:
    """The tiles a layer may use, as the plans of each (several where K can be split): those that lose the least over
    all sizes of batch and image, in no more than `BINARIES` binaries. A split's second pass is one of them.
    """
    whole: list[tuple[Plan, ...]] = [(p,) for p in _plans(low, precision, device)]
    split = [tuple(parts) for (p,) in whole if (parts := _split(p, precision, device))]
    if not whole:
        raise RuntimeError(f"no valid plan for {low.spec} in {precision.dtype} on {device.name}")
    table = {
        plans: [min(_cost(p, rows, precision, device) for p in plans) for rows in _SIZES] for plans in (*whole, *split)
    }
    sizes = range(len(_SIZES))
    best = [min(costs[i] for costs in table.values()) for i in sizes]

    def loss(menu: tuple[tuple[Plan, ...], ...]) -> float:
        # Large sizes weigh more: there the kernel's time is the user's, elsewhere the host's may be.
        return sum((2 + i) * math.log(min(table[plans][i] for plans in menu) / best[i]) for i in sizes)

    def leading(among: list[tuple[Plan, ...]]) -> list[tuple[Plan, ...]]:
        """Those that are the best of ``among`` for some size."""
        firsts = (min(among, key=lambda plans: table[plans][i]) for i in sizes)
        return list(dict.fromkeys(firsts))

    menus: list[tuple[tuple[Plan, ...], ...]] = list(itertools.combinations(leading(whole), BINARIES))
    if split:
        menus += itertools.product([*leading(whole), *leading(split)], leading(split))
    return min(menus or [tuple(leading(whole))], key=loss)


@lru_cache(maxsize=4096)
def choose_plan(
    spec: ConvSpec,
    batch: int,
    input_size: tuple[int, ...],
    precision: Precision,
    device: Device,
    channels_last: bool = True,
) -> Plan:
    """The plan for x (batch, C_in, *input_size) on ``device``, ``channels_last`` the result. Deterministic: the same
    arguments give the same plan.

    Over all sizes of batch and image, the plans of a layer need at most `BINARIES` compiled kernels. RuntimeError where
    no plan is valid.
    """
    low = lower(spec, input_size, channels_last)
    rows = low.rows(batch, spec.output_size(input_size))
    plans = itertools.chain.from_iterable(_menu(low, precision, device))
    return min(plans, key=lambda plan: _cost(plan, rows, precision, device))


def candidates(
    spec: ConvSpec,
    batch: int,
    input_size: tuple[int, ...],
    precision: Precision,
    device: Device,
    channels_last: bool = True,
) -> list[Plan]:
    """Every valid plan for x (batch, C_in, *input_size), by modelled time: what tuning tries."""
    low = lower(spec, input_size, channels_last)
    rows = low.rows(batch, spec.output_size(input_size))
    found = [q for p in _plans(low, precision, device) for q in (p, *_split(p, precision, device))]
    return sorted(dict.fromkeys(found), key=lambda plan: modelled_clocks(plan, rows, precision, device))
