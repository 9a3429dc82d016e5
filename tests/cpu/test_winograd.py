"""Winograd's filtering on a CPU: right for every geometry it takes, in any blocks, and only where it is faster."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnfast
from cnnfast.activations import Activation
from cnnfast.cpu import inference, isa, onednn, toom_cook
from cnnfast.cpu.isa import Process
from cnnfast.cpu.methods import METHODS, applicable, winograd_gain
from cnnfast.cpu.winograd import Winograd
from cnnfast.memory_format import to_format
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step
from cnnfast.tolerance import expected

from ..tolerance import assert_close

pytestmark = pytest.mark.skipif(onednn.why_missing() is not None, reason=str(onednn.why_missing()))


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def plain(c_in: int, c_out: int, *geometry: Any, ndim: int = 2, **more: Any) -> ConvSpec:
    return ConvSpec.make(c_in, c_out, *geometry, transposed=False, ndim=ndim, **more)


def transposed(c_in: int, c_out: int, *geometry: Any, ndim: int = 2, **more: Any) -> ConvSpec:
    return ConvSpec.make(c_in, c_out, *geometry, ndim=ndim, **more)


# Each with a size of the input; lengths a multiple of the tile and not, more taps than one transform has; "wide" along
# the last dimension.
GEOMETRY: dict[str, tuple[ConvSpec, tuple[int, ...]]] = {
    "k3": (plain(24, 20, 3, 1, 1), (12, 9)),
    "k3_odd": (plain(24, 20, 3, 1, 1), (13, 10)),
    "k3_unpadded": (plain(24, 20, 3), (15, 8)),
    "k3_wide_padding": (plain(16, 16, 3, 1, 7), (4, 5)),
    "k3_rgb": (plain(3, 32, 3, 1, 1), (16, 5)),
    "k3_to_rgb": (plain(32, 3, 3, 1, 1), (16, 5)),
    "k3_long": (plain(16, 16, 3, 1, 1), (203, 3)),
    "k2": (plain(16, 16, 2), (9, 9)),
    "k4": (plain(16, 16, 4, 1, 2), (16, 9)),
    "k5": (plain(16, 16, 5, 1, 2), (11, 9)),
    "k7": (plain(16, 16, 7, 1, 3), (16, 12)),
    "k3x5": (plain(16, 16, (3, 5), 1, (1, 2)), (16, 7)),
    "k3_rest_strided": (plain(16, 16, 3, (1, 2), (1, 3), dilation=(1, 2)), (12, 11)),
    "k4s2": (plain(16, 24, 4, 2, 1), (32, 8)),
    "k8s4": (plain(16, 24, 8, 4, 2), (32, 8)),
    "t4s2": (transposed(24, 16, 4, 2, 1), (8, 6)),
    "t4s2_odd": (transposed(24, 16, 4, 2, 1), (7, 7)),
    "t6s2": (transposed(24, 16, 6, 2, 2), (9, 7)),
    "t6s3": (transposed(24, 16, 6, 3), (8, 5)),
    "t6s3_uneven": (transposed(24, 16, 6, 3, 1, 2), (8, 5)),  # two residues read the same rows, the third does not
    "t4s2x1": (transposed(24, 16, 4, (2, 1), 1), (8, 6)),
    "t3s1": (transposed(24, 16, 3, 1, 1), (8, 6)),
    "wide_k3": (plain(24, 20, 3, 1, 1), (13, 40)),
    "wide_k3_odd": (plain(24, 20, 3, 1, 1), (9, 43)),
    "wide_k3_unpadded": (plain(24, 20, 3), (12, 38)),
    "wide_k3_wide_padding": (plain(16, 16, 3, 1, 9), (5, 30)),
    "wide_k7": (plain(16, 16, 7, 1, 3), (11, 40)),
    "wide_k3_rest_strided": (plain(16, 16, 3, (2, 1), (3, 1), dilation=(2, 1)), (21, 40)),
    "wide_k4s2": (plain(16, 24, 4, 2, 1), (20, 72)),
    "wide_t4s2": (transposed(24, 16, 4, 2, 1), (5, 36)),
    "wide_t6s2": (transposed(24, 16, 6, 2, 2), (5, 32)),
    "wide_t6s3": (transposed(24, 16, 6, 3), (5, 32)),
    "wide_t4s2x1": (transposed(24, 16, (3, 4), (1, 2), 1), (6, 32)),
    "wide_three_k3": (plain(16, 16, 3, 1, 1, ndim=3), (7, 5, 24)),
    "wide_three_k3_odd": (plain(16, 16, 3, 1, 1, ndim=3), (5, 3, 26)),
    "wide_three_t4s2": (transposed(16, 8, 4, 2, 1, ndim=3), (3, 4, 36)),
    "one_k3": (plain(24, 20, (1, 3), 1, (0, 1)), (1, 40)),
    "one_k7": (plain(24, 20, (1, 7), 1, (0, 3)), (1, 41)),
    "one_k11": (plain(24, 20, (1, 11), 1, (0, 5)), (1, 50)),
    "one_k4s2": (plain(24, 20, (1, 4), (1, 2), (0, 1)), (1, 26)),
    "one_t16s8": (transposed(24, 20, (1, 16), (1, 8), (0, 4)), (1, 13)),
    "three_k3": (plain(16, 16, 3, 1, 1, ndim=3), (8, 6, 7)),
    "three_k3_odd": (plain(16, 16, 3, 1, 1, ndim=3), (10, 3, 5)),
    "three_t4s2": (transposed(16, 8, 4, 2, 1, ndim=3), (5, 4, 6)),
}
OTHERS = {
    "dilated": (plain(16, 16, 3, 1, 2, dilation=2), (12, 9)),
    "groups": (plain(16, 16, 3, 1, 1, groups=2), (12, 9)),
    "k1": (plain(16, 16, 1), (12, 9)),
    "k3s2": (plain(16, 16, 3, 2, 1), (16, 9)),  # a phase of two taps, and one of one
    "t3s2": (transposed(16, 16, 3, 2, 1, 1), (8, 6)),
    "t2s2": (transposed(16, 16, 2, 2), (8, 6)),
    "t4s2_cropped": (transposed(16, 16, 4, 2, 1, 1), (8, 6)),  # an odd size
    "one_tile": (plain(16, 16, 3, 1, 1), (4, 4)),
    "t5": (transposed(16, 16, 5, 1, 2), (8, 6)),
}


def operands(spec: ConvSpec, size: tuple[int, ...], batch: int, mean: float = 0.0) -> Operands:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    x = to_format(draw(batch, spec.in_channels, *size) + mean, True)
    return Operands(x, nn.Parameter(draw(*spec.weight_shape)), bias=draw(spec.out_channels))


def by_winograd(spec: ConvSpec, o: Operands) -> torch.Tensor | None:
    method = Winograd(spec, tuple(o.x.shape), torch.float32)
    return method.run(o.x, method.pack(o.weight.detach(), o.bias), onednn.PostOp(), True)


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize(("block", "mean"), [(2**22, 0.0), (2**14, 1.0)], ids=["one-block", "blocks-biased"])
def test_every_geometry(name: str, block: int, mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toom_cook, "_BLOCK", block)
    spec, size = GEOMETRY[name]
    for batch in (2, 3):
        o = operands(spec, size, batch, mean)
        y = by_winograd(spec, o)
        assert y is not None and tuple(y.shape) == (batch, spec.out_channels, *spec.output_size(size))
        assert y.is_contiguous(memory_format=torch.channels_last if spec.ndim == 2 else torch.channels_last_3d)
        assert_close(y, *expected(Step(spec), o, False)[:2], f"{name}, batch {batch}")


@pytest.mark.parametrize(
    ("shape", "images", "rows", "tiles"),
    [
        ((1, 16, 800, 512), 1, 267, 128),  # rows of one image
        ((12, 16, 100, 256), 6, 100, 64),  # whole images, of 2.4 MB each
        ((1, 16, 20000, 16), 1, 20000, 2500),  # few columns: the tiles of the rows
    ],
)
def test_blocks_are_cut(shape: tuple[int, ...], images: int, rows: int, tiles: int) -> None:
    method = Winograd(plain(16, 16, 3, 1, 1), shape, torch.float32)
    assert (method.images, method.rows, method.tiles) == (images, rows, tiles)


@pytest.mark.parametrize(
    ("name", "axis"), [("k3", 0), ("wide_k3", 1), ("one_k3", 1), ("three_k3", 0), ("wide_three_k3", 2)]
)
def test_the_dimension_of_the_filters(name: str, axis: int) -> None:
    """The last where it has eight tiles or is alone."""
    spec, size = GEOMETRY[name]
    assert Winograd(spec, (2, spec.in_channels, *size), torch.float32).axis == axis


@pytest.mark.parametrize("name", OTHERS)
def test_what_it_does_not_take(name: str) -> None:
    spec, size = OTHERS[name]
    assert not Winograd.applies(spec, (2, spec.in_channels, *size))


def test_what_pytorch_takes_as_a_matrix_product_it_does_not_take() -> None:
    spec, size = GEOMETRY["k3"]
    assert not Winograd.applies(spec, (1, spec.in_channels, *size))


# --- values that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38])
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_a_result_that_is_not_finite_is_pytorchs(value: float, activation: str, forced: None) -> None:
    """An infinity reaches neighbours of its own outputs, and meets its negative: the step runs as PyTorch's."""
    spec, size = GEOMETRY["k3"]
    step, o = Step(spec, Activation(activation)), operands(spec, size, 2)
    assert "Winograd" in inference.method_name(step, tuple(o.x.shape), torch.float32)
    for _ in range(2):
        y = inference.run(step, o, True)
    assert y is not None
    o.x[0, 3, 5, 5] = value
    found, want = cnnfast_conv(step, o), F.conv2d(o.x, o.weight, o.bias, padding=1)
    want = want.relu() if activation == "relu" else want
    assert torch.equal(found.isfinite(), want.isfinite()) and torch.equal(found.isnan(), want.isnan())
    torch.testing.assert_close(found, want, equal_nan=True, rtol=1e-4, atol=1e-4)


def cnnfast_conv(step: Step, o: Operands) -> torch.Tensor:
    from cnnfast.cpu import backend

    y = backend.run(step, o, channels_last=True, training=False, required=True)
    assert y is not None
    return y


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever it takes, it runs."""
    monkeypatch.setattr(inference, "by_rule", lambda *_: Winograd)
    monkeypatch.setattr(inference, "winograd_gain", lambda *_: 4.0)
    monkeypatch.setattr(isa, "full_width", lambda: False)
    forget()
    yield
    forget()


def forget() -> None:
    """What was chosen, and the keys of packs, which name the method."""
    for cached in (inference._way, inference._key, inference._why_slower_plain):
        cached.cache_clear()


# --- steps ------------------------------------------------------------------------------------------------------------

CHAINS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "norm_relu": (lambda: [nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()], (2, 16, 12, 9)),
    "leaky": (lambda: [nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.LeakyReLU(0.2)], (2, 16, 12, 9)),
    "prelu": (lambda: [nn.Conv2d(16, 16, 3, 1, 1), nn.PReLU()], (2, 16, 12, 9)),
    "reflected": (lambda: [nn.Conv2d(16, 16, 3, 1, 1, padding_mode="reflect"), nn.Tanh()], (2, 16, 12, 9)),
    "up": (lambda: [nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.SiLU()], (2, 64, 12, 10)),
    "upsampled": (lambda: [nn.Upsample(scale_factor=2), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU()], (2, 16, 8, 6)),
    "instance": (lambda: [nn.Conv2d(16, 16, 3, 1, 1), nn.InstanceNorm2d(16), nn.ReLU()], (2, 16, 12, 9)),
    "signal": (lambda: [nn.Conv1d(64, 64, 7, 1, 3), nn.LeakyReLU(0.1)], (2, 64, 300)),
    "volume": (lambda: [nn.Conv3d(16, 16, 3, 1, 1), nn.BatchNorm3d(16), nn.ReLU()], (2, 16, 8, 6, 7)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_steps(name: str, forced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms folded, activations afterwards; a weight that changes is seen."""
    modules, shape = CHAINS[name]
    torch.manual_seed(0)
    model = cnnfast.Sequential(*modules()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(shape)
    x = to_format(x, True) if x.dim() > 3 else x
    ran, real = [], Winograd._run
    monkeypatch.setattr(Winograd, "_run", lambda self, *rest: ran.append(self) or real(self, *rest))
    for _ in range(2):
        for _ in range(3):
            y = model(x)
        assert ran, "it has not run"
        torch.testing.assert_close(y, nn.Sequential(*model)(x), rtol=1e-5, atol=1e-5)
        model[-2 if name in ("upsampled", "leaky", "prelu", "reflected", "signal") else 0].weight.mul_(1.5)
        ran.clear()


def test_memory_is_the_threads_own() -> None:
    """Models run in several threads, with and without inference mode, one after the other and at once."""
    spec, size = GEOMETRY["k3"]
    o = operands(spec, size, 2)
    want = by_winograd(spec, o)
    wrong: list[str] = []

    def work(inference_mode: bool) -> None:
        with torch.inference_mode() if inference_mode else torch.no_grad():
            for _ in range(20):
                if not torch.equal(by_winograd(spec, o), want):  # type: ignore[arg-type]
                    wrong.append("other numbers")

    work(True)
    work(False)
    threads = [threading.Thread(target=work, args=(mode,)) for mode in (True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "shape", "gains"),
    [
        pytest.param(plain(256, 256, 3, 1, 1), (1, 256, 64, 64), "12/12", id="wide"),
        pytest.param(plain(128, 128, 3, 1, 1), (1, 128, 64, 64), "12/12", id="128"),
        pytest.param(plain(64, 64, 3, 1, 1), (1, 64, 256, 256), "12/", id="64"),
        pytest.param(plain(64, 64, 3, 1, 1), (1, 64, 48, 48), "1/", id="64_small"),
        pytest.param(plain(256, 256, 3, 1, 1), (1, 256, 16, 16), "12/1", id="256_small"),
        pytest.param(plain(32, 32, 3, 1, 1), (1, 32, 128, 128), "/", id="narrow"),
        pytest.param(plain(128, 128, 3, 1, 1), (1, 128, 8, 8), "/", id="small"),
        pytest.param(plain(3, 64, 3, 1, 1), (1, 3, 128, 128), "/", id="from_rgb"),
        pytest.param(transposed(256, 256, 4, 2, 1), (1, 256, 32, 32), "12/12", id="up"),
        pytest.param(transposed(64, 32, 4, 2, 1), (1, 64, 64, 64), "/", id="up_narrow"),
        pytest.param(plain(64, 64, 3, 1, 1, ndim=3), (1, 64, 32, 32, 32), "12/1", id="volume"),
        pytest.param(plain(32, 32, 3, 1, 1, ndim=3), (1, 32, 64, 64, 64), "/", id="volume_narrow"),
        pytest.param(plain(256, 256, (1, 11), 1, (0, 5)), (1, 256, 1, 200), "12/1", id="signal"),
        pytest.param(plain(32, 32, (1, 11), 1, (0, 5)), (1, 32, 1, 12800), "/", id="signal_narrow"),
    ],
)
def test_the_rule(spec: ConvSpec, shape: tuple[int, ...], gains: str) -> None:
    """``gains``: the numbers of threads with which it does, and behind the stroke those where products are twice as
    fast. (docs/facts.md has what was measured.)"""
    found = [
        "".join(str(n) for n in (1, 2) if winograd_gain(spec, shape, Process(False, n, full)) > 1)
        for full in (False, True)
    ]
    assert "/".join(found) == gains


def test_the_number_of_threads_is_asked_on_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shape, threads = plain(64, 64, 3, 1, 1), (1, 64, 48, 48), torch.get_num_threads()
    monkeypatch.setattr(isa, "full_width", lambda: False)
    try:
        names = []
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            names.append(inference.method_name(Step(spec), shape, torch.float32).split()[0])
    finally:
        torch.set_num_threads(threads)
    assert names == ["Winograd", "Convolution", "Winograd"]


def test_only_float32() -> None:
    for dtype, name in ((torch.float32, "Winograd"), (torch.bfloat16, "Convolution")):
        if inference.products_dtype(dtype, inference.instruction_set()) == dtype:
            found = inference.method_name(Step(plain(256, 256, 3, 1, 1)), (1, 256, 64, 64), dtype)
            assert found.split()[0] == name


@pytest.mark.parametrize("name", ["one_k7", "one_t16s8", "k3"])
def test_products_keep_their_precision(name: str) -> None:
    """Autocast lowers matrix products; PyTorch's switches do, and then it is not taken."""
    spec, size = GEOMETRY[name]
    o = operands(spec, size, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = by_winograd(spec, o)
    assert y is not None
    assert_close(y, *expected(Step(spec), o, False)[:2], name)
    for products in (True, False):
        assert ("Winograd" in applicable(spec, tuple(o.x.shape), torch.float32, products)) == products


@pytest.mark.parametrize(
    ("kind", "spec", "size"),
    [
        ("Winograd", plain(24, 20, 3, 1, 1), (12, 9)),
        ("Winograd", plain(64, 64, (1, 7), 1, (0, 3)), (1, 300)),
        ("Gathered", transposed(64, 64, 4, 2, 1), (8, 8)),
        ("Merged", transposed(64, 3, 4, 2, 1), (16, 16)),
    ],
)
def test_results_can_be_written_to_with_gradients(
    kind: str, spec: ConvSpec, size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PyTorch's can: they are no views of something else."""
    monkeypatch.setattr(inference, "by_rule", lambda *_: METHODS[kind])
    forget()
    try:
        step, o = Step(spec), operands(spec, size, 2)
        y = [inference.run(step, o, True) for _ in range(2)][1]
        assert y is not None and inference.method_name(step, tuple(o.x.shape), torch.float32).split()[0] == kind
    finally:
        forget()
    with torch.enable_grad():
        assert y.add_(nn.Parameter(torch.ones(()))).grad_fn is not None
