"""Channel shuffles that a model writes out: a view as groups, a transposition of two dimensions, a copy, a view back.

PyTorch's own operator gives the same numbers, and has a channels-last form, which a copy of groups has not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..dispatch import on_cpu
from .rewrite_effects import storages, value
from .rewrite_strides import is_fixed, views

__all__ = ["as_shuffles"]


def as_shuffles(graph: fx.Graph) -> None:
    """Make a ``channel_shuffle`` of each that is written out, of contiguous maps (N, C, H, W) or (N, C, D, H, W) on a
    CPU in inference."""
    gone: set[fx.Node] = set()
    for node in list(graph.nodes):
        x = None if node in gone else _grouped(node)
        found = None if x is None else _copied(node, x)
        if x is None or found is None:
            continue
        first, last = found
        with graph.inserting_before(first):
            new = graph.call_function(F.channel_shuffle, (x, value(node).shape[2]))
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        while last is not x:  # each was for the next alone
            before: fx.Node = last.args[0]  # type: ignore[assignment]
            graph.erase_node(last)
            gone.add(last)
            last = before


def _grouped(node: fx.Node) -> fx.Node | None:
    """The map of which ``node`` is a view with the groups of the channels behind the channels of each."""
    t = value(node)
    if not views(node) or not isinstance(t, Tensor) or t.dim() not in (5, 6) or not is_fixed(node) or not on_cpu(t):
        return None
    n, each, groups, *size = t.shape
    place = math.prod(size)
    inner = torch.empty(tuple(size), device="meta").stride()
    if min(each, groups, place) < 2 or t.stride() != (each * groups * place, place, each * place, *inner):
        return None
    x: fx.Node = node
    while not _is_of(x, (n, each * groups, *size)):
        before = x.args[0] if views(x) and x.args else None
        if not isinstance(before, fx.Node) or len(x.users) != 1 or storages(before) != storages(node):
            return None
        x = before
    return x


def _is_of(node: fx.Node, shape: Sequence[int]) -> bool:
    """Whether it is a contiguous map of this shape."""
    t = value(node)
    return isinstance(t, Tensor) and tuple(t.shape) == tuple(shape) and t.is_contiguous()


def _copied(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The copy of ``node`` in its order, and what has that in the shape of the map ``x``."""
    first: fx.Node | None = None
    while len(node.users) == 1:
        (user,) = node.users
        t = value(user)
        if not views(user) or not isinstance(t, Tensor) or user.args[0] is not node or not t.is_contiguous():
            return None
        if t.numel() != value(x).numel() or storages(user) & storages(x):
            return None
        first = first or user
        if t.shape == value(x).shape:
            return first, user
        node = user
    return None
