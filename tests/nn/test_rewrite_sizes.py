"""Graphs of symbolic sizes, for sizes that come again: what is done for fixed ones is done for these."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast
from cnnfast.nn import rewrite_sizes
from cnnfast.nn.accelerate_call import Record, record_of
from cnnfast.nn.accelerate_worth import never_standing
from cnnfast.nn.rewrite import Graph

from .test_sequential_training import randomized

pytestmark = pytest.mark.filterwarnings("error::cnnfast.messages.CnnfastWarning")


class Mixed(nn.Module):
    """``model(x, ...) = f(model, x, ...)``, with convolutions and a norm of 16 channels."""

    def __init__(self, f: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.f, self.norm = f, nn.LayerNorm(16)
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def tokens(self, x: Tensor) -> Tensor:
        """A map by way of windows of 4x4."""
        n, c, h, w = x.shape
        t = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        t = t + self.norm(t)
        return t.view(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)

    def forward(self, x: Tensor, *more: Any) -> Any:
        x = F.relu(self.first(x))
        return self.second(self.tokens(x) if self.f is None else self.f(self, x, *more))


def pair(f: Callable[..., Any] | None = None) -> tuple[nn.Module, nn.Module, Record]:
    torch.manual_seed(0)
    plain = randomized(Mixed(f)).eval()
    ours = cnnfast.accelerate(copy.deepcopy(plain))
    record = record_of(ours)
    assert record is not None
    return ours, plain, record


def images(*size: int, n: int = 1) -> Tensor:
    return torch.randn(n, 16, *size, generator=torch.Generator().manual_seed(1))


def same(ours: nn.Module, plain: nn.Module, *args: Any) -> None:
    with never_standing():
        a = ours(*args)
    b = plain(*args)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert a.stride() == b.stride()


def again(record: Record) -> list[Graph]:
    return [graph for graph in record.graphs if graph.again]


@torch.inference_mode()
def test_sizes_that_come_again_have_what_fixed_ones_have() -> None:
    """Stretches through tokens, and a graph that settles, of the same weights, whatever these become."""
    ours, plain, record = pair()
    for _ in range(2):
        same(ours, plain, images(8, 8))
    fixed = [site.channels_last for site in record.graphs[0].sites]
    assert fixed == [True, False]
    for size in ((8, 12), (16, 20)):
        same(ours, plain, images(*size))
    traced = record.compilations
    assert traced <= 3 and len(again(record)) == traced - 1  # for the sizes that they were traced at
    for k, size in enumerate(((12, 16), (20, 24)), 1):
        for call in range(3):
            same(ours, plain, images(*size))
            assert len(again(record)) == traced - 1 + k - (call == 0)
    assert record.compilations == traced
    for graph in again(record):
        assert [site.channels_last for site in graph.sites] == fixed
    for graph in again(record)[-2:]:
        assert graph.runs == 2 and graph._seen[2] is not None  # it has settled
    for model in (ours, plain):
        model.first.weight.mul_(-0.5)  # type: ignore[union-attr,operator]
    for size in ((8, 8), (16, 20), (8, 12), (4, 4), (12, 16)):
        same(ours, plain, images(*size))


@torch.inference_mode()
def test_numbers_that_sizes_follow_from() -> None:
    ours, plain, record = pair(lambda m, x, h, w: F.interpolate(m.tokens(x), size=(h, w)))
    for h, w in ((8, 8), (12, 10), (12, 10), (12, 9), (12, 10), (12, 9), (12, 9)):
        same(ours, plain, images(8, 8), h, w)
    for size in ((8, 8), (8, 12), (8, 12), (8, 12), (16, 12), (16, 12)):
        same(ours, plain, images(*size), 12, 9)
    assert len(again(record)) >= 3


@torch.inference_mode()
def test_numbers_that_no_sizes_follow_from_may_change() -> None:
    """A time step, say."""
    ours, plain, record = pair(lambda m, x, t: m.tokens(x) * t + torch.full((16, 1, 1), t + 1))
    for t, size in enumerate(((8, 8), (8, 12), (16, 12), (8, 12), (16, 12), (16, 12), (16, 12)), 2):
        same(ours, plain, images(*size), t)
    assert again(record)[-1].runs >= 2 and record.compilations <= 3


@torch.inference_mode()
def test_sizes_that_python_looks_at() -> None:
    """Dynamo finds later, for a shape that it has made symbolic, that it is one number: that graph is fixed at once."""
    ours, plain, record = pair(lambda m, x: m.tokens(x) * (2.0 if x.shape[2] == 12 else 3.0))
    for size in ((8, 8), (8, 8), (12, 8), (12, 8), (12, 8)):
        same(ours, plain, images(*size))
    assert not again(record) and [graph.runs for graph in record.graphs] == [2, 3]
    assert all([site.channels_last for site in graph.sites] == [True, False] for graph in record.graphs)


@torch.inference_mode()
def test_so_many_sizes_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite_sizes, "LIMIT", 2)
    monkeypatch.setattr(rewrite_sizes, "_MAX_MET", 4)
    ours, plain, record = pair()
    for size in ((8, 8), (8, 12), (16, 20), *[(4 * k, 4 * k + 4) for k in range(1, 9) for _ in range(2)]):
        same(ours, plain, images(*size))
    assert 2 <= len(again(record)) <= 2 * (record.compilations - 1)


@torch.inference_mode()
def test_where_the_graph_cannot_be_taken_again_it_runs_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("no meta kernel")

    monkeypatch.setattr(rewrite_sizes, "_ran", fails)
    ours, plain, record = pair()
    for size in ((8, 8), (8, 12), (16, 20), (16, 20), (16, 20)):
        same(ours, plain, images(*size))
    assert not again(record)
    assert set(record.notes) == {"sizes that come again run as all do: RuntimeError: no meta kernel"}
    assert "no meta kernel" in str(cnnfast.explain(ours))


@torch.inference_mode()
def test_sites_that_are_off_stay_so() -> None:
    ours, plain, record = pair()
    for size in ((8, 8), (8, 12), (16, 20)):
        same(ours, plain, images(*size))
    before = len(record.graphs)
    for graph in record.graphs:
        graph.sites[0].off = "it was wrong"
    for _ in range(3):
        same(ours, plain, images(12, 20))
    assert len(record.graphs) == before


@torch.inference_mode()
def test_what_a_graph_switches_is_not_switched_by_looking_at_it() -> None:
    def switched(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.tokens(x).float()

    ours, plain, record = pair(switched)
    for size in ((8, 8), (8, 12), (16, 20), (16, 20), (16, 20)):
        same(ours, plain, images(*size))
    assert not again(record) and not record.notes


def test_with_gradients() -> None:
    ours, plain, record = pair()
    for size in ((8, 8), (8, 12), (16, 20), (16, 20), (16, 20), (8, 12), (8, 12)):
        results = []
        for model in (ours, plain):
            x = images(*size, n=2).requires_grad_()
            with never_standing():
                y = model(x)
            y.sin().mean().backward()
            results.append([y, x.grad, *(p.grad for p in model.parameters())])
            model.zero_grad()
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert len(again(record)) >= 2 and all(graph.gradients for graph in record.graphs)


@torch.inference_mode()
def test_random_numbers_are_drawn_by_calls_alone() -> None:
    ours, plain, record = pair(lambda m, x: m.tokens(x) + torch.randn_like(x) + F.dropout(x, 0.5, True))
    for size in ((8, 8), (8, 12), (16, 20), (16, 20), (16, 20)):
        torch.manual_seed(3)
        with never_standing():
            a = ours(images(*size))
        after = torch.get_rng_state()
        torch.manual_seed(3)
        torch.testing.assert_close(a, plain(images(*size)), rtol=1e-5, atol=1e-5)
        assert torch.equal(after, torch.get_rng_state())
    assert again(record)[-1].runs >= 3


@torch.inference_mode()
def test_explain_knows_of_them() -> None:
    ours, plain, record = pair()
    for size in ((8, 8), (8, 12), (16, 20), (16, 20), (16, 20)):
        same(ours, plain, images(*size))
    found = cnnfast.explain(ours, images(16, 20))
    assert found.graphs == 1 and found.compilations == record.compilations < len(record.graphs)
    assert len(found.rows) == 2
