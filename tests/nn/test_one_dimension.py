"""Accelerated models of one dimension: PyTorch's results and strides, and maps that stay channels-last in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast
from cnnfast.cpu import inference, onednn, packed
from cnnfast.memory_format import in_format, to_format
from cnnfast.nn.accelerate_call import plain_call, record_of

from ..tolerance import assert_close
from .test_sequential_training import randomized

pytestmark = pytest.mark.usefixtures("one_thread")


class Blocks(nn.Module):
    """A vocoder's: upsampled, then the mean of two residual blocks, at last one channel."""

    def __init__(self, c: int = 32, groups: int = 1, dilation: int = 3, stride: int = 1, last: int = 1) -> None:
        super().__init__()
        self.pre = nn.Conv1d(7, 2 * c, 7, stride, padding=3)
        self.up = nn.ConvTranspose1d(2 * c, c, 8, 4, 2)
        self.first = nn.ModuleList(
            nn.Conv1d(c, c, k, padding=dilation * (k // 2), dilation=dilation, groups=groups) for k in (3, 7)
        )
        self.second = nn.ModuleList(nn.Conv1d(c, c, k, padding=k // 2) for k in (3, 7))
        self.post = nn.Conv1d(c, last, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.leaky_relu(self.pre(x), 0.1))
        for a, b in zip(self.first, self.second, strict=True):
            x = b(F.leaky_relu(a(F.leaky_relu(x, 0.1)), 0.1)) + x
        y = x * 0.5
        y += self.second[0](F.silu(x))
        return torch.tanh(self.post(F.leaky_relu(y / 2)))


class Odd(nn.Module):
    """Whatever ends a stretch, or is in none: views, a concatenation, sums over positions, one channel, pools."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(7, 16, 5, padding=2), nn.Conv1d(16, 16, 3, padding=1)
        self.c, self.d = nn.Conv1d(48, 16, 1), nn.Conv1d(16, 1, 3, padding=1)
        self.e, self.norm, self.group = nn.Conv1d(1, 16, 9, padding=4), nn.BatchNorm1d(16), nn.GroupNorm(4, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = F.relu(self.a(x))
        b = a + torch.tanh(self.b(a))
        c = F.silu(self.c(torch.cat([a, b, b.flip(2)], 1)))
        c += b.mean(2, keepdim=True)
        d = self.d(c)
        e = self.group(self.e(d)) + F.interpolate(F.max_pool1d(c, 2), c.shape[2])
        return F.elu(self.norm(self.b(e))), c.transpose(1, 2), d, e * b, self.e(d.view(d.shape[0], 1, -1)) - c


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vocoder": Blocks,
    "grouped": lambda: Blocks(groups=4, dilation=2),
    "depthwise": lambda: Blocks(groups=32, dilation=1),
    "strided": lambda: Blocks(24, dilation=5, stride=2, last=5),
    "odd": Odd,
}


def results(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else y


def assert_same(plain: nn.Module, ours: nn.Module, x: Tensor, calls: int = 3) -> None:
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        for _ in range(calls):
            for got, want, true in zip(results(ours(x)), results(plain(x)), results(exact(x.double())), strict=True):
                assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
                assert_close(got, true, want)
                if x.dtype == torch.float32:
                    assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_results_and_strides_are_pytorchs(name: str, dtype: torch.dtype) -> None:
    plain = randomized(MODELS[name]()).eval().to(dtype)
    ours = cnnfast.accelerate(copy.deepcopy(plain))
    for shape in ((1, 7, 601), (4, 7, 33)):
        assert_same(plain, ours, torch.randn(shape).to(dtype))
    assert_same(plain, ours, torch.randn(1, 601, 7).transpose(1, 2).to(dtype))  # channels-last as it is given
    record = record_of(ours)
    assert record is not None and record.failed is None and any(graph.sites for graph in record.graphs)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_pytorchs(name: str) -> None:
    plain = randomized(MODELS[name]()).eval()
    ours = cnnfast.accelerate(copy.deepcopy(plain))
    x = torch.randn(2, 7, 65)
    found = []
    for m in (plain, ours):
        leaf = x.clone().requires_grad_()
        sum(y.square().mean() for y in results(m(leaf))).backward()  # type: ignore[union-attr]
        found.append([leaf.grad, *(p.grad for p in m.parameters())])
    for want, got in zip(*found, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert got.stride() == want.stride()
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_maps_stay_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step gets what the step before, or a pass between them, left channels-last. (The last has too little to do
    for a packed weight.)"""
    ours = cnnfast.accelerate(randomized(Blocks(64)).eval())
    seen: list[tuple[bool, bool]] = []
    plain_call = packed.Call.__call__

    def call(self: packed.Call, x: Tensor, residual: Tensor | None, *more: Any) -> Tensor | None:
        added = residual is None or residual.is_contiguous(memory_format=torch.channels_last)
        seen.append((x.is_contiguous(memory_format=torch.channels_last), added))
        return plain_call(self, x, residual, *more)

    x = torch.randn(1, 7, 400)
    with torch.no_grad():
        ours(x), ours(x)
        monkeypatch.setattr(packed.Call, "__call__", call)
        ours(x)
    assert len(seen) == 7 and seen[0] == (False, True) and set(seen[1:]) == {(True, True)}


def test_a_model_too_small_to_gain_runs_as_it_stands() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1), nn.ReLU()).eval()
    ours = cnnfast.accelerate(model)
    with torch.no_grad():
        ours(torch.randn(1, 8, 40))
        assert "one dimension" in str(cnnfast.explain(ours, torch.randn(1, 8, 40)).reasons)


POINTWISE: list[Callable[[Tensor], Tensor]] = [
    F.relu, F.leaky_relu, F.elu, F.silu, F.mish, F.gelu, torch.tanh, torch.sigmoid, F.hardtanh, F.relu6,
    lambda x: F.prelu(x, torch.full((16,), 0.3)), lambda x: x.relu_(), lambda x: x * 2, lambda x: x.add(x),
    lambda x: x.div_(3),
]  # fmt: skip


@pytest.mark.parametrize("k", range(len(POINTWISE)))
def test_pointwise_operators_keep_the_format(k: int) -> None:
    """What `rewrite_layout` takes for granted of ATen in one dimension."""
    x = torch.randn(2, 16, 9)
    last = to_format(x.clone(), True)
    assert in_format(last, True) and not in_format(x, True)
    y = POINTWISE[k](last)
    assert in_format(y, True)
    torch.testing.assert_close(y, POINTWISE[k](x), rtol=1e-5, atol=1e-6)


def odd_weights(m: nn.Module) -> None:
    """ATen's result follows such a weight, unlike what Dynamo says."""
    cnnfast.channels_last(m)


def one_tap(m: nn.Module) -> None:
    for c in m.modules():
        if isinstance(c, nn.Conv1d):
            c.weight.data = c.weight.data.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


class Chain(nn.Module):
    def __init__(self, k: int, c: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(c, 16, k, padding=k // 2), nn.Conv1d(16, 16, k, padding=k // 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.a(x))
        return y, torch.tanh(self.b(y) + y)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("change", [odd_weights, one_tap])
def test_strides_of_odd_weights(change: Callable[[nn.Module], None], k: int) -> None:
    plain = Chain(k).eval()
    change(plain)
    ours = Chain(k).eval()
    ours.load_state_dict(plain.state_dict())
    change(ours)
    assert [p.stride() for p in ours.parameters()] == [p.stride() for p in plain.parameters()]
    ours = cnnfast.accelerate(ours)
    for x in (torch.randn(1, 16, 3000), torch.randn(2, 3000, 16).transpose(1, 2)):
        assert_same(plain, ours, x)


def test_one_channel_that_looks_channels_last() -> None:
    plain = Chain(3, 1).eval()
    assert_same(plain, cnnfast.accelerate(copy.deepcopy(plain)), torch.randn(2, 3000, 1).transpose(1, 2))


def test_sizes_cost_few_graphs() -> None:
    ours = cnnfast.accelerate(randomized(Blocks()).eval())
    with torch.no_grad():
        for length in (64, 65, 100, 33, 128):
            x = torch.randn(1, 7, length)
            got = ours(x)
            with plain_call(ours):
                torch.testing.assert_close(got, ours(x), rtol=1e-5, atol=1e-5)
    record = record_of(ours)
    assert record is not None and len(record.graphs) <= 3


def test_parameters_made_in_inference_mode_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The view that a step takes of such a weight knows no base."""
    packs: list[object] = []
    plain_pack = inference.packed
    monkeypatch.setattr(inference, "packed", lambda m, s, o: packs.append(s) or plain_pack(m, s, o))
    with torch.inference_mode():
        seq = cnnfast.Sequential(nn.ConvTranspose1d(32, 32, 8, 4, 2), nn.LeakyReLU(0.1)).eval()
        x = torch.randn(2, 32, 800)  # one sample would run as it stands
        for _ in range(3):
            torch.testing.assert_close(seq(x), nn.Sequential(*seq)(x), rtol=1e-5, atol=1e-5)
        assert len(packs) == 1
        seq[0].weight.mul_(2)
        for _ in range(3):
            torch.testing.assert_close(seq(x), nn.Sequential(*seq)(x), rtol=1e-5, atol=1e-5)
        assert len(packs) == 2


@pytest.mark.skipif(onednn.why_missing() is not None, reason=str(onednn.why_missing()))
@pytest.mark.parametrize(
    ("layers", "samples", "dtype", "fused"),
    [
        ([nn.ConvTranspose1d(64, 32, 4, 2, 1)], 1, torch.float32, False),
        ([nn.ConvTranspose1d(512, 256, 16, 8, 4)], 1, torch.float32, True),
        ([nn.ConvTranspose1d(64, 32, 4, 2, 1)], 4, torch.float32, True),
        ([nn.ConvTranspose1d(64, 32, 4, 2, 1)], 1, torch.bfloat16, True),
        ([nn.ConvTranspose1d(64, 32, 4, 2, 1), nn.BatchNorm1d(32)], 1, torch.float32, True),
    ],
    ids=["one-sample", "large-weight", "four-samples", "bf16", "folded-norm"],
)
def test_transposed_convolutions_of_one_sample(
    layers: list[nn.Module], samples: int, dtype: torch.dtype, fused: bool
) -> None:
    """Both ends are converted for oneDNN's deconvolution, which has to save something for that."""
    seq = cnnfast.Sequential(*layers, nn.LeakyReLU(0.1)).eval().to(dtype)
    x = torch.randn(samples, layers[0].in_channels, 200, dtype=dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        said = seq.explain(x)
        assert ("could be fused, but: in one dimension" not in said) is fused, said
        if not fused:
            assert torch.equal(seq(x), nn.Sequential(*seq)(x))
