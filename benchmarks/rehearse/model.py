"""The arithmetic of the rehearsal: occupancy, issue pressure, work, bytes and bounds of a recorded step. Counts and
ratios only: nothing was measured on a GPU.

Assumptions, in one place:

- Rates are those of `cnnfast.gpu.devices.DEVICES`. mma.sync runs at half wgmma's rate on sm_90 and at a
  quarter of tcgen05's on sm_100. TF32 runs at half float16's rate. Four schedulers issue one instruction per clock.
- Bytes: every pass over device memory counts, as if L2 kept nothing between two launches: copies and packing of
  weights, the workspace of a split K written and read. Inside a launch, x and the weight are read once where what the
  groups of row tiles in flight need fits L2; otherwise x once per phase and column tile, or the weight once per round
  of groups. Stores to interleaved positions are merged in L2.
- Latency: a trip of the main loop takes at least `TRIP` clocks over the stages in flight, a program `PROLOGUE` more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from cnnfast.gpu.conv_choice import PROLOGUE, TRIP
from cnnfast.gpu.conv_plan import Plan, tap_map
from cnnfast.gpu.devices import KIB, REGISTERS, Device
from cnnfast.spec import Precision

from .inspector import Call, Report
from .launches import StepRun

__all__ = [
    "BOUNDS",
    "PARTS",
    "Traffic",
    "Work",
    "bounds",
    "loop_macs",
    "occupancy",
    "pressure",
    "rate",
    "tiles",
    "traffic",
    "work",
]

PARTS = ("x", "weight", "y", "vectors", "norm", "copies", "workspace")  # what moves bytes, see `traffic`
BOUNDS = ("tensor", "issue", "dram", "l2", "latency")
_SCALAR = {80: 64}  # float32 multiply-adds per clock and multiprocessor; 128 elsewhere


# --- occupancy --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Occupancy:
    """Blocks of a kernel that a multiprocessor holds at once, and what allows no more."""

    blocks: int
    limit: str


def occupancy(registers: int, shared: int, num_warps: int, device: Device) -> Occupancy:
    """As the CUDA occupancy calculator: registers are given to warps in 256, a quarter of the file for each scheduler;
    shared memory in 128 bytes, with 1 KiB per block for the system."""
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    limits = {
        "registers": REGISTERS // 4 // per_warp * 4 // num_warps,
        "shared memory": device.shared_per_multiprocessor // (-(-(shared + KIB) // 128) * 128),
        "warps": device.warps // num_warps,
        "blocks": device.blocks,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limit)


# --- the tensor cores and the issue slots -----------------------------------------------------------------------------


def rate(kind: str, precision: Precision, device: Device) -> float:
    """Multiply-adds per clock and multiprocessor of the loop's instructions (of three products for one: all three)."""
    if not kind:
        return float(_SCALAR.get(device.arch, 128))
    share = 1.0
    if kind == "mma":
        share = {9: 0.5, 10: 0.25}.get(device.arch // 10, 1.0)
    return device.mma_per_clock * share / (2 if precision.itemsize == 4 else 1)


def loop_macs(report: Report, plan: Plan, precision: Precision) -> int:
    """Multiply-adds of the block in one trip of the machine code's loop."""
    if report.mma_kind == "tcgen05":  # at most 128 rows and 256 columns, 32 bytes of k
        return report.mma * min(plan.block_m, 128) * min(plan.block_n, 256) * 32 // precision.itemsize
    if report.mma_kind:
        return report.macs
    return report.ffma * 32 * report.num_warps


def pressure(report: Report, plan: Plan, precision: Precision, device: Device) -> float:
    """Issue slots that the loop takes over the tensor-core cycles it feeds: over 1, the tensor cores wait."""
    macs = loop_macs(report, plan, precision)
    if macs == 0:
        return math.inf
    return report.instructions * report.num_warps / 4 / (macs / rate(report.mma_kind, precision, device))


# --- work and bytes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Multiply-adds: ``useful`` after phase decomposition, ``executed`` with what fills up tiles; ``programs`` that do
    any, and ``operand_bytes`` that they load."""

    useful: int
    executed: int
    programs: int
    operand_bytes: int


def work(run: StepRun, plan: Plan) -> Work:
    low, s = plan.lowering, run.step.spec
    batch, out = run.input_shape[0], run.output_shape[2:]
    size = tuple(n + 2 * p for n, p in zip(run.input_shape[2:], run.step.pad, strict=True))
    if low.regime == "latent":
        useful = batch * s.in_channels * s.out_channels // s.groups * math.prod(out)
    else:
        useful = s.macs(batch, size)
    if low.merged or not s.transposed:
        phases = [(low.rows(batch, out), math.prod(low.kernel))]
    else:
        phases = [
            (
                batch * math.prod(ph.size(n, step) for ph, n, step in zip(phase, out, s.stride, strict=True)),
                math.prod(ph.taps for ph in phase),
            )
            for phase in itertools.product(*s.phases)
        ]
    trip = plan.block_k * plan.unroll
    k = -(-low.channels_in // trip) * trip
    columns = -(-low.columns // plan.block_n)
    programs = executed = operands = 0
    for rows, taps in phases:
        tiles = -(-rows // plan.block_m) * columns * s.groups
        programs += tiles
        executed += tiles * plan.block_m * plan.block_n * taps * k
        operands += tiles * (plan.block_m + plan.block_n) * taps * k * run.itemsize
    return Work(useful, executed, programs * plan.split_k, operands)


@dataclass(frozen=True)
class Traffic:
    """Bytes of device memory by what moves them; ``least``: the step's tensors, each once."""

    least: int
    parts: dict[str, int]

    @property
    def moved(self) -> int:
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        return self.moved / self.least


def traffic(run: StepRun, plan: Plan, resident: int, device: Device) -> Traffic:
    """See the assumptions at the top. ``resident``: blocks at once on a multiprocessor."""
    low, s = plan.lowering, run.step.spec
    y = math.prod(run.output_shape) * run.itemsize
    main = run.main
    copied = sum(op.read + op.written for op in run.ops)
    beside = [c for c in run.calls if c is not main]
    norm = [c for c in beside if c.job.function in _NORM_KERNELS]
    copied += sum(_OTHER_KERNELS[c.job.function](c) for c in beside if c not in norm)
    parts = {"copies": copied, "y": y, "vectors": run.vectors}
    parts["norm"] = sum(c.bytes_of(name) for c in norm for name in c.tensors)
    x, w = main.bytes_of("x_ptr"), main.bytes_of("w_ptr")
    if not any(c.job.function == "gather_weight_kernel" for c in run.calls):  # read in place, the taps that are needed
        w = round(w * _used_taps(plan))
    rows = plan.block_m * plan.group_m
    groups = -(-low.rows(run.input_shape[0], run.output_shape[2:]) // rows)
    sweep = math.prod(low.phases) * -(-low.columns // plan.block_n)
    per_group = min(rows, _input_rows(run)) * low.channels_in * run.itemsize
    flying = min(groups, 1 + device.multiprocessors * resident // max(1, plan.group_m * sweep))
    if flying * per_group + w // s.groups <= device.l2_bytes:
        x_times, w_times = 1, 1
    elif flying * per_group <= device.l2_bytes:
        x_times, w_times = 1, -(-groups // flying)
    else:
        x_times, w_times = sweep, -(-groups // flying)
    parts |= {"x": x * x_times, "weight": w * w_times}
    if plan.split_k > 1:
        parts["workspace"] = 2 * 4 * plan.split_k * math.prod(run.output_shape)
    weight = round(run.weight * (1.0 if run.step.upsample else _used_taps(plan)))
    # A norm by its input's statistics reads and writes the result once more at the least.
    passes = 3 if norm else 1
    return Traffic(math.prod(run.input_shape) * run.itemsize + weight + run.vectors + passes * y, parts)


def _gathered(call: Call) -> int:
    """Bytes of the kernel that reorders a weight: it reads no more than the taps that it writes."""
    written = call.bytes_of("out_ptr")
    return written + min(call.bytes_of("w_ptr"), written * call.job.named_constants["TERMS"])


_NORM_KERNELS = {"partial_stats_kernel", "merge_stats_kernel", "norm_act_kernel"}
# What the launches beside the convolution move. (The second pass of a split is counted as "workspace" and "y".)
_OTHER_KERNELS: dict[str, Callable[[Call], int]] = {
    "gather_weight_kernel": _gathered,
    "split_k_epilogue_kernel": lambda call: 0,
}


def _used_taps(plan: Plan) -> float:
    """Share of the taps that reach the output at all (a 1x1 input with cropping needs few)."""
    low = plan.lowering
    if not low.merged:
        return 1.0
    used = math.prod(len({t for row in rows for t in row if t >= 0}) for rows in tap_map(low))
    return used / math.prod(low.spec.kernel_size)


def _input_rows(run: StepRun) -> int:
    return run.input_shape[0] * math.prod(run.input_shape[2:])


# --- bounds -----------------------------------------------------------------------------------------------------------


def tiles(run: StepRun, plan: Plan, side: int) -> int:
    """Programs along the grid if tiles were ``side`` squared."""
    low = plan.lowering
    rows = low.rows(run.input_shape[0], run.output_shape[2:])
    return -(-rows // side) * -(-low.columns // side) * math.prod(low.phases) * run.step.spec.groups


def bounds(
    run: StepRun, plan: Plan, done: Work, moved: Traffic, issue: float, per_clock: float, blocks: int, device: Device
) -> dict[str, float]:
    """Clocks that each part of the machine is busy for at least. Only their order and ratios mean anything."""
    tensor = done.executed / (per_clock * device.multiprocessors)
    through_l2 = done.operand_bytes + moved.parts["y"] + moved.parts.get("workspace", 0)
    rounds = -(-done.programs // (device.multiprocessors * max(1, blocks)))
    trips = -(-plan.steps() // plan.split_k)
    return {
        "tensor": tensor,
        "issue": tensor * issue,
        "dram": moved.moved / device.dram_bytes_per_clock,
        "l2": through_l2 / (device.l2_bytes_per_clock * device.multiprocessors),
        "latency": rounds * (trips * TRIP / max(1, plan.num_stages - 1) + PROLOGUE),
    }
