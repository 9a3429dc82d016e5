"""What a tensor holds, as a hash of every bit: by it `packing` sees any change, whoever made it. Large tensors that are
known to be unwritten since their last hash (`watch`) are not read again.

XXH3 of 128 bits: at the speed of memory, and no edit of a weight meets the same by chance.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from functools import lru_cache

import torch

from .watch import Watch, address, unwritten, watch

try:
    from xxhash import xxh3_128_digest
except ImportError:  # a machine where nothing can be installed
    xxh3_128_digest = None  # type: ignore[assignment]

__all__ = ["content_of", "watched_content", "why_no_hash"]


def why_no_hash() -> str | None:
    """Why no change can be seen, or None."""
    if xxh3_128_digest is None:
        return "xxhash is not installed (pip install xxhash): a change of the weight could not be seen"
    return None


_LEAST_WATCHED = 2**14  # bytes, less than which are read as fast
_MAX_KNOWN = 2**13

_known: dict[Hashable, tuple[bytes, Watch]] = {}  # by where tensors are, and in which form


def content_of(t: torch.Tensor | None) -> bytes | None:
    """The hash of every bit of t in the order of its memory, but not of its dtype, shape and strides; None of None."""
    if t is None:
        return None
    if t.numel() * t.element_size() < _LEAST_WATCHED:
        return _hash(t)
    return watched_content(t)[0]


def watched_content(t: torch.Tensor) -> tuple[bytes, Watch | None]:
    """`content_of` a tensor, which stays that while nobody writes to it, as the watch tells where there is one."""
    where = address(t), t.storage_offset(), t.dtype, t.shape, t.stride()
    known = _known.get(where)
    if known is not None and unwritten(t, known[1]):
        return known
    watched = watch(t)  # ahead of reading
    found = _hash(t)
    if watched is not None:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        _known[where] = found, watched
    return found, watched


def _hash(t: torch.Tensor) -> bytes:
    if not _dense(t.shape, t.stride()):
        t = t.detach().contiguous()
    size = t.numel() * t.element_size()
    return xxh3_128_digest((ctypes.c_ubyte * size).from_address(address(t))) if size else b""


@lru_cache(maxsize=4096)
def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the strides are a permutation of a contiguous tensor's: its elements are one run of memory."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True
