"""Fifty optimiser steps of cnnfast.Sequential from one seed: as far from eager mode as eager mode is from itself in the
other memory format."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast

from ..tolerance import assert_close

CL = torch.channels_last
STEPS = 50


pytestmark = pytest.mark.usefixtures("one_thread")


def generator(container: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    """A DCGAN's generator, 12 -> 3 x 16 x 16."""
    modules: list[nn.Module] = []
    for c_in, c_out, stride in ((12, 32, 1), (32, 16, 2)):
        modules += [
            nn.ConvTranspose2d(c_in, c_out, 4, stride, stride - 1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(True),
        ]
    return container(*modules, nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh())


def critic(container: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    """As WGAN-GP wants it: no statistics of the batch. 3 x 16 x 16 -> one number."""
    return container(
        nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(16, 32, 4, 2, 1, bias=False), nn.InstanceNorm2d(32, affine=True), nn.LeakyReLU(0.2),
        nn.Conv2d(32, 1, 4, bias=False),
    )  # fmt: skip


def initialised(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(m.weight, 0.0, 0.05)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.05)
    return model


def images(k: int, dtype: torch.dtype) -> Tensor:
    g = torch.Generator().manual_seed(1000 + k)
    return torch.randn(8, 3, 16, 16, generator=g).to(dtype)


def latent(k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(8, 12, 1, 1, generator=torch.Generator().manual_seed(k)).to(dtype)


def supervised(models: list[nn.Module], optimisers: list[torch.optim.Optimizer], k: int, dtype: torch.dtype) -> None:
    """The generator learns to give an image for a latent vector."""
    optimisers[0].zero_grad()
    F.mse_loss(models[0](latent(k % 4, dtype)), images(k % 4, dtype).tanh()).backward()
    optimisers[0].step()


def wgan_gp(models: list[nn.Module], optimisers: list[torch.optim.Optimizer], k: int, dtype: torch.dtype) -> None:
    """A step of the critic, with the gradient penalty (a second derivative), and one of the generator."""
    g, d = models
    real, z = images(k, dtype), latent(k, dtype)
    optimisers[1].zero_grad()
    with torch.no_grad():
        fake = g(z)
    mix = torch.lerp(real, fake, torch.rand(8, 1, 1, 1, generator=torch.Generator().manual_seed(k)).to(dtype))
    (slope,) = torch.autograd.grad(d(mix.requires_grad_()).sum(), mix, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
    (d(fake).mean() - d(real).mean() + 10 * penalty).backward()
    optimisers[1].step()
    optimisers[0].zero_grad()
    (-d(g(latent(500 + k, dtype))).mean()).backward()
    optimisers[0].step()


def trained(
    models: list[nn.Module],
    one_step: Callable[[list[nn.Module], list[torch.optim.Optimizer], int, torch.dtype], None],
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, Tensor]]:
    """Weights and running statistics after `STEPS` steps of Adam."""
    optimisers = [torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999)) for m in models]
    for k in range(STEPS):
        one_step(models, optimisers, k, dtype)
    return [m.state_dict() for m in models]


@pytest.mark.parametrize("one_step", [supervised, wgan_gp], ids=lambda f: f.__name__)
def test_fifty_steps(one_step: Callable[..., None]) -> None:
    torch.manual_seed(0)
    start = [initialised(generator()), initialised(critic())]
    ours = [cnnfast.Sequential(*copy.deepcopy(m)) for m in start]
    others = [copy.deepcopy(m).to(memory_format=CL) for m in start]
    exact = [copy.deepcopy(m).double() for m in start]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in start]
    eager = trained(start, one_step)
    got = trained(ours, one_step)
    other = trained(others, one_step)
    wide = trained(exact, one_step, torch.float64)
    for model, names in enumerate(before):
        for name, initial in names.items():
            w = wide[model][name]
            if not initial.is_floating_point():
                assert torch.equal(got[model][name], eager[model][name]) and got[model][name] >= STEPS
                continue
            assert (w - initial).abs().max() > 1e-4 or (model == 1 and one_step is supervised), (
                f"{name} was not trained"
            )
            yardstick = max((eager, other), key=lambda states: (states[model][name].double() - w).square().sum().item())
            assert_close(got[model][name], w, yardstick[model][name], f"{name} of model {model}")
