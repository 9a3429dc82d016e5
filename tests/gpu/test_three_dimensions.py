"""Convolutions of three dimensions on the Triton kernels: every regime, geometry and gradient against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ..cases import CONTIGUOUS, PRECISIONS, Case, check, conv, upsample
from . import test_conv_wgrad as wgrad
from .test_conv import ONE, SEVEN, SPLIT, UNSPLIT, check_64_bits

pytestmark = pytest.mark.usefixtures("poison")

CUBE = (2, 2, 2)

# Every regime in every precision.
REGIMES = (
    conv("plain", "phases", 32, 48, 3, 1, 1, transposed=False, size=(3, 4, 5), norm=True, split=False, plan=UNSPLIT),
    conv("phases", "phases", 32, 32, 4, 2, 1, size=(2, 3, 4), norm=True, split=False, plan=UNSPLIT),
    conv("merged", "merged", 32, 3, 4, 2, 1, size=(3, 2, 4), activation="tanh", channels_last=False, split=False,
         plan=UNSPLIT),
    conv("latent", "latent", 100, 32, (2, 3, 4), size=(1, 1, 1), batch=3, norm=True, split=False, plan=UNSPLIT),
    conv("split", "phases", 64, 32, 3, 1, 1, transposed=False, size=CUBE, norm=True, split=True, plan=SPLIT),
)  # fmt: skip

# One thing each, in one half precision.
GEOMETRY = (
    conv("strided", "phases", 32, 32, 3, 2, 1, transposed=False, size=(5, 6, 7)),
    conv("1x1x1", "phases", 32, 32, 1, transposed=False, size=(2, 3, 5)),
    conv("planes-apart", "phases", 32, 32, (1, 3, 3), 1, (0, 1, 1), transposed=False, size=(3, 4, 3)),
    conv("along-the-depth", "phases", 32, 32, (5, 1, 1), (2, 1, 1), (2, 0, 0), transposed=False, size=(7, 2, 3)),
    conv("dilated", "phases", 32, 32, 3, 1, (3, 2, 1), dilation=(3, 2, 1), transposed=False, size=(5, 4, 3)),
    conv("groups", "phases", 64, 64, (3, 1, 2), groups=2, transposed=False, size=(4, 3, 3)),
    conv("masked-channels", "phases", 36, 20, 3, 1, 1, transposed=False, size=(2, 3, 3)),
    conv("many-taps", "phases", 32, 32, 4, 1, (3, 0, 2), transposed=False, size=(3, 4, 3)),
    conv("one-plane", "phases", 32, 32, 3, 1, 1, transposed=False, size=(1, 4, 3)),
    conv("replicate", "phases", 32, 32, 3, 1, (1, 0, 1), transposed=False, mode="replicate", size=(3, 4, 2)),
    conv("reflect", "phases", 32, 32, (5, 3, 3), 1, (2, 1, 1), transposed=False, mode="reflect", size=(4, 3, 2)),
    conv("many-taps-reflected", "phases", 32, 32, 4, 1, 1, transposed=False, mode="reflect", size=(3, 4, 3)),
    conv("uneven-phases", "phases", 32, 32, 3, 2, 1, 1, size=(2, 3, 4)),
    conv("asymmetric-strides", "phases", 32, 32, (3, 4, 5), (1, 2, 3), (0, 1, 2), (0, 1, 0), size=(3, 2, 3)),
    conv("dilation-no-taps", "phases", 32, 32, 3, 2, 1, 1, 1, 2, size=(2, 3, 2)),
    conv("transposed-groups", "phases", 32, 32, 3, (2, 1, 2), 1, groups=2, size=(2, 3, 2)),
    conv("kernel-equals-stride", "merged", 32, 24, 2, 2, size=(3, 2, 5)),
    conv("merged-unequal", "merged", 32, 24, (3, 2, 1), (3, 2, 1), size=(2, 3, 4)),
    conv("merged-padded", "merged", 32, 4, 2, 2, (0, 1, 1), (1, 0, 1), size=(2, 3, 3)),
    conv("one-channel-out", "merged", 48, 1, 3, 2, 1, 1, size=(2, 3, 2)),
    upsample("upsample", "phases", 32, 32, (3, 3, 3), CUBE, (1, 1, 1), size=(2, 3, 2)),
    upsample("upsample-replicate", "phases", 32, 32, (3, 1, 3), (2, 1, 3), (1, 0, 1), "replicate", size=(2, 3, 2)),
    upsample("upsample-rgb", "merged", 32, 3, (3, 3, 3), CUBE, (1, 1, 1), size=(2, 2, 3)),
)

# Memory formats, residual, given plans.
SCHEDULES = (
    conv("ncdhw", "phases", 32, 32, 3, 1, 1, transposed=False, size=(2, 3, 4), x_format=CONTIGUOUS,
         channels_last=False, weight_format=CONTIGUOUS, residual=True),
    conv("default-weight", "phases", 32, 32, 4, 2, 1, size=(2, 2, 3), weight_format=CONTIGUOUS),
    conv("default-weight-merged", "merged", 32, 16, 2, 2, size=(2, 2, 3), weight_format=CONTIGUOUS),
    conv("residual-merged", "merged", 32, 3, 4, 2, 1, size=(2, 3, 2), residual=True, channels_last=False),
    conv("split-ncdhw-residual", "phases", 64, 32, 4, 2, 1, size=(2, 1, 3), residual=True, norm=True, split=True,
         channels_last=False, plan=SPLIT),
    conv("split-uneven-phases", "phases", 32, 32, 3, 2, 1, 1, size=(2, 2, 1), split=True, plan=SEVEN),
    conv("split-merged", "merged", 64, 3, 4, 2, 1, size=(2, 2, 2), split=True, plan=SPLIT),
    conv("split-in-one", "phases", 64, 32, 3, transposed=False, size=(3, 3, 4), split=False, plan=ONE, residual=True),
    conv("tiles", "phases", 32, 40, 3, 2, 1, 1, size=(3, 4, 3), batch=3, plan=(("block_m", 16), ("block_n", 16))),
)  # fmt: skip


def runs(*short: tuple[Sequence[Any], tuple[str, ...]]) -> list[Any]:
    """Each case in every precision; the long run's but for those that are named beside the cases."""
    found = []
    for cases, precisions in short:
        for c in cases:
            for precision in PRECISIONS:
                name = c.name if isinstance(c, wgrad.Case) else c.id
                slow = [pytest.mark.slow] * (precision not in precisions)
                found.append(pytest.param(c, precision, id=f"{name}-{precision}", marks=slow))
    return found


@pytest.mark.parametrize(
    ("case", "precision"), runs((REGIMES, ("fp16", "fp32")), (GEOMETRY, ("fp16",)), (SCHEDULES, ("bf16",)))
)
def test_forward(case: Case, precision: str, device: torch.device, launches: list[str]) -> None:
    check(case, precision, device, launches)


# --- the weight's gradient --------------------------------------------------------------------------------------------

OF_WEIGHTS = (
    wgrad.case("plain", 32, 48, 3, 1, 1, transposed=False, size=(3, 4, 5)),
    wgrad.case("transposed", 32, 32, 4, 2, 1, size=(2, 3, 4)),
    wgrad.case("merged", 32, 3, 2, 2, size=(3, 2, 4)),
    wgrad.case("split", 32, 32, 3, 1, 1, transposed=False, size=(4, 4, 8), plan=(("splits", 4),)),
)
GEOMETRY_OF_WEIGHTS = (
    wgrad.case("strided", 32, 32, 3, 2, 1, transposed=False, size=(5, 6, 7)),
    wgrad.case("1x1x1", 32, 32, 1, transposed=False, size=(2, 3, 5)),
    wgrad.case("along-the-depth", 32, 32, (5, 1, 1), (2, 1, 1), (2, 0, 0), transposed=False, size=(7, 2, 3)),
    wgrad.case("dilated", 32, 32, 3, 1, (3, 2, 1), dilation=(3, 2, 1), transposed=False, size=(5, 4, 3)),
    wgrad.case("uneven-phases", 32, 32, 3, 2, 1, output_padding=1, size=(2, 3, 4)),
    wgrad.case("asymmetric", 32, 32, (3, 4, 5), (1, 2, 3), (0, 1, 2), output_padding=(0, 1, 0), size=(3, 2, 3)),
    wgrad.case("groups", 64, 64, (3, 1, 2), groups=2, transposed=False, size=(4, 3, 3)),
    wgrad.case("odd-channels", 17, 19, 3, 2, 1, size=(2, 3, 2)),
    wgrad.case("default-layout", 32, 48, 2, 1, 1, transposed=False, size=(2, 3, 2), channels_last=False),
    wgrad.case("default-layout-split", 32, 32, 3, 1, 1, transposed=False, size=(2, 8, 8), channels_last=False,
               plan=(("splits", 3),)),
    wgrad.case("box-of-planes", 32, 32, 3, 1, 1, transposed=False, size=(4, 2, 4), batch=4),
    wgrad.case("box-beyond-every-edge", 32, 32, 3, 2, 1, size=(3, 5, 7), plan=(("box", (2, 3, 5)), ("even", False))),
    wgrad.case("one-plane", 32, 32, 3, 1, 1, transposed=False, size=(1, 4, 3)),
)  # fmt: skip


@pytest.mark.parametrize(("c", "precision"), runs((OF_WEIGHTS, ("fp16", "fp32")), (GEOMETRY_OF_WEIGHTS, ("fp16",))))
def test_weight_gradient(c: wgrad.Case, precision: str, device: torch.device) -> None:
    wgrad.check(c, wgrad.PRECISIONS[precision], device)


# --- offsets of 64 bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [REGIMES[0], REGIMES[2], REGIMES[4]], ids=lambda c: c.id)
def test_addresses_beyond_2_31(
    case: Case, device: torch.device, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_64_bits(case, device, launches, monkeypatch)


@pytest.mark.parametrize("name", ["strided", "box-beyond-every-edge"])
def test_weight_gradients_beyond_2_31(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    (c,) = (c for c in GEOMETRY_OF_WEIGHTS if c.name == name)
    wgrad.check_64_bits(c, device, monkeypatch)
