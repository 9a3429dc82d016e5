"""Weights in the kernel's layouts: read in place where they lie right, else brought there by one launch a call."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch

from .. import dispatch
from ..activations import Activation
from ..gradients import restrided
from ..kernels.weight import gather_weight_kernel
from ..reference import conv_weight
from ..spec import summed_taps
from ..step import Step
from . import guard, trial
from .binary import Binary
from .conv_plan import Lowering, tap_map
from .devices import allocate, cuda_index, on_device

__all__ = ["WeightLayout", "kernel_weight", "summed_weight", "weight_layout"]


@dataclass(frozen=True)
class WeightLayout:
    """How the kernel addresses a weight: element (group, tap, k, column) at ``first`` and their products with these
    strides.

    Where ``row`` is not 0, a column is (phase row, phase column, output channel), and a phase row is that far from the
    next; otherwise columns are ``column`` apart. ``packed``: in an order that no parameter has; otherwise it is a
    channels_last weight of the convolution.
    """

    packed: bool
    group: int
    tap: int
    k: int
    column: int
    first: int = 0
    row: int = 0


def _run_of_taps(low: Lowering) -> int | None:
    """For a merged lowering of one tap whose phases take consecutive taps, the first of them, as the weight counts
    them. In three dimensions only where those of a plane are all of them: the kernel steps over rows alone."""
    kernel = low.spec.kernel_size
    if max(low.kernel) > 1 or len(kernel) > 2 and low.merge[1:] != kernel[1:]:
        return None
    maps = [[row[0] for row in dim] for dim in tap_map(low)]
    if any(taps != list(range(taps[0], taps[0] + len(taps))) or taps[0] < 0 for taps in maps):
        return None
    first = 0
    for taps, size in zip(maps, kernel, strict=True):
        first = first * size + taps[0]
    return first


@lru_cache(maxsize=4096)
def weight_layout(low: Lowering) -> WeightLayout:
    s = low.spec
    taps, cin = math.prod(s.kernel_size), s.in_channels // s.groups
    cout = s.out_channels // s.groups
    if not s.transposed:  # [C_out][tap][C_in/g]
        return WeightLayout(False, cout * taps * cin, cin, 1, taps * cin)
    if low.regime == "phases":  # [C_in][tap][C_out/g]
        return WeightLayout(False, cin * taps * cout, cout, taps * cout, 1)
    run = _run_of_taps(low)
    if run is not None:
        # 0: the rows of taps are consecutive too
        row = 0 if low.merge[1:] == s.kernel_size[1:] else s.kernel_size[-1] * cout
        return WeightLayout(False, cin * taps * cout, 0, taps * cout, 1, run * cout, row)
    union, columns = math.prod(low.kernel), low.columns
    return WeightLayout(True, union * cin * columns, cin * columns, columns, 1)


# --- gathered weights -------------------------------------------------------------------------------------------------

BLOCK = 32  # channels of a tile, in and out


@dataclass(frozen=True)
class _Gather:
    """A launch of `gather_weight_kernel` that depends on nothing but the layer and its weight's strides and dtype."""

    table: torch.Tensor
    size: int
    grid: tuple[int, int, int]
    binary: Binary
    proof: guard.Proof = guard.UNGUARDED  # of a launch of its own; one ahead of a convolution is proven with that


@cache
def _table(slots: tuple[tuple[int, ...], ...], device: torch.device) -> torch.Tensor:
    """The offsets of the taps that make each slot, filled up with -1 to the most of any: (slots, terms), int32, on
    ``device``. Kept for good, a few hundred bytes for each geometry: a captured graph reads it at its address."""
    terms = max(1, *map(len, slots))
    return torch.tensor([[*taps, *[-1] * (terms - len(taps))] for taps in slots], dtype=torch.int32).to(device)


def _taps_of(step: Step) -> list[list[list[int]]]:
    """Per dimension, the taps of the layer's own weight that make each tap of ``step.spec``'s."""
    kernel = step.spec.kernel_size
    if step.upsample is None:
        return [[[t] for t in range(k)] for k in kernel]
    return [summed_taps(k - r + 1, r) for k, r in zip(kernel, step.upsample.scale, strict=True)]


def _offsets(taps: Sequence[Sequence[int]], strides: Sequence[int]) -> tuple[int, ...]:
    """Of a weight's taps, given by those of each dimension, in its memory."""
    return tuple(sum(map(operator.mul, tap, strides)) for tap in itertools.product(*taps))


@lru_cache(maxsize=256)
def _gather(step: Step, low: Lowering, strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Gather:
    """How to bring a weight with these strides into the kernel's order."""
    s, layout = step.spec, weight_layout(low)
    cin, cout = low.channels_in, s.out_channels // s.groups
    taps = _taps_of(step)
    if layout.packed:
        phases, maps = math.prod(low.merge), tap_map(low)
        union, merged = (list(itertools.product(*map(range, sizes))) for sizes in (low.kernel, low.merge))
        slots = [tuple(m[a][u] for m, a, u in zip(maps, b, v, strict=True)) for v in union for b in merged]
    else:
        phases = 1
        slots = list(itertools.product(*map(range, s.kernel_size)))
    summed = [
        () if min(slot) < 0 else _offsets([of[t] for of, t in zip(taps, slot, strict=True)], strides[2:])
        for slot in slots
    ]
    table = _table(tuple(summed), device)
    # Transposed: (C_in, C_out/g); the convolution after an upsampling: (C_out, C_in/g).
    of_in, of_out = strides[:2] if step.upsample is None else (strides[1], strides[0])
    of_group = cin * strides[0] if step.upsample is None else cout * strides[0]
    columns = phases * cout
    in_order = dict(OUT_GROUP=layout.group, OUT_TAP=layout.tap, OUT_IN=layout.k) if layout.packed else dict(
        OUT_GROUP=cin * len(slots) * cout, OUT_TAP=cout, OUT_IN=len(slots) * cout
    )  # fmt: skip
    return _Gather(
        table,
        s.groups * cin * len(slots) // phases * columns,
        (-(-cin // BLOCK) * -(-cout // BLOCK), len(slots), s.groups),
        Binary(gather_weight_kernel, dict(
            CIN=cin, COUT=cout, W_GROUP=of_group, W_IN=of_in, W_OUT=of_out, **in_order, PHASES=phases,
            TERMS=table.shape[1],
            BLOCK_I=BLOCK, BLOCK_O=BLOCK,
        )),
    )  # fmt: skip


def kernel_weight(step: Step, low: Lowering, weight: torch.Tensor) -> torch.Tensor:
    """The weight as `weight_layout` addresses it, where that is not its own memory, channels-last: gathered on each
    call, so that no write to a parameter, ``.data`` included, can go unseen."""
    g = _gather(step, low, weight.stride(), weight.dtype, weight.device)
    out = weight.new_empty(g.size)
    g.binary(g.grid, weight, g.table, out)
    return out


# --- summed weights, with gradients -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightSum:
    """What the kernel computes, for `guard`: `summed_weight`, or its gradient (``back``)."""

    step: Step
    back: bool

    def describe(self) -> str:
        return f"{'gradient of the ' if self.back else ''}summed weight of {self.step.describe()}"

    def concerns(self, step: Step) -> bool:
        return self.step == replace(step, activation=Activation())


@lru_cache(maxsize=256)
def _sum(
    step: Step,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    index: int | None,
    back: bool,
) -> _Gather:
    """How to sum the taps of a weight (C_out, C_in/g, *kernel) with these strides to ``step.spec``'s, or, ``back``, the
    taps of the latter's gradient (C_in, C_out/g, *KERNEL) to the former's. Results are channels_last. ``index``: of the
    CUDA device, None where there is none."""
    s = step.spec
    sums = _taps_of(step)
    outer, inner = s.in_channels // s.groups, s.out_channels // s.groups
    if back:
        outer, inner = inner, outer
        sums = [
            [[j for j, taps in enumerate(of) if t in taps] for t in range(len(of) - r + 1)]
            for of, r in zip(sums, step.upsample.scale, strict=True)  # type: ignore[union-attr]
        ]
    slots = tuple(_offsets(terms, strides[2:]) for terms in itertools.product(*sums))
    table, taps = _table(slots, device), len(slots)
    consts = dict(
        CIN=outer, COUT=inner, W_GROUP=inner * strides[0], W_IN=strides[1], W_OUT=strides[0],
        OUT_GROUP=outer * taps * inner, OUT_TAP=inner, OUT_IN=taps * inner, PHASES=1, TERMS=table.shape[1],
        BLOCK_I=BLOCK, BLOCK_O=BLOCK,
    )  # fmt: skip
    proof = guard.UNGUARDED
    if index is not None:
        subject = WeightSum(replace(step, activation=Activation()), back)
        proof = guard.proof(subject, "gather", index, {**consts, "dtype": str(dtype)})
    grid = (-(-outer // BLOCK) * -(-inner // BLOCK), taps, s.groups)
    return _Gather(table, s.groups * outer * taps * inner, grid, Binary(gather_weight_kernel, consts), proof)


def _summed(weight: torch.Tensor, step: Step, back: bool, required: bool) -> torch.Tensor:
    index = cuda_index(weight)
    g = _sum(step, weight.stride(), weight.dtype, weight.device, index, back)
    if g.proof.ready:
        return _launch_sum(weight, step, back, g)

    def problem() -> str | None:
        return trial.problem_of(
            lambda weight: {"weight": _launch_sum(weight, step, back, g)},
            lambda weight: {"weight": _sum_by_torch(weight, step, back)},
            {"weight": weight},
        )

    out = guard.first_use(g.proof, lambda: _launch_sum(weight, step, back, g), problem, required)
    return _sum_by_torch(weight, step, back) if out is None else out


def _sum_by_torch(weight: torch.Tensor, step: Step, back: bool) -> torch.Tensor:
    if not back:
        return conv_weight(step, weight)
    # Not like ``weight``, which may be a batch.
    like = torch.zeros(step.weight_shape, dtype=weight.dtype, device=weight.device, requires_grad=True)
    with torch.enable_grad():
        (dw,) = torch.autograd.grad(conv_weight(step, like), like, weight)
    return dw


def _launch_sum(weight: torch.Tensor, step: Step, back: bool, g: _Gather) -> torch.Tensor:
    out = allocate(weight, step.weight_shape if back else step.spec.weight_shape, channels_last=True)
    source = weight.clone() if weight.data_ptr() & 15 else weight  # another alignment would be another binary
    g.binary(g.grid, source, g.table, out)
    return out


class _Summed(torch.autograd.Function):
    """The sums are linear, and the derivative of either direction is the other one."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, step: Step, back: bool, required: bool) -> torch.Tensor:
        ctx.how, ctx.like = (step, not back, required), torch.empty_like(weight, device="meta").stride()
        return _summed(weight, step, back, required)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        if dispatch.is_batched(grad):
            return _sum_by_torch(grad, *ctx.how[:2]), None, None, None
        with on_device(grad):
            dw = _Summed.apply(grad, *ctx.how)
        return restrided(dw, ctx.like), None, None, None  # a parameter's gradient has its strides


def summed_weight(step: Step, weight: torch.Tensor, required: bool = False) -> torch.Tensor:
    """The weight of ``step.spec`` from the layer's own, as `reference.conv_weight`, by one launch; differentiable any
    number of times. An upsampling's (C_in, C_out/g, kh + r - 1, kw + r - 1) is channels_last. ``required``:
    RuntimeError where the kernel cannot run, instead of PyTorch's operators."""
    if step.upsample is None:
        return weight
    with on_device(weight):
        return _Summed.apply(weight, step, False, required)
