"""A graph that Dynamo traced with symbolic sizes, for sizes that come again.

Such a graph serves all sizes, and less is known of it: nothing settles, and no strides are told of tokens. Where the
same sizes are met again its calls are taken once more, with those sizes in place of the symbols, and rewritten as what
was traced with fixed ones. PyTorch traces nothing anew: what the symbols stand for is in the arguments, and what each
call gives for these is asked of its fake mode, as in tracing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..messages import one_line
from .layers import plain_now
from .rewrite_effects import Everything, value, written

__all__ = ["Sizes", "has_sizes"]

T = TypeVar("T")

LIMIT = 8
"""Sizes of one graph: each takes some tenths of a second, and as much memory as a graph."""

_MAX_MET = 64
_NUMBERS = (int, float)


def has_sizes(node: fx.Node) -> bool:
    """Whether all sizes and strides of what it gives are numbers."""
    return not any(t.is_nested or _unknown(t) for t in tree_leaves(value(node)) if isinstance(t, Tensor))


def _unknown(v: Any) -> list[torch.SymInt]:
    """What is no number of a tensor's sizes and strides, or of a number."""
    if isinstance(v, Tensor):
        each = () if v.is_nested else (*v.shape, *(v.stride() if v.layout is torch.strided else ()))
        return [n for n in each if isinstance(n, torch.SymInt)]
    return [v] if isinstance(v, torch.SymInt) else []


def _symbols(v: Any) -> set[Any]:
    """Those that have no value: Dynamo gives one to some later than the tensor was made."""
    return set().union(*(n.node.expr.free_symbols for n in _unknown(v)))


class Sizes:
    """``make``: a function of a graph of fixed sizes, rewritten; ``note``: is told why there is none."""

    def __init__(
        self,
        gm: fx.GraphModule,
        make: Callable[[fx.GraphModule], Callable[..., Any]],
        note: Callable[[str], object],
    ) -> None:
        self._root, self._graph = gm, _copied(gm.graph)
        self._make, self._note = make, note
        self._met: dict[object, Callable[..., Any] | None] = {}
        self._made = 0
        nodes = list(self._graph.nodes)
        self._symbols: set[Any] = set()
        for node in nodes:
            self._symbols |= set().union(*(_symbols(t) for t in tree_leaves(value(node)) if isinstance(t, Tensor)))
        inputs = [n for n in nodes if n.op == "placeholder"]
        self._at = [k for k, n in enumerate(inputs) if self._matters(value(n))]
        self._given = [value(inputs[k]) for k in self._at]
        changes = any(Everything in written(n) for n in nodes)  # how the rest runs
        inside = any(isinstance(child, fx.GraphModule) for child in gm.children())  # run by operators
        self._never = changes or inside or not self._at

    def _matters(self, v: Any) -> bool:
        """Whether sizes follow from an argument, a tensor or a number."""
        unknown = _unknown(v)
        return bool(unknown) and (isinstance(v, Tensor) or not _symbols(v) or not self._symbols.isdisjoint(_symbols(v)))

    def only(self) -> fx.GraphModule | None:
        """The graph of fixed sizes, where there are no others."""
        return None if self._never or self._symbols else self._tried(lambda: self._fixed(self._given))

    def met(self, args: Sequence[Any]) -> Callable[..., Any] | None:
        """The graph for the sizes of these arguments, where they have come before, or are the first: tracing for them
        has just taken longer than that."""
        if self._never:
            return None
        given = [args[k] for k in self._at]
        key = tuple([(a.shape, a.stride()) if isinstance(a, Tensor) else a for a in given])
        found = self._met.get(key)
        if found is not None or plain_now():
            return found
        if self._met and key not in self._met:
            if len(self._met) >= _MAX_MET:
                self._met = {k: run for k, run in self._met.items() if run is not None}
            self._met[key] = None
        elif self._made < LIMIT:
            self._made += 1
            found = self._met[key] = self._tried(lambda: self._make(self._fixed(given)))
        return found

    def _tried(self, take: Callable[[], T]) -> T | None:
        """What ``take`` gives, or None from now on."""
        try:
            return take()
        except Exception as error:  # of whatever the graph calls
            self._never = True
            self._note(f"sizes that come again run as all do: {one_line(error)}")
            return None

    def _fixed(self, given: Sequence[Any]) -> fx.GraphModule:
        """The graph with these, as sizes follow from them."""
        graph = _copied(self._graph)
        nodes = list(graph.nodes)
        mode = next(t.fake_mode for n in nodes for t in tree_leaves(value(n)) if hasattr(t, "fake_mode"))
        inputs = [n for n in nodes if n.op == "placeholder"]
        known = {inputs[k]: _fake(v, mode) for k, v in zip(self._at, given, strict=True)}
        with torch.random.fork_rng(devices=[]), mode:
            for node in nodes:
                if node.op != "output" and not known.keys().isdisjoint(node.all_input_nodes):
                    known[node] = _ran(node, known)
        for node, v in known.items():
            node.meta["example_value"] = v
            if type(v) in (*_NUMBERS, bool):
                node.replace_all_uses_with(v)
        for node in reversed(nodes):
            if node in known and node.op != "placeholder" and not node.users and _is_of_numbers(value(node)):
                graph.erase_node(node)
        for node in nodes:
            if not has_sizes(node):
                raise RuntimeError(f"{node.name} has sizes that do not follow from the arguments")
        graph.lint()
        return fx.GraphModule(self._root, graph)


def _copied(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    new.output(new.graph_copy(graph, {}))
    return new


def _fake(v: Any, mode: Any) -> Any:
    """A number, or a tensor without its numbers."""
    if not isinstance(v, Tensor):
        return int(v)
    size, strides = [int(n) for n in v.shape], [int(n) for n in v.stride()]
    with mode:
        t = torch.empty_strided(size, strides, dtype=v.dtype, device=v.device)
        return t.requires_grad_() if v.requires_grad else t


def _ran(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """What its call gives."""
    args: Any = fx.node.map_arg(node.args, lambda n: known.get(n, value(n)))
    kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: known.get(n, value(n)))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    raise NotImplementedError(f"{node.op} of {node.target}")


def _is_of_numbers(v: Any) -> bool:
    return all(isinstance(n, _NUMBERS) for n in tree_leaves(v))
