"""What a normalisation computes (`Norm`), one application of it (`NormCall`), and statistics by parts (`Partials`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Norm", "NormCall", "Partials"]


@dataclass(frozen=True)
class Norm:
    kind: str
    groups: int = 1
    eps: float = 1e-5


class NormCall(NamedTuple):
    norm: Norm
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    use_input_stats: bool = True
    momentum: float = 0.1
    process_group: Any = None


class Partials(NamedTuple):
    count: Tensor
    mean: Tensor
    m2: Tensor
