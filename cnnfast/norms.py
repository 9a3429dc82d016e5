"""What a normalisation computes (`Norm`), one application of it (`NormCall`), and statistics by parts (`Partials`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["KINDS", "Norm", "NormCall", "Partials", "per_channel"]


KINDS = ("batch", "instance", "group", "affine")


@dataclass(frozen=True)
class Norm:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with the (biased) statistics of each channel over the batch
    ("batch") or over each image ("instance"), of each of ``groups`` groups of channels of each image ("group"), or
    with mean 0 and deviation 1 ("affine")."""

    kind: str
    groups: int = 1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown norm {self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.groups < 1:
            raise ValueError(f"groups={self.groups} must be positive")

    @property
    def per_image(self) -> bool:
        """Whether every image has statistics of its own."""
        return self.kind in ("instance", "group")


class NormCall(NamedTuple):
    """One application of a norm. Vectors of C elements, any floating dtype.

    With ``use_input_stats``, running tensors that are given move by ``momentum`` towards the input's statistics, in
    place, as `torch.nn.functional.batch_norm` and ``instance_norm`` do it (the variance unbiased); without, they are
    the statistics. ``process_group``: the statistics are those of all its processes' inputs together (SyncBatchNorm).
    """

    norm: Norm
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    use_input_stats: bool = True
    momentum: float = 0.1  # the factor itself, never None
    process_group: Any = None

    @property
    def measured(self) -> bool:
        """Whether the statistics are the input's."""
        return self.use_input_stats and self.norm.kind != "affine"


class Partials(NamedTuple):
    """Statistics of values by parts, float32: S segments (1 of a batch norm, N otherwise) of P parts each. A part with
    count 0 has mean 0 and m2 0."""

    count: Tensor  # type: ignore[assignment]  # (S, P)
    mean: Tensor  # (S, P, C)
    m2: Tensor  # (S, P, C): the sum of squares about the part's own mean


def per_channel(v: Tensor, like: Tensor) -> Tensor:
    """(C,) as (C, 1, ...): broadcast against ``like``."""
    return v.reshape(-1, *(1,) * (like.dim() - 2))


def check_sizes(x: Tensor, call: NormCall | None) -> None:
    """torch's own errors where statistics are of one value."""
    if call is None or not call.measured:
        return
    n, c, *size = x.shape
    values = 1
    for s in size:
        values *= s
    kind = call.norm.kind
    if kind == "instance" and values == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {x.shape}")
    if kind == "batch" and values * n == 1 and call.process_group is None:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    if kind == "group" and values * n * (c // call.norm.groups) == 1:
        shape = [n * c // call.norm.groups, call.norm.groups, *size]
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")
