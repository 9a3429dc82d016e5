"""Statistics of a convolution's result from the kernel's epilogue: by parts, of the values as stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cnnfast.gpu.devices import precision_of, target_device
from cnnfast.norms import Partials
from cnnfast.step import Operands

from ..cases import PRECISIONS, Case, conv
from ..conftest import conv_precision

pytestmark = pytest.mark.usefixtures("poison")

SPLIT = (("splits", True), ("split_k", 4))
TILE = (("block_m", 16), ("block_n", 32), ("num_warps", 2), ("splits", False), ("split_k", 1))
BATCH = (
    conv("phases", "phases", 64, 64, 4, 2, 1, size=(4, 5), batch=3),
    conv("several-tiles", "phases", 32, 72, 4, 2, 1, size=(7, 9), batch=3, plan=TILE),
    conv("uneven-phases", "phases", 32, 32, 3, 2, 1, size=(4, 3), plan=TILE),
    conv("empty-tiles", "phases", 32, 32, 2, 3, 0, size=(3, 2), batch=3, plan=TILE),
    conv("plain", "phases", 32, 48, 3, 1, 1, transposed=False, size=(6, 5), batch=2, plan=TILE),
    conv("groups", "phases", 64, 64, 4, 2, 1, groups=2, size=(3, 4), plan=TILE),
    conv("masked-channels", "phases", 100, 40, 4, 2, 1, size=(3, 4), plan=TILE),
    conv("nchw", "phases", 32, 32, 4, 2, 1, size=(4, 5), channels_last=False, plan=TILE),
    conv("split", "phases", 128, 64, 4, 2, 1, size=(3, 3), batch=3, plan=SPLIT),
    conv("split-in-one", "phases", 128, 32, 4, 2, 1, size=(3, 3), plan=(("splits", True), ("split_k", 1))),
)
IMAGE = (
    conv("tiles-of-one-image", "phases", 32, 64, 4, 2, 1, size=(8, 4), batch=3, plan=TILE),
    conv("plain-image", "phases", 32, 32, 3, 1, 1, transposed=False, size=(8, 8), batch=2, plan=TILE),
    conv("split-image", "phases", 128, 64, 4, 2, 1, size=(4, 2), batch=3, plan=SPLIT),
    conv("one-image", "phases", 32, 32, 3, 2, 1, size=(4, 3), batch=1, plan=TILE),
)
NOT = (  # tiles that cross images; phases of several sizes; columns of several phases
    ("image", conv("crossing", "phases", 32, 32, 4, 2, 1, size=(3, 5), batch=2, plan=TILE)),
    ("image", conv("odd-image", "phases", 32, 32, 3, 2, 1, size=(4, 4), batch=2, plan=TILE)),
    ("batch", conv("merged", "merged", 64, 3, 4, 2, 1, size=(4, 4))),
    ("batch", conv("latent", "latent", 64, 32, 4, size=(1, 1))),
)


def launch(c: Case, o: Operands, statistics: str | None) -> tuple[torch.Tensor, Partials | None]:
    from cnnfast.gpu import conv as ops

    numerics, target = precision_of(o.x.dtype), target_device(o.x)
    chosen = ops.choose_plan(c.step.spec, c.batch, c.size, numerics, target, c.channels_last)
    both = ops.run_with_statistics(c.step, o, c.channels_last, statistics, replace(chosen, **dict(c.plan)))
    assert both is not None
    return both


def merged(p: Partials) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, centred sum of squares) of each segment and channel, in float64."""
    count, mean, m2 = (t.double().cpu() for t in p.each)
    count = count[..., None]
    total = count.sum(1)
    whole = (count * mean).sum(1) / total
    return whole, (m2 + count * (mean - whole[:, None]) ** 2).sum(1)


def check(c: Case, precision: str, device: torch.device, statistics: str, offset: float = 0.0) -> None:
    dtype, switch = PRECISIONS[precision]
    o = c.operands(dtype, device)
    if offset:
        assert o.bias is not None
        o = o._replace(bias=o.bias * 0 + offset)
    with conv_precision(switch):
        y, p = launch(c, o, statistics)
    assert p is not None
    check_statistics(y, p, statistics)


def check_statistics(y: torch.Tensor, p: Partials, statistics: str) -> None:
    """Of y, as it is stored."""
    n, channels = y.shape[:2]
    segments = 1 if statistics == "batch" else n
    assert p.shape == (segments, p.shape[1], channels)
    rows = y.cpu().double().permute(0, 2, 3, 1).reshape(segments, -1, channels)
    assert torch.equal(p.each[0].sum(1).cpu(), torch.full((segments,), float(rows.shape[1])))
    mean, m2 = merged(p)
    want = rows.mean(1)
    spread = (rows - want[:, None]).square().sum(1)
    # Parts are float32: their error is that of float32 sums over a tile, relative to the values and the spread.
    torch.testing.assert_close(mean, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(m2, spread, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("c", BATCH[:1] + BATCH[-2:-1], ids=lambda c: c.id)
def test_precisions(c: Case, precision: str, device: torch.device) -> None:
    check(c, precision, device, "batch")


@pytest.mark.parametrize("c", BATCH, ids=lambda c: c.id)
def test_batch(c: Case, device: torch.device) -> None:
    check(c, "fp16", device, "batch")


@pytest.mark.parametrize("c", IMAGE, ids=lambda c: c.id)
def test_image(c: Case, device: torch.device) -> None:
    check(c, "fp16", device, "image")


@pytest.mark.parametrize(("statistics", "c"), NOT, ids=lambda v: v if isinstance(v, str) else v.id)
def test_where_tiles_do_not_allow_it(statistics: str, c: Case, device: torch.device) -> None:
    assert launch(c, c.operands(torch.float16, device), statistics)[1] is None


def test_mean_far_from_zero(device: torch.device) -> None:
    """A spread of about 1 around 1000: the squares' mean minus the mean's square would lose all of it in float32."""
    check(BATCH[1], "fp32", device, "batch", offset=1000.0)


def test_result_is_the_same_without_statistics(device: torch.device) -> None:
    o = BATCH[1].operands(torch.float16, device)
    (plain, none), (y, some) = launch(BATCH[1], o, None), launch(BATCH[1], o, "batch")
    assert none is None and some is not None and torch.equal(plain.cpu(), y.cpu())
