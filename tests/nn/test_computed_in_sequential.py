"""Convolutions of a `cnnfast.Sequential` whose weights are computed from others on each call: fused, kept in inference,
never stale, and computed once a forward as in eager mode."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, spectral_norm, weight_norm

import cnnfast
from cnnfast.cpu.packing import PACKS
from cnnfast.nn import computed
from cnnfast.nn.chain import Chain
from cnnfast.nn.computed import ComputedWeight

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def pruned(conv: nn.Module) -> nn.Module:
    return prune.l1_unstructured(conv, "weight", 0.3)


def pruned_twice(conv: nn.Module) -> nn.Module:
    return prune.ln_structured(pruned(conv), "weight", 0.25, 2, 0)


HOW: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm, old": weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "weight_norm, dim 1": lambda conv: parametrizations.weight_norm(conv, dim=1),
    "weight_norm, one norm": lambda conv: weight_norm(conv, dim=None),
    "spectral_norm, old": spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "two": lambda conv: parametrizations.spectral_norm(parametrizations.orthogonal(conv)),
    "pruned": pruned,
    "pruned twice": pruned_twice,
}
HOOKS = ("weight_norm, old", "spectral_norm, old", "pruned")


def stack(how: str, cls: type[nn.Sequential]) -> nn.Sequential:
    """(N, 8, 10, 10) -> (N, 6, 40, 40): a transposed convolution, and an upsampling's, with computed weights. (Anew
    each time: the old weight_norm cannot be copied after a forward.)"""
    torch.manual_seed(0)
    up = HOW[how](nn.ConvTranspose2d(8, 8, 4, 2, 1))
    plain = HOW[how](nn.Conv2d(8, 6, 3, padding=1))
    norm = nn.BatchNorm2d(8).eval()  # by its own statistics, gradients of a weight's scale would be differences
    return cls(up, norm, nn.ReLU(), nn.Upsample(scale_factor=2), plain, nn.LeakyReLU(0.1))


def pair(how: str) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    x = torch.randn(2, 8, 10, 10, generator=torch.Generator().manual_seed(1))
    return stack(how, nn.Sequential), stack(how, cnnfast.Sequential), x


def same(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() and bool((a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item()))


def same_state(a: nn.Module, b: nn.Module) -> None:
    found = dict(b.state_dict())
    for name, t in a.state_dict().items():
        assert (found[name] - t).abs().max() <= 1e-5 * max(1.0, float(t.abs().max())), name


@pytest.fixture
def computations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which weights were computed: "kept" for the cache, else for one call."""
    found: list[str] = []
    call, made = ComputedWeight.__call__, computed.made

    def counted(self: ComputedWeight) -> Tensor:
        weight = call(self)
        if type(weight) is not nn.Parameter:
            found.append("once")
        return weight

    def counted_made(compute: Callable[[], Tensor]) -> nn.Parameter:
        found.append("kept")
        return made(compute)

    monkeypatch.setattr(ComputedWeight, "__call__", counted)
    monkeypatch.setattr(computed, "made", counted_made)
    return found


@pytest.mark.parametrize("how", HOW)
def test_fused_and_kept_when_met_again(how: str, computations: list[str]) -> None:
    plain, ours, x = pair(how)
    plain.eval(), ours.eval()  # noqa: B018
    with torch.no_grad():
        for _ in range(4):
            assert same(ours(x), plain(x))
            for k in (0, 4):
                assert same(ours[k].weight, plain[k].weight)
    assert computations == ["once"] * 2 + ["kept"] * 2
    said = ours.explain(x).splitlines()
    assert len(said) == 2 and all("of a computed weight" in line and "fused" in line for line in said), said


def test_the_packed_weight_is_kept_too() -> None:
    ours = cnnfast.Sequential(parametrizations.weight_norm(nn.ConvTranspose2d(32, 32, 4, 2, 1)), nn.ReLU()).eval()
    x = torch.randn(1, 32, 24, 24)
    gc.collect()
    gc.collect()  # what models of other tests left
    before = len(PACKS)
    with torch.no_grad():
        for _ in range(3):
            ours(x)
    assert len(PACKS) == before + 2, "the weight, and its pack"


@pytest.mark.parametrize("how", HOW)
def test_never_stale(how: str) -> None:
    """Whichever source is written to, and by whatever way."""
    plain, ours, x = pair(how)
    plain.eval(), ours.eval()  # noqa: B018

    def check() -> None:
        with torch.no_grad():
            for _ in range(3):
                assert same(ours(x), plain(x))

    check()
    others = {n: t for n, t in (*plain.named_parameters(), *plain.named_buffers())}
    for k, (name, a) in enumerate([*ours.named_parameters(), *ours.named_buffers()]):
        if "num_batches" in name:
            continue
        for t in (a, others[name]):
            if k % 3 == 0:
                t.detach().mul_(1.25)
            elif k % 3 == 1:
                t.data.flatten()[: max(1, t.numel() // 2)].mul_(1.25)
            else:
                t.detach().numpy().reshape(-1)[0] += 0.5
        check()
    state = {k: v * 0.75 for k, v in plain.state_dict().items()}
    for assign in (False, True):
        for net in (plain, ours):
            net.load_state_dict({k: v * (1 + assign) for k, v in state.items()}, assign=assign)
        check()
    for net in (plain, ours):
        net.to(torch.float64).to(torch.float32)
    check()
    for net in (plain, ours):
        net.to(memory_format=torch.channels_last)
    check()


def test_what_computes_comes_and_goes() -> None:
    plain, ours, x = pair("weight_norm")
    plain.eval(), ours.eval()  # noqa: B018

    def both(what: Callable[[nn.Sequential], Any]) -> None:
        for net in (plain, ours):
            torch.manual_seed(1)  # for spectral_norm's vectors
            what(net)
        with torch.no_grad():
            for _ in range(3):
                assert same(ours(x), plain(x))

    both(lambda net: parametrizations.spectral_norm(net[0]).eval())
    both(lambda net: parametrize.remove_parametrizations(net[0], "weight"))
    both(lambda net: net[0].weight.data.mul_(2))
    both(lambda net: weight_norm(net[0]))
    both(lambda net: remove_weight_norm(net[0]))
    both(lambda net: pruned(net[0]))
    both(lambda net: prune.remove(net[0], "weight"))
    both(lambda net: net.__setitem__(0, weight_norm(nn.ConvTranspose2d(8, 8, 4, 2, 1))))
    both(lambda net: net[4].register_forward_hook(lambda m, args, y: y * 2))
    assert "it has hooks" in ours.explain() or "may compute anything" in ours.explain()


@pytest.mark.parametrize("how", HOOKS)
def test_the_weight_that_a_hook_sets_is_its_users(how: str) -> None:
    """Who writes to it, writes to nothing that is kept, and it is set again."""
    plain, ours, x = pair(how)
    plain.eval(), ours.eval()  # noqa: B018
    with torch.no_grad():
        for k in range(5):
            assert same(ours(x), plain(x))
            assert type(ours[0].weight) is Tensor and same(ours[0].weight, plain[0].weight)
            if k % 2:
                ours[0].weight.mul_(3)
            else:
                ours[0].weight = torch.zeros(1)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("how", HOW)
def test_gradients(how: str, train: bool) -> None:
    """Of what a weight is computed from; and buffers move once a forward, as in eager mode."""
    plain, ours, x = pair(how)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for net, given in zip((plain, ours), inputs, strict=True):
        net.train(train)
        net[1].eval()
        for _ in range(2):
            net(given).square().sum().backward()
    same_state(plain, ours)
    found = dict(ours.named_parameters())
    for name, p in plain.named_parameters():
        assert (found[name].grad - p.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-6, name  # type: ignore[operator, union-attr]
    assert (inputs[0].grad - inputs[1].grad).abs().max() <= 1e-4 * inputs[0].grad.abs().max()  # type: ignore[operator, union-attr]
    with torch.no_grad():
        for net in (plain, ours):
            for p in net.parameters():
                p -= 1e-3 * p.grad / p.grad.abs().max()  # type: ignore[operator, union-attr]
            net.eval()
        for _ in range(3):
            assert same(ours(x), plain(x))


@pytest.mark.parametrize("how", ["spectral_norm", "spectral_norm, old", "two"])
def test_power_iterations_once_a_forward(how: str) -> None:
    """Without gradients too, and of a convolution that stands in two places twice."""
    plain, ours, x = pair(how)
    for net in (plain, ours):
        net[5] = nn.Sequential(nn.Conv2d(6, 8, 1), net[0])
        torch.manual_seed(2)
        nn.init.normal_(net[5][0].weight)
        nn.init.zeros_(net[5][0].bias)
        with torch.no_grad():
            for _ in range(3):
                net(x)
    same_state(plain, ours)
    with torch.no_grad():
        assert same(ours(x), plain(x))


@pytest.mark.parametrize("how", ["weight_norm", "weight_norm, old", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_autocast(how: str, grad: bool) -> None:
    plain, ours, x = pair(how)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        for net in (plain, ours):
            net.train(grad)
        for _ in range(3):
            a, b = ours(x), plain(x)
            assert a.dtype == b.dtype and (a - b).abs().max() <= 0.03 * b.abs().max()
    same = [dict(net.state_dict()) for net in (plain, ours)]
    assert all((same[1][n].float() - t.float()).abs().max() <= 0.03 * max(1, t.abs().max()) for n, t in same[0].items())


def test_modes_in_turn() -> None:
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


@pytest.mark.parametrize("how", HOOKS)
def test_inference_mode_sets_a_weight(how: str) -> None:
    plain, ours, x = pair(how)
    plain.eval(), ours.eval()  # noqa: B018
    with torch.inference_mode():
        for _ in range(3):
            assert same(ours(x), plain(x))
    with torch.no_grad():
        assert same(ours(x), plain(x)) and same(ours[0].weight, plain[0].weight)


def test_within_parametrizes_own_cache() -> None:
    """PyTorch's own stays as stale there as it is."""
    plain, ours, x = pair("weight_norm")
    plain.eval(), ours.eval()  # noqa: B018
    with torch.no_grad():
        for _ in range(3):
            assert same(ours(x), plain(x))
        with parametrize.cached():
            for net in (plain, ours):
                net(x)
                net[0].parametrizations.weight.original0.mul_(2)
            assert same(ours(x), plain(x))
        assert same(ours(x), plain(x))


@pytest.mark.parametrize("how", ["weight_norm", "weight_norm, old"])
@pytest.mark.parametrize(
    "kinds",
    [(nn.Conv1d, nn.ConvTranspose1d), (nn.Conv3d, nn.ConvTranspose3d)],
    ids=["one-dimension", "three-dimensions"],
)
def test_dimensions(kinds: tuple[Callable[..., nn.Module], ...], how: str) -> None:
    nets = []
    for cls in (nn.Sequential, cnnfast.Sequential):
        torch.manual_seed(0)
        nets.append(cls(HOW[how](kinds[1](8, 8, 4, 2, 1)), nn.LeakyReLU(0.1), HOW[how](kinds[0](8, 8, 3)), nn.Tanh()))
    x = torch.randn(2, 8, *(12,) * (1 if kinds[0] is nn.Conv1d else 3))
    with torch.no_grad():
        for _ in range(3):
            assert same(nets[1](x), nets[0](x))
    for net in nets:
        net(x).square().sum().backward()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert (q.grad - p.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-6  # type: ignore[operator, union-attr]


def test_frozen() -> None:
    """`cnnfast.freeze` holds for what a weight is computed from."""
    plain, ours, x = pair("weight_norm")
    plain.eval(), ours.eval()  # noqa: B018
    with torch.no_grad(), cnnfast.freeze(ours):
        for _ in range(2):
            assert same(ours(x), plain(x))
        for net in (plain, ours):
            net[0].parametrizations.weight.original1.mul_(torch.arange(16.0).view(4, 4))
            net[4].parametrizations.weight.original0.mul_(2)
        for _ in range(2):
            assert same(ours(x), plain(x))


# --- what stays as it stands ------------------------------------------------------------------------------------------


class Masked(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


class LaterNorm(type(weight_norm(nn.Conv2d(1, 1, 1))._forward_pre_hooks.popitem()[1])):  # type: ignore[misc]
    """A hook of another class."""


def _own(conv: nn.Module) -> None:
    parametrize.register_parametrization(conv, "weight", Masked())


def _bias(conv: nn.Module) -> None:
    parametrizations.weight_norm(conv)
    parametrize.register_parametrization(conv, "bias", Masked())


def _hooked(conv: nn.Module) -> None:
    weight_norm(conv)
    conv.register_forward_pre_hook(lambda m, args: None)


def _of_the_bias(conv: nn.Module) -> None:
    prune.l1_unstructured(conv, "bias", 0.5)


def _changed_hook(conv: nn.Module) -> None:
    weight_norm(conv)
    next(iter(conv._forward_pre_hooks.values())).__class__ = LaterNorm


def _hooked_inside(conv: nn.Module) -> None:
    parametrizations.weight_norm(conv)
    conv.parametrizations.weight[0].register_forward_hook(lambda m, args, y: y * 2)  # type: ignore[union-attr, index]


def _no_leaf(conv: nn.Module) -> None:
    parametrizations.weight_norm(conv)
    plist = conv.parametrizations.weight  # type: ignore[union-attr]
    g = plist.original0
    del plist.original0
    plist.register_buffer("original0", g * 2)


UNFUSED: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "one's own": (_own, "Masked computes its weight"),
    "the bias too": (_bias, "another way than by its weight"),
    "another hook": (_hooked, "it has hooks"),
    "a hook of the bias": (_of_the_bias, "it has hooks"),
    "a hook of another class": (_changed_hook, "it has hooks"),
    "a hook inside": (_hooked_inside, "_WeightNorm computes its weight"),
    "computed itself": (_no_leaf, "something else than Parameters"),
}


@pytest.mark.parametrize("name", UNFUSED)
def test_as_it_stands(name: str) -> None:
    change, reason = UNFUSED[name]
    nets = []
    for cls in (nn.Sequential, cnnfast.Sequential):
        torch.manual_seed(0)
        net = cls(nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU())
        change(net[0])
        nets.append(net.eval())
    assert reason in nets[1].explain(), nets[1].explain()
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(nets[1](x), nets[0](x))


def test_under_functional_call_weights_are_those_given() -> None:
    plain, ours, x = pair("weight_norm")
    given = {n: (p * 2).detach() for n, p in plain.named_parameters()}
    for g in (given, {n: p.clone().requires_grad_() * 1 for n, p in given.items()}):
        for _ in range(3):
            assert same(torch.func.functional_call(ours, g, (x,)), torch.func.functional_call(plain, g, (x,)))


def test_compiled_it_stands() -> None:
    """A compiler traces what computes the weight itself."""
    plain, ours, x = pair("weight_norm")
    compiled = torch.compile(ours.eval(), backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert same(compiled(x), plain.eval()(x))
            ours[0].parametrizations.weight.original0.mul_(2)
            plain[0].parametrizations.weight.original0.mul_(2)
    torch.compiler.reset()


def test_copies() -> None:
    _, ours, x = pair("weight_norm")
    with torch.no_grad():
        for _ in range(3):
            y = ours.eval()(x)
        copied = copy.deepcopy(ours)
        assert torch.equal(copied(x), y) or same(copied(x), y)
        copied[0].parametrizations.weight.original0.zero_()
        assert same(ours(x), y) and not same(copied(x), y)
    for net in (ours, copied):
        assert net.explain().count("of a computed weight") == 2, net.explain()


@pytest.mark.parametrize("how", ["weight_norm", "weight_norm, old"])
def test_errors_are_pytorchs(how: str) -> None:
    plain, ours, x = pair(how)
    with pytest.raises(RuntimeError) as want:
        plain(x[:, :5])
    with pytest.raises(RuntimeError) as got:
        ours(x[:, :5])
    assert str(got.value) == str(want.value)


def test_what_runs() -> None:
    """The steps are one chain of fused ones."""
    _, ours, x = pair("weight_norm, old")
    ours.eval()
    with torch.no_grad():
        ours(x)
    (item,) = ours.__dict__["_plan"].items
    assert isinstance(item, Chain) and [len(s.slots) for s in item.steps] == [3, 3]
