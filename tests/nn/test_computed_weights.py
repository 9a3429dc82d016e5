"""Weights that are computed from others: kept while those hold the same, never stale, and like eager mode's."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, remove_weight_norm, spectral_norm, weight_norm

import cnnfast
from cnnfast.cpu import content
from cnnfast.cpu.packing import PACKS
from cnnfast.nn import rewrite_weights
from cnnfast.nn.rewrite_weights import Computed

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.compiler.reset()


class Masked(nn.Module):
    """A parametrization of one's own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(weight.numel()) % 3 > 0).view(weight.shape).float())
        self.gain = nn.Parameter(torch.ones(weight.shape[0], *(1,) * (weight.dim() - 1)))

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask * weight * self.gain.exp()


def masked(conv: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(conv, "weight", Masked(conv.weight))  # type: ignore[arg-type]


HOW: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm, old": weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm, old": spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "one's own": masked,
    "two": lambda conv: masked(parametrizations.weight_norm(conv)),
}
SIZES = {1: (64, 512), 2: (64, 24, 24), 3: (16, 8, 12, 12)}


class Net(nn.Module):
    def __init__(self, how: str, n: int = 2, transposed: bool = False) -> None:
        super().__init__()
        c = SIZES[n][0]
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d) if transposed else ()
        kind = (*kinds, nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
        self.conv = HOW[how](kind(c, c, 4 if transposed else 3, *((2, 1) if transposed else (1, 1))))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x), 0.1)


def pair(how: str, n: int = 2, transposed: bool = False) -> tuple[nn.Module, nn.Module, Tensor]:
    """The plain net, the accelerated one, and an input. (Each anew: the old weight_norm cannot be copied.)"""

    def made() -> nn.Module:
        torch.manual_seed(0)
        net = Net(how, n, transposed)
        net(torch.randn(1, *SIZES[n]))  # spectral_norm's vectors move
        return net.eval()

    plain, ours = made(), made()
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(1, *SIZES[n], generator=torch.Generator().manual_seed(1))
    return plain, cnnfast.accelerate(ours), x


def same(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() and bool((a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item()))


@pytest.fixture
def computations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each time that a weight is computed."""
    found: list[int] = []
    init = Computed.__post_init__

    def counting(self: Computed) -> None:
        init(self)
        forward = self.graph.forward

        def count(*sources: Tensor) -> Tensor:
            found.append(len(found))
            return forward(*sources)

        self.graph.forward = count  # type: ignore[method-assign]

    monkeypatch.setattr(Computed, "__post_init__", counting)
    return found


@pytest.mark.parametrize("how", HOW)
def test_kept_when_met_again(how: str, computations: list[int]) -> None:
    plain, ours, x = pair(how)
    with torch.no_grad():
        for k in range(4):
            assert same(ours(x), plain(x))
            assert len(computations) == min(k + 1, 2), "once as it is met, once to be kept"
        if hasattr(plain.conv, "weight_v"):
            assert same(ours.conv.weight, plain.conv.weight)  # type: ignore[arg-type]
    said = cnnfast.explain(ours, x)
    assert [r.pattern for r in said.rows] == ["conv2d of a computed weight + leaky_relu"], str(said)


@pytest.mark.parametrize("how", ["weight_norm, old", "weight_norm"])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("n", SIZES)
def test_dimensions(n: int, transposed: bool, how: str) -> None:
    plain, ours, x = pair(how, n, transposed)
    with torch.no_grad():
        for _ in range(3):
            assert same(ours(x), plain(x))


def test_the_packed_weight_is_kept_too() -> None:
    """Nothing but sources is read on a call: the computed weight is not hashed, and packed once."""
    plain, ours, x = pair("weight_norm", 2, True)
    gc.collect()  # what other tests have left
    gc.collect()  # what models of other tests left
    before = len(PACKS)
    with torch.no_grad():
        for _ in range(3):
            assert same(ours(x), plain(x))
    assert len(PACKS) == before + 2, "the weight, and its pack"


def sources(net: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in (*net.named_parameters(), *net.named_buffers()) if "bias" not in n}


@pytest.mark.parametrize("how", HOW)
def test_sources_that_nobody_writes_to_are_not_looked_up(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But at the start of the graph, with all weights, once they have held the same for a while."""
    monkeypatch.setattr(content, "_STEADY", 0.0)
    asked, real = [], rewrite_weights.kept
    monkeypatch.setattr(rewrite_weights, "kept", lambda *args: asked.append(args) or real(*args))
    plain, ours, x = pair(how)
    with torch.no_grad():
        for _ in range(8):
            assert same(ours(x), plain(x))
        before = len(asked)
        assert 3 <= before <= 7
        for _ in range(3):
            assert same(ours(x), plain(x))
        assert len(asked) == before
        next(iter(sources(ours).values())).mul_(1.0)
        assert same(ours(x), plain(x)) and len(asked) == before + 1
    assert same(ours(x), plain(x)), "with gradients"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), plain(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("steady", [0.5, 0.0], ids=["read", "watched"])
@pytest.mark.parametrize("how", HOW)
def test_never_stale(how: str, steady: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever source is written to, and by whatever way."""
    monkeypatch.setattr(content, "_STEADY", steady)
    plain, ours, x = pair(how)
    with torch.no_grad():
        for k, (name, a) in enumerate(sources(ours).items()):
            b = sources(plain)[name]
            for _ in range(3 if steady else 8):
                assert same(ours(x), plain(x))
            for t in (a, b):
                if t.dim() == 0:
                    t.fill_(1.5)
                elif k % 2:
                    t.data.flatten()[: max(1, t.numel() // 2)].mul_(1.25)
                else:
                    t.detach().numpy().reshape(-1)[0] += 0.5
            assert same(ours(x), plain(x)) and same(ours(x), plain(x)), name
    state = {k: v * 0.75 for k, v in plain.state_dict().items()}
    for assign in (False, True):
        for net in (plain, ours):
            net.load_state_dict({k: v * (1 + assign) for k, v in state.items()}, assign=assign)
        with torch.no_grad():
            for _ in range(3):
                assert same(ours(x), plain(x))


@pytest.mark.parametrize("how", ["weight_norm", "one's own"])
def test_parametrizations_come_and_go(how: str) -> None:
    plain, ours, x = pair(how)

    def both(what: Callable[[nn.Module], Any]) -> None:
        for net in (plain, ours):
            torch.manual_seed(1)  # for spectral_norm's vectors
            what(net.conv)  # type: ignore[arg-type]
        with torch.no_grad():
            for _ in range(3):
                assert same(ours(x), plain(x))

    both(lambda conv: None)
    both(lambda conv: masked(conv))
    both(lambda conv: parametrize.remove_parametrizations(conv, "weight"))
    both(lambda conv: conv.weight.data.mul_(2))
    both(lambda conv: parametrizations.spectral_norm(conv).eval())


def test_the_old_norm_is_removed() -> None:
    plain, ours, x = pair("weight_norm, old")
    for step in range(2):
        with torch.no_grad():
            for _ in range(3):
                assert same(ours(x), plain(x))
        if not step:
            remove_weight_norm(plain.conv)
            remove_weight_norm(ours.conv)


def test_the_weight_that_the_old_norm_sets_is_its_users() -> None:
    """Who writes to it, writes to nothing that is kept."""
    plain, ours, x = pair("weight_norm, old")
    with torch.no_grad():
        for _ in range(3):
            assert same(ours(x), plain(x)) and type(ours.conv.weight) is Tensor
            assert same(ours.conv.weight, plain.conv.weight)  # type: ignore[arg-type]
            ours.conv.weight.data.mul_(3)  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("how", HOW)
def test_gradients(how: str) -> None:
    plain, ours, x = pair(how)
    with torch.no_grad():
        for _ in range(3):
            ours(x)
    for net in (plain, ours):
        net.zero_grad()
        net(x).square().sum().backward()
    found = dict(ours.named_parameters())
    for name, p in plain.named_parameters():
        assert p.grad is not None and found[name].grad is not None
        assert (found[name].grad - p.grad).abs().max() <= 1e-4 * p.grad.abs().max(), name
    for net in (plain, ours):
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.01 * p.grad / p.grad.abs().max()  # type: ignore[operator, union-attr]
            results = [net(x) for _ in range(2)]
        if net is plain:
            expected = results
    assert all(same(a, b) for a, b in zip(results, expected, strict=True))


def test_of_constants_a_kept_weight_has_the_inputs_gradient() -> None:
    plain, ours, x = pair("weight_norm")
    grads = []
    for net in (plain, ours):
        net.requires_grad_(False)
        for _ in range(3):
            given = x.clone().requires_grad_()
            net(given).square().sum().backward()
        grads.append(given.grad)
    assert (grads[0] - grads[1]).abs().max() <= 1e-5 * grads[0].abs().max()  # type: ignore[operator, union-attr]


def test_training_and_inference_modes_in_turn() -> None:
    """spectral_norm's vectors move in training: its weight is kept in eval mode alone."""
    plain, ours, x = pair("spectral_norm")
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        for net in (plain, ours):
            net.train()
            net(x)
            net.eval()
        with mode():
            for _ in range(3):
                assert same(ours(x), plain(x))
        given = x.clone().requires_grad_()
        ours(given).sum().backward()


def test_under_autocast_it_is_computed() -> None:
    plain, ours, x = pair("weight_norm")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            a, b = ours(x), plain(x)
            assert a.dtype == b.dtype == torch.bfloat16 and (a - b).abs().max() <= 0.02 * b.abs().max()


# --- what is no function of the model's state -------------------------------------------------------------------------


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


class Dropped(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, 0.5)


@pytest.mark.parametrize("kind", [Noisy, Dropped])
def test_random_weights_are_drawn_on_every_call(kind: type[nn.Module]) -> None:
    plain = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
    parametrize.register_parametrization(plain[0], "weight", kind())
    ours = cnnfast.accelerate(copy.deepcopy(plain))
    x = torch.randn(1, 8, 12, 12)
    with torch.no_grad():
        for seed in (0, 1, 2):
            torch.manual_seed(seed)
            a = ours(x)
            torch.manual_seed(seed)
            assert same(a, plain(x))
    assert "computed" not in str(cnnfast.explain(ours, x))


class Odd(nn.Module):
    """Weights of an activation, written to, and of a source that is written to in between."""

    def __init__(self, how: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))
        self.register_buffer("seen", torch.ones(()))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == 0:
            return F.relu(F.conv2d(x, self.weight * x.mean()))
        if self.how == 1:
            w = self.weight * 2
            y = F.conv2d(x, w)
            w.mul_(3)
            return F.relu(F.conv2d(y, w))
        if self.how == 2:
            w = self.weight * self.seen
            self.seen.add_(1)
            return F.relu(F.conv2d(x, w * self.seen))
        w = (self.weight * 0.5).clone()
        return F.relu(F.conv2d(x, w)) + w.mul_(2).mean() + F.conv2d(x, w.sigmoid())


@pytest.mark.parametrize("how", range(4))
def test_odd_weights(how: int) -> None:
    torch.manual_seed(0)
    plain = Odd(how)
    ours = cnnfast.accelerate(copy.deepcopy(plain))
    with torch.no_grad():
        for k in range(4):
            x = torch.randn(1, 8, 12, 12, generator=torch.Generator().manual_seed(k // 2))
            assert same(ours(x), plain(x))
    assert torch.equal(ours.seen, plain.seen)  # type: ignore[arg-type]
