"""The Triton kernel: every regime, dtype and geometry against float64, on a GPU, under ttsem or emulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cnnfast.activations import ACTIVATIONS, Activation
from cnnfast.ops.run import run_step
from cnnfast.reference import run_reference
from cnnfast.step import Step

from ..cases import CONTIGUOUS, PRECISIONS, Case, cast, check, conv, upsample
from ..conftest import conv_precision

pytestmark = pytest.mark.usefixtures("poison")

UNSPLIT = (("splits", False), ("split_k", 1))
# A binary that can split, with K in n parts.
ONE, THREE, SPLIT, SEVEN = ((("splits", True), ("split_k", n)) for n in (1, 3, 4, 7))

# Every regime in every precision, each with its natural channels.
REGIMES = (
    conv("phases", "phases", 64, 64, 4, 2, 1, size=(4, 5), norm=True, split=False, plan=UNSPLIT),
    conv(
        "merged",
        "merged",
        64,
        3,
        4,
        2,
        1,
        size=(8, 7),
        activation="tanh",
        channels_last=False,
        split=False,
        plan=UNSPLIT,
    ),
    conv("latent", "latent", 100, 64, 4, size=(1, 1), batch=3, norm=True, bias=False, split=False, plan=UNSPLIT),
    conv("split", "phases", 512, 64, 4, 2, 1, size=(2, 2), batch=1, norm=True, split=True, plan=SPLIT),
)

# One thing each, in one half precision.
GEOMETRY = (
    conv("stride1", "phases", 32, 32, 3, 1, 1, size=(5, 3)),
    conv("stride3", "phases", 32, 32, 5, 3, 2, size=(3, 4)),
    conv("stride4", "phases", 32, 32, 8, 4, 2, size=(3, 2)),
    conv("stride-over-kernel", "phases", 32, 32, 2, 3, 0, size=(3, 3)),
    conv("kernel-equals-stride", "merged", 32, 48, 2, 2, 0, size=(3, 5)),
    conv("cyclegan", "phases", 64, 64, 3, 2, 1, 1, size=(5, 7)),
    conv("waifu2x", "phases", 64, 32, 4, 2, 3, size=(7, 5)),
    conv("asymmetric", "phases", 32, 32, (3, 5), (1, 2), (0, 2), (0, 1), size=(4, 3)),
    conv("asymmetric-strides", "phases", 32, 32, (4, 3), (3, 2), (2, 0), (1, 0), size=(2, 5)),
    conv("dilation-no-taps", "phases", 32, 32, 3, 2, 1, 1, 1, 2, size=(4, 5)),
    conv("dilation3-stride2", "phases", 32, 32, 3, 2, 2, 1, 1, 3, size=(4, 3)),
    conv("dilation2-stride4", "phases", 32, 32, 4, 4, 1, 3, 1, 2, size=(3, 3)),
    conv("dilation6-stride4", "phases", 32, 32, 3, 4, 5, 2, 1, 6, size=(3, 4)),
    conv("output-padding-by-dilation", "phases", 32, 32, 2, 1, 0, 2, 1, 3, size=(3, 4)),
    conv("groups", "phases", 64, 64, 5, 3, 2, groups=2, size=(3, 4)),
    conv("groups-merged", "merged", 64, 48, 2, 2, 0, groups=2, size=(3, 4)),
    conv("groups-latent", "latent", 64, 64, 4, 1, 0, groups=2, size=(1, 1)),
    conv("masked-channels", "phases", 100, 40, 4, 2, 1, size=(3, 4)),
    conv("masked-merged", "merged", 100, 5, 3, 2, 1, 1, size=(5, 4)),
    conv("one-channel-out", "merged", 48, 1, 4, 2, 1, size=(4, 4)),
    conv("few-channels-stride1", "phases", 32, 3, 3, 1, 1, size=(6, 5), activation="tanh"),
    conv("sixteen-channels", "phases", 16, 16, 4, 2, 1, size=(4, 4)),
    conv("seventeen-channels", "phases", 17, 19, 4, 2, 1, size=(4, 4)),
    conv("many-taps", "phases", 32, 32, 7, 1, 3, size=(9, 8)),
    conv("latent-stride2", "latent", 64, 32, 4, 2, 1, size=(1, 1)),
    conv("latent-dilated", "latent", 64, 32, 3, 1, 0, dilation=2, size=(1, 1)),
    conv("latent-padded", "latent", 64, 32, 4, 1, 1, size=(1, 1)),
    conv("row", "phases", 32, 32, (1, 16), (1, 8), (0, 4), size=(1, 5)),
    conv("one-pixel-wide", "phases", 32, 32, 4, 2, 1, size=(5, 1)),
    conv("batch1", "phases", 64, 64, 4, 2, 1, size=(3, 3), batch=1),
    conv("plain", "phases", 32, 48, 3, 1, 1, transposed=False, size=(6, 5)),
    conv("plain-dilated", "phases", 32, 32, 3, 1, 2, dilation=2, transposed=False, size=(6, 5)),
    conv("plain-groups", "phases", 64, 64, (3, 1), 1, (1, 0), groups=2, transposed=False, size=(5, 4)),
    conv("plain-7x7", "phases", 32, 32, 7, 1, 3, transposed=False, size=(9, 8)),
    conv("strided", "phases", 64, 48, 4, 2, 1, transposed=False, size=(9, 8)),
    conv("strided-odd", "phases", 32, 32, (3, 5), (2, 3), (1, 0), dilation=(2, 1), transposed=False, size=(8, 11)),
    conv("strided-groups", "phases", 64, 64, 3, 2, 1, groups=2, transposed=False, size=(7, 6)),
    conv("stride-over-plain-kernel", "phases", 32, 32, 1, 2, 0, transposed=False, size=(5, 6)),
    conv("plain-1x1", "phases", 64, 32, 1, transposed=False, size=(3, 5)),
    upsample("upsample", "phases", 32, 32, (3, 3), (2, 2), (1, 1), size=(4, 5)),
    upsample("upsample-replicate", "phases", 32, 32, (3, 3), (2, 2), (1, 1), "replicate", size=(4, 3)),
    upsample("upsample-reflect", "phases", 32, 32, (3, 3), (2, 2), (1, 1), "reflect", size=(4, 3)),
    upsample("upsample-replicate-rgb", "merged", 32, 3, (3, 3), (2, 2), (1, 1), "replicate", size=(4, 3)),
    conv("plain-replicate", "phases", 32, 32, 5, 1, 2, transposed=False, mode="replicate", size=(3, 4)),
    conv("plain-reflect", "phases", 32, 32, 7, 1, 3, transposed=False, mode="reflect", size=(5, 4)),
    conv("strided-reflect", "phases", 32, 32, 4, 2, (1, 0), transposed=False, mode="reflect", size=(6, 7)),
    upsample("upsample-5x5-by-3", "phases", 32, 32, (5, 3), (3, 2), (2, 1), "replicate", size=(3, 3)),
    upsample("upsample-groups", "phases", 64, 64, (3, 3), (2, 2), (1, 1), groups=2, size=(3, 3)),
    upsample("upsample-rgb", "merged", 32, 3, (3, 3), (2, 2), (1, 1), size=(5, 4)),
)

# Memory formats of input, weight and result; residual; norm; given plans.
SCHEDULES = (
    conv("nchw-in-out", "phases", 32, 32, 4, 2, 1, size=(4, 5), x_format=CONTIGUOUS, channels_last=False),
    conv("nchw-in", "phases", 32, 32, 4, 2, 1, size=(4, 5), x_format=CONTIGUOUS),
    conv("nchw-out-residual", "phases", 48, 40, 3, 2, 1, 1, size=(5, 7), channels_last=False, residual=True),
    conv("default-weight", "phases", 32, 32, 4, 2, 1, size=(3, 3), weight_format=CONTIGUOUS),
    conv("default-weight-latent", "latent", 32, 32, 4, size=(1, 1), weight_format=CONTIGUOUS),
    conv("default-weight-merged", "merged", 32, 3, 4, 2, 1, size=(3, 3), weight_format=CONTIGUOUS),
    conv("residual-norm", "phases", 32, 32, 4, 2, 1, size=(3, 4), residual=True, norm=True),
    conv("residual-merged", "merged", 32, 3, 4, 2, 1, size=(3, 4), residual=True, channels_last=False),
    conv("residual-latent", "latent", 32, 32, 4, size=(1, 1), residual=True),
    conv("no-bias", "phases", 32, 32, 4, 2, 1, size=(3, 4), bias=False),
    conv("split-nchw-residual", "phases", 128, 48, 4, 2, 1, size=(3, 4), residual=True, norm=True, split=True,
         channels_last=False, plan=SPLIT),
    conv("split-merged", "merged", 64, 3, 4, 2, 1, size=(3, 4), split=True, plan=SPLIT, activation="tanh"),
    conv("split-latent", "latent", 256, 32, 4, size=(1, 1), split=True, plan=THREE, norm=True),
    conv("split-groups", "phases", 128, 64, 4, 2, 1, groups=2, size=(3, 3), split=True, plan=SPLIT),
    conv("split-over-uneven-phases", "phases", 64, 32, 3, 2, 1, 1, size=(3, 3), split=True, plan=SEVEN),
    conv("split-no-taps", "phases", 64, 32, 3, 2, 1, 1, 1, 2, size=(3, 4), split=True, plan=SPLIT),
    conv("split-prelu", "phases", 128, 32, 4, 2, 1, size=(3, 3), split=True, plan=SPLIT, activation="prelu", slopes=32),
    conv("split-in-one", "phases", 128, 32, 4, 2, 1, size=(3, 3), split=False, plan=ONE, norm=True, residual=True),
    conv("unroll1", "phases", 64, 64, 4, 2, 1, size=(4, 4), plan=(("unroll", 1), ("block_k", 32))),
    conv("unroll2", "phases", 64, 64, 4, 2, 1, size=(4, 4), plan=(("unroll", 2), ("block_k", 32))),
    conv("unroll3", "phases", 96, 32, 4, 2, 1, size=(4, 4), plan=(("unroll", 3), ("block_k", 32))),
    conv("unroll5", "phases", 80, 32, 3, 1, 1, transposed=False, size=(4, 4), plan=(("unroll", 5), ("block_k", 16))),
    conv("unroll2-masked", "phases", 100, 40, 4, 2, 1, size=(4, 4), plan=(("unroll", 2), ("block_k", 32))),
    conv("one-big-tile", "phases", 64, 64, 4, 2, 1, size=(5, 7), plan=(("block_m", 128), ("block_n", 64),
         ("num_warps", 4))),
    conv("tiles-in-m-and-n", "phases", 32, 72, 4, 2, 1, size=(7, 9), batch=3, plan=(("block_m", 32), ("block_n", 32),
         ("group_m", 2))),
    conv("tiles-in-m-and-n-one-group", "phases", 32, 72, 3, 2, 1, 1, size=(7, 9), plan=(("block_m", 16),
         ("block_n", 16), ("group_m", 1))),
    conv("tiles-merged", "merged", 32, 12, 4, 2, 1, size=(9, 5), plan=(("block_m", 16), ("block_n", 16))),
)  # fmt: skip

# The slowest shapes: layers of the DCGAN at their own widths.
SLOW = (
    conv("dcgan-latent", "latent", 100, 512, 4, 1, 0, size=(1, 1), batch=5, norm=True, bias=False),
    conv("dcgan-2", "phases", 512, 256, 4, 2, 1, size=(4, 4), norm=True, bias=False),
    conv("dcgan-3", "phases", 256, 128, 4, 2, 1, size=(8, 8), norm=True, bias=False),
    conv("dcgan-4", "phases", 128, 64, 4, 2, 1, size=(16, 16), norm=True, bias=False),
    conv("dcgan-5", "merged", 64, 3, 4, 2, 1, size=(32, 32), activation="tanh", bias=False, channels_last=False),
)


def ids(cases: tuple[Case, ...]) -> list[str]:
    names = [c.id for c in cases]
    assert len(set(names)) == len(names)
    return names


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", REGIMES, ids=ids(REGIMES))
def test_regime(case: Case, precision: str, device: torch.device, launches: list[str]) -> None:
    check(case, precision, device, launches)


@pytest.mark.parametrize("case", GEOMETRY, ids=ids(GEOMETRY))
def test_geometry(case: Case, device: torch.device, launches: list[str]) -> None:
    check(case, "fp16", device, launches)


@pytest.mark.parametrize("case", SCHEDULES, ids=ids(SCHEDULES))
def test_schedule(case: Case, device: torch.device, launches: list[str]) -> None:
    check(case, "bf16", device, launches)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("case", GEOMETRY + SCHEDULES, ids=ids(GEOMETRY + SCHEDULES))
def test_everything_in_every_precision(case: Case, precision: str, device: torch.device, launches: list[str]) -> None:
    check(case, precision, device, launches)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", SLOW, ids=ids(SLOW))
def test_dcgan_layer(case: Case, precision: str, device: torch.device, launches: list[str]) -> None:
    check(case, precision, device, launches)


PARAMS = {"leaky_relu": (0.2,), "elu": (1.5,), "hardtanh": (-0.5, 0.75)}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str, device: torch.device, launches: list[str]) -> None:
    """Each activation in the epilogue, on float32 so that its own error is seen (PReLU with 1 and with C slopes)."""
    for slopes in (1, 32) if name == "prelu" else (0,):
        case = conv(f"act-{name}", "phases", 32, 32, 2, 1, 0, size=(3, 3), activation=name, slopes=slopes)
        case = replace(case, step=replace(case.step, activation=Activation(name, PARAMS.get(name, ()))))
        check(case, "tf32", device, launches)


# --- what is not a matter of one launch against float64 ---------------------------------------------------------------


def test_split_k_is_deterministic(device: torch.device, launches: list[str]) -> None:
    case = next(c for c in REGIMES if c.id == "split")
    first, second = (check(case, "fp16", device, launches) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", [REGIMES[0], REGIMES[1], REGIMES[3]], ids=lambda c: c.id)
def test_addresses_beyond_2_31(
    case: Case, device: torch.device, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_64_bits(case, device, launches, monkeypatch)


def check_64_bits(case: Case, device: torch.device, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The int64 image base of huge tensors, forced: the result must be the same to the bit."""
    from cnnfast.gpu import conv as launch

    expected = check(case, "fp16", device, launches)
    real, seen = launch.constants, []

    def big(*args: object) -> object:
        seen.append(args)
        return real(*args[:-2], True, args[-1])

    monkeypatch.setattr(launch, "constants", big)
    launch.prepare.cache_clear()
    try:
        assert torch.equal(check(case, "fp16", device, launches), expected)
    finally:
        launch.prepare.cache_clear()
    assert seen


def test_non_contiguous_operands(device: torch.device, launches: list[str]) -> None:
    """Slices, transposed and expanded tensors, and vectors with a stride."""
    case = conv("strided", "phases", 32, 32, 4, 2, 1, size=(4, 5), norm=True, residual=True)
    o = case.operands(torch.float16, device)
    expected = run_step(case.step, o, channels_last=True, backend="triton")

    def spread(t: torch.Tensor) -> torch.Tensor:
        """The same values, every second element of a larger tensor along each dimension, dimensions reversed."""
        shape = tuple(reversed([2 * n for n in t.shape]))
        wide = torch.full(shape, float("nan"), dtype=t.dtype, device=t.device).permute(*reversed(range(t.dim())))
        view = wide[(slice(None, None, 2),) * t.dim()]
        view.copy_(t)
        assert not view.is_contiguous() and torch.equal(view, t)
        return view

    strided = o._replace(**{n: spread(v) for n, v in o._asdict().items() if isinstance(v, torch.Tensor)})
    assert torch.equal(run_step(case.step, strided, channels_last=True, backend="triton"), expected)
    row = o.x[:1].expand(3, -1, -1, -1)
    got = run_step(case.step, o._replace(x=row, residual=None), channels_last=True, backend="triton")
    alone = run_step(case.step, o._replace(x=o.x[:1], residual=None), channels_last=True, backend="triton")
    assert torch.equal(got, alone.expand(3, -1, -1, -1))
    assert [name.split()[0] for name in launches] == ["phases"] * 4


def test_offset_operands(device: torch.device, launches: list[str]) -> None:
    """Operands that begin in the middle of an allocation, at two bytes past a 16-byte boundary."""
    case = conv("offset", "phases", 32, 32, 4, 2, 1, size=(3, 4))
    o = case.operands(torch.float16, device)
    expected = run_step(case.step, o, channels_last=True, backend="triton")

    def moved(t: torch.Tensor) -> torch.Tensor:
        storage = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype, device=t.device)
        view = torch.as_strided(storage, t.shape, t.stride(), 1)
        view.copy_(t)
        assert view.data_ptr() % 16 != 0
        return view

    got = run_step(case.step, o._replace(x=moved(o.x), weight=moved(o.weight)), channels_last=True, backend="triton")
    assert torch.equal(got, expected) and len(launches) == 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_empty_batch(channels_last: bool, device: torch.device, launches: list[str]) -> None:
    case = conv("empty", "phases", 32, 32, 4, 2, 1, size=(3, 4), batch=0)
    o = case.operands(torch.float16, device)
    y = run_step(case.step, o, channels_last=channels_last, backend="triton")
    assert y.shape == (0, 32, 6, 8) and y.dtype == torch.float16 and launches == []


def test_nan_and_inf_stay_where_they_are(device: torch.device, launches: list[str]) -> None:
    """A NaN of the input reaches exactly the outputs that read it (masked taps must not multiply it), inf stays inf."""
    case = conv("nan", "phases", 32, 32, 4, 2, 1, size=(6, 6), batch=1, activation="identity")
    o = case.operands(torch.float16, device)
    o.x[0, 3, 2, 3] = float("nan")
    o.x[0, 5, 0, 0] = float("inf")
    y = run_step(case.step, o, channels_last=True, backend="triton").cpu()
    exact = torch.nn.functional.conv_transpose2d(*(t.double() for t in cast(o, torch.float64)[:3]), 2, 1)
    assert torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.isinf(), exact.isinf())
    assert exact.isnan().any() and exact.isinf().any() and len(launches) == 1


def test_tf32_follows_the_switch(device: torch.device, launches: list[str]) -> None:
    """Exact and TF32 products differ, and the switch chooses between them."""
    case = REGIMES[0]
    o = case.operands(torch.float32, device)
    with conv_precision("tf32"):
        rounded = run_step(case.step, o, channels_last=True, backend="triton")
    with conv_precision("ieee"):
        exact = run_step(case.step, o, channels_last=True, backend="triton")
    difference = (rounded - exact).abs().max().item()
    assert 1e-5 < difference < 1e-1 and len(launches) == 2


def test_upsample_padding_that_does_not_collapse(device: torch.device) -> None:
    """Reflecting more than r - 1 pixels is no replication: an explicit Triton says so."""
    import cnnfast

    x, w = torch.randn(1, 32, 5, 5, device=device), torch.randn(32, 32, 5, 5, device=device)
    with pytest.raises(RuntimeError, match="reflect padding"):
        cnnfast.ops.upsample_conv2d(x, w, padding_mode="reflect", backend="triton")


def test_step_of_identity_activation_is_the_default() -> None:
    spec = REGIMES[0].step.spec
    assert Step(spec) == Step(spec, Activation("identity"))


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], ids=hex)
def test_tf32_keeps_every_nan(bits: int, device: torch.device, launches: list[str]) -> None:
    """CUDA's own NaN is all ones: rounding it to TF32 as an integer would give -0."""
    case = conv("nan", "phases", 32, 32, 4, 2, 1, size=(3, 4), activation="identity")
    o = case.operands(torch.float32, device)
    o.x.view(torch.int32)[0, 5, 1, 2] = bits
    with conv_precision("tf32"):
        y = run_step(case.step, o, channels_last=True, backend="triton")
    expected = run_reference(case.step, o._replace(x=o.x.cpu(), weight=o.weight.cpu(), bias=o.bias.cpu())).isnan()
    assert expected.any() and not expected.all() and torch.equal(y.isnan().cpu(), expected)
