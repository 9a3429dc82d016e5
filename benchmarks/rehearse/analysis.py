"""All that the rehearsal says of one fused step: the arithmetic of `model` judged by `rules`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch

from cnnfast.gpu.devices import Device
from cnnfast.spec import Precision

from . import rules
from .inspections import Failed
from .inspector import Report
from .launches import StepRun
from .model import bounds as bounds_of
from .model import occupancy, pressure, rate, tiles, traffic, work

__all__ = ["Analysis", "Passes", "Rehearsal", "Row", "analyse"]


@dataclass(frozen=True)
class Analysis:
    """What the rehearsal says of one fused step."""

    regime: str
    plan: str
    grid: tuple[int, int, int]
    programs: int
    blocks: int
    limit: str
    waves: float
    judged: bool  # the limit on issue pressure is for it
    over: float  # issue slots over the slower of tensor cores and memory
    registers: int
    shared: int
    spilled: int  # bytes of stack, or else instructions on local memory
    kind: str
    per_mma: float
    pressure: float
    instructions: int
    mma: int
    widths: dict[int, int]
    useful: float  # share of the executed multiply-adds
    ratio: float
    parts: dict[str, float]  # bytes by what moves them, over the least
    launches: int
    bound: str
    shares: dict[str, float]  # of the largest bound
    failures: tuple[str, ...]
    exceptions: tuple[str, ...]  # rules that no plan of the kernel could keep


def analyse(run: StepRun, reports: list[Report | Failed], precision: Precision, device: Device) -> Analysis | Failed:
    """``reports`` of ``run.calls``, in their order; `Failed` where a kernel did not compile."""
    if failed := [r for r in reports if isinstance(r, Failed)]:
        return failed[0]
    compiled = [r for r in reports if isinstance(r, Report)]
    call, plan = run.main, run.plan
    main = compiled[run.calls.index(call)]
    assert plan is not None
    fits = occupancy(main.registers, main.shared, main.num_warps, device)
    done, moved = work(run, plan), traffic(run, plan, fits.blocks, device)
    issue = pressure(main, plan, precision, device)
    waves = done.programs / (device.multiprocessors * max(1, fits.blocks))
    per_clock = rate(main.mma_kind, precision, device) / (3 if plan.three else 1)
    bounds = bounds_of(run, plan, done, moved, issue, per_clock, fits.blocks, device)
    top = max(bounds, key=lambda name: bounds[name])
    low = plan.lowering
    many = low.regime == "phases" and min(low.channels_in, low.columns) >= 32
    gemm = many and precision.dtype == torch.float16 and tiles(run, plan, 64) >= device.multiprocessors
    judged = gemm and bounds["tensor"] >= moved.least / device.dram_bytes_per_clock
    over = bounds["issue"] / max(bounds["tensor"], bounds["dram"])
    name = "starved" if top == "latency" and done.programs < device.multiprocessors else top
    crowded = rules.issue_slots(issue, judged)
    soft = [*crowded, *rules.ratios(plan, done, moved, name, device)]
    better, other = rules.better_plan(run, plan, precision, device, bool(crowded)) if soft else (None, None)
    failures = [
        *(rules.limits(r, device) for r in compiled),
        [*rules.grids(run.calls), *rules.loop(main, plan, call, precision), *rules.overflows(call, plan)],
        [f"{text}; {better} keeps the rules" for text in soft if better is not None],
    ]
    return Analysis(
        regime=plan.lowering.regime,
        plan=plan.name,
        grid=call.grid,
        programs=done.programs,
        blocks=fits.blocks,
        limit=fits.limit,
        waves=waves,
        judged=judged,
        over=over,
        registers=main.registers,
        shared=main.shared,
        spilled=max(r.stack or r.local for r in compiled),
        kind=main.mma_kind,
        per_mma=main.per_mma,
        pressure=issue,
        instructions=main.instructions,
        mma=main.mma,
        widths=main.widths,
        useful=done.useful / done.executed,
        ratio=moved.ratio,
        parts={k: v / moved.least for k, v in moved.parts.items() if v},
        launches=len(run.calls) + len(run.ops),
        bound=name,
        shares={k: v / bounds[top] for k, v in bounds.items()},
        failures=tuple(itertools.chain.from_iterable(failures)),
        exceptions=() if better else tuple(f"{text}; {other or 'no tile'} keeps the rules" for text in soft),
    )


@dataclass
class Row:
    """A fused step on one device: of several cases where they share it."""

    cases: list[str]
    modules: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    numerics: str
    arch: int
    binaries: tuple[str, ...] = ()
    result: Analysis | Failed | None = None
    why_not: str = ""  # PyTorch's operators run it

    @property
    def title(self) -> str:
        shapes = ("x".join(map(str, s[1:])) for s in (self.input_shape, self.output_shape))
        return f"{' -> '.join(shapes)}, batch {self.input_shape[0]}"

    @property
    def failures(self) -> tuple[str, ...]:
        if isinstance(self.result, Failed):
            return (f"does not compile: {self.result.message}",)
        return () if self.result is None else self.result.failures


@dataclass(frozen=True)
class Passes:
    """Launches and bytes of one forward of a case (fp16, sm_90, the largest batch)."""

    case: str
    batch: int
    ours: int
    eager: int
    inductor: int
    ours_bytes: int
    eager_bytes: int


@dataclass
class Rehearsal:
    rows: list[Row] = field(default_factory=list)
    passes: list[Passes] = field(default_factory=list)
    unrun: dict[str, dict[str, str]] = field(default_factory=dict)  # case -> module -> why PyTorch runs it
    binaries: int = 0
    compiled: int = 0
    seconds: float = 0.0

    @property
    def failing(self) -> list[Row]:
        return [r for r in self.rows if r.failures]
