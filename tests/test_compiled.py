"""Machine code of the plans that are chosen for real layers, compiled ahead of time for GPUs that need not be there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from cnnfast.block import Step
from cnnfast.plan import DEVICES, Plan, choose_plan, lower
from cnnfast.spec import Activation, ConvSpec, Precision

from .test_plan import BATCHES, LAYERS, PRECISIONS

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from benchmarks.inspector import ARCHS, Report, inspect, target  # noqa: E402
from cnnfast.ops import launch  # noqa: E402

FAST = (80, 90)
ARCHITECTURES = [a if a in FAST else pytest.param(a, marks=pytest.mark.slow) for a in ARCHS]
# What the compiler makes of bfloat16 is what it makes of float16, but for the instruction's type.
NUMERICS = [pytest.param(n, marks=pytest.mark.slow) if n == "bf16" else n for n in PRECISIONS]


def code_of(plan: Plan) -> tuple[Any, ...]:
    """What decides the shape of the machine code: plans of one tile differ in constants otherwise."""
    low, trip = plan.lowering, plan.block_k * plan.unroll
    full = low.channels_in % trip == 0, low.columns % plan.block_n == 0
    steps = min(plan.steps(), 64)  # short loops are unrolled away
    return low.regime, replace(plan, lowering=None, split_k=min(plan.split_k, 2)), full, steps, low.max_taps


_reports: dict[Any, list[Report]] = {}


def compiled(
    arch: int, precision: Precision, step: Step, batch: int, size: tuple[int, int], plan: Plan
) -> list[Report]:
    """The kernels of a launch with BatchNorm's vectors: the convolution and, where K is split, its second pass."""
    key = arch, precision, code_of(plan), step.activation
    if key not in _reports:
        how = launch.prepare(step, batch, size, precision, DEVICES[arch], True, 0, plan)
        spec = step.spec
        x, weight, y = (
            torch.empty(shape, dtype=precision.dtype, device="meta")
            for shape in ((batch, spec.in_channels, *size), spec.weight_shape, how.output_shape)
        )
        v = torch.empty(spec.out_channels, device="meta")
        with target(arch) as kernels:
            # A function compiled before, for the same constants, is in Triton's cache: ask for a new one.
            for function in (launch.kernels.conv_transpose_kernel, launch.kernels.split_k_epilogue_kernel):
                function.device_caches.pop(arch, None)
            launch.kernels.launch(x, weight, y, None, (None, v, v, v, v, None), 1e-5, how)
        assert len(kernels) == (2 if plan.split_k > 1 else 1)
        _reports[key] = [inspect(k) for k in kernels]
    return _reports[key]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("precision", NUMERICS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_plan_compiles_well(arch: int, precision: str, layer: str) -> None:
    """No spill, tensor cores in the main loop, no narrow loads, shared memory within the device and the estimate."""
    spec, size = LAYERS[layer]
    numerics, device = PRECISIONS[precision], DEVICES[arch]
    activation = Activation("tanh" if spec.out_channels == 3 else "relu")
    for batch in BATCHES:
        plan = choose_plan(spec, batch, size, numerics, device)
        reports = compiled(arch, numerics, Step(spec, activation), batch, size, plan)
        what = f"sm_{arch} {precision} {layer} batch {batch}: {plan.name}: {reports}"
        main = reports[0]
        assert main.arch == arch and main.num_warps == plan.num_warps, what
        for report in reports:
            assert report.stack == 0 and report.local == 0, f"spills: {what}"
            assert report.registers <= 255 and report.shared <= device.shared_memory, what
        exact = numerics.dtype == torch.float32 and not numerics.tf32
        assert (main.mma > 0) is not exact, f"tensor cores: {what}"
        assert main.narrow_loads == 0, f"2-byte loads in the loop: {what}"
        assert main.shared <= plan.shared_memory(numerics.itemsize), f"more shared memory than the plan says: {what}"
        x, y, z = plan.grid(batch, spec.output_size(size))
        assert x < 2**31 and y <= 65535 and z <= 65535, what


# --- the main loop against a plain matrix product ---------------------------------------------------------------------


@triton.jit
def matmul_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (K, N)
    c_ptr,  # (M, N)
    M,
    N,
    K,
    stride_am,
    stride_bk,
    stride_cm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The matrix product of Triton's tutorial: the yardstick, not a part of the library."""
    pid = tl.program_id(0)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    width = GROUP_M * num_n
    first = pid // width * GROUP_M
    rows = tl.minimum(num_m - first, GROUP_M)
    pid_m, pid_n = first + (pid % width) % rows, (pid % width) // rows
    offs_m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    offs_n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :]
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        a = tl.load(a_ptrs, mask=offs_k[None, :] < K - k * BLOCK_K, other=0.0)
        b = tl.load(b_ptrs, mask=offs_k[:, None] < K - k * BLOCK_K, other=0.0)
        acc = tl.dot(a, b, acc)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(c_ptr + offs_m[:, None] * stride_cm + offs_n[None, :], acc.to(tl.float16), mask=mask)


@dataclass(frozen=True)
class Tile:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@cache
def matmul_report(arch: int, tile: Tile) -> Report:
    a = torch.empty(16, dtype=torch.float16, device="meta")
    with target(arch) as kernels:
        matmul_kernel.device_caches.pop(arch, None)
        matmul_kernel[(8,)](
            a, a, a, 4096, 256, 4096, 4096, 256, 256, tile.block_m, tile.block_n, tile.block_k, 8,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return inspect(kernels[-1])


LONG = ConvSpec.make(1024, 256, 4, 2, 1)  # so many channels that no loop is unrolled away


@pytest.mark.parametrize("arch", FAST)
def test_main_loop_against_a_matrix_product(arch: int) -> None:
    """Implicit GEMM issues no more instructions per tensor-core instruction than a plain product with the same tile,
    for every tile that is chosen in float16."""
    half = PRECISIONS["fp16"]
    chosen = {choose_plan(spec, b, size, half, DEVICES[arch]) for spec, size in LAYERS.values() for b in BATCHES}
    plans = {replace(p, lowering=lower(LONG, (8, 8)), split_k=1) for p in chosen if p.lowering.regime == "phases"}
    assert len(plans) >= 3
    lines, worse = [], []
    for plan in sorted(plans, key=lambda p: p.name):
        (mine,) = compiled(arch, half, Step(LONG, Activation("relu")), 16, (8, 8), plan)
        tile = Tile(plan.block_m, plan.block_n, plan.block_k, plan.num_warps, plan.num_stages)
        product = matmul_report(arch, tile)
        lines.append(f"sm_{arch} {plan.name}: {mine.per_mma:.2f}, matrix product {product.per_mma:.2f}")
        assert mine.stack == product.stack == 0, lines[-1]
        if mine.per_mma > product.per_mma:
            worse.append(lines[-1])
    print(*lines, sep="\n")
    assert not worse, worse
