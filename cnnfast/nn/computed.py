"""Weights that PyTorch computes from others on each call, ahead of a convolution: by weight_norm, spectral_norm and
pruning (a hook that sets ``module.weight``), or by parametrizations (a property).

What they are computed from, their sources, decides: on a CPU, in inference, a weight is kept in the cache of packed
weights (`cpu/packing.py`) under the rules that hold there for a plain one: the content of every source is looked at on
each call, and a result is kept when that is met for the second time. Kept, it is a Parameter of nobody's, and its
convolution packs it once. With gradients, under autocast, on a GPU and where spectral_norm's vectors move, it is
computed on each call, once, by the module's own code.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..cpu.packing import PACKS, Leased, why_not_cacheable
from ..dispatch import on_cpu, watched

__all__ = [
    "HOOKS",
    "ComputedWeight",
    "by_hook",
    "by_parametrization",
    "is_parametrized",
    "is_patched",
    "kept",
    "made",
    "owner_first",
    "owner_of",
]

T = TypeVar("T")


# --- keeping them -----------------------------------------------------------------------------------------------------


def owner_of(sources: Sequence[Tensor]) -> int | None:
    """Which of them keeps what is computed: the largest Parameter."""
    sizes = [s.numel() if isinstance(s, nn.Parameter) else -1 for s in sources]
    largest = max(sizes, default=-1)
    return sizes.index(largest) if largest >= 0 else None


def kept(
    sources: Sequence[Tensor],
    owner: int,
    key: Callable[[], Hashable],
    make: Callable[[], T],
    leased: Leased | None = None,
) -> T | None:
    """What ``make()`` gave for sources of this content (`made` among it, for a weight), met for the second time; None
    where it is met for the first, or where nothing is kept now. ``key()`` says everything else that it depends on.
    ``leased``: of who asks for the same again and again, and for what is held first."""
    if _why_not_kept(sources, owner) is not None:
        return None
    weight, *others = owner_first(sources, owner)
    return (PACKS if leased is None else leased).get(weight, key, others, make)


def owner_first(sources: Sequence[T], owner: int) -> list[T]:
    return [sources[owner], *sources[:owner], *sources[owner + 1 :]]


def _why_not_kept(sources: Sequence[Tensor], owner: int) -> str | None:
    if torch.is_grad_enabled() and any(s.requires_grad for s in sources):
        return "a gradient is needed"
    if torch._C._is_any_autocast_enabled():
        return "under autocast it may be rounded"
    for s in sources:
        if watched(s) or s.layout is not torch.strided or s.is_neg():
            return "a source is not a plain dense tensor"
        if not on_cpu(s):
            return "nothing is kept on a GPU"
    return why_not_cacheable(sources[owner])


def made(compute: Callable[[], Tensor]) -> nn.Parameter:
    """A weight to keep, of which nobody else has the memory."""
    with torch.inference_mode(False), torch.no_grad():  # kept for calls in other modes, too
        weight = nn.Parameter(compute().clone(), requires_grad=False)
    PACKS.own(weight)
    return weight


# --- of modules -------------------------------------------------------------------------------------------------------

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_patched(m: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: hooks, or a forward of its own."""
    d = getattr(m, "__dict__", {})
    return "forward" in d or any(d.get(name) for name in HOOKS)


class _Hook(NamedTuple):
    """``name``: the attribute that says of which tensor; ``sources``: what their names end in; ``compute``: the tensor,
    moving nothing."""

    name: str
    sources: tuple[str, ...]
    compute: Callable[[Any, nn.Module], Tensor]


_HOOKS: dict[type, _Hook] = {
    WeightNorm: _Hook("name", ("_v", "_g"), lambda h, m: h.compute_weight(m)),
    SpectralNorm: _Hook("name", ("_orig", "_u", "_v"), lambda h, m: h.compute_weight(m, False)),
} | {
    cls: _Hook("_tensor_name", ("_orig", "_mask"), lambda h, m: h.apply_mask(m))
    for cls in vars(prune).values()
    if isinstance(cls, type) and issubclass(cls, prune.BasePruningMethod)
}
# Parametrizations of PyTorch's own. They are functions of their tensors and attributes, but for `_MOVES` in training.
_MOVES = parametrizations._SpectralNorm
_PURE = (parametrizations._WeightNorm, parametrizations._Orthogonal, _MOVES)
_OF_A_MODULE = frozenset(nn.Module().__dict__)
_OF_AN_INJECTED_CLASS = frozenset(
    ("__getstate__", "__deepcopy__", "__module__", "__doc__", "weight", "bias", "__slotnames__")  # the last by copying
)


@dataclass(eq=False)
class _Kept:
    """``weight`` is kept; ``shown`` is what ``module.weight`` holds meanwhile, of this ``version`` when it was set."""

    weight: nn.Parameter
    shown: weakref.ref[Tensor] | None = None
    version: int = -1


class ComputedWeight:
    """Stands for the weight of a module. ``hook`` sets it; None: parametrizations give it. ``key``: everything but
    ``sources`` that it depends on; ``moves``: computing it changes buffers."""

    __slots__ = ("hook", "key", "module", "moves", "sources")

    def __init__(self, module: nn.Module, hook: Any, sources: tuple[Tensor, ...], key: Any, moves: bool) -> None:
        self.module, self.hook, self.sources, self.key, self.moves = module, hook, sources, key, moves

    @property
    def requires_grad(self) -> bool:
        return any(s.requires_grad for s in self.sources)

    @property
    def facts(self) -> tuple[object, ...]:
        """What its form depends on."""
        return self.key, *[(type(s), s.shape, s.stride(), s.dtype, s.device) for s in self.sources]

    def form(self) -> Tensor:
        """A tensor of the form that it will have; nothing moves."""
        with torch.no_grad():
            if self.hook is not None:
                return _HOOKS[type(self.hook)].compute(self.hook, self.module)
            weights = self._parametrizations
            weight: Tensor = (copy.deepcopy(weights) if self.moves else weights)()
            return weight

    @property
    def _parametrizations(self) -> parametrize.ParametrizationList:
        return self.module.parametrizations.weight  # type: ignore[return-value, union-attr]

    def __call__(self) -> Tensor:
        """The weight of this call. To be asked once, where the module would have computed it."""
        owner = owner_of(self.sources)
        if owner is not None and not (self.moves or parametrize._cache_enabled):
            found = kept(self.sources, owner, lambda: self.key, self._made)
            if found is not None:
                self._show(found)
                return found.weight
        if self.hook is not None:
            self.hook(self.module, ())
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    def _made(self) -> _Kept:
        return _Kept(made(self.form))

    def _show(self, found: _Kept) -> None:
        """Let ``module.weight`` hold what a hook would have set, for others to write to."""
        if self.hook is None:
            return
        shown: Tensor | None = self.module.__dict__.get("weight")
        if found.shown is None or shown is None or found.shown() is not shown or shown._version != found.version:
            with torch.inference_mode(False), torch.no_grad():
                shown = found.weight.detach().clone()
            self.module.weight = shown
            found.shown, found.version = weakref.ref(shown), shown._version


def by_hook(module: nn.Module) -> ComputedWeight | None:
    """The weight of a plain module whose only hook is one of PyTorch's own that computes it. None of others."""
    d = module.__dict__
    hooks: dict[int, Any] = d["_forward_pre_hooks"]
    if len(hooks) != 1 or any(d[name] for name in HOOKS if name != "_forward_pre_hooks"):
        return None
    (hook,) = hooks.values()
    kind = _HOOKS.get(type(hook))
    if kind is None or hook.__dict__.get(kind.name) != "weight" or d["_forward_pre_hooks_with_kwargs"]:
        return None
    sources = _tensors(d, ["weight" + end for end in kind.sources])
    if sources is None or "weight" in d["_parameters"] or "weight" in d["_buffers"]:
        return None
    key = (type(hook), getattr(hook, "dim", None))
    return ComputedWeight(module, hook, sources, key, type(hook) is SpectralNorm and d["training"])


def _tensors(d: dict[str, Any], names: Sequence[str] | None = None) -> tuple[Tensor, ...] | None:
    """The Parameters and buffers of these names, or all. None where one of them is not a plain one."""
    own = {**d["_parameters"], **d["_buffers"]}
    found = [t for t in own.values() if t is not None] if names is None else [own.get(name) for name in names]
    plain = all(type(t) in (Tensor, nn.Parameter) and t.is_leaf for t in found)  # type: ignore[union-attr]
    return tuple(found) if plain else None  # type: ignore[arg-type]


def is_parametrized(cls: type) -> bool:
    """Whether it is what `torch.nn.utils.parametrize` makes of a class, to compute its ``weight``."""
    own = cls.__dict__
    return (
        cls.__module__ == parametrize.__name__
        and own.keys() <= _OF_AN_INJECTED_CLASS
        and type(own.get("weight")) is property
        and own["weight"].fget.__module__ == parametrize.__name__
    )


def by_parametrization(module: nn.Module) -> ComputedWeight | str:
    """The weight of a module of such a class, by parametrizations of PyTorch's own; or why not."""
    weights = module._modules["parametrizations"]._modules  # type: ignore[union-attr]
    chain = weights.get("weight")
    if len(weights) != 1 or type(chain) is not parametrize.ParametrizationList or is_patched(chain):
        return "it is parametrized in another way than by its weight"
    sources, key, moves = _tensors(chain.__dict__), [], False
    for p in chain._modules.values():
        if type(p) not in _PURE or is_patched(p):
            return f"{type(p).__name__} computes its weight, which may do anything"
        more = _tensors(p.__dict__)
        sources = None if sources is None or more is None else (*sources, *more)
        key.append((type(p), *[(k, v) for k, v in p.__dict__.items() if k not in _OF_A_MODULE]))
        moves = moves or type(p) is _MOVES and p.training
    if sources is None:
        return "its weight is computed from something else than Parameters and buffers"
    return ComputedWeight(module, None, sources, (*key, moves), moves)
