"""The hash by which any change of a weight is seen: of every bit."""

from __future__ import annotations

import pytest
import torch

from cnnfast.cpu import content
from cnnfast.cpu.content import content_of

pytestmark = pytest.mark.skipif(content.why_no_hash() is not None, reason=str(content.why_no_hash()))


def some_bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", [1, 3, content._LEAST_WATCHED - 1, content._LEAST_WATCHED, 2**21 + 1])
def test_every_bit_counts(size: int) -> None:
    t = some_bytes(size)
    before = content_of(t)
    for at in {*range(0, size, max(size // 67, 1)), size - 1}:
        t[at] ^= 1 << at % 8
        assert content_of(t) != before, at
        t[at] ^= 1 << at % 8
    assert content_of(t) == before == content_of(t.clone())


def test_nothing_has_a_content_of_its_own() -> None:
    assert content_of(None) is None and content_of(torch.empty(0)) is not None


def test_a_view_with_gaps_is_hashed_by_its_elements() -> None:
    t = some_bytes(2**22)
    assert content_of(t[::2]) == content_of(t[::2].clone())
    assert content_of(t.view(2**11, 2**11).t()) == content_of(t), "in the order of memory"


def test_what_is_known_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_known", {})
    monkeypatch.setattr(content, "_MAX_KNOWN", 4)
    kept = [some_bytes(2**15 + k) for k in range(10)]
    before = [content_of(t) for t in kept]
    assert len(content._known) <= 4 and [content_of(t) for t in kept] == before
