"""The cache of packed weights. It must never serve an old weight.

Inference repacks a layer's weight once (other memory order, BatchNorm folded in) and uses it many times. What makes
that dangerous: a pointer and ``Tensor._version`` are no identity (a second model is often loaded to the same address
with the same version), writes through ``.data`` (EMA code) don't change ``_version``, nor does BatchNorm in train mode
when it updates its running statistics. So an entry

- belongs to one ``nn.Parameter``, by a weak reference, and dies with it; a view of one counts as it, any other
  temporary is never cached;
- is served only while the parameter's version, pointer, shape, strides and dtype, a strided sample of its content, and
  the whole content of the small vectors that were folded in are what they were.

A write through ``.data`` to a few elements of the weight that the sample misses is not seen: call `invalidate`.
The cache lives outside the modules' state, so models still deep-copy and pickle.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import nn

__all__ = ["PACKS", "PackCache", "invalidate", "why_not_cacheable"]

T = TypeVar("T")
# What is compared of a weight on every call. Few places, because each is a miss in cache and page table where the
# weight is large; runs of neighbours, because they cost nothing more.
_PLACES, _RUN = 32, 4


def _owner(weight: torch.Tensor) -> torch.Tensor:
    """The tensor that ``weight`` is a view of, or itself: 1-D layers pass their Parameter as a view of height 1."""
    base = weight._base
    return weight if base is None else base


def why_not_cacheable(weight: torch.Tensor) -> str | None:
    """Why no pack of ``weight`` may be kept, or None where it may: for a Parameter or a view of one."""
    if type(_owner(weight)) is not nn.Parameter:
        return "the weight is not an nn.Parameter (a temporary has no identity to cache by)"
    if weight.is_inference():
        return "the weight was created in inference_mode (it has no version to check)"
    return None


def _dense(t: torch.Tensor) -> bool:
    """Whether the strides of ``t`` are a permutation of a contiguous tensor's."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """A view of `_PLACES` times `_RUN` elements, spread over the memory of ``weight`` in any memory format."""
    w, n = weight.detach(), weight.numel()
    if n <= _PLACES * _RUN or not _dense(w):
        return w  # little, or overlapping or padded in memory: compare all of it
    step = (n - _RUN) // (_PLACES - 1)
    step -= 1 - step % 2  # odd: does not stay in one channel where sizes are powers of two
    return w.as_strided((_PLACES, _RUN), (step, 1), w.storage_offset())


def _state(weight: torch.Tensor) -> tuple[object, ...]:
    return (weight._version, weight.data_ptr(), weight.shape, weight.stride(), weight.dtype)


class _Entry(NamedTuple):
    state: tuple[object, ...]
    view: torch.Tensor  # of the weight, live
    sample: torch.Tensor  # what ``view`` held
    vectors: tuple[torch.Tensor | None, ...]  # copies
    value: object

    def is_current(self, state: tuple[object, ...], vectors: Sequence[torch.Tensor | None]) -> bool:
        if self.state != state or not torch.equal(self.view, self.sample):
            return False
        for new, old in zip(vectors, self.vectors, strict=True):
            if new is None or old is None:
                if new is not old:
                    return False
            elif new.dtype != old.dtype or not torch.equal(new, old):
                return False
        return True


class _Slot(NamedTuple):
    ref: weakref.ref[torch.Tensor]
    packs: OrderedDict[Hashable, _Entry]


class PackCache:
    """Values made from a Parameter and a few small vectors, at most ``limit`` for each Parameter (least recent goes).

    Thread-safe. Two threads that miss at once both build; the last one stays.
    """

    def __init__(self, limit: int = 4) -> None:
        self.limit = limit
        self._slots: dict[int, _Slot] = {}
        self._lock = threading.RLock()  # re-entrant: a garbage collection inside may run `forget` below

    def get(
        self, weight: torch.Tensor, key: Hashable, vectors: Sequence[torch.Tensor | None], build: Callable[[], T]
    ) -> T:
        """The value for (weight, key), from the cache while weight and vectors are unchanged, else from ``build()``.

        ``key`` says everything else that the value depends on; the number of vectors is the same for the same key. A
        weight that `why_not_cacheable` rejects is built every time.
        """
        owner = _owner(weight)
        slot = self._slots.get(id(owner))
        if slot is not None and slot.ref() is owner:
            state = _state(weight)
            with self._lock:
                entry = slot.packs.get(key)
                if entry is not None:
                    slot.packs.move_to_end(key)
            if entry is not None and entry.is_current(state, vectors):
                return entry.value  # type: ignore[return-value]
        if why_not_cacheable(weight) is not None:
            return build()
        # The state is read before the content: a write in between makes the entry stale, not wrong.
        with torch.no_grad():
            state, view = _state(weight), _sample(weight)
            copies = tuple(None if v is None else v.detach().clone() for v in vectors)
            sample = view.clone()
            value = build()
        self._put(owner, key, _Entry(state, view, sample, copies, value))
        return value

    def _put(self, weight: torch.Tensor, key: Hashable, entry: _Entry) -> None:
        ident = id(weight)

        def forget(ref: weakref.ref[torch.Tensor]) -> None:
            with self._lock:
                slot = self._slots.get(ident)
                if slot is not None and slot.ref is ref:
                    del self._slots[ident]

        with self._lock:
            slot = self._slots.get(ident)
            if slot is None or slot.ref() is not weight:
                slot = self._slots[ident] = _Slot(weakref.ref(weight, forget), OrderedDict())
            packs = slot.packs
            for old in [k for k, e in packs.items() if e.state != entry.state]:
                del packs[old]  # stale for ever: free them, and the old storage that their views hold
            packs[key] = entry
            packs.move_to_end(key)
            while len(packs) > self.limit:
                packs.popitem(last=False)

    def invalidate(self, target: nn.Module | torch.Tensor) -> int:
        """Drop the values made from ``target`` (a Parameter, or all Parameters of a module); returns how many."""
        if isinstance(target, nn.Module):
            tensors: list[torch.Tensor] = [*target.parameters()]
        elif isinstance(target, torch.Tensor):
            tensors = [_owner(target)]
        else:
            raise TypeError(f"invalidate() takes an nn.Module or a Tensor, got {type(target).__name__}")
        dropped = 0
        with self._lock:
            for t in tensors:
                slot = self._slots.get(id(t))
                if slot is not None and slot.ref() is t:
                    dropped += len(slot.packs)
                    del self._slots[id(t)]
        return dropped

    def __len__(self) -> int:
        """How many values are held."""
        with self._lock:
            return sum(len(slot.packs) for slot in self._slots.values())


PACKS = PackCache()


def invalidate(target: nn.Module | torch.Tensor) -> int:
    """Forget the packed weights of a module (its children included) or of a Parameter; returns how many there were.

    Needed only after a write through ``.data`` to a few elements of a weight; every other change is seen. And ahead of
    a conversion that swaps Parameters (`torch.__future__.set_swap_module_params_on_conversion`): PyTorch refuses to
    swap one to which there is a weak reference, as the cache has.
    """
    return PACKS.invalidate(target)
