"""How the results of a traced graph's calls lie in memory, given how their arguments do: what rearranges maps into
tokens (N, positions, C), windows of them and back, and what is computed of those at each place or for each token.

ATen chooses strides by strides and sizes alone, so that a call on tensors without data tells. Not so of what is made of
the numbers at each place: those calls go by PyTorch's own Python then, which has other strides of dimensions of one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..memory_format import format_of, is_dense, new_strides
from .rewrite_effects import value, written
from .rewrite_formats import follows, named, takes_numbers

__all__ = [
    "OF_THEIR_OWN",
    "Lies",
    "copies_rows",
    "is_fixed",
    "lies",
    "rearranges",
    "strides_of",
    "strides_over",
    "takes_means",
    "views",
]

_VIEWS = named(
    "view reshape permute transpose swapaxes swapdims movedim moveaxis flatten unflatten unsqueeze squeeze "
    "chunk split tensor_split narrow select unbind contiguous"
)
_MEANS = named("mean sum var std")
_OVER_MANY = named("matmul bmm softmax normalize") | _MEANS | {operator.matmul}
_AS_THEY_SAY = named("detach clone")
OF_THEIR_OWN = named("prelu hardtanh relu6 softsign")  # made of the numbers at each place by rules of their own
_ROWS = frozenset({F.layer_norm, torch.layer_norm, F.linear})  # whose results are contiguous, whatever is given


class Lies(NamedTuple):
    """Strides of a result (of several, of each), and whether it is a view of what is given."""

    strides: tuple[Any, ...]
    is_view: bool


def views(node: fx.Node) -> bool:
    """Whether its result, or each, has the numbers of its first argument, as a view or as a copy."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target is operator.getitem:
        return _is_basic(node.args[1])
    return node.target in _VIEWS


def _reads_rows(node: fx.Node) -> bool:
    """Whether it computes a contiguous result of the last dimension of what it is given."""
    return node.op == "call_function" and node.target in _ROWS and "out" not in node.kwargs


def takes_means(node: fx.Node) -> bool:
    """Whether it reduces, which takes as long of any strides."""
    return node.op in ("call_function", "call_method") and node.target in _MEANS


def rearranges(node: fx.Node) -> bool:
    """Whether it gives the same numbers of whatever strides, in strides that `lies` tells: a view or a copy, numbers
    made of those at their place, a concatenation, or what is computed of rows."""
    if node.op not in ("call_function", "call_method") or {"out", "memory_format"} & node.kwargs.keys():
        return False
    if not node.args:
        return False
    if views(node) or _reads_rows(node) or node.target is torch.cat or node.target in _OVER_MANY:
        return True
    if node.target in OF_THEIR_OWN or not (isinstance(node.args[0], fx.Node) or takes_numbers(node)):  # 2 ** x
        return False
    return follows(node) and isinstance(value(node), Tensor)


def _is_basic(index: Any) -> bool:
    """Whether an index takes numbers, slices, new dimensions."""
    each = index if isinstance(index, tuple) else (index,)
    return all(type(i) is int or i is None or i is Ellipsis or isinstance(i, slice) for i in each)


def strides_of(v: Any) -> tuple[Any, ...] | None:
    """Of a tensor, or of each of several; None of anything else."""
    if isinstance(v, Tensor):
        return v.stride() if v.layout is torch.strided else None
    if isinstance(v, (list, tuple)) and v and all(isinstance(t, Tensor) for t in v):
        each = [strides_of(t) for t in v]
        return None if None in each else tuple(each)
    return None


def lies(node: fx.Node, given: Callable[[fx.Node], tuple[Any, ...] | None]) -> Lies | None:
    """How the result of a call that `rearranges` lies in memory where its arguments have the strides ``given``; None
    where that is not known, or where these do not allow it."""
    if not is_fixed(node):
        return None
    if _reads_rows(node):
        return Lies(torch.empty(value(node).shape, device="meta").stride(), False)
    if node.target is operator.getitem and not isinstance(value(node.args[0]), Tensor):
        each = given(node.args[0])  # type: ignore[arg-type]
        return None if each is None or type(node.args[1]) is not int else Lies(each[node.args[1]], True)
    tensors: list[Tensor] = []
    for n in node.all_input_nodes:
        t, strides = value(n), given(n)
        if isinstance(t, Tensor) and strides is None:
            return None

    def without_data(n: fx.Node) -> Any:
        t = value(n)
        if not isinstance(t, Tensor):
            return t
        tensors.append(torch.empty_strided(t.shape, given(n), dtype=t.dtype, device="meta"))  # type: ignore[arg-type]
        return tensors[-1]

    if follows(node) and written(node):
        strides = given(node.args[0])  # type: ignore[arg-type]
        return None if strides is None else Lies(strides, True)
    if follows(node) and node.target not in _AS_THEY_SAY:
        return Lies(_at_each_place(node, given), False)
    args: Any = fx.node.map_arg(node.args, without_data)
    kwargs: Any = fx.node.map_arg(node.kwargs, without_data)
    if node.target is F.normalize:
        return Lies(_normalized(args[0], *args[1:], **kwargs), False)
    try:
        if node.op == "call_method":
            y = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            y = node.target(*args, **kwargs)  # type: ignore[operator]
    except RuntimeError:
        return None  # `Tensor.view` copies nothing
    strides = strides_of(y)
    memory = {t.untyped_storage()._cdata for t in tensors}
    shared = any(t.untyped_storage()._cdata in memory for t in tree_leaves(y))
    return None if strides is None else Lies(strides, shared)


Operands = Sequence[tuple[Sequence[int], Sequence[int]]]


def _at_each_place(node: fx.Node, given: Callable[[fx.Node], tuple[Any, ...] | None]) -> tuple[int, ...]:
    """Strides of what is made of the numbers at each place."""
    shape = tuple(value(node).shape)
    operands = [(tuple(value(n).shape), given(n)) for n in node.all_input_nodes if isinstance(value(n), Tensor)]
    numbers = [a for a in (*node.args, node.kwargs.get("other")) if isinstance(value(a), (int, float))]
    return iterated(shape, operands, alone=not (numbers and takes_numbers(node)))  # type: ignore[arg-type]


def _normalized(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> tuple[int, ...]:
    norm = torch.linalg.vector_norm(x, p, dim, keepdim=True)
    kept = iterated(norm.shape, [(norm.shape, norm.stride())], alone=True)
    by = torch.empty_strided(norm.shape, kept, device="meta").expand_as(x)
    return iterated(x.shape, [(x.shape, x.stride()), (x.shape, by.stride())], alone=True)


def iterated(shape: Sequence[int], operands: Operands, *, alone: bool) -> tuple[int, ...]:
    """Strides of a new result of ATen's TensorIterator, of operands with their sizes and strides; ``alone``: no number
    is an operand, too. (``compute_fast_setup_type`` and ``reorder_dimensions`` in aten/src/ATen/TensorIterator.cpp.)"""
    first = tuple(operands[0][1])
    if alone and all(tuple(size) == tuple(shape) for size, _ in operands):
        given = [torch.empty_strided(size, strides, device="meta") for size, strides in operands]
        if all(t.is_contiguous() for t in given):
            return torch.empty(shape, device="meta").stride()
        if len(shape) == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in given):
            return new_strides(shape, True)
        if all(tuple(strides) == first for _, strides in operands) and is_dense(tuple(shape), first):
            return first
    every = [_broadcast(shape, size, strides) for size, strides in operands]

    def later(a: int, b: int) -> int:
        """Whether dimension a is wider than b (1), denser (-1), or neither."""
        for strides in every:
            if strides[a] == 0 or strides[b] == 0:
                continue
            if strides[a] != strides[b]:
                return 1 if strides[a] > strides[b] else -1
            if shape[a] > shape[b]:
                return 1
        return 0

    order = list(range(len(shape)))[::-1]
    for k in range(1, len(order)):
        at = k
        for before in range(k - 1, -1, -1):
            which = later(order[before], order[at])
            if which < 0:
                break
            if which > 0:
                order[before], order[at] = order[at], order[before]
                at = before
    strides, step = [0] * len(shape), 1
    for k in order:
        strides[k] = step
        step *= shape[k]
    return torch.empty(shape, device="meta").stride() if order == list(range(len(shape)))[::-1] else tuple(strides)


def _broadcast(shape: Sequence[int], size: Sequence[int], strides: Sequence[int]) -> list[int]:
    missing = len(shape) - len(size)
    own = [0 if n == 1 != shape[missing + k] else s for k, (n, s) in enumerate(zip(size, strides, strict=True))]
    return [0] * missing + own


def copies_rows(node: fx.Node, given: Callable[[fx.Node], tuple[Any, ...] | None]) -> bool:
    """Whether what a map has the numbers of, as its first argument, is densest in the map's channels."""
    x, strides = value(node.args[0]), given(node.args[0])  # type: ignore[arg-type]
    if strides is None or node.target is operator.getitem:
        return False
    y = value(node)
    dense = torch.empty(y.shape, device="meta", memory_format=format_of(y.dim(), True))
    try:
        back = dense.view(x.shape)
    except RuntimeError:
        return False  # it is more than dimensions that become one
    wide = [k for k, n in enumerate(x.shape) if n > 1]
    return y.shape[1] > 1 and bool(wide) and min(wide, key=lambda k: strides[k]) == min(wide, key=back.stride)


def is_fixed(node: fx.Node) -> bool:
    """Whether all sizes, strides and numbers are known."""
    given = (value(n) for n in (*node.all_input_nodes, node))
    each = (t for v in given for t in tree_leaves(v))
    return not any(
        isinstance(n, (torch.SymInt, torch.SymFloat, torch.SymBool))
        for t in each
        for n in ((*t.shape, *(strides_of(t) or ())) if isinstance(t, Tensor) else (t,))
    )


def strides_over(node: fx.Node, given: Callable[[fx.Node], tuple[Any, ...] | None]) -> bool:
    """Whether it goes through memory in another order than it writes, which takes ATen many times longer: a copy or a
    norm of what is densest in another than the last dimension, a sum of what is densest in several."""
    if _reads_rows(node) or views(node):
        x = node.args[0]
        if node.target is F.linear or not isinstance(x, fx.Node) or not isinstance(value(x), Tensor):
            return False  # products take either order
        wide = [k for k, n in enumerate(value(x).shape) if n > 1]
        return _densest(x, given) != (wide[-1] if wide else None)
    if node.target in _OVER_MANY:
        return False
    return len({_densest(n, given) for n in node.all_input_nodes if _is_of_shape(n, node)} - {None}) > 1


def _is_of_shape(argument: fx.Node, node: fx.Node) -> bool:
    """Whether it is a tensor of the result's shape, but for the dimension of a concatenation."""
    t, y = value(argument), value(node)
    if not isinstance(t, Tensor) or t.dim() != y.dim():
        return False
    return t.shape == y.shape or node.target is torch.cat


def _densest(node: fx.Node, given: Callable[[fx.Node], tuple[Any, ...] | None]) -> int | None:
    """The dimension of more than one of the least stride."""
    strides: Any = given(node)
    return min((k for k, n in enumerate(value(node).shape) if n > 1), key=lambda k: strides[k], default=None)
