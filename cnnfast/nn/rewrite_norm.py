"""GroupNorm and InstanceNorm of a graph that no site takes in, for inference: one call with the activation that
follows, by cnnfast's own operators where the map is channels-last (of which ATen takes the statistics less exactly)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from ..activations import Activation
from ..cpu import norm_inference
from ..dispatch import by_kernels, needs_gradient, on_cpu, resolve_backend, watched
from ..memory_format import format_of, is_channels_last, reformatted
from ..norms import Norm
from ..ops.run import run_step
from ..step import Operands, Step, norm_step
from .rewrite_calls import CallKind, call_kind

__all__ = ["NORMS", "NormCall", "as_norms", "norm_of"]

NORMS = ("group_norm", "instance_norm")


@dataclass(eq=False)
class NormCall:
    """``act(norm(x))`` of a map x, with the norm's weight and bias, or None. ``channels_last``: the result of such a
    map is so, whatever eager mode's is."""

    norm: Norm
    activation: Activation = Activation()  # noqa: B008 (frozen)
    channels_last: bool = False

    @property
    def __name__(self) -> str:  # as FX writes it into code
        return "norm"

    @cached_property
    def _step(self) -> Step:
        return norm_step(self.norm, activation=self.activation)

    def finishes(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
        """Whether a call is `finished`, and that alone, as every other of the same kind in the same
        `rewrite_quick.state` is."""
        o = Operands(x, scale=weight, shift=bias)
        last = self.channels_last or self.norm.kind == "group" and is_channels_last(x)
        here = last and on_cpu(x) and not by_kernels(x, resolve_backend(None)) and not watched(x)
        return here and norm_inference.why_not(self.norm, o) is None

    def finished(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, *, ours: bool) -> Tensor:
        """What `finishes` says a call comes to; it may overwrite x where that is ``ours``."""
        return norm_inference.finished(self.norm, Operands(x, scale=weight, shift=bias), self.activation, ours=ours)

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        o = Operands(x, scale=weight, shift=bias)
        if x.dim() in (4, 5) and not x.is_contiguous() and not watched(x) and not needs_gradient(o):
            if self.channels_last:
                x = reformatted(x, True)  # it may be a part of a map's channels
            if x.is_contiguous(memory_format=format_of(x.dim(), True)):
                # PyTorch's InstanceNorm gives a contiguous result, its GroupNorm, on a CPU, what its input suggests.
                last = self.channels_last or self.norm.kind == "group" and is_channels_last(x)
                return run_step(self._step, o._replace(x=x), channels_last=last)
        eps = self.norm.eps
        if self.norm.kind == "group":
            y = F.group_norm(x, self.norm.groups, weight, bias, eps)
        else:
            y = F.instance_norm(x, weight=weight, bias=bias, eps=eps)
        return self.activation(y)


def norm_of(kind: CallKind, bound: dict[str, Any]) -> Norm | None:
    """What a call of ``group_norm`` or ``instance_norm`` computes, where its numbers are numbers and nothing moves."""
    if type(bound.get("eps")) not in (int, float):
        return None
    if kind.name == "group_norm":
        groups = bound["num_groups"]
        return Norm("group", groups, float(bound["eps"])) if type(groups) is int and groups > 0 else None
    tracked = bound["running_mean"] is not None or bound["running_var"] is not None
    return None if tracked or bound["use_input_stats"] is not True else Norm("instance", eps=float(bound["eps"]))


def as_norms(graph: fx.Graph) -> None:
    """Make a `NormCall` of each norm."""
    for node in list(graph.nodes):
        kind = _kind(node)
        if kind is None or kind.name not in NORMS:
            continue
        bound = kind.bind(node.args, node.kwargs)
        norm = None if bound is None else norm_of(kind, bound)
        if bound is None or norm is None:
            continue
        last, activation = node, Activation()
        if len(node.users) == 1:
            (user,) = node.users
            found = _activation(user, node)
            if found is not None:
                last, activation = user, found
        with graph.inserting_before(last):
            call = NormCall(norm, activation)
            new = graph.call_function(call, (bound["input"], bound["weight"], bound["bias"]))
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        for n in dict.fromkeys((last, node)):
            graph.erase_node(n)


def _kind(node: fx.Node) -> CallKind | None:
    return call_kind(node.target) if node.op in ("call_function", "call_method") else None


def _activation(node: fx.Node, of: fx.Node) -> Activation | None:
    """The activation that ``node`` is of another node, and of that alone; not one with a weight."""
    kind = _kind(node)
    if kind is None or not kind.pointwise or kind.tensors:
        return None
    bound = kind.bind(node.args, node.kwargs)
    if bound is None or bound["input"] is not of:
        return None
    part = kind.part(bound)
    if part.activation is None or any(isinstance(v, fx.Node) for v in part.attributes):
        return None
    return part.activation(*part.attributes)
