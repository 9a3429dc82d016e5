"""Machine code of the plans that are chosen for real layers, compiled ahead of time for GPUs that need not be there: a
part of the rehearsal (`make rehearse` is the whole), and the main loop against a plain matrix product."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch

from cnnfast.activations import Activation
from cnnfast.gpu.conv_choice import choose_plan
from cnnfast.gpu.conv_plan import Plan, lower
from cnnfast.gpu.devices import DEVICES
from cnnfast.norms import Norm
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step

from .test_conv_plan import BATCHES, HALF, LAYERS

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from benchmarks import cases  # noqa: E402
from benchmarks.rehearse import training as train  # noqa: E402
from benchmarks.rehearse.__main__ import rehearse  # noqa: E402
from benchmarks.rehearse.analysis import Analysis, Rehearsal  # noqa: E402
from benchmarks.rehearse.inspections import Inspections  # noqa: E402
from benchmarks.rehearse.inspector import ARCHS, Report, inspect, recording, target  # noqa: E402
from benchmarks.rehearse.launches import NUMERICS  # noqa: E402
from cnnfast.gpu import conv  # noqa: E402

FAST = (80, 90)
# A layer of each regime and of each kind: implicit GEMM, few columns, 1x1 input, split K, plain, one-dimensional.
FEW = ("dcgan64.1", "dcgan64.3", "dcgan64.5", "pix2pix.3", "srvgg.tail", "vocoder.2", "upsample256")


def verdict(found: Rehearsal, regimes: set[str]) -> None:
    """Every plan was compiled and passes; nothing fell back, and these regimes are among them."""
    done = [r.result for r in found.rows if isinstance(r.result, Analysis)]
    assert len(done) == len(found.rows) and regimes <= {a.regime for a in done}
    failing = [f"{r.cases[0]}, {r.title}, {r.numerics} sm_{r.arch}: {f}" for r in found.failing for f in r.failures]
    assert not failing, "\n".join(failing)


@pytest.mark.parametrize("arch", FAST)
def test_plans_compile_well(arch: int) -> None:
    verdict(rehearse(cases.find(list(FEW)), [arch], ["fp16"], [1, 16], Inspections(0)), {"phases", "merged", "latent"})


@pytest.mark.parametrize("arch", FAST)
def test_training_steps_compile_well(arch: int) -> None:
    found = train.rehearse(cases.find(["dcgan64.4", "dcgan64.2"]), [arch], ["fp16"], 16, Inspections(0))
    assert found.findings == [] and found.binaries > 15
    assert not found.unfused, "nothing but kernels"


@pytest.mark.parametrize(("layer", "arch"), [("dcgan64.1", 120), ("waifu2x.last", 80)])
def test_training_steps_of_odd_channels_compile_well(layer: str, arch: int) -> None:
    """100 and 3 channels, loaded by a few bytes: the largest tiles would spill."""
    assert train.rehearse(cases.find([layer]), [arch], ["fp16"], 16, Inspections(0)).findings == []


@pytest.mark.slow
@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("arch", ARCHS)
def test_more_plans_compile_well(arch: int, numerics: str) -> None:
    few = (*FEW, "dcgan64.2", "dcgan64.4", "cyclegan.up1", "rrdb.2", "vocoder.1", "pix2pix.5")
    verdict(rehearse(cases.find(list(few)), [arch], [numerics], inspections=Inspections(0)), {"phases", "merged"})


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


ADDRESSES = 36  # instructions of a trip: borders and offsets of the rows that a thread copies
LONG = ConvSpec.make(1024, 256, 4, 2, 1)  # so many channels that no loop is unrolled away


def report_of(arch: int, plan: Plan) -> Report:
    """The convolution's kernel for LONG with this plan, BatchNorm and ReLU."""
    x, weight = (
        torch.empty(shape, dtype=torch.float16, memory_format=torch.channels_last)
        for shape in ((16, LONG.in_channels, 8, 8), LONG.weight_shape)
    )
    v = torch.empty(LONG.out_channels, dtype=torch.float16)
    operands = Operands(x, weight, None, v, v, v, v)
    with recording(arch) as calls:
        conv.run(Step(LONG, Activation("relu"), norm=Norm("running")), operands, True, plan)
    (call,) = calls
    report = Inspections(0).of([call.job])[call.job.key]
    assert isinstance(report, Report), report
    return report


@pytest.mark.parametrize("arch", FAST)
def test_main_loop_against_a_matrix_product(arch: int) -> None:
    """Implicit GEMM issues no more instructions per tensor-core instruction than a plain product with the same tile,
    for every tile that is chosen in float16; a trip of wgmma, which is one product, the addresses of its rows beside
    them, and does not wait for the tensor cores to be empty."""
    chosen = {choose_plan(spec, b, size, HALF, DEVICES[arch]) for spec, size in LAYERS.values() for b in BATCHES}
    low = lower(LONG, (8, 8))
    plans = {replace(p, lowering=low, splits=False, split_k=1) for p in chosen if p.lowering.regime == "phases"}
    assert len(plans) >= 3
    lines, worse = [], []
    for plan in sorted(plans, key=lambda p: p.name):
        mine = report_of(arch, plan)
        tile = Tile(plan.block_m, plan.block_n, plan.block_k, plan.num_warps, plan.num_stages)
        product = matmul_report(arch, tile)
        lines.append(f"sm_{arch} {plan.name}: {mine.per_mma:.2f}, matrix product {product.per_mma:.2f}")
        assert mine.stack == product.stack == 0, lines[-1]
        assert mine.drains == 0, lines[-1]
        own = ADDRESSES if mine.mma_kind == "wgmma" else 0
        if mine.per_mma > product.per_mma + own / mine.mma:
            worse.append(lines[-1])
    print(*lines, sep="\n")
    assert not worse, worse
