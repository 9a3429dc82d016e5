"""Batch norms with the statistics of several processes: the same numbers as one process with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from cnnfast import norm_sync, ops
from cnnfast.activations import Activation
from cnnfast.norms import Norm, Partials
from cnnfast.ops.run import run_step
from cnnfast.step import Operands, norm_step

from .tolerance import assert_close

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
PARTS = (3, 5)  # images of each process


def whole(dtype: torch.dtype, sizes: tuple[int, ...] = PARTS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, its result's gradient, weight, bias), whose first dimension the processes share out."""
    g = torch.Generator().manual_seed(7)
    n = sum(sizes)
    x = torch.randn(n, 6, 4, 3, generator=g) * 2 + 5
    x[: sizes[0]] += 3  # so that a process alone has other statistics
    return tuple(t.type(dtype) for t in (x, torch.randn(n, 6, 4, 3, generator=g), *torch.randn(2, 6, generator=g)))


def alone(dtype: torch.dtype, sizes: tuple[int, ...] = PARTS) -> dict[str, Any]:
    """By one process with the whole batch; gradients of the vectors for each process's share."""
    x, grad, weight, bias = (t.requires_grad_() for t in whole(torch.float32, sizes))
    x, weight, bias = (t.detach().type(dtype).requires_grad_() for t in (x, weight, bias))
    running = torch.zeros(6, dtype=dtype), torch.ones(6, dtype=dtype)
    y = torch.nn.functional.batch_norm(x, *running, weight, bias, True, 0.3).tanh()
    found = []
    for share in torch.split(torch.arange(len(x)), list(sizes)):
        only = torch.zeros_like(y)
        only[share] = grad[share].type(dtype)
        found.append(torch.autograd.grad(y, (weight, bias), only, retain_graph=True))
    (dx,) = torch.autograd.grad(y, x, grad.type(dtype))
    return {"y": y.detach(), "x": dx, "vectors": found, "running": running}


def process(rank: int, sizes: tuple[int, ...], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(sizes))
    try:
        x, grad, weight, bias = whole(torch.float32, sizes)
        x, grad = x.split(list(sizes))[rank], grad.split(list(sizes))[rank]
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        running = torch.zeros(6), torch.ones(6)
        y = ops.norm_act(
            leaves[0], Norm("batch"), *leaves[1:], running_mean=running[0], running_var=running[1], momentum=0.3,
            process_group=dist.group.WORLD, activation="tanh",
        )  # fmt: skip
        grads = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        try:
            torch.autograd.grad(y, leaves, grad, create_graph=True)
            said = ""
        except RuntimeError as error:
            said = str(error)
        torch.save({"y": y.detach(), "grads": grads, "running": running, "said": said}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [PARTS, (0, 4)], ids=["uneven", "one process without images"])
def test_two_processes_on_the_cpu(sizes: tuple[int, ...], tmp_path: Path) -> None:
    mp.spawn(process, (sizes, str(tmp_path)), nprocs=len(sizes))
    exact, yardstick = alone(torch.float64, sizes), alone(torch.float32, sizes)
    got = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(sizes))]
    for name, index in (("y", None), ("x", 0)):
        parts = [g["y"] if index is None else g["grads"][index] for g in got]
        assert_close(torch.cat(parts), exact[name], yardstick[name], name)
    for rank, g in enumerate(got):
        assert all(torch.equal(a, b) for a, b in zip(g["running"], got[0]["running"], strict=True))
        for i in (0, 1):
            want, yard = (v["vectors"][rank][i] for v in (exact, yardstick))
            assert_close(g["grads"][1 + i], want, yard, f"gradient of vector {i}")
            assert_close(g["running"][i], exact["running"][i], yardstick["running"][i], "running statistics")
        assert "no second derivative" in g["said"]


class Played:
    """The collectives of two processes, of which the second one is played by the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, other: Tensor, other_sums: Tensor) -> None:
        self.other, self.other_sums, self.calls = other, other_sums, []
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
        monkeypatch.setattr(dist, "all_gather", self.all_gather)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)

    def all_gather(self, out: list[Tensor], mine: Tensor, group: Any = None) -> None:
        self.calls.append("all_gather")
        out[0].copy_(mine)
        out[1].copy_(self.other.to(mine.device))

    def all_reduce(self, t: Tensor, group: Any = None) -> None:
        self.calls.append("all_reduce")
        t += self.other_sums.to(t.device)


def test_one_of_two_processes_on_the_kernels(
    device: torch.device, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, grad, weight, bias = whole(torch.float32)
    n = PARTS[0]
    exact, yardstick = alone(torch.float64), alone(torch.float32)
    rest = x[n:].double()
    count, mean = rest.numel() // 6, rest.mean((0, 2, 3))
    m2 = rest.var((0, 2, 3), correction=0) * count
    other = torch.cat([torch.tensor([float(count)]), mean.float(), m2.float()])
    dw, db = exact["vectors"][1]
    played = Played(monkeypatch, other, torch.stack([db, dw]).float())
    leaves = [t.to(device).requires_grad_() for t in (x[:n], weight, bias)]
    running = torch.zeros(6, device=device), torch.ones(6, device=device)
    o = Operands(leaves[0], None, None, *running, *leaves[1:], momentum=0.3, group=object())  # type: ignore[arg-type]
    y = run_step(norm_step(Norm("batch"), False, Activation("tanh")), o, channels_last=True, backend="triton")
    assert launches == ["norm-statistics", "norm-merge", "norm-apply"] and played.calls == ["all_gather"]
    dx, dweight, dbias = torch.autograd.grad(y, leaves, grad[:n].to(device), retain_graph=True)
    assert launches[3:] == ["norm-grad-sums", "norm-grad-finish", "norm-grad-apply"]
    assert played.calls == ["all_gather", "all_reduce"]
    assert_close(y, exact["y"][:n], yardstick["y"][:n], "y")
    assert_close(dx, exact["x"][:n], yardstick["x"][:n], "x")
    for i, mine in enumerate((dweight, dbias)):
        assert_close(mine, exact["vectors"][0][i], yardstick["vectors"][0][i], f"gradient of vector {i}")
        assert_close(running[i], exact["running"][i], yardstick["running"][i], "running statistics")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y, leaves, grad[:n].to(device), create_graph=True)


def test_one_process_needs_no_collective() -> None:
    """A group of one process is an ordinary batch norm, twice differentiable."""
    o = Operands(torch.zeros(2, 3, 4, 4))
    assert not norm_sync.shared(None, o)
    assert not norm_sync.shared(Norm("batch"), o)
    assert not norm_sync.shared(Norm("running"), o._replace(group=object()))


def test_merged_parts() -> None:
    """Parts with and without values, far from zero."""
    x = torch.randn(1, 900, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1000
    count = torch.tensor([[0.0, 300, 600, 0]], dtype=torch.float64)
    empty = torch.zeros(1, 4, dtype=torch.float64)
    mean = torch.stack([empty, x[:, :300].mean(1), x[:, 300:].mean(1), empty], 1)
    m2 = torch.stack([empty, x[:, :300].var(1) * 299, x[:, 300:].var(1) * 599, empty], 1)
    _, one_mean, one_m2 = norm_sync.merged(Partials.of(count, mean, m2)).each
    torch.testing.assert_close(one_mean[:, 0], x.mean(1), rtol=1e-14, atol=0)
    torch.testing.assert_close(one_m2[:, 0], x.var(1) * 899, rtol=1e-9, atol=0)
    _, no_mean, no_m2 = norm_sync.merged(Partials.of(count * 0, mean * 0, m2 * 0)).each
    assert not no_mean.isnan().any() and not no_m2.any()
