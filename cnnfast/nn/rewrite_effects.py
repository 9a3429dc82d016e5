"""What the nodes of a traced graph read and write: whether a call may run later than where it stands.

Names tell, as in PyTorch: what ends in an underscore, or is given ``inplace`` or ``out``, writes. A call that is not
PyTorch's may write to whatever it is given; one that takes no tensor (a switch of the grad mode, of autocast) holds
for all that follows.
"""

from __future__ import annotations

import builtins
import inspect
import math
import operator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

__all__ = ["Everything", "is_known", "numel", "sizes", "storages", "switches_autocast", "touched", "value", "written"]


class Everything:
    """In a set of storages: any of them."""


def value(node: Any) -> Any:
    """What Dynamo found that the node gives; another argument as it is."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def sizes(node: Any) -> list[int]:
    """Of the tensor that the node gives, as at the first call."""
    return [n.node.hint or 1 if isinstance(n, torch.SymInt) else n for n in value(node).shape]


def numel(node: Any) -> int:
    return math.prod(sizes(node))


def storages(node: fx.Node) -> set[Any]:
    """Of the tensors that the node gives."""
    found: set[Any] = set()
    for t in tree_leaves(value(node)):
        if isinstance(t, Tensor):
            plain = t.layout is torch.strided and type(t).__name__ == "FakeTensor"
            found.add(t.untyped_storage()._cdata if plain else Everything)
    return found


def touched(node: fx.Node) -> set[Any]:
    """The storages of its arguments."""
    return set().union(*(storages(n) for n in node.all_input_nodes))


def written(node: fx.Node) -> set[Any]:
    """The storages that it may write to; `Everything` also for what changes how the rest runs."""
    if node.op in ("placeholder", "get_attr", "output"):
        return set()
    if node.op == "call_method":
        name = str(node.target)
        if not hasattr(Tensor, name) or name in ("backward", "register_hook", "retain_grad", "set_", "resize_"):
            return {Everything}
        return _of(node.args[0]) if _writes(name) else _marked(node, None)
    if node.op != "call_function":
        return {Everything}
    target = node.target
    if getattr(target, "writes_nothing", False):  # one of ours
        return set()
    if isinstance(target, torch._ops.OpOverload):
        return touched(node) if target._schema.is_mutable else set()
    if isinstance(target, torch._ops.OpOverloadPacket):  # as torch 2.14 traces `.mH`
        mutable = any(getattr(target, name)._schema.is_mutable for name in target.overloads())
        return touched(node) if mutable else set()
    if not is_known(target):
        return touched(node) or (set() if _is_numpy(target) else {Everything})
    name = getattr(target, "__name__", "")
    if target in _IN_PLACE or _writes(name) and target not in _KEYWORDS:
        return _of(node.args[0] if node.args else None) or {Everything}
    if name in ("batch_norm", "instance_norm", "embedding", "embedding_bag"):  # running statistics; max_norm
        return set().union(*(storages(n) for n in node.all_input_nodes[1:]))
    return _marked(node, target)


def switches_autocast(node: fx.Node) -> bool:
    """Whether it is where autocast begins or ends: that holds for what runs after it (`written`), but writes to
    nothing and has no say in where results lie."""
    return node.op == "call_function" and node.target in _AUTOCAST


_AUTOCAST = frozenset({torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast})


def _is_numpy(target: Any) -> bool:
    """Whether it is a function of NumPy's, by PyTorch's own: none but those that draw numbers change how the rest
    runs."""
    module = str(getattr(getattr(target, "f", None), "__module__", ""))
    wrapped = type(target).__name__ == "numpy_to_tensor_wrapper"
    return wrapped and module.startswith("torch._numpy") and module != "torch._numpy.random"


def _writes(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _of(argument: Any) -> set[Any]:
    return storages(argument) if isinstance(argument, fx.Node) else set()


def _marked(node: fx.Node, target: Any) -> set[Any]:
    """By ``inplace`` and ``out``."""
    if node.kwargs.get("out") is not None:
        return {Everything}
    at = _inplace_at(target)
    given = node.kwargs.get("inplace", node.args[at] if at is not None and len(node.args) > at else False)
    return touched(node) if given is not False else set()


@lru_cache(maxsize=1024)
def _inplace_at(target: Any) -> int | None:
    """The position of a function's ``inplace``."""
    if not inspect.isfunction(target):
        return None
    names = list(inspect.signature(target).parameters)
    return names.index("inplace") if "inplace" in names else None


_IN_PLACE = frozenset(
    getattr(operator, name) for name in dir(operator) if name.startswith("i") and hasattr(operator, f"__{name}__")
) - {operator.index, operator.inv, operator.invert} | {operator.setitem, operator.delitem}  # fmt: skip
_KEYWORDS = frozenset({operator.and_, operator.or_, operator.not_, operator.is_})
_SWITCHES = ("set_", "manual_seed", "seed", "use_deterministic", "autocast", "_")


def is_known(target: Any) -> bool:
    """Whether it is a function of PyTorch or of Python that does what its name says."""
    return id(target) in _known()


@lru_cache(maxsize=1)
def _known() -> frozenset[int]:
    """Those functions. (By identity: not all can be compared.)"""
    found = {id(getattr), id(len), id(builtins.sum), id(min), id(max), id(abs), id(isinstance)}
    for module in (torch, F, torch._C._nn, torch.special, torch.fft, torch.linalg, operator, math):
        for name in dir(module):
            if not name.startswith(_SWITCHES) and callable(function := getattr(module, name)):
                found.add(id(function))
    found |= {id(torch._C._log_api_usage_once), id(torch._C._nn.pad), id(torch._weight_norm)}
    found |= {id(torch.sym_float), id(torch.sym_int)}
    return frozenset(found)
