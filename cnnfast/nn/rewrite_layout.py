"""Between the sites of a graph, channels-last: a step computes in that format, and a model in the default layout would
be converted at both ends of each.

The result of a site stays channels-last where eager mode's is contiguous and nobody can tell: its users are other
sites, which convolve or add it, and operators that keep the format and give the same numbers in each (`_KEEP`); any
other user gets a contiguous copy. A map that is written to, or that somebody views, is contiguous as in eager mode.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .rewrite_calls import call_kind
from .rewrite_effects import Everything, storages, value, written
from .rewrite_site import Site

__all__ = ["keep_channels_last"]

# Of two or more maps of one shape, of one and numbers, or of one. (Not among them: what draws random numbers, whose
# places follow the memory, and sums over positions, whose order does.)
_KEEP = frozenset(
    {operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.sub, torch.mul, torch.div}
    | {"add", "sub", "mul", "div"}
    | {torch.cat, torch.max_pool2d, F.max_pool2d}
)


def keep_channels_last(graph: fx.Graph) -> None:
    """Mark the sites whose results stay channels-last (`Site.channels_last`), and put copies where they end."""
    nodes = list(graph.nodes)
    changed = set().union(*(written(n) for n in nodes if not isinstance(n.target, Site)))
    if Everything in changed:
        return
    kept = {n for n in nodes if _is_map(n) and _keeps(n) and not storages(n) & changed}
    while drop := {n for n in kept if _viewed(n) or not isinstance(n.target, Site) and not kept.issuperset(_maps(n))}:
        kept -= drop
    useful: set[fx.Node] = set()
    for node in reversed(nodes):
        if any(_takes(user, node) or user in useful and user in kept for user in node.users):
            useful.add(node)
    kept &= useful
    for node in nodes:
        if isinstance(node.target, Site) and (node in kept or any(n in kept and _takes(node, n) for n in _taken(node))):
            node.target.channels_last = node in kept
    for node in nodes:
        if node in kept:
            _end(graph, node, kept)


def _end(graph: fx.Graph, node: fx.Node, kept: set[fx.Node]) -> None:
    """A contiguous copy for each user that has to see it as it is in eager mode."""
    for user in list(node.users):
        if _takes(user, node) or user in kept and not isinstance(user.target, Site):
            continue
        with graph.inserting_before(user):
            copy = graph.call_method("contiguous", (node,))
        copy.meta = dict(node.meta)
        user.replace_input_with(node, copy)


def _is_map(node: fx.Node) -> bool:
    """Whether it gives images that are contiguous in eager mode, and that only."""
    t = value(node)
    return (
        isinstance(t, Tensor)
        and t.dim() == 4
        and t.is_floating_point()
        and t.layout is torch.strided
        and t.is_contiguous()
        and not t.is_contiguous(memory_format=torch.channels_last)
    )


def _keeps(node: fx.Node) -> bool:
    """Whether it gives the format that it gets, and the same numbers in each."""
    if isinstance(node.target, Site):
        return node.target.any_format
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target is torch.cat:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        return isinstance(dim, int) and dim == 1
    if node.target in _KEEP:
        if node.target in (torch.max_pool2d, F.max_pool2d):
            return True
        shape = value(node).shape
        return all(value(n).shape == shape for n in _maps(node))
    kind = call_kind(node.target)
    if kind is None or not (kind.pointwise or kind.name == "interpolate"):
        return False
    bound = kind.bind(node.args, node.kwargs)
    return bound is not None and (kind.name != "interpolate" or bound["mode"] == "nearest")


def _maps(node: fx.Node) -> list[fx.Node]:
    """The tensors that it is given."""
    return [n for n in node.all_input_nodes if isinstance(value(n), Tensor)]


def _viewed(node: fx.Node) -> bool:
    """Whether a user gives the same memory."""
    return any(storages(user) & storages(node) for user in node.users if user.op != "output")


def _taken(node: fx.Node) -> set[Any]:
    """What a site convolves or adds."""
    site: Site = node.target  # type: ignore[assignment]
    return {node.args[0], *(node.args[1 + k] for k in site.added)}


def _takes(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` is a site with a result like `_is_map` that takes ``node``, and as that alone."""
    if not isinstance(user.target, Site) or not user.target.any_format or not _is_map(user):
        return False
    added = user.target.added
    others = {a for k, a in enumerate(user.args[1:]) if k not in added}
    return node in _taken(user) and node not in others
