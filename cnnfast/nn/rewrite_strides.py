"""How the results of a traced graph's calls lie in memory, given how their arguments do: what rearranges maps into
tokens (N, positions, C), windows of them and back, and what is computed of those at each place or for each token.

ATen chooses strides by strides and sizes alone, so that a call on tensors without data tells. Not so of what is made of
the numbers at each place: those calls go by PyTorch's own Python then, which has other strides of dimensions of one;
nor of some others on a CPU, of which it says that they are contiguous, or lie as what they are given (`is_mistold`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..dispatch import on_cpu
from ..memory_format import format_of, is_dense, new_strides, suggests_channels_last
from .rewrite_calls import call_kind
from .rewrite_effects import value, written
from .rewrite_formats import follows, named, takes_numbers
from .rewrite_site import Call, Site

__all__ = [
    "OF_THEIR_OWN",
    "Lies",
    "copies_rows",
    "is_fixed",
    "is_mistold",
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
_OVER_MANY = named("matmul bmm einsum softmax normalize") | _MEANS | {operator.matmul}
_AS_THEY_SAY = named("detach clone")
OF_THEIR_OWN = named("prelu hardtanh relu6 softsign")  # made of the numbers at each place by rules of their own
_ROLLS = named("roll")
_SHUFFLES = named("channel_shuffle native_channel_shuffle")
_PADS = frozenset({F.pad, torch._C._nn.pad})
_MOVES = _ROLLS | _SHUFFLES | _PADS  # copies to other positions
_POWERS = named("pow") | {operator.pow, pow}
# Whose strides are not said by the fake mode, and not known here, of what is not contiguous.
_UNKNOWN = named("rrelu index_fill max_unpool2d max_unpool3d") | {torch.fft.fftshift, torch.fft.ifftshift}
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
    if views(node) or _reads_rows(node) or node.target is torch.cat or node.target in _OVER_MANY | _MOVES:
        return True
    if _is_contiguous_of_any(node):
        return True
    if node.target in OF_THEIR_OWN or not (isinstance(node.args[0], fx.Node) or takes_numbers(node)):
        return False
    return follows(node) and isinstance(value(node), Tensor)


def _is_contiguous_of_any(node: fx.Node) -> bool:
    """Whether its result is contiguous, of numbers made of those at their places: a power of a number."""
    power = node.target in _POWERS and isinstance(value(node.args[0]), (int, float)) and isinstance(value(node), Tensor)
    return power or node.target is F.logsigmoid


def is_mistold(node: fx.Node) -> bool:
    """Whether PyTorch's fake mode may say something else of it than what ATen does on a CPU."""
    y = value(node)
    if not isinstance(y, Tensor) or not on_cpu(y):
        return False
    if isinstance(node.target, Site):
        return y.dim() > 3 and any(_pads_by_edges(call) for call in node.target.calls)
    mistold = node.target in _ROLLS | _SHUFFLES | _UNKNOWN or node.target is torch.einsum
    return mistold or _is_contiguous_of_any(node) or y.dim() > 3 and _pads_by_edges(node)


def _pads_by_edges(call: fx.Node | Call) -> bool:
    """Whether it pads maps with what is in them, at their edges."""
    if call.target not in _PADS:
        return False
    kind = call_kind(call.target)
    bound = None if kind is None else kind.bind(call.args, call.kwargs)
    return bound is None or bound["mode"] in ("reflect", "replicate")


def _multiplies(node: fx.Node) -> bool:
    """Whether it is an einsum of several tensors that sums over nothing, or may: it is made of the numbers at each
    place then."""
    if node.target is not torch.einsum or len(node.all_input_nodes) < 2 and len(node.args) < 3:
        return False
    equation, *operands = node.args
    operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands  # type: ignore[assignment]
    if not isinstance(equation, str) or "->" not in equation or "." in equation or len(operands) != 2:
        return True
    given, result = equation.replace(" ", "").split("->")
    each = zip(given.split(","), operands, strict=True)
    sizes = [dict(zip(labels, value(n).shape, strict=True)) for labels, n in each]
    return not any(k not in result and all(size.get(k, 1) != 1 for size in sizes) for k in sizes[0])


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
    if _reads_rows(node) or _is_contiguous_of_any(node):
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
    if _multiplies(node):
        return None
    if node.target in _ROLLS | _SHUFFLES or _pads_by_edges(node):
        return Lies(_moved(node, args, kwargs), False) if on_cpu(value(node)) else None
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


def _moved(node: fx.Node, args: Any, kwargs: Any) -> tuple[int, ...]:
    """Strides of a copy to other positions on a CPU, of which the fake mode may say others."""
    x, shape = args[0], value(node).shape
    if node.target in _ROLLS:
        return _rolled(x, *args[1:], **kwargs).stride()
    suggested = suggests_channels_last(x.shape, x.stride())
    return new_strides(shape, True) if suggested else torch.empty(shape, device="meta").stride()


def _rolled(x: Tensor, shifts: Any, dims: Any = ()) -> Tensor:
    """As ATen's ``roll_cpu`` does it."""
    shifts, dims = ((a,) if isinstance(a, int) else tuple(a) for a in (shifts, dims))
    if not dims:
        return torch.empty(x.shape, device="meta")
    for shift, dim in zip(shifts, dims, strict=True):
        start = -shift % x.shape[dim] if x.shape[dim] else 0
        x = torch.cat([x.narrow(dim, start, x.shape[dim] - start), x.narrow(dim, 0, start)], dim)
    return x


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
    if node.target in _MOVES:
        found = lies(node, given)
        return found is not None and _densest(node, lambda n: found.strides) != _densest(node.args[0], given)  # type: ignore[arg-type]
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
