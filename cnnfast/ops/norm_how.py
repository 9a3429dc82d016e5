"""What the kernels of a norm compute: `NormHow` of a launch, `NormPass` of a pass as `cnnfast.guard` knows it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from ..activations import Activation
from ..block import Step
from ..norms import Norm

__all__ = ["NormHow", "NormPass", "how_of"]


@dataclass(frozen=True)
class NormHow:
    """What a launch computes beside its tensors. ``norm`` None: residual and activation alone. ``measured``: the
    statistics are of the input, and depend on it; otherwise they are constants, and rstd is the running variance."""

    norm: Norm | None
    measured: bool
    activation: Activation
    channels_last: bool  # the result
    dtype: torch.dtype  # of the result
    residual: bool = False

    @cached_property
    def _hash(self) -> int:
        return hash((self.norm, self.measured, self.activation, self.channels_last, self.dtype, self.residual))

    def __hash__(self) -> int:  # a key on the path of every call
        return self._hash

    @cached_property
    def of(self) -> str:
        """What the activation's derivative is taken of: the result ("y"); the activation's input ("x"), which the
        backward computes again; or neither ("")."""
        saves = self.activation.saves()
        return saves if self.residual or not saves else "x"

    def join(self, channels: int) -> int:
        """Channels that share statistics."""
        return channels // self.norm.groups if self.norm is not None and self.norm.kind == "group" else 1

    @property
    def each(self) -> bool:
        """Whether every image has its own statistics."""
        return self.measured and self.norm is not None and self.norm.per_image

    @property
    def eps(self) -> float:
        return 0.0 if self.norm is None else float(self.norm.eps)


how_of = lru_cache(maxsize=4096)(NormHow)
"""The same object for equal arguments: its hash is known, and keys that hold it compare at once."""


@dataclass(frozen=True)
class NormPass:
    """What the kernels of one pass compute, for `guard`. ``what``: ahead of the operation's name."""

    what: str
    how: NormHow | Activation
    channels: int

    def describe(self) -> str:
        how = self.how
        if isinstance(how, Activation):
            parts = [how.name]
        else:
            norm = [] if how.norm is None else [f"{how.norm.kind} norm"]
            parts = [*norm, *["residual"] * how.residual, how.activation.name]
        return f"{self.what}{' + '.join(parts)} of {self.channels} channels"

    def concerns(self, step: Step) -> bool:
        """The norm that follows a step is not part of it: one of as many channels, and its activation."""
        activation = self.how if isinstance(self.how, Activation) else self.how.activation
        return self.channels == step.spec.out_channels and activation == step.activation
