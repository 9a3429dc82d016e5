"""The rehearsal's arithmetic against numbers worked out by hand, each failing condition, the cache, the command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import cases  # noqa: E402
from benchmarks.rehearse import __main__ as rehearse
from benchmarks.rehearse import inspections, training_launches  # noqa: E402
from benchmarks.rehearse.analysis import Analysis, analyse  # noqa: E402
from benchmarks.rehearse.inspections import Failed, Inspections  # noqa: E402
from benchmarks.rehearse.inspector import Call, Report, _main_loop, recording  # noqa: E402
from benchmarks.rehearse.launches import Op, Recorder, StepRun, Unrun, eager_ops, inductor_passes, precision  # noqa: E402
from benchmarks.rehearse.model import occupancy, pressure, traffic, work  # noqa: E402
from benchmarks.rehearse.rules import drained, loop, overflows  # noqa: E402
from cnnfast.gpu.conv_plan import Plan, lower  # noqa: E402
from cnnfast.gpu.devices import DEVICES  # noqa: E402
from cnnfast.spec import ConvSpec  # noqa: E402

A100, H100, B200, RTX3090 = (DEVICES[a] for a in (80, 90, 100, 86))
HALF, TF32, EXACT = precision("fp16"), precision("tf32"), precision("fp32")


def case(channels_in: int, channels_out: int, size: int, batch: int, *, kernel: int = 4, stride: int = 2) -> cases.Case:
    def make() -> nn.Sequential:
        conv = nn.ConvTranspose2d(channels_in, channels_out, kernel, stride, (kernel - stride) // 2, bias=False)
        return nn.Sequential(conv, nn.ReLU())

    return cases.Case("layer", "layers", (channels_in, size, size), (batch,), make)


def recorded(layer: cases.Case, arch: int = 80, numerics: str = "fp16", **plan: Any) -> StepRun:
    """The one step of a case; fields of its plan replaced."""
    (run,) = Recorder(layer, numerics)(layer.batches[0], arch)
    assert isinstance(run, StepRun) and run.plan is not None
    run.plan = dataclasses.replace(run.plan, **plan)
    return run


GOOD = Report(
    name="conv_transpose_kernel",
    arch=80,
    num_warps=4,
    registers=128,
    stack=0,
    shared=48 * 1024,
    mma=64,
    mma_kind="mma",
    macs=64 * 16 * 8 * 16 * 4,
    ffma=0,
    instructions=256,
    loads={"LDGSTS.E.BYPASS.128": 16},
    looped=True,
    local=0,
    unfenced=0,
    drains=0,
)
# Its loop is one trip of this tile: 64 * 64 * 64 * 2 multiply-adds.
TILE = dict(block_m=64, block_n=64, block_k=64, unroll=2, num_warps=4, num_stages=3, splits=False, split_k=1)


# --- occupancy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "device", "blocks", "limit"),
    [
        (128, 48 * 1024, 4, A100, 3, "shared memory"),  # 49 KiB of 164
        (168, 0, 4, A100, 3, "registers"),  # 5376 a warp, 3 of a quarter of the file: 12 warps
        (255, 0, 8, A100, 1, "registers"),
        (32, 0, 1, A100, 32, "blocks"),
        (24, 0, 8, A100, 8, "warps"),
        (32, 0, 8, RTX3090, 6, "warps"),
        (128, 99 * 1024, 4, RTX3090, 1, "shared memory"),
    ],
)
def test_occupancy(registers: int, shared: int, warps: int, device: Any, blocks: int, limit: str) -> None:
    found = occupancy(registers, shared, warps, device)
    assert (found.blocks, found.limit) == (blocks, limit)


def test_exact_float32_by_three_products() -> None:
    """The real path with plans that calls do not take: while it is driven, and no longer."""
    layer = case(64, 64, 8, 4)
    run = recorded(layer, numerics="fp32x3")
    assert run.plan is not None and run.plan.three and run.main.job.named_constants["TF32"] == 3
    assert not recorded(layer, numerics="fp32").plan.three  # type: ignore[union-attr]
    training = training_launches.record(layer, 4, "fp32x3", 80)
    of = [c.job.named_constants.get("TF32") for c in training.calls if c.job.function.startswith("conv_")]
    assert of == [3, 3, 3], "forward, input gradient, weight gradient"


def test_three_products_without_tensor_cores_are_a_failure() -> None:
    run = recorded(case(64, 64, 8, 4), numerics="fp32x3")
    none = dataclasses.replace(GOOD, mma=0, mma_kind="", macs=0, ffma=64, shared=0)
    assert run.plan is not None
    for plan, texts in ((run.plan, ["no tensor-core instruction in the main loop"]), (plan_of(three=False), [])):
        assert loop(none, plan, run.main, EXACT) == texts


# --- issue pressure ---------------------------------------------------------------------------------------------------


def plan_of(**fields: Any) -> Plan:
    return Plan(lower(ConvSpec.make(256, 128, 4, 2, 1), (8, 8)), **{**TILE, **fields})


def test_pressure() -> None:
    """256 instructions of 4 warps are 256 slots of four schedulers; 524,288 multiply-adds are 512 clocks on an A100."""
    assert GOOD.macs == 64 * 64 * 128
    assert pressure(GOOD, plan_of(), HALF, A100) == pytest.approx(256 / 512)
    # mma.sync has half of wgmma's rate on an H100, a quarter of tcgen05's on a B200: as fast as an A100.
    assert pressure(GOOD, plan_of(), HALF, H100) == pytest.approx(256 / 512)
    assert pressure(GOOD, plan_of(), HALF, B200) == pytest.approx(256 / 512)
    assert pressure(dataclasses.replace(GOOD, mma_kind="wgmma"), plan_of(), HALF, H100) == pytest.approx(256 / 256)
    assert pressure(GOOD, plan_of(), TF32, A100) == pytest.approx(256 / 1024)
    eight = dataclasses.replace(GOOD, num_warps=8, macs=2 * GOOD.macs)
    assert pressure(eight, plan_of(block_m=128), HALF, A100) == pytest.approx(512 / 1024)


def test_pressure_of_tcgen05_and_of_scalar_products() -> None:
    """One tcgen05 instruction is the block's whole tile by 32 bytes of k; FFMA are 32 products a warp."""
    five = dataclasses.replace(GOOD, mma_kind="tcgen05", mma=8, macs=0)
    assert pressure(five, plan_of(block_k=128, unroll=1), HALF, B200) == pytest.approx(256 / (64 * 64 * 128 / 4096))
    tall = plan_of(block_m=256, block_k=64, unroll=1)  # two instructions for its rows
    assert pressure(five, tall, HALF, B200) == pytest.approx(256 / (256 * 64 * 64 / 4096))
    exact = dataclasses.replace(GOOD, mma_kind="", mma=0, macs=0, ffma=200)
    assert pressure(exact, plan_of(), EXACT, A100) == pytest.approx(256 / (200 * 32 * 4 / 64))
    assert pressure(dataclasses.replace(exact, ffma=0), plan_of(), EXACT, A100) == math.inf


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.U16 R2, [R4.64] ;
        /*0020*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/              @!P1 LDGSTS.E.BYPASS.128 [R3], [R4.64] ;
        /*0040*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0050*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


def test_main_loop_is_the_one_with_the_products() -> None:
    body, looped = _main_loop(SASS)
    assert looped and [t.split()[0] for t in body] == ["@!P1", "HMMA.16816.F32", "HMMA.16816.F32", "@P0"]
    body, looped = _main_loop(SASS.replace("BRA `(.L_x_1)", "NOP"))
    assert not looped and len(body) == 2


def test_load_widths() -> None:
    loads = {"LDGSTS.E.BYPASS.128": 4, "LDG.E.64": 2, "LDG.E": 3, "LDG.E.U16.CONSTANT": 5, "UTMALDG.2D": 1, "LDG.U8": 1}
    report = dataclasses.replace(GOOD, loads=loads)
    assert report.widths == {16: 4, 8: 2, 4: 3, 2: 5, 1: 1, 0: 1} and report.narrow_loads == 6


# --- work and bytes ---------------------------------------------------------------------------------------------------


def test_work_of_a_layer() -> None:
    """256 -> 128 at 8x8, batch 16: four phases of 1024 rows, 4 taps; 64x64 tiles fit exactly."""
    run = recorded(case(256, 128, 8, 16), **TILE)
    assert run.plan is not None
    done = work(run, run.plan)
    macs = 16 * 256 * 128 * 16 * 16 * 4
    assert (done.useful, done.executed, done.programs) == (macs, macs, 4 * 16 * 2)
    assert done.operand_bytes == done.programs * (64 + 64) * 4 * 256 * 2
    split = dataclasses.replace(run.plan, splits=True, split_k=4)
    assert work(run, split).programs == 4 * done.programs and work(run, split).executed == macs
    small = recorded(case(256, 128, 8, 1), **TILE)
    assert small.plan is not None and work(small, small.plan).executed == work(small, small.plan).useful  # 64 rows
    odd = recorded(case(256, 128, 5, 1), **TILE)
    assert odd.plan is not None and work(odd, odd.plan).executed * 25 == work(odd, odd.plan).useful * 64


def test_work_of_few_columns_and_of_one_pixel() -> None:
    """64 -> 3 merged: 9 taps and 12 columns (padded to 16) where 4 taps of 4 phases are useful; 1x1: one tap each."""
    run = recorded(case(64, 3, 32, 4))
    assert run.plan is not None and run.plan.lowering.regime == "merged"
    tile = dataclasses.replace(run.plan, block_m=128, block_n=16, block_k=32, unroll=2, splits=False, split_k=1)
    done = work(run, tile)
    assert done.useful == 4 * 64 * 3 * 64 * 64 * 4
    assert done.executed == 4 * 32 * 32 * 16 * 9 * 64
    latent = recorded(case(64, 32, 1, 16, kernel=4, stride=1), **{**TILE, "block_m": 16, "unroll": 1})
    assert latent.plan is not None and latent.plan.lowering.regime == "latent"
    assert work(latent, latent.plan).useful == 16 * 64 * 32 * math.prod(latent.output_shape[2:])


def test_traffic_is_the_tensors_once() -> None:
    run = recorded(case(256, 128, 8, 16), **TILE)
    assert run.plan is not None
    x, y, w = 2 * 16 * 256 * 64, 2 * 16 * 128 * 256, 2 * 256 * 128 * 16
    found = traffic(run, run.plan, 3, A100)
    assert found.least == x + y + w and found.moved == found.least and found.ratio == 1
    split = dataclasses.replace(run.plan, splits=True, split_k=4)
    assert traffic(run, split, 3, A100).moved == found.least + 2 * 4 * 4 * 16 * 128 * 256  # written and read, float32
    run.ops.append(Op("clone", 1000, 500))
    assert traffic(run, run.plan, 3, A100).parts["copies"] == 1500


def test_traffic_beyond_l2() -> None:
    """A weight larger than L2 is read again by every round of row tiles; x too where its groups do not fit."""
    layer = case(512, 512, 64, 64)
    run = recorded(layer, **TILE)
    assert run.plan is not None
    whole = traffic(run, run.plan, 2, A100)
    assert whole.parts["weight"] == run.weight and whole.ratio == pytest.approx(1)
    tiny = dataclasses.replace(A100, l2_bytes=4 * 2**20)  # less than the weight's 8 MiB
    # 64 * 64 * 64 rows in groups of 512; the 216 programs at a time are of one group (256 programs) and the next.
    groups, flying = 64 * 64 * 64 // 512, 1 + 108 * 2 // (8 * 4 * 8)
    assert traffic(run, run.plan, 2, tiny).parts["weight"] == run.weight * (groups // flying)
    tiny = dataclasses.replace(A100, l2_bytes=2**18)  # less than a group's 512 KiB of x
    assert traffic(run, run.plan, 2, tiny).parts["x"] == 32 * 2 * 64 * 512 * 64 * 64  # 4 phases x 8 column tiles


def test_a_weight_in_the_default_layout_is_copied() -> None:
    """The rehearsal sees what a launch does beside the kernel: here through a model that is not channels_last."""
    layer = case(64, 48, 4, 2)
    recorder = Recorder(layer, "fp16")
    assert recorder(2, 80)[0].ops == []
    conv = recorder.model[0]
    conv.weight.data = conv.weight.data.contiguous()
    recorder.warm = False
    (run,) = recorder(2, 80)
    size = 2 * conv.weight.numel()
    assert isinstance(run, StepRun) and sum(op.read + op.written for op in run.ops) == 2 * size
    assert run.plan is not None and traffic(run, run.plan, 2, A100).parts["copies"] == 2 * size


# --- the verdict, one failing condition after another -----------------------------------------------------------------

LAYER = case(256, 128, 16, 64)  # 2048 64x64 tiles: nothing is starved


def verdict(report: Report = GOOD, run: StepRun | None = None, device: Any = A100, numerics: str = "fp16") -> Analysis:
    run = run or recorded(LAYER, device.arch, numerics, **TILE)
    found = analyse(run, [report] * len(run.calls), precision(numerics), device)
    assert isinstance(found, Analysis)
    return found


def test_a_good_plan_passes() -> None:
    found = verdict()
    assert found.failures == () and found.judged
    assert found.pressure == pytest.approx(0.5) and found.blocks == 3 and found.waves == pytest.approx(2048 / 324)
    # A program: 4096 clocks of the tensor cores; 256 KiB of operands and 8 KiB of y through L2.
    through = 264 * 1024 / A100.l2_bytes_per_clock
    assert found.bound == "l2" and found.shares["tensor"] == pytest.approx(4096 / through)
    assert found.shares["issue"] == pytest.approx(found.shares["tensor"] / 2)
    assert found.useful == 1 and found.ratio == pytest.approx(1) and found.launches == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(stack=8), "spills"),
        (dict(local=2), "spills"),
        (dict(shared=164 * 1024), "bytes of shared memory of"),
        (dict(shared=98 * 1024), "the plan says 98368"),  # 3 stages of (64 + 64) x 128 in float16, and barriers
        (dict(registers=256, num_warps=16, macs=4 * GOOD.macs), "does not fit a multiprocessor"),
        (dict(loads={"LDG.E.U16": 32}), "32 loads of 2 bytes"),
        (dict(mma=0, mma_kind="", macs=0, ffma=10), "no tensor-core instruction"),
        (dict(macs=GOOD.macs * 3 // 4), "no whole trips"),
        (dict(unfenced=4), "4 wgmma without fence.proxy.async"),
        (dict(drains=1), "1 waits for all of wgmma's products"),
        (dict(instructions=410), "issue pressure 0.80 >"),
    ],
)
def test_failing_reports(change: dict[str, Any], says: str) -> None:
    failures = verdict(dataclasses.replace(GOOD, **change)).failures
    assert any(says in f for f in failures), failures


def test_tensor_cores_may_wait_for_operands_that_are_rounded() -> None:
    waits = dataclasses.replace(GOOD, drains=1, instructions=100)
    assert verdict(waits, numerics="tf32").failures == ()
    assert any("waits for all" in f for f in verdict(dataclasses.replace(GOOD, drains=1), numerics="bf16").failures)


def test_tensor_cores_may_wait_for_operands_that_no_asynchronous_copy_brings() -> None:
    """Rows of three channels: two bytes at a time, through registers. Wide ones that are not wide are another fault."""
    waits = dataclasses.replace(GOOD, drains=1)
    narrow = dataclasses.replace(waits, loads={"LDG.E.U16": 32})
    assert drained(waits, precision("fp16")) and not drained(narrow, precision("fp16"))
    assert any("32 loads of 2 bytes" in f for f in verdict(narrow).failures)


def test_vectors_moved_up_in_an_unrolled_loop_are_no_narrow_operands() -> None:
    """BatchNorm's four vectors: a thread holds at most 16 of a tile's 64 columns."""
    (run,) = Recorder(cases.find(["dcgan64.3"])[0], "fp16")(64, 80)
    assert isinstance(run, StepRun) and run.plan is not None
    run.plan = dataclasses.replace(run.plan, **TILE)
    some = dataclasses.replace(GOOD, loads={"LDGSTS.E.BYPASS.128": 16, "LDG.E.U16": 64}, looped=False)
    assert verdict(some, run).failures == ()
    # No operand's load in sight: a thread would have 32 elements of one in a trip.
    assert verdict(dataclasses.replace(some, loads={"LDG.E.U16": 31}), run).failures == ()
    assert any("64 loads of 2 bytes" in f for f in verdict(some).failures)  # a step without vectors
    for change in (dict(looped=True), dict(loads={"LDG.E.U16": 32}), dict(loads={"LDG.E": 16, "LDG.E.U16": 65})):
        failures = verdict(dataclasses.replace(some, **change), run).failures
        assert any("loads of 2 bytes" in f for f in failures), (change, failures)


def test_pressure_is_judged_for_implicit_gemm_in_float16() -> None:
    slow = dataclasses.replace(GOOD, instructions=1000)
    assert any("issue pressure" in f for f in verdict(slow).failures)
    assert verdict(slow, numerics="bf16").failures == ()
    starved = recorded(case(256, 128, 4, 4), **TILE)  # 8 tiles
    assert not verdict(slow, starved).judged
    few = recorded(case(256, 24, 16, 64), **{**TILE, "block_n": 32})  # not many channels
    assert not verdict(dataclasses.replace(slow, macs=GOOD.macs // 2), few).judged


def test_issue_slots_where_memory_is_slower_than_the_tensor_cores() -> None:
    """There nothing is judged: memory is waited for."""
    run = recorded(case(64, 64, 128, 16), 100, **{**TILE, "unroll": 1})
    five = dataclasses.replace(GOOD, arch=100, mma_kind="tcgen05", mma=8, macs=0, instructions=1000)
    found = verdict(five, run, B200)
    assert not found.judged and found.over > 1
    assert not any("issue" in f for f in (*found.failures, *found.exceptions))


def test_a_rule_that_no_binary_of_the_layer_keeps_is_an_exception() -> None:
    """64 columns on B200: no tile of the kernel leaves its tensor cores enough issue slots."""
    run = recorded(case(128, 64, 64, 64), 100, **{**TILE, "unroll": 1})
    five = dataclasses.replace(GOOD, arch=100, mma_kind="tcgen05", mma=8, macs=0, instructions=1000)
    found = verdict(five, run, B200)
    assert found.judged and not any("issue" in f for f in found.failures)
    assert any("issue pressure" in f and "no tile" in f for f in found.exceptions)


def test_bytes_are_judged_where_memory_is_the_bound() -> None:
    ada = dataclasses.replace(DEVICES[89], dram_gb_per_second=300)  # little memory bandwidth
    run = recorded(case(32, 32, 64, 16), 89, **{**TILE, "block_n": 32, "block_k": 32, "unroll": 1})
    fast = dataclasses.replace(GOOD, macs=64 * 32 * 32, mma=8, instructions=20, shared=8192, registers=40)
    found = verdict(fast, run, ada)
    assert found.bound == "dram" and found.failures == ()
    run.ops.append(Op("clone", 2**24, 2**24))
    assert any("x the least (copies" in f for f in verdict(fast, run, ada).failures)


def test_too_few_programs() -> None:
    """32 programs of 64x64 for 108 multiprocessors: smaller tiles and a split exist. With a split it passes."""
    run = recorded(case(256, 128, 8, 4), **TILE)
    found = verdict(run=run)
    assert found.programs == 32 and any("32 programs for 108 multiprocessors" in f for f in found.failures)
    run.plan = dataclasses.replace(run.plan, splits=True, split_k=4)
    assert not any("programs for" in f for f in verdict(run=run).failures)


def test_grid_limits() -> None:
    run = recorded(LAYER, **TILE)
    run.calls[0] = dataclasses.replace(run.calls[0], grid=(10, 65536, 1))
    assert any("exceeds" in f for f in verdict(run=run).failures)


def altered(call: Call, big: bool, **arguments: Any) -> Call:
    job = call.job
    position = job.argument_names.index("BIG")
    constants = {k: big if k == (position,) else v for k, v in job.constants.items()}
    return dataclasses.replace(
        call, job=dataclasses.replace(job, constants=constants), arguments={**call.arguments, **arguments}
    )


def test_offsets() -> None:
    """32-bit offsets reach 2^31 elements of a tensor, or of an image with BIG."""
    run = recorded(LAYER, **TILE)
    assert run.plan is not None
    whole = ((64, 256, 2**9, 2**8), torch.float16)  # 2^31 elements
    image = ((64, 256, 2**12, 2**11), torch.float16)  # 2^31 in one image
    assert overflows(run.calls[0], run.plan) == []
    assert overflows(altered(run.calls[0], False, x_ptr=whole), run.plan)
    assert overflows(altered(run.calls[0], True, x_ptr=whole), run.plan) == []
    assert overflows(altered(run.calls[0], True, y_ptr=image), run.plan)
    assert overflows(altered(run.calls[0], True, w_ptr=((2**31,), torch.float16)), run.plan)
    assert overflows(altered(run.calls[0], True, N=2**24), run.plan)


# --- launches of others -----------------------------------------------------------------------------------------------


def test_eager_and_inductor_are_counted() -> None:
    """Convolution, BatchNorm, ReLU; the upsampled map is one more pass; Inductor makes one of what stands between."""
    ops = eager_ops(cases.find(["dcgan64.3"])[0], 16, torch.float16)
    assert [op.name for op in ops] == ["convolution", "native_batch_norm", "relu_"] and inductor_passes(ops) == 2
    y = 2 * 16 * 128 * 16 * 16
    assert ops[2] == Op("relu_", y, y) and ops[0].written == y
    ops = eager_ops(cases.upsample_case(16, 4, "up", (2,)), 2, torch.float16)
    assert [op.name for op in ops] == ["upsample_nearest2d", "convolution", "relu"] and inductor_passes(ops) == 3


def test_what_pytorch_runs_is_stood_for() -> None:
    """Modules outside the steps and steps that Triton cannot run appear with their reason; nothing is computed."""
    net = cases.Case(
        "net",
        "generator",
        (3, 4, 4),
        (2,),
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 32, 4, 2, 1), nn.AvgPool2d(2), nn.ConvTranspose2d(32, 16, 2, 2)),
    )
    few, pool, last = Recorder(net, "fp16")(2, 90)
    assert isinstance(few, StepRun) and "fewer than 16" in few.why_not and few.calls == []
    assert [op.name for op in few.ops] == ["convolution"]
    assert isinstance(pool, Unrun) and pool.module.startswith("AvgPool2d") and pool.why_not
    assert isinstance(last, StepRun) and last.why_not == "" and last.input_shape == (2, 32, 4, 4)
    found = rehearse.rehearse([net], [90], ["fp16"], inspections=FakeInspections())
    assert [bool(r.why_not) for r in found.rows] == [True, False] and list(found.unrun) == ["net"]


class FakeInspections(Inspections):
    """Reports without a compiler."""

    def of(self, jobs: Any, progress: Any = None) -> dict[str, Report | Failed]:
        return {job.key: GOOD for job in jobs}


def test_recording_compiles_nothing_and_equal_binaries_have_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.compiler.compiler.CompiledKernel.__init__", lambda *a, **k: pytest.fail("compiled"))
    recorder = Recorder(case(64, 64, 16, 16), "fp16")
    keys = {recorder(batch, 80)[0].calls[0].job.key for batch in (16, 17)}
    assert len(keys) == 1  # the batch size is no part of a binary
    other = recorder(16, 90)[0].calls[0].job.key
    assert other not in keys
    with recording(80) as calls:
        pass
    assert calls == []


# --- the command and the cache ----------------------------------------------------------------------------------------


@pytest.fixture
def mini(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The command on one tiny case, its cache in ``tmp_path``."""
    monkeypatch.setattr(cases, "find", lambda names: (case(32, 32, 8, 2),) if names == ["layer"] else cases.CASES)
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path / "cache"))
    inspections.folder.cache_clear()
    yield tmp_path
    inspections.folder.cache_clear()


def test_command_and_cache(mini: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: the second time nothing is compiled. The files say the same as the exit status."""
    arguments = ["--case", "layer", "--arch", "80", "--dtype", "fp16", "--jobs", "0", "--output", str(mini / "out")]
    status = rehearse.main(arguments)
    first = capsys.readouterr().out
    compiled = len(list((mini / "cache").rglob("*.json")))
    assert compiled >= 1 and f"{compiled} compiled now" in first
    monkeypatch.setattr(inspections, "compile_job", lambda job: pytest.fail("compiled again"))
    assert rehearse.main(arguments) == status
    assert "0 compiled now" in capsys.readouterr().out
    written = json.loads((mini / "out" / "rehearsal.json").read_text())
    row = dict(zip(written["columns"], written["rows"][0], strict=True))
    assert row["arch"] == 80 and row["dtype"] == "fp16" and row["mma"] > 0 and row["spilled"] == 0
    assert bool(row["failures"]) == (status == 1)
    assert row["plan"] in (mini / "out" / "README.md").read_text()
    assert (mini / "out" / "bytes.png").stat().st_size > 1000


def test_a_broken_cache_entry_is_made_again(mini: Path) -> None:
    where = mini / "cache"
    job = Recorder(case(32, 32, 8, 2), "fp16")(2, 80)[0].calls[0].job
    first = Inspections(0, where).of([job])[job.key]
    (entry,) = where.rglob("*.json")
    for text in ("", "{", "[]", '{"name": 1}'):
        entry.write_text(text)
        assert Inspections(0, where).of([job])[job.key] == first
    assert json.loads(entry.read_text())["registers"] == first.registers


def test_what_does_not_compile_fails_and_is_not_kept(mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: Any) -> Any:
        raise RuntimeError("ptxas\nsays no")

    monkeypatch.setattr(inspections, "compile_job", refuse)
    (row,) = rehearse.rehearse([case(32, 32, 8, 2)], [80], ["fp16"], inspections=Inspections(0, mini)).rows
    assert row.failures == ("does not compile: RuntimeError: ptxas says no",)
    assert not list(mini.rglob("*.json"))


def test_failures_end_in_status_1(mini: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    class Spilling(FakeInspections):
        def of(self, jobs: Any, progress: Any = None) -> dict[str, Report | Failed]:
            return {job.key: dataclasses.replace(GOOD, stack=16) for job in jobs}

    monkeypatch.setattr(rehearse, "Inspections", Spilling)
    assert rehearse.main(["--case", "layer", "--quick"]) == 1
    said = capsys.readouterr().out
    assert "spills: 16 bytes of stack" in said and "Kernels that spill: 2" in said and "written only" in said


def test_a_norm_by_its_input_counts_beside_the_convolution() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.InstanceNorm2d(32), nn.ReLU())

    (run,) = Recorder(cases.Case("layer", "layers", (64, 16, 16), (8,), make), "fp16")(8, 80)
    assert isinstance(run, StepRun) and run.plan is not None
    y = 8 * 32 * 32 * 32 * 2
    moved = traffic(run, run.plan, 2, DEVICES[80])
    # Merging is next to nothing; the apply pass reads and writes the result once.
    assert 2 * y <= moved.parts["norm"] < 2.5 * y
    assert moved.least == 8 * 64 * 16 * 16 * 2 + 64 * 32 * 16 * 2 + 3 * y + run.vectors
