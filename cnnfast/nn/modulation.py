"""Scale and shift of each sample's channels behind a norm (conditional norms, FiLM): how a fused step takes them.

``norm(x) * gamma + beta`` with gamma and beta (N or 1, C, 1, ...). Where one sample's stand for all, they are vectors
of the norm itself, and nothing of them is a pass over the map. Otherwise they follow the step's norm in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .fusion_conv import Part, dense
from .modules import NotFused

__all__ = ["Modulation", "modulated", "modulation", "vectors"]


class Modulation(NamedTuple):
    """``slots``: of a product, a sum, or both in one; ``samples``: for how many they are, 1 for any number."""

    slots: tuple[int, ...] = ()
    samples: int = 1


def modulation(part: Part, slot: int, before: Modulation, ndim: int, channels: int, weight: Tensor) -> Modulation:
    """What is ``before``, and the part at ``slot``. `NotFused` where a step with this ``weight`` does not take it."""
    samples = before.samples
    for t in part.tensors:
        if t is None:
            continue
        n = dense(t).shape[0] if t.dim() else 0
        if t.shape != (n, channels, *(1,) * ndim) or n != 1 and samples not in (1, n):
            raise NotFused(f"{tuple(t.shape)} is no scale or shift of {channels} channels")
        if t.dtype not in (weight.dtype, torch.float32) or t.device != weight.device:
            raise NotFused(f"{t.dtype} on {t.device} does not go with a {weight.dtype} weight on {weight.device}")
        samples = max(samples, n)
    return Modulation((*before.slots, slot), samples)


def vectors(
    scale: Tensor | None, shift: Tensor | None, of: Sequence[tuple[Tensor | None, ...]]
) -> tuple[Tensor | None, Tensor | None]:
    """``scale`` and ``shift`` of a norm, or None, with the (gamma, beta) ``of`` what follows it, all of one form."""
    for gamma, beta in of:
        if gamma is not None:
            scale = gamma if scale is None else scale * gamma
            shift = None if shift is None else shift * gamma
        if beta is not None:
            shift = beta if shift is None else shift + beta
    return scale, shift


def modulated(y: Tensor, of: Sequence[tuple[Tensor | None, ...]]) -> Tensor:
    """y in the step's dimensions with the (gamma, beta) ``of`` what follows its norm, in one pass."""
    scale, shift = vectors(None, None, of)
    scale, shift = (None if t is None else t.reshape(*t.shape[:2], *(1,) * (y.dim() - 2)) for t in (scale, shift))
    if scale is None:
        return y if shift is None else y + shift
    return y * scale if shift is None else torch.addcmul(shift, y, scale)
