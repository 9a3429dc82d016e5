"""Which modules of an accelerated model have hooks.

Dynamo's own guards ask four empty dicts of each module in every call, which takes almost half of the time of all that
they ask (docs/facts.md). Here all are looked at in a few calls of Python's, and calls with other hooks than before are
compiled by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_, itemgetter
from typing import Any, NamedTuple

from torch import fx, nn

from .computed import HOOKS

__all__ = ["Hooks", "Hooked"]

Hooked = frozenset[tuple[nn.Module, str]]
"""Modules, and which of their dicts of hooks are not empty."""

_NONE: Hooked = frozenset()
_dicts = itemgetter(*HOOKS)


class _Tree(NamedTuple):
    modules: list[nn.Module]
    own: list[dict[str, Any]]  # the attributes of each
    children: list[nn.Module | None]


class Hooks:
    """Of ``root`` and of all modules in it."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._tree = _Tree([], [], [])

    def __call__(self) -> Hooked:
        """Which there are now."""
        tree = self._now()
        if not any(map(any, map(_dicts, tree.own))):
            return _NONE
        return frozenset((m, name) for m, d in zip(tree.modules, tree.own, strict=True) for name in HOOKS if d[name])

    def know(self, graph: fx.Graph) -> bool:
        """Whether all modules that Dynamo met in this graph are among those that are looked at. (It may meet some in a
        list, or in a global variable.)"""
        known = {str(id(m)) for m in self._now().modules}
        return all(key.split("@")[0] in known for key in _met(graph))

    def _now(self) -> _Tree:
        tree = self._tree  # read once: another thread may set it
        children = [m for d in tree.own for m in d["_modules"].values()]
        if not tree.own or len(children) != len(tree.children) or not all(map(is_, children, tree.children)):
            # A scripted module has no such dicts: what it has is its own, Dynamo does not look into it.
            modules = [m for m in self._root.modules() if m.__dict__.keys() >= {*HOOKS, "_modules"}]
            own = [m.__dict__ for m in modules]
            tree = self._tree = _Tree(modules, own, [m for d in own for m in d["_modules"].values()])
        return tree


def _met(graph: fx.Graph) -> Iterator[str]:
    """The modules inside of which Dynamo met the graph's calls: their ids."""
    for node in graph.nodes:
        yield from node.meta.get("nn_module_stack") or ()
