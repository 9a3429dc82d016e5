"""An accelerated model's steps at a call after the first of its kind: nothing that was decided is ever stale."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast
from cnnfast.cpu import backend, content, inference, packing, watch, weight
from cnnfast.memory_format import format_of, is_channels_last, reformatted
from cnnfast.nn import rewrite_quick, rewrite_settle
from cnnfast.nn.accelerate_call import plain_call, record_of
from cnnfast.nn.rewrite_norm import NormCall
from cnnfast.nn.rewrite_quick import Planned
from cnnfast.nn.rewrite_site import Site

from .test_sequential_training import randomized


class Model(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module] = lambda: nn.BatchNorm2d(32), channels: int = 8) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, 32, 3, padding=1, bias=False), norm()
        self.second, self.third = nn.Conv2d(32, 32, 3, padding=1), nn.ConvTranspose2d(32, channels, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(x)))
        return torch.tanh(self.third(F.relu(y + self.second(y))))


def images(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size or (1, 8, 48, 48), generator=torch.Generator().manual_seed(seed))


def same(ours: nn.Module, x: Tensor) -> None:
    a = ours(x)
    with plain_call(ours):
        b = ours(x)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert a.stride() == b.stride()


NORMS: list[Callable[[], nn.Module]] = [
    lambda: nn.BatchNorm2d(32), lambda: nn.GroupNorm(4, 32), lambda: nn.InstanceNorm2d(32, affine=True),
]  # fmt: skip


@pytest.fixture(params=NORMS, ids=["batch", "group", "instance"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    ours = cnnfast.accelerate(Model(request.param).eval())
    with torch.no_grad():
        for _ in range(3):
            same(ours, images())
    record = record_of(ours)
    assert record is not None and all(site._quick for site in record.graphs[-1].sites)
    return ours


def written_past_its_version(m: Any) -> None:
    m.second.weight.data.mul_(1.5)


def replaced(m: Any) -> None:
    m.second.weight = nn.Parameter(m.second.weight * 0.5)


def other_memory(m: Any) -> None:
    m.third.weight.data = m.third.weight.data * -1


def replaced_ahead_of_the_norm(m: Any) -> None:
    m.first.weight = nn.Parameter(m.first.weight.flip(0))


def written_ahead_of_the_norm(m: Any) -> None:
    m.first.weight.data[3:9].mul_(-1)


def other_statistics(m: Any) -> None:
    (m.norm.weight if getattr(m.norm, "running_mean", None) is None else m.norm.running_mean).data.add_(1)


def other_bias(m: Any) -> None:
    m.second.bias.data.add_(1)


CHANGES: list[Callable[[Any], None]] = [
    written_past_its_version, replaced, replaced_ahead_of_the_norm, written_ahead_of_the_norm, other_memory,
    other_statistics, other_bias,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__ for c in CHANGES])
def test_changes_are_seen(model: nn.Module, change: Callable[[Any], None]) -> None:
    with torch.no_grad():
        before = model(images())
        change(model)
        for _ in range(3):
            same(model, images())
        assert (model(images()) - before).abs().max() > 1e-3


def test_other_inputs_and_settings(model: nn.Module) -> None:
    with torch.no_grad():
        same(model, images(2, 8, 32, 40))
        same(model, images().contiguous(memory_format=torch.channels_last))
        with torch.backends.mkldnn.flags(enabled=False):
            same(model, images())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            a = model(images())
            with plain_call(model):
                assert a.dtype == model(images()).dtype
    x = images().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None


def test_nothing_is_asked_anew(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Planned | NormCall] = []
    finished, normed = Planned.finished, NormCall.finished
    monkeypatch.setattr(Planned, "finished", lambda self, *rest: ran.append(self) or finished(self, *rest))
    # A convolution of PyTorch's and its norm stand in the graph as these.
    monkeypatch.setattr(
        NormCall, "finished", lambda self, *rest, **more: ran.append(self) or normed(self, *rest, **more)
    )
    monkeypatch.setattr(NormCall, "finishes", None)
    monkeypatch.setattr(Planned, "met", None)
    monkeypatch.setattr(backend, "run", None)
    monkeypatch.setattr(rewrite_quick, "parts_of", None)
    monkeypatch.setattr(Site, "__call__", None)
    with torch.no_grad():
        same(model, images())
    fused = sum(row.fused for row in cnnfast.explain(model).rows)
    assert len(ran) == fused > 0


class _AddsOnto(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y)
        z += y
        return z


def test_a_sum_onto_something_else_is_not_planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added is an operand, no number that may change."""
    planned = []
    real = Site._planned
    monkeypatch.setattr(Site, "_planned", lambda self, *args: planned.append(self) or real(self, *args))
    model, x = _AddsOnto().eval(), torch.randn(1, 16, 32, 32)
    with torch.inference_mode():
        want = model(x)
        cnnfast.accelerate(model)
        for _ in range(2):
            model(x)
        planned.clear()
        for _ in range(3):
            torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    assert planned == []


@torch.no_grad()
def test_the_input_of_a_first_call_that_stands_is_converted_not_its_result() -> None:
    """An RGB image has a twentieth of the numbers of what a convolution makes of it."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.PReLU(64)]
    for _ in range(2):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    plain = randomized(nn.Sequential(*layers)).eval()
    ours, x = cnnfast.accelerate(copy.deepcopy(plain)), torch.randn(1, 3, 64, 64)
    for _ in range(4):
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)
    (graph,) = record_of(ours).graphs  # type: ignore[union-attr]
    (site,) = graph.sites
    (quick,) = site._quick.values()
    first = quick.parts[0]
    assert first.calls and first.converts and not any(part.converts for part in quick.parts[1:])
    settled = graph._seen[2].__self__.graph  # type: ignore[union-attr]
    looks, *called = (n for n in settled.nodes if n.op == "call_function" and n.target is not operator.getitem)
    assert isinstance(looks.target, rewrite_settle._Looks) and all(n.op == "placeholder" for n in looks.all_input_nodes)
    assert called[0].target is reformatted and called[0].args[0].op == "placeholder"
    assert called[1].target is torch.conv2d and called[1].args[0] is called[0]


def test_kernels_that_are_asked_for_run_on_every_call() -> None:
    """On a GPU that is not there: what would be launched."""
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks.rehearse.inspector import recording

    ours, launched = cnnfast.accelerate(Model(channels=16).eval()), []
    with torch.no_grad(), cnnfast.backend("triton"), recording(90) as calls:
        for _ in range(4):
            calls.clear()
            ours(images(1, 16, 48, 48))
            launched.append([call.job.function for call in calls])
    assert launched[0].count("conv_transpose_kernel") == 3
    assert launched[1:] == launched[:1] * 3


# --- weights that nobody wrote to -------------------------------------------------------------------------------------

watched = pytest.mark.skipif(not watch._POSSIBLE, reason="this PyTorch has no such storages: weights are read")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of large tensors that were read to see whether they have changed."""
    seen: list[int] = []
    real = content._hash
    monkeypatch.setattr(content, "_STEADY", 0.0)  # what holds the same for three looks is relied on

    def hashed(t: Tensor) -> bytes:
        if t.nbytes >= content._LEAST_WATCHED:
            seen.append(t.numel())
        return real(t)

    monkeypatch.setattr(content, "_hash", hashed)
    return seen


def packed() -> tuple[nn.Sequential, Tensor]:
    """Convolutions that gain by a packed weight on any processor."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Conv2d(128, 128, 3, padding=1) for _ in range(3))).eval(), images(1, 128, 16, 16)


@watched
@torch.no_grad()
def test_weights_are_read_once(read: list[int]) -> None:
    model, x = packed()
    ours = cnnfast.accelerate(model)
    for _ in range(4):
        same(ours, x)
    read.clear()
    same(ours, x)
    assert not read
    for layer in ours:
        layer.weight.data.view(-1)[5] += 1  # which no version tells
        for _ in range(4):
            same(ours, x)
        assert set(read) == {layer.weight.numel()} and len(read) == 3
        read.clear()


@watched
@torch.no_grad()
def test_sources_of_computed_weights_are_read_once(read: list[int]) -> None:
    model, x = packed()
    nn.utils.parametrizations.weight_norm(model[1])
    ours = cnnfast.accelerate(model)
    for _ in range(4):
        same(ours, x)
    for _ in range(4):
        ours(x)  # the plain model's weight_norm gets at its source as one who writes does
    read.clear()
    ours(x)
    assert not read
    ours[1].parametrizations.weight.original1.data.mul_(1.25)
    same(ours, x)
    same(ours, x)
    assert read


class Wide(nn.Module):
    """Steps that gain by a packed weight on any processor: with a norm, and with a bias and a sum."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(128, 128, 3, padding=1, bias=False), norm(128)
        self.second = nn.Conv2d(128, 128, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(x)))
        return F.relu(y + self.second(y))


@watched
@torch.no_grad()
@pytest.mark.parametrize("computed", [False, True], ids=["", "weight_norm"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d], ids=["batch", "instance"])
def test_steps_run_with_what_was_looked_at_ahead_of_them(
    norm: Callable[[int], nn.Module], computed: bool, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is looked up in the cache while nobody writes: no operator gets at a weight or a vector to write to it,
    as some of oneDNN's do with what they are given as a bias."""
    torch.manual_seed(0)
    model, x = randomized(Wide(norm)).eval(), images(1, 128, 16, 16)
    if computed:
        nn.utils.parametrizations.weight_norm(model.second)
    ours, ahead = cnnfast.accelerate(model), []
    for _ in range(8):
        want = ours(x)
    looks = rewrite_settle._Looks.__call__
    with monkeypatch.context() as patch:
        patch.setattr(packing.Leased, "get", None)
        patch.setattr(inference.Ready, "run", None)
        patch.setattr(rewrite_settle._Looks, "__call__", lambda *args: ahead.append(looks(*args)) or ahead[-1])
        assert torch.equal(ours(x), want)
    assert [len(found) for found in ahead] == ([2, 1] if computed else [2]) and not any(
        None in found for found in ahead
    )
    ours.second.bias.data.add_(1)
    for _ in range(6):
        same(ours, x)
    ours.first.weight.data.view(-1)[7] += 1
    for _ in range(6):
        same(ours, x)
    assert (ours(x) - want).abs().max() > 1e-3


class Signals(nn.Module):
    """Of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv1d(128, 128, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.first(x.flatten(2)), 0.1)
        return F.leaky_relu(y + self.second(y), 0.1)


MODELS_16: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: Wide(nn.BatchNorm2d),
    "instance": lambda: Wide(lambda c: nn.InstanceNorm2d(c, affine=True)),
    "group": lambda: Wide(lambda c: nn.GroupNorm(8, c)),
    "few channels": lambda: Model(lambda: nn.GroupNorm(4, 32), 128),
    "slope": lambda: nn.Sequential(nn.Conv2d(128, 64, 3, padding=1), nn.PReLU(), nn.Conv2d(64, 128, 3, padding=1)),
    "slopes": lambda: nn.Sequential(nn.Conv2d(128, 512, 3, padding=1), nn.PReLU(512)),
    "signals": Signals,
}


@watched
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS_16)
def test_steps_under_autocast_are_settled(
    name: str, dtype: torch.dtype, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the results of the calls before, in eager mode's dtype; out of it, the model runs in float32 again."""
    torch.manual_seed(0)
    model, x = randomized(MODELS_16[name]()).eval(), images(1, 128, 16, 16)
    ours = cnnfast.accelerate(copy.deepcopy(model))
    alone, exact = model(x), copy.deepcopy(model).double()(x.double())
    with torch.autocast("cpu", dtype):
        want = model(x)
        for _ in range(8):
            got = ours(x)
        with monkeypatch.context() as patch:
            patch.setattr(packing.Leased, "get", None)
            patch.setattr(Site, "__call__", None)
            assert torch.equal(ours(x), got)
    assert got.dtype == want.dtype and got.stride() == want.stride()
    error, allowed = ((y.double() - exact).square().mean().sqrt() for y in (got, want))
    assert error < 1.5 * allowed
    for _ in range(4):
        torch.testing.assert_close(ours(x), alone, rtol=1e-5, atol=1e-5)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    with torch.autocast("cpu", other):
        assert ours(x).dtype == model(x).dtype
    with torch.autocast("cpu", dtype):
        assert torch.equal(ours(x), got)
        ours.get_submodule("0" if name.startswith("slope") else "second").bias.data.add_(1)
        assert not torch.equal(ours(x), got)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (48, 64), (9, 11, 10)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("last", ["", "weights", "weights and input"])
def test_a_result_of_one_channel(size: tuple[int, ...], kernel: int, last: str, batch: int) -> None:
    """It is in both formats, and has eager mode's strides, whatever the stretch that it ends is in."""
    torch.manual_seed(0)
    flat = len(size) == 2
    conv, norm, pool = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d) if flat else (nn.Conv3d, nn.BatchNorm3d, nn.MaxPool3d)
    first = conv(1, 64, 3, padding=1), norm(64), nn.ReLU(), pool(3, 1, 1)
    second = conv(64, 64, 3, padding=1), nn.ReLU(), conv(64, 1, kernel, padding=kernel // 2)
    model = randomized(nn.Sequential(*first, *second)).eval()
    x = images(batch, 1, *size)
    if last:
        model = cnnfast.channels_last(model)
    if last == "weights and input":
        x = x.to(memory_format=format_of(x.dim(), True))
    ours = cnnfast.accelerate(model)
    for _ in range(5):
        same(ours, x)
    record = record_of(ours)
    assert record is not None
    if size == (48, 64) and not last:
        assert [site.channels_last for site in record.graphs[-1].sites] == [True, False], "one stretch"
    ours(x).add_(1)
    with torch.enable_grad():
        y = ours(x)
    assert y.requires_grad


class Writes(nn.Module):
    """Sets its weight to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(128, 128, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        self.first.weight.copy_(weight)
        return self.second(F.relu(self.first(x)))


@torch.no_grad()
def test_a_graph_that_writes_to_a_weight(read: list[int]) -> None:
    """Also where all weights are looked at as it starts: one that it writes to in each call never comes to rest."""
    torch.manual_seed(0)
    ours, x = cnnfast.accelerate(Writes().eval()), images(1, 128, 16, 16)
    for seed in (0, 0, 0, 0, 1, 2, 2, 1):
        weight = 0.03 * torch.randn(128, 128, 3, 3, generator=torch.Generator().manual_seed(seed))
        a = ours(x, weight)
        with plain_call(ours):
            b = ours(x, weight)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@watched
@torch.no_grad()
def test_a_sequential_reads_its_weights_once(read: list[int]) -> None:
    model, x = packed()
    ours = cnnfast.Sequential(*copy.deepcopy(model)).eval()
    for changed in (None, *ours):
        if changed is not None:
            changed.weight.data.view(-1)[5] += 1
        for _ in range(5):
            torch.testing.assert_close(ours(x), nn.Sequential(*ours)(x), rtol=1e-5, atol=1e-5)
        assert len(read) == 3 * (3 if changed is None else 1)
        read.clear()


@torch.no_grad()
def test_a_hook_of_a_sequential_that_writes_to_a_later_weight() -> None:
    model, x = packed()
    ours, given = cnnfast.Sequential(*model).eval(), iter((1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 2.0))

    def write(*_: Any) -> None:
        ours[2].weight.data.fill_(next(given))

    ours[1].register_forward_hook(write)
    for value in (1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 2.0):
        y = ours(x)
        ours[2].weight.data.fill_(value)
        want = F.conv2d(F.conv2d(F.conv2d(x, ours[0].weight, ours[0].bias, 1, 1), ours[1].weight, ours[1].bias, 1, 1),
                        ours[2].weight, ours[2].bias, 1, 1)  # fmt: skip
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


# --- weights in the format of the maps --------------------------------------------------------------------------------


class Small(nn.Module):
    """Convolutions that stay ATen's, in a stretch that is channels-last."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(6))
        self.norm = norm()

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + 0.5 * self.norm(conv(F.relu(x)))
        return x


@torch.no_grad()
@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.GroupNorm(4, 32)], ids=["bare", "norm"])
def test_weights_of_channels_last_maps_are_kept_in_that_format(
    norm: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ATen would copy them on every call."""
    torch.manual_seed(0)
    ours, kept = cnnfast.accelerate(Small(norm).eval()), []
    x = images(1, 32, 24, 24).to(memory_format=torch.channels_last)
    real = weight.KeptLike.__call__

    def noted(self: weight.KeptLike, x: Tensor, w: Tensor, found: Tensor | None = None) -> Tensor:
        found = real(self, x, w, found)
        kept.append((is_channels_last(x), is_channels_last(found), torch.equal(found, w)))
        return found

    monkeypatch.setattr(weight.KeptLike, "__call__", noted)
    strides = [p.stride() for p in ours.parameters()]

    def check(times: int) -> None:
        for _ in range(times):
            kept.clear()
            same(ours, x)
            assert all(of_x and equal for of_x, _, equal in kept), kept
        assert len(kept) == 6 and all(of_weight for _, of_weight, _ in kept), kept

    check(4)
    for conv in ours.convs:
        conv.weight.data.view(-1)[7] += 1  # which no version tells
        check(2)
    ours.convs[2].weight = nn.Parameter(torch.randn(32, 32, 3, 3) / 17)
    check(3)
    ours.convs[4].weight.data = torch.randn(32, 32, 3, 3) / 17
    check(3)
    assert [p.stride() for p in ours.parameters()] == strides, "the model's own are left as they are"


class Filtered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(32, 8, 3, 3) / 9)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return F.relu(F.conv2d(x, F.conv2d(style, self.first, padding=1), padding=1))


@torch.no_grad()
@pytest.mark.parametrize("size", [8, 64])
def test_a_weight_that_a_convolution_gives_is_not_kept(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is another tensor in each call."""
    torch.manual_seed(0)
    plain = Filtered().eval()
    ours, kept = cnnfast.accelerate(copy.deepcopy(plain)), []
    monkeypatch.setattr(weight.KeptLike, "__call__", lambda *args: kept.append(args))
    x = images(1, 32, size, size).to(memory_format=torch.channels_last)
    for k in range(5):
        style = torch.randn(32, 8, 3, 3, generator=torch.Generator().manual_seed(k)) / 17
        torch.testing.assert_close(ours(x, style), plain(x, style), rtol=1e-5, atol=1e-5)
    assert kept == []


@torch.no_grad()
def test_a_sequential_keeps_weights_in_the_format_of_its_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    ours, kept = cnnfast.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU()).eval(), []
    x = images(1, 32, 24, 24).to(memory_format=torch.channels_last)
    real = weight.KeptLike.__call__
    monkeypatch.setattr(weight.KeptLike, "__call__", lambda *args: kept.append(real(*args)) or kept[-1])
    for _ in range(3):
        torch.testing.assert_close(ours(x), nn.Sequential(*ours)(x), rtol=1e-5, atol=1e-5)
        ours[0].weight.data.mul_(1.0)
    assert len(kept) == 3 and [is_channels_last(w) for w in kept] == [False, True, True]
    ours[0].weight.data.mul_(2.0)
    torch.testing.assert_close(ours(x), nn.Sequential(*ours)(x), rtol=1e-5, atol=1e-5)
