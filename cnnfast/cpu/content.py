"""What a tensor holds, as a hash of every bit: by it `packing` sees any change, whoever made it.

XXH3 of 128 bits, at the speed of memory. Of one core that is a third to a half of what all of them have, and while one
thread hashes, PyTorch's others wait: so a large tensor is hashed by them. They are OpenMP's, which stand in a loop
between two parallel regions, so that a pool of Python's own threads would not get the processors (docs/facts.md has
what either took). What they call is Python, whose lock `xxhash` 4 lets go of for the hash.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

try:
    import xxhash
    from xxhash import xxh3_128_digest
except ImportError:  # a machine where nothing can be installed
    xxhash = xxh3_128_digest = None  # type: ignore[assignment]

__all__ = ["content_of", "known_ahead", "pays_ahead", "why_no_hash"]


def why_no_hash() -> str | None:
    """Why no change can be seen, or None."""
    if xxh3_128_digest is None:
        return "xxhash is not installed (pip install xxhash): a change of the weight could not be seen"
    return None


def content_of(t: torch.Tensor | None) -> bytes | None:
    """The hash of every bit of t in the order of its memory, but not of its dtype, shape and strides; None of None. The
    same with any number of threads."""
    if t is None:
        return None
    if not _dense(t.shape, t.stride()):
        t = t.detach().contiguous()
    memory = t.data_ptr(), t.numel() * t.element_size()
    known = _ahead.known.pop(memory, None) if _ahead.known else None
    if known is not None:
        return known
    return _hash(*memory) if memory[1] <= _WHOLE else _hashes([memory])[0]


class _Ahead(threading.local):
    known: dict[tuple[int, int], bytes] | None = None  # by address and size


_ahead = _Ahead()


@contextmanager
def known_ahead(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Inside, in this thread, the first `content_of` each of ``tensors`` is what it was at the beginning, where all are
    hashed at once. For who knows that nothing inside writes to them ahead of that."""
    memory = [(t.data_ptr(), t.numel() * t.element_size()) for t in tensors if _dense(t.shape, t.stride())]
    before, _ahead.known = _ahead.known, dict(zip(memory, _hashes(memory), strict=True))
    try:
        yield
    finally:
        _ahead.known = before


def pays_ahead(sizes: Iterable[int]) -> bool:
    """Whether `known_ahead` saves time for tensors of so many bytes."""
    return _parallel(sum(sizes)) is not None


@lru_cache(maxsize=4096)
def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the strides are a permutation of a contiguous tensor's: its elements are one run of memory."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


# --- memory -----------------------------------------------------------------------------------------------------------

_WHOLE = 2**21  # bytes up to which all are hashed at once
_EACH = 3 * 2**19  # bytes for each thread from which on waking it costs less than it saves


def _hash(address: int, size: int) -> bytes:
    return xxh3_128_digest((ctypes.c_ubyte * size).from_address(address)) if size else b""


def _hashes(memory: Sequence[tuple[int, int]]) -> list[bytes]:
    """Of pieces of memory (address, size)."""
    parts = _Parts()
    for k, (address, size) in enumerate(memory):
        # Its parts go by its size alone, so that the hash is that of any threads.
        each = size if size <= _WHOLE else -(-size // min(max(size >> 20, 4), 64))
        parts.left += [(k, address + at, min(each, size - at)) for at in range(0, size, each or 1)]
    parallel = _parallel(sum(size for _, size in memory))
    if parallel is None:
        parts.hash()
    else:
        parallel(parts, torch.get_num_threads())
    if parts.errors:
        raise parts.errors[0]
    found = [b""] * len(memory)
    for k, address in sorted(parts.found):
        found[k] += parts.found[k, address]
    return found


@dataclass
class _Parts:
    """Parts of pieces of memory (number of the piece, address, size), of which each thread takes one after the other,
    and the hashes of those that were taken."""

    left: list[tuple[int, int, int]] = field(default_factory=list)
    found: dict[tuple[int, int], bytes] = field(default_factory=dict)
    errors: list[BaseException] = field(default_factory=list)

    def hash(self) -> None:
        try:
            while self.left:
                k, address, size = self.left.pop()
                self.found[k, address] = _hash(address, size)
        except IndexError:  # another thread has taken the last one
            return
        except BaseException as error:  # an interrupt, say: C would lose it
            self.errors.append(error)


def _parallel(size: int) -> Any:
    """What `_openmp` gives, where so many bytes gain by it."""
    threads = torch.get_num_threads()
    return _openmp() if threads > 1 and size >= threads * _EACH else None


@lru_cache(maxsize=1)
def _openmp() -> Any:
    """A call of (parts, threads) that has `_Parts.hash` run by so many threads of the OpenMP that PyTorch runs its own
    loops by, which it has linked; None where it has none, or where the hash would keep Python's lock."""
    if int(xxhash.VERSION.split(".")[0]) < 4:
        return None
    try:
        run = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
        function = ctypes.CFUNCTYPE(None, ctypes.py_object)
        hash_parts = function(_Parts.hash)
    except (OSError, AttributeError, MemoryError):  # the last: where nobody may write code into memory
        return None
    run.argtypes, run.restype = (function, ctypes.py_object, ctypes.c_uint, ctypes.c_uint), None
    return lambda parts, threads: run(hash_parts, parts, threads, 0)
