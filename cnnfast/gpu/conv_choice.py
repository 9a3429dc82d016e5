"""Which plan: the candidates, a model of their time, the rules they keep, and the menu of few binaries they come from.

Pure, like `conv_plan`. The model compares plans (tensor cores, issue slots, shared memory and L2 for each trip of the
main loop, latency, waves of programs, DRAM as a floor); its instruction counts are fitted to compiled code, nothing to
a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from ..spec import ConvSpec, Precision
from .conv_plan import Lowering, Plan, Tile, is_exact, is_valid, lower, uses_wgmma
from .devices import Device, resident_blocks

__all__ = [
    "BINARIES",
    "FULL_WAVE",
    "KINDS",
    "PENALTY",
    "PRESSURE",
    "PROLOGUE",
    "SECOND_PASS",
    "TRIP",
    "WORKSPACE",
    "broken_rules",
    "candidates",
    "choose_plan",
    "kinds",
    "menu",
    "modelled_clocks",
    "modelled_pressure",
    "programs_of",
    "registers",
    "trip_clocks",
]


KINDS: tuple[bool, ...] = (False,)
"""Which plans calls choose among for float32 without TF32, by `Plan.three`. (False,): on the CUDA cores alone, because
no GPU has run the others. What adds them, as (False, True): the stages "candidates" and "tune" of `make gpu`, all of
them right and the best of them faster over the rows of exact float32, on an sm_80 and an sm_90; name the results'
folder here. Until then `cnnfast.tune` alone takes them, for a layer where one is the fastest on that GPU."""


def kinds(precision: Precision) -> tuple[bool, ...]:
    """`KINDS` for exact float32; there is one kind of all else."""
    return KINDS if is_exact(precision) else (False,)


SPLITS = (2, 4, 8, 16, 32)
UNROLLS, MAX_TRIP = (2, 3, 5, 7), 192  # channel blocks of a trip, and its channels


def _tiles(
    low: Lowering, precision: Precision, device: Device, three: bool
) -> Iterator[tuple[int, int, int, int, int]]:
    """(block_m, block_n, num_warps, num_stages, bytes of k per block) that are tried, in this order."""
    if three:
        yield from ((128, 64, 8, 3, 128), (64, 64, 4, 3, 128), (64, 32, 4, 3, 128), (32, 64, 4, 3, 128))
        yield from ((32, 32, 2, 3, 128), (16, 32, 2, 3, 128), (16, 16, 1, 3, 128))
        return
    if is_exact(precision):
        yield from ((64, 64, 8, 2, 64), (32, 64, 4, 2, 64), (32, 32, 4, 2, 64), (16, 32, 2, 2, 64), (16, 16, 1, 2, 64))
        return
    wide = precision.itemsize == 4
    if device.arch // 10 == 10 and not wide:  # its tensor cores outrun the instructions of shorter trips
        yield from ((128, 128, 8, 2, 256), (128, 64, 4, 3, 256), (64, 128, 4, 3, 256))
    hopper = device.arch // 10 == 9
    if hopper and not wide:
        yield from ((128, 256, 8, 3, 128), (256, 128, 8, 3, 128), (128, 128, 8, 3, 128))
    for m, n in itertools.product((128, 64, 32, 16), (128, 64, 32, 16)):
        if wide and m * n > 64 * 64:
            continue
        largest = 8 if not hopper else 4  # wgmma keeps a warp's 128 x 32 of the tile without a spill
        warps = largest if m * n >= 128 * 128 else 4 if m * n >= 32 * 64 else 2 if m * n > 16 * 16 else 1
        yield m, n, warps, 3, 64
        deep = hopper and not wide and m >= 64 and warps == 4  # wgmma: a trip is one block of channels
        if deep or m * n <= 64 * 64:
            yield m, n, warps, 3, 128
        if deep and m * n <= 64 * 64:
            yield m, n, warps, 5, 128


def _plans(low: Lowering, precision: Precision, device: Device, three: bool) -> Iterator[Plan]:
    """Every tile of a kind for a lowering, K in one piece."""
    for m, n, warps, stages, k_bytes in _tiles(low, precision, device, three):
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
        plan = Plan(low, m, n, block_k, unroll, warps, stages, three=three)
        if is_valid(plan, precision, device):
            yield plan


def _split(plan: Plan, precision: Precision, device: Device) -> list[Plan]:
    """The tile with K in one part, and in parts of at least two trips; empty where no split is possible."""
    parts = [replace(plan, splits=True, split_k=n) for n in (1, *SPLITS) if plan.steps() >= 2 * n]
    parts = [p for p in parts if is_valid(p, precision, device)]
    return parts if len(parts) > 1 else []


def registers(plan: Tile) -> int:
    """Of a thread, about: twice the accumulators, and 48, or 112 with operands in two parts (seen in compiled plans
    from 16x16 to 128x128)."""
    return min(255, (112 if plan.three else 48) + 2 * plan.block_m * plan.block_n // (32 * plan.num_warps))


def trip_rate(plan: Tile, precision: Precision, device: Device) -> float:
    """Multiply-adds per clock of a multiprocessor with this tile's instructions; a third where each is three."""
    if is_exact(precision) and not plan.three:
        return 64.0
    rate = device.mma_per_clock * 2 / precision.itemsize
    wide = plan.block_m >= 64 and plan.num_warps >= 4  # wgmma and tcgen05; mma.sync stays at the rate of sm_80
    return (rate if wide else min(rate, 1024 * 2 / precision.itemsize)) / (3 if plan.three else 1)


def trip_clocks(plan: Tile, precision: Precision, device: Device) -> dict[str, float]:
    """Modelled clocks of a multiprocessor that one trip through the main loop takes of each of its parts: "tensor",
    "issue" (of instructions), "shared" (memory) and "l2"."""
    m, n, k, warps, size = plan.block_m, plan.block_n, plan.block_k * plan.unroll, plan.num_warps, precision.itemsize
    copies = (m + n) * k * size / 16 / (32 * warps)  # 16-byte copies of a thread
    written = (m + n) * k * size
    macs = m * n * k
    generation = device.arch // 10
    tensor = macs / trip_rate(plan, precision, device)
    if plan.three:
        issue, read = _three_clocks(plan, device)
    elif is_exact(precision):
        issue, read = 1.3 * macs / 128, written
    elif uses_wgmma(plan, device):  # operands straight from shared memory
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


def _three_clocks(plan: Tile, device: Device) -> tuple[float, float]:
    """Clocks of the issue slots, and bytes read from shared memory, in a trip of three products: as counted in compiled
    plans from 16x16 to 128x64 (sm_80 and 90), within 8 %.

    An operand's element takes 5 instructions to part, a sum 3: two that keep it finite, and its addition.
    """
    m, n, k, warps = plan.block_m, plan.block_n, plan.block_k, plan.num_warps
    macs, sums, copies = m * n * k, m * n / (32 * warps), (m + n) * k / (128 * warps)
    if uses_wgmma(plan, device):  # the parts of b go back to shared memory, where tensor cores read them three times
        parts, stored = (m + n) * k / (32 * warps), 2 * n * k / (32 * warps)
        issue = 5 * parts + stored + 3 * sums + 4.5 * copies + 100
        return issue * warps / 4, 4 * k * (m + 3 * n + 3 * m // 64 * n)
    along = min(warps, m // 16)  # warps that share the rows: of chained products all, as far as there are rows
    a, b = m // along * k / 32, n * along // warps * k / 32
    issue = 5 * (a + b) + b + 3 * macs / 1024 / warps + 3 * sums + 4.5 * copies + 55
    return issue * warps / 4, 4 * 32 * warps * (a + b)


# Clocks: of a trip of the main loop over the stages in flight, of a program beside its trips.
TRIP, PROLOGUE = 700.0, 1500.0
SECOND_PASS = 2000.0  # clocks until a dependent kernel has started
FULL_WAVE = 0.95  # of the multiprocessors


def programs_of(plan: Plan, rows: int) -> int:
    """Programs of a launch whose largest phase has ``rows`` rows."""
    return plan.tiles_of(rows) * plan.split_k * plan.lowering.spec.groups


def modelled_clocks(plan: Plan, rows: int, precision: Precision, device: Device) -> float:
    """Modelled time of a plan whose largest phase has ``rows`` rows (only comparisons mean anything)."""
    resident = resident_blocks(device, plan.num_warps, registers(plan), plan.shared_memory(precision.itemsize))
    per_sm = -(-programs_of(plan, rows) // device.multiprocessors)
    concurrent = min(resident, per_sm)
    # A program alone cannot hide its latency: a trip takes at least a share of the memory's, by depth of the pipeline.
    latency = TRIP / (plan.num_stages - 1) / concurrent
    steps = -(-plan.steps() // plan.split_k)
    parts = trip_clocks(plan, precision, device).values()
    # The parts overlap, but not wholly.
    tile = steps * (max(*parts, latency) + (sum(parts) - max(parts)) / 10)
    prologue = PROLOGUE / concurrent
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


WORKSPACE = 0.15  # partial sums, out and in, over what must be moved anyway
PRESSURE = 0.75  # of issue slots, as modelled; compiled code stays below 0.8 then


def modelled_pressure(plan: Plan, precision: Precision, device: Device) -> float:
    """Clocks that the main loop's instructions take of the issue slots, over those of the tensor cores at full rate."""
    macs = plan.block_m * plan.block_n * plan.block_k * plan.unroll
    full = macs * precision.itemsize / (2 * device.mma_per_clock)
    return trip_clocks(plan, precision, device)["issue"] / full


def broken_rules(plan: Plan, rows: int, precision: Precision, device: Device) -> int:
    """How many rules a plan breaks whose largest phase has ``rows`` rows.

    A wave of programs, or K in parts. Where a layer waits for memory, no more partial sums than `WORKSPACE` of what
    must be moved anyway. Where it waits for tensor cores (an implicit GEMM of 32 channels and more in and out, with
    enough rows), no more instructions than leave them busy.
    """
    low = plan.lowering
    idle = plan.split_k == 1 and programs_of(plan, rows) < FULL_WAVE * device.multiprocessors
    moved, sums = _moved(plan, rows, precision.itemsize)
    macs = rows * math.prod(low.phases) * low.columns * low.spec.groups * low.channels_in * low.max_taps
    rate = device.mma_per_clock * 2 / precision.itemsize * device.multiprocessors
    heavy = 2 * sums > WORKSPACE * moved and (moved + 2 * sums) / device.dram_bytes_per_clock > macs / rate
    gemm = low.regime == "phases" and min(low.channels_in, low.columns) >= 32 and precision.itemsize == 2
    enough = -(-rows // 64) * -(-low.columns // 64) * math.prod(low.phases) >= device.multiprocessors
    busy = gemm and enough and macs / rate >= moved / device.dram_bytes_per_clock
    return idle + heavy + (busy and modelled_pressure(plan, precision, device) > PRESSURE)


PENALTY = 2.0  # a rule is broken where keeping it would take longer than this by the model


def _cost(plan: Plan, rows: int, precision: Precision, device: Device) -> float:
    """What the choice minimises."""
    return modelled_clocks(plan, rows, precision, device) * PENALTY ** broken_rules(plan, rows, precision, device)


BINARIES = 3  # of a layer, over all sizes of batch and image
_SIZES = (1, *(2**e for e in range(4, 17)))  # rows for which a menu is composed: more of them want what 65536 want


@lru_cache(maxsize=4096)
def menu(
    low: Lowering, precision: Precision, device: Device, among: tuple[bool, ...] = (False,)
) -> tuple[tuple[Plan, ...], ...]:
    """The tiles a layer may use, as the plans of each (several where K can be split): those that lose the least over
    all sizes of batch and image, in no more than `BINARIES` binaries. A split's second pass is one of them. ``among``:
    of these kinds, by `Plan.three`.
    """
    whole: list[tuple[Plan, ...]] = [(p,) for three in among for p in _plans(low, precision, device, three)]
    split = [tuple(parts) for (p,) in whole if (parts := _split(p, precision, device))]
    if not whole:
        raise RuntimeError(f"no valid plan for {low.spec} in {precision.dtype} on {device.name}")
    table = {
        plans: [min(_cost(p, rows, precision, device) for p in plans) for rows in _SIZES] for plans in (*whole, *split)
    }
    sizes = range(len(_SIZES))
    best = [min(costs[i] for costs in table.values()) for i in sizes]

    def loss(found: tuple[tuple[Plan, ...], ...]) -> float:
        # Large sizes weigh more: there the kernel's time is the user's, elsewhere the host's may be. Squares: rather
        # several sizes that lose a quarter than one that loses all of it.
        return sum((3 + i) * math.log(min(table[plans][i] for plans in found) / best[i]) ** 2 for i in sizes)

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
    plans = itertools.chain.from_iterable(menu(low, precision, device, kinds(precision)))
    return min(plans, key=lambda plan: _cost(plan, rows, precision, device))


def candidates(
    spec: ConvSpec,
    batch: int,
    input_size: tuple[int, ...],
    precision: Precision,
    device: Device,
    channels_last: bool = True,
) -> list[Plan]:
    """Every valid plan for x (batch, C_in, *input_size), of every kind, by modelled time: what tuning tries."""
    low = lower(spec, input_size, channels_last)
    rows = low.rows(batch, spec.output_size(input_size))
    every = (False, True) if is_exact(precision) else (False,)
    found = [
        q for three in every for p in _plans(low, precision, device, three) for q in (p, *_split(p, precision, device))
    ]
    return sorted(dict.fromkeys(found), key=lambda plan: modelled_clocks(plan, rows, precision, device))
