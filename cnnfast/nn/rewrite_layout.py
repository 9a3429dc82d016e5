"""Between the sites of a graph, channels-last: a step computes in that format, and a model in the default layout would
be converted at both ends of each.

A map that is contiguous in eager mode is channels-last inside of a stretch, where nobody can tell (one that is so there
stays it): its users are sites, which convolve or add it, and operators that keep the format, or take each
(`rewrite_formats`); any other user gets a contiguous copy. What is written to is as in eager mode, unless by such an
operator, and what is returned and viewed. A stretch starts with the first site in it, and in inference that site's
input is converted, and what a sum or a concatenation takes in from outside, where that is no larger than the rest.

In inference it goes on through views and copies of maps as tokens (N, positions, C), windows or heads, and back
(`rewrite_strides`): what such calls give may have other strides than in eager mode as long as each of its users does,
or gives what is as in eager mode all the same (norms and products of rows; sums with what lies so). A copy that makes a
contiguous map of what has each position's channels side by side starts a stretch, too: it is made in that format.

With gradients, ATen brings a contiguous weight into this format in every step, and its gradient back: there are
stretches where the maps that sites take and give outweigh the weights (`_MAPS`; docs/facts.md). Norms by a map's own
statistics end a stretch then (of channels-last maps ATen takes them less exactly), and so do operators that resize by
other rules than the nearest value, maps of three dimensions or one, and all writes.

Of one dimension, (N, C, L), convolutions, pointwise operators and tokens alone are in a stretch: ATen has no such
format, and its other operators return what is contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..memory_format import (
    in_format,
    is_quick,
    new_strides,
    reformatted,
    reshaped_last,
    restrided,
    suggests_channels_last,
)
from .rewrite_eager import Eager, taken, untold_norm
from .rewrite_effects import Everything, numel, sizes, storages, switches_autocast, touched, value, written
from .rewrite_formats import (
    SLOW_OF_CONTIGUOUS,
    converts_itself,
    is_part,
    keeps,
    maps_of,
    outsized_site,
    pooled_to_one,
    reads,
    wants_dense,
    writes_at_each_place,
    writes_part,
)
from .rewrite_norm import NormCall, as_norms
from .rewrite_shuffle import as_shuffles
from .rewrite_site import Site
from .rewrite_strides import copies_rows, rearranges, strides_over, takes_means, views

__all__ = ["converted", "keep_channels_last"]

# What a conversion that is as quick as `memory_format.is_quick` has it takes of the time of ATen's copies: a fifth on
# AMD's processors, two thirds on Intel's. Beside it, bytes that those bring into another format in the time of a call.
_QUICK, _A_CALL = 0.5, 2**17
_MAPS = 16  # numbers of maps for each of weights, from which on a graph with gradients has stretches


def keep_channels_last(graph: fx.Graph) -> float:
    """Mark the sites whose results stay channels-last (`Site.channels_last`), and put copies where they end. Bytes of
    the maps that are converted where that begins and ends (by ATen, or as many as it would in that time), less those of
    what costs ATen as much more of contiguous maps."""
    layout = _Layout(graph, inference=not torch.is_grad_enabled())
    layout.apply()
    return layout.converted


class _Layout:
    def __init__(self, graph: fx.Graph, inference: bool) -> None:
        self.graph, self.inference = graph, inference
        self.converted = 0.0
        # What is channels-last in a stretch, that is not so in eager mode or what is made of it lies otherwise; the
        # strides of what does; and what is made of such, but is as in eager mode all the same.
        self.maps: set[fx.Node] = set()
        self.changed: dict[fx.Node, tuple[Any, ...]] = {}
        self.same: set[fx.Node] = set()
        self.rearranged: set[fx.Node] = set()  # of what is changed, what is so as tokens may be
        self.copies: set[fx.Node] = set()  # of the maps, those that are copied from what is no map
        self.odd: set[fx.Node] = set()  # of the maps, views with a stride of their one image that ATen does not take
        self.joined: dict[fx.Node, list[fx.Node]] = {}  # of the maps, those that take in what is outside, and which
        self.kept: set[fx.Node] = set()  # what is among the maps or changed

    def apply(self) -> None:
        untold = any(untold_norm(n, self.inference) for n in self.graph.nodes)
        if self.inference:
            as_norms(self.graph)
            as_shuffles(self.graph)
        nodes = list(self.graph.nodes)
        self.told = told = Eager(nodes, self.inference)
        self.eager, self.strides = told.formats, told.strides
        if untold or told.lost:
            return  # each site and norm goes by the input that it gets
        changed = _written([n for n in nodes if not self._writes_own(n)])
        if Everything in changed:
            return
        formats = {n for n in nodes if self._is_map(n) and keeps(n, self.inference) and not storages(n) & changed}
        tokens = self._tokens(nodes)
        starts = {n for n in tokens if self._is_copy(n)}
        self._arrange(nodes, formats, tokens, starts)
        while drop := self._dropped(nodes):
            formats, tokens, starts = formats - drop, tokens - (drop - self.copies), starts - drop
            self._arrange(nodes, formats, tokens, starts)
        kept = self.kept
        if not (self.inference or self._outweigh(kept)):
            return
        for node in nodes:
            if isinstance(node.target, Site):
                if node in kept or any(n in kept and self._takes(node, n) for n in taken(node)):
                    node.target.channels_last = node in kept or self.eager[node] == "last"
                    node.target.converts = self.inference
                    node.target.given_contiguous = self.eager.get(node.args[0]) in ("contiguous", "part")
                    if node.target.given_contiguous and node.args[0] not in kept:
                        self.converted += _converted(node.args[0])
                    if self.eager.get(node.args[0]) == "odd":  # ATen makes it contiguous first
                        self.converted -= _bytes(node.args[0])
                    if node.target.channels_last is False:
                        self.converted += _converted(node)
            elif isinstance(node.target, NormCall):
                node.target.channels_last = node in kept
            elif node in self.same or node in self.rearranged:
                self._count(node)
        for node in nodes:
            if node in self.copies:
                node.op, node.target, node.kwargs = "call_function", reshaped_last, {}
                node.args = (node.args[0], tuple(value(node).shape))
            if node in self.maps:
                self._join(node)
                self._end(node)
                self._straighten(node)
                self._pooled(node)
                self._compact(node)
                if node.target in SLOW_OF_CONTIGUOUS:
                    self.converted -= _bytes(maps_of(node)[0])
            elif node in self.changed:
                self._end(node)

    def _dropped(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        """What of ``kept`` cannot be there, or, where all can, is of no use: first of what is copied."""
        if drop := {n for n in self.kept if self._ends(n)}:
            return drop
        useless = self.kept - self._useful(nodes)
        return useless & self.copies or useless

    def _useful(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        """What somebody gains by."""
        useful: set[fx.Node] = set()
        for node in reversed(nodes):
            if any(self._takes(user, node) or user in useful and user in self.kept for user in node.users):
                useful.add(node)
            elif any(user in self.same and not takes_means(user) for user in node.users):
                useful.add(node)
            elif any(writes_part(user) and user.args[0] in self.kept and user.args[2] is node for user in node.users):
                useful.add(node)
            elif any(storages(node) & storages(n) for n in node.all_input_nodes if n in self.kept and n in useful):
                useful.add(node)
        for node in nodes:  # and what costs nothing, or spares a copy of a view, which cannot be
            given = [n for n in node.all_input_nodes if n in useful and n in self.kept] if node in self.kept else []
            if given and not isinstance(node.target, Site):
                if any(self._is_viewed(n) for n in given) or all(self._accepts(user, node) for user in node.users):
                    useful.add(node)
        return useful

    def _tokens(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        """What may be in a stretch with other strides than in eager mode, or between two of its parts. (Not of memory
        that is written to; nor is what is returned a view of it.)"""
        if not self.inference:
            return set()
        writes = _written(nodes)
        returned: set[Any] = set().union(*(storages(n) for n in nodes[-1].all_input_nodes))
        found = set()
        for node in nodes:
            if not rearranges(node) or self.strides[node] is None or storages(node) & writes:
                continue
            if views(node) and (touched(node) & writes or storages(node) & returned):
                continue
            found.add(node)
        return found

    def _arrange(
        self, nodes: Sequence[fx.Node], formats: set[fx.Node], tokens: set[fx.Node], starts: set[fx.Node]
    ) -> None:
        """Find ``maps``, ``changed`` and ``same``, where ``formats`` may be channels-last as what `keeps` the format,
        ``tokens`` may lie otherwise, and ``starts`` may be copied to channels-last maps."""
        self.maps, self.changed, self.same = set(), {}, set()
        self.rearranged, self.copies, self.odd, self.joined = set(), set(), set(), {}
        for node in nodes:
            if node in formats and (isinstance(node.target, Site) or self._in_stretch(node)):
                self.maps.add(node)
                if self.eager[node] == "contiguous":
                    self.changed[node] = new_strides(value(node).shape, True)
                elif self.eager[node] == "part" and (found := self.told.how(node, self._now)) is not None:
                    self.changed[node] = found.strides
            elif node in starts and copies_rows(node, self._now):
                self.maps.add(node)
                self.rearranged.add(node)
                self.copies.add(node)
                self.changed[node] = new_strides(value(node).shape, True)
            elif node in tokens and any(n in self.changed for n in node.all_input_nodes):
                found, before = self.told.how(node, self._now), self.told.how(node, self.strides.get)
                if found is None or not views(node) and strides_over(node, self._now):
                    continue
                if found.strides == self.strides[node]:
                    if found.is_view or before is None or not before.is_view:
                        self.same.add(node)
                    continue
                self.changed[node], t = found.strides, value(node)
                self.rearranged.add(node)
                if self.eager[node] != "contiguous":
                    continue
                if in_format(torch.empty_strided(t.shape, found.strides, device="meta"), True):
                    self.maps.add(node)
                    if t.dim() > 3 and not suggests_channels_last(t.shape, found.strides):
                        self.odd.add(node)
                        self.changed[node] = new_strides(t.shape, True)
        self.kept = self.maps | self.changed.keys()

    def _in_stretch(self, node: fx.Node) -> bool:
        """Whether the maps that it is given are, by their numbers, in the stretch for at least a half (``joined`` are
        the others), and what is outside can be copied."""
        given = list(dict.fromkeys(maps_of(node)))
        outside = [n for n in given if n not in self.maps]
        if not outside:
            return True
        inside = [n for n in given if n in self.maps]
        dense = all(self.eager.get(n) == "contiguous" and value(n).dim() > 3 for n in outside)
        if not (self.inference and dense) or storages(node) & touched(node):
            return False
        if sum(map(numel, outside)) > sum(map(numel, inside)):
            return False
        self.joined[node] = outside
        return True

    def _is_copy(self, node: fx.Node) -> bool:
        """Whether it is a contiguous map with the numbers of something else."""
        t, found = value(node), self.told.how(node, self.strides.get) if views(node) else None
        is_map = self.eager[node] == "contiguous" and isinstance(t, Tensor) and t.dim() > 3
        return is_map and found is not None and not found.is_view

    def _now(self, node: fx.Node) -> tuple[Any, ...] | None:
        """Its strides in the stretch, or in eager mode."""
        return self.changed.get(node, self.strides.get(node))

    @staticmethod
    def _outweigh(kept: set[fx.Node]) -> bool:
        """Whether the maps of these sites' convolutions do their weights."""
        maps = weights = 0
        for node in kept:
            if isinstance(node.target, Site):
                convolutions = sum(call.kind.name.startswith("conv") for call in node.target.calls)
                maps += convolutions * (numel(node) + numel(node.args[0]))
                others = (a for k, a in enumerate(node.args[1:]) if k not in node.target.added)
                weights += sum(numel(a) for a in others if isinstance(value(a), Tensor) and value(a).dim() == 4)
        return maps >= _MAPS * weights

    def _count(self, node: fx.Node) -> None:
        """What it saves that tokens lie otherwise."""
        before, now = self.told.how(node, self.strides.get), self.told.how(node, self._now)
        slow = before is not None and not before.is_view and strides_over(node, self.strides.get)
        slow_now = now is not None and not now.is_view and node not in self.copies and strides_over(node, self._now)
        if slow != slow_now:
            self.converted += _bytes(node) * (slow_now - slow)

    def _join(self, node: fx.Node) -> None:
        """A channels-last copy of what it takes in from outside."""
        for given in self.joined.get(node, ()):
            with self.graph.inserting_before(node):
                copy = self.graph.call_function(reformatted, (given, True))
            copy.meta = dict(given.meta)
            node.replace_input_with(given, copy)
            self.converted += _converted(given)

    def _end(self, node: fx.Node) -> None:
        """A copy for each user that has to see it as it is in eager mode."""
        if node not in self.changed or self.eager[node] == "part":
            return
        for user in list(node.users):
            if self._accepts(user, node):
                continue
            with self.graph.inserting_before(user):
                if node in self.maps:
                    copy = self.graph.call_function(reformatted, (node, False))
                else:
                    copy = self.graph.call_function(restrided, (node, self.strides[node]))
            self.converted += _converted(node) if node in self.maps else _bytes(node)
            copy.meta = dict(node.meta)
            user.replace_input_with(node, copy)

    def _straighten(self, node: fx.Node) -> None:
        """The strides of its format, for those of its users that do not see to that."""
        others = [user for user in node.users if not isinstance(user.target, Site) and user.target is not reformatted]
        if node in self.odd and others:
            with self.graph.inserting_after(node):
                straight = self.graph.call_function(reformatted, (node, True))
            straight.meta = dict(node.meta)
            for user in others:
                user.replace_input_with(node, straight)

    def _pooled(self, node: fx.Node) -> None:
        """Where each channel of it is pooled to one mean: to strides as of a contiguous map."""
        for user in list(node.users) if self.eager[node] in ("contiguous", "part") else ():
            if self.inference and pooled_to_one(user):
                user.target, user.args = torch.mean, (node, tuple(range(2, value(node).dim())))
                user.kwargs = {"keepdim": True}

    def _compact(self, node: fx.Node) -> None:
        """A dense copy of a part for each user that gains by it."""
        for user in list(node.users) if is_part(node) else ():
            if wants_dense(user, node) and not storages(user) & storages(node):
                with self.graph.inserting_before(user):
                    copy = self.graph.call_function(reformatted, (node, True))
                copy.meta = dict(node.meta)
                user.replace_input_with(node, copy)

    def _is_map(self, node: fx.Node) -> bool:
        """Whether it gives images that are contiguous in eager mode, and that only; in inference, or channels-last."""
        found = ("contiguous", "last", "odd", "part") if self.inference else ("contiguous",)
        return self.eager.get(node) in found

    def _ends(self, node: fx.Node) -> bool:
        """Whether a node of ``kept`` cannot be: a user gives the same memory as something else, or one of a view, of
        which there is no copy, has to see it as it is in eager mode."""
        if self.eager[node] == "part" or self._is_viewed(node):
            if not all(self._accepts(user, node) for user in node.users):
                return True
        mine, others = storages(node), (user for user in node.users if user not in self.kept and user.op != "output")
        return any(storages(user) & mine and user not in self.same for user in others)

    def _is_viewed(self, node: fx.Node) -> bool:
        """Whether it is changed, a view, and no map."""
        return node in self.changed and node not in self.maps and views(node)

    def _writes_own(self, node: fx.Node) -> bool:
        """Whether it writes to the map that it is given: at every place from what is there, and returns it, or sets
        some of its channels."""
        if not self.inference or node.op not in ("call_function", "call_method"):
            return False
        if writes_part(node):
            return self._is_map(node.args[0])  # type: ignore[arg-type]
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or not self._is_map(node) or not self._is_map(first):
            return False
        return storages(node) == storages(first) and writes_at_each_place(node)

    def _accepts(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether ``user`` may be given ``node`` channels-last."""
        if self._takes(user, node) or user in self.same:
            return True
        if not isinstance(user.target, Site) and user in self.kept:
            return user in self.rearranged or node in self.maps or node not in maps_of(user)
        if self.inference and writes_part(user):
            return user.args[0] in self.kept and node in (user.args[0], user.args[2])
        return self.inference and node in self.maps and reads(user, node)

    def _takes(self, user: fx.Node, node: fx.Node) -> bool:
        """Whether ``user`` is a site with a result like `_is_map` that takes ``node``, and as that alone. (The result
        of one dimension follows no format: of one channel it may be, too.)"""
        if not isinstance(user.target, Site) or not user.target.any_format(self.inference):
            return False
        if node in self.changed and node not in self.maps:
            return False
        if converts_itself(user) or outsized_site(user):
            return False
        y = value(user)
        told = self.inference and user not in self.told.untold and y.is_contiguous()
        if y.dim() != 3:  # of one channel: whatever it is made of, it gets eager mode's strides
            told = told and y.dim() in (4, 5) and numel(user) > 1 and not suggests_channels_last(y.shape, y.stride())
            told = told and y.shape[1] == 1 and in_format(y, True)
        if not (self._is_map(user) or told):
            return False
        added = user.target.added
        others = {a for k, a in enumerate(user.args[1:]) if k not in added}
        return node in taken(user) and node not in others


def _written(nodes: Sequence[fx.Node]) -> set[Any]:
    """What they write to, but for what is ours, and that runs in any format under autocast or not."""
    others = (n for n in nodes if not isinstance(n.target, (Site, NormCall)) and not switches_autocast(n))
    return set().union(*(written(n) for n in others))


def _bytes(node: Any) -> int:
    return numel(node) * value(node).element_size()


def _converted(node: Any) -> float:
    return converted(sizes(node), value(node).dtype)


def converted(shape: Sequence[int], dtype: torch.dtype) -> float:
    """Bytes that ATen's copies bring into another format in the time that a map of this shape takes."""
    return math.prod(shape) * dtype.itemsize * (_QUICK if is_quick(shape, dtype) else 1) + _A_CALL
