"""The hash by which any change of a weight is seen: of every bit, and the same whoever computes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cnnfast.cpu import content
from cnnfast.cpu.content import content_of, known_ahead, pays_ahead

pytestmark = pytest.mark.skipif(content.why_no_hash() is not None, reason=str(content.why_no_hash()))

parallel = pytest.mark.skipif(content._openmp() is None, reason="PyTorch's OpenMP has no such call, or xxhash < 4")

SIZES = [0, 1, 3, 2**21, 2**21 + 1, 5 * 2**20 + 7, 9 * 2**20]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def some_bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


@parallel
@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_same_with_any_number_of_threads(
    size: int, monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    t = some_bytes(size)
    monkeypatch.setattr(content, "_EACH", 2**60)
    alone = content_of(t)
    monkeypatch.setattr(content, "_EACH", 0)
    assert content_of(t) == alone == content_of(t.clone()) and (size == 0 or alone)


@pytest.mark.parametrize("size", [s for s in SIZES if s])
def test_every_bit_counts(size: int) -> None:
    t = some_bytes(size)
    before = content_of(t)
    for at in {*range(0, size, max(size // 67, 1)), size - 1}:
        t[at] ^= 1 << at % 8
        assert content_of(t) != before, at
        t[at] ^= 1 << at % 8
    assert content_of(t) == before


def test_parts_that_change_places_are_seen() -> None:
    t = some_bytes(2**23)
    halves = t.view(2, -1)
    assert content_of(halves.flip(0)) != content_of(t)


def test_a_view_with_gaps_is_hashed_by_its_elements() -> None:
    t = some_bytes(2**22)
    assert content_of(t[::2]) == content_of(t[::2].clone())
    assert content_of(t.view(2**11, 2**11).t()) == content_of(t), "in the order of memory"


@parallel
def test_several_threads_take_part(monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    """OpenMP's, which are none of Python's."""
    seen, real = [], content.xxh3_128_digest

    def digest(memory: Any) -> bytes:
        seen.append(threading.get_native_id())
        time.sleep(0.02)
        return real(memory)

    t = some_bytes(9 * 2**20)
    expected = content_of(t)
    monkeypatch.setattr(content, "xxh3_128_digest", digest)
    before = threading.active_count()
    assert content_of(t) == expected
    assert len(set(seen)) == 2 and len(seen) == 9 and threading.active_count() == before


@parallel
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_is_not_lost(error: type[BaseException], monkeypatch: pytest.MonkeyPatch, two_threads: None) -> None:
    """C code stands between the thread that meets it and the caller."""

    def digest(memory: Any) -> bytes:
        raise error

    t = some_bytes(9 * 2**20)
    before = content_of(t)
    with monkeypatch.context() as patched:
        patched.setattr(content, "xxh3_128_digest", digest)
        with pytest.raises(error):
            content_of(t)
    assert content_of(t) == before


@parallel
def test_in_several_threads_of_python_at_once(two_threads: None) -> None:
    tensors = [some_bytes(9 * 2**20 + k) for k in range(3)]
    expected, found = [content_of(t) for t in tensors], [[] for _ in tensors]

    def work(k: int) -> None:
        torch.set_num_threads(2)  # a thread has its own number
        for _ in range(5):
            found[k].append(content_of(tensors[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[e] * 5 for e in expected]


def test_an_older_hash_keeps_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content.xxhash, "VERSION", "3.5.0")
    assert content._openmp.__wrapped__() is None


# --- ahead ------------------------------------------------------------------------------------------------------------


def test_what_is_known_ahead_counts_once() -> None:
    t, other = some_bytes(1000), some_bytes(999)
    before = content_of(t)
    with known_ahead([t]):
        t[0] ^= 1
        assert content_of(other) == content_of(other.clone())
        assert content_of(t) == before, "as it was at the beginning"
        changed = content_of(t)
    assert changed != before and changed == content_of(t)


def test_what_is_known_ahead_is_of_one_thread_and_ends() -> None:
    t = some_bytes(1000)
    before, found = content_of(t), []
    with known_ahead([t]):
        t[0] ^= 1
        thread = threading.Thread(target=lambda: found.append(content_of(t)))
        thread.start()
        thread.join()
    assert found == [content_of(t)] and found != [before]
    with pytest.raises(ValueError, match="mine"), known_ahead([t]):
        raise ValueError("mine")
    t[0] ^= 1
    assert content_of(t) == before


@parallel
def test_what_pays(two_threads: None) -> None:
    assert pays_ahead([2**22, 1]) and not pays_ahead([2**20, 2**20])
    torch.set_num_threads(1)
    assert not pays_ahead([2**30])
