"""The Gluon kernel of sm_90 against float64, where it applies, and its plans. On an sm_90, under ttsem or emulated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cnnfast.activations import ACTIVATIONS
from cnnfast.gpu import conv_hopper_plan as plans
from cnnfast.gpu.conv_hopper_plan import BoxPlan
from cnnfast.gpu.devices import DEVICES, Device
from cnnfast.spec import Precision
from cnnfast.step import Operands, Step

from ..cases import CONTIGUOUS, PRECISIONS, Case, conv, fitted, reference, upsample
from ..tolerance import assert_close
from .test_conv_statistics import check_statistics

pytestmark = pytest.mark.usefixtures("gluon_under_ttsem")
SMALL = replace(DEVICES[90], multiprocessors=3)  # so that each program has several tiles


@pytest.fixture
def hopper(device: torch.device, poison: None, monkeypatch: pytest.MonkeyPatch) -> Device:
    """An sm_90 of few multiprocessors; on a GPU that is none, nothing is to be had."""
    from cnnfast.gpu import conv as launch
    from cnnfast.gpu.devices import target_device

    if (
        device.type == "cuda"
        and torch.version.cuda is not None
        and target_device(torch.empty(0, device=device)).arch != 90
    ):
        pytest.skip("this GPU's compute capability is not 9.0")
    monkeypatch.setattr(launch, "target_device", lambda x: SMALL)
    return SMALL


def plans_of(case: Case, precision: str) -> list[BoxPlan]:
    dtype, _ = PRECISIONS[precision]
    return plans.candidates(case.step, case.batch, case.size, Precision(dtype), SMALL)


def check(case: Case, precision: str, device: torch.device, launches: list[str], plan: BoxPlan | None = None) -> None:
    dtype, _ = PRECISIONS[precision]
    launch_and_check(case, case.operands(dtype, device), launches, plan or plans_of(case, precision)[0])


def launch_and_check(case: Case, o: Operands, launches: list[str], plan: BoxPlan) -> None:
    from cnnfast.gpu import conv as launch

    launches.clear()
    with torch.no_grad():
        y = launch.run(case.step, o, True, plan)
    assert launches == [plan.name]
    exact, yardstick, before = reference(case.step, o, False)
    assert y is not None and y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, exact, yardstick, f"{case.id} {o.x.dtype} {plan.name}", before)


# Geometries: every way in which a tap, a phase, a group or a border can lie, at the sizes of a few boxes.
GEOMETRY = (
    conv("dcgan", "phases", 64, 64, 4, 2, 1, size=(7, 9), batch=3),
    conv("cyclegan", "phases", 64, 64, 3, 2, 1, 1, size=(6, 11)),
    conv("plain", "phases", 64, 64, 3, 1, 1, transposed=False, size=(9, 13)),
    conv("strided", "phases", 64, 64, 4, 2, 1, transposed=False, size=(12, 10)),
    conv("strided-odd-pad", "phases", 64, 64, (5, 3), (3, 2), (1, 0), transposed=False, size=(12, 10)),
    conv("strided-dilated", "phases", 64, 64, 3, 2, 2, dilation=(3, 2), transposed=False, size=(14, 12)),
    conv("stride1", "phases", 64, 64, 3, 1, 1, size=(5, 20)),
    conv("stride3", "phases", 64, 64, 5, 3, 1, size=(4, 5)),
    conv("uneven-strides", "phases", 64, 64, (4, 5), (1, 4), (1, 1), (0, 1), size=(4, 6)),
    conv("no-taps", "phases", 64, 64, 3, 2, 2, 1, dilation=2, size=(5, 6)),
    conv("dilation-6-stride-4", "phases", 64, 64, 3, 4, 2, 3, dilation=6, size=(3, 4)),
    conv("output-padding", "phases", 64, 64, 5, 2, 2, 1, size=(5, 4)),
    conv("one-row", "phases", 64, 64, (1, 16), (1, 8), (0, 4), size=(1, 40)),
    conv("one-column", "phases", 64, 64, (3, 1), 1, (1, 0), transposed=False, size=(150, 1), batch=1),
    conv("groups", "phases", 128, 128, 4, 2, 1, groups=2, size=(4, 5)),
    conv("groups-plain", "phases", 128, 128, 3, 1, 1, groups=2, transposed=False, size=(6, 5)),
    conv("masked-in", "phases", 88, 64, 4, 2, 1, size=(5, 6)),
    conv("masked-out", "phases", 64, 72, 3, 1, 1, transposed=False, size=(6, 7)),
    conv("masked-both-stride1", "phases", 40, 104, 3, 1, 1, size=(6, 7)),
    conv("narrow-k", "phases", 32, 64, 4, 2, 1, size=(5, 6)),
    conv("block-k-32", "phases", 96, 64, 4, 2, 1, transposed=False, size=(8, 6)),
    conv("many-channels", "phases", 320, 64, 3, 1, 1, transposed=False, size=(6, 5), batch=1),
    conv("tall-taps", "phases", 64, 64, 7, 1, 3, transposed=False, size=(9, 8), batch=1),
    conv("pointwise", "phases", 64, 64, 1, transposed=False, size=(11, 7)),
    upsample("upsample", "phases", 64, 64, (3, 3), (2, 2), (1, 1), size=(6, 5)),
    upsample("upsample-groups", "phases", 128, 128, (3, 3), (2, 2), (1, 1), groups=2, size=(4, 5)),
    conv("eight-images", "phases", 64, 64, 4, 2, 1, size=(4, 4), batch=19),
)  # fmt: skip


def ids(cases: tuple[Case, ...]) -> list[str]:
    return [c.id for c in cases]


# What another one shows in part.
SLOW = (
    "strided-dilated", "uneven-strides", "dilation-6-stride-4", "output-padding", "one-column", "groups-plain",
    "masked-both-stride1", "block-k-32", "many-channels", "tall-taps", "pointwise", "upsample-groups",
)  # fmt: skip


def quick_first(cases: tuple[Case, ...]) -> list[Any]:
    return [pytest.param(c, id=c.id, marks=[pytest.mark.slow] if c.id in SLOW else []) for c in cases]


@pytest.mark.parametrize("case", quick_first(GEOMETRY))
def test_geometry(case: Case, device: torch.device, hopper: Device, launches: list[str]) -> None:
    check(case, "fp16", device, launches)


def chosen(case: Case, precision: str, tile: tuple[int, int, int], blocks: int = 1) -> BoxPlan:
    found = (p for p in plans_of(case, precision) if (p.block_m, p.block_n, p.num_warps, p.blocks) == (*tile, blocks))
    return next(found)


UP = conv("up", "phases", 128, 256, 4, 2, 1, size=(9, 7), batch=3)
PLAIN = conv("down", "phases", 128, 256, 3, 1, 1, transposed=False, size=(13, 11), batch=2)


@pytest.mark.parametrize("tile", plans.TILES[:4], ids=lambda t: "x".join(map(str, t)))
def test_tile(tile: tuple[int, int, int], device: torch.device, hopper: Device, launches: list[str]) -> None:
    check(UP, "fp16", device, launches, chosen(UP, "fp16", tile))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("tile", plans.TILES, ids=lambda t: "x".join(map(str, t)))
def test_every_tile(
    tile: tuple[int, int, int], precision: str, device: torch.device, hopper: Device, launches: list[str]
) -> None:
    check(PLAIN, precision, device, launches, chosen(PLAIN, precision, tile))


@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=pytest.mark.slow), 5])
def test_stages(stages: int, device: torch.device, hopper: Device, launches: list[str]) -> None:
    """Fewer and more buffers than a tile has trips, and numbers that do not divide them."""
    plan = replace(chosen(PLAIN, "fp16", (128, 128, 4)), num_stages=stages)
    check(PLAIN, "fp16", device, launches, plan)


SLOWER = [pytest.param(box, marks=pytest.mark.slow) for box in ((4, 4, 8), (16, 1, 8), (1, 128, 1), (128, 1, 1))]


@pytest.mark.parametrize("box", [(2, 8, 8), (8, 4, 4), *SLOWER], ids=str)
def test_box(box: tuple[int, int, int], device: torch.device, hopper: Device, launches: list[str]) -> None:
    """Boxes of any form, those that are larger than the phase among them."""
    case = conv("boxes", "phases", 64, 64, 4, 2, 1, size=(5, 9), batch=3)
    plan = replace(chosen(case, "fp16", (128, 64, 4)), box=box)
    check(case, "fp16", device, launches, plan)


def small(id: str, **rest: Any) -> Case:
    return conv(id, "phases", 64, 128, 4, 2, 1, size=(5, 6), **rest)


EPILOGUE = (
    small("nothing", bias=False, activation="identity"),
    small("norm", norm=True),
    small("residual", residual=True, bias=False),
    small("norm-residual", residual=True, norm=True),
    small("one-slope", activation="prelu", slopes=1),
    small("slopes", activation="prelu", slopes=128, norm=True, residual=True),
    conv("residual-masked", "phases", 64, 72, 3, 1, 1, transposed=False, size=(6, 7), residual=True, norm=True),
    conv("residual-groups", "phases", 128, 128, 3, 1, 1, groups=2, transposed=False, size=(6, 5), residual=True),
    small("nchw-in", x_format=CONTIGUOUS, weight_format=CONTIGUOUS, residual=True),
)  # fmt: skip


@pytest.mark.parametrize("case", EPILOGUE, ids=ids(EPILOGUE))
def test_epilogue(case: Case, device: torch.device, hopper: Device, launches: list[str]) -> None:
    check(case, "bf16", device, launches)


def test_vectors_of_other_kinds(device: torch.device, hopper: Device, launches: list[str]) -> None:
    """A scale without a shift, and a shift without a scale, of half precision: each vector stands for itself."""
    for given in ({"scale"}, {"shift"}):
        case = small(f"only-{given}")
        o = case.operands(torch.float16, device)
        vector = torch.linspace(-1, 2, 128, device=device).half()
        o = o._replace(**dict.fromkeys(given, vector))
        plan, step = plans_of(case, "fp16")[0], fitted(case.step, o)
        object.__setattr__(case, "step", step)
        launch_and_check(case, o, launches, plan)


PARAMS = {"leaky_relu": (0.2,), "elu": (1.5,), "hardtanh": (-0.5, 0.75)}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, device: torch.device, hopper: Device, launches: list[str]) -> None:
    case = conv(f"act-{name}", "phases", 64, 64, 1, transposed=False, size=(9, 8), activation=name,
                params=PARAMS.get(name, ()), slopes=64 if name == "prelu" else 0)  # fmt: skip
    check(case, "fp16", device, launches)


STATISTICS = (
    ("batch", conv("batch", "phases", 64, 64, 4, 2, 1, size=(9, 7), batch=3)),
    ("batch", conv("several-images", "phases", 64, 64, 4, 2, 1, size=(4, 4), batch=9)),
    ("batch", conv("masked-channels", "phases", 64, 72, 3, 1, 1, transposed=False, size=(9, 7), batch=2)),
    ("batch", conv("groups", "phases", 128, 128, 4, 2, 1, groups=2, size=(4, 5))),
    ("image", conv("image", "phases", 64, 64, 4, 2, 1, size=(9, 12), batch=3)),
)


@pytest.mark.parametrize(("statistics", "case"), STATISTICS, ids=lambda v: v if isinstance(v, str) else v.id)
def test_statistics(statistics: str, case: Case, device: torch.device, hopper: Device) -> None:
    """Of the result as stored, with the launch; none where a box lies in several images that count apart."""
    from cnnfast.gpu import conv as launch

    plan, o = plans_of(case, "fp16")[0], case.operands(torch.float16, device)
    if statistics == "image":
        assert launch.run_with_statistics(case.step, o, True, "image", replace(plan, box=(2, 8, 8)))[1] is None
        plan = replace(plan, box=(1, 8, 16))
    both = launch.run_with_statistics(case.step, o, True, statistics, plan)
    assert both is not None and both[1] is not None
    check_statistics(*both, statistics)


def test_addresses_beyond_2_31(
    device: torch.device, hopper: Device, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The residual's 64-bit image base, forced."""
    from cnnfast.gpu import conv as launch

    monkeypatch.setattr(launch, "INT32", 1)
    launch.prepare.cache_clear()
    try:
        check(small("big", residual=True), "fp16", device, launches)
    finally:
        launch.prepare.cache_clear()


def test_a_plan_that_does_not_apply_raises(device: torch.device, hopper: Device) -> None:
    from cnnfast.gpu import conv as launch

    plan = plans_of(UP, "fp16")[0]
    other = conv("other", "phases", 128, 256, 4, 2, 1, size=(9, 7), activation="relu")
    with pytest.raises(ValueError, match="cannot run as phases boxes .*the result is contiguous"):
        launch.run(other.step, other.operands(torch.float16, device), False, plan)


def test_forward_and_gradients_when_it_is_on(
    device: torch.device, hopper: Device, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one constant: a training step's convolution and its input gradient (the adjoint geometry) launch it."""
    from cnnfast.gpu import conv as launch
    from cnnfast.gpu import conv_autograd

    monkeypatch.setattr(plans, "HOPPER", True)
    for forget in (launch.prepare.cache_clear, plans.chosen.cache_clear):
        forget()
    case = small("gradients", bias=False, activation="identity")
    o = case.operands(torch.float16, device)
    x = o.x.requires_grad_()
    try:
        y = conv_autograd.convolution(x, o.weight, None, case.step, True, True)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).half().to(device)
        (dx,) = torch.autograd.grad(y, x, grad)
    finally:
        for forget in (launch.prepare.cache_clear, plans.chosen.cache_clear):
            forget()
    assert len(launches) == 2 and all(name.startswith("phases boxes") for name in launches), launches
    of_input = Step(case.step.spec.adjoint(case.size))
    exact, yardstick, before = reference(of_input, Operands(grad, o.weight), False)
    assert_close(dx, exact, yardstick, "dx", before)
