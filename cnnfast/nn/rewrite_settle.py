"""A graph of fixed sizes, once its sites have run: what they decided holds while `rewrite_quick.state` does, and is
written into the graph, so that nothing is asked on later calls but whether weights are what they were.

A step of a site becomes one node; calls that run as they stand become these calls again, between the conversions that
keep a stretch: none of our Python runs then (20 us for each), and the memory of what a call is given is free after it,
as in eager mode, so that the next call gets it again (a map in new pages costs more than the pass over it).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from ..cpu import inference, training
from ..cpu.weight import KeptLike, outlives
from ..memory_format import reformatted
from .rewrite_effects import value
from .rewrite_quick import Planned, Quick
from .rewrite_site import Call, Site, entered, filled

__all__ = ["settled"]


def settled(gm: fx.GraphModule, now: object, *, gradients: bool) -> Callable[..., Any] | None:
    """The graph as a function, with each site as it ran in the state ``now``; None where that is known of none.
    ``gradients``: it was traced with them."""
    sites = [node for node in gm.graph.nodes if isinstance(node.target, Site)]
    known = {node: node.target.known(now) for node in sites}
    if not any(known.values()):
        return None
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        quick = known.get(node)
        if quick is None:
            new[node] = graph.node_copy(node, new.__getitem__)
        else:
            new[node] = _written(graph, node, quick, [new[n] for n in node.args], gradients)
    graph.lint()
    return fx.GraphModule(gm, graph).forward


def _written(graph: fx.Graph, node: fx.Node, quick: Quick, args: Sequence[fx.Node], gradients: bool) -> fx.Node:
    """What `Site.__call__` does in such a case, as nodes."""
    site: Site = node.target  # type: ignore[assignment]
    x, *operands = args
    if site.converts and value(node.args[0]).dim() > 3:
        x = graph.call_function(reformatted, (x, True))
    if gradients:
        operands = [graph.call_function(entered, (t,)) if k in site.added else t for k, t in enumerate(operands)]
    calls = dict(zip(site.runs, site.calls, strict=True))
    for part in quick.parts:
        if part.step is not None and not part.calls:
            used = list(dict.fromkeys(k for k in part.places if k is not None))
            x = graph.call_function(_Settled(part, used, dict(quick.same)), (x, *[operands[k] for k in used]))
            continue
        if part.converts:
            x = graph.call_function(reformatted, (x, True))
        for run in part.calls:
            x = _call(graph, calls[run], x, operands, exactly=site.converts, gradients=gradients)
        if part.step is not None and part.channels_last is not None:
            x = graph.call_function(reformatted, (x, part.channels_last))
    return graph.call_function(reformatted, (x, False)) if site.channels_last is False else x


class _Settled:
    """One fused step, of the operands that are ``used`` by it; ``same``: which those were."""

    __name__ = __qualname__ = "step"  # as FX writes it into code

    def __init__(self, part: Planned, used: list[int], same: dict[int, weakref.ref[Tensor]]) -> None:
        self._part = part._replace(places=tuple([None if k is None else used.index(k) for k in part.places]))
        self._weight = same[used[0]]
        self._ready: inference.Ready | training.Ready | None = None

    def __call__(self, x: Tensor, *operands: Tensor) -> Tensor:
        part, weight = self._part, operands[0]
        if weight is not self._weight():  # of the same kind, as the graph's guards say
            part = self._part = part.again(x, operands)
            self._weight, self._ready = weakref.ref(weight), None
        o = part.operands(x, operands)
        if self._ready is None:
            step, last = part.step, bool(part.channels_last)
            assert step is not None
            self._ready = inference.ready(step, o, last) if part.packed else training.Ready.of(step, o, last)
        return part.finished(o, None if self._ready is None else self._ready.run(o))


def _call(
    graph: fx.Graph, call: Call, x: fx.Node, operands: Sequence[fx.Node], *, exactly: bool, gradients: bool
) -> fx.Node:
    """What `Call.exactly` does, or `Call.run`."""
    if exactly and call.norm is not None:
        function, weight, bias = call.norm
        return graph.call_function(function, (x, filled(weight, x, operands), filled(bias, x, operands)))
    operands = operands if gradients else _kept(graph, call, x, operands)
    args, kwargs = (filled(a, x, operands) for a in (call.args, call.kwargs))
    if isinstance(call.target, str):
        return graph.call_method(call.target, args, kwargs)
    return graph.call_function(call.target, args, kwargs)


def _kept(graph: fx.Graph, call: Call, x: fx.Node, operands: Sequence[fx.Node]) -> Sequence[fx.Node]:
    """The operands of a convolution with its weight as `KeptLike` has it."""
    bound = call.kind.bind(call.args, call.kwargs) if call.kind.name in _WITH_WEIGHT else None
    place = -1 if bound is None else bound["weight"].place
    if place < 0 or not outlives(value(operands[place])):
        return operands
    kept = graph.call_function(KeptLike(), (x, operands[place]))
    return [kept if k == place else t for k, t in enumerate(operands)]


_WITH_WEIGHT = ("conv2d", "conv_transpose2d")
