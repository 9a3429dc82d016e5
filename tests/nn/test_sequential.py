"""cnnfast.Sequential against nn.Sequential, whatever is put in it."""

from __future__ import annotations

import copy
import io
import math
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import cnnfast
from cnnfast.cpu import backend, inference, isa, methods, onednn
from cnnfast.dispatch import Planned
from cnnfast.nn import chain
from cnnfast.step import Operands

from ..conftest import conv_precision
from ..tolerance import assert_close

CL = torch.channels_last


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the activations of the fused steps that ran, in order."""
    ran: list[str] = []
    real = chain.run_step

    def spy(step, operands, **kwargs):  # type: ignore[no-untyped-def]
        ran.append(step.activation.name)
        return real(step, operands, **kwargs)

    monkeypatch.setattr(chain, "run_step", spy)
    ready = backend._ready

    def spied(s: Planned, *how: Any) -> Any:
        """The shorter way of a chain on a CPU."""
        call = ready(s, *how)

        def counted(o: Operands) -> Tensor | None:
            y = call(o)
            if y is not None:
                ran.append(s.step.activation.name)
            return y

        return None if call is None else counted

    monkeypatch.setattr(backend, "_ready", spied)
    return ran


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` with weights of about unit gain and BatchNorm statistics that matter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)):
                fan = m.in_channels // m.groups * math.prod(m.kernel_size)
                fan = max(1.0, fan / math.prod(m.stride)) if m.transposed else fan
                m.weight.copy_(torch.randn(m.weight.shape, generator=g) / fan**0.5)
                if m.bias is not None:
                    m.bias.copy_(torch.randn(m.bias.shape, generator=g) * 0.3)
            elif isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                if m.running_mean is not None and m.running_var is not None:
                    m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=g) * 0.3)
                    m.running_var.copy_(torch.rand(m.running_var.shape, generator=g) + 0.5)
                if m.affine:
                    m.weight.copy_(torch.rand(m.weight.shape, generator=g) + 0.5)
                    m.bias.copy_(torch.randn(m.bias.shape, generator=g) * 0.3)
    return module


def real_strides(t: Tensor) -> list[int]:
    """Strides of the dimensions that have more than one element: the others mean nothing."""
    return [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]


def check(seq: nn.Sequential, x: Tensor, inputs: int = 1) -> None:
    """seq(x) is what nn.Sequential of the same modules gives: values by the tolerance rule, dtype, strides.

    With ``inputs`` > 1, also for more inputs like x (a CPU packs a weight that it meets again); the rule is applied to
    all results together: of one or two numbers that were rounded several times, those of the yardstick may be right by
    luck.
    """
    plain = nn.Sequential(OrderedDict(seq._modules))
    exact = copy.deepcopy(plain).double()
    g = torch.Generator().manual_seed(0)
    more = [torch.empty_like(x).copy_(torch.randn(x.shape, generator=g)) for _ in range(inputs - 1)]
    results = []
    with torch.no_grad():
        for xi in (x, *more):
            want, got = plain(xi.clone()), seq(xi.clone())
            assert real_strides(got) == real_strides(want), f"{seq}: strides {got.stride()}, expected {want.stride()}"
            results.append((got, exact(xi.double()), want))
    got, exact64, want = (torch.cat(parts) for parts in zip(*results, strict=True))
    assert_close(got, exact64, want, repr(seq))


def block(**changes: object) -> cnnfast.Sequential:
    """Two fused steps in eval mode."""
    seq = cnnfast.Sequential(
        nn.ConvTranspose2d(16, 32, 4, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, 2, 1),
        nn.Tanh(),
    )
    return randomized(seq).eval()  # type: ignore[return-value]


def x2d(seed: int = 1, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 16, 5, 6), generator=torch.Generator().manual_seed(seed))


# --- random stacks ----------------------------------------------------------------------------------------------------

ACTIVATIONS: list[Callable[[int], nn.Module]] = [
    lambda c: nn.ReLU(),
    lambda c: nn.ReLU(inplace=True),
    lambda c: nn.ReLU6(),
    lambda c: nn.LeakyReLU(0.2),
    lambda c: nn.LeakyReLU(-0.5),
    lambda c: nn.ELU(0.7),
    lambda c: nn.SiLU(inplace=True),
    lambda c: nn.Mish(),
    lambda c: nn.GELU(),
    lambda c: nn.GELU("tanh"),
    lambda c: nn.Tanh(),
    lambda c: nn.Sigmoid(),
    lambda c: nn.Hardtanh(-0.5, 0.8),
    lambda c: nn.PReLU(),
    lambda c: nn.PReLU(c),
    lambda c: nn.Softplus(),
]
CHANNELS = st.sampled_from([1, 2, 4, 8, 16])


@st.composite
def stacks(draw: st.DrawFn, ndim: int) -> tuple[nn.Sequential, Tensor]:
    """A random stack, and an input for it."""
    n = draw(st.sampled_from([1, 2, 5]))
    first = channels = draw(CHANNELS)
    first_size = size = draw(st.integers(1, 6))
    ct, conv, bn, dropout, *pads = {
        1: (nn.ConvTranspose1d, nn.Conv1d, nn.BatchNorm1d, nn.Dropout1d, nn.ReflectionPad1d, nn.ReplicationPad1d),
        2: (nn.ConvTranspose2d, nn.Conv2d, nn.BatchNorm2d, nn.Dropout2d, nn.ReflectionPad2d, nn.ZeroPad2d),
    }[ndim]
    modules: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["transposed", "conv", "upsample"][: 3 if ndim == 2 else 2]))
        out = draw(CHANNELS)
        groups = draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == 0 and out % g == 0]))
        bias = draw(st.booleans())
        if kind == "transposed":
            stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
            kernel = draw(st.integers(1, 5))
            output_padding = draw(st.integers(0, max(stride, dilation) - 1))
            reach = (size - 1) * stride + dilation * (kernel - 1) + 1 + output_padding
            padding = draw(st.integers(0, min(3, (reach - 1) // 2)))
            modules.append(ct(channels, out, kernel, stride, padding, output_padding, groups, bias, dilation))
            size = reach - 2 * padding
        else:
            if kind == "upsample":
                r = draw(st.sampled_from([2, 3]))
                modules.append(nn.Upsample(scale_factor=r, mode=draw(st.sampled_from(["nearest", "nearest-exact"]))))
                size *= r
                if draw(st.booleans()):
                    modules.append(nn.Identity())
            if draw(st.integers(0, 3)) == 0:
                p = draw(st.integers(0, min(2, size - 1)))
                q = draw(st.sampled_from([p, p, p + 1])) if size > p + 1 else p
                modules.append(draw(st.sampled_from(pads))((p, q) * ndim))
                size += p + q
            dilation = draw(st.sampled_from([1, 1, 2]))
            kernel = draw(st.sampled_from([k for k in (1, 2, 3, 4, 5) if dilation * (k - 1) < size]))
            mode = draw(st.sampled_from(["zeros", "zeros", "replicate", "reflect", "circular"]))
            padding = draw(st.sampled_from(["same", "valid", 0, min(1, size - 1), min(2, size - 1)]))
            stride = 1 if padding == "same" else draw(st.sampled_from([1, 1, 2, 3]))
            modules.append(
                conv(channels, out, kernel, stride, padding, dilation, groups=groups, bias=bias, padding_mode=mode)
            )
            reach = dilation * (kernel - 1)
            total = {"same": reach, "valid": 0}[padding] if isinstance(padding, str) else 2 * padding
            size = (size + total - reach - 1) // stride + 1
        channels = out
        if draw(st.booleans()):
            modules.append(draw(st.sampled_from([nn.Dropout(), dropout(), nn.Identity()])))
        if draw(st.booleans()):
            modules.append(bn(channels, affine=draw(st.booleans())))
        if draw(st.integers(0, 3)):
            modules.append(draw(st.sampled_from(ACTIVATIONS))(channels))
        if len(modules) > 2 and draw(st.integers(0, 3)) == 0:
            modules = [nn.Sequential(*modules)]
    if draw(st.integers(0, 5)) == 0:
        modules.append(nn.Flatten())
    seq = randomized(nn.Sequential(*modules), draw(st.integers(0, 999)))
    x = torch.randn(
        (n, first, *(first_size,) * ndim), generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))
    )
    if ndim == 2:
        if draw(st.booleans()):
            seq = seq.to(memory_format=CL)
        if draw(st.booleans()):
            x = x.to(memory_format=CL)
    elif draw(st.booleans()):
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]))
    note(f"{seq} in {dtype} on {tuple(x.shape)} with strides {x.stride()}")
    return seq.to(dtype), x.to(dtype)


def stack_profile(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, print_blob=True)


@pytest.fixture
def everything_packed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No step is too small for the packed operators."""
    inference._way.cache_clear()
    monkeypatch.setattr(inference, "_why_slower", lambda *args: None)
    monkeypatch.setattr(inference, "why_slower_plain", lambda *args, **kwargs: None)
    yield
    inference._way.cache_clear()


@pytest.mark.parametrize("everything", [False, True], ids=["", "packed"])
@pytest.mark.parametrize(("ndim", "examples"), [(2, 150), (1, 60)])
@pytest.mark.usefixtures("one_thread")
def test_random_stacks_in_eval_mode(
    ndim: int, examples: int, everything: bool, steps: list[str], request: pytest.FixtureRequest
) -> None:
    if everything:
        request.getfixturevalue("everything_packed")

    @stack_profile(examples)
    @given(stacks(ndim))
    def run(stack: tuple[nn.Sequential, Tensor]) -> None:
        plain, x = stack
        check(cnnfast.Sequential(*plain.eval()), x, inputs=24)

    run()
    assert len(steps) >= 24 * examples / 3


# --- what changes between two calls -----------------------------------------------------------------------------------


def _optimizer(seq: cnnfast.Sequential) -> None:
    for p in seq.parameters():
        p.grad = torch.full_like(p, 0.5)
    torch.optim.Adam(seq.parameters(), lr=0.1).step()


def _load_state_dict(seq: cnnfast.Sequential) -> None:
    seq.load_state_dict(randomized(copy.deepcopy(seq), 5).state_dict())


def _ema(seq: cnnfast.Sequential) -> None:
    for p, new in zip(seq.parameters(), randomized(copy.deepcopy(seq), 6).parameters(), strict=True):
        p.data.lerp_(new.data, 0.5)


def _data_of_stats(seq: cnnfast.Sequential) -> None:
    seq[1].running_mean.data.add_(1)
    seq[1].running_var.data[3] = 9.0


def _new_data(seq: cnnfast.Sequential) -> None:
    seq[0].weight.data = torch.randn_like(seq[0].weight)


def _new_parameter(seq: cnnfast.Sequential) -> None:
    seq[0].weight = nn.Parameter(torch.randn_like(seq[0].weight))


def _narrower_parameters(seq: cnnfast.Sequential) -> None:  # structural pruning leaves in_channels as it was
    seq[0].weight = nn.Parameter(seq[0].weight[:, :8].clone())
    seq[1] = randomized(nn.BatchNorm2d(8), 4).eval()
    seq[3].weight = nn.Parameter(seq[3].weight[:8].clone())


def _new_buffer(seq: cnnfast.Sequential) -> None:
    seq[1].running_mean = torch.randn(32)


def _training_step(seq: cnnfast.Sequential) -> None:
    seq.train()
    seq(x2d(8) * 3 + 1)
    seq.eval()


def _other_module(seq: cnnfast.Sequential) -> None:
    seq[0] = randomized(nn.ConvTranspose2d(16, 32, 4, 2, 1, bias=False), 7).eval()


def _other_geometry(seq: cnnfast.Sequential) -> None:
    seq[0] = randomized(nn.ConvTranspose2d(16, 32, 3, 3, 1, 2), 7).eval()


def _forward_hook(seq: cnnfast.Sequential) -> None:
    seq[1].register_forward_hook(lambda module, args, y: y * 2)


def _pre_hook(seq: cnnfast.Sequential) -> None:
    seq[2].register_forward_pre_hook(lambda module, args: (args[0] - 1,))


def _no_running_stats(seq: cnnfast.Sequential) -> None:
    seq[1].running_mean = seq[1].running_var = None


def _no_affine(seq: cnnfast.Sequential) -> None:
    seq[1].weight = seq[1].bias = None


def _spectral_norm_by_hook(seq: cnnfast.Sequential) -> None:
    seq[3] = nn.utils.spectral_norm(seq[3]).eval()


def _weight_norm_by_hook(seq: cnnfast.Sequential) -> None:
    with pytest.warns(FutureWarning):
        seq[3] = nn.utils.weight_norm(seq[3])


def _weight_norm(seq: cnnfast.Sequential) -> None:
    parametrizations.weight_norm(seq[0])
    seq[0].parametrizations.weight.original0.data.mul_(3)


def _spectral_norm(seq: cnnfast.Sequential) -> None:
    parametrizations.spectral_norm(seq[0]).eval()


def _prune(seq: cnnfast.Sequential) -> None:
    prune.l1_unstructured(seq[0], "weight", 0.5)


def _set(slot: int, **attributes: object) -> Callable[[cnnfast.Sequential], None]:
    def change(seq: cnnfast.Sequential) -> None:
        for name, value in attributes.items():
            setattr(seq[slot], name, value)

    return change


# name -> (change, the activations of the fused steps afterwards)
CHANGES: dict[str, tuple[Callable[[cnnfast.Sequential], object], list[str]]] = {
    "nothing": (lambda s: None, ["relu", "tanh"]),
    "optimizer": (_optimizer, ["relu", "tanh"]),
    "load_state_dict": (_load_state_dict, ["relu", "tanh"]),
    "load_state_dict-assign": (
        lambda s: s.load_state_dict(randomized(copy.deepcopy(s), 5).state_dict(), assign=True),
        ["relu", "tanh"],
    ),
    "ema-through-data": (_ema, ["relu", "tanh"]),
    "stats-through-data": (_data_of_stats, ["relu", "tanh"]),
    "new-data": (_new_data, ["relu", "tanh"]),
    "new-parameter": (_new_parameter, ["relu", "tanh"]),
    "narrower-parameters": (_narrower_parameters, ["relu", "tanh"]),
    "new-buffer": (_new_buffer, ["relu", "tanh"]),
    "training-step": (_training_step, ["relu", "tanh"]),
    "other-module": (_other_module, ["relu", "tanh"]),
    "other-geometry": (_other_geometry, ["relu", "tanh"]),
    "other-activation": (lambda s: s._modules.update({"2": nn.SiLU()}), ["silu", "tanh"]),
    "channels-last": (lambda s: s.to(memory_format=CL), ["relu", "tanh"]),
    "frozen": (lambda s: s.requires_grad_(False), ["relu", "tanh"]),
    "append": (lambda s: s.append(randomized(nn.ConvTranspose2d(16, 4, 2)).eval()), ["relu", "tanh", "identity"]),
    "insert": (lambda s: s.insert(1, nn.Identity()), ["relu", "tanh"]),
    "delete": (lambda s: s.__delitem__(1), ["relu", "tanh"]),
    "stride": (_set(0, stride=(1, 1)), ["relu", "tanh"]),
    "padding": (_set(3, padding=(0, 2)), ["relu", "tanh"]),
    "eps": (_set(1, eps=0.7), ["relu", "tanh"]),
    "no-affine": (_no_affine, ["relu", "tanh"]),
    "norm-in-training-mode": (lambda s: s[1].train(), ["relu", "tanh"]),
    "convolution-in-training-mode": (lambda s: s[0].train(), ["relu", "tanh"]),
    "no-running-stats": (_no_running_stats, ["relu", "tanh"]),
    "other-norm": (lambda s: s.__setitem__(1, nn.GroupNorm(4, 32)), ["relu", "tanh"]),
    "forward-hook": (_forward_hook, ["identity", "tanh"]),
    "forward-pre-hook": (_pre_hook, ["identity", "tanh"]),
    "backward-hook": (lambda s: s[0].register_full_backward_hook(lambda m, a, b: None), ["tanh"]),
    "forward-of-instance": (_set(2, forward=torch.sigmoid), ["identity", "tanh"]),
    "spectral-norm-by-hook": (_spectral_norm_by_hook, ["relu", "tanh"]),
    "weight-norm-by-hook": (_weight_norm_by_hook, ["relu", "tanh"]),
    "weight-norm": (_weight_norm, ["relu", "tanh"]),
    "spectral-norm": (_spectral_norm, ["relu", "tanh"]),
    "pruning": (_prune, ["relu", "tanh"]),
    "dropout-added": (lambda s: s.insert(2, nn.Dropout().eval()), ["relu", "tanh"]),
    "nested": (lambda s: s.__setitem__(0, nn.Sequential(s[0], nn.Identity())), ["relu", "tanh"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_after_the_first_call_are_seen(name: str, steps: list[str]) -> None:
    change, expected = CHANGES[name]
    seq, x = block(), x2d()
    check(seq, x, inputs=3)
    assert steps == ["relu", "tanh"] * 3
    with torch.no_grad():
        change(seq)
    steps.clear()
    check(seq, x, inputs=3)
    assert steps == expected * 3


def test_a_change_of_dtype_is_seen(steps: list[str]) -> None:
    seq, x = block(), x2d()
    check(seq, x)
    check(seq.to(torch.bfloat16), x.to(torch.bfloat16))
    assert steps == ["relu", "tanh"] * 2
    check(seq.to(torch.float64), x.double())
    assert steps == ["relu", "tanh"] * 2
    check(seq.float(), x)
    assert steps == ["relu", "tanh"] * 3


def test_float16(steps: list[str]) -> None:
    check(block().half(), x2d().half())
    assert steps == ["relu", "tanh"]


def test_batchnorm_in_float32_after_a_bfloat16_convolution(steps: list[str]) -> None:
    seq = block().to(torch.bfloat16)
    seq[1].float()
    check(seq, x2d().to(torch.bfloat16))
    assert steps == ["relu", "tanh"]


@pytest.mark.usefixtures("everything_packed")
def test_a_write_to_one_element_is_seen() -> None:
    seq, x = block(), x2d()
    check(seq, x, inputs=3)
    for i in range(5):
        seq[0].weight.data[i % 16, i % 32, i % 4, i % 3] += 10
        check(seq, x)


@pytest.mark.usefixtures("everything_packed")
def test_frozen_weights() -> None:
    seq, x = block(), x2d()
    with cnnfast.freeze(seq), torch.no_grad():
        check(seq, x)
        before = seq(x)
        seq[0].weight.data.zero_()
        assert torch.equal(seq(x), before)
    check(seq, x)


def test_a_replaced_module_is_not_kept_alive() -> None:
    seq, x = block(), x2d()
    check(seq, x)
    ref, weight = weakref.ref(seq[0]), weakref.ref(seq[0].weight)
    _other_module(seq)
    assert ref() is None and weight() is None


class Rewires(nn.Module):
    """A module whose forward changes a module behind it."""

    def __init__(self, change: Callable[[], None]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.change()
        return x


@pytest.mark.parametrize("attribute", ["weight", "stride"])
def test_a_module_that_changes_the_ones_behind_it(attribute: str, steps: list[str]) -> None:
    seq, x = block(), x2d()
    new = {"weight": nn.Parameter(torch.randn_like(seq[0].weight)), "stride": (1, 1)}[attribute]
    old = getattr(seq[0], attribute)
    seq.insert(0, Rewires(lambda: setattr(seq[1], attribute, new)))
    with torch.no_grad():
        expected = nn.Sequential(*seq)(x)
        setattr(seq[1], attribute, old)
        torch.testing.assert_close(seq(x), expected)
    assert steps == (["relu", "tanh"] if attribute == "weight" else [])


# --- memory format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_cl", [False, True], ids=["weights-nchw", "weights-cl"])
@pytest.mark.parametrize("input_cl", [False, True], ids=["input-nchw", "input-cl"])
@pytest.mark.parametrize(
    "modules",
    [
        [nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU()],
        [nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.BatchNorm2d(1), nn.ConvTranspose2d(1, 8, 3), nn.Tanh()],
        [nn.ConvTranspose2d(16, 1, 4, 2, 1), nn.Hardtanh(), nn.ConvTranspose2d(1, 8, 3), nn.Tanh()],
        [nn.ConvTranspose2d(16, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3), nn.Tanh()],
        [nn.ConvTranspose2d(16, 8, 1), nn.ReLU(True), nn.ConvTranspose2d(8, 8, 3)],
        [nn.ConvTranspose2d(16, 1, 1), nn.ConvTranspose2d(1, 8, 3)],
        [nn.Upsample(scale_factor=2), nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)],
        [nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.Dropout(), nn.ReLU(), nn.Flatten(2)],
    ],
    ids=lambda modules: "-".join(type(m).__name__ for m in modules),
)
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 4)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_memory_format(
    modules: list[nn.Module], input_cl: bool, weights_cl: bool, size: tuple[int, int], steps: list[str]
) -> None:
    seq = randomized(cnnfast.Sequential(*copy.deepcopy(modules))).eval()
    # Only the first weight, so that the rest depends on what the tensor in between suggests.
    if weights_cl:
        seq[0].to(memory_format=CL)
    x = torch.empty(2, 16, *size, memory_format=CL if input_cl else torch.contiguous_format).normal_()
    check(seq, x)
    assert steps


def test_odd_strides_of_the_input() -> None:
    seq = block()
    check(seq, x2d(1, 2, 16, 9, 9)[:, :, ::2, 1::2])
    check(seq, x2d(1, 2, 16, 1, 1).expand(2, 16, 4, 4))
    check(seq, x2d(1, 4, 5, 6, 16).permute(0, 3, 1, 2)[::2])
    check(seq, x2d(1, 2, 16, 4, 6).transpose(2, 3))


# --- gradients, modes, and what watches -------------------------------------------------------------------------------


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b) and a.stride() == b.stride()


def test_inference_mode(steps: list[str]) -> None:
    seq, x = block(), x2d()
    with torch.inference_mode():
        y = seq(x)
        assert y.is_inference() and steps == ["relu", "tanh"]
        made_here = copy.deepcopy(seq)
        inside = made_here(x)
    with torch.no_grad():
        want, exact = nn.Sequential(*seq)(x), copy.deepcopy(nn.Sequential(*seq)).double()(x.double())
    assert_close(y, exact, want)
    assert_close(inside, exact, want)


def test_parameters_made_in_inference_mode(steps: list[str]) -> None:
    with torch.inference_mode():
        seq, x = block(), x2d()
        for _ in range(2):
            got = seq(x)
            want = nn.Sequential(*seq)(x)
            exact = copy.deepcopy(nn.Sequential(*seq)).double()(x.double())
            assert_close(got, exact, want)
            seq[0].weight.mul_(1.5)
    assert steps == ["relu", "tanh"] * 2


def _watched_by_jit_trace(model: nn.Module, x: Tensor) -> Tensor:
    return torch.jit.trace(model, x, check_trace=False)(x)


def _watched_by_jit_script(model: nn.Module, x: Tensor) -> Tensor:
    return torch.jit.script(model)(x)


def _watched_by_fx(model: nn.Module, x: Tensor) -> Tensor:
    graph = torch.fx.symbolic_trace(model)
    assert [n.op for n in graph.graph.nodes].count("call_module") == 5
    return graph(x)


def _watched_by_make_fx(model: nn.Module, x: Tensor) -> Tensor:
    graph = torch.fx.experimental.proxy_tensor.make_fx(model)(x)
    assert any("conv" in str(n.target) for n in graph.graph.nodes)
    return graph(x)


def _watched_by_export(model: nn.Module, x: Tensor) -> Tensor:
    return torch.export.export(model, (x,)).module()(x)


def _watched_by_vmap(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(model)(torch.stack([x, x]))[1]


def _watched_by_function_mode(model: nn.Module, x: Tensor) -> Tensor:
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Mode():
        y = model(x)
    assert "conv_transpose2d" in seen and "batch_norm" in seen
    return y


def _watched_by_dispatch_mode(model: nn.Module, x: Tensor) -> Tensor:
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        y = model(x)
    assert counter.get_total_flops() > 0
    return y


def _watched_by_global_hook(model: nn.Module, x: Tensor) -> Tensor:
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m).__name__))
    try:
        y = model(x)
    finally:
        handle.remove()
    assert seen[:5] == ["ConvTranspose2d", "BatchNorm2d", "ReLU", "ConvTranspose2d", "Tanh"]
    return y


def _watched_by_forward_ad(model: nn.Module, x: Tensor) -> Tensor:
    import torch.autograd.forward_ad as fwad

    with fwad.dual_level():
        y, tangent = fwad.unpack_dual(model(fwad.make_dual(x, torch.ones_like(x))))
    assert tangent is not None
    return y


def _subclass(model: nn.Module, x: Tensor) -> Tensor:
    class Sub(Tensor):
        pass

    y = model(x.as_subclass(Sub))
    assert type(y) is Sub
    return y.as_subclass(Tensor)


WATCHERS = [f for name, f in list(globals().items()) if name.startswith("_watched_by_")] + [_subclass]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("watcher", WATCHERS, ids=lambda f: f.__name__.removeprefix("_watched_by_"))
def test_unfused_where_something_watches(watcher: Callable[[nn.Module, Tensor], Tensor], steps: list[str]) -> None:
    seq, x = block(), x2d()
    with torch.no_grad():
        seq(x)  # a plan exists already
        steps.clear()
        got = watcher(seq, x)
        assert steps == []
        want = watcher(nn.Sequential(*seq), x)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5) and got.dtype == want.dtype


def test_a_default_device_does_not_stop_fusion(steps: list[str]) -> None:
    with torch.device("cpu"):
        check(block(), x2d())
    assert steps == ["relu", "tanh"]


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        y = block()(torch.randn(2, 16, 5, 6))
    assert y.shape == (2, 16, 20, 24)


def test_the_meta_device() -> None:
    with torch.no_grad():
        assert block().to("meta")(x2d().to("meta")).shape == (2, 16, 20, 24)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 8, 5, 6),
        torch.randn(2, 16),
        torch.randn(1, 2, 16, 5, 6),
        torch.randn(2, 16, 5, 6).double(),
        torch.ones(2, 16, 5, 6, dtype=torch.int64),
        torch.randn(2, 16, 5, 6, device="meta"),
        None,
        [1.0],
    ],
    ids=["channels", "2d", "5d", "float64", "int64", "device", "none", "list"],
)
def test_errors_are_torchs_own(x: object) -> None:
    seq = block()
    with torch.no_grad():
        seq(x2d())
        with pytest.raises(Exception) as want:
            nn.Sequential(*seq)(x)
        with pytest.raises(type(want.value)) as got:
            seq(x)
    assert str(got.value) == str(want.value)


@pytest.mark.parametrize(
    "modules",
    [
        [nn.ConvTranspose2d(16, 8, 3, padding=4), nn.ReLU()],
        [nn.ConvTranspose2d(16, 8, 3), nn.ConvTranspose2d(4, 8, 3)],
        [nn.ConvTranspose2d(16, 8, 3), nn.BatchNorm2d(4)],
        [nn.ConvTranspose2d(16, 8, 3), nn.BatchNorm1d(8)],
        [nn.ConvTranspose2d(16, 8, 3), nn.PReLU(3)],
        [nn.ConvTranspose2d(16, 8, 3, output_padding=1), nn.ReLU()],
        [nn.ConvTranspose2d(16, 8, 3), nn.BatchNorm2d(8).double()],
    ],
    ids=["size", "channels", "norm-channels", "norm-dims", "prelu", "output-padding", "norm-dtype"],
)
def test_errors_of_modules_are_torchs_own(modules: list[nn.Module]) -> None:
    x = x2d(1, 1, 16, 2, 2)
    plain = nn.Sequential(*modules).eval()
    with torch.no_grad():
        with pytest.raises((RuntimeError, ValueError)) as want:
            plain(x)
        with pytest.raises(type(want.value)) as got:
            cnnfast.Sequential(*modules)(x)
    assert str(got.value) == str(want.value)


def test_unbatched_and_empty_inputs() -> None:
    seq = cnnfast.Sequential(nn.ConvTranspose2d(16, 8, 3), nn.ReLU()).eval()
    check(seq, x2d(1, 16, 4, 4))
    check(seq, x2d(1, 2, 16, 4, 4)[:0])


# --- modules as they are used -----------------------------------------------------------------------------------------


def test_an_empty_sequential_returns_its_input() -> None:
    x = x2d()
    assert cnnfast.Sequential()(x) is x
    assert cnnfast.Sequential()("text") == "text"


def test_modules_without_tensors_or_convolutions_run_as_they_stand() -> None:
    seq = cnnfast.Sequential(nn.Flatten(), nn.Linear(16 * 30, 4), nn.ReLU())
    x = x2d()
    with torch.no_grad():
        assert_same_bits(seq(x), nn.Sequential(*seq)(x))


def test_an_in_place_activation_in_front_writes_to_the_input() -> None:
    seq = cnnfast.Sequential(nn.ReLU(inplace=True), nn.ConvTranspose2d(16, 8, 3)).eval()
    x = x2d()
    with torch.no_grad():
        seq(x)
    assert torch.equal(x, x2d().relu())


def test_shared_modules(steps: list[str]) -> None:
    conv, norm, act = nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.LeakyReLU(0.2)
    seq = randomized(cnnfast.Sequential(conv, norm, act, conv, norm, act, conv)).eval()
    check(seq, x2d(1, 1, 16, 3, 3))
    assert steps == ["leaky_relu", "leaky_relu", "identity"]
    with torch.no_grad():
        conv.weight.mul_(2)
    check(seq, x2d(1, 1, 16, 3, 3))


def test_nested_containers_are_one_chain(steps: list[str]) -> None:
    inner = cnnfast.ConvTranspose2dNormActivation(16, 16)
    seq = cnnfast.Sequential(inner, nn.Sequential(nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.Sequential(nn.Tanh())))
    randomized(seq).eval()
    assert "0-2: ConvTranspose2d + BatchNorm2d + ReLU fused\n3-4: ConvTranspose2d + Tanh fused" == seq.explain()
    check(seq, x2d())
    assert steps == ["relu", "relu", "tanh"]  # the first by nn.Sequential, which runs the inner one
    called = []
    inner.register_forward_hook(lambda *args: called.append(1))
    steps.clear()
    check(seq, x2d())
    # Somebody listens to the inner one, so it is called.
    assert steps == ["relu", "relu", "tanh"] and len(called) == 3


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Scaled(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(x, output_size) * 3


def test_subclasses_with_a_forward_of_their_own(steps: list[str]) -> None:
    seq = cnnfast.Sequential(Doubled(nn.ConvTranspose2d(16, 8, 3)), Scaled(8, 8, 3), nn.ReLU()).eval()
    check(randomized(seq), x2d())  # type: ignore[arg-type]
    assert steps == []


class Upside(cnnfast.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(self._modules.values()))


def test_a_subclass_that_iterates_in_its_own_way() -> None:
    seq = randomized(Upside(nn.ReLU(), nn.ConvTranspose2d(16, 8, 3))).eval()
    with torch.no_grad():
        assert_same_bits(seq(x2d()), seq[1](x2d()).relu())


def test_a_patched_class(monkeypatch: pytest.MonkeyPatch, steps: list[str]) -> None:
    seq, x = block(), x2d()
    check(seq, x)
    steps.clear()
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: x + 1)
    check(seq, x)
    assert steps == ["identity", "tanh"]


def test_replicas_hold_their_tensors_as_attributes(steps: list[str]) -> None:
    """What nn.parallel.replicate makes of a module: parameters become attributes."""
    conv = randomized(nn.ConvTranspose2d(16, 8, 3)).eval()
    replica = conv._replicate_for_data_parallel()
    replica._parameters = {}
    replica.weight, replica.bias = conv.weight.detach() * 2, conv.bias.detach()
    with torch.no_grad():
        assert_same_bits(cnnfast.Sequential(replica)(x2d()), nn.Sequential(replica)(x2d()))
    assert steps == []


def test_lazy_modules(steps: list[str]) -> None:
    seq = cnnfast.Sequential(nn.LazyConvTranspose2d(8, 4, 2, 1), nn.LazyBatchNorm2d(), nn.ReLU()).eval()
    with torch.no_grad():
        seq(x2d())
        assert steps == []
        check(randomized(seq), x2d())  # type: ignore[arg-type]
    assert steps == ["relu"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "copy"])
def test_copies(how: str, steps: list[str]) -> None:
    seq, x = block(), x2d()
    check(seq, x)
    if how == "deepcopy":
        other = copy.deepcopy(seq)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(seq))
    elif how == "copy":
        other = copy.copy(seq)
    else:
        buffer = io.BytesIO()
        torch.save(seq, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert type(other) is cnnfast.Sequential and vars(other).keys() == vars(block()).keys()
    check(other, x)
    if how != "copy":
        with torch.no_grad():
            other[0].weight.mul_(2)
    check(other, x)
    check(seq, x)
    assert steps == ["relu", "tanh"] * 4


def test_state_dict_is_untouched_by_running() -> None:
    seq = block()
    before = {k: v.clone() for k, v in seq.state_dict().items()}
    check(seq, x2d())
    assert list(seq.state_dict()) == list(nn.Sequential(*seq).state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in seq.state_dict().items())


def test_hooks_of_the_sequential_itself() -> None:
    seq, calls = block(), []
    seq.register_forward_pre_hook(lambda m, args: calls.append("before"))
    seq.register_forward_hook(lambda m, args, y: y + 1)
    with torch.no_grad():
        y = seq(x2d())
    assert calls == ["before"] and y.min() >= 0


def test_alternating_inputs(steps: list[str]) -> None:
    seq = block()
    for _ in range(2):
        for shape in ((1, 16, 4, 4), (3, 16, 2, 7), (1, 16, 1, 1)):
            check(seq, x2d(1, *shape))
            check(seq, x2d(1, *shape).to(memory_format=CL))
    assert len(steps) == 24


def test_threads() -> None:
    seq = block()
    inputs = [x2d(k, k % 3 + 1, 16, 5, 6) for k in range(12)]

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():  # the grad mode is a thread's own
            return seq(x)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for x, got in zip(inputs, pool.map(run, inputs), strict=True):
                torch.testing.assert_close(got, run(x))
            with torch.no_grad():
                seq[0].weight.mul_(1.1)


def test_explicit_backends(steps: list[str]) -> None:
    seq, x = block(), x2d()
    with cnnfast.backend("aten"):
        check(seq, x)
    assert steps == ["relu", "tanh"]


# --- on the Triton kernel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cl", [False, True], ids=["nchw", "channels-last"])
def test_a_generator_runs_on_the_kernel(device: torch.device, launches: list[str], cl: bool) -> None:
    """One launch a step; results and memory format of nn.Sequential on a CPU."""
    seq = cnnfast.Sequential(
        nn.ConvTranspose2d(32, 64, 4, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(64, 32, 3, padding=1, padding_mode="reflect"),
        nn.PReLU(32),
        nn.Dropout(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1),
        nn.Tanh(),
    )
    randomized(seq).eval()
    seq.to(memory_format=CL if cl else torch.contiguous_format)
    x = x2d(1, 2, 32, 1, 1)
    with torch.no_grad():
        want, exact = nn.Sequential(*seq)(x), copy.deepcopy(nn.Sequential(*seq)).double()(x.double())
        seq.to(device)
        with cnnfast.backend("triton"), conv_precision("ieee"):
            got = seq(x.to(device))
    assert len([name for name in launches if "reduce" not in name]) == 3
    assert real_strides(got) == real_strides(want)
    assert_close(got, exact, want)


PLAIN_STACKS: dict[str, Callable[[int, int, int], list[nn.Module]]] = {
    "prelu": lambda i, o, p: [nn.Conv2d(i, o, 3, padding=p), nn.PReLU(o)],
    "leaky": lambda i, o, p: [nn.Conv2d(i, o, 3, padding=p), nn.LeakyReLU(0.1, inplace=True)],
    "norm-relu": lambda i, o, p: [nn.Conv2d(i, o, 3, padding=p, bias=False), nn.BatchNorm2d(o), nn.ReLU()],
    "reflect": lambda i, o, p: [nn.Conv2d(i, o, 3, padding=p, padding_mode="reflect"), nn.ReLU()],
}


@pytest.mark.parametrize(("padding", "cl"), [(0, False), (1, True)], ids=["nchw", "padding-channels-last"])
@pytest.mark.parametrize("name", PLAIN_STACKS)
def test_plain_convolutions_run_on_the_kernel(
    name: str, padding: int, cl: bool, device: torch.device, launches: list[str]
) -> None:
    make = PLAIN_STACKS[name]
    seq = cnnfast.Sequential(*make(32, 48, padding), *make(48, 64, padding))
    randomized(seq).eval().to(memory_format=CL if cl else torch.contiguous_format)
    x = x2d(1, 2, 32, 6, 7)
    with torch.no_grad():
        want, exact = nn.Sequential(*seq)(x), copy.deepcopy(nn.Sequential(*seq)).double()(x.double())
        seq.to(device)
        with cnnfast.backend("triton"), conv_precision("ieee"):
            got = seq(x.to(device))
    assert len([launch for launch in launches if "reduce" not in launch]) == 2
    assert real_strides(got) == real_strides(want)
    assert_close(got, exact, want)


def test_one_dimensional_convolutions_run_on_the_kernel(device: torch.device, launches: list[str]) -> None:
    seq = cnnfast.Sequential(
        nn.Conv1d(32, 48, 7, padding=3), nn.PReLU(), nn.Conv1d(48, 32, 3, padding=3, dilation=3), nn.BatchNorm1d(32)
    )
    randomized(seq).eval()
    x = x2d(1, 2, 32, 21)
    with torch.no_grad():
        want, exact = nn.Sequential(*seq)(x), copy.deepcopy(nn.Sequential(*seq)).double()(x.double())
        seq.to(device)
        with cnnfast.backend("triton"), conv_precision("ieee"):
            got = seq(x.to(device))
    assert len([launch for launch in launches if "reduce" not in launch]) == 2
    assert_close(got, exact, want)


def test_what_no_kernel_runs_stands_alone_on_a_gpu(device: torch.device, launches: list[str]) -> None:
    """Three input channels: no step there, so that an explicit backend has nothing to refuse. A stride has a kernel."""
    if device.type != "cuda":
        pytest.skip("on CPU tensors it is a step")
    seq = cnnfast.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.ReflectionPad2d(1), nn.Conv2d(32, 32, 3, 2), nn.LeakyReLU(0.2)
    )
    randomized(seq).eval()
    x = x2d(1, 2, 3, 8, 9)
    with torch.no_grad():
        want, exact = nn.Sequential(*seq)(x), copy.deepcopy(nn.Sequential(*seq)).double()(x.double())
        seq.to(device)
        with cnnfast.backend("triton"), conv_precision("ieee"):
            got = seq(x.to(device))
    lines = seq.explain().splitlines()
    assert lines[0] == "0: Conv2d as it stands: no kernel: 3 input channels per group are fewer than 16"
    assert lines[-1] == "2-4: ReflectionPad2d + Conv2d + LeakyReLU fused"
    assert len([launch for launch in launches if "reduce" not in launch]) == 1
    assert_close(got, exact, want)


# --- small chains -----------------------------------------------------------------------------------------------------


def _up(c: int) -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()]


def _plain(c: int) -> list[nn.Module]:
    return [nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c), nn.ReLU()] * 2


def _transposed(c: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(c, c, 4, 2, 1), nn.BatchNorm2d(c), nn.ReLU()]


def _odd(c: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(c, c, 3, 2, 1), nn.BatchNorm2d(c), nn.ReLU()]


def _odd_without_bias(c: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(c, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()]


def _grouped(c: int) -> list[nn.Module]:
    return [nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(8, c), nn.SiLU()] * 2


@pytest.mark.parametrize(
    ("modules", "channels", "size", "train", "small"),
    [
        pytest.param(_transposed, 8, 8, True, True, id="transposed-training"),
        pytest.param(_transposed, 32, 32, True, False, id="transposed-training-larger"),
        pytest.param(_up, 8, 4, True, True, id="upsample-training"),
        pytest.param(_up, 8, 4, False, True, id="upsample"),
        pytest.param(_up, 32, 8, False, False, id="upsample-larger"),
        pytest.param(_plain, 64, 16, True, True, id="plain-training"),
        pytest.param(_plain, 64, 16, False, True, id="plain"),
        pytest.param(_grouped, 64, 32, False, True, id="group-norm"),
        pytest.param(_grouped, 64, 96, False, False, id="group-norm-larger"),
        pytest.param(_transposed, 64, 16, False, False, id="transposed"),
        pytest.param(_transposed, 8, 4, False, True, id="transposed-small"),
        pytest.param(_odd, 64, 16, False, False, id="transposed-odd"),
        pytest.param(_odd_without_bias, 64, 16, False, True, id="transposed-odd, no bias"),
    ],
)
def test_a_chain_that_is_too_small_runs_as_its_modules(
    modules: Callable[[int], list[nn.Module]],
    channels: int,
    size: int,
    train: bool,
    small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As they stand: bit by bit the same, running statistics included."""
    monkeypatch.setattr(backend, "_converts_anyway", backend._converts_anyway.__wrapped__)  # type: ignore[attr-defined]
    monkeypatch.setattr(backend, "SMALL", 2**21)
    monkeypatch.setattr(backend, "SMALL_IN_TRAINING", 2**17)
    monkeypatch.setattr(methods, "winograd_gain", lambda *_: 1.0)  # with which some would gain
    for cached in (inference._way, inference._why_slower_plain):
        cached.cache_clear()
    torch.manual_seed(0)
    plain = nn.Sequential(*modules(channels)).train(train)
    model, x = cnnfast.Sequential(*copy.deepcopy(plain)).train(train), torch.randn(4, channels, size, size)
    with torch.set_grad_enabled(train):
        assert ("too small" in model.explain(x)) is small
        for _ in range(3):
            want, got = plain(x), model(x)
            assert got.stride() == want.stride()
            if small:
                assert torch.equal(got, want)
            else:
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not small or all(map(torch.equal, model.buffers(), plain.buffers()))
    cl = x.contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(train):
        assert not train or "too small" not in model.explain(cl), "the caller asks for channels-last"


def _plain(count: int, channels: int, kernel: int = 3, norm: bool = False, **kw: Any) -> list[nn.Module]:
    conv = [nn.Conv2d(channels, channels, kernel, padding=kernel // 2, **kw) for _ in range(count)]
    return [m for c in conv for m in (c, nn.GroupNorm(4, channels) if norm else nn.Identity(), nn.ReLU())]


@pytest.mark.parametrize(
    ("layers", "shape", "alone", "together", "together_full_width"),
    [
        pytest.param(_plain(1, 16), (1, 16, 128, 128), False, False, False, id="one"),
        pytest.param(_plain(2, 16), (1, 16, 128, 128), True, True, True, id="large"),
        pytest.param(_plain(2, 16), (1, 16, 64, 64), False, False, False, id="few"),
        pytest.param(_plain(5, 16), (1, 16, 64, 64), True, True, True, id="many"),
        pytest.param(_plain(5, 64), (1, 64, 32, 32), False, True, True, id="many-small"),
        pytest.param(_plain(3, 64), (1, 64, 16, 16), False, True, False, id="by-patches"),
        pytest.param(_plain(2, 64), (1, 64, 16, 16), False, False, False, id="few-by-patches"),
        pytest.param(_plain(3, 8), (1, 8, 16, 16), False, False, False, id="tiny-by-patches"),
        pytest.param(_plain(3, 64, 5), (1, 64, 16, 16), False, False, False, id="larger-kernel"),
        pytest.param(_plain(3, 64, groups=2), (1, 64, 16, 16), False, False, False, id="grouped"),
        pytest.param(_plain(3, 64), (2, 64, 16, 16), False, False, False, id="two-images"),
        pytest.param(_plain(2, 16, norm=True), (1, 16, 128, 128), False, False, False, id="norms"),
        pytest.param(_plain(2, 16, norm=True), (1, 16, 256, 256), True, False, False, id="norms-large"),
        pytest.param(_plain(2, 32, norm=True), (1, 32, 256, 256), True, True, True, id="norms-larger"),
        pytest.param(_plain(5, 64, norm=True), (1, 64, 64, 64), False, False, False, id="norms-many"),
        pytest.param(_plain(5, 64, norm=True), (1, 64, 16, 16), False, False, False, id="norms-by-patches"),
        pytest.param(_plain(6, 512, 1), (1, 512, 28, 28), True, True, True, id="wide"),
        pytest.param(_plain(3, 1000, 1), (1, 1000, 28, 28), True, True, True, id="odd-channels"),
        pytest.param(_plain(3, 1008, 1), (1, 1008, 28, 28), False, False, False, id="whole-vectors"),
    ],
)
def test_chains_whose_steps_gain_nothing_are_weighed(
    layers: list[nn.Module],
    shape: tuple[int, ...],
    alone: bool,
    together: bool,
    together_full_width: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On one thread, on two, and on two where the processor is of full width."""
    rule, asked = backend._converts_anyway.__wrapped__, []  # type: ignore[attr-defined]
    monkeypatch.setattr(backend, "_converts_anyway", lambda *given: asked.append(given) or True)
    with torch.no_grad():
        cnnfast.Sequential(*layers).eval()(torch.randn(shape))
    monkeypatch.setattr(backend, "SMALL", 2**21)
    for threads, full, expected in ((1, False, alone), (2, False, together), (2, True, together_full_width)):
        now = isa.Process(False, threads, full)
        monkeypatch.setattr(backend, "process", lambda now=now: now)
        assert rule(*asked[0]) is expected, (threads, full)


@pytest.mark.parametrize(("transposed", "fused"), [(1, False), (2, True)])
def test_in_training_a_transposed_convolution_by_itself_runs_as_its_module(
    transposed: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the default format, where conversions at both ends cost what they save; two of them save more."""
    monkeypatch.setattr(backend, "_saves_conversions", backend._saves_conversions.__wrapped__)  # type: ignore[attr-defined]
    layers = [m for _ in range(transposed) for m in (nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.ReLU())]
    plain, x = nn.Sequential(*layers), torch.randn(2, 16, 32, 32)
    model = cnnfast.Sequential(*copy.deepcopy(layers))
    assert ("modules of contiguous maps are as fast" in model.explain(x)) is not fused
    want, got = plain(x), model(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert fused or torch.equal(got, want)
    with torch.no_grad():
        assert "modules of contiguous maps are as fast" not in model.explain(x)


@pytest.mark.skipif(onednn.why_missing() is not None, reason=str(onednn.why_missing()))
@pytest.mark.parametrize(
    ("layers", "size", "small"),
    [
        pytest.param([nn.ConvTranspose2d(96, 64, 4, 2, 1), nn.LeakyReLU(0.1)], 16, True, id="few-elements"),
        pytest.param([nn.ConvTranspose2d(96, 64, 3, 2, 1), nn.LeakyReLU(0.1)], 16, False, id="odd"),
        pytest.param([nn.ConvTranspose2d(96, 64, 3, 2, 1, bias=False), nn.LeakyReLU(0.1)], 16, True, id="odd, no bias"),
        pytest.param(_transposed(32), 64, False, id="passes-saved"),
        pytest.param([nn.ConvTranspose2d(512, 256, 4, 2, 1), nn.ReLU()], 4, False, id="large-weight"),
        pytest.param([nn.ConvTranspose2d(64, 3, 4, 2, 1), nn.Tanh()], 32, False, id="merged-phases"),
        pytest.param([nn.Upsample(scale_factor=2), nn.Conv2d(64, 32, 3, padding=1)], 16, False, id="upsample"),
    ],
)
def test_a_small_transposed_chain_in_channels_last_runs_as_its_modules(
    layers: list[nn.Module], size: int, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There ATen's transposed convolution converts nothing: packing gains by large weights and passes saved alone."""
    monkeypatch.setattr(backend, "LEAST_SAVED", 2**20)
    plain = nn.Sequential(*layers).eval().to(memory_format=torch.channels_last)
    model = cnnfast.Sequential(*layers).eval()
    channels = next(m.in_channels for m in layers if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)))
    x = torch.randn(2, channels, size, size).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert ("too small" in model.explain(x)) is small
        for _ in range(3):
            want, got = plain(x), model(x)
            assert got.stride() == want.stride()
            torch.testing.assert_close(got, want, rtol=0 if small else 1e-4, atol=0 if small else 1e-4)


def test_modules_that_run_as_they_stand_hold_no_map_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first of several takes is free again when the second runs, as in `nn.Sequential`."""
    made: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    class Noted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 1
            made.append(weakref.ref(y))
            return y

    leaky_relu = torch.nn.functional.leaky_relu

    def noting(*args: Any) -> Tensor:
        alive.append(made[-1]() is not None)
        return leaky_relu(*args)

    monkeypatch.setattr(torch.nn.functional, "leaky_relu", noting)
    for cls in (nn.Sequential, cnnfast.Sequential):
        seq, x = cls(Noted(), nn.Conv1d(8, 8, 3), nn.LeakyReLU(0.1), nn.Conv1d(8, 8, 3)).eval(), torch.randn(1, 8, 64)
        with torch.no_grad():
            seq(x)
    assert "as fast" in seq[1:].explain(x) and alive == [False, False]
