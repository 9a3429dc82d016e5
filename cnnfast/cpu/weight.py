"""The weight of an upsampling + convolution on a CPU: one matrix product, differentiable."""

from __future__ import annotations

import math
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from ..memory_format import format_of, has_both, is_channels_last
from ..spec import summed_taps
from .packing import Leased, why_not_cacheable

__all__ = ["KeptLike", "outlives", "summed_weight"]


# --- in the format of the maps ----------------------------------------------------------------------------------------

_LEAST_KEPT = 2**12  # numbers, less than which ATen brings into another format as fast as they are looked up


class KeptLike:
    """A convolution's weight, of which no gradient is needed, in channels-last where its input is: ATen would copy a
    contiguous one on every call. The copy is kept as a packed weight is, from the second call on."""

    __name__ = __qualname__ = "kept_like"  # as FX writes it into code

    def __init__(self) -> None:
        self._leased = Leased()
        self._strides: tuple[int, ...] | None = None  # of an input that is channels-last

    def held(self, weight: Tensor) -> Tensor | None:
        """What is kept of ``weight``, where it is known that nobody has written to it since."""
        return self._leased.held(weight)

    def __call__(self, x: Tensor, weight: Tensor, found: Tensor | None = None) -> Tensor:
        """``found``: what `held` just gave."""
        if x.stride() == self._strides:
            kept = self._leased.held(weight) if found is None else found
            if kept is not None:
                return kept
        elif x.dim() == 4 and is_channels_last(x) and outlives(weight):
            self._strides = x.stride()
        else:
            return weight
        if why_not_cacheable(weight) is not None:
            return weight
        kept = self._leased.get(weight, _key, (), lambda: _copied(weight))
        return weight if kept is None else kept


def _key() -> str:
    return "channels_last"


def outlives(weight: Tensor) -> bool:
    """Whether a copy of ``weight`` in channels-last is worth keeping."""
    large = weight.dim() == 4 and weight.numel() >= _LEAST_KEPT
    return large and weight.is_contiguous() and not has_both(weight.shape[1], weight.shape[2:])


def _copied(weight: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # kept for calls in other modes, too
        return weight.detach().clone(memory_format=format_of(4, True))


# --- of an upsampling -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _sums(kernel: tuple[int, ...], scale: tuple[int, ...]) -> Tensor:
    """(taps, taps of the collapsed weight) zeros and ones: which each of these sums."""
    with torch.inference_mode(False):  # kept for later calls, whatever mode or default device this one is in
        each = [
            torch.tensor(
                [[float(t in taps) for t in range(k)] for taps in summed_taps(k, r)], dtype=torch.float32, device="cpu"
            )
            for k, r in zip(kernel, scale, strict=True)
        ]
        return reduce(torch.kron, each).t().contiguous()


class _Product(torch.autograd.Function):
    """``a @ b`` for a constant b. (A product's own derivative is lowered by autocast, where the backward runs under it;
    a convolution's is not.)"""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.b = b
        return torch.mm(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch._C._DisableAutocast():
            return torch.mm(grad, ctx.b.t()), None


def summed_weight(weight: Tensor, scale: tuple[int, ...], groups: int, *, lowered: bool = False) -> Tensor:
    """`reference.collapse_weight` as one matrix product, in float32 and rounded once: (C_out, C_in/g, *kernel) ->
    (C_in, C_out/g, *(k + r - 1)). ``lowered``: float32 products are not exact here, float64's are."""
    c_out, c_in, *kernel = weight.shape
    size = [k + r - 1 for k, r in zip(kernel, scale, strict=True)]
    w = weight.reshape(groups, c_out // groups, c_in, -1).transpose(1, 2)
    sums = _sums(tuple(kernel), tuple(scale))
    w, sums = (w.double(), sums.double()) if lowered else (w.float(), sums)
    w = _Product.apply(w.reshape(-1, math.prod(kernel)), sums)
    return w.to(weight.dtype).view(groups * c_in, c_out // groups, *size)
