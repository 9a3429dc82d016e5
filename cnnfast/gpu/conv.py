"""From a step and its tensors to a launch: operands in the kernel's layouts, and the constants of the launch,
cached."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from ..kernels import conv_transpose as kernels
from ..memory_format import LAST, new_strides, to_format
from ..norms import Partials
from ..spec import INT32, Precision
from ..step import Operands, Step
from . import conv_hopper_plan, fence, guard, trial, tuned
from .binary import MAX_REGISTERS, Binary, aligned, unused
from .conv_choice import choose_plan
from .conv_hopper_plan import BoxPlan
from .conv_plan import Plan, by_axis, in_three
from .devices import Device, allocate, cuda_index, on_device, precision_of, target_device
from .observers import OBSERVERS, of_launch, of_step
from .weight import kernel_weight, weight_layout

if TYPE_CHECKING:
    from .conv_hopper import Boxes

__all__ = ["lookup", "prepare", "run", "run_with_statistics"]


# --- the launch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Everything of a launch that does not depend on the tensors' contents or addresses."""

    plan: Plan
    binary: Binary  # of `conv_transpose_kernel`, or `conv_hopper_kernel` where the plan is of boxes
    grid: tuple[int, int, int]
    output_shape: tuple[int, ...]
    output_strides: tuple[int, ...]
    numbers: tuple[int | None, ...]  # images, planes, rows and columns of x and of the result, parts of K
    reduce: Binary | None  # of `split_k_epilogue_kernel` where K is split
    reduce_grid: tuple[int, int, int]
    reduce_numbers: tuple[int, ...]  # images, positions of the result, parts of K
    sums: int  # float32 values between the two
    parts: tuple[int, int] | None  # segments and parts of each, where the kernel gives the statistics of its result
    tf32: bool
    proof: guard.Proof  # whether the kernel may run on this GPU
    gathers: bool  # the weight is brought into an order of its own
    boxes: Boxes | None  # where the plan is of boxes
    bound: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # launches of its gradients


def constants(
    plan: Plan, precision: Precision, step: Step, channels_last: bool, slopes: int, big: bool, fenced: bool
) -> dict[str, Any]:
    """Compile-time arguments of `kernels.conv_transpose.conv_transpose_kernel`: the sizes of batch and image are
    not among them."""
    low = plan.lowering
    layout = weight_layout(low)
    params = (*step.activation.params, 0.0, 0.0)
    return dict(
        **low.constants(), EDGE=step.pad_mode if any(step.pad) else "zeros", **by_axis("EDGE_", step.pad, 0),
        W_GROUP=layout.group, W_TAP=layout.tap, W_K=layout.k, W_COL=layout.column,
        W_FIRST=layout.first, W_ROW=layout.row,
        Y_CHANNELS_LAST=channels_last, SLOPES=slopes, P0=params[0], P1=params[1], ACT=step.activation.name,
        TF32=3 if plan.three else int(precision.tf32),
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, GROUP_M=plan.group_m, UNROLL=plan.unroll,
        SPLIT_K=plan.splits, BIG=big, FENCE=fenced,
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip


REDUCE_M, REDUCE_N = 16, 64


@lru_cache(maxsize=4096)
def prepare(
    step: Step,
    batch: int,
    input_size: tuple[int, ...],
    precision: Precision,
    device: Device,
    channels_last: bool,
    slopes: int,
    plan: Plan | None = None,
    given: tuple[Any, ...] = (),
    index: int | None = None,
    statistics: str | None = None,
) -> Launch:
    """The launch of ``step`` on an input of this (padded) size. A given ``plan`` replaces the tuned one, or the
    heuristic's (tuning, tests). ``given``: the weight's strides and the dtypes of weight, residual and vectors, part
    of the binary. ``index``: of the CUDA device, None where there is none: nothing is guarded then, and nothing was
    tuned. ``statistics``: "batch" or "image", what the result's statistics are wanted of; `Launch.parts` says whether
    the kernel gives them."""
    s = step.spec
    if plan is None:
        plan = _plan(step, batch, input_size, precision, device, channels_last, index)
    out = s.output_size(input_size)
    own = [n - 2 * p for n, p in zip(input_size, step.pad, strict=True)]
    big = batch * max(s.in_channels * math.prod(input_size), s.out_channels * math.prod(out)) >= INT32
    reduce, reduce_grid = None, (0, 0, 0)
    boxes: Boxes | None = None
    if isinstance(plan, BoxPlan):
        reason = conv_hopper_plan.why_not(step, batch, input_size, precision, device, channels_last)
        if reason is not None:
            raise ValueError(f"{step.describe()} cannot run as {plan.name}: {reason}")
        hopper = _hopper()
        consts = hopper.constants(plan, step, slopes, big)
        boxes = hopper.boxes(plan, consts, precision.dtype, batch, input_size, out, device)
        binary, grid = boxes.binary, boxes.grid
        parts = hopper.parts(plan, batch, out, statistics)
    else:
        consts = constants(plan, precision, step, channels_last, slopes, big, fence.needed(device.arch))
        options = dict(num_warps=plan.num_warps, num_stages=plan.num_stages, maxnreg=MAX_REGISTERS)
        binary, grid = Binary(kernels.conv_transpose_kernel, consts, **options), plan.grid(batch, out)
        parts = _parts(plan, batch, out, statistics)
    if plan.split_k > 1:
        tile = {"BLOCK_M": REDUCE_M, "BLOCK_N": REDUCE_N}
        reduce = Binary(kernels.split_k_epilogue_kernel, {**consts, **tile}, maxnreg=MAX_REGISTERS)
        reduce_grid = (-(-batch * math.prod(out) // REDUCE_M), -(-s.out_channels // REDUCE_N), 1)
    proof = guard.UNGUARDED
    if index is not None:
        operands = tuple(str(g) if isinstance(g, torch.dtype) else g for g in given)
        proof = guard.proof(
            step,
            plan.name,
            index,
            {
                **consts,
                "dtype": str(precision.dtype),
                "operands": operands,
                "reduce": reduce is not None,
                "statistics": parts is not None,
            },
        )
    return Launch(
        plan,
        binary,
        grid,
        (batch, s.out_channels, *out),
        new_strides((batch, s.out_channels, *out), channels_last),
        (batch, *in_three(own), *in_three(out), plan.split_k),
        reduce,
        reduce_grid,
        (batch, math.prod(out), plan.split_k),
        plan.split_k * batch * s.out_channels * math.prod(out),
        parts,
        precision.tf32,
        proof,
        step.upsample is not None or weight_layout(plan.lowering).packed,
        boxes,
    )


def _plan(
    step: Step,
    batch: int,
    input_size: tuple[int, ...],
    precision: Precision,
    device: Device,
    channels_last: bool,
    index: int | None,
) -> Plan:
    """The tuned plan, or the heuristic's."""
    s, plan = step.spec, None
    if index is not None:
        plan = tuned.stored(s, batch, input_size, precision, device, index, channels_last)
    if isinstance(plan, BoxPlan) and plan not in conv_hopper_plan.candidates(
        step, batch, input_size, precision, device, channels_last
    ):  # a damaged record, or one of the same convolution with other borders
        plan = None
    plan = plan or conv_hopper_plan.chosen(step, batch, input_size, precision, device, channels_last)
    return plan or choose_plan(s, batch, input_size, precision, device, channels_last)


def _hopper() -> ModuleType:
    """The launcher of a kernel in Gluon, which not every Triton has."""
    from . import conv_hopper

    return conv_hopper


def _parts(plan: Plan, batch: int, out: Sequence[int], statistics: str | None) -> tuple[int, int] | None:
    """(segments, parts of each) of the statistics that the kernel gives with its result; None where its tiles do not
    allow it: columns of several phases, or tiles that cross from one image to the next where images count apart."""
    low = plan.lowering
    if statistics is None or low.merged:
        return None
    segments = 1 if statistics == "batch" else batch
    if plan.split_k > 1:
        parts, block, rows = -(-batch * math.prod(out) // REDUCE_M), REDUCE_M, [math.prod(out)]
    else:
        parts, block = plan.tiles_of(low.rows(batch, tuple(out))) // -(-low.columns // plan.block_n), plan.block_m
        sizes = (
            {ph.size(n, step) for ph in phases[:step]}
            for phases, n, step in zip(low.spec.phases, out, low.phases, strict=True)
        )
        rows = [math.prod(size) for size in itertools.product(*sizes)]
    if segments > 1 and (len(rows) > 1 or rows[0] % block):
        return None
    return segments, parts // segments


def lookup(
    step: Step, o: Operands, channels_last: bool, plan: Plan | None = None, statistics: str | None = None
) -> Launch:
    """The launch of ``step`` on these operands, a dictionary's look-up after the first time."""
    x, weight, bias, mean, var, scale, shift, residual, slope, *_ = o
    shape = x.shape
    size: tuple[int, ...] = shape[2:]
    if any(step.pad):
        size = tuple([n + 2 * p for n, p in zip(size, step.pad, strict=True)])
    return prepare(
        step,
        shape[0],
        size,
        precision_of(x.dtype),
        target_device(x),
        channels_last,
        0 if slope is None else slope.numel(),
        plan,
        (
            weight.stride(),
            weight.dtype,
            None if residual is None else residual.dtype,
            None if bias is None else bias.dtype,
            None if mean is None else mean.dtype,
            None if var is None else var.dtype,
            None if scale is None else scale.dtype,
            None if shift is None else shift.dtype,
            None if slope is None else slope.dtype,
        ),
        cuda_index(x),
        statistics,
    )


def run(
    step: Step, o: Operands, channels_last: bool, plan: Plan | None = None, required: bool = True
) -> torch.Tensor | None:
    """Launch the kernel. x in any layout; the result in the memory format asked for. The caller asked
    `why_not.why_not`.

    Where `guard` finds that the kernel must not run: RuntimeError if ``required``, else None.
    """
    both = run_with_statistics(step, o, channels_last, None, plan, required)
    return None if both is None else both[0]


def run_with_statistics(
    step: Step,
    o: Operands,
    channels_last: bool,
    statistics: str | None,
    plan: Plan | None = None,
    required: bool = True,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, Partials | None] | None:
    """`run`, and the statistics of the result as stored: of the whole "batch" or of each "image", by parts; None in
    their place where the tiles do not allow it. ``launch``: `lookup` of all this, where it is at hand."""
    if OBSERVERS:
        of_step(step, o, channels_last)
    x = o.x
    if x.shape[0] == 0 or step.spec.out_channels == 0:
        shape = (x.shape[0], step.spec.out_channels, *step.output_size(x.shape[2:]))
        return allocate(x, shape, channels_last), None
    launch = launch or lookup(step, o, channels_last, plan, statistics)
    if launch.proof.ready:
        both: Result | None = _start(step, o, channels_last, launch)
    else:
        both = _first_use(step, o, channels_last, launch, required)
        if both is None:
            return None
    if OBSERVERS:
        of_launch(launch.plan.name)
    return both


Result = tuple[torch.Tensor, Partials | None]


def _first_use(step: Step, o: Operands, channels_last: bool, launch: Launch, required: bool) -> Result | None:
    def start(some: Operands) -> Result:
        return _start(step, some, channels_last, launch)

    def problem() -> str | None:
        return trial.problem(start, step, o, launch.tf32)

    return guard.first_use(launch.proof, lambda: start(o), problem, required)


def _start(step: Step, o: Operands, channels_last: bool, launch: Launch) -> Result:
    """The launch, on the device of the tensors, with every operand in its layout and at an address that 16 divides:
    anything else would be another binary, with narrow loads, and unproven."""
    x, weight, bias, mean, var, scale, shift, residual, slope, *_ = o
    with on_device(x):
        last = LAST[x.dim()]
        x, weight = aligned(x.contiguous(memory_format=last)), aligned(weight)
        if launch.gathers:
            weight = kernel_weight(step, launch.plan.lowering, weight)
        else:  # read in place
            weight = weight.contiguous(memory_format=last)
        if residual is not None:
            residual = aligned(to_format(residual, channels_last))
        vectors = [
            v
            if v is None or not v.data_ptr() & 15 and v.is_contiguous()
            else v.clone(memory_format=torch.contiguous_format)
            for v in (bias, mean, var, scale, shift, slope)
        ]
        y = torch.empty_strided(launch.output_shape, launch.output_strides, dtype=x.dtype, device=x.device)
        partials = None if launch.parts is None else Partials.empty(y, (*launch.parts, launch.output_shape[1]))
        stats = None if partials is None else partials.stats
        _launch(x, weight, y, residual, vectors, stats, 0.0 if step.norm is None else float(step.norm.eps), launch)
    return y, partials


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    residual: torch.Tensor | None,
    vectors: Sequence[torch.Tensor | None],
    stats: torch.Tensor | None,
    eps: float,
    launch: Launch,
) -> None:
    """Fill y. x and weight in the kernel's layouts, y and residual in one memory format; ``vectors``: bias, mean, var,
    scale, shift and slope, each (C_out,) or None; ``stats`` float32, of ``launch.parts`` parts, or None."""
    if launch.boxes is not None:
        launch.boxes.launch(x, weight, y, residual, vectors, stats, eps)
        return
    reduce = launch.reduce
    if reduce is None:
        work = unused(y.device) if launch.plan.splits else None
    else:
        work = y.new_empty(launch.sums, dtype=torch.float32)
    # With a split and without one the same arguments, so that it is the same binary.
    launch.binary(launch.grid, x, weight, y, work, residual, *vectors, stats, *launch.numbers, eps)
    if reduce is not None:
        reduce(launch.reduce_grid, work, y, residual, *vectors, stats, *launch.reduce_numbers, eps)
