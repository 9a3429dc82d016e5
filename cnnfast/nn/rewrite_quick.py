"""A site on a CPU, met again with the same kind of input and the same operands: its steps in inference, or its calls as
they stand with gradients, too, without asking everything anew.

A step of a model takes a millisecond and goes through memory that is larger than the caches, after which a hundred
microseconds of Python are a tenth of it. What was decided still holds; what the operands hold is compared on every call
as ever (`cpu.packing`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cpu import inference, training, tuned
from ..cpu.isa import process
from ..dispatch import by_kernels, on_cpu, resolve_backend
from ..memory_format import format_of, in_rows, reformatted
from ..ops.run import run_step
from ..step import Operands, Step
from .chain import Bound, Chain

__all__ = ["Planned", "Quick", "Run", "kind_of", "parts_of", "state", "state_of"]


def state() -> tuple[object, ...]:
    """What decisions hold for, of the process."""
    autocast = torch._C._is_any_autocast_enabled()
    low = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") if autocast else None
    switches = autocast, low, torch._C._get_mkldnn_enabled()
    return process(), tuned.generation(), resolve_backend(None), switches


def kind_of(x: Tensor, operands: Sequence[Any], added: Sequence[int]) -> tuple[object, ...]:
    """What decisions hold for, beside the operands that are not ``added``."""
    more = [(operands[k].shape, operands[k].stride(), operands[k].dtype) for k in added]
    needs = torch.is_grad_enabled() and tuple([isinstance(t, Tensor) and t.requires_grad for t in (x, *operands)])
    return x.shape, x.stride(), x.dtype, needs, state(), *more


def state_of(kind: tuple[object, ...]) -> object:
    """The `state` in it."""
    return kind[4]


Run = Callable[[Any, Sequence[Any]], Any]
_PLAIN = nullcontext()


class Planned(NamedTuple):
    """A ``step``, of ``one`` dimension or more; ``places`` of its operands among the site's, from the weight on;
    whether its weight is ``packed``, or it is ``plain``: PyTorch's own convolution of channels-last maps, then a norm
    of each image. Or ``calls`` that run as they stand, on an input that ``converts`` to channels-last.
    ``channels_last``: the result. ``low``: autocast's dtype, under which the step runs, or None."""

    step: Step | None
    channels_last: bool | None
    places: tuple[int | None, ...]
    packed: bool
    one: bool
    calls: tuple[Run, ...] = ()
    converts: bool = False
    low: torch.dtype | None = None
    plain: bool = False

    def met(self, shape: Sequence[int], x: Tensor, operands: Sequence[Any]) -> Planned:
        """This for inputs of ``shape``, otherwise like x, and these operands: whether a weight is packed depends on
        whose memory it is, too."""
        if self.step is None or self.calls:
            return self
        like = x.new_empty(shape, dtype=self.low).contiguous(memory_format=format_of(len(shape), True))
        o = Operands(like, *[None if k is None else operands[k] for k in self.places])  # type: ignore[arg-type]
        o = o._replace(weight=in_rows(o.weight)) if self.one else o
        if self.step.measured:
            return self._replace(plain=not self.one and self.low is None and training.is_plain(self.step, o))
        return self._replace(packed=inference.why_not(self.step, o, bool(self.channels_last)) is None)

    def again(self, x: Tensor, operands: Sequence[Any]) -> Planned:
        """This for other operands of the same kind, and its input x."""
        return self.met(_in_rows(x.shape, self.one), x, operands)

    def operands(self, x: Tensor, operands: Sequence[Any]) -> Operands:
        """Those of the step. (A bias that autocast would round is left to who packs it, or to `finished`.)"""
        x = x if self.low is None else x.to(self.low)
        o = Operands(x, *[None if k is None else operands[k] for k in self.places])  # type: ignore[arg-type]
        if self.low is not None and o.slope is not None:
            o = o._replace(slope=o.slope.to(self.low))
        if not self.one:
            return o
        residual = None if o.residual is None else o.residual.unsqueeze(2)
        return o._replace(x=x.unsqueeze(2), weight=in_rows(o.weight), residual=residual)

    def run(self, x: Tensor, operands: Sequence[Any]) -> Tensor:
        step, last = self.step, self.channels_last
        if step is None or self.calls:
            x = reformatted(x, True) if self.converts else x
            for call in self.calls:
                x = call(x, operands)
            return x if last is None else reformatted(x, last)
        with self.context():
            o = self.operands(x, operands)
            return self.finished(o, inference.run(step, o, bool(last)) if self.packed else None)

    def context(self) -> AbstractContextManager[object]:
        """What the step runs in: autocast has chosen its dtypes."""
        return _PLAIN if self.low is None else torch._C._DisableAutocast()

    def finished(self, o: Operands, y: Tensor | None) -> Tensor:
        """The result, where a packed weight gave y, or, with None, gave nothing."""
        assert self.step is not None
        if y is None:
            if self.low is not None and o.bias is not None:
                o = o._replace(bias=o.bias.to(self.low))
            y = run_step(self.step, o, channels_last=self.channels_last)
        return y.squeeze(2) if self.one else y


def _in_rows(shape: Sequence[int], one: bool) -> tuple[int, ...]:
    return (*shape[:2], 1, shape[2]) if one else tuple(shape)


class Quick(NamedTuple):
    """``same``: operands that must be these."""

    parts: tuple[Planned, ...]
    same: tuple[tuple[int, weakref.ref[Tensor]], ...]

    @staticmethod
    def of(parts: Sequence[Planned], operands: Sequence[Any], added: Sequence[int]) -> Quick:
        same = [(k, weakref.ref(t)) for k, t in enumerate(operands) if k not in added and isinstance(t, Tensor)]
        return Quick(tuple(parts), tuple(same))

    def holds(self, operands: Sequence[Any]) -> bool:
        """Whether these operands have come again."""
        return all(operands[k] is ref() for k, ref in self.same)

    def run(self, x: Tensor, operands: Sequence[Any]) -> Tensor:
        for part in self.parts:
            x = part.run(x, operands)
        return x


def parts_of(
    chain: Chain,
    bound: Bound | str,
    x: Tensor,
    operands: Sequence[Any],
    tensors: Sequence[tuple[int | None, ...]],
    calls: Sequence[Run],
) -> list[Planned] | None:
    """How ``chain`` runs as ``bound`` says; ``tensors``: the places of each slot's; ``calls``: each slot as it stands.
    None where it is more than these."""
    if isinstance(bound, str):
        return [Planned(None, None, (), False, False, tuple(calls[k] for k in chain.slots))]
    if bound.both or not on_cpu(x) or by_kernels(x, resolve_backend(None)):
        return None
    one = chain.steps[0].ndim == 1
    shape = _in_rows(x.shape, one)
    parts: list[Planned] = []
    for s, run in zip(chain.steps, bound.runs, strict=True):
        rule = s.rule
        if run.wide or run.apart or one and run.as_modules is not None:
            return None
        if rule is not None and (rule.updates or rule.counts or rule.synchronised):
            return None
        norm = (None,) * 4 if s.norm is None else tensors[s.norm]
        if s.step.measured:
            norm = (None, None, *norm[2:])
        more = [None if k is None else tensors[k][0] for k in (s.residual, s.slope)]
        places = (*tensors[s.conv], *norm, *more)
        as_modules = tuple(calls[k] for k in s.slots) if run.as_modules is not None else ()
        first = bound.convert and bool(as_modules) and not parts
        part = Planned(s.step, run.channels_last, places, False, one, as_modules, first, bound.low)
        parts.append(part.met(shape, x, operands))
        shape = (shape[0], s.step.spec.out_channels, *s.step.output_size(shape[2:]))
    return parts
