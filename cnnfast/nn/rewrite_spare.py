"""Maps that a graph has no more use for when a step adds to them: the sum may be written into their memory.

(A sum that is written elsewhere costs a convolution of few channels a tenth of its time: docs/facts.md.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..memory_format import reformatted, reshaped_last, restrided
from .rewrite_calls import conv_functions
from .rewrite_effects import Everything, is_known, storages, switches_autocast, touched, value, written
from .rewrite_formats import follows
from .rewrite_norm import NormCall
from .rewrite_site import Site

__all__ = ["Memory"]

_MADE = frozenset({torch.cat, F.interpolate, F.max_pool2d, F.max_pool3d, F.avg_pool2d, F.avg_pool3d, F.pad})


class Memory:
    """Of a graph without gradients, before anything of it is settled: which of its values may lie in the same memory.
    (What eager mode copies may be a view here, and the other way round: formats differ.)"""

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: k for k, node in enumerate(graph.nodes)}
        self._same: dict[fx.Node, set[fx.Node]] = {}
        # What lies in memory that is not the graph's own, or may; all, where something changes how the rest runs.
        self._others: set[fx.Node] = set()
        if any(Everything in written(node) for node in graph.nodes if not switches_autocast(node)):
            self._others.update(graph.nodes)
        for node in graph.nodes:
            self._same[node] = {node}
            if _makes(node):
                continue
            if not _is_view(node):
                self._others.add(node)
            for given in node.all_input_nodes if node.op != "output" else ():
                for n in self._same[given] - self._same[node]:
                    self._same[node].add(n)
                    self._same[n] = self._same[node]

    def spare(self, node: fx.Node, at: fx.Node, *, read_first: bool) -> bool:
        """Whether nothing but the site ``at`` reads the memory of its operand ``node`` from then on. ``read_first``:
        its input has been read by the time that it adds."""
        same = self._same[node]
        if same & self._others or any(a in same for a in at.args[1:] if a is not node):
            return False
        if at.args[0] in same and not read_first:
            return False
        return all(self._order[user] <= self._order[at] for n in same for user in n.users)


def _makes(node: fx.Node) -> bool:
    """Whether its result lies in new memory, in whichever formats its arguments are."""
    if isinstance(node.target, (Site, NormCall)):
        return True
    if node.op not in ("call_function", "call_method") or not isinstance(value(node), Tensor):
        return False
    if not (follows(node) or node.target in _MADE or node.target in conv_functions()):
        return False
    own = storages(node)
    return not written(node) and Everything not in own and not own & touched(node)


def _is_view(node: fx.Node) -> bool:
    """Whether its result lies in the memory of its arguments, or in new."""
    if node.op == "call_function":
        return node.target in (reformatted, reshaped_last, restrided) or is_known(node.target)
    return node.op == "call_method" and hasattr(Tensor, str(node.target))
