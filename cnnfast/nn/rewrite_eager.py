"""How each result of a traced graph lies in memory in eager mode.

Dynamo says so of most. Not of a stride of a dimension of one, from which ATen tells channels-last; nor of some norms on
a CPU; nor of what is made of these. That is worked out here, by PyTorch's own rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..dispatch import on_cpu
from ..memory_format import in_format, new_strides, suggests_channels_last
from .rewrite_calls import AFFINE, call_kind, conv_functions
from .rewrite_effects import value
from .rewrite_formats import follows, is_part, keeps, maps_of, splits
from .rewrite_site import Call, Site
from .rewrite_strides import OF_THEIR_OWN, Lies, is_fixed, is_mistold, iterated, lies, rearranges, strides_of, views

__all__ = ["Eager", "taken", "untold_norm"]


class Eager:
    """Of ``nodes``, in their order. ``formats``: "contiguous"; channels-last, "last"; so, but "odd", with a stride of
    the batch's one image that ATen does not take for that; "part" of a contiguous one's channels, or all parts; "" for
    what is no map. ``strides``: as ATen has them (of several results, of each), None where they are not known.
    ``lost``: it is not known of a map, either."""

    def __init__(self, nodes: Sequence[fx.Node], inference: bool) -> None:
        self.inference = inference
        self.formats: dict[fx.Node, str] = {}
        self.strides: dict[fx.Node, tuple[Any, ...] | None] = {}
        self.untold: set[fx.Node] = set()
        self.otherwise: set[fx.Node] = set()  # contiguous in eager mode, where Dynamo says something else
        self.lost = False
        self._lies: dict[object, Lies | None] = {}
        for node in nodes:
            untrue = views(node) or is_mistold(node) or not self._trusted(node)
            if inference and rearranges(node) and is_fixed(node) and untrue:
                found = self.how(node, self.strides.get)
                self.strides[node] = None if found is None else found.strides
            self.formats[node] = self._format(node)
            if node not in self.strides:
                self.strides[node] = self._strides(node)

    def how(self, node: fx.Node, given: Callable[[fx.Node], tuple[Any, ...] | None]) -> Lies | None:
        """`lies`, once for the same strides."""
        if not is_fixed(node):
            return None
        key = (node, *[given(n) for n in node.all_input_nodes])
        if key not in self._lies:
            self._lies[key] = lies(node, given)
        return self._lies[key]

    def _trusted(self, node: fx.Node) -> bool:
        """Whether Dynamo says of all that a call is given the strides that it has."""
        return not is_fixed(node) or all(self.strides.get(n) == strides_of(value(n)) for n in node.all_input_nodes)

    def _strides(self, node: fx.Node) -> tuple[Any, ...] | None:
        """Of what rearranges nothing; None where they are not known."""
        t, kind = value(node), self.formats[node]
        if node in self.untold or kind == "odd" or not kind and _names(node) == ["batch_norm"]:
            return None
        if isinstance(t, Tensor) and t.dim() > 3 and kind in ("contiguous", "last"):
            return t.stride() if kind == _said(node) else new_strides(t.shape, kind == "last")
        if node not in self.otherwise and self._trusted(node):
            return None if is_mistold(node) else strides_of(t)
        return self._behind_all(node)[1] if isinstance(node.target, Site) else None

    def _untold(self, node: fx.Node) -> bool:
        """Whether Dynamo does not say the truth of a result (N, C, L): of a convolution whose weight, or input of one
        channel, has strides that say channels-last with a dimension more, which ATen gives it; and of what is made of
        such a result."""
        if not self.untold.isdisjoint(node.all_input_nodes):
            return True
        if not isinstance(node.target, Site) and (node.op != "call_function" or node.target not in conv_functions()):
            return False
        given = taken(node) if isinstance(node.target, Site) else {node.args[0] if node.args else None}
        for n in node.all_input_nodes:
            t = value(n)
            if isinstance(t, Tensor) and t.dim() == 3 and (n not in given or t.is_contiguous()):
                a, c, length = t.shape
                if suggests_channels_last((a, c, 1, length), (*t.stride()[:2], t.stride(2) * length, t.stride(2))):
                    return True
        return False

    def _format(self, node: fx.Node) -> str:
        """Its entry in ``formats``. (Dynamo does not say the truth of odd ones.)"""
        if self.inference and (splits(node) or is_part(node)):
            self.lost |= node.args[0] in self.otherwise
            of = self.formats.get(node.args[0], "")  # type: ignore[arg-type]
            return "part" if of == "contiguous" else of if of in ("part", "last") else ""
        t = value(node)
        if not isinstance(t, Tensor) or t.dim() not in ((3, 4, 5) if self.inference else (4,)):
            return ""
        if not t.is_floating_point() or t.layout is not torch.strided:
            return ""
        if t.dim() == 3 and self._untold(node):
            self.untold.add(node)
            return ""
        if (strides := self.strides.get(node)) is not None:
            t = torch.empty_strided(t.shape, strides, device="meta")
        elif t.dim() == 3 and self.inference and not self._trusted(node):
            return ""
        elif is_mistold(node) and not isinstance(node.target, Site):
            if node.target is torch.einsum:
                return ""
            given = [self.formats[n] for n in maps_of(node) if value(n).is_floating_point()]
            self.lost |= not {"contiguous", "part"}.issuperset(given)
        if _contiguous_norm(node) or not self.otherwise.isdisjoint(node.all_input_nodes):
            return self._otherwise(node)
        last = in_format(t, True)
        if last == t.is_contiguous():
            return ""
        if t.dim() == 3:
            return "last" if last else "contiguous"
        said = _said(node)
        if strides is not None:
            return _kind_of(t)
        if views(node):  # of strides that are not known: the one image's may be odd
            if self.inference and strides_of(value(node.args[0])) is not None:
                self.lost |= is_fixed(node) or said == "last" and type(t.shape[0]) is int and t.shape[0] == 1
            return said
        maps = [n for n in maps_of(node) if self.formats.get(n)]
        given = [self.formats[n] for n in maps]
        unsaid = any(self.formats[n] == "last" != _said(n) for n in maps)
        unsaid = unsaid or is_mistold(node) and not {"contiguous", "part"}.issuperset(given)
        true = said != "last" or "odd" not in given and all(self.formats[n] == _said(n) for n in maps)
        if not given or true and not unsaid:
            return said
        if isinstance(node.target, Site):
            found, self.strides[node] = self._behind_all(node)
            self.lost |= not found
            return found or said
        kind = call_kind(node.target)
        as_given = follows(node) or kind is not None and kind.name == "prelu"
        self.lost |= unsaid and (len(set(given)) > 1 or not keeps(node, self.inference))
        return given[0] if as_given or given[0] != "odd" else "contiguous"

    def _otherwise(self, node: fx.Node) -> str:
        """`_format` of a norm whose result is contiguous where Dynamo says something else, and of what is made
        of such results, by PyTorch's rules for formats."""
        said, found = _said(node), ""
        if _contiguous_norm(node):
            found = "contiguous"
        elif node.target is torch.cat:
            given = {self._truly(n) for n in maps_of(node)}
            found = "" if "" in given else "last" if given == {"last"} else "contiguous"
        elif isinstance(node.target, Site):
            found, _ = self._behind_all(node)
        elif follows(node) or node.target is F.interpolate:
            found = self._truly(next(iter(maps_of(node)), None))
            if found == "odd" and node.target is F.interpolate:
                found = "contiguous"
        t = value(node)
        in_both = in_format(t, True) and t.is_contiguous()
        if found == "contiguous" and (in_both or said != found):
            self.otherwise.add(node)
        elif found != said and not (in_both and found):
            self.lost = True
        return "" if in_both else found

    def _truly(self, node: Any) -> str:
        return "contiguous" if node in self.otherwise else self.formats.get(node, "")

    def _behind_all(self, node: fx.Node) -> tuple[str, tuple[int, ...] | None]:
        """The format of a site's result, and its strides, by PyTorch's rules; "" and None where they are not known here
        (strides: of fixed sizes alone)."""
        found, calls = self._truly(node.args[0]), node.target.calls  # type: ignore[union-attr]
        resizes = [call.kind.name.startswith("conv") or call.kind.name in ("interpolate", "pad") for call in calls]
        resizing = max(k for k, does in enumerate(resizes) if does)
        fixed, shape = is_fixed(node), value(node).shape
        for call in calls[: resizing + 1] if fixed else calls:
            found = found and self._behind(call, found, node.args[1:])
        if not found or not fixed:
            return found, None
        strides: tuple[int, ...] | None = new_strides(shape, found == "last")
        for call in calls[resizing + 1 :]:
            if strides is not None and not call.in_place:
                strides = self._beside(call, shape, strides, node.args[1:])
        if strides is None:
            return "", None
        return _kind_of(torch.empty_strided(shape, strides, device="meta")), strides

    def _behind(self, call: Call, given: str, operands: Sequence[Any]) -> str:
        """The format of the result of one call, of what is ``given`` in one."""
        name, bound = call.kind.name, call.kind.bind(call.args, call.kwargs)
        assert bound is not None
        if name.startswith("conv"):
            weight = value(operands[bound["weight"].place])
            return "last" if given == "last" or suggests_channels_last(weight.shape, weight.stride()) else "contiguous"
        if name == "add":
            return self._truly(operands[bound["input"].place]) if call.through == "other" else given
        if name in ("interpolate", "pad"):
            return "contiguous" if given == "odd" or bound["mode"] == "circular" else given
        return given if _keeps_format(call) else ""

    def _beside(
        self, call: Call, shape: Sequence[int], given: tuple[int, ...], operands: Sequence[Any]
    ) -> tuple[int, ...] | None:
        """Strides of the result of one call that is made of numbers at their places, of what has those that are
        ``given``."""
        if call.kind.name == "add":
            bound = call.kind.bind(call.args, call.kwargs)
            assert bound is not None
            leads = call.through == "other"
            other = self.strides.get(operands[bound["input" if leads else "other"].place])
            if other is None:
                return None
            return iterated(shape, [(shape, s) for s in ((other, given) if leads else (given, other))], alone=True)
        if call.kind.pointwise and call.target not in OF_THEIR_OWN:
            return iterated(shape, [(shape, given)], alone=True)
        return given if _keeps_format(call) else None


def _keeps_format(call: Call) -> bool:
    name = call.kind.name
    return call.kind.pointwise or name in ("batch_norm", "group_norm", *AFFINE) or "dropout" in name


def untold_norm(node: fx.Node, inference: bool) -> bool:
    """Whether it is a norm of whose result Dynamo says something else, so that nothing is known of what follows."""
    return _untrue(node) or _contiguous_norm(node) and not _follows_from_norm(node, inference)


def _follows_from_norm(node: fx.Node, inference: bool) -> bool:
    """Whether a result lies as the batch norm's in it does."""
    if not inference or not isinstance(node.target, Site):
        return inference
    kinds = [call.kind for call in node.target.calls]
    behind = kinds[max(k for k, kind in enumerate(kinds) if kind.name == "batch_norm") + 1 :]
    return all(kind.pointwise or "dropout" in kind.name for kind in behind)


def _untrue(node: fx.Node) -> bool:
    """Whether Dynamo says something else of a norm's result on a CPU than it is, and so of all that follows: a group
    norm of channels-last maps keeps them so, which from torch 2.14 on is traced as contiguous, as on a GPU."""
    y = value(node)
    if "group_norm" not in _names(node) or not isinstance(y, Tensor) or not on_cpu(y):
        return False
    given = [value(n) for n in node.all_input_nodes]
    maps = (t for t in given if isinstance(t, Tensor) and t.dim() in (4, 5))
    return any(in_format(t, True) and not t.is_contiguous() for t in maps) and y.is_contiguous()


def _contiguous_norm(node: fx.Node) -> bool:
    """Whether it is a batch norm of maps of one position, which are in both formats: on a CPU it is contiguous, and
    traced with the strides given."""
    y = value(node)
    if "batch_norm" not in _names(node) or not isinstance(y, Tensor) or not on_cpu(y):
        return False
    one = all(isinstance(n, int) and n == 1 for n in y.shape[2:])
    return one and y.stride()[1:] != (1,) * (y.dim() - 1)


def _names(node: fx.Node) -> list[str]:
    """The kinds of a site's calls, or the kind of a call."""
    if isinstance(node.target, Site):
        return [call.kind.name for call in node.target.calls]
    kind = call_kind(node.target) if node.op == "call_function" else None
    return [] if kind is None else [kind.name]


def _said(node: fx.Node) -> str:
    """What Dynamo says of ``Eager.formats``."""
    return _kind_of(value(node))


def _kind_of(t: Tensor) -> str:
    return "contiguous" if t.is_contiguous() else "last" if suggests_channels_last(t.shape, t.stride()) else "odd"


def taken(node: fx.Node) -> set[Any]:
    """What a site convolves or adds."""
    site: Site = node.target  # type: ignore[assignment]
    return {node.args[0], *(node.args[1 + k] for k in site.added)}
