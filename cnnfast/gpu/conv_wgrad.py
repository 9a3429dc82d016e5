"""The weight gradient's launch: operands in the kernel's layouts, constants of the launch cached, and its trial."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from ..kernels import conv_wgrad as kernels
from ..memory_format import LAST
from ..spec import INT32, ConvSpec, Precision
from ..step import Step
from . import fence, guard, trial
from .binary import MAX_REGISTERS, Binary, aligned, unused
from .conv_plan import by_axis, in_three
from .conv_wgrad_plan import WgradPlan, choose_wgrad_plan
from .devices import Device, cuda_index, on_device, precision_of, target_device
from .observers import OBSERVERS, of_launch

__all__ = ["WeightGradient", "WgradLaunch", "by_torch", "lookup", "prepare", "run"]

SUM_BLOCK = 1024  # elements of a weight that a program of the second pass adds up


def by_torch(x: torch.Tensor, grad: torch.Tensor, like: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """The gradient of the weight ``like`` by PyTorch's operators, in the strides that they give."""
    _, dw, _ = torch.ops.aten.convolution_backward(
        grad, x, like, None, spec.stride, spec.padding, spec.dilation, spec.transposed, spec.output_padding,
        spec.groups, (False, True, False),
    )  # fmt: skip
    return dw


@dataclass(frozen=True)
class WeightGradient:
    """What the kernel computes, for `guard`."""

    spec: ConvSpec

    def describe(self) -> str:
        return f"weight gradient of {Step(self.spec).describe()}"

    def concerns(self, step: Step) -> bool:
        return self.spec == step.spec


@dataclass(frozen=True)
class WgradLaunch:
    """Everything of a launch that does not depend on the tensors' contents or addresses."""

    plan: WgradPlan
    binary: Binary  # of `conv_wgrad_kernel`
    grid: tuple[int, int, int]
    numbers: tuple[int | None, ...]  # A's images (or all planes); planes, rows, columns of A and B; parts; the box
    work: int  # float32 partial sums
    sums: Binary | None  # of `sum_splits_kernel` where the positions are split
    sums_grid: tuple[int, int, int]
    tf32: bool
    proof: guard.Proof


@lru_cache(maxsize=4096)
def prepare(
    spec: ConvSpec,
    batch: int,
    grid: tuple[int, ...],
    other: tuple[int, ...],
    strides: tuple[int, ...],
    precision: Precision,
    device: Device,
    plan: WgradPlan | None = None,
    types: tuple[torch.dtype, ...] = (),
    index: int | None = None,
) -> WgradLaunch:
    """The launch for A of ``batch`` images of size ``grid`` and B of size ``other``, into a weight with these
    strides; ``types``: dtypes of the result's gradient and of the weight. A given ``plan`` replaces the heuristic's
    (tests). ``index``: of the CUDA device, None where there is none: nothing is guarded then."""
    s = spec
    images = batch * math.prod(grid[:-2])  # planes count as such
    plan = plan or choose_wgrad_plan(s, images, (grid[-2], grid[-1]), precision, device)
    ca, cb = plan.channels
    big = batch * s.groups * max(ca * math.prod(grid), cb * math.prod(other)) >= INT32
    out = dict(OUT_A=strides[0], OUT_B=strides[1], **by_axis("OUT_", strides[2:], 0))
    consts = dict(
        GROUPS=s.groups, CA=ca, CB=cb, **by_axis("K", s.kernel_size), **by_axis("S", s.stride),
        **by_axis("PAD_", s.padding, 0), **by_axis("D", s.dilation), **out,
        TF32=3 if plan.three else int(precision.tf32),
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k, EVEN=plan.even, BIG=big,
        FENCE=fence.needed(device.arch),
        A=s.groups * ca, BLOCK=SUM_BLOCK,
    )  # fmt: skip
    options = dict(num_warps=plan.num_warps, num_stages=plan.num_stages, maxnreg=MAX_REGISTERS)
    proof = guard.UNGUARDED
    if index is not None:
        binary = {"num_warps": plan.num_warps, "num_stages": plan.num_stages, "sums": plan.splits > 1}
        dtypes = {"dtype": str(precision.dtype), "types": tuple(map(str, types))}
        proof = guard.proof(WeightGradient(s), plan.name, index, {**consts, **binary, **dtypes})
    return WgradLaunch(
        plan,
        Binary(kernels.conv_wgrad_kernel, consts, **options),
        plan.grid(),
        (images, *in_three(grid), *in_three(other), plan.splits, *plan.box),
        plan.workspace(),
        Binary(kernels.sum_splits_kernel, consts) if plan.splits > 1 else None,
        (-(-math.prod(s.weight_shape) // SUM_BLOCK), 1, 1),
        precision.tf32,
        proof,
    )


def lookup(
    x: torch.Tensor, grad: torch.Tensor, spec: ConvSpec, out: torch.Tensor, plan: WgradPlan | None = None
) -> WgradLaunch:
    """The launch of `run` on these tensors, a dictionary's look-up after the first time."""
    a, b = (x, grad) if spec.transposed else (grad, x)
    return prepare(
        spec,
        x.shape[0],
        tuple(a.shape[2:]),
        tuple(b.shape[2:]),
        out.stride(),
        precision_of(x.dtype),
        target_device(x),
        plan,
        (grad.dtype, out.dtype),
        cuda_index(x),
    )


def run(
    x: torch.Tensor,
    grad: torch.Tensor,
    spec: ConvSpec,
    like: torch.Tensor,
    plan: WgradPlan | None = None,
    required: bool = True,
    launch: WgradLaunch | None = None,
) -> torch.Tensor | None:
    """Gradient of the weight of ``spec`` (2-D or 3-D), with the strides of ``like``: from x (N, C_in, *size), the
    convolution's input, and ``grad`` (N, C_out, *output_size), its result's gradient, of one dtype and in any layout.
    ``launch``: `lookup` of these, where it is at hand."""
    a, b = (x, grad) if spec.transposed else (grad, x)
    out = torch.empty_like(like)
    if out.numel() == 0:
        return out
    if x.shape[0] == 0:
        return out.zero_()
    launch = launch or lookup(x, grad, spec, out, plan)
    if launch.proof.ready:
        _start(a, b, out, launch)
    else:
        start, problem = partial(_start, a, b, out, launch), partial(_problem, x, grad, out, launch)
        if guard.first_use(launch.proof, start, problem, required) is None:
            return None
    if OBSERVERS:
        of_launch(launch.plan.name)
    return out


def _start(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, launch: WgradLaunch) -> torch.Tensor:
    """The launch, on the device of the tensors, with operands in the kernel's layout and at addresses that 16
    divides: anything else would be another binary."""
    with on_device(a):
        last = LAST[a.dim()]
        a, b = a.contiguous(memory_format=last), b.contiguous(memory_format=last)
        _launch(aligned(a), aligned(b), out, launch)
    return out


def _launch(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, launch: WgradLaunch) -> None:
    work = a.new_empty(launch.work, dtype=torch.float32) if launch.work else unused(a.device)
    launch.binary(launch.grid, a, b, out, work, *launch.numbers)
    if launch.sums is not None:
        launch.sums(launch.sums_grid, work, out, launch.plan.splits)


# --- the trial --------------------------------------------------------------------------------------------------------


IMAGES, POSITIONS = 4, 256  # of the result's gradient that a trial fills: the rest is zero
"""A sum over few positions is known well in float32, whatever the order; over a million positions it is not, and a
right kernel could look wrong."""


def _problem(x: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, launch: WgradLaunch) -> str | None:
    """What is wrong with a launch like this one. Its noise is at positions scattered over a few images; a position that
    is missed or read twice changes the sums by a sixteenth."""
    spec, n, size = launch.plan.spec, x.shape[0], grad.shape[2:]
    images = sorted({k * (n - 1) // (IMAGES - 1) for k in range(IMAGES)})

    def scatter(operands: Mapping[str, torch.Tensor]) -> None:
        g = torch.Generator("cpu").manual_seed(0)
        keep = torch.rand(n, 1, *size, generator=g, device="cpu") * len(images) * size.numel() < POSITIONS
        corner = torch.ones((), dtype=torch.bool, device="cpu")
        for s in size:
            corner = corner[..., None] & (torch.arange(s, device="cpu") % max(1, s - 1) == 0)
        keep |= corner
        keep[[k for k in range(n) if k not in images]] = False
        operands["grad"].mul_(keep.to(grad.device))

    def run(x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        a, b = (x, grad) if spec.transposed else (grad, x)
        return {"weight gradient": _start(a, b, torch.empty_like(out), launch)}

    def reference(x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
        like = x.new_empty(spec.weight_shape)
        found = {"weight gradient": (x, grad), "before weight gradient": (x.abs(), grad.abs())}
        return {name: by_torch(*operands, like, spec) for name, operands in found.items()}

    return trial.problem_of(
        run,
        reference,
        {"x": x, "grad": grad},
        tf32=("x", "grad") if launch.tf32 else (),
        adjust=scatter,
        some=lambda name, t: t if name == "weight gradient" else t[images],
    )
