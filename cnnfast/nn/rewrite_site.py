"""A site of a traced graph: calls that follow each other, run as `cnnfast.Sequential` would run them as modules.

A site is made of values: functions, constants and the places of its operands. Tensors, weights among them, come with
every call, so that nothing can be stale. It is planned by `fusion` for the operands that it meets, and runs as a
`chain.Chain`, which runs the calls as they stand wherever that is better, or all that is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from .chain import Chain, chained
from .fusion import Unfused, plan_parts
from .fusion_conv import Part
from .layers import why_not_now
from .modules import Reading
from .rewrite_calls import CallKind

__all__ = ["Call", "Place", "Ref", "Site"]


class Ref(NamedTuple):
    """Stands for an operand in a call's arguments: its place, -1 for what the call before gave."""

    place: int


class Place(NamedTuple):
    """Where a call stands in the model: the path of its module, and file:line."""

    path: str
    line: str


@dataclass(frozen=True)
class Call:
    """One call as it stands: a function, or the name of a method, with `Ref` for the operands. ``through``: the name of
    the argument that the call before gives."""

    kind: CallKind
    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    through: str
    place: Place

    def run(self, x: Any, operands: Sequence[Any]) -> Any:
        """The call itself."""
        if self._flat:
            args: Any = [
                x if type(a) is Ref and a.place < 0 else operands[a.place] if type(a) is Ref else a for a in self.args
            ]
            kwargs = self.kwargs
        else:
            args, kwargs = _filled(self.args, x, operands), _filled(self.kwargs, x, operands)
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)

    @cached_property
    def _flat(self) -> bool:
        """Whether operands stand among the positional arguments alone, and not inside of one."""
        return not _refs(list(self.kwargs.values())) and not any(_refs(a) for a in self.args if type(a) is not Ref)

    def part(self, x: Any, operands: Sequence[Any]) -> Part:
        """As planning sees it; x: what the call before gave, None where that is not known."""
        bound = self.kind.bind(self.args, self.kwargs)
        assert bound is not None
        return self.kind.part({k: _filled(v, x, operands) for k, v in bound.items()} | {"through": self.through})

    @property
    def scalars(self) -> tuple[int, ...]:
        """The places of the operands that are part of no tensor list: numbers that change."""
        bound = self.kind.bind(self.args, self.kwargs)
        assert bound is not None
        tensors = {*self.kind.tensors, *self.kind.input}
        return tuple(r.place for name, v in bound.items() if name not in tensors for r in _refs(v) if r.place >= 0)


def _filled(v: Any, x: Any, operands: Sequence[Any]) -> Any:
    if isinstance(v, Ref):
        return x if v.place < 0 else operands[v.place]
    if isinstance(v, dict):
        return {k: _filled(w, x, operands) for k, w in v.items()}
    if isinstance(v, (list, tuple)):
        return type(v)([_filled(w, x, operands) for w in v])
    return v


def _refs(v: Any) -> list[Ref]:
    if isinstance(v, Ref):
        return [v]
    return [r for w in v for r in _refs(w)] if isinstance(v, (list, tuple)) else []


class _Bound:
    """A call with its operands, where a chain runs a module."""

    num_batches_tracked = None  # the graph counts the batches itself
    __slots__ = ("call", "operands", "padding_mode")

    def __init__(self, call: Call, operands: Sequence[Any]) -> None:
        self.call, self.operands = call, operands
        mode = call.kwargs.get("mode", call.args[2] if len(call.args) > 2 else "") if call.kind.name == "pad" else ""
        self.padding_mode = mode if mode in ("reflect", "replicate") else "zeros"  # see `chain._pads`

    def __call__(self, x: Any) -> Any:
        return self.call.run(x, self.operands)


class _Calls:
    """The list of them, each made when it is asked for."""

    __slots__ = ("calls", "operands")

    def __init__(self, calls: tuple[Call, ...], operands: Sequence[Any]) -> None:
        self.calls, self.operands = calls, operands

    def __getitem__(self, k: int) -> _Bound:
        return _Bound(self.calls[k], self.operands)


_MAX_PLANS = 64


@dataclass(eq=False)
class Site:
    """``calls`` on one input and the operands. ``ended``: why it takes in no more. ``off``: why it runs as it stands,
    or None; ``verified``: "yes", "no", or what was wrong: both are set by verification. ``channels_last``: the format
    of its result where that is not eager mode's by the input that it gets (`rewrite_layout`). ``ran``: how it ran the
    last time, or the reason why all calls ran as they stand."""

    calls: tuple[Call, ...]
    ended: str = ""
    off: str | None = None
    channels_last: bool | None = None
    verified: str = "no"
    ran: tuple[Chain | Unfused | str, ...] = ()
    _plans: dict[object, tuple[Chain | Unfused, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.__name__ = self.__qualname__ = "site"  # as FX writes it into code
        self._tensors = tuple(self._places(c) for c in self.calls)
        self._scalars = tuple(k for c in self.calls for k in c.scalars)
        first = self.calls[0]
        self._by_size = first.kind.name == "interpolate"

    @property
    def added(self) -> set[int]:
        """The places of the operands that are added to a convolution's result."""
        places = zip(self.calls, self._tensors, strict=True)
        return {k for call, own in places if call.kind.name == "add" for k in own if k is not None}

    @property
    def any_format(self) -> bool:
        """Whether its calls give the same numbers in any memory format: a dropout's mask follows the memory, and of
        channels-last maps ATen takes a batch's and a group's statistics less exactly."""
        names = {call.kind.name for call in self.calls}
        if "group_norm" in names or any("dropout" in name for name in names):
            return False
        norms = [call.kind.bind(call.args, call.kwargs) for call in self.calls if call.kind.name == "batch_norm"]
        return all(bound is not None and bound["training"] is False for bound in norms)

    @property
    def paths(self) -> list[str]:
        """Of its convolutions."""
        return [c.place.path for c in self.calls if c.kind.name.startswith("conv") and c.place.path]

    @staticmethod
    def _places(call: Call) -> tuple[int | None, ...]:
        part = call.kind.part(_AsRefs(call))
        return tuple(t.place if isinstance(t, Ref) else None for t in part.tensors)

    def __call__(self, x: Any, *operands: Any) -> Any:
        why = self.off or why_not_now(x)
        if why is not None:
            self.ran = (why,)
            for call in self.calls:
                x = call.run(x, operands)
            return x.contiguous() if self.channels_last is False else x
        tensors = [tuple([None if k is None else operands[k] for k in places]) for places in self._tensors]
        items = self._planned(x, operands, tensors)
        calls: Any = _Calls(self.calls, operands)
        reading = Reading(calls, [], tensors)
        self.ran = items
        for item in items:
            if isinstance(item, Chain):
                x = item.run(x, reading, self.channels_last if item is items[-1] else None)
            else:
                x = self.calls[item.slot].run(x, operands)
        return x.contiguous() if self.channels_last is False else x

    def _planned(self, x: Tensor, operands: Sequence[Any], tensors: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        seen = [
            (type(t), t.shape, t.stride(), t.dtype, t.device) if isinstance(t, Tensor) else t
            for c, own in zip(self.calls, tensors, strict=True)
            for t in own
            if c.kind.name != "add"  # a chain looks at that itself
        ]
        key = (*seen, *[operands[k] for k in self._scalars], tuple(x.shape[2:]) if self._by_size else None)
        items = self._plans.get(key)
        if items is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            parts = [c.part(x if k == 0 else None, operands) for k, c in enumerate(self.calls)]
            items = self._plans[key] = chained(plan_parts(parts, [False] * len(parts)))
        return items


class _AsRefs(dict[str, Any]):
    """The arguments of a call by name, for finding out which operands are its tensors."""

    def __init__(self, call: Call) -> None:
        bound = call.kind.bind(call.args, call.kwargs)
        assert bound is not None
        super().__init__(bound, through=call.through)
