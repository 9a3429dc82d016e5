"""Two processes that train together give what one does on the whole batch: DDP and SyncBatchNorm over gloo.

Eager mode has no SyncBatchNorm on a CPU: the plain one on the whole batch is what it stands for.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from .distributed import MODES, SHARES, WHOLE, losses, per_image
from .nn.test_training_features import CL, Models, Outcome, compare, everything

ROOT = Path(__file__).resolve().parent.parent
FORMATS = (torch.contiguous_format, CL)

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both processes found, by job."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.distributed"]
    started = [
        subprocess.Popen([*command, str(rank), str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [p.communicate(timeout=120)[1] for p in started]
    finally:
        for p in started:
            p.kill()
    for p, text in zip(started, said, strict=True):
        assert p.returncode == 0, text
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2))
    return first, second


Ranks = tuple[dict[str, Any], dict[str, Any]]


def both(ranks: Ranks, job: str, norm: str) -> tuple[Outcome, Outcome]:
    """What each found in a job, which fused steps with such norms and warned of no strides."""
    for rank in ranks:
        assert norm in rank[job]["fused"] and not any("strides" in text for text in rank[job]["warnings"]), rank[job]
    first, second = (rank[job]["found"] for rank in ranks)
    return first, second


@pytest.mark.parametrize("mode", MODES)
def test_ddp(mode: str, ranks: Ranks) -> None:
    """Gradients are averages over the whole batch, and lie as DDP's buckets do: it says nothing of their strides."""
    first, second = both(ranks, f"ddp {mode}", "group")
    assert all(torch.equal(t, second[name]) for name, t in first.items())

    def alone(m: Models) -> Outcome:
        model = per_image(m)
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for seeds in ((10,), (11, 12)):
            optimizer.zero_grad()
            for seed in seeds:
                losses(m, model(m.z(WHOLE, seed=seed)), slice(None)).mean().backward()
            optimizer.step()
        return everything(model)

    exact = alone(Models(dtype=torch.float64))
    compare(first, exact, *(alone(Models(memory_format=f)) for f in FORMATS), what=mode)


def test_ddp_would_warn(ranks: Ranks) -> None:
    for rank in ranks:
        assert any("Grad strides do not match bucket view strides" in text for text in rank["careless"]["warnings"])


def whole(m: Models) -> Outcome:
    """BatchNorm on the whole batch."""
    model, z = m.generator(), m.z(WHOLE).requires_grad_()
    y = model(z)
    losses(m, y, slice(None)).sum().backward()
    return {**everything(model), "y": y.detach(), "z": z.grad}


@pytest.mark.parametrize("shares", SHARES)
def test_sync_batch_norm(shares: str, ranks: Ranks) -> None:
    """Results, gradients and running statistics, with shares of equal and of different size."""
    first, second = both(ranks, f"sync {shares}", "batch")
    assert [len(r["y"]) for r in (first, second)] == list(SHARES[shares])
    for name, t in first.items():
        assert name in ("y", "z") or torch.equal(t, second[name]), f"{name} differs between the processes"
    got = {**first, **{name: torch.cat([first[name], second[name]]) for name in ("y", "z")}}
    eager = [whole(Models(memory_format=f)) for f in FORMATS]
    compare(got, whole(Models(dtype=torch.float64)), *eager, what=shares)


def test_sync_batch_norm_with_an_empty_share(ranks: Ranks) -> None:
    first, second = (rank["empty"]["found"] for rank in ranks)
    assert len(first["y"]) == 3 and len(second["y"]) == 0 == len(second["x"])
    for name in first.keys() - {"x", "y"}:
        assert torch.equal(first[name], second[name]), name

    def alone(m: Models) -> Outcome:
        x = m.noise(3, 6, 5, 4).requires_grad_()
        weight, bias = (m.noise(6, seed=s).requires_grad_() for s in (6, 7))
        mean, var = torch.zeros(6, dtype=m.dtype), torch.ones(6, dtype=m.dtype)
        y = nn.functional.silu(nn.functional.batch_norm(x, mean, var, weight, bias, training=True))
        m.loss(y).mul(y.numel()).backward()
        grads = {"x": x.grad, "weight": weight.grad, "bias": bias.grad}
        return {"y": y.detach(), **grads, "running_mean": mean, "running_var": var}

    compare(first, alone(Models(dtype=torch.float64)), alone(Models()), what="empty share")


def test_synchronised_statistics_have_no_second_derivative(ranks: Ranks) -> None:
    for rank in ranks:
        assert "statistics of several processes has no second derivative" in rank["second"]["found"]
