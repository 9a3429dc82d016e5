"""Training steps on a CPU."""

from __future__ import annotations

from torch import Tensor

from .block import Operands, Step
from .norms import NormCall

__all__ = ["run"]


def run(step: Step, o: Operands, norm: NormCall | None, channels_last: bool) -> Tensor:
    from .ops.core import by_torch

    return by_torch(step, o, norm, channels_last)
