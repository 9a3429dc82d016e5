"""A fused step in inference with its weight packed: what follows from that is decided once, and little is left to do
in a call. (Between convolutions that empty the caches a function of Python takes ten times as long as in a loop.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

import torch

from ..memory_format import convert, format_of
from ..step import Operands, Step
from .finish import activated
from .isa import lowered_products
from .onednn import Convolution, Method, PostOp
from .weight import summed_weight

__all__ = ["Call", "Packed", "packed"]

_MAX_CALLS = 16  # that are kept with one packed weight


class Packed:
    """The ``weight`` of a step as its method wants it, whether all of it is ``finite``, and the ``calls`` by it, for
    each size of an input that one is."""

    __slots__ = ("calls", "finite", "weight")

    def __init__(self, weight: object, finite: bool) -> None:
        self.weight, self.finite = weight, finite
        self.calls: dict[Hashable, Call] = {}

    def keep(self, key: Hashable, call: Call) -> None:
        if len(self.calls) >= _MAX_CALLS:
            self.calls.clear()
        self.calls[key] = call


def packed(method: Method, step: Step, o: Operands) -> Packed:
    """The weight of ``step`` for ``method``, with the scale of a norm in it and its shift beside it. (Of an input in 16
    bits, a float32 bias is rounded first, as autocast does.)"""
    if o.bias is not None and o.bias.dtype != o.x.dtype:
        o = o._replace(bias=o.bias.to(o.x.dtype))
    weight, u = o.weight.detach().float(), step.upsample
    if u is not None:
        weight = summed_weight(weight, u.scale, step.spec.groups, lowered=lowered_products())
    scale, shift = o.folded(step.norm)
    if scale is not None:
        s = step.spec
        if s.transposed:  # (C_in, C_out/g, *kernel): the input channels of a group share that group's outputs
            rows = scale.view(s.groups, 1, -1).expand(-1, s.in_channels // s.groups, -1)
            weight = weight * rows.reshape(s.in_channels, -1, *(1,) * s.ndim)
        else:
            weight = weight * scale.view(-1, *(1,) * (s.ndim + 1))
    if shift is not None and (shift is o.bias or shift is o.shift):
        shift = shift.detach().clone()  # an operator may ask for it as if to write to it, which ends a watch
    finite = math.isfinite(weight.sum().item()) and (shift is None or math.isfinite(shift.sum().item()))
    return Packed(method.pack(weight, shift), finite)


class Call:
    """``step`` by ``method``, of whatever is given. ``post``: its activation as the method has it; ``check_pays``:
    whether reading x for NaNs pays where that would lose one; ``channels_last``: the format of the result."""

    def __init__(
        self, step: Step, method: Method, post: PostOp, check_pays: bool, found: Packed, channels_last: bool
    ) -> None:
        dims = step.spec.ndim + 2
        self._step, self._method, self._channels_last = step, method, channels_last
        self._weight = found.weight  # not ``found``, which keeps this: it would be garbage to collect
        self._dtype, self._last, self._result = method.dtype, format_of(dims, True), format_of(dims, channels_last)
        self._pads, self._activates = any(step.pad), step.activation.name != "identity"
        self._post = post if post.fused and method.takes_post and not step.residual else PostOp()
        # leaky_relu's slope of 0 loses a NaN, too.
        self._checks = self._post.fused and (step.activation.row.loses_nan or self._post.scalars == (0.0,))
        if self._checks and not (check_pays and found.finite):
            self._checks, self._post = False, PostOp()
        self._plain = self._with(PostOp())
        self._fused = self._with(self._post)

    def _with(self, post: PostOp) -> Callable[[torch.Tensor], torch.Tensor | None]:
        return self._method.bound(self._weight, post, self._channels_last)

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, slope: torch.Tensor | None, onto: bool
    ) -> torch.Tensor | None:
        """None where the method has none for this x. ``onto``: the result may be written into the memory of
        ``residual``."""
        dtype = x.dtype
        if self._pads:
            x = self._step.pad_input(x)
        if x.dtype != self._dtype or not x.is_contiguous(memory_format=self._last):
            x = convert(x, self._dtype, True)
        y, fused = None, False
        if residual is not None:
            if isinstance(self._method, Convolution):
                y = self._method.run_adding(x, self._weight, residual, onto)
            if y is None:
                y = self._plain(x)
                y = None if y is None else y.float().add_(residual)
        elif slope is not None:
            post = self._of_slope(slope)
            fused = post.fused
            y = (self._with(post) if fused else self._plain)(x)
        else:
            fused = self._post.fused and (not self._checks or _finite(x))
            y = (self._fused if fused else self._plain)(x)
        if y is None:
            return None
        if self._activates and not fused:
            y = activated(y, self._step.activation, slope)
        if y.dtype != dtype or not y.is_contiguous(memory_format=self._result):
            y = convert(y, dtype, self._channels_last)
        return y.detach() if y._is_view() else y  # autograd lets nobody write to a view that was made without gradients

    def _of_slope(self, slope: torch.Tensor) -> PostOp:
        """PReLU's activation on the accumulator."""
        if slope.numel() == 1 and self._method.takes_post:
            value = slope.item()
            if value and math.isfinite(value):
                return PostOp("leaky_relu", (value,), "", True)
        return PostOp()


def _finite(x: torch.Tensor) -> bool:
    return math.isfinite(x.sum(dtype=torch.float32 if x.dtype == torch.float16 else None).item())
