"""Whether anybody wrote to a tensor's memory, told without reading it.

PyTorch has copy-on-write storages: `torch._lazy_clone` makes a tensor's storage one, and as PyTorch next hands out a
pointer to write by, the storage becomes an ordinary one again. The clone is dropped at once here, so that nothing is
ever copied and the memory stays where it is: what is left is a flag on the storage, which falls at the first write,
through whatever tensor, view, ``.data`` or Parameter over the same memory, and as NumPy, DLPack, C++ or Python
(``data_ptr()``) get at it.

A pointer that was handed out before is the way past it. So nobody watches memory that NumPy has had, that something
beside the tensor has (DLPack; another tensor, too, which looks the same), or that is not of PyTorch's own allocation (a
mapped file, shared memory, NumPy's array). What is not seen: a write by an address that
was taken as a number before, and one of another thread that had begun. So what is watched has held the same for a
while, and is relied on after as long again (`content`).

What fails: PyTorch 2.13 and 2.14 give memory of another size to a watched storage (``resize_``) and then cannot write
to it ("ctx != nullptr INTERNAL ASSERT FAILED"); `end_watch` comes ahead of that.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Watch", "address", "end_watch", "end_watches", "owner", "unwritten", "watch"]


class Watch:
    """Of the storage at the address ``start``, from `watch` on; ``over`` once another has begun."""

    __slots__ = ("__weakref__", "over", "start")

    def __init__(self, start: int) -> None:
        self.start, self.over = start, False


_latest: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()  # by the storage's address
_lock = threading.Lock()

# PyTorch's own, which it does not document.
_lazy_clone: Any = getattr(torch, "_lazy_clone", None)
_is_flagged: Any = getattr(torch._C, "_is_cow_tensor", None)
_start: Any = getattr(torch._C, "_data_address", None)  # of a storage
_users: Any = getattr(torch._C, "_storage_Use_Count", None)


def _works() -> bool:
    """Whether they are there, and are what this file takes them for."""
    if None in (_lazy_clone, _is_flagged, _start, _users):
        return False
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        t = torch.zeros(4, device="cpu")
        view, where, storage = t[1:], t.data_ptr(), t.untyped_storage()
        known = _start(view) == where and _users(storage._cdata) == 3 and not _is_flagged(t)
        _lazy_clone(t)
        flagged = _is_flagged(t) and _is_flagged(view) and _start(t) == where
        kept = t.sum().item() == 0 and _is_flagged(t)
        view.data.add_(1)
        fell = not _is_flagged(t) and _start(t) == where and t.tolist() == [0, 1, 1, 1]
        return known and flagged and kept and fell


_POSSIBLE = _works()  # else memory is read


def owner(t: torch.Tensor) -> torch.Tensor:
    """The tensor that ``t`` is a view of, or itself: 1-D layers pass their Parameter as a view of height 1."""
    base: torch.Tensor | None = t._base
    if base is None:
        base = getattr(t, "viewed", None)
    return t if base is None else base


def address(t: torch.Tensor) -> int:
    """``t.data_ptr()``, not to write by."""
    if not _POSSIBLE:
        return t.data_ptr()
    return _start(t) + t.storage_offset() * t.element_size()


def unwritten(t: torch.Tensor, watch: Watch) -> bool:
    """Whether ``t`` has the storage that is watched, and nobody has written to that since the watch began."""
    return not watch.over and _is_flagged(t) and _start(t) == watch.start


def watch(t: torch.Tensor) -> Watch | None:
    """Begin to watch the storage of ``t``; None where a write might go unseen."""
    if not _POSSIBLE:
        return None
    storage = t.untyped_storage()
    users = 2 if owner(t) is t else 3  # ``storage`` is one
    if not storage.resizable() or _users(storage._cdata) != users:
        return None
    with _lock, _disable_current_modes(), torch.no_grad():
        try:
            _lazy_clone(t)
        except RuntimeError:  # not of PyTorch's allocation
            return None
        found = Watch(_start(t))
        before = _latest.get(found.start)
        if before is not None:
            before.over = True
        _latest[found.start] = found
    return found


def end_watches(module: nn.Module) -> None:
    """Make the storages of the Parameters and buffers of ``module`` ordinary ones again."""
    for t in (*module.parameters(), *module.buffers()):
        if type(t) in (torch.Tensor, nn.Parameter):
            end_watch(t)


def end_watch(t: torch.Tensor) -> None:
    """Likewise, of ``t``."""
    if _POSSIBLE and t.layout is torch.strided and _is_flagged(t):
        t.data_ptr()
