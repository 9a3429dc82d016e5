"""From a step and its tensors to a launch: operands in the kernel's layouts, and the constants of the launch,
cached."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from .. import dispatch, guard, tuned
from ..block import Operands, Step
from ..kernels import conv_transpose as kernels
from ..plan import Device, Lowering, Plan, choose_plan, tap_map
from ..spec import Precision, tap_inverse

__all__ = ["LAUNCHES", "kernel_weight", "prepare", "run"]


# --- weights ----------------------------------------------------------------------------------------------------------


def _identity_map(low: Lowering) -> bool:
    """Whether a merged lowering's columns, in order, are exactly the taps of the weight: (kh, kw, channel)."""
    return low.kernel == (1, 1) and tap_map(low) == tuple([[t] for t in range(k)] for k in low.spec.kernel_size)


@dataclass(frozen=True)
class WeightLayout:
    """How the kernel addresses a weight: element (group, tap, k, column) at their products with these strides.

    ``packed``: the tensor is `pack`'s; otherwise it is the channels_last parameter itself, read in place.
    """

    packed: bool
    group: int
    tap: int
    k: int
    column: int


@lru_cache(maxsize=4096)
def weight_layout(low: Lowering) -> WeightLayout:
    s = low.spec
    taps, cin = math.prod(s.kernel_size), s.in_channels // s.groups
    cout = s.out_channels // s.groups
    if not s.transposed:  # [C_out][tap][C_in/g]
        return WeightLayout(False, cout * taps * cin, cin, 1, taps * cin)
    if low.regime == "phases":  # [C_in][tap][C_out/g]
        return WeightLayout(False, cin * taps * cout, cout, taps * cout, 1)
    if _identity_map(low):
        return WeightLayout(False, cin * taps * cout, 0, taps * cout, 1)
    union, columns = math.prod(low.kernel), low.columns
    return WeightLayout(True, union * cin * columns, cin * columns, columns, 1)


@lru_cache(maxsize=256)
def _pack_index(low: Lowering, strides: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where each element of `pack`'s result lies in the memory of a dense weight with these strides; one past its end
    stands for zero. int32; made once, so that a call copies nothing from the host."""
    s = low.spec
    cin, cout = low.channels_in, s.out_channels // s.groups
    map_h, map_w = (torch.tensor(m) for m in tap_map(low))  # (merge, union taps)
    a, u = map_h.shape
    b, v = map_w.shape
    channel = torch.arange(s.groups * cin).view(s.groups, 1, 1, cin, 1, 1, 1) * strides[0]
    column = torch.arange(cout).view(1, 1, 1, 1, 1, 1, cout) * strides[1]
    th, tw = map_h.t().view(1, u, 1, 1, a, 1, 1), map_w.t().view(1, 1, v, 1, 1, b, 1)
    index = channel + column + th * strides[2] + tw * strides[3]
    index = torch.where((th < 0) | (tw < 0), math.prod(s.weight_shape), index)
    return index.flatten().to(torch.int32).to(device)


def pack(low: Lowering, weight: torch.Tensor) -> torch.Tensor:
    """(C_in, C_out/g, kh, kw) -> (g, union taps, C_in/g, merge_h * merge_w * C_out/g), flat, zeros where a phase lacks
    a tap. Two small launches."""
    if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
        weight = weight.contiguous()
    index = _pack_index(low, weight.stride(), weight.device)
    return F.pad(weight.as_strided((weight.numel(),), (1,)), (0, 1)).index_select(0, index)


def kernel_weight(step: Step, low: Lowering, weight: torch.Tensor) -> torch.Tensor:
    """The weight as `weight_layout` addresses it. A channels_last parameter is used in place; others are copied each
    call, so that no write to a parameter, ``.data`` included, can go unseen."""
    weight = step.conv_weight(weight)
    if weight_layout(low).packed:
        return pack(low, weight)
    return weight.contiguous(memory_format=torch.channels_last)


# --- the launch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Everything of a launch that does not depend on the tensors' contents or addresses."""

    plan: Plan
    constants: tuple[Any, ...]  # compile-time arguments of `conv_transpose_kernel` in its order
    options: dict[str, Any]  # grid, warps and stages, as Triton's `run` takes them
    output_shape: tuple[int, int, int, int]
    reduce: tuple[Any, ...] | None  # those of `split_k_epilogue_kernel` where K is split
    reduce_grid: tuple[int, int, int]
    proof: guard.Proof = guard.UNGUARDED  # whether the kernel may run on this GPU


LAUNCHES: list[str] | None = None
"""Set to a list to record the kernel and plan of every launch (tests assert what ran)."""


def _in_order(kernel: Any, values: dict[str, Any]) -> tuple[Any, ...]:
    """Positional: passing them by name costs 5 us a launch."""
    return tuple(values[name] for name in kernel.arg_names if name in values)


def constants(
    plan: Plan, precision: Precision, step: Step, channels_last: bool, slopes: int, big: bool
) -> dict[str, Any]:
    """Compile-time arguments of `conv_transpose_kernel`. Sizes of the batch and the image are not among them."""
    low = plan.lowering
    s, layout = low.spec, weight_layout(low)
    params = (*step.activation.params, 0.0, 0.0)
    gcd = [math.gcd(st, d) if low.transposed else 1 for st, d in zip(s.stride, s.dilation, strict=True)]
    inverse = [tap_inverse(st, d) if low.transposed else 0 for st, d in zip(s.stride, s.dilation, strict=True)]
    dilation = (1, 1) if low.merged else s.dilation
    return dict(
        GROUPS=s.groups, CIN=low.channels_in, COUT=s.out_channels, COLS=low.columns,
        KH=low.kernel[0], KW=low.kernel[1], SH=low.phases[0], SW=low.phases[1],
        PAD_H=low.padding[0], PAD_W=low.padding[1], DH=dilation[0], DW=dilation[1],
        GH=gcd[0], GW=gcd[1], INV_H=inverse[0], INV_W=inverse[1], TRANSPOSED=low.transposed,
        TAPS_H=low.uniform_taps(0), TAPS_W=low.uniform_taps(1), MAX_TAPS=low.max_taps,
        MERGE_H=low.merge[0], MERGE_W=low.merge[1],
        W_GROUP=layout.group, W_TAP=layout.tap, W_K=layout.k, W_COL=layout.column,
        Y_CHANNELS_LAST=channels_last, SLOPES=slopes, P0=params[0], P1=params[1], ACT=step.activation.name,
        TF32=precision.tf32, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, GROUP_M=plan.group_m,
        UNROLL=plan.unroll, SPLIT_K=plan.splits, BIG=big, num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip


REDUCE_M, REDUCE_N = 16, 64


@lru_cache(maxsize=4096)
def prepare(
    step: Step,
    batch: int,
    input_size: tuple[int, int],
    precision: Precision,
    device: Device,
    channels_last: bool,
    slopes: int,
    plan: Plan | None = None,
    given: tuple[Any, ...] = (),
    index: int | None = None,
) -> Launch:
    """The launch of ``step`` on a (padded) input of this size. A given ``plan`` replaces the tuned one, or the
    heuristic's (tuning, tests). ``given``: the weight's strides and the dtypes of residual and vectors, part of the
    binary. ``index``: of the CUDA device, None where there is none: nothing is guarded then, and nothing was tuned."""
    s = step.spec
    if plan is None and index is not None:
        plan = tuned.stored(s, batch, input_size, precision, device, index)
    plan = plan or choose_plan(s, batch, input_size, precision, device)
    out = s.output_size(input_size)
    big = batch * max(s.in_channels * math.prod(input_size), s.out_channels * math.prod(out)) >= 2**31
    consts = constants(plan, precision, step, channels_last, slopes, big)
    reduce, reduce_grid = None, (0, 0, 0)
    if plan.split_k > 1:
        reduce = _in_order(kernels.split_k_epilogue_kernel, {**consts, "BLOCK_M": REDUCE_M, "BLOCK_N": REDUCE_N})
        reduce_grid = (-(-batch * math.prod(out) // REDUCE_M), -(-s.out_channels // REDUCE_N), 1)
    proof = guard.UNGUARDED
    if index is not None:
        operands = tuple(str(g) if isinstance(g, torch.dtype) else g for g in given)
        proof = guard.proof(
            step,
            plan.name,
            index,
            {**consts, "dtype": str(precision.dtype), "operands": operands, "reduce": reduce is not None},
        )
    return Launch(
        plan,
        _in_order(kernels.conv_transpose_kernel, consts),
        dict(grid=plan.grid(batch, out), warmup=False, num_warps=plan.num_warps, num_stages=plan.num_stages),
        (batch, s.out_channels, out[0], out[1]),
        reduce,
        reduce_grid,
        proof,
    )


def run(
    step: Step, o: Operands, channels_last: bool, plan: Plan | None = None, required: bool = True
) -> torch.Tensor | None:
    """Launch the kernel. x in any layout; the result in the memory format asked for. The caller asked
    `dispatch.why_not`.

    Where `guard` finds that the kernel must not run: RuntimeError if ``required``, else None.
    """
    x, weight, bias, mean, var, _, scale, shift, residual, slope = o
    n, _, h, w = x.shape
    size = (h + 2 * step.pad[0], w + 2 * step.pad[1])
    if n == 0 or step.spec.out_channels == 0:
        return dispatch.allocate(x, (n, step.spec.out_channels, *step.spec.output_size(size)), channels_last)
    precision = dispatch.precision_of(x.dtype)
    launch = prepare(
        step,
        n,
        size,
        precision,
        dispatch.target_device(x),
        channels_last,
        0 if slope is None else slope.numel(),
        plan,
        (
            weight.stride(),
            None if residual is None else residual.dtype,
            None if bias is None else bias.dtype,
            None if mean is None else mean.dtype,
            None if var is None else var.dtype,
            None if scale is None else scale.dtype,
            None if shift is None else shift.dtype,
            None if slope is None else slope.dtype,
        ),
        x.device.index or 0 if x.is_cuda else None,
    )
    if launch.proof.ready:
        y = _start(step, o, channels_last, launch)
    else:
        first = guard.first_use(
            launch.proof, lambda some: _start(step, some, channels_last, launch), step, o, precision.tf32, required
        )
        if first is None:
            return None
        y = first
    if LAUNCHES is not None:
        LAUNCHES.append(launch.plan.name)
    return y


def _start(step: Step, o: Operands, channels_last: bool, launch: Launch) -> torch.Tensor:
    """The launch itself, with every operand in its layout and at an address that 16 divides: anything else would be
    another binary, with narrow loads, and unproven."""
    x = step.pad_input(o.x).contiguous(memory_format=torch.channels_last)
    if x.data_ptr() & 15:
        x = x.clone()
    weight = o.weight
    if weight.data_ptr() & 15:
        weight = weight.clone()
    weight = kernel_weight(step, launch.plan.lowering, weight)
    residual = o.residual
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        if residual.data_ptr() & 15:
            residual = residual.clone()
    vectors: list[torch.Tensor | None] = []
    for v in (o.bias, o.mean, o.var, o.scale, o.shift, o.slope):
        if v is not None and (v.data_ptr() & 15 or not v.is_contiguous()):
            v = v.clone(memory_format=torch.contiguous_format)
        vectors.append(v)
    y = dispatch.allocate(x, launch.output_shape, channels_last)
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernels.launch(x, weight, y, residual, vectors, o.eps, launch)
    else:
        kernels.launch(x, weight, y, residual, vectors, o.eps, launch)
    return y
