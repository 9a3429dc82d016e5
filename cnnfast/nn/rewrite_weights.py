"""Computed weights in a traced graph (weight_norm, spectral_norm in eval mode, parametrizations): kept on a CPU while
what they are computed from holds the same.

A weight that is a function of Parameters and buffers alone, by operators that write nothing and draw no random
numbers, is computed by one node, `Computed`. In inference on a CPU it keeps its result, by the content of all sources
(`computed.kept`). With gradients, under autocast, on a GPU and where somebody watches, it is computed as it stands.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..cpu.packing import Leased
from .computed import kept, made, owner_first, owner_of
from .layers import why_not_now
from .rewrite_calls import conv_functions
from .rewrite_effects import Everything, storages, value, written

__all__ = ["Computed", "keep_weights"]


@dataclass(eq=False)
class Computed:
    """The function that ``graph`` is, of its sources. ``owner``: which of these is the Parameter that keeps it."""

    graph: fx.GraphModule
    owner: int

    writes_nothing = True  # see `rewrite_effects.written`

    def __post_init__(self) -> None:
        self.__name__ = self.__qualname__ = "computed_weight"  # as FX writes it into code
        self._key = "computed", self.graph.code
        self._leased = Leased()

    def held(self, *sources: Tensor) -> Tensor | None:
        """What is kept of these, where it is known that nobody has written to them since."""
        return self._leased.held(*owner_first(sources, self.owner))

    def __call__(self, *sources: Tensor, found: Tensor | None = None) -> Tensor:
        """``found``: what `held` just gave."""
        if found is not None:
            return found

        def make() -> Tensor:
            return made(lambda: self.graph.forward(*sources))

        weight = None
        if not any(why_not_now(s) for s in sources):
            weight = kept(sources, self.owner, lambda: self._key, make, self._leased)
        return self.graph.forward(*sources) if weight is None else weight


def _apart(weight: Tensor) -> Tensor:
    """``weight`` for whoever may write to it."""
    return weight.detach().clone() if isinstance(weight, nn.Parameter) else weight


# --- finding them -----------------------------------------------------------------------------------------------------


def keep_weights(graph: fx.Graph) -> None:
    """Let every computed weight of a convolution be one `Computed`."""
    nodes = list(graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    for conv in nodes:
        kind = conv_functions().get(conv.target) if conv.op == "call_function" else None
        bound = None if kind is None else kind.bind(conv.args, conv.kwargs)
        weight = None if bound is None else bound["weight"]
        if not isinstance(weight, fx.Node) or weight not in order or not _takes_as_weight(conv, weight):
            continue  # no node, or one of ours
        inside, sources = _function_of(weight)
        owner = owner_of([value(s) for s in sources])
        if owner is None or storages(weight) & set().union(*(storages(s) for s in sources)):
            continue  # of activations, or a Parameter as it is
        steps = sorted(inside, key=order.__getitem__)
        last = max(order[user] for user in weight.users if _takes_as_weight(user, weight))
        if _changed(nodes[order[steps[0]] : order[weight]], inside, sources):
            continue
        if _changed(nodes[order[weight] + 1 : last], {weight}, []):
            continue
        _replace(graph, weight, steps, sources, owner)


def _function_of(weight: fx.Node) -> tuple[set[fx.Node], list[fx.Node]]:
    """The nodes that compute ``weight``, and what they start from: no sources where that is not known to be a function
    of Parameters and buffers."""
    inside: set[fx.Node] = set()
    sources: dict[fx.Node, None] = {}
    stack = [weight]
    while stack:
        node = stack.pop()
        if node in inside or node in sources:
            continue
        if node.op == "placeholder" and _is_state(node):
            sources[node] = None
        elif _is_function(node):
            inside.add(node)
            stack += node.all_input_nodes
        else:
            return set(), []
    return inside, list(sources)


def _is_state(node: fx.Node) -> bool:
    """Whether it is a Parameter or a buffer of the model's, by Dynamo's own mark."""
    return isinstance(value(node), Tensor) and "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})


_SEEDED = torch.Tag.nondeterministic_seeded
_CASTS = frozenset({"float", "double", "half", "bfloat16", "int", "long", "bool"})
_VIEWS = frozenset({"T", "mT", "H", "mH"})
_OPERATORS = frozenset(id(getattr(operator, name)) for name in dir(operator) if not name.startswith("__"))


def _is_function(node: fx.Node) -> bool:
    """Whether it gives tensors by nothing but its arguments, and writes nowhere: an operator of PyTorch's that is not
    marked as drawing random numbers."""
    if node.op not in ("call_function", "call_method") or written(node):
        return False
    if not all(isinstance(t, Tensor) for t in tree_leaves(value(node))) or not node.all_input_nodes:
        return False
    if node.op == "call_function" and (id(node.target) in _OPERATORS or node.target is F.normalize):
        return True
    if node.target is getattr:
        return node.args[1] in _VIEWS
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in _CASTS:
        return True
    packet = getattr(torch.ops.aten, name, None)
    if packet is None or "empty" in name or "resize" in name:
        return False
    return not any(_SEEDED in getattr(packet, overload).tags for overload in packet.overloads())


def _changed(between: list[fx.Node], inside: set[fx.Node], sources: list[fx.Node]) -> bool:
    """Whether nodes ``between`` may write to what those inside give or read."""
    mine = set().union(*(storages(n) for n in (*inside, *sources)))
    changed = set().union(*(written(n) for n in between if n not in inside))
    return Everything in changed or bool(changed & mine)


def _replace(graph: fx.Graph, weight: fx.Node, steps: list[fx.Node], sources: list[fx.Node], owner: int) -> None:
    own = fx.Graph()
    copies = {s: own.placeholder(f"source_{k}") for k, s in enumerate(sources)}
    for k, node in enumerate(steps):
        copies[node] = own.node_copy(node, copies.__getitem__)
        copies[node].name = f"value_{k}"
    own.output(copies[weight])
    with graph.inserting_after(weight):
        new = graph.call_function(Computed(fx.GraphModule(nn.Module(), own), owner), tuple(sources))
    new.meta = dict(weight.meta)
    others = [user for user in weight.users if not _takes_as_weight(user, weight)]
    if others:
        with graph.inserting_after(new):
            apart = graph.call_function(_apart, (new,))
        apart.meta = dict(weight.meta)
        for user in others:
            user.replace_input_with(weight, apart)
    weight.replace_all_uses_with(new)
    for node in reversed(steps):
        if not node.users:
            graph.erase_node(node)


def _takes_as_weight(user: fx.Node, weight: fx.Node) -> bool:
    """Whether it is a convolution that reads ``weight`` as that alone."""
    kind = conv_functions().get(user.target) if user.op == "call_function" else None
    bound: dict[str, Any] | None = None if kind is None else kind.bind(user.args, user.kwargs)
    return bound is not None and [name for name, v in bound.items() if v is weight] == ["weight"]
