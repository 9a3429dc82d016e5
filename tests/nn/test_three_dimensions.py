"""cnnfast.Sequential and cnnfast.ops in three dimensions: PyTorch's results, formats and errors."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast
from cnnfast import reference
from cnnfast.cpu import conv_autograd, inference, training
from cnnfast.cpu.packing import PACKS
from cnnfast.nn.accelerate_call import record_of
from cnnfast.ops.run import run_step
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step
from cnnfast.tolerance import model_verdict

from ..tolerance import assert_close
from .test_drop_in import close
from .test_sequential_training import randomized

LAST, F32 = torch.channels_last_3d, torch.float32


pytestmark = pytest.mark.usefixtures("one_thread")


def both(*modules: nn.Module) -> tuple[nn.Sequential, cnnfast.Sequential]:
    plain = randomized(nn.Sequential(*modules)).eval()
    return plain, cnnfast.Sequential(*copy.deepcopy(plain))  # type: ignore[return-value, misc]


def assert_same(plain: nn.Sequential, ours: cnnfast.Sequential, x: Tensor, what: str = "") -> None:
    """Three calls without gradients: of a weight that is new, that is packed, and from the pack."""
    with torch.no_grad():
        want = plain(x)
        exact = copy.deepcopy(plain).double()(x.double())
        for _ in range(3):
            got = ours(x)
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride()), what
            assert_close(got, exact, want, what)


STACKS = {
    "batch norm": lambda: [nn.Conv3d(16, 24, 3, padding=1, bias=False), nn.BatchNorm3d(24), nn.ReLU()],
    "strided": lambda: [nn.Conv3d(16, 24, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv3d(24, 8, 1), nn.Tanh()],
    "transposed": lambda: [nn.ConvTranspose3d(16, 8, 4, 2, 1), nn.BatchNorm3d(8), nn.ReLU()],
    "group norm": lambda: [nn.Conv3d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv3d(16, 8, 3)],
    "instance norm": lambda: [nn.Conv3d(16, 8, 3), nn.InstanceNorm3d(8, affine=True), nn.ReLU(True)],
    "grouped": lambda: [nn.Conv3d(16, 16, 3, groups=4), nn.PReLU(16), nn.ConvTranspose3d(16, 16, 2, 2, groups=4)],
    "padded": lambda: [nn.ReplicationPad3d((1, 1, 0, 0, 2, 2)), nn.Conv3d(16, 8, (5, 1, 3)), nn.Sigmoid()],
    "reflect": lambda: [nn.Conv3d(16, 8, 3, padding=(1, 2, 1), padding_mode="reflect"), nn.ELU()],
    "upsampling": lambda: [  # (a bias ahead of a BatchNorm that measures has no gradient but noise)
        *(nn.Upsample(scale_factor=2), nn.Conv3d(16, 8, 3, padding=1, bias=False), nn.BatchNorm3d(8), nn.GELU()),
    ],
    "unequal upsampling": lambda: [
        *(nn.Upsample(scale_factor=(2, 1, 3)), nn.Conv3d(16, 8, 3, padding=1, padding_mode="replicate")),
        *(nn.GroupNorm(2, 8), nn.LeakyReLU(0.2)),
    ],
    "padded upsampling": lambda: [nn.Upsample(scale_factor=2), nn.ReflectionPad3d(1), nn.Conv3d(16, 8, 3), nn.ReLU()],
    "one channel": lambda: [nn.Conv3d(16, 1, 3, padding=1), nn.Softplus()],
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_and_strides_are_pytorchs(name: str, batch: int, channels_last: bool) -> None:
    plain, ours = both(*STACKS[name]())
    x = torch.randn(batch, 16, 9, 8, 10)
    if channels_last:
        x = x.contiguous(memory_format=LAST)
    assert list(plain.state_dict()) == list(ours.state_dict())
    assert_same(plain, ours, x)


@pytest.mark.parametrize("name", STACKS)
def test_lower_precision_is_pytorchs(name: str) -> None:
    plain, ours = both(*STACKS[name]())
    x = torch.randn(2, 16, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            for _ in range(3):
                got, want = ours(x), plain(x)
                assert (got.dtype, got.stride()) == (want.dtype, want.stride())
                exact = copy.deepcopy(plain).double()
                with torch.autocast("cpu", enabled=False):
                    assert_close(got, exact(x.double()), want)
    assert_same(plain.bfloat16(), ours.bfloat16(), x.bfloat16())


def test_weights_are_packed_in_inference() -> None:
    _, ours = both(*STACKS["batch norm"](), nn.ConvTranspose3d(24, 24, 3, 2, 1, 1), nn.ReLU())
    x = torch.randn(1, 16, 12, 12, 12)
    gc.collect()  # what models of other tests left
    before = len(PACKS)
    with torch.no_grad():
        assert ours.explain(x) == "0-2: Conv3d + BatchNorm3d + ReLU fused\n3-4: ConvTranspose3d + ReLU fused"
        ours(x), ours(x)
    assert len(PACKS) == before + 2


# name -> (modules, a part of why they are not fused, or "")
UPSAMPLED: dict[str, tuple[list[nn.Module], str]] = {
    "x2": ([nn.Upsample(scale_factor=2), nn.Conv3d(16, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU()], ""),
    "exact x3": ([nn.Upsample(scale_factor=3.0, mode="nearest-exact"), nn.Conv3d(16, 16, 5, padding=2)], ""),
    "few channels": ([nn.Upsample(scale_factor=2), nn.Conv3d(16, 1, 3, padding=1), nn.Tanh()], ""),
    "trilinear": ([nn.Upsample(scale_factor=2, mode="trilinear"), nn.Conv3d(16, 16, 3)], "'trilinear' is not nearest"),
    "groups": ([nn.Upsample(scale_factor=2), nn.Conv3d(16, 16, 3, groups=4)], "grouped transposed convolutions"),
    "one tap": ([nn.Upsample(scale_factor=2), nn.Conv3d(16, 32, 1)], "no taps that an upsampling could sum"),
    "odd size": ([nn.Upsample(scale_factor=3), nn.Conv3d(64, 16, 3)], ""),
}


@pytest.mark.parametrize("name", UPSAMPLED)
def test_upsamplings_are_collapsed_where_that_gains(name: str) -> None:
    modules, reason = UPSAMPLED[name]
    plain, ours = both(*modules)
    x = torch.randn(1, modules[1].in_channels, 8, 10, 8)  # type: ignore[arg-type]
    with torch.no_grad():
        found = ours.explain(x)
    if not reason:
        assert found.endswith(" fused") and found.startswith(f"0-{len(modules) - 1}: Upsample + Conv3d"), found
    assert reason in found, found
    assert_same(plain, ours, x)


def test_a_changed_weight_is_seen() -> None:
    plain, ours = both(*STACKS["batch norm"]())
    x = torch.randn(1, 16, 9, 9, 9)
    assert_same(plain, ours, x)
    for m in (plain, ours):
        m[0].weight.data.mul_(-2)  # type: ignore[operator, union-attr]
    assert_same(plain, ours, x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", STACKS)
def test_gradients_and_buffers_are_pytorchs(name: str, batch: int, training: bool) -> None:
    """Of one sample most run as two halves, of two samples upsamplings are collapsed."""
    plain, ours = both(*STACKS[name]())
    plain.train(training), ours.train(training)
    for last, weights_last in ((False, False), (True, False), (False, True)):
        if weights_last:
            cnnfast.channels_last(plain), cnnfast.channels_last(ours)
        exact = copy.deepcopy(plain).double()
        x = torch.randn(batch, 16, 9, 8, 10)
        x = x.contiguous(memory_format=LAST) if last else x
        found = []
        for m, dtype in ((plain, torch.float32), (ours, torch.float32), (exact, torch.float64)):
            m.zero_grad()
            leaf = x.to(dtype, copy=True).requires_grad_()
            y = m(leaf)
            y.square().sum().backward()
            found.append([y.detach(), leaf.grad, *(p.grad for p in m.parameters()), *m.buffers()])
        for i, (want, got, e) in enumerate(zip(*found, strict=True)):
            assert got.stride() == want.stride(), i
            if e.is_floating_point():
                assert model_verdict(got, e, [want]) is None, (i, model_verdict(got, e, [want]))
            else:
                assert torch.equal(got, e)


# name -> (modules, shape of the input, a part of why they are not fused with gradients, or "")
TRAINED: dict[str, tuple[list[nn.Module], tuple[int, ...], str]] = {
    "one sample": ([nn.Conv3d(16, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU()], (1, 16, 12, 12, 12), ""),
    "transposed": ([nn.ConvTranspose3d(16, 16, 3, 2, 1, 1), nn.ReLU()], (1, 16, 12, 12, 12), ""),
    "two samples": ([nn.Conv3d(16, 16, 3, padding=1), nn.ReLU()], (2, 16, 12, 12, 12), "by oneDNN"),
    "one position": ([nn.Conv3d(16, 16, 1), nn.ReLU()], (1, 16, 20, 20, 20), "kernel of one position"),
    "few": ([nn.Conv3d(4, 4, 3), nn.ReLU()], (1, 4, 9, 9, 9), "too little work"),
    "upsampling": ([nn.Upsample(scale_factor=2), nn.Conv3d(16, 16, 3, padding=1)], (2, 16, 6, 6, 6), ""),
    "few upsampled": (
        [nn.Upsample(scale_factor=2), nn.Conv3d(8, 8, 3, padding=1)],
        (2, 8, 4, 4, 4),
        "too little arithmetic",
    ),
    "groups": ([nn.Upsample(scale_factor=2), nn.Conv3d(16, 16, 3, groups=2)], (2, 16, 8, 8, 8), "too little"),
}


@pytest.mark.parametrize("name", TRAINED)
def test_what_runs_fused_with_gradients(name: str) -> None:
    modules, shape, reason = TRAINED[name]
    ours = cnnfast.Sequential(*modules)
    found = ours.explain(torch.randn(shape))
    assert reason in found and found.endswith(" fused") == (not reason), found


def test_a_frozen_layer_and_an_input_without_gradient() -> None:
    plain, ours = both(nn.Conv3d(16, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 8, 3))
    x = torch.randn(1, 16, 10, 10, 10)
    exact = copy.deepcopy(plain).double()
    for m in (plain, ours, exact):
        m[0].weight.requires_grad_(False)  # type: ignore[union-attr]
        m(x.to(m[0].weight.dtype)).square().sum().backward()  # type: ignore[union-attr, arg-type]
    for (n, want), got, e in zip(plain.named_parameters(), ours.parameters(), exact.parameters(), strict=True):
        assert (got.grad is None) == (n == "0.weight")
        if got.grad is not None and want.grad is not None and e.grad is not None:
            assert model_verdict(got.grad, e.grad, [want.grad]) is None, n


def test_second_derivatives_of_one_sample() -> None:
    """A gradient penalty: PyTorch's own derivative runs the backward that is differentiated again."""
    plain, ours = both(nn.Conv3d(8, 16, 3, padding=1), nn.SiLU(), nn.ConvTranspose3d(16, 8, 3, 2))
    exact = copy.deepcopy(plain).double()
    x = torch.randn(1, 8, 9, 9, 9)
    found = []
    for m in (plain, ours, exact):
        leaf = x.to(m[0].weight.dtype, copy=True).requires_grad_()  # type: ignore[union-attr, arg-type]
        (g,) = torch.autograd.grad(m(leaf).square().sum(), leaf, create_graph=True)
        g.square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in m.parameters() if p.grad is not None)])
    assert "Conv3d + SiLU fused" in ours.explain(x.requires_grad_())
    for want, got, e in zip(*found, strict=True):
        assert model_verdict(got, e, [want]) is None  # type: ignore[arg-type]


def test_batch_statistics_without_gradients() -> None:
    plain, ours = both(*STACKS["batch norm"]())
    plain.train(), ours.train()
    x = torch.randn(2, 16, 8, 8, 8) + 3
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        want, got, y64 = plain(x), ours(x), exact(x.double())
    assert got.stride() == want.stride()
    assert_close(got, y64, want)
    for buffer, w, b64 in zip(ours.buffers(), plain.buffers(), exact.buffers(), strict=True):
        assert_close(buffer, b64, w) if buffer.is_floating_point() else torch.testing.assert_close(buffer, w)


@pytest.mark.parametrize("shape", [(1, 15, 8, 8, 8), (1, 16, 8, 8), (1, 16, 1, 1, 1), (16, 16), (0, 16, 4, 4, 4)])
def test_errors_are_pytorchs(shape: tuple[int, ...]) -> None:
    plain, ours = both(nn.Conv3d(16, 8, 3), nn.BatchNorm3d(8), nn.ReLU())
    outcomes = []
    for m in (plain, ours):
        try:
            with torch.no_grad():
                outcomes.append((tuple(m(torch.ones(shape)).shape), ""))
        except (RuntimeError, ValueError) as error:
            outcomes.append(((), str(error)))
    assert outcomes[0] == outcomes[1]


def test_triton_declines_with_a_reason() -> None:
    _, ours = both(nn.Conv3d(8, 8, 3), nn.ReLU())
    with cnnfast.backend("triton"), torch.no_grad():
        with pytest.raises(RuntimeError, match="8 input channels per group are fewer than 16|triton is not installed"):
            ours(torch.ones(1, 8, 8, 8, 8))


class Residual(nn.Module):
    """As of SegResNet (Myronenko 2018), with a transposed convolution behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, 16), nn.GroupNorm(4, 16)
        self.conv1, self.conv2 = (nn.Conv3d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        self.up, self.bn = nn.ConvTranspose3d(16, 16, 2, 2), nn.BatchNorm3d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.relu(self.bn(self.up(self.conv2(F.relu(self.norm2(y))) + x)))


def test_an_accelerated_model_launches_kernels() -> None:
    """On a GPU that is not there: what would be launched. (That the kernels are right, tests/gpu shows.)"""
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks.rehearse.inspector import recording

    model = cnnfast.accelerate(randomized(Residual()).eval())
    x = torch.randn(1, 16, 4, 6, 4)
    with torch.no_grad(), cnnfast.backend("triton"), recording(90) as calls:
        model(x)
        calls.clear()
        y = model(x)
    functions = [c.job.function for c in calls]
    assert functions.count("conv_transpose_kernel") == 3 and functions.count("norm_act_kernel") == 1, functions
    assert y.shape == (1, 16, 8, 12, 8)
    sums = [c for c in calls if c.job.function in ("conv_transpose_kernel", "split_k_epilogue_kernel")]
    assert any(c.arguments.get("residual_ptr") is not None for c in sums)  # the sum is in an epilogue
    assert cnnfast.explain(model).fused == 3


def random_modules(r: random.Random) -> tuple[int, list[nn.Module]]:
    """Channels of the input, and modules."""
    modules: list[nn.Module] = []
    channels = first = r.choice([1, 2, 8, 16])
    for _ in range(r.randint(1, 3)):
        out, groups = r.choice([1, 2, 8, 12]), 1
        kernel = tuple(r.choice([1, 2, 3]) for _ in range(3))
        if r.random() < 0.4:
            modules.append(
                nn.ConvTranspose3d(
                    channels, out, kernel, r.choice([1, 2]), r.choice([0, 0, 1]) * min(1, min(kernel) - 1)
                )
            )
        else:
            mode = r.choice(["zeros", "zeros", "replicate"])
            padding = tuple(k // 2 for k in kernel)
            modules.append(
                nn.Conv3d(channels, out, kernel, r.choice([1, 1, 2]), padding, 1, groups, r.random() < 0.5, mode)
            )
        channels = out
        norm = r.choice(["", "batch", "group", "running"])
        if norm in ("batch", "running"):
            modules.append(nn.BatchNorm3d(channels))
        elif norm == "group":
            modules.append(nn.GroupNorm(1, channels))
        modules += r.choice([[], [nn.ReLU()], [nn.GELU()], [nn.PReLU(channels)], [nn.Hardtanh()]])
    return first, modules


@pytest.mark.parametrize("seed", range(60))
def test_random_stacks(seed: int) -> None:
    r = random.Random(seed)
    first, modules = random_modules(r)
    plain, ours = both(*modules)
    x = torch.randn(r.choice([1, 2]), first, *(r.choice([4, 6, 11]) for _ in range(3)))
    if r.random() < 0.5:
        x = x.contiguous(memory_format=LAST)
    if r.random() < 0.3:
        for m in plain, ours:
            for c in m:
                if isinstance(c, nn.Conv3d | nn.ConvTranspose3d):
                    c.to(memory_format=LAST)
    if r.random() < 0.3:
        plain, ours, x = plain.bfloat16(), ours.bfloat16(), x.bfloat16()
    if x.dtype != torch.float32:
        assert_same(plain, ours, x, str(plain))
        return
    with torch.no_grad():
        want, exact = plain(x), copy.deepcopy(plain).double()(x.double())
        for _ in range(3):
            got = ours(x)
            assert got.stride() == want.stride()
            close(got, exact.float())


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small maps run as large ones do."""
    monkeypatch.setattr(conv_autograd, "_LEAST", 0)
    monkeypatch.setattr(conv_autograd, "_LEAST_POSITIONS", 0)
    monkeypatch.setattr(training, "_LEAST_SAVED", ((0, 1, 1),) * 2)
    cached = conv_autograd.ways, training.collapses, training._why_slower_3d
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("seed", range(60))
def test_random_stacks_with_gradients(seed: int, any_size: None) -> None:
    r = random.Random(seed)
    first, modules = random_modules(r)
    if r.random() < 0.4:
        modules.insert(0, nn.Upsample(scale_factor=r.choice([2, (2, 1, 2), (1, 3, 2)])))
    plain, ours = both(*modules)
    x = torch.randn(r.choice([1, 1, 2]), first, *(r.choice([5, 8, 9]) for _ in range(3)))
    if r.random() < 0.4:
        x = x.contiguous(memory_format=LAST)
    if r.random() < 0.4:
        cnnfast.channels_last(plain), cnnfast.channels_last(ours)
    exact, mode, of_input = copy.deepcopy(plain).double(), r.random() < 0.5, r.random() < 0.8
    found = []
    for m in (plain, ours, exact):
        m.train(mode)
        entering = (x.double() if m is exact else x).clone().requires_grad_(of_input)
        given: list[Tensor] = []
        if of_input:  # as the operator before gets it: a leaf's would be copied into the leaf's strides
            entering = entering.mul(1)
            entering.register_hook(given.append)
        y = m(entering)
        y.square().mean().backward()
        found.append([y.detach(), *given, *(p.grad for p in m.parameters()), *(b for b in m.buffers() if b.dim())])
    for i, (want, got, e) in enumerate(zip(*found, strict=True)):
        assert got.stride() == want.stride(), (i, got.shape)
        assert model_verdict(got, e, [want]) is None, (i, model_verdict(got, e, [want]))


# --- the functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_functions(transposed: bool, channels_last: bool) -> None:
    ours, theirs = (
        (cnnfast.ops.conv3d, F.conv3d) if not transposed else (cnnfast.ops.conv_transpose3d, F.conv_transpose3d)
    )
    w, b = nn.Parameter(torch.randn(16, 16, 3, 3, 3) / 20), nn.Parameter(torch.randn(16))
    scale, shift = torch.rand(16) + 0.5, torch.randn(16)
    x = torch.randn(2, 16, 8, 9, 10)
    x = x.contiguous(memory_format=LAST) if channels_last else x
    for stride, residual in ((1, False), (2, True), ((1, 2, 1), True)):
        with torch.no_grad():
            bare = theirs(x, w, b, stride, 1)
            r = torch.randn_like(bare) if residual else None
            v = (-1, 1, 1, 1)
            plain = bare * scale.view(v) + shift.view(v) + (0 if r is None else r)
            bare64 = theirs(x.double(), w.double(), b.double(), stride, 1)
            exact = bare64 * scale.double().view(v) + shift.double().view(v) + (0 if r is None else r.double())
            for _ in range(3):
                got = ours(x, w, b, stride, 1, scale=scale, shift=shift, residual=r, activation="relu")
                assert got.stride() == bare.stride()
                assert_close(got, exact.relu(), plain.relu())
        assert ours(x[0], w, b, stride, 1).shape == bare.shape[1:]
        assert ours(x.to("meta"), w.to("meta"), b.to("meta"), stride, 1).shape == bare.shape


@pytest.mark.parametrize("function", [cnnfast.ops.conv3d, cnnfast.ops.conv_transpose3d])
def test_functions_gradients(function: object) -> None:
    x = torch.randn(2, 2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return function(x, w, b, 2, 1, activation="silu")  # type: ignore[operator]

    assert torch.autograd.gradcheck(run, (x, w, b))
    assert torch.autograd.gradgradcheck(run, (x, w, b))


@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_upsample_conv3d(mode: str, channels_last: bool) -> None:
    x, w, b = torch.randn(2, 16, 6, 5, 7), nn.Parameter(torch.randn(8, 16, 3, 3, 3) / 20), torch.randn(8)
    x = x.contiguous(memory_format=LAST) if channels_last else x
    scale = torch.rand(8) + 0.5
    before = len(PACKS)
    for factor, padding in ((2, None), ((2, 1, 3), (1, 0, 2))):
        factors = (2, 2, 2) if padding is None else factor
        pads = (1, 1, 1) if padding is None else padding
        args = (factors, pads, mode)
        far = mode == "reflect" and any(p > r - 1 for p, r in zip(pads, factors, strict=True))  # type: ignore[arg-type]
        with torch.no_grad():
            bare = reference.upsample_conv(x, w, b, *args)  # type: ignore[arg-type]
            exact = reference.upsample_conv(x.double(), w.double(), b.double(), *args)  # type: ignore[arg-type]
            v = scale.view(-1, 1, 1, 1)
            for _ in range(3):
                y = cnnfast.ops.upsample_conv3d(x, w, b, factor, padding, mode, scale=scale, activation="relu")
                assert y.stride() == bare.stride()
                assert_close(y, (exact * v.double()).relu(), (bare * v).relu())
            assert far or len(PACKS) > before
        assert cnnfast.ops.upsample_conv3d(x[0], w, b, factor, padding, mode).shape == bare.shape[1:]
        assert (
            cnnfast.ops.upsample_conv3d(*(t.to("meta") for t in (x, w, b)), factor, padding, mode).shape == bare.shape
        )


def test_upsample_conv3d_gradients() -> None:
    shapes = ((2, 2, 2, 3, 2), (2, 2, 3, 3, 3), (2,))
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return cnnfast.ops.upsample_conv3d(x, w, b, activation="silu")

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_upsample_conv3d_errors() -> None:
    x, w = torch.randn(1, 4, 5, 5, 5), torch.randn(8, 4, 3, 3, 3)
    for wrong, message in (
        (dict(scale_factor=(2, 2)), r"scale_factor must be an int or three ints, of 64 bits, got \(2, 2\)"),
        (dict(padding=-1), r"padding must not be negative, got \(-1, -1, -1\)"),
        (dict(weight=w[..., :2]), r"kernel size must be odd, got \(3, 3, 2\)"),
        (dict(weight=w[..., 0]), r"weight must be \(C_out, C_in/groups, kd, kh, kw\), got shape \(8, 4, 3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cnnfast.ops.upsample_conv3d(**{"input": x, "weight": w, **wrong})  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"expected 4D \(unbatched\) or 5D \(batched\) input to upsample_conv3d"):
        cnnfast.ops.upsample_conv3d(x[0, 0], w)
    with pytest.raises(RuntimeError, match="three dimensions|triton"):
        cnnfast.ops.upsample_conv3d(x, w, backend="triton")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["conv3d", "conv_transpose3d", "upsample_conv3d"])
def test_functions_gradients_have_eagers_formats(name: str, batch: int) -> None:
    """An input's. A weight's has the weight's strides, or PyTorch's where the function is."""

    def upsampled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.conv3d(F.interpolate(x, scale_factor=2.0), w, b, 1, 1)

    theirs = upsampled if name.startswith("up") else getattr(F, name)
    for last, weight_last in ((False, False), (True, False), (False, True), (True, True)):
        x, w, b = torch.randn(batch, 16, 9, 10, 8), torch.randn(16, 16, 3, 3, 3) / 20, torch.randn(16)
        x, w = (t.contiguous(memory_format=LAST) if to else t for t, to in ((x, last), (w, weight_last)))
        found = []
        for function, dtype in ((getattr(cnnfast.ops, name), F32), (theirs, F32), (theirs, torch.float64)):
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, w, b)]
            y = function(*leaves)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), leaves)))
        for i, (got, want, e) in enumerate(zip(*found, strict=True)):
            allowed = {want.stride(), w.stride()} if i == 2 else {want.stride()}
            assert got.stride() in allowed, (i, last, weight_last)
            assert model_verdict(got, e, [want]) is None


def test_functions_errors() -> None:
    x, w = torch.randn(1, 4, 5, 5, 5), torch.randn(8, 3, 3, 3, 3)
    with pytest.raises(RuntimeError) as theirs:
        F.conv3d(x, w)
    with pytest.raises(RuntimeError) as ours:
        cnnfast.ops.conv3d(x, w)
    assert str(ours.value) == str(theirs.value)
    with pytest.raises(RuntimeError, match="three dimensions|triton"):
        cnnfast.ops.conv3d(torch.ones(1, 4, 5, 5, 5), torch.ones(4, 4, 3, 3, 3), backend="triton")


def test_one_position_is_packed_where_the_map_is_channels_last() -> None:
    """ATen's loops give a contiguous result, and take a contiguous input."""
    step = Step(ConvSpec(False, 32, 16, (1, 1, 1), (1, 1, 1), (0, 0, 0), (0, 0, 0), (1, 1, 1)))
    weight = nn.Parameter(torch.randn(16, 32, 1, 1, 1))
    x = torch.randn(1, 32, 24, 24, 24)
    last = x.contiguous(memory_format=LAST)
    assert inference.why_not(step, Operands(last, weight), True) is None
    assert "matrix product" in str(inference.why_not(step, Operands(x, weight), False))
    small = last[..., :4, :4].contiguous(memory_format=LAST)
    assert "too few" in str(inference.why_not(step, Operands(small, weight), True))
    with torch.no_grad():
        for _ in range(2):
            y = run_step(step, Operands(last, weight), channels_last=True)
            assert y.is_contiguous(memory_format=LAST)
            want = F.conv3d(x, weight)
            assert_close(y, F.conv3d(x.double(), weight.double()), want)


@pytest.mark.parametrize("size, contiguous", [(2, True), (6, False)])
@torch.no_grad()
def test_grouped_transposed_kernels_larger_than_the_volume_get_it_contiguous(
    size: int, contiguous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN takes up to 80 times as long of a channels-last one, inside of a chain or ahead of it."""
    seen = []
    fused, modular = training.volume_convolution, F.conv_transpose3d

    def by_step(x: Tensor, *args: Any) -> Tensor:
        if args[-1].transposed:
            seen.append(x.is_contiguous())
        return fused(x, *args)

    def by_module(x: Tensor, *args: Any) -> Tensor:
        seen.append(x.is_contiguous())
        return modular(x, *args)

    monkeypatch.setattr(training, "volume_convolution", by_step)
    plain = nn.Sequential(
        nn.Conv3d(128, 128, 3, 1, 1), nn.ReLU(), nn.ConvTranspose3d(128, 128, 5, 2, 2, groups=128), nn.GroupNorm(4, 128)
    ).eval()  # fmt: skip
    x = torch.randn(1, 128, size, size, size)
    ours = cnnfast.Sequential(*copy.deepcopy(plain)).eval()
    expected = plain(x)
    monkeypatch.setattr(F, "conv_transpose3d", by_module)
    for _ in range(2):
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
    assert seen and set(seen) == {contiguous}


@pytest.mark.parametrize("size, kept", [(2, False), (8, True)])
@torch.no_grad()
def test_a_stretch_ends_ahead_of_such_a_kernel(size: int, kept: bool) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv3d(16, 16, 3, 1, 1), nn.Conv3d(16, 16, 3, 1, 1)
            self.up = nn.ConvTranspose3d(16, 16, 5, 2, 2, groups=16)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return self.up(y), self.second(y)

    plain = Branches().eval()
    ours, x = cnnfast.accelerate(copy.deepcopy(plain)), torch.randn(1, 16, size, size, size)
    for _ in range(3):
        for got, want in zip(ours(x), plain(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            assert got.stride() == want.stride()
    (graph,) = record_of(ours).graphs  # type: ignore[union-attr]
    converts = {call.kind.name: site.converts for site in graph.sites for call in site.calls}
    assert converts["conv3d"] and converts["conv_transpose3d"] is kept
