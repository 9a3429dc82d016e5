"""``python -m benchmarks.rehearse.hopper``: the two kernels of sm_90 side by side, by their machine code.

For each layer of `LAYERS` the plan that calls take (`kernels/conv_transpose.py`) and the one that `conv_hopper_plan`
would (`kernels/conv_hopper.py`), compiled: instructions, products and full waits of a trip, issue slots over
tensor-core cycles, and the bytes that tiles read through L2. Nothing is executed. Status 1 where a plan breaks a rule.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from cnnfast.gpu import conv, conv_hopper_plan
from cnnfast.gpu.conv_hopper_plan import BoxPlan
from cnnfast.gpu.conv_plan import Plan
from cnnfast.gpu.devices import DEVICES, Device
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step

from .. import cases
from ..report import table
from .inspections import Failed, Inspections
from .inspector import Job, Report, recording
from .launches import Recorder, StepRun, precision
from .model import pressure

__all__ = ["LAYERS", "job_of", "rules"]

LAYERS = (
    "cyclegan.res", "dcgan64.2", "dcgan64.3", "dcgan64.4", "dcgan128.3", "pix2pix.4", "pix2pix.5", "pix2pix.7",
    "rrdb.hr", "srvgg.body", "vocoder.2", "cyclegan.up1", "upsample256", "vae.up2",
)  # fmt: skip
ARCH, NUMERICS = 90, "fp16"


def rules(report: Report, plan: BoxPlan, device: Device) -> list[str]:
    """What is wrong with a compiled plan. (No rule about proxy fences: what wgmma reads, copies of its proxy wrote.)"""
    found = []
    if report.mma_kind != "wgmma" or not report.looped:
        found.append("no wgmma in the main loop")
    if not report.bulk:
        found.append("no copy by descriptor")
    if report.drains:
        found.append(f"{report.drains} waits for all products in the main loop")
    if report.loads:
        found.append(f"global loads in the main loop: {report.loads}")
    if report.stack or report.local:
        found.append(f"spills: {report.stack} bytes of stack, {report.local} LDL and STL")
    if report.registers > plan.registers:
        found.append(f"{report.registers} registers, {plan.registers} for {plan.blocks} programs a multiprocessor")
    if report.shared > min(plan.shared_memory(2), device.shared_memory):
        found.append(f"{report.shared} bytes of shared memory, the plan says {plan.shared_memory(2)}")
    return found


def job_of(step: Step, input_shape: tuple[int, ...], plan: Plan, dtype: torch.dtype = torch.float16) -> Job:
    """What the launch of ``step`` on such an x compiles for sm_90; with statistics where a norm measures."""
    bare = step.bare if step.measured else step
    n, _, h, w = input_shape
    shape, s = step.weight_shape, step.spec

    def last(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, memory_format=torch.channels_last)

    vector = torch.empty(s.out_channels, dtype=dtype)
    o = Operands(last(*input_shape), last(*shape), vector)
    if bare.norm is not None:
        o = o._replace(mean=vector, var=vector, scale=vector, shift=vector)
    if bare.residual:
        o = o._replace(residual=last(n, s.out_channels, *step.output_size((h, w))))
    with recording(ARCH) as calls:
        conv.run_with_statistics(bare, o, True, step.statistics, plan)
    names = ("conv_transpose_kernel", "conv_hopper_kernel")
    return next(c.job for c in calls if c.job.function in names)


def l2_bytes(plan: Plan, batch: int, output_size: tuple[int, ...], spec: ConvSpec) -> int:
    """Bytes of operands that the tiles of a launch read."""
    low, trip = plan.lowering, plan.block_k * plan.unroll
    tiles = plan.tiles(batch, output_size) // math.prod(low.phases) * spec.groups
    if isinstance(plan, BoxPlan):
        tiles //= spec.groups  # counted in its columns
    if low.merged:
        taps = low.max_taps
    else:
        taps = sum(a.taps * b.taps for a, b in itertools.product(*low.spec.phases))
    return tiles * taps * -(-low.channels_in // trip) * (plan.block_m + plan.block_n) * trip * 2


@dataclass(frozen=True)
class Side:
    """One kernel on a layer."""

    plan: Plan
    report: Report
    l2: int

    def cells(self) -> list[str]:
        r = self.report
        return [
            self.plan.name,
            f"{r.instructions} / {r.mma}",
            str(r.drains),
            f"{pressure(r, self.plan, precision(NUMERICS), DEVICES[ARCH]):.2f}",
            f"{self.l2 / 2**20:.0f}",
        ]


def _steps(case: cases.Case, batch: int) -> Iterator[StepRun]:
    yield from (run for run in Recorder(case, NUMERICS)(batch, ARCH) if isinstance(run, StepRun) and run.calls)


def compare(names: Iterable[str], inspections: Inspections) -> Iterator[tuple[str, Side, Side | str]]:
    """(layer and batch, the pointer kernel, this one or why not)."""
    device, wanted = DEVICES[ARCH], []
    for case in cases.find(list(names)):
        batch = case.batches[-1]
        for run in _steps(case, batch):
            assert run.plan is not None
            size = tuple(n + 2 * p for n, p in zip(run.input_shape[2:], run.step.pad, strict=True))
            asked = (run.step, batch, size, precision(NUMERICS), device)
            other = next(iter(conv_hopper_plan.candidates(*asked)), None)
            reason = conv_hopper_plan.why_not(*asked)
            job = None if other is None else job_of(run.step, run.input_shape, other)
            wanted.append((f"{case.name}, batch {batch}", run, run.main.job, other, job, reason))
    reports = inspections.of(job for w in wanted for job in (w[2], w[4]) if job is not None)
    for name, run, pointer, other, job, reason in wanted:

        def side(plan: Plan, job: Job, run: StepRun = run) -> Side:
            report = reports[job.key]
            if isinstance(report, Failed):
                raise RuntimeError(report.message)
            return Side(plan, report, l2_bytes(plan, run.input_shape[0], run.output_shape[2:], run.step.spec))

        assert run.plan is not None
        yield name, side(run.plan, pointer), str(reason) if other is None or job is None else side(other, job)


def main() -> int:
    body, bad = [], []
    for name, pointer, boxes in compare(LAYERS, Inspections(1)):
        if isinstance(boxes, str):
            body.append([name, *pointer.cells(), boxes, "", "", "", ""])
            continue
        body.append([name, *pointer.cells(), *boxes.cells()])
        assert isinstance(boxes.plan, BoxPlan)
        bad += [f"{name}: {text}" for text in rules(boxes.report, boxes.plan, DEVICES[ARCH])]
    cells = ["instructions / wgmma", "full waits", "issue", "L2, MiB"]
    print(*table(["layer", "pointer kernel", *cells, "boxes", *cells], body, (0, 1, 6)), sep="\n")
    print(*bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
