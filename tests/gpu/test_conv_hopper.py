"""The Gluon kernel of sm_90 against float64, where it applies, and its plans. On an sm_90, under ttsem or emulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cnnfast.activations import ACTIVATIONS, Activation
from cnnfast.gpu import conv_hopper_plan as plans
from cnnfast.gpu.conv_hopper_plan import BoxPlan
from cnnfast.gpu.devices import DEVICES, Device
from cnnfast.spec import ConvSpec, Precision
from cnnfast.step import Step

from ..cases import PRECISIONS, Case, conv, reference, upsample
from ..tolerance import assert_close

pytestmark = pytest.mark.usefixtures("gluon_under_ttsem")
SMALL = replace(DEVICES[90], multiprocessors=3)  # so that each program has several tiles


@pytest.fixture
def hopper(device: torch.device, poison: None, monkeypatch: pytest.MonkeyPatch) -> Device:
    """An sm_90 of few multiprocessors; on a GPU that is none, nothing is to be had."""
    from cnnfast.gpu import conv as launch
    from cnnfast.gpu.devices import target_device

    if device.type == "cuda" and torch.version.cuda is not None and target_device(torch.empty(0, device=device)).arch != 90:
        pytest.skip("this GPU's compute capability is not 9.0")
    monkeypatch.setattr(launch, "target_device", lambda x: SMALL)
    return SMALL


def plans_of(case: Case, precision: str) -> list[BoxPlan]:
    dtype, _ = PRECISIONS[precision]
    return plans.candidates(case.step, case.batch, case.size, Precision(dtype), SMALL)


def check(case: Case, precision: str, device: torch.device, launches: list[str], plan: BoxPlan | None = None) -> None:
    from cnnfast.gpu import conv as launch

    dtype, _ = PRECISIONS[precision]
    plan = plan or plans_of(case, precision)[0]
    o = case.operands(dtype, device)
    launches.clear()
    with torch.no_grad():
        y = launch.run(case.step, o, True, plan)
    assert launches == [plan.name]
    exact, yardstick, before = reference(case.step, o, False)
    assert y is not None and y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, exact, yardstick, f"{case.id} {precision} {plan.name}", before)


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


@pytest.mark.parametrize("case", GEOMETRY, ids=ids(GEOMETRY))
def test_geometry(case: Case, device: torch.device, hopper: Device, launches: list[str]) -> None:
    check(case, "fp16", device, launches)

