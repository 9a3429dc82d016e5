"""What the rehearsal calls a failure: limits of the device, the main loop, offsets, and the wanted ratios."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

from cnnfast.gpu.conv_choice import (
    FULL_WAVE,
    PENALTY,
    WORKSPACE,
    broken_rules,
    candidates,
    menu,
    modelled_clocks,
    modelled_pressure,
)
from cnnfast.gpu.conv_choice import PRESSURE as FREE
from cnnfast.gpu.conv_plan import Plan, is_exact
from cnnfast.gpu.devices import Device
from cnnfast.spec import Precision

from .inspector import Call, Report
from .launches import StepRun
from .model import Traffic, Work, loop_macs, occupancy

__all__ = [
    "PRESSURE",
    "RATIO",
    "better_plan",
    "drained",
    "grids",
    "issue_slots",
    "limits",
    "loop",
    "narrow_loads",
    "overflows",
    "ratios",
]

PRESSURE = 0.8  # issue pressure allowed in the implicit-GEMM regime with fp16, where tensor cores are the bound
RATIO = 1 + WORKSPACE  # bytes over the least allowed where memory is the bound
_INT32 = 2**31
_VECTORS = {"bias_ptr", "mean_ptr", "var_ptr", "scale_ptr", "shift_ptr", "slope_ptr"}
_GRID = (2**31 - 1, 65535, 65535)


def limits(report: Report, device: Device) -> list[str]:
    found = []
    if report.stack or report.local:
        found.append(f"{report.name} spills: {report.stack} bytes of stack, {report.local} LDL and STL")
    if report.shared > device.shared_memory:
        found.append(f"{report.name} takes {report.shared} bytes of shared memory of {device.shared_memory}")
    if report.unfenced:
        found.append(f"{report.name}: {report.unfenced} wgmma without fence.proxy.async after a write to shared memory")
    if occupancy(report.registers, report.shared, report.num_warps, device).blocks < 1:
        found.append(f"{report.name} does not fit a multiprocessor: {report.registers} registers")
    return found


def grids(calls: list[Call]) -> list[str]:
    return [
        f"grid {c.grid} of {c.job.function} exceeds {_GRID}"
        for c in calls
        if any(g > most for g, most in zip(c.grid, _GRID, strict=True))
    ]


def narrow_loads(report: Report, plan: Plan, call: Call) -> int:
    """Loads of 2 bytes or less of the loop's operands. Where the loop was unrolled away, the compiler may have moved up
    the epilogue's vectors: as many as those can take (a thread holds a quarter of the columns of its warp's products)
    are none of the operands' beside wider loads, or where they are fewer than a thread's elements of an operand in one
    trip (all copies were moved ahead of the first product)."""
    narrow, vectors = report.narrow_loads, len(set(call.tensors) & _VECTORS) * plan.block_n // 4
    wide = sum(n for width, n in report.widths.items() if width >= 4)
    elements = min(plan.block_m, plan.block_n) * plan.block_k // (32 * plan.num_warps)
    return narrow if report.looped or narrow > vectors or not wide and narrow >= elements else 0


def drained(report: Report, precision: Precision) -> list[str]:
    """Tensor cores of sm_90 that stand still in each trip: nothing is multiplied until a warp has seen the last product
    and issued the next. Not judged where an operand passes registers on its way into the one buffer that the product
    reads it from: TF32's, to be rounded, and one that comes in two bytes at a time, as no asynchronous copy is that
    short (whether it must is another rule's)."""
    if not report.drains or precision.itemsize == 4 or report.narrow_loads:
        return []
    return [f"{report.drains} waits for all of wgmma's products in the main loop"]


def whole_trips(report: Report, plan: Plan, precision: Precision) -> bool:
    """Whether the loop's tensor-core instructions make up whole trips of the source's loop: a check of both counts."""
    if not report.mma_kind:
        return True
    return loop_macs(report, plan, precision) % (plan.block_m * plan.block_n * plan.block_k * plan.unroll) == 0


def loop(report: Report, plan: Plan, call: Call, precision: Precision) -> list[str]:
    found = []
    if not report.mma and (plan.three or not is_exact(precision)):
        found.append("no tensor-core instruction in the main loop")
    if narrow := narrow_loads(report, plan, call):
        found.append(f"{narrow} loads of 2 bytes or less in the main loop")
    if report.shared > plan.shared_memory(precision.itemsize):
        found.append(f"{report.shared} bytes of shared memory, the plan says {plan.shared_memory(precision.itemsize)}")
    found += drained(report, precision)
    if not whole_trips(report, plan, precision):
        found.append(f"{report.mma} tensor-core instructions in the main loop are no whole trips of it")
    return found


def overflows(call: Call, plan: Plan) -> list[str]:
    """Offsets that the kernel forms in 32 bits and that do not fit."""
    shapes = {n: call.arguments[n][0] for n in ("x_ptr", "w_ptr", "y_ptr")}
    big = call.job.named_constants["BIG"]
    found = []
    for name, shape in shapes.items():
        whole, image = math.prod(shape), math.prod(shape[1:])
        if name == "w_ptr" and whole >= _INT32:
            found.append(f"the weight has {whole} elements: offsets overflow")
        elif name != "w_ptr" and (image if big else whole) >= _INT32:
            found.append(f"{name} {tuple(shape)} overflows 32-bit offsets (BIG={big})")
    size = tuple(call.arguments[n] for n in ("OD", "OH", "OW") if n in call.arguments)
    rows = plan.lowering.rows(call.arguments["N"], size)
    if rows + plan.block_m >= _INT32:
        found.append(f"{rows} rows overflow")
    return found


def issue_slots(issue: float, judged: bool) -> list[str]:
    """The implicit-GEMM regime (32 channels and more in and out, float16, at least as many 64x64 tiles as
    multiprocessors) where tensor cores are slower than memory: they must not wait for issue slots."""
    return [f"issue pressure {issue:.2f} > {PRESSURE}"] if judged and issue > PRESSURE else []


def ratios(plan: Plan, done: Work, moved: Traffic, bound: str, device: Device) -> list[str]:
    found = []
    if bound == "dram" and moved.ratio > RATIO:
        parts = ", ".join(f"{k} {v / moved.least:.2f}" for k, v in moved.parts.items())
        found.append(f"bytes {moved.ratio:.2f} x the least ({parts})")
    if done.programs < FULL_WAVE * device.multiprocessors and plan.split_k == 1:
        found.append(f"{done.programs} programs for {device.multiprocessors} multiprocessors")
    return found


def better_plan(
    run: StepRun, plan: Plan, precision: Precision, device: Device, crowded: bool
) -> tuple[str | None, str | None]:
    """(of the layer's own few binaries, of all candidates): another tile that keeps all rules of `choice.broken_rules`
    (``crowded``: that leaves issue slots free) and takes, by the model, no more than `choice.PENALTY` times as long.

    Only the first makes a broken rule of issue slots, bytes or waves a failure of the choice: otherwise it is an
    exception, for want of a better tile or of another binary, and listed as one.
    """
    size = tuple(n + 2 * p for n, p in zip(run.input_shape[2:], run.step.pad, strict=True))
    rows = plan.lowering.rows(run.input_shape[0], run.output_shape[2:])
    most = PENALTY * modelled_clocks(plan, rows, precision, device)
    tile = replace(plan, splits=False, split_k=1)

    def better(among: Iterable[Plan]) -> str | None:
        for other in among:
            if crowded and replace(other, splits=False, split_k=1) == tile:
                continue
            if crowded and modelled_pressure(other, precision, device) > FREE:
                continue
            keeps = other != plan and broken_rules(other, rows, precision, device) == 0
            if keeps and modelled_clocks(other, rows, precision, device) <= most:
                return other.name
        return None

    layout = plan.lowering.channels_last
    own = itertools.chain.from_iterable(menu(plan.lowering, precision, device, (plan.three,)))
    every = candidates(run.step.spec, run.input_shape[0], size, precision, device, layout)
    return better(own), better(other for other in every if other.three == plan.three)
