"""Cases of the kernel tests: a step, its tensors, and what must be launched; and the check that all of them share."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cnnfast.activations import Activation
from cnnfast.gpu.devices import precision_of, target_device
from cnnfast.memory_format import in_format, to_format
from cnnfast.norms import Norm
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step, Upsample, plain_step, upsample_step
from cnnfast.tolerance import expected

from .tolerance import assert_close

__all__ = ["Case", "PRECISIONS", "check", "conv", "fitted", "reference", "upsample"]

CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format

# id -> (dtype, value of PyTorch's switch for float32 convolutions)
PRECISIONS: dict[str, tuple[torch.dtype, str]] = {
    "fp16": (torch.float16, "tf32"),
    "bf16": (torch.bfloat16, "tf32"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}


@dataclass(frozen=True)
class Case:
    """``regime`` is the first word of the plan that must be launched, ``split`` whether it must split K (None: either).

    ``x_format`` and ``weight_format`` are memory formats of the operands, ``channels_last`` that of the result; of
    three dimensions where ``size`` has three.
    ``plan`` replaces fields of the heuristic's plan.
    """

    id: str
    step: Step
    size: tuple[int, ...]
    regime: str
    split: bool | None = None
    batch: int = 2
    weight_shape: tuple[int, ...] = ()
    bias: bool = True
    norm: bool = False
    residual: bool = False
    slopes: int = 0
    x_format: torch.memory_format = CHANNELS_LAST
    weight_format: torch.memory_format = CHANNELS_LAST
    channels_last: bool = True
    plan: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        norm = Norm("running") if self.norm else None
        object.__setattr__(self, "step", replace(self.step, norm=norm, residual=self.residual))

    def operands(self, dtype: torch.dtype, device: torch.device | str) -> Operands:
        """Standard normal input, weights of about unit gain; the same numbers for every dtype and device."""
        g = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
        s = self.step.spec
        shape = self.weight_shape or s.weight_shape
        gain = (s.in_channels // s.groups * max(1, math.prod(shape[2:]) // math.prod(s.stride))) ** -0.5

        def rand(*size: int, to: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.randn(*size, generator=g).type(to)

        c = s.out_channels
        x = rand(self.batch, s.in_channels, *self.size, to=dtype)
        weight = (rand(*shape) * gain).type(dtype)
        o = Operands(x, weight, rand(c, to=dtype) if self.bias else None)
        if self.norm:
            var = torch.rand(c, generator=g) + 0.1
            o = o._replace(mean=rand(c), var=var, scale=rand(c), shift=rand(c))
        if self.residual:
            o = o._replace(residual=rand(self.batch, c, *self.step.output_size(self.size), to=dtype))
        if self.slopes:
            o = o._replace(slope=torch.rand(self.slopes, generator=g))
        o = Operands(*(v.to(device) if isinstance(v, torch.Tensor) else v for v in o))
        return o._replace(
            x=to_format(o.x, self.x_format == CHANNELS_LAST),
            weight=to_format(o.weight, self.weight_format == CHANNELS_LAST),
        )


def fitted(step: Step, o: Operands) -> Step:
    """``step`` with the norm and the residual for which ``o`` has tensors."""
    affine = o.scale is not None or o.shift is not None
    kind = "running" if o.mean is not None else "affine" if affine else None
    norm = step.norm if step.norm is not None and step.norm.kind == kind else Norm(kind) if kind else None
    return replace(step, norm=norm, residual=o.residual is not None)


def conv(
    id: str,
    regime: str,
    in_channels: int,
    out_channels: int,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    size: tuple[int, ...],
    transposed: bool = True,
    activation: str = "relu",
    params: tuple[float, ...] = (),
    mode: str = "zeros",
    **rest: Any,
) -> Case:
    numbers = (kernel, stride, padding, output_padding, groups, dilation)
    spec = ConvSpec.make(in_channels, out_channels, *numbers, transposed=transposed, ndim=len(size))
    step = Step(spec) if transposed else plain_step(spec, mode)
    return Case(id, replace(step, activation=Activation(activation, params)), size, regime, **rest)


def upsample(
    id: str,
    regime: str,
    in_channels: int,
    out_channels: int,
    kernel: tuple[int, ...],
    factor: tuple[int, ...],
    padding: tuple[int, ...],
    mode: str = "zeros",
    groups: int = 1,
    *,
    size: tuple[int, ...],
    **rest: Any,
) -> Case:
    step = upsample_step(
        in_channels, out_channels, kernel, Upsample(factor, padding, mode), groups, Activation("leaky_relu", (0.2,))
    )
    return Case(id, step, size, regime, weight_shape=(out_channels, in_channels // groups, *kernel), **rest)


def cast(o: Operands, dtype: torch.dtype) -> Operands:
    """The operands on the CPU in ``dtype``. (`Tensor.to` with a dtype is slow under ttsem, which prints the tensor.)"""
    return Operands(*(v.detach().cpu().type(dtype) if isinstance(v, torch.Tensor) else v for v in o))


def reference(step: Step, o: Operands, tf32: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`cnnfast.tolerance.expected`, computed on the CPU."""
    return expected(step, Operands(*(v.cpu() if isinstance(v, torch.Tensor) else v for v in o)), tf32)


def check(case: Case, precision: str, device: torch.device, launches: list[str]) -> torch.Tensor:
    """Launch the case and hold it against float64; assert what was launched and the result's memory format."""
    from cnnfast.gpu import conv as launch
    from cnnfast.ops.run import run_step

    from .conftest import conv_precision

    dtype, switch = PRECISIONS[precision]
    o = case.operands(dtype, device)
    launches.clear()
    with conv_precision(switch), torch.no_grad():
        if case.plan:
            padded = tuple(n + 2 * p for n, p in zip(case.size, case.step.pad, strict=True))
            numerics, target = precision_of(dtype), target_device(o.x)
            chosen = launch.choose_plan(case.step.spec, case.batch, padded, numerics, target)
            y = launch.run(case.step, o, case.channels_last, replace(chosen, **dict(case.plan)))
        else:
            y = run_step(case.step, o, channels_last=case.channels_last, backend="triton")
    assert len(launches) == 1, f"{case.id}: launched {launches}"
    assert launches[0].split()[0] == case.regime, f"{case.id}: launched {launches[0]}"
    parts = int((re.search(r"split(\d+)", launches[0]) or ["", "1"])[1])
    assert case.split in (None, parts > 1), f"{case.id}: launched {launches[0]}"
    assert y.dtype == dtype and y.device == o.x.device
    assert in_format(y, case.channels_last)
    exact, yardstick, before = reference(case.step, o, tf32=precision == "tf32")
    assert_close(y, exact, yardstick, f"{case.id} {precision} {launches[0]}", before)
    return y
