"""The weight gradient's launch: operands in the kernel's layouts, constants of the launch cached."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .. import dispatch
from ..devices import Device
from ..kernels import conv_wgrad as kernels
from ..kernels.conv_transpose import unused
from ..spec import ConvSpec, Precision
from ..wgrad import WgradPlan, choose_wgrad_plan
from . import launch as block

__all__ = ["WgradLaunch", "prepare", "run"]

SUM_BLOCK = 1024  # elements of a weight that a program of the second pass adds up


@dataclass(frozen=True)
class WgradLaunch:
    """Everything of a launch that does not depend on the tensors' contents or addresses."""

    plan: WgradPlan
    constants: tuple[Any, ...]
    options: dict[str, Any]
    sums: tuple[Any, ...] | None  # constants of `sum_splits_kernel` where the positions are split
    sums_grid: tuple[int, int, int]


@lru_cache(maxsize=4096)
def prepare(
    spec: ConvSpec,
    batch: int,
    grid: tuple[int, int],
    other: tuple[int, int],
    strides: tuple[int, ...],
    precision: Precision,
    device: Device,
    plan: WgradPlan | None = None,
) -> WgradLaunch:
    """The launch for A of ``batch`` images of size ``grid`` and B of size ``other``, into a weight with these
    strides. A given ``plan`` replaces the heuristic's (tests)."""
    s = spec
    plan = plan or choose_wgrad_plan(s, batch, grid, precision, device)
    (ca, cb), (kh, kw) = plan.channels, s.kernel_size
    big = batch * s.groups * max(ca * math.prod(grid), cb * math.prod(other)) >= 2**31
    out = dict(OUT_A=strides[0], OUT_B=strides[1], OUT_H=strides[2], OUT_W=strides[3])
    consts = dict(
        GROUPS=s.groups, CA=ca, CB=cb, KH=kh, KW=kw, SH=s.stride[0], SW=s.stride[1], PAD_H=s.padding[0],
        PAD_W=s.padding[1], DH=s.dilation[0], DW=s.dilation[1], **out, MERGED=plan.merged, TF32=precision.tf32,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, RUN=plan.run, BIG=big,
        A=s.groups * ca, BLOCK=SUM_BLOCK,
    )  # fmt: skip
    options = dict(
        grid=plan.grid(),
        warmup=False,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        maxnreg=block.MAX_REGISTERS,
    )
    return WgradLaunch(
        plan,
        block.in_order(kernels.conv_wgrad_kernel, consts),
        options,
        block.in_order(kernels.sum_splits_kernel, consts) if plan.splits > 1 else None,
        (-(-math.prod(s.weight_shape) // SUM_BLOCK), 1, 1),
    )


def run(
    x: torch.Tensor,
    grad: torch.Tensor,
    spec: ConvSpec,
    like: torch.Tensor,
    plan: WgradPlan | None = None,
    required: bool = True,
) -> torch.Tensor | None:
    """Gradient of the weight of ``spec`` (2-D), with the strides of ``like``: from x (N, C_in, H, W), the convolution's
    input, and ``grad`` (N, C_out, OH, OW), its result's gradient, of one dtype and in any layout."""
    a, b = (x, grad) if spec.transposed else (grad, x)
    out = torch.empty_like(like)
    if out.numel() == 0:
        return out
    if x.shape[0] == 0:
        return out.zero_()
    launch = prepare(
        spec,
        x.shape[0],
        (a.shape[2], a.shape[3]),
        (b.shape[2], b.shape[3]),
        out.stride(),
        dispatch.precision_of(x.dtype),
        dispatch.target_device(x),
        plan,
    )
    with dispatch.on_device(x):
        a, b = (block.aligned(t.contiguous(memory_format=torch.channels_last)) for t in (a, b))
        _launch(a, b, out, launch)
    if block.LAUNCHES is not None:
        block.LAUNCHES.append(launch.plan.name)
    return out


def _launch(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, launch: WgradLaunch) -> None:
    n, _, h, w = a.shape
    splits = launch.plan.splits
    work = unused(a.device) if splits == 1 else a.new_empty(launch.plan.workspace(), dtype=torch.float32)
    kernels.conv_wgrad_kernel.run(
        a, b, out, work, n, h, w, b.shape[2], b.shape[3], splits, *launch.constants, **launch.options
    )
    if launch.sums is not None:
        kernels.sum_splits_kernel[launch.sums_grid](work, out, splits, *launch.sums)
