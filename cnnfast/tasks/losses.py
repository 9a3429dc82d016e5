"""Adversarial losses as pure functions of scores, their gradient penalties, and the table of recipes.

A *critic* is any function from images (N, C, H, W) to one float32 score for each, (N,); a discriminator's scores are
logits. All losses are means over the images, float32 scalars.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["LOSSES", "CriticTerms", "Loss", "bce", "critic_terms", "hinge", "interpolation_penalty", "r1_penalty"]

Critic = Callable[[Tensor], Tensor]


def bce(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross-entropy of logits: real images are 1, generated ones 0 (Goodfellow et al., 2014)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def bce_generator(fake: Tensor) -> Tensor:
    """-log D(G(z)), the non-saturating form of the same paper."""
    return F.softplus(-fake).mean()


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Lim and Ye, 2017; Miyato et al., 2018."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def wasserstein(real: Tensor, fake: Tensor) -> Tensor:
    """Minus the estimated distance (Arjovsky et al., 2017)."""
    return fake.mean() - real.mean()


def score_generator(fake: Tensor) -> Tensor:
    """The generator's side of `hinge` and `wasserstein`."""
    return -fake.mean()


def interpolation_penalty(critic: Critic, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """Mean of (|gradient of the score in the image| - 1)^2 at real + mix * (fake - real) (Gulrajani et al., 2017).

    ``mix`` (N,) in [0, 1). Differentiable in the critic's parameters: the critic must be differentiable twice, and must
    not mix images (no BatchNorm in training mode).
    """
    x = torch.lerp(real.detach(), fake.detach(), mix.view(-1, 1, 1, 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (gradient.flatten(1).norm(2, dim=1) - 1).square().mean()


def r1_penalty(scores: Tensor, real: Tensor) -> Tensor:
    """Mean of |gradient of the score in the real image|^2 / 2 (Mescheder et al., 2018).

    ``scores`` were computed from ``real``, which requires a gradient.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean() / 2


@dataclass(frozen=True)
class Loss:
    """A recipe: both losses, weights of the penalties, and settings that give images after a few hundred steps.

    ``norm`` of the discriminator; ``critic_steps`` for one step of the generator; ``lr`` and ``betas`` of Adam;
    ``instance_noise`` as in `cnnfast.tasks.gan.Options`.
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    norm: str
    unit: str
    critic_steps: int = 1
    interpolation: float = 0.0
    r1: float = 0.0
    lr: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)
    instance_noise: float = 0.0


LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "bce": Loss(bce, bce_generator, norm="batch", unit="nats", instance_noise=0.3),
        "wgan-gp": Loss(
            wasserstein,
            score_generator,
            norm="instance",
            unit="score",
            critic_steps=5,
            interpolation=10.0,
            lr=3e-4,
            betas=(0.0, 0.9),
        ),
        "hinge-r1": Loss(hinge, score_generator, norm="none", unit="score", r1=0.1, lr=4e-4, betas=(0.0, 0.9)),
    }
)


class CriticTerms(NamedTuple):
    """Scalars of one critic step: what is minimised, and the parts of it."""

    total: Tensor
    loss: Tensor  # without the penalty
    penalty: Tensor  # weighted
    real: Tensor  # mean score
    fake: Tensor


def critic_terms(loss: Loss, critic: Critic, real: Tensor, fake: Tensor, mix: Tensor) -> CriticTerms:
    """The critic's objective on images (N, C, H, W); no gradient reaches ``fake``; ``mix`` (N,) in [0, 1)."""
    real, fake = real.detach(), fake.detach()
    if loss.r1:
        real.requires_grad_()
    real_scores, fake_scores = critic(real), critic(fake)
    value = loss.critic(real_scores, fake_scores)
    penalty = torch.zeros_like(value)
    if loss.interpolation:
        penalty = penalty + loss.interpolation * interpolation_penalty(critic, real, fake, mix)
    if loss.r1:
        penalty = penalty + loss.r1 * r1_penalty(real_scores, real)
    return CriticTerms(value + penalty, value, penalty, real_scores.mean(), fake_scores.mean())
