"""`cnnfast.graphed`, on a torch.cuda that captures by writing down what to do again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.gpu import graphed as graphs
from cnnfast.gpu import warmup as warm


class Model(nn.Module):
    """Says how it was called; its results while captured are done again by a replay."""

    capturing: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 2.0))
        self.calls: list[tuple[bool, torch.Size]] = []

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        self.calls.append((Model.capturing is not None, x.shape))
        y = x * self.weight + (0 if bias is None else bias)
        if Model.capturing is not None:
            Model.capturing.again = lambda: y.copy_(x * self.weight + (0 if bias is None else bias))
        return y


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            seen.append("wait")

    class Graph:
        def replay(self) -> None:
            seen.append("replay")
            self.again()

    @contextlib.contextmanager
    def capture(graph: Any, stream: Any) -> Iterator[None]:
        seen.append("capture")
        Model.capturing = graph
        try:
            yield
        finally:
            Model.capturing = None

    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphs, "cuda_index", lambda x: 0)
    return seen


X = torch.arange(24.0).reshape(2, 3, 2, 2)


def test_a_call_is_a_replay_on_the_graphs_own_tensors(fake_cuda: list[str]) -> None:
    model = Model().eval()
    given = X.clone()
    run = cnnfast.graphed(model, given)
    assert fake_cuda == ["wait", "wait", "capture"]
    assert [captured for captured, _ in model.calls][-4:] == [False] * 3 + [True]  # warmed up ahead
    made = len(model.calls)
    y = run(X + 1)
    assert torch.equal(y, 2 * (X + 1)) and torch.equal(given, X) and y is run.outputs
    kept = y.clone()
    assert run(X) is y and torch.equal(y, 2 * X) and not torch.equal(kept, y)  # overwritten, as said
    assert len(model.calls) == made and fake_cuda[3:] == ["replay"] * 2
    run.inputs[0].fill_(5)
    assert torch.equal(run(*run.inputs), torch.full_like(X, 10))


def test_weights_are_read_where_they_lie() -> None:
    model = Model().eval()
    run = cnnfast.graphed(model, X)
    with torch.no_grad():
        model.weight.fill_(3)
    assert torch.equal(run(X), 3 * X)


OTHERS = {
    "batch": (X[:1],),
    "dtype": (X.double(),),
    "layout": (X.contiguous(memory_format=torch.channels_last),),
    "one more": (X, X),
    "none": (X, None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_inputs_run_eagerly(name: str, fake_cuda: list[str]) -> None:
    model = Model().eval()
    run = cnnfast.graphed(model, X)
    inputs = OTHERS[name]
    with torch.no_grad():
        expected = model(*inputs)  # type: ignore[arg-type]
    y = run(*inputs)
    assert torch.equal(y, expected) and y.dtype == expected.dtype and "replay" not in fake_cuda
    assert torch.equal(run(X), 2 * X) and "replay" in fake_cuda


def test_a_model_in_training_mode_is_not_replayed(fake_cuda: list[str]) -> None:
    model = Model().eval()
    run = cnnfast.graphed(model, X)
    model.train()
    run(X)
    assert "replay" not in fake_cuda


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model().eval()
    with pytest.raises(ValueError, match=r"graphed takes tensors as inputs, got \[\]"):
        cnnfast.graphed(model)
    with pytest.raises(ValueError, match=r"graphed takes tensors as inputs, got \['Tensor', 'int'\]"):
        cnnfast.graphed(model, X, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in training mode: call its eval"):
        cnnfast.graphed(Model().train(), X)
    model.forward = lambda x: (x, 3)  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match="models that give tensors, this one gives int"):
        cnnfast.graphed(model, X)
    monkeypatch.setattr(warm, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="inside a CUDA graph capture"):
        cnnfast.graphed(Model().eval(), X)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="a CUDA graph needs inputs on one CUDA device, these are on cpu"):
        cnnfast.graphed(Model().eval(), X)
