"""A graph of fixed sizes, once its sites have run: what they decided holds while `rewrite_quick.state` does, and is
written into the graph, so that nothing is asked on later calls but whether weights are what they were.

A step of a site becomes one node; calls that run as they stand become these calls again, between the conversions that
keep a stretch: none of our Python runs then (20 us for each), and the memory of what a call is given is free after it,
as in eager mode, so that the next call gets it again (a map in new pages costs more than the pass over it).
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..cpu import inference, training
from ..cpu.weight import KeptLike, outlives
from ..memory_format import reformatted
from .rewrite_effects import value
from .rewrite_norm import NormCall
from .rewrite_quick import Planned, Quick, Run
from .rewrite_site import Call, Site, entered, filled
from .rewrite_spare import Memory
from .rewrite_weights import Computed

__all__ = ["settled"]


def settled(gm: fx.GraphModule, now: object, *, gradients: bool) -> Callable[..., Any] | None:
    """The graph as a function, with each site as it ran in the state ``now``; None where that is known of none.
    ``gradients``: it was traced with them."""
    sites = [node for node in gm.graph.nodes if isinstance(node.target, Site)]
    known = {node: node.target.known(now) for node in sites}
    if not any(known.values()):
        return None
    writer = _Writer(gradients, None if gradients else Memory(gm.graph))
    new: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        quick = known.get(node)
        if quick is None:
            new[node] = writer.graph.node_copy(node, new.__getitem__)
            writer.hold(new[node])
            if isinstance(node.target, NormCall):
                new[node].target = writer.norm(node.target)
        else:
            new[node] = writer.site(node, quick, [new[n] for n in node.args])
    writer.look_ahead()
    writer.graph.lint()
    return fx.GraphModule(gm, writer.graph).forward


class _Writer:
    """Writes ``graph``. ``memory``: of the graph that it is written of, where its maps are needed by no gradient."""

    def __init__(self, gradients: bool, memory: Memory | None) -> None:
        self.graph, self.gradients, self._memory = fx.Graph(), gradients, memory
        self._ahead: list[tuple[fx.Node, list[fx.Node | None]]] = []

    def hold(self, node: fx.Node) -> None:
        """Have it known whether the sources of a computed weight are what they were."""
        if isinstance(node.target, Computed) and not (self.gradients or torch._C._is_any_autocast_enabled()):
            self._look(node, list(node.args))  # type: ignore[arg-type]

    def site(self, node: fx.Node, quick: Quick, args: Sequence[fx.Node]) -> fx.Node:
        """What `Site.__call__` does in such a case, as nodes."""
        site: Site = node.target  # type: ignore[assignment]
        call = self.graph.call_function
        x, *operands = args
        if site.converts and value(node.args[0]).dim() > 3:
            x = call(reformatted, (x, True))
        if self.gradients:
            operands = [call(entered, (t,)) if k in site.added else t for k, t in enumerate(operands)]
        calls = dict(zip(site.runs, site.calls, strict=True))
        for k, part in enumerate(quick.parts):
            if part.plain:
                x = self._plain(part, call(reformatted, (x, True)), operands)
                continue
            if part.step is not None and not part.calls:
                used = list(dict.fromkeys(p for p in part.places if p is not None))
                step = _Settled(part, used, dict(quick.same), self._onto(node, quick, k, calls))
                x = call(step, (x, *[operands[p] for p in used]))
                self._look(x, [None if p is None else operands[p] for p in part.places[:_LOOKED_AT]])
                continue
            if part.converts:
                x = call(reformatted, (x, True))
            for run in part.calls:
                x = self._call(calls[run], x, operands, exactly=site.converts)
            if part.step is not None and part.channels_last is not None:
                x = call(reformatted, (x, part.channels_last))
        return call(reformatted, (x, False)) if site.channels_last is False else x

    def norm(self, norm: NormCall, *, ours: bool = False) -> Callable[..., Tensor]:
        """What calls ``norm``, as `_SettledNorm` where no gradient is wanted."""
        return norm if self.gradients else _SettledNorm(norm, ours=ours)

    def _plain(self, part: Planned, x: fx.Node, operands: Sequence[fx.Node]) -> fx.Node:
        """Such a step of a channels-last x as its calls: none of our Python between them."""
        step, call = part.step, self.graph.call_function
        assert step is not None and step.norm is not None
        weight, bias, _, _, scale, shift, *_ = (None if k is None else operands[k] for k in part.places)
        assert weight is not None
        spec, weight = step.spec, self._in_format(x, weight)
        x = call(F.conv2d, (x, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups))
        norm = self.norm(NormCall(step.norm, step.activation, channels_last=True), ours=True)
        x = call(norm, (x, scale, shift))
        return x if part.channels_last else call(reformatted, (x, False))

    def _onto(self, node: fx.Node, quick: Quick, k: int, calls: Mapping[Run, Call]) -> bool:
        """Whether a site's step ``k`` may write its result into the memory of the map that it adds."""
        place, _ = quick.parts[k].places[_LOOKED_AT:]
        if place is None or self._memory is None:
            return False
        for p in (*quick.parts[:k], *quick.parts[k + 1 :]):
            if place in p.places or any(place in calls[run].reads for run in p.calls):
                return False
        added: fx.Node = node.args[1 + place]  # type: ignore[assignment]
        read_first = any(p.step is not None and not p.calls for p in quick.parts[:k])
        return self._memory.spare(added, node, read_first=read_first)

    def _call(self, call: Call, x: fx.Node, operands: Sequence[fx.Node], *, exactly: bool) -> fx.Node:
        """What `Call.exactly` does, or `Call.run`."""
        if exactly and call.norm is not None:
            function, weight, bias = call.norm
            args: Any = (x, filled(weight, x, operands), filled(bias, x, operands))
            return self.graph.call_function(self.norm(function), args)
        operands = operands if self.gradients else self._kept(call, x, operands)
        args, kwargs = (filled(a, x, operands) for a in (call.args, call.kwargs))
        if isinstance(call.target, str):
            return self.graph.call_method(call.target, args, kwargs)
        return self.graph.call_function(call.target, args, kwargs)

    def _kept(self, call: Call, x: fx.Node, operands: Sequence[fx.Node]) -> Sequence[fx.Node]:
        """The operands of a convolution with its weight as `KeptLike` has it. (Autocast keeps a Parameter in another
        dtype; what is made of one it would cast in every call.)"""
        bound = call.kind.bind(call.args, call.kwargs) if call.kind.name in _WITH_WEIGHT else None
        place = -1 if bound is None or torch._C._is_any_autocast_enabled() else bound["weight"].place
        if place < 0:
            return operands
        kept = self._in_format(x, operands[place])
        return [kept if k == place else t for k, t in enumerate(operands)]

    def _in_format(self, x: fx.Node, weight: fx.Node) -> fx.Node:
        """``weight`` as `KeptLike` has it of a convolution of x."""
        if not _keeps(weight) or not outlives(value(weight)):
            return weight
        kept = self.graph.call_function(KeptLike(), (x, weight))
        self._look(kept, [weight])
        return kept

    def _look(self, node: fx.Node, tensors: list[fx.Node | None]) -> None:
        """Have it known ahead of ``node`` whether these tensors are what they were: at the start of the graph where
        they are there. (What a graph writes to is known of in none of its calls: each ends the watch.)"""
        if all(t is None or t.op == "placeholder" for t in tensors):
            self._ahead.append((node, tensors))
        else:
            with self.graph.inserting_before(node):
                self._looked([(node, tensors)])

    def look_ahead(self) -> None:
        """Write what the nodes so far want to know at the start."""
        if self._ahead:
            inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
            with self.graph.inserting_after(inputs[-1]):
                self._looked(self._ahead)

    def _looked(self, of: list[tuple[fx.Node, list[fx.Node | None]]]) -> None:
        looks = _Looks([(node.target.held, len(tensors)) for node, tensors in of])  # type: ignore[union-attr]
        found = self.graph.call_function(looks, tuple([t for _, tensors in of for t in tensors]))
        for k, (node, _) in enumerate(of):
            with self.graph.inserting_before(node):
                node.update_kwarg("found", self.graph.call_function(operator.getitem, (found, k)))


_WITH_WEIGHT = ("conv2d", "conv_transpose2d")
_LOOKED_AT = 6  # of a step's operands, those that are packed: weight, bias, mean, var, scale and shift


def _keeps(weight: fx.Node) -> bool:
    """Whether it may be the same tensor in the next call."""
    return weight.op == "placeholder" or isinstance(weight.target, Computed)


class _Looks:
    """For each step, what is packed of its weight and vectors, where it is known that these are what they were. One
    loop, which stays in the cache: between convolutions, each step's own would take ten times as long."""

    __name__ = __qualname__ = "looks"  # as FX writes it into code

    def __init__(self, of: list[tuple[Callable[..., Any], int]]) -> None:
        self._of = of

    def __call__(self, *tensors: Tensor | None) -> list[Any]:
        found, at = [], 0
        for held, count in self._of:
            found.append(held(*tensors[at : at + count]))
            at += count
        return found


class _SettledNorm:
    """A norm of one graph, without gradients: of maps that lie as those did that it was seen to finish at once.
    ``ours``: nobody else reads them."""

    __name__ = __qualname__ = "norm"  # as FX writes it into code

    def __init__(self, call: NormCall, *, ours: bool) -> None:
        self._call, self._ours = call, ours
        self._strides: tuple[int, ...] | None = None

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if x.stride() == self._strides:
            return self._call.finished(x, weight, bias, ours=self._ours)
        if self._call.finishes(x, weight, bias):
            self._strides = x.stride()
        return self._call(x, weight, bias)


class _Settled:
    """One fused step, of the operands that are ``used`` by it; ``same``: which those were. ``onto``: its result may be
    written into the memory of what it adds."""

    __name__ = __qualname__ = "step"  # as FX writes it into code

    def __init__(self, part: Planned, used: list[int], same: dict[int, weakref.ref[Tensor]], onto: bool) -> None:
        self._part = part = part._replace(places=tuple([None if k is None else used.index(k) for k in part.places]))
        self._residual, self._slope = part.places[_LOOKED_AT:]
        self._weight, self._onto = same[used[0]], onto
        self._ready: inference.Ready | training.Ready | None = None

    def held(self, *tensors: Tensor | None) -> tuple[inference.Ready | training.Ready, Any] | None:
        """What is packed of weight and vectors that are known to be what they were, and who runs with it."""
        ready = self._ready  # read once: another thread may set it
        found = None if ready is None else ready.held(*tensors)
        return None if ready is None or found is None else (ready, found)

    def __call__(
        self, x: Tensor, *operands: Tensor, found: tuple[inference.Ready | training.Ready, Any] | None
    ) -> Tensor:
        if self._part.low is None:
            return self._run(x, operands, found)
        with self._part.context():
            return self._run(x, operands, found)

    def _run(
        self, x: Tensor, operands: Sequence[Tensor], found: tuple[inference.Ready | training.Ready, Any] | None
    ) -> Tensor:
        part, weight = self._part, operands[0]
        if found is not None:
            ready, packed = found
            if isinstance(ready, training.Ready):
                o = part.operands(x, operands)
                return part.finished(o, ready.run(o, packed))
            residual = None if self._residual is None else operands[self._residual]
            slope = None if self._slope is None else operands[self._slope]
            given = x
            if part.low is not None:
                given, slope = x.to(part.low), None if slope is None else slope.to(part.low)
            if not part.one:
                y = ready.run_with(packed, given, residual, slope, self._onto)
            else:
                residual = None if residual is None else residual.unsqueeze(2)
                y = ready.run_with(packed, given.unsqueeze(2), residual, slope, self._onto)
                y = None if y is None else y.squeeze(2)
            return part.finished(part.operands(x, operands), None) if y is None else y
        if weight is not self._weight():  # of the same kind, as the graph's guards say
            part = self._part = part.again(x, operands)
            self._weight, self._ready = weakref.ref(weight), None
        o = part.operands(x, operands)
        if self._ready is None:
            step, last = part.step, bool(part.channels_last)
            assert step is not None
            self._ready = inference.ready(step, o, last) if part.packed else training.Ready.of(step, o, last)
        if isinstance(self._ready, inference.Ready):
            return part.finished(o, self._ready.run(o, self._onto))
        return part.finished(o, None if self._ready is None else self._ready.run(o))
