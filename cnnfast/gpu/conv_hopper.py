"""Launches of `kernels/conv_hopper.py`: its compile-time constants, and the descriptors of its operands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..kernels.conv_hopper import conv_hopper_kernel
from ..step import Step
from .binary import Binary
from .conv_hopper_plan import BoxPlan
from .devices import Device

__all__ = ["Boxes", "boxes", "constants", "parts"]


def constants(plan: BoxPlan, step: Step, slopes: int, big: bool) -> dict[str, Any]:
    """Compile-time arguments of `kernels.conv_hopper.conv_hopper_kernel`."""
    low, params = plan.lowering, (*step.activation.params, 0.0, 0.0)
    return dict(
        **low.constants(), K_LAST=not low.transposed,
        SLOPES=slopes, P0=params[0], P1=params[1], ACT=step.activation.name,
        BOX_N=plan.box[0], BOX_H=plan.box[1], BOX_W=plan.box[2], BLOCK_N=plan.block_n, BLOCK_K=plan.block_k,
        CHUNK=plan.chunk, GROUP_M=plan.group_m, STAGES=plan.num_stages, BIG=big,
    )  # fmt: skip


@dataclass(frozen=True)
class Boxes:
    """A launch but for its tensors: the binary, the programs, x, w and y as descriptors of nothing, and the size of a
    phase."""

    binary: Binary
    grid: tuple[int, int, int]
    forms: tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]
    batch: int
    phase: tuple[int, ...]

    def launch(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        y: torch.Tensor,
        residual: torch.Tensor | None,
        vectors: Sequence[torch.Tensor | None],
        stats: torch.Tensor | None,
        eps: float,
    ) -> None:
        """Fill y. x, y and residual channels-last, weight as `weight.weight_layout` has it; ``vectors``: bias, mean,
        var, scale, shift and slope, each (C_out,) or None; ``stats`` float32, of `parts`, or None."""
        of_x, of_w, of_y = (_of(form, t) for form, t in zip(self.forms, (x, weight, y), strict=True))
        self.binary(self.grid, of_x, of_w, of_y, residual, *vectors, stats, self.batch, *self.phase, eps)


def boxes(
    plan: BoxPlan,
    consts: dict[str, Any],
    dtype: torch.dtype,
    batch: int,
    input_size: Sequence[int],
    output_size: tuple[int, ...],
    device: Device,
) -> Boxes:
    """The launch of ``plan`` on x (batch, C_in, *input_size): as many programs as run at once, or as it has tiles."""
    low = plan.lowering
    s = low.spec
    n, h, w = plan.box
    taps = math.prod(s.kernel_size)
    if s.transposed:  # [C_in][tap][C_out/g]
        of_w = (s.in_channels, taps, low.columns), (plan.block_k, 1, plan.block_n)
    else:  # [C_out][tap][C_in/g]
        of_w = (s.out_channels, taps, low.channels_in), (plan.block_n, 1, plan.block_k)
    forms = (
        _form(dtype, _view(batch, s.in_channels, input_size, low.read_stride), (n, h, 1, w, plan.block_k)),
        _form(dtype, *of_w),
        _form(dtype, _view(batch, s.out_channels, output_size, low.phases), (n, h, 1, w, plan.chunk)),
    )
    programs = min(plan.tiles(batch, output_size), plan.blocks * device.multiprocessors)
    run = Binary(conv_hopper_kernel, consts, num_warps=plan.num_warps, maxnreg=plan.registers)
    phase = tuple(size // p for size, p in zip(output_size, low.phases, strict=True))
    return Boxes(run, (programs, 1, 1), forms, batch, phase)


def parts(plan: BoxPlan, batch: int, output_size: Sequence[int], statistics: str | None) -> tuple[int, int] | None:
    """(segments, parts of each) of the statistics that the kernel gives with its result: of the whole "batch", or of
    each "image" where a box lies in one; None where it gives none."""
    if statistics is None or (statistics == "image" and plan.box[0] > 1):
        return None
    count = math.prod(plan.boxes(batch, output_size)) * math.prod(plan.lowering.phases)
    segments = 1 if statistics == "batch" else batch
    return segments, count // segments


# --- descriptors ------------------------------------------------------------------------------------------------------


def _view(batch: int, channels: int, size: Sequence[int], step: Sequence[int]) -> tuple[int, ...]:
    """The shape of a channels-last tensor as (N, H / step, step, W / step, step * C)."""
    (h, w), (sh, sw) = size, step
    return batch, h // sh, sh, w // sw, sw * channels


def _form(dtype: torch.dtype, shape: Sequence[int], block: Sequence[int]) -> TensorDescriptor:
    """Of dense tensors of this shape. A box lies in shared memory as the tensor cores and the copies want it."""
    size = dtype.itemsize
    layout = NVMMASharedLayout(
        swizzle_byte_width=min(128, block[-1] * size), element_bitwidth=8 * size, rank=len(block)
    )
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return TensorDescriptor(torch.empty(0, dtype=dtype, device="cpu"), list(shape), strides, list(block), layout)


def _of(form: TensorDescriptor, t: torch.Tensor) -> TensorDescriptor:
    """``form`` of the memory of ``t``. (A new one would check itself again, which takes 30 us.)"""
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {**form.__dict__, "base": t}
    return made
