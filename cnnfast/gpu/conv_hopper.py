"""Launches of `kernels/conv_hopper.py`: its compile-time constants, and the descriptors of its operands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..kernels.conv_hopper import conv_hopper_kernel
from ..spec import tap_inverse
from ..step import Step
from .binary import Binary
from .conv_hopper_plan import BoxPlan, read_stride
from .devices import Device

__all__ = ["binary", "constants", "grid", "launch", "parts"]


def constants(plan: BoxPlan, step: Step, slopes: int, big: bool) -> dict[str, Any]:
    """Compile-time arguments of `kernels.conv_hopper.conv_hopper_kernel`."""
    low = plan.lowering
    s = low.spec
    params = (*step.activation.params, 0.0, 0.0)
    gcd = [math.gcd(st, d) if s.transposed else 1 for st, d in zip(s.stride, s.dilation, strict=True)]
    inverse = [tap_inverse(st, d) if s.transposed else 0 for st, d in zip(s.stride, s.dilation, strict=True)]
    in_h, in_w = read_stride(s)
    return dict(
        GROUPS=s.groups, CIN=low.channels_in, COUT=s.out_channels, COLS=low.columns,
        KH=s.kernel_size[0], KW=s.kernel_size[1], SH=low.phases[0], SW=low.phases[1], IN_H=in_h, IN_W=in_w,
        PAD_H=s.padding[0], PAD_W=s.padding[1], DH=s.dilation[0], DW=s.dilation[1], GH=gcd[0], GW=gcd[1],
        INV_H=inverse[0], INV_W=inverse[1], TRANSPOSED=s.transposed, K_LAST=not s.transposed,
        SLOPES=slopes, P0=params[0], P1=params[1], ACT=step.activation.name,
        BOX_N=plan.box[0], BOX_H=plan.box[1], BOX_W=plan.box[2], BLOCK_N=plan.block_n, BLOCK_K=plan.block_k,
        CHUNK=plan.chunk, GROUP_M=plan.group_m, STAGES=plan.num_stages, BIG=big,
    )  # fmt: skip


def binary(plan: BoxPlan, consts: dict[str, Any]) -> Binary:
    return Binary(conv_hopper_kernel, consts, num_warps=plan.num_warps, maxnreg=plan.registers)


def grid(plan: BoxPlan, batch: int, output_size: tuple[int, ...], device: Device) -> tuple[int, int, int]:
    """As many programs as run at once, or as there are tiles."""
    return min(plan.tiles(batch, output_size), plan.blocks * device.multiprocessors), 1, 1


def parts(plan: BoxPlan, batch: int, output_size: Sequence[int], statistics: str | None) -> tuple[int, int] | None:
    """(segments, parts of each) of the statistics that the kernel gives with its result: of the whole "batch", or of
    each "image" where a box lies in one; None where it gives none."""
    if statistics is None or (statistics == "image" and plan.box[0] > 1):
        return None
    count = math.prod(plan.boxes(batch, output_size)) * math.prod(plan.lowering.phases)
    segments = 1 if statistics == "batch" else batch
    return segments, count // segments


def _descriptor(
    t: torch.Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]
) -> TensorDescriptor:
    """Of ``t``'s memory in this form; a box lies in shared memory as the tensor cores and the copies want it."""
    width = min(128, block[-1] * t.element_size())
    layout = NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * t.element_size(), rank=len(block))
    return TensorDescriptor(t, list(shape), list(strides), list(block), layout)


def _image(t: torch.Tensor, step: Sequence[int], block: Sequence[int]) -> TensorDescriptor:
    """Of t (N, C, H, W), channels-last, as (N, H / step, step, W / step, step * C)."""
    n, c, h, w = t.shape
    sh, sw = step
    shape = (n, h // sh, sh, w // sw, sw * c)
    return _descriptor(t, shape, (h * w * c, sh * w * c, w * c, sw * c, 1), block)


def launch(
    run: Binary,
    where: tuple[int, int, int],
    plan: BoxPlan,
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    residual: torch.Tensor | None,
    vectors: Sequence[torch.Tensor | None],
    stats: torch.Tensor | None,
    eps: float,
) -> None:
    """Fill y. x, y and residual channels-last, weight as `weight.weight_layout` has it; ``vectors``: bias, mean, var,
    scale, shift and slope, each (C_out,) or None; ``stats`` float32, of `parts`, or None."""
    low = plan.lowering
    s = low.spec
    taps, k, n = math.prod(s.kernel_size), plan.block_k, plan.block_n
    x_desc = _image(x, read_stride(s), (plan.box[0], plan.box[1], 1, plan.box[2], k))
    y_desc = _image(y, low.phases, (plan.box[0], plan.box[1], 1, plan.box[2], plan.chunk))
    if s.transposed:  # [C_in][tap][C_out/g]
        rows, last, block = s.in_channels, low.columns, (k, 1, n)
    else:  # [C_out][tap][C_in/g]
        rows, last, block = s.out_channels, low.channels_in, (n, 1, k)
    w_desc = _descriptor(weight, (rows, taps, last), (taps * last, last, 1), block)
    qh, qw = (size // p for size, p in zip(y.shape[2:], low.phases, strict=True))
    run(where, x_desc, w_desc, y_desc, residual, *vectors, stats, x.shape[0], qh, qw, eps)
