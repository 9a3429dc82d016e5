"""A site of a traced graph: calls that follow each other, run as `cnnfast.Sequential` would run them as modules.

A site is made of values: functions, constants and the places of its operands. Tensors, weights among them, come with
every call, so that nothing can be stale. It is planned by `fusion` for the operands that it meets, and runs as a
`chain.Chain`, which runs the calls as they stand wherever that is better, or all that is right.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..gradients import enter_residual
from ..memory_format import reformatted
from .chain import Chain, chained
from .fusion import Unfused, plan_parts
from .fusion_conv import Part
from .layers import why_not_now
from .modules import Reading
from .rewrite_calls import AFFINE, CallKind
from .rewrite_norm import NORMS, NormCall, norm_of
from .rewrite_quick import Planned, Quick, Run, kind_of, parts_of, state_of

__all__ = ["Call", "Place", "Ref", "Site", "entered", "filled"]


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
            args, kwargs = filled(self.args, x, operands), filled(self.kwargs, x, operands)
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)

    @cached_property
    def _flat(self) -> bool:
        """Whether operands stand among the positional arguments alone, and not inside of one."""
        return not _refs(self.kwargs) and not any(_refs(a) for a in self.args if type(a) is not Ref)

    def part(self, x: Any, operands: Sequence[Any]) -> Part:
        """As planning sees it; x: what the call before gave, None where that is not known."""
        bound = self.kind.bind(self.args, self.kwargs)
        assert bound is not None
        return self.kind.part({k: filled(v, x, operands) for k, v in bound.items()} | {"through": self.through})

    def exactly(self, x: Any, operands: Sequence[Any]) -> Any:
        """`run`, of channels-last maps too with exact statistics."""
        if self.norm is None:
            return self.run(x, operands)
        function, weight, bias = self.norm
        return function(x, filled(weight, x, operands), filled(bias, x, operands))

    @cached_property
    def norm(self) -> tuple[NormCall, Any, Any] | None:
        """Of a norm by the statistics of each image, and where its weight and bias are."""
        bound = self.kind.bind(self.args, self.kwargs) if self.kind.name in NORMS else None
        norm = None if bound is None else norm_of(self.kind, bound)
        return None if bound is None or norm is None else (NormCall(norm), bound["weight"], bound["bias"])

    @property
    def in_place(self) -> bool:
        """Whether it writes its result to its first argument."""
        bound = self.kind.bind(self.args, self.kwargs)
        assert bound is not None
        name = self.target if isinstance(self.target, str) else getattr(self.target, "__name__", "")
        return bound.get("inplace") is True or name.endswith("_") or self.target in (operator.iadd, operator.imul)

    @property
    def reads(self) -> set[int]:
        """The places of its operands."""
        return {r.place for r in _refs([self.args, self.kwargs]) if r.place >= 0}

    @property
    def scalars(self) -> tuple[int, ...]:
        """The places of the operands that are part of no tensor list: numbers that change."""
        bound = self.kind.bind(self.args, self.kwargs)
        assert bound is not None
        tensors = {*self.kind.tensors, *self.kind.input}
        if self.kind.name == "add":
            tensors.add("other")
        return tuple(r.place for name, v in bound.items() if name not in tensors for r in _refs(v) if r.place >= 0)


def filled(v: Any, x: Any, operands: Sequence[Any]) -> Any:
    """An argument with what its `Ref` stand for: x, what the call before gave, or one of the operands."""
    if isinstance(v, Ref):
        return x if v.place < 0 else operands[v.place]
    if isinstance(v, dict):
        return {k: filled(w, x, operands) for k, w in v.items()}
    if isinstance(v, (list, tuple)):
        return type(v)([filled(w, x, operands) for w in v])
    return v


def _refs(v: Any) -> list[Ref]:
    if isinstance(v, Ref):
        return [v]
    within = v.values() if isinstance(v, dict) else v if isinstance(v, (list, tuple)) else ()
    return [r for w in within for r in _refs(w)]


class _Bound:
    """A call with its operands, where a chain runs a module."""

    num_batches_tracked = None  # the graph counts the batches itself
    __slots__ = ("call", "operands", "padding_mode", "run")

    def __init__(self, call: Call, operands: Sequence[Any], run: Run) -> None:
        self.call, self.operands, self.run = call, operands, run
        mode = call.kwargs.get("mode", call.args[2] if len(call.args) > 2 else "") if call.kind.name == "pad" else ""
        self.padding_mode = mode if mode in ("reflect", "replicate") else "zeros"  # see `eager_layout.pads`

    def __call__(self, x: Any) -> Any:
        return self.run(x, self.operands)


class _Calls:
    """The list of them, each made when it is asked for."""

    __slots__ = ("calls", "operands", "runs")

    def __init__(self, calls: tuple[Call, ...], operands: Sequence[Any], runs: Sequence[Run]) -> None:
        self.calls, self.operands, self.runs = calls, operands, runs

    def __getitem__(self, k: int) -> _Bound:
        return _Bound(self.calls[k], self.operands, self.runs[k])


def entered(t: Any) -> Any:
    """What is added, whichever way: to maps that may be channels-last where eager mode's are not."""
    return enter_residual(t, True) if isinstance(t, Tensor) and t.dim() in (4, 5) else t


_MAX_PLANS = 64


@dataclass(eq=False)
class Site:
    """``calls`` on one input and the operands. ``ended``: why it takes in no more. ``off``: why it runs as it stands,
    or None; ``verified``: "yes", "no", or what was wrong: both are set by verification. ``channels_last``: the format
    of its result where that is not eager mode's by the input that it gets, and ``converts``: its input becomes
    channels-last, ``given_contiguous``: and is not so in eager mode (`rewrite_layout`). ``ran``: how it ran the last
    time, or the reason why all calls ran as they stand."""

    calls: tuple[Call, ...]
    ended: str = ""
    channels_last: bool | None = None
    converts: bool = False
    given_contiguous: bool = True
    verified: str = "no"
    ran: tuple[Chain | Unfused | str, ...] = ()
    _off: str | None = None
    _plans: dict[object, tuple[Chain | Unfused, ...]] = field(default_factory=dict, repr=False)

    switched: ClassVar[int] = 0  # times that any was switched on or off

    def __post_init__(self) -> None:
        self.__name__ = self.__qualname__ = "site"  # as FX writes it into code
        self._tensors = tuple(self._places(c) for c in self.calls)
        self._scalars = tuple(k for c in self.calls for k in c.scalars)
        first = self.calls[0]
        self._by_size = first.kind.name == "interpolate"
        self._modulated = any(c.kind.name in AFFINE for c in self.calls)
        self._added = tuple(self.added)
        self._quick: dict[tuple[object, ...], Quick] = {}
        self._tries = 0

    @property
    def off(self) -> str | None:
        return self._off

    @off.setter
    def off(self, why: str | None) -> None:
        self._off = why
        Site.switched += 1

    def known(self, now: object) -> Quick | None:
        """How it runs in this state (`rewrite_quick.state`), where it ran in one way alone."""
        found = [quick for kind, quick in self._quick.items() if state_of(kind) == now]
        return found[0] if len(found) == 1 and self.off is None else None

    @property
    def added(self) -> set[int]:
        """The places of the operands that are added to a convolution's result."""
        places = zip(self.calls, self._tensors, strict=True)
        return {k for call, own in places if call.kind.name == "add" for k in own if k is not None}

    @property
    def leading(self) -> list[int]:
        """The places of those that are a sum's first operand."""
        places = zip(self.calls, self._tensors, strict=True)
        return [own[0] for c, own in places if c.kind.name == "add" and c.through == "other" and own[0] is not None]

    def any_format(self, inference: bool = False) -> bool:
        """Whether its calls give the same numbers in any memory format: a dropout's mask follows the memory, and of
        channels-last maps ATen takes a batch's and a group's statistics less exactly (in ``inference`` a group's are
        not its)."""
        names = {call.kind.name for call in self.calls}
        if "group_norm" in names and not inference:
            return False
        modal = (c for c in self.calls if c.kind.name == "batch_norm" or "dropout" in c.kind.name)
        bound = [c.kind.bind(c.args, c.kwargs) for c in modal]
        return all(b is not None and b["training"] is False for b in bound)

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
            if self.channels_last is not None and self.given_contiguous:
                x = x.contiguous()
            for call in self.calls:
                x = call.run(x, operands)
            return x.contiguous() if self.channels_last is False else x
        if self.converts and x.dim() > 3:  # of one dimension, where its chain gains by it
            x = reformatted(x, True)
        if self._added and torch.is_grad_enabled():
            operands = tuple([entered(t) if k in self._added else t for k, t in enumerate(operands)])
        kind = self._kind(x, operands)
        known = None if kind is None else self._quick.get(kind)
        if known is not None and known.holds(operands):
            x = known.run(x, operands)
            return reformatted(x, False) if self.channels_last is False else x
        tensors = [tuple([None if k is None else operands[k] for k in places]) for places in self._tensors]
        items = self._planned(x, operands, tensors)
        calls: Any = _Calls(self.calls, operands, self.runs)
        reading = Reading(calls, [], tensors)
        self.ran = items
        parts: list[Planned] | None = None if kind is None or self._tries >= _MAX_PLANS else []
        for item in items:
            last = self.channels_last
            if item is not items[-1]:  # of one dimension, eager mode's would be contiguous
                last = (self.converts if x.dim() > 3 else last is not None) or None
            if parts is not None:
                parts = self._noted(parts, item, x, operands, reading, last)
            if isinstance(item, Chain):
                x = item.run(x, reading, last)
            else:
                x = self.runs[item.slot](x, operands)
        if kind is not None and parts:
            self._tries += 1  # a computed weight is another one at each call
            self._quick[kind] = Quick.of(parts, operands, self._added)
        return reformatted(x, False) if self.channels_last is False else x

    @cached_property
    def runs(self) -> list[Run]:
        """Each call, as it runs where it is no part of a step."""
        return [call.exactly if self.converts else call.run for call in self.calls]

    def _kind(self, x: Tensor, operands: Sequence[Any]) -> tuple[object, ...] | None:
        """Of a call that `rewrite_quick` may know; None of others."""
        if self._scalars or self._modulated or not all(isinstance(operands[k], Tensor) for k in self._added):
            return None
        return kind_of(x, operands, self._added)

    def _noted(
        self, parts: list[Planned], item: Any, x: Tensor, operands: Sequence[Any], reading: Reading, last: bool | None
    ) -> list[Planned] | None:
        """``parts`` with how this item runs."""
        if not isinstance(item, Chain):
            return [*parts, Planned(None, None, (), False, False, (self.runs[item.slot],))]
        bound = item.bind(x, reading, last)
        if torch.is_grad_enabled() and not isinstance(bound, str):
            return None
        more = parts_of(item, bound, x, operands, self._tensors, self.runs)
        return None if more is None else [*parts, *more]

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
