"""The cache of packed weights. It never serves an old weight, and packs none that is used once.

Inference repacks a layer's weight (other memory order, BatchNorm folded in) and uses it many times. What makes that
dangerous: a pointer and ``Tensor._version`` are no identity (a second model is often loaded to the same address with
the same version), and writes through ``.data``, NumPy, DLPack, another Parameter over the same memory or another
process change no version. So the content decides (`content`): on every call, a hash of every bit of the weight and of
the small vectors that were folded into it is compared with that of the call before. Memory that PyTorch has handed to
nobody since (`watch`) is not read for it; other memory is, at its speed (docs/facts.md), which `freeze` saves who knows
that weights are constant.

A weight is packed when it is met for the second time: one that changes between any two calls (a generator whose
optimiser steps between them) would be packed for a single use, which costs several times what it saves.

A pack belongs to one ``nn.Parameter``, by a weak reference, and dies with it; a view of one counts as it, any other
temporary is never cached. The cache lives outside the modules' state, so models still deep-copy and pickle.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from .content import content_of, form_of, memory_of, sure_content, why_no_hash
from .watch import Watch, end_watch, end_watches, unwritten
from .watch import owner as owner_of

__all__ = ["PACKS", "Frozen", "Leased", "PackCache", "freeze", "invalidate", "unfreeze", "why_not_cacheable"]

T = TypeVar("T")


def why_not_cacheable(weight: torch.Tensor) -> str | None:
    """Why no pack of ``weight`` may be kept, or None where it may: for a Parameter or a view of one."""
    if type(owner_of(weight)) is not nn.Parameter:
        return "the weight is not an nn.Parameter (a temporary has no identity to cache by)"
    return why_no_hash()


# --- what is known of a tensor ----------------------------------------------------------------------------------------


def _vector(t: torch.Tensor | None) -> Hashable:
    return None if t is None else _holding(t, content_of(t))


def _holding(vector: torch.Tensor, content: bytes | None) -> Hashable:
    return vector.shape, vector.stride(), vector.dtype, content


def _version(t: torch.Tensor | None) -> Hashable:
    """What tells most writes to a frozen tensor without reading it: not those through ``.data`` and the like."""
    return None if t is None else _written(t, memory_of(t))


def _written(t: torch.Tensor, memory: tuple[Hashable, ...]) -> Hashable:
    """`_version` of a tensor whose `memory_of` is this."""
    return memory, None if t.is_inference() else t._version


# --- the cache --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Pack:
    vectors: Hashable  # their content
    versions: tuple[Hashable, ...] | None  # of all tensors where the weight is frozen
    value: object  # None: these vectors were met once


class _Known:
    """A tensor, or what it is a view of, in its form, while nobody writes to it (``watch``; None: nobody can)."""

    __slots__ = ("form", "of_owner", "ref", "watch")

    def __init__(self, t: torch.Tensor, watch: Watch | None) -> None:
        owner = owner_of(t)
        self.ref, self.watch = weakref.ref(owner), watch
        self.form, self.of_owner = form_of(t), form_of(owner)

    def holds(self, t: torch.Tensor) -> bool:
        owner = self.ref()
        if t is owner:
            form = self.of_owner
        elif owner is not None and owner_of(t) is owner:
            form = self.form
        else:
            return False
        return (self.watch is None or unwritten(t, self.watch)) and form_of(t) == form


class _Constant(_Known):
    """A tensor beside which a weight is frozen (``slot``), or that weight, while it has this version."""

    __slots__ = ("slot", "version")

    def __init__(self, t: torch.Tensor, slot: _Slot) -> None:
        super().__init__(t, None)
        self.slot, self.version = weakref.ref(slot), _version(self.ref())

    def holds(self, t: torch.Tensor) -> bool:
        slot = self.slot()
        frozen = slot is not None and slot.frozen is not None
        return frozen and super().holds(t) and _version(self.ref()) == self.version


@dataclass
class _Slot:
    """What is known of one Parameter and of views of it, each by its `form_of`."""

    ref: weakref.ref[torch.Tensor]
    memory: tuple[Hashable, ...]  # where and in which form the Parameter is
    contents: dict[Hashable, bytes | None] = field(default_factory=dict)  # at the last call
    frozen: Hashable = None  # the version for which the Parameter counts as constant
    own: bool = False  # nobody else has the Parameter: its content stays
    packs: OrderedDict[tuple[Hashable, Hashable], _Pack] = field(default_factory=OrderedDict)  # by form and key


_MAX_VIEWS = 16  # of one Parameter


class PackCache:
    """Values made from a Parameter and a few small vectors, at most ``limit`` for each Parameter (least recent goes).

    Thread-safe. Two threads that miss at once both build; the last one stays.
    """

    def __init__(self, limit: int = 4) -> None:
        self.limit = limit
        self._slots: dict[int, _Slot] = {}
        self._lock = threading.RLock()  # re-entrant: a garbage collection inside may run `forget` below

    def get(
        self,
        weight: torch.Tensor,
        key: Callable[[], Hashable],
        vectors: Sequence[torch.Tensor | None],
        build: Callable[[], T],
    ) -> T | None:
        """The value for what weight and vectors hold: kept, or from ``build()`` where they hold it for the second time
        or are frozen; None where it is the first.

        ``key()`` says everything else that the value depends on; it is asked where there is a value, or is to be one.
        The number of vectors is the same for the same key. The weight is one that `why_not_cacheable` accepts.
        """
        owner = owner_of(weight)
        memory = memory_of(owner)
        slot = self._slot(owner, memory)
        versions: tuple[Hashable, ...] | None = None
        if slot.frozen is not None:
            versions = (_written(owner, memory), *map(_version, vectors))
            pack = slot.packs.get((memory[1:] if weight is owner else form_of(weight), key()))
            if pack is not None and pack.versions == versions:
                return pack.value  # type: ignore[return-value]
            written = pack is not None and pack.versions is not None and pack.versions[0] == slot.frozen
            if written or versions[0] != slot.frozen:  # to a vector, or to the weight
                slot.frozen = versions = None
        return self._checked(slot, weight, key, vectors, versions, build)

    def _checked(
        self,
        slot: _Slot,
        weight: torch.Tensor,
        key: Callable[[], Hashable],
        vectors: Sequence[torch.Tensor | None],
        versions: tuple[Hashable, ...] | None,
        build: Callable[[], T],
    ) -> T | None:
        """As `get`, by content; ``versions`` where the weight is frozen."""
        form, content = form_of(weight), b"own" if slot.own else content_of(weight)
        if slot.contents.get(form) != content:
            with self._lock:
                for name in [name for name in slot.packs if name[0] == form]:
                    del slot.packs[name]  # stale for ever
                if len(slot.contents) >= _MAX_VIEWS:
                    slot.contents.clear()
                slot.contents[form] = content
            if versions is None and not slot.own:
                return None
        name, others = (form, key()), tuple(map(_vector, vectors))
        with self._lock:
            pack = slot.packs.get(name)
            if pack is not None:
                slot.packs.move_to_end(name)
        met = pack is None or pack.vectors == others  # under a new key, the weight is what was met
        value: T | None = pack.value if pack is not None and met else None  # type: ignore[assignment]
        if value is not None and pack is not None and pack.versions == versions:
            return value
        if value is None and (met or versions is not None):
            with torch.no_grad():
                value = build()
            if not slot.own and content != content_of(weight) or others != tuple(map(_vector, vectors)):
                return value  # written to in between
        with self._lock:
            if slot.contents.get(form) == content:  # else another thread has met another content since
                slot.packs[name] = _Pack(others, versions, value)
                slot.packs.move_to_end(name)
                while len(slot.packs) > self.limit:
                    slot.packs.popitem(last=False)
        return value

    def known(
        self, weight: torch.Tensor, key: Hashable, vectors: Sequence[torch.Tensor | None]
    ) -> tuple[weakref.ref[_Pack], list[_Known | None]] | None:
        """The value that is kept for these, and them, while nobody writes to them, or while a frozen weight is that;
        None where there is none, or a write might go unseen."""
        owner = owner_of(weight)
        slot, form = self._slot(owner, memory_of(owner)), form_of(weight)
        pack = slot.packs.get((form, key))
        if pack is None or pack.value is None:
            return None
        if slot.frozen is not None and pack.versions == (_version(owner), *map(_version, vectors)):
            return weakref.ref(pack), [None if t is None else _Constant(t, slot) for t in (weight, *vectors)]
        known: list[_Known | None] = [_Known(weight, None)]
        if not slot.own:
            found = sure_content(weight)
            if found is None or found[0] != slot.contents.get(form):
                return None
            known = [_Known(weight, found[1])]
        vectors_sure = True
        for t, want in zip(vectors, pack.vectors, strict=True):  # type: ignore[call-overload]
            found = None if t is None else sure_content(t)  # of each, so that they become sure together
            vectors_sure &= t is None or found is not None and _holding(t, found[0]) == want
            known.append(None if t is None else _Known(t, None if found is None else found[1]))
        if not vectors_sure:
            return None
        return weakref.ref(pack), known

    def _slot(self, owner: torch.Tensor, memory: tuple[Hashable, ...]) -> _Slot:
        """That of a Parameter, whose `memory_of` is this; a new one where it got another."""
        ident = id(owner)
        slot = self._slots.get(ident)
        if slot is not None and slot.ref() is owner and slot.memory == memory:
            return slot

        def forget(ref: weakref.ref[torch.Tensor]) -> None:
            with self._lock:
                slot = self._slots.get(ident)
                if slot is not None and slot.ref is ref:
                    del self._slots[ident]

        with self._lock:
            slot = self._slots.get(ident)
            if slot is None or slot.ref() is not owner or slot.memory != memory:
                slot = self._slots[ident] = _Slot(weakref.ref(owner, forget), memory)
            return slot

    def own(self, weight: nn.Parameter) -> None:
        """Let a Parameter that nobody else can write to count as met already, and as constant: a value of this cache
        from which others are made. (The vectors that go with it are looked at on every call.)"""
        self._slot(weight, memory_of(weight)).own = True

    def invalidate(self, target: nn.Module | torch.Tensor) -> int:
        """Drop the values made from ``target`` (a Parameter, or all Parameters of a module); returns how many there
        were. What was frozen is so no longer."""
        dropped = 0
        if isinstance(target, nn.Module):
            end_watches(target)
        elif isinstance(target, torch.Tensor):
            end_watch(target)
        with self._lock:
            for t in _tensors("invalidate", target):
                slot = self._slots.get(id(t))
                if slot is not None and slot.ref() is t:
                    dropped += sum(pack.value is not None for pack in slot.packs.values())
                    del self._slots[id(t)]
        return dropped

    def freeze(self, module: nn.Module) -> list[torch.Tensor]:
        """Let the Parameters count as constant while their versions stay. Those of them that did not."""
        found = []
        for t in _tensors("freeze", module):
            slot = self._slot(t, memory_of(t))
            if slot.frozen is None or slot.frozen != _version(t):
                slot.frozen = _version(t)
                found.append(t)
        return found

    def thaw(self, tensors: Iterable[torch.Tensor]) -> None:
        """The opposite: what is packed stays, and is checked again."""
        for t in tensors:
            slot = self._slots.get(id(t))
            if slot is not None and slot.ref() is t:
                slot.frozen = None

    def __len__(self) -> int:
        """How many values are held."""
        with self._lock:
            return sum(pack.value is not None for slot in self._slots.values() for pack in slot.packs.values())


def _tensors(what: str, target: nn.Module | torch.Tensor) -> list[torch.Tensor]:
    if isinstance(target, nn.Module):
        return list(target.parameters())
    if isinstance(target, torch.Tensor) and what == "invalidate":
        return [owner_of(target)]
    allowed = "an nn.Module or a Tensor" if what == "invalidate" else "an nn.Module"
    raise TypeError(f"{what}() takes {allowed}, got {type(target).__name__}")


PACKS = PackCache()


class Leased:
    """`PackCache.get` for who asks for the same again and again: from the third time on, the tensors are looked at for
    who may have written to them, and for nothing else. It keeps no value alive."""

    __slots__ = ("_asked", "_known")

    def __init__(self) -> None:
        self._asked = False
        self._known: tuple[weakref.ref[_Pack], list[_Known | None]] | None = None

    def held(self, *tensors: torch.Tensor | None) -> Any:
        """The value that `get` gave for these, weight first, where they hold the same; else None."""
        both = self._known  # read once: another thread may set it
        pack = None if both is None else both[0]()
        if both is None or pack is None:
            return None
        for known, t in zip(both[1], tensors, strict=True):
            if known is None:
                if t is not None:
                    return None
            elif t is None or not known.holds(t):
                return None
        return pack.value

    def get(
        self,
        weight: torch.Tensor,
        key: Callable[[], Hashable],
        vectors: Sequence[torch.Tensor | None],
        build: Callable[[], T],
    ) -> T | None:
        """`PackCache.get` of what is not `held`."""
        found = PACKS.get(weight, key, vectors, build)
        if found is not None and self._asked:
            self._known = PACKS.known(weight, key(), vectors)
        self._asked = found is not None
        return found


def invalidate(target: nn.Module | torch.Tensor) -> int:
    """Forget the packed weights of a module (its children included) or of a Parameter; returns how many there were.

    Needed where a weight that `freeze` made constant was written to past its version; after a write by an address that
    was taken (``data_ptr()``, as a number) ahead of a call; ahead of a conversion that swaps Parameters
    (`torch.__future__.set_swap_module_params_on_conversion`): PyTorch refuses to swap one to which there is a weak
    reference, as the cache has; and ahead of giving a weight's storage another size (``resize_``), after which PyTorch
    2.13 and 2.14 cannot write to it (`cpu.watch`). Every other change is seen.
    """
    return PACKS.invalidate(target)


class Frozen:
    """What `freeze` returns; leaving it as a context lets the weights be checked again."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        PACKS.thaw(self._tensors)


def freeze(module: nn.Module) -> Frozen:
    """Let the weights of ``module`` count as constant on a CPU, as inference runtimes do: they are packed at their
    first use, and not read on every call to see whether they have changed.

    For a module in eval mode. It holds until `unfreeze`, `invalidate`, the module's ``train()``, ``load_state_dict``,
    ``to()``, or any other write that PyTorch counts as one (an optimiser's step). A write through ``.data``, NumPy,
    DLPack, another Parameter over the same memory or another process goes unseen. (``train()`` and ``to()`` are noticed
    where the module is, or has as a part, the `cnnfast.Sequential` that runs the weights.) As a context manager, until
    the end of the block::

        with cnnfast.freeze(model), torch.inference_mode():
            images = model(z)

    Copies and pickles of a frozen module are not frozen. On a GPU nothing is cached, and it has no effect. ValueError
    for a module in training mode, TypeError for anything else than a module.
    """
    if isinstance(module, nn.Module) and module.training:
        raise ValueError("freeze() of a module in training mode: call its eval() first")
    return Frozen(PACKS.freeze(module))


def unfreeze(module: nn.Module) -> None:
    """Have the weights of ``module`` checked on every call again, after `freeze`. TypeError for no module."""
    PACKS.thaw(_tensors("unfreeze", module))
