"""What a tensor holds, as a hash of every bit: by it `packing` sees any change, whoever made it. Large tensors that
have held the same for a second, and are known to be unwritten since (`watch`), are not read again.

XXH3 of 128 bits: at the speed of memory, and no edit of a weight meets the same by chance.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Hashable

import torch

from ..memory_format import is_dense
from .watch import Watch, address, unwritten, watch

try:
    from xxhash import xxh3_128_digest
except ImportError:  # a machine where nothing can be installed
    xxh3_128_digest = None  # type: ignore[assignment]

__all__ = ["content_of", "form_of", "memory_of", "sure_content", "why_no_hash"]


def why_no_hash() -> str | None:
    """Why no change can be seen, or None."""
    if xxh3_128_digest is None:
        return "xxhash is not installed (pip install xxhash): a change of the weight could not be seen"
    return None


_LEAST_WATCHED = 2**14  # bytes, less than which are read as fast
_MAX_KNOWN = 2**13
_STEADY = 0.5  # seconds

_known: dict[Hashable, _Seen] = {}  # by where tensors are, and in which form


class _Seen:
    """What a tensor held at the last look, and ``since`` when: for `_STEADY` seconds of that it is not watched (a
    thread may be writing), for as long again that is not relied on (it may have begun to write before). Then it is
    ``sure`` that the content stays while the watch does."""

    __slots__ = ("content", "since", "sure", "watch")

    def __init__(self, content: bytes, since: float) -> None:
        self.content, self.since, self.sure = content, since, False
        self.watch: Watch | None = None


def content_of(t: torch.Tensor | None) -> bytes | None:
    """The hash of every bit of t in the order of its memory, but not of its dtype, shape and strides; None of None."""
    if t is None:
        return None
    return _look(t).content if t.numel() * t.element_size() >= _LEAST_WATCHED else _hash(t)


def sure_content(t: torch.Tensor) -> tuple[bytes, Watch] | None:
    """`content_of` a tensor that stays that while nobody writes to it, as the watch tells; None where that is not known
    now. Of a large tensor it is what the last `content_of` found."""
    if t.numel() * t.element_size() >= _LEAST_WATCHED:
        seen = _known.get(memory_of(t))
    else:
        seen = _look(t)
    if seen is None or not seen.sure or seen.watch is None or not unwritten(t, seen.watch):
        return None
    return seen.content, seen.watch


def form_of(t: torch.Tensor) -> tuple[Hashable, ...]:
    """How its elements lie in its storage."""
    return t.storage_offset(), t.shape, t.stride(), t.dtype


def memory_of(t: torch.Tensor) -> tuple[Hashable, ...]:
    """Where they are, and how they lie."""
    return address(t), *form_of(t)


def _look(t: torch.Tensor) -> _Seen:
    where = memory_of(t)
    seen = _known.get(where)
    if seen is not None and seen.watch is not None and not unwritten(t, seen.watch):
        seen = None
    if seen is not None and seen.sure:
        return seen
    now = time.monotonic()
    steady = seen is not None and now - seen.since >= _STEADY
    begun = watch(t) if steady and seen is not None and seen.watch is None else None  # ahead of reading
    found = _hash(t)
    if seen is None or found != seen.content:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        seen = _known[where] = _Seen(found, now)
    elif steady:
        seen.sure = seen.watch is not None
        seen.watch, seen.since = seen.watch or begun, now
    return seen


def _hash(t: torch.Tensor) -> bytes:
    if not is_dense(t.shape, t.stride()):
        t = t.detach().contiguous()
    size = t.numel() * t.element_size()
    return xxh3_128_digest((ctypes.c_ubyte * size).from_address(address(t))) if size else b""
