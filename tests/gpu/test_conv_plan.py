"""Plans: validity, the regimes, determinism, and a table of what is chosen for known layers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from cnnfast.gpu import conv_choice
from cnnfast.gpu.conv_choice import BINARIES, candidates, choose_plan, modelled_clocks, trip_clocks
from cnnfast.gpu.conv_plan import Plan, is_valid, lower, tap_map
from cnnfast.gpu.conv_wgrad_plan import choose_wgrad_plan
from cnnfast.gpu.devices import DEVICES, device_for, resident_blocks
from cnnfast.spec import ConvSpec, Precision, collapse_upsample

HALF, BF16 = Precision(torch.float16), Precision(torch.bfloat16)
TF32, EXACT = Precision(torch.float32, True), Precision(torch.float32)
PRECISIONS = {"fp16": HALF, "bf16": BF16, "tf32": TF32, "fp32": EXACT}

# name -> (spec, input size): the layers of a 64x64 DCGAN, its relatives, and an upsampling block.
LAYERS = {
    "dcgan1": (ConvSpec.make(100, 512, 4, 1, 0), (1, 1)),
    "dcgan2": (ConvSpec.make(512, 256, 4, 2, 1), (4, 4)),
    "dcgan3": (ConvSpec.make(256, 128, 4, 2, 1), (8, 8)),
    "dcgan4": (ConvSpec.make(128, 64, 4, 2, 1), (16, 16)),
    "dcgan5": (ConvSpec.make(64, 3, 4, 2, 1), (32, 32)),
    "upsample": (collapse_upsample(256, 256, (3, 3), (2, 2), (1, 1)), (64, 64)),
}
OTHERS = {
    "cyclegan": (ConvSpec.make(256, 128, 3, 2, 1, 1), (64, 64)),
    "nnunet": (ConvSpec.make(128, 64, 2, 2), (32, 32)),
    "waifu2x": (ConvSpec.make(64, 3, 4, 2, 3), (80, 80)),
    "vocoder": (ConvSpec.make(512, 256, 16, 8, 4, ndim=1).as_2d(), (1, 100)),
    "groups": (ConvSpec.make(64, 64, 4, 2, 1, groups=4), (16, 16)),
    "dilated": (ConvSpec.make(32, 48, 3, 2, 1, 1, dilation=2), (16, 17)),
    "odd": (ConvSpec.make(17, 19, 5, 3, 2), (5, 7)),
    "plain": (ConvSpec.make(64, 64, 3, 1, 1, transposed=False), (32, 32)),
    "plain7": (ConvSpec.make(64, 3, 7, 1, 3, transposed=False), (256, 256)),
}
BATCHES = (1, 16, 64)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layer", {**LAYERS, **OTHERS})
def test_every_chosen_plan_is_valid(layer: str, precision: str) -> None:
    spec, size = {**LAYERS, **OTHERS}[layer]
    for device, batch in itertools.product(DEVICES.values(), BATCHES):
        plan = choose_plan(spec, batch, size, PRECISIONS[precision], device)
        assert is_valid(plan, PRECISIONS[precision], device), plan.name
        grid = plan.grid(batch, spec.output_size(size))
        assert all(1 <= g <= limit for g, limit in zip(grid, (2**31 - 1, 65535, 65535), strict=True)), grid
        rows, columns = plan.lowering.rows(batch, spec.output_size(size)), plan.lowering.columns
        assert plan.tiles(batch, spec.output_size(size)) * plan.block_m * plan.block_n >= rows * columns


def test_choice_is_deterministic() -> None:
    spec, size = LAYERS["dcgan3"]
    first = choose_plan(spec, 16, size, HALF, DEVICES[90])
    choose_plan.cache_clear(), lower.cache_clear()
    assert choose_plan(spec, 16, size, HALF, DEVICES[90]) == first


def test_regimes() -> None:
    def regime(layer: str, batch: int = 16) -> str:
        spec, size = {**LAYERS, **OTHERS}[layer]
        return choose_plan(spec, batch, size, HALF, DEVICES[90]).lowering.regime

    assert regime("dcgan1") == "latent"
    assert [regime(f"dcgan{i}") for i in (2, 3, 4)] == ["phases"] * 3
    assert regime("dcgan5") == "merged"  # three output channels: x is read once for all phases
    assert regime("waifu2x") == "merged"
    assert regime("nnunet") == "merged"  # kernel = stride: merging wastes nothing
    assert regime("cyclegan") == regime("upsample") == regime("vocoder") == regime("plain") == "phases"


@pytest.mark.parametrize("arch", [80, 90])
def test_starved_shapes_split_k(arch: int) -> None:
    """512 -> 256 at 4x4, batch 1: fewer tiles than multiprocessors."""
    spec, size = LAYERS["dcgan2"]
    assert choose_plan(spec, 1, size, HALF, DEVICES[arch]).split_k > 1
    for batch in (1, 16, 64):
        plan = choose_plan(spec, batch, size, HALF, DEVICES[arch])
        programs = math.prod(plan.grid(batch, spec.output_size(size)))
        assert programs >= 0.95 * DEVICES[arch].multiprocessors or plan.split_k > 1, plan.name
    big, big_size = LAYERS["upsample"]
    assert choose_plan(big, 16, big_size, HALF, DEVICES[arch]).split_k == 1


@pytest.mark.parametrize("arch", DEVICES)
def test_nchw_results_take_smaller_tiles(arch: int) -> None:
    """A store that finds no two elements of a row together needs registers for its addresses."""
    for spec, size in LAYERS.values():
        for batch in BATCHES:
            plan = choose_plan(spec, batch, size, HALF, DEVICES[arch], channels_last=False)
            assert plan.block_m * plan.block_n <= 32 * 32 * plan.num_warps, plan.name


# What the heuristic chooses in float16. A change here is a change of performance: measure it, then renew the table.
CHOSEN = {
    (80, "dcgan1", 1): "latent 16x32x64*1 w2 s3",
    (80, "dcgan1", 16): "latent 16x32x64*1 w2 s3",
    (80, "dcgan1", 64): "latent 64x64x32*1 w4 s3",
    (80, "dcgan2", 1): "phases 32x32x64*2 w2 s3 split2",
    (80, "dcgan2", 16): "phases 32x32x64*2 w2 s3 split1",
    (80, "dcgan2", 64): "phases 128x128x32*2 w8 s3 split2",
    (80, "dcgan3", 1): "phases 16x16x64*2 w1 s3",
    (80, "dcgan3", 16): "phases 64x64x32*2 w4 s3",
    (80, "dcgan3", 64): "phases 128x128x32*2 w8 s3",
    (80, "dcgan4", 1): "phases 16x16x64*2 w1 s3",
    (80, "dcgan4", 16): "phases 128x64x32*2 w4 s3",
    (80, "dcgan4", 64): "phases 128x64x32*2 w4 s3",
    (80, "dcgan5", 1): "merged 16x16x32*2 w1 s3 split1",
    (80, "dcgan5", 16): "merged 64x16x32*2 w2 s3",
    (80, "dcgan5", 64): "merged 64x16x32*2 w2 s3",
    (80, "upsample", 1): "phases 128x128x32*2 w8 s3",
    (80, "upsample", 16): "phases 128x128x32*2 w8 s3",
    (80, "upsample", 64): "phases 128x128x32*2 w8 s3",
    (90, "dcgan1", 1): "latent 64x64x64*1 w4 s3",
    (90, "dcgan1", 16): "latent 64x64x64*1 w4 s3",
    (90, "dcgan1", 64): "latent 64x64x64*1 w4 s3",
    (90, "dcgan2", 1): "phases 32x32x64*2 w2 s3 split4",
    (90, "dcgan2", 16): "phases 32x32x64*2 w2 s3 split1",
    (90, "dcgan2", 64): "phases 128x128x64*1 w8 s3 split2",
    (90, "dcgan3", 1): "phases 16x16x64*2 w1 s3",
    (90, "dcgan3", 16): "phases 64x32x64*1 w4 s5",
    (90, "dcgan3", 64): "phases 128x128x64*1 w4 s3",
    (90, "dcgan4", 1): "phases 16x16x64*2 w1 s3",
    (90, "dcgan4", 16): "phases 128x64x64*1 w4 s3",
    (90, "dcgan4", 64): "phases 128x64x64*1 w4 s3",
    (90, "dcgan5", 1): "merged 16x16x32*2 w1 s3 split1",
    (90, "dcgan5", 16): "merged 128x16x64*1 w4 s3",
    (90, "dcgan5", 64): "merged 128x16x64*1 w4 s3",
    (90, "upsample", 1): "phases 128x256x64*1 w8 s3",
    (90, "upsample", 16): "phases 128x256x64*1 w8 s3",
    (90, "upsample", 64): "phases 128x256x64*1 w8 s3",
}


@pytest.mark.parametrize("key", CHOSEN, ids=lambda k: f"sm{k[0]}-{k[1]}-{k[2]}")
def test_chosen_plans(key: tuple[int, str, int]) -> None:
    arch, layer, batch = key
    spec, size = LAYERS[layer]
    assert choose_plan(spec, batch, size, HALF, DEVICES[arch]).name == CHOSEN[key]


VALID = Plan(lower(*LAYERS["dcgan3"]), 64, 64, 32, 1, 4, 3)

INVALID = {
    "block-not-a-power": dict(block_m=48),
    "block-below-16": dict(block_k=8),
    "zero-warps": dict(num_warps=0),
    "three-warps": dict(num_warps=3),
    "unroll-0": dict(unroll=0),
    "too-many-accumulators": dict(block_m=256, block_n=128),
    "tile-below-the-warps": dict(block_m=16, block_n=16, num_warps=8),
    "shared-memory": dict(block_k=128, unroll=4, num_stages=4),
    "split-0": dict(splits=True, split_k=0),
    "split-over-the-steps": dict(splits=True, split_k=33),
    "split-by-a-binary-that-cannot": dict(split_k=2),
}


def test_a_valid_plan() -> None:
    assert is_valid(VALID, HALF, DEVICES[80]) and VALID.steps() == 32
    assert is_valid(dataclasses.replace(VALID, splits=True, split_k=32), HALF, DEVICES[80])
    assert VALID.name == "phases 64x64x32*1 w4 s3"
    assert dataclasses.replace(VALID, splits=True, split_k=2).name.endswith(" split2")


@pytest.mark.parametrize("change", INVALID)
def test_invalid_plans(change: str) -> None:
    assert not is_valid(dataclasses.replace(VALID, **INVALID[change]), HALF, DEVICES[80])


def test_two_products_of_a_trip_wait_for_each_other_on_sm_90() -> None:
    """wgmma's group would be empty between them; mma.sync has none."""
    two = dataclasses.replace(VALID, unroll=2)
    assert is_valid(two, HALF, DEVICES[80]) and not is_valid(two, HALF, DEVICES[90])
    assert is_valid(dataclasses.replace(two, block_m=32), HALF, DEVICES[90])


def test_shared_memory_decides_by_device() -> None:
    plan = dataclasses.replace(VALID, block_m=128, block_n=128, block_k=64, num_warps=8)
    assert is_valid(plan, HALF, DEVICES[90]) and not is_valid(plan, TF32, DEVICES[86])
    assert plan.shared_memory(2) == 3 * 256 * 64 * 2 + 64


def test_exact_float32_takes_smaller_tiles() -> None:
    plan = dataclasses.replace(VALID, block_m=128, block_n=128, num_warps=8, block_k=16)
    assert is_valid(plan, TF32, DEVICES[90]) and not is_valid(plan, EXACT, DEVICES[90])


def test_three_products_are_of_exact_float32_in_short_blocks() -> None:
    three = dataclasses.replace(VALID, three=True)
    assert is_valid(three, EXACT, DEVICES[80]) and three.name == "phases 64x64x32*1 w4 s3 tf32x3"
    for other in (HALF, BF16, TF32):
        assert not is_valid(three, other, DEVICES[80])
    assert not is_valid(dataclasses.replace(three, block_k=64), EXACT, DEVICES[90]), "tensor cores cut longer sums"
    large = dataclasses.replace(three, block_m=128, num_warps=8)
    assert is_valid(large, EXACT, DEVICES[80])
    assert not is_valid(dataclasses.replace(large, num_warps=4), EXACT, DEVICES[80]), "an operand has two parts"
    assert not is_valid(three, EXACT, DEVICES[100]), "tcgen05"
    assert is_valid(dataclasses.replace(three, block_m=32), EXACT, DEVICES[100])


def test_three_products_take_three_times_the_tensor_cores() -> None:
    """By the data sheet's rate, TF32's is half of float16's."""
    clocks = trip_clocks(dataclasses.replace(VALID, three=True), EXACT, DEVICES[80])
    assert clocks["tensor"] == 3 * 64 * 64 * 32 / 512
    assert clocks["issue"] == pytest.approx(755, rel=0.05), "instructions of the compiled loop (triton 3.7.1)"
    wide = dataclasses.replace(VALID, block_m=128, num_warps=8, three=True)
    clocks = trip_clocks(wide, EXACT, DEVICES[90])
    assert clocks["tensor"] == 3 * 128 * 64 * 32 / 1024
    assert clocks["issue"] == pytest.approx(2 * 349, rel=0.05), "of 8 warps"


@pytest.fixture
def of_any_kind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As it will be where a GPU has measured three products."""
    monkeypatch.setattr(conv_choice, "KINDS", (False, True))
    choose_plan.cache_clear(), choose_wgrad_plan.cache_clear()
    yield
    monkeypatch.undo()
    choose_plan.cache_clear(), choose_wgrad_plan.cache_clear()


def test_calls_take_the_cuda_cores_until_a_gpu_has_measured_three_products() -> None:
    for (spec, size), device, batch in itertools.product(LAYERS.values(), DEVICES.values(), BATCHES):
        assert not choose_plan(spec, batch, size, EXACT, device).three
        assert not choose_wgrad_plan(spec, batch, size, EXACT, device).three  # type: ignore[arg-type]


def test_the_model_prefers_three_products_where_tensor_cores_are_fast(of_any_kind: None) -> None:
    spec, size = LAYERS["dcgan3"]
    for arch, device in DEVICES.items():
        fast = arch in (80, 90, 100)  # elsewhere a third of TF32's rate is below that of the CUDA cores
        assert choose_plan(spec, 64, size, EXACT, device).three == fast
        assert choose_wgrad_plan(spec, 64, (8, 8), EXACT, device).three == fast
        for other in (HALF, BF16, TF32):
            assert not choose_plan(spec, 64, size, other, device).three


def test_devices() -> None:
    assert device_for(87).arch == 86 and device_for(121).arch == 120 and device_for(75).arch == 80
    mine = device_for(90, 78)
    assert mine.multiprocessors == 78 and dataclasses.replace(mine, multiprocessors=132) == DEVICES[90]
    assert device_for(80) is DEVICES[80] and device_for(80, 108) is DEVICES[80]


@pytest.mark.parametrize("layer", {**LAYERS, **OTHERS})
def test_tap_map_names_every_tap_once_per_phase(layer: str) -> None:
    """Merged or latent: every tap of the weight that reaches the output stands in the map once, none twice."""
    spec, size = {**LAYERS, **OTHERS}[layer]
    low = lower(spec, size)
    if not low.merged:
        return
    for dim, rows in enumerate(tap_map(low)):
        assert len(rows) == low.merge[dim] and {len(r) for r in rows} == {low.kernel[dim]}
        taps = sorted(t for row in rows for t in row if t >= 0)
        expected = sorted(tap for ph in spec.phases[dim] for tap, _ in ph.pairs())
        if low.regime == "latent":  # one input position: a tap whose output is cropped has no place
            k, s, p, d = (v[dim] for v in (spec.kernel_size, spec.stride, spec.padding, spec.dilation))
            expected = [t for t in range(k) if 0 <= d * t - p < low.merge[dim]]
            assert s >= 1
        assert taps == expected


# --- a menu of few binaries -------------------------------------------------------------------------------------------

SIZES = [(n, (h, w)) for n in (1, 3, 16, 64) for h, w in ((3, 5), (4, 4), (16, 16), (33, 64), (128, 96))]


def binaries(plan: Plan) -> set[Plan | str]:
    """What a launch of the plan compiles: the number of parts of K is no compile-time constant."""
    return {dataclasses.replace(plan, split_k=1)} | ({"second pass"} if plan.split_k > 1 else set())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("arch", DEVICES)
def test_a_layer_has_few_binaries(arch: int, precision: str) -> None:
    """Over twenty sizes of batch and image, of either dimension."""
    assert len(SIZES) == 20
    for spec, size in {**LAYERS, **OTHERS}.values():
        seen = set()
        for batch, (h, w) in SIZES:
            at = (1, 1) if size == (1, 1) else (1, h * w) if size[0] == 1 else (h, w)
            seen |= binaries(choose_plan(spec, batch, at, PRECISIONS[precision], DEVICES[arch]))
        assert 1 <= len(seen) <= BINARIES, seen


def test_candidates_are_valid_and_contain_the_choice() -> None:
    for (spec, size), precision in itertools.product(LAYERS.values(), PRECISIONS.values()):
        found = candidates(spec, 16, size, precision, DEVICES[90])
        assert len(found) == len(set(found)) and all(is_valid(p, precision, DEVICES[90]) for p in found)
        assert choose_plan(spec, 16, size, precision, DEVICES[90]) in found
        assert {p.three for p in found} == ({False, True} if precision == EXACT else {False})
        low = found[0].lowering
        clocks = [modelled_clocks(p, low.rows(16, spec.output_size(size)), precision, DEVICES[90]) for p in found]
        assert clocks == sorted(clocks)


def test_resident_blocks() -> None:
    """Whichever limit is reached first: warps, blocks, registers (handed out by 256), shared memory (1 KiB of it is the
    system's)."""
    a100, rtx = DEVICES[80], DEVICES[86]
    assert resident_blocks(a100, 8, 32, 0) == 8
    assert resident_blocks(rtx, 1, 16, 0) == 16
    assert resident_blocks(a100, 4, 129, 0) == 65536 // (136 * 128)
    assert resident_blocks(a100, 4, 32, 40 * 1024) == 4
    assert resident_blocks(a100, 4, 32, 41 * 1024) == 3
