"""What a normalisation computes (`Norm`), and statistics by parts (`Partials`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["KINDS", "MEASURED", "Norm", "Partials", "check_values", "per_channel"]


MEASURED = ("batch", "instance", "group")
KINDS = (*MEASURED, "running", "affine")


@dataclass(frozen=True)
class Norm:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with the (biased) statistics of each channel over the batch
    ("batch") or over each image ("instance"), of each of ``groups`` groups of channels of each image ("group"), with
    mean and variance that are given ("running": a BatchNorm in eval mode), or with mean 0 and deviation 1
    ("affine")."""

    kind: str
    groups: int = 1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown norm {self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.groups < 1:
            raise ValueError(f"groups={self.groups} must be positive")

    @property
    def measured(self) -> bool:
        """Whether the statistics are the input's."""
        return self.kind in MEASURED

    @property
    def per_image(self) -> bool:
        """Whether every image has statistics of its own."""
        return self.kind in ("instance", "group")

    def join(self, channels: int) -> int:
        """Channels that share statistics."""
        return channels // self.groups if self.kind == "group" else 1


class Partials(NamedTuple):
    """Statistics of values by parts, float32: S segments (1 of a batch norm, N otherwise) of P parts each, in one piece
    of memory as the kernels take it: ``count`` (S, P), ``mean`` (S, P, C) and ``m2`` (S, P, C), the sum of squares
    about the part's own mean. A part with count 0 has mean 0 and m2 0."""

    stats: Tensor  # (S * P * (1 + 2 * C),)
    shape: tuple[int, int, int]  # (S, P, C)

    @classmethod
    def of(cls, count: Tensor, mean: Tensor, m2: Tensor) -> Partials:
        s, p, c = mean.shape
        return cls(torch.cat([t.reshape(-1) for t in (count, mean, m2)]), (s, p, c))

    @classmethod
    def empty(cls, like: Tensor, shape: tuple[int, int, int]) -> Partials:
        """Room for them, on ``like``'s device."""
        s, p, c = shape
        return cls(like.new_empty(s * p * (1 + 2 * c), dtype=torch.float32), shape)

    @property
    def each(self) -> tuple[Tensor, Tensor, Tensor]:
        """(count, mean, m2)."""
        s, p, c = self.shape
        count, *more = self.stats.split((s * p, s * p * c, s * p * c))
        return count.view(s, p), more[0].view(s, p, c), more[1].view(s, p, c)


def per_channel(v: Tensor, like: Tensor) -> Tensor:
    """(C,) as (C, 1, ...): broadcast against ``like``."""
    return v.reshape(-1, *(1,) * (like.dim() - 2))


def check_values(shape: Sequence[int], norm: Norm | None, *, several: bool = False) -> None:
    """torch's own errors where a norm of an input (N, C, *size) takes statistics of one value. ``several``: those of
    several processes."""
    if norm is None or not norm.measured:
        return
    n, c, *size = shape
    values, kind = math.prod(size), norm.kind
    if kind == "instance" and values == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {_size(shape)}")
    if kind == "batch" and values * n == 1 and not several:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {_size(shape)}")
    if kind == "group" and values * n * (c // norm.groups) == 1:
        shape = [n * c // norm.groups, norm.groups, *size]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")


def _size(shape: Sequence[int]) -> str:
    return f"torch.Size({list(shape)})"
