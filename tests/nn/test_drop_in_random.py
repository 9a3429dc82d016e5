"""Random models in random programs: training steps of cnnfast.Sequential in unusual ways are those of nn.Sequential."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cnnfast
from cnnfast.cpu import conv_autograd, training

from .test_sequential_training import loss_of, randomized, real_strides
from .test_training_features import CL, Outcome, compare

PROGRAMS = 100  # of one check: a maximum over a handful of numbers says little


pytestmark = pytest.mark.usefixtures("one_thread")


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, lambda: nn.LeakyReLU(0.2, inplace=True), nn.ELU, nn.SiLU, nn.GELU, nn.Tanh, nn.PReLU, nn.Hardswish,
    nn.Identity,
]  # fmt: skip


def chain(r: random.Random, ndim: int) -> nn.Sequential:
    """Blocks of every kind. No bias precedes a norm, which would take it away: its gradient is rounding alone."""
    ct, conv, batch, instance = (
        (nn.ConvTranspose1d, nn.Conv1d, nn.BatchNorm1d, nn.InstanceNorm1d),
        (nn.ConvTranspose2d, nn.Conv2d, nn.BatchNorm2d, nn.InstanceNorm2d),
    )[ndim - 1]
    norms: list[Callable[[int], nn.Module]] = [
        lambda c: batch(c, momentum=r.choice([0.1, None]), affine=r.random() < 0.7),
        lambda c: instance(c, affine=r.random() < 0.5, track_running_stats=r.random() < 0.3),
        lambda c: nn.GroupNorm(r.choice([1, 2]), c),
    ]
    modules: list[nn.Module] = []
    channels = 4
    for _ in range(r.randint(1, 3)):
        out, norm, groups = r.choice([2, 4, 8]), r.choice([None, *norms]), r.choice([1, 1, 2])
        kind = r.choice(["transposed", "transposed", "plain", "upsampled"])
        if kind == "transposed":
            args = r.choice([(4, 2, 1), (3, 2, 1, 1), (2, 2), (5, 3, 2), (3, 1, 1)])
            modules.append(ct(channels, out, *args, groups=groups, bias=norm is None))
        else:
            if kind == "upsampled" and ndim == 2:
                modules.append(nn.Upsample(scale_factor=2))
            mode = r.choice(["zeros", "reflect", "replicate"])
            modules.append(conv(channels, out, 3, padding=1, groups=groups, bias=norm is None, padding_mode=mode))
        modules += [] if norm is None else [norm(out)]
        modules.append(r.choice(ACTIVATIONS)())
        channels = out
    return randomized(nn.Sequential(*modules))  # type: ignore[return-value]


def formatted(x: Tensor, how: str) -> Tensor:
    """The values of x in another place."""
    if how == "permuted":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "sliced":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    return x.contiguous(memory_format=CL) if how == "channels-last" and x.dim() == 4 else x.clone()


def gradient(y: Tensor, how: str) -> Tensor:
    """A loss whose gradient by y has an unusual form."""
    parts = {"permuted": y.movedim(1, -1).contiguous(), "sliced": y[..., ::2], "expanded": y.mean(1, keepdim=True)}
    return loss_of(parts.get(how, y).square() + parts.get(how, y))


def backward(model: nn.Sequential, x: Tensor, loss: Callable[[Tensor], Tensor], how: str) -> None:
    y = checkpoint(model, x, use_reentrant=False) if how == "checkpoint" else model(x)
    if how == "twice":
        loss(y).backward(retain_graph=True)
    if how == "penalty":
        (slope,) = torch.autograd.grad(loss(y), x, create_graph=True)
        loss(y).add(slope.square().sum()).backward()
    else:
        loss(y).backward()


def program(plain: nn.Sequential, seed: int, dtype: torch.dtype, ndim: int) -> tuple[Outcome, list[object]]:
    """What a few training steps in unusual ways make of the model: values, and what must be the same exactly."""
    r, model = random.Random(seed), plain.to(dtype)
    values, exactly = {}, []
    for k in range(2):
        model.train(r.random() < 0.7)
        frozen = [m for m in model if not isinstance(m, nn.GroupNorm) and r.random() < 0.1]
        for m in frozen:
            m.requires_grad_(False)
        x = torch.randn((r.choice([2, 3]), 4, *(5, 4)[:ndim]), generator=torch.Generator().manual_seed(seed + k))
        x = formatted(x.to(dtype), r.choice(["", "channels-last", "permuted", "sliced"])).requires_grad_()
        form, how = r.choice(["", "permuted", "sliced", "expanded"]), r.choice(["", "twice", "penalty", "checkpoint"])
        backward(model, x * 1, lambda y, form=form: gradient(y, form), how)
        with torch.no_grad():
            y = model(x)
        values |= {f"{k}.y": y, f"{k}.x": x.grad}
        exactly += [y.dtype, real_strides(y), real_strides(x.grad)]
        for name, p in model.named_parameters():
            exactly.append((name, None if p.grad is None else real_strides(p.grad)))
            if p.grad is not None:
                values[f"{k}.{name}"] = p.grad.clone()
                p.data.sub_(0.01 * p.grad / p.grad.abs().max().clamp_min(1))
        model.requires_grad_(True)
    buffers = dict(model.named_buffers())
    exactly += [(name, int(b)) for name, b in buffers.items() if not b.is_floating_point()]
    return {**values, **{name: b.clone() for name, b in buffers.items() if b.is_floating_point()}}, exactly


@pytest.fixture
def no_least(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No convolution is too small for any way to run it."""
    for name in ("_LEAST", "_LEAST_MERGED"):
        monkeypatch.setattr(conv_autograd, name, 0)
    monkeypatch.setattr(training, "collapses", lambda *args: True)
    conv_autograd.ways.cache_clear()
    yield
    conv_autograd.ways.cache_clear()


@pytest.mark.usefixtures("no_least")
@pytest.mark.parametrize("first", [0, PROGRAMS])
def test_random_programs(first: int) -> None:
    got: Outcome = {}
    exact: Outcome = {}
    eager: tuple[Outcome, ...] = {}, {}
    for seed in range(first, first + PROGRAMS):
        ndim = 1 + (seed % 3 > 0)
        torch.manual_seed(seed)
        plain = chain(random.Random(seed), ndim)

        def run(
            into: Outcome, model: nn.Sequential, dtype: torch.dtype = torch.float32, seed: int = seed, ndim: int = ndim
        ) -> list[object]:
            values, exactly = program(copy.deepcopy(model), seed, dtype, ndim)
            into |= {f"{seed}.{name}": t for name, t in values.items()}
            return exactly

        same = run(got, cnnfast.Sequential(*plain)), run(eager[0], plain)
        assert same[0] == same[1], plain
        run(eager[1], plain.to(memory_format=CL) if ndim == 2 else plain)
        run(exact, plain, torch.float64)
    for name in [k for k, t in exact.items() if t.abs().max() < 1e-9]:  # what a norm takes away has no scale
        for outcome in (got, exact, *eager):
            del outcome[name]
    compare(got, exact, *eager, what=f"programs from {first}")
