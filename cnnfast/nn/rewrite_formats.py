"""What an operator of a traced graph does about memory formats: whether it gives its map in the format that it gets,
with the same numbers in each (`keeps`), or takes a map in any and gives what is no map (`reads`).

A broadcast operand has no say in ATen's format of a result: beside a map (N, C, *size) that is one value for each
channel (N or 1, C, 1, ...) or for each position (N or 1, 1, *size).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..cpu.norm_inference import SMALL
from ..dispatch import outsized
from .rewrite_calls import call_kind
from .rewrite_effects import numel, sizes, value
from .rewrite_norm import NormCall
from .rewrite_site import Site

__all__ = [
    "SLOW_OF_CONTIGUOUS",
    "converts_itself",
    "follows",
    "is_part",
    "keeps",
    "maps_of",
    "named",
    "one_shape",
    "outsized_site",
    "pooled_to_one",
    "reads",
    "splits",
    "takes_numbers",
    "wants_dense",
    "writes_at_each_place",
    "writes_part",
]


def named(names: str) -> frozenset[Any]:
    """The functions of these names in torch and torch.nn.functional, and the methods."""
    found: set[Any] = set(names.split())
    for name in names.split():
        found |= {getattr(m, name) for m in (torch, F, torch._C._nn) if callable(getattr(m, name, None))}
    return frozenset(found)


# Of two or more maps of one shape, of one and numbers, or of one. (Not among them: what draws random numbers, whose
# places follow the memory.)
_SUMS = frozenset({operator.add, operator.sub, operator.mul, operator.truediv}) | named("add sub mul div")
_POINTWISE = (
    frozenset({operator.pow, operator.neg, operator.abs})
    | named("pow square sqrt rsqrt exp log neg abs sin cos reciprocal clamp clip maximum minimum rsub addcmul addcdiv")
    | named("lerp erf hardswish hardsigmoid softplus softsign celu selu threshold tanhshrink detach clone")
)
_POOLS = frozenset({torch.max_pool2d, F.max_pool2d, F.max_pool3d})
_POOLED = frozenset({F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d})
_SHUFFLES = frozenset({torch.pixel_shuffle, torch.pixel_unshuffle})
SLOW_OF_CONTIGUOUS = _POOLED | _SHUFFLES  # docs/facts.md
_ONTO = frozenset({operator.iadd, operator.isub, operator.imul, operator.itruediv, "add_", "sub_", "mul_", "div_"})
_OF_ONE_MAP = frozenset({F.batch_norm, torch.batch_norm, F.prelu, torch.prelu, "prelu"})  # and vectors
_OVER = named("mean sum amax amin var std norm max min")  # with ``dim``, second or by name
_OVER_CHANNELS = named("amax amin norm max min")  # of all positions, ATen takes these slower of channels-last maps
_SPLITS = named("chunk split tensor_split")
# Of functions that take many instructions for a number, those that ATen has by whole vectors of dense memory only;
# and activations that take few.
_COSTLY, _BY_DENSE = (
    named("exp log sin cos erf pow softplus softsign celu selu tanhshrink"),
    named("tanh exp log sin cos"),
)
_CHEAP = frozenset({"relu", "relu6", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "threshold"})
_UNROLLED = 32  # numbers that ATen's loops take at once with AVX-512


# --- one map and others -----------------------------------------------------------------------------------------------


def follows(node: fx.Node) -> bool:
    """Whether each number of the result is made of those at its place, so that it lies as the maps given do."""
    kind = call_kind(node.target)
    return node.target in _SUMS or node.target in _POINTWISE or kind is not None and kind.pointwise


def takes_numbers(node: fx.Node) -> bool:
    """Whether a number given beside a tensor is an operand like that."""
    return node.target in _SUMS or node.target in named("rsub")


def maps_of(node: fx.Node) -> list[fx.Node]:
    """The tensors given that are maps: not a norm's vectors, PReLU's, and what is broadcast."""
    if is_part(node):
        return [node.args[0]]  # type: ignore[list-item]
    found = [n for n in node.all_input_nodes if isinstance(value(n), Tensor)]
    if isinstance(node.target, NormCall) or node.target in _OF_ONE_MAP:
        return found[:1]
    if follows(node) or node.target in _ONTO:
        return [n for n in found if not _is_broadcast(value(n), value(node))]
    return found


def _is_broadcast(t: Tensor, y: Any) -> bool:
    """Whether it is one value for each channel, for each position or for all, where y is a map."""
    if not isinstance(y, Tensor) or y.dim() < 4 or t.dim() > y.dim():
        return False
    missing = y.dim() - t.dim()
    one = [k < missing or _is_one(t.shape[k - missing]) for k in range(y.dim())]
    ones = [_is_one(n) for n in y.shape]
    by_channel, by_position = all(one[2:]) and not all(ones[2:]), one[1] and not ones[1]
    return by_channel or by_position


def _is_one(n: Any) -> bool:
    return type(n) is int and n == 1


def one_shape(node: fx.Node) -> bool:
    """Whether it makes its result of maps of that shape, and what is broadcast."""
    shape: torch.Size = value(node).shape
    given: list[torch.Size] = [value(n).shape for n in maps_of(node)]
    return bool(given) and all(s == shape for s in given)


def writes_at_each_place(node: fx.Node) -> bool:
    """Whether it writes to its first argument, a map, at each place from what is there."""
    kind = call_kind(node.target)
    if node.target in _ONTO or node.target in _POINTWISE:
        return one_shape(node)
    return kind is not None and kind.pointwise


def keeps(node: fx.Node, inference: bool) -> bool:
    """Whether it gives the format that it gets, and the same numbers in each (a mean but for its rounding)."""
    target = node.target
    if converts_itself(node) or outsized_site(node):
        return False
    if isinstance(target, Site):
        return target.any_format(inference)
    if node.op not in ("call_function", "call_method"):
        return False
    if inference and (splits(node) or is_part(node)):
        return True
    y = value(node)
    if target in _SUMS or inference and target in _ONTO:
        return one_shape(node) and (inference or len(maps_of(node)) == _tensors(node))
    kind = call_kind(target)
    if y.dim() == 3:
        return kind is not None and kind.pointwise and kind.bind(node.args, node.kwargs) is not None
    if isinstance(target, NormCall):
        return True
    if target is torch.cat:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        return isinstance(dim, int) and dim == 1
    if target in _POOLS:
        return True
    if target in _SHUFFLES:
        return inference and y.dim() == 4
    if target in _POOLED:
        return inference
    if target in _POINTWISE:
        return inference and one_shape(node) and not {"out", "memory_format"} & node.kwargs.keys()
    if target is F.normalize:
        by_channel = type(dim := node.kwargs.get("dim", 1)) is int and dim == 1
        return inference and by_channel and len(node.args) < 3 and "out" not in node.kwargs
    if kind is None:
        return False
    bound = kind.bind(node.args, node.kwargs)
    if bound is None:
        return False
    if kind.name == "interpolate":
        return bound["mode"] == "nearest" or inference
    if inference and kind.name == "batch_norm":
        return bound["training"] is False
    if kind.name == "prelu":
        return inference
    if kind.name == "pad":
        pad = bound["pad"]
        plain = isinstance(pad, (list, tuple)) and len(pad) <= 4 and bound["mode"] != "circular"
        return inference and plain and y.dim() == 4
    return kind.pointwise


def _tensors(node: fx.Node) -> int:
    return sum(isinstance(value(n), Tensor) for n in node.all_input_nodes)


def converts_itself(node: fx.Node) -> bool:
    """Whether it is an InstanceNorm in 16 bits of images so small that ATen's is taken, which would convert them and
    back."""
    if isinstance(node.target, NormCall):
        instance = node.target.norm.kind == "instance"
    else:
        instance = isinstance(node.target, Site) and any(c.kind.name == "instance_norm" for c in node.target.calls)
    return instance and value(node).dtype != torch.float32 and numel(node) <= SMALL["instance"] * value(node).shape[0]


def outsized_site(node: fx.Node) -> bool:
    """Whether it is a site whose first call is a transposed convolution that is `outsized`."""
    if not isinstance(node.target, Site) or node.target.calls[0].kind.name != "conv_transpose3d":
        return False
    call = node.target.calls[0]
    bound = call.kind.bind(call.args, call.kwargs)
    assert bound is not None
    kernel = value(node.args[1 + bound["weight"].place]).shape[2:]
    return outsized(bound["groups"], kernel, sizes(node.args[0])[2:])


# --- what is made of one map, and is none -----------------------------------------------------------------------------


def reads(node: fx.Node, x: fx.Node) -> bool:
    """Whether it takes the map x, as that alone, in any format, and gives for each the same numbers, but for rounding,
    in the same strides: a mean and the like over the channels, over all positions, or over both; an extreme or a norm
    over the channels."""
    if node.op not in ("call_function", "call_method") or not node.args or node.args[0] is not x:
        return False
    if node.all_input_nodes != [x] or not isinstance(value(x), Tensor) or value(x).dim() < 4:
        return False
    if pooled_to_one(node):
        return True
    over = _over(node)
    n = value(x).dim()
    if over is None or "out" in node.kwargs or "dtype" in node.kwargs:
        return False
    over = {d + n if d < 0 else d for d in over}
    if node.target in _OVER_CHANNELS:
        return over == {1}
    return over in ({1}, set(range(2, n)), set(range(1, n)))


def _over(node: fx.Node) -> set[int] | None:
    """The dimensions that are given to a function of `_OVER`."""
    if node.target not in _OVER:
        return None
    place = 2 if node.target in named("norm") else 1
    dim = node.kwargs.get("dim", node.args[place] if len(node.args) > place else None)
    if type(dim) is int:
        return {dim}
    if isinstance(dim, (list, tuple)) and dim and all(type(d) is int for d in dim):
        return set(dim)
    return None


def pooled_to_one(node: fx.Node) -> bool:
    """Whether it pools each channel to one mean: that is ``x.mean(positions, keepdim=True)``, whose strides follow no
    format."""
    if node.target not in (F.adaptive_avg_pool2d, F.adaptive_avg_pool3d):
        return False
    size: Any = node.kwargs.get("output_size", node.args[1] if len(node.args) > 1 else None)
    each = tuple(size) if isinstance(size, (list, tuple)) else (size,)
    return all(_is_one(n) for n in each)


# --- parts of a map's channels ----------------------------------------------------------------------------------------


def splits(node: fx.Node) -> bool:
    """Whether it gives the parts of a map's channels, as views."""
    if node.target not in _SPLITS or not node.args or not isinstance(value(node.args[0]), Tensor):
        return False
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    n = value(node.args[0]).dim()
    return n in (4, 5) and type(dim) is int and dim in (1, 1 - n)


def is_part(node: fx.Node) -> bool:
    """Whether it is one part of that, or a slice of a map's channels."""
    if node.target is not operator.getitem:
        return False
    x, index = node.args
    if isinstance(x, fx.Node) and splits(x):
        return type(index) is int
    return _of_channels(x, index)


def writes_part(node: fx.Node) -> bool:
    """Whether it sets a slice of a map's channels."""
    return node.target is operator.setitem and _of_channels(*node.args[:2])


def _of_channels(x: Any, index: Any) -> bool:
    """Whether this index of a map is a slice of its channels."""
    if not isinstance(x, fx.Node) or not isinstance(value(x), Tensor) or value(x).dim() not in (4, 5):
        return False
    whole = slice(None)
    return (
        isinstance(index, tuple)
        and 1 < len(index) <= value(x).dim()
        and all(isinstance(i, slice) for i in index)
        and all(i == whole for k, i in enumerate(index) if k != 1)
    )


def wants_dense(user: fx.Node, part: fx.Node) -> bool:
    """Whether a copy of a part, channels-last, costs less than what it takes ``user`` longer that the part has gaps
    between positions: of each position's channels, ATen takes what is left of whole vectors one by one (48 channels
    0.7 to 5 times longer, of 16 up to 13 times: docs/facts.md)."""
    kind = call_kind(user.target)
    costly = user.target in _COSTLY or kind is not None and kind.pointwise and kind.name not in _CHEAP
    return costly and (user.target in _BY_DENSE or sizes(part)[1] % _UNROLLED != 0)
