"""The weight gradient's kernel: geometries, dtypes, tiles and splits against float64, on a GPU, under ttsem or
emulated; and its plans."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from cnnfast import reference
from cnnfast.gpu.conv_wgrad_plan import SIZES, _tiles, choose_wgrad_plan, is_valid_wgrad
from cnnfast.gpu.devices import DEVICES, device_for, target_device, tf32_convolutions
from cnnfast.memory_format import to_format
from cnnfast.spec import ConvSpec, Precision
from cnnfast.tolerance import round_tf32

from ..tolerance import assert_close

PRECISIONS = {
    "fp16": Precision(torch.float16),
    "bf16": Precision(torch.bfloat16),
    "fp32": Precision(torch.float32),
    "tf32": Precision(torch.float32, tf32=True),
}


@dataclass(frozen=True)
class Case:
    name: str
    spec: ConvSpec
    size: tuple[int, ...] = (4, 5)
    batch: int = 2
    channels_last: bool = True  # of the weight
    plan: tuple[tuple[str, Any], ...] = ()


def case(name: str, c_in: int, c_out: int, k: Any, s: Any = 1, p: Any = 0, **more: Any) -> Case:
    own = {f: more.pop(f) for f in ("size", "batch", "channels_last", "plan") if f in more}
    return Case(name, ConvSpec.make(c_in, c_out, k, s, p, ndim=len(own.get("size", (4, 5))), **more), **own)


REGIMES = (
    case("transposed", 64, 48, 4, 2, 1),
    case("plain", 32, 64, 3, 1, 1, transposed=False, size=(5, 6)),
    case("merged", 64, 3, 4, 2, 1, size=(6, 5)),
    case("latent", 100, 32, 4, size=(1, 1), batch=5),
    case("wide", 32, 32, 3, 1, 1, transposed=False, size=(2, 33)),
    case("split", 32, 32, 4, 2, 1, size=(8, 8), plan=(("splits", 4),)),
)
LARGE = (("num_warps", 8), ("num_stages", 2))
GEOMETRY = (
    case("cyclegan", 32, 32, 3, 2, 1, output_padding=1, size=(5, 7)),
    case("waifu2x", 32, 32, 4, 2, 3, size=(7, 5)),
    case("asymmetric", 32, 32, (3, 5), (1, 2), (0, 2), output_padding=(0, 1), size=(4, 3)),
    case("dilation-no-taps", 32, 32, 3, 2, 1, output_padding=1, dilation=2),
    case("output-padding-by-dilation", 32, 32, 2, 1, 0, output_padding=2, dilation=3, size=(3, 4)),
    case("kernel-equals-stride", 32, 48, 2, 2),
    case("groups", 64, 32, 4, 2, 1, groups=2),
    case("groups-few", 32, 8, 4, 2, 1, groups=2),
    case("masked-channels", 100, 40, 4, 2, 1, size=(3, 4)),
    case("odd-channels", 17, 19, 3, 2, 1),
    case("few-in", 3, 32, 4, 2, 1, transposed=False, size=(8, 7)),
    case("few-out", 32, 3, 3, 1, 1, transposed=False, size=(6, 5)),
    case("one-channel", 16, 1, 4, 2, 1),
    case("strided-odd", 32, 32, (3, 5), (2, 3), (1, 0), dilation=(2, 1), transposed=False, size=(8, 11)),
    case("plain-groups", 64, 64, 3, 2, 1, groups=2, transposed=False, size=(7, 6)),
    case("one-dimension", 32, 32, (1, 16), (1, 8), (0, 4), size=(1, 40)),
    case("1x1", 32, 64, 1, transposed=False, size=(3, 5)),
    case("one-pixel", 32, 32, 4, 2, 1, size=(1, 1), batch=1),
    case("default-layout", 32, 48, 4, 2, 1, channels_last=False),
    case("default-layout-split", 32, 48, 4, 2, 1, size=(8, 8), channels_last=False, plan=(("splits", 3),)),
    case("splits-without-positions", 32, 32, 4, 2, 1, size=(4, 4), plan=(("splits", 7),)),
    case("merged-split", 64, 3, 4, 2, 1, size=(8, 8), plan=(("splits", 2),)),
    case("tiles", 72, 72, 3, 2, 1, size=(5, 5), plan=(("block_m", 32), ("block_n", 16), ("num_warps", 2))),
    case("box-of-part-of-a-line", 32, 32, 3, 1, 1, size=(3, 20), plan=(("box", (1, 3, 16)), ("even", False))),
    case("box-beyond-every-edge", 32, 32, 3, 2, 1, size=(5, 7), batch=3, plan=(("box", (2, 3, 5)), ("even", False))),
    case("even-box-of-lines", 32, 32, 4, 2, 1, size=(6, 32), batch=1),
    case("even-box-of-images", 32, 24, 3, 2, 1, size=(2, 4), batch=16, output_padding=1),
    case("even-box-masked-channels", 24, 24, 3, 1, 1, size=(8, 8), transposed=False),
    case("widest-tile", 128, 64, 4, 2, 1, size=(4, 8), batch=6, plan=(*LARGE, ("block_m", 128), ("block_n", 256))),
    case("tallest-tile", 256, 32, 3, 2, 1, size=(4, 8), batch=6, plan=(*LARGE, ("block_m", 256), ("block_n", 128))),
    case("columns-across-taps", 64, 80, 3, 1, 1, transposed=False, size=(4, 6)),
)


def of(name: str) -> Case:
    return next(c for c in REGIMES + GEOMETRY if c.name == name)


def gradient(x: torch.Tensor, dy: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    weight = torch.zeros(spec.weight_shape, dtype=x.dtype, requires_grad=True)
    return torch.autograd.grad(reference.conv(x, weight, None, spec), weight, dy)[0]


def operands(c: Case, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(c.batch, c.spec.in_channels, *c.size)
    dy = torch.randn(c.batch, c.spec.out_channels, *c.spec.output_size(c.size))
    return x.to(precision.dtype), dy.to(precision.dtype)


def run(c: Case, precision: Precision, device: torch.device) -> torch.Tensor:
    from cnnfast.gpu import conv_wgrad

    x, dy = (t.to(device) for t in operands(c, precision))
    like = to_format(torch.empty(c.spec.weight_shape, dtype=x.dtype, device=device), c.channels_last)
    plan = None
    if c.plan:
        *planes, h, w = (x if c.spec.transposed else dy).shape[2:]
        target = target_device(x)
        chosen = choose_wgrad_plan(c.spec, c.batch * math.prod(planes), (h, w), precision, target)
        plan = replace(chosen, **dict(c.plan))
        assert is_valid_wgrad(plan, precision, target)
    with tf32_convolutions(precision.tf32):
        dw = conv_wgrad.run(x, dy, c.spec, like, plan)
    assert dw is not None and dw.stride() == like.stride() and dw.dtype == x.dtype
    return dw


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("c", REGIMES, ids=lambda c: c.name)
def test_regimes(c: Case, precision: Precision, device: torch.device, launches: list[str], poison: None) -> None:
    check(c, precision, device)
    assert len(launches) == 1 and launches[0].startswith("wgrad")


@pytest.mark.parametrize("c", GEOMETRY, ids=lambda c: c.name)
def test_geometry(c: Case, device: torch.device, poison: None) -> None:
    check(c, PRECISIONS["fp16"], device)


def check(c: Case, precision: Precision, device: torch.device) -> None:
    x, dy = operands(c, precision)
    wide = (round_tf32(x), round_tf32(dy)) if precision.tf32 else (x.float(), dy.float())
    yardstick = gradient(*wide, c.spec).to(precision.dtype)
    assert_close(run(c, precision, device), gradient(x.double(), dy.double(), c.spec), yardstick, c.name)


@pytest.mark.parametrize("name", ["split", "merged-split", "transposed"])
def test_runs_are_equal_to_the_bit(name: str, device: torch.device) -> None:
    c = of(name)
    assert torch.equal(run(c, PRECISIONS["fp32"], device), run(c, PRECISIONS["fp32"], device))


@pytest.mark.parametrize("name", ["transposed", "box-beyond-every-edge"])
def test_offsets_of_64_bits(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    check_64_bits(of(name), device, monkeypatch)


def check_64_bits(c: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The binary for tensors of 2^31 elements and more, on smaller ones."""
    from cnnfast.gpu import conv_wgrad
    from cnnfast.gpu.binary import Binary

    def prepare(*args: Any) -> conv_wgrad.WgradLaunch:
        launch = real(*args)
        kernel, values = launch.binary.kernel, launch.binary.constants
        constants = dict(zip(kernel.arg_names[-len(values) :], values, strict=True))
        assert constants["BIG"] is False
        return replace(launch, binary=Binary(kernel, {**constants, "BIG": True}, **launch.binary.options))

    real = conv_wgrad.prepare
    monkeypatch.setattr(conv_wgrad, "prepare", prepare)
    check(c, PRECISIONS["fp16"], device)


def test_empty(device: torch.device) -> None:
    from cnnfast.gpu import conv_wgrad

    spec = ConvSpec.make(32, 16, 4, 2, 1)
    like = torch.empty(spec.weight_shape, device=device)
    dw = conv_wgrad.run(torch.empty(0, 32, 4, 4, device=device), torch.empty(0, 16, 8, 8, device=device), spec, like)
    assert dw is not None and dw.shape == like.shape and not dw.any()


# --- plans ------------------------------------------------------------------------------------------------------------

LAYERS = [c.spec for c in REGIMES] + [
    ConvSpec.make(512, 256, 4, 2, 1),
    ConvSpec.make(128, 64, 4, 2, 1),
    ConvSpec.make(256, 256, 3, 1, 1, transposed=False),
]
GRIDS = [(1, 1), (4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (28, 28), (1, 4096), (7, 100)]


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_every_plan_is_valid_and_a_layer_needs_few_binaries(arch: int, precision: Precision) -> None:
    device = device_for(arch)
    for spec in LAYERS:
        plans = [choose_wgrad_plan(spec, n, grid, precision, device) for grid in GRIDS for n in (1, 16, 64)]
        assert all(is_valid_wgrad(p, precision, device) for p in plans)
        assert len({replace(p, splits=1, box=(1, 1, 1)) for p in plans}) <= 2 * len(
            SIZES
        )  # the others are run-time arguments


def test_positions_are_split_until_the_gpu_is_full() -> None:
    device, half = device_for(80), PRECISIONS["fp16"]
    plan = choose_wgrad_plan(ConvSpec.make(128, 64, 4, 2, 1), 64, (16, 16), half, device)
    programs = plan.tiles() * plan.splits
    assert 0.95 * device.multiprocessors <= programs <= device.multiprocessors  # one wave of long sums
    assert plan.trips(64, (16, 16)) >= 4 * plan.splits


POSITIONS = [(n, h, w) for n in (1, 3, 16, 64) for h, w in ((1, 1), (4, 4), (5, 7), (16, 24), (66, 66), (2, 131))]


@pytest.mark.parametrize("precision", (PRECISIONS["fp16"], PRECISIONS["tf32"]), ids=("fp16", "tf32"))
@pytest.mark.parametrize("positions", POSITIONS, ids=lambda p: "x".join(map(str, p)))
def test_trips_cover_every_position(positions: tuple[int, int, int], precision: Precision) -> None:
    n, *grid = positions
    plan = choose_wgrad_plan(LAYERS[0], n, tuple(grid), precision, device_for(80))
    trips, total = plan.trips(n, grid), math.prod(positions)
    assert math.prod(plan.box) <= plan.block_k
    assert trips == math.prod(-(-size // r) for size, r in zip(positions, plan.box, strict=True))
    assert plan.even == (trips * plan.block_k == total)
    # A run of a line alone is one of the boxes that were tried.
    assert total <= trips * plan.block_k and trips <= n * grid[0] * -(-grid[1] // plan.block_k)


def test_boxes_waste_little() -> None:
    """Of a batch of 16: nothing where sizes have powers of two, little where they are odd."""
    half, device = PRECISIONS["fp16"], device_for(80)
    for size in range(4, 131):
        plan = choose_wgrad_plan(LAYERS[0], 16, (size, size), half, device)
        assert plan.even == (size % 2 == 0), size
        assert plan.trips(16, (size, size)) * plan.block_k <= 1.35 * 16 * size * size, size


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("arch", DEVICES)
def test_no_plan_gives_a_warp_more_than_it_has_registers_for(arch: int, precision: str) -> None:
    """One warp with a tile of 16x64 takes 255 registers and a stack (sm_90, float16): no layer gets such a plan."""
    for c_in, c_out in ((16, 16), (64, 16), (16, 64), (64, 64), (256, 512)):
        for plan in _tiles(ConvSpec.make(c_in, c_out, 4, 2, 1), PRECISIONS[precision], DEVICES[arch], False):
            assert plan.num_warps > 1 or plan.block_m * plan.block_n <= 16 * 32, plan.name
