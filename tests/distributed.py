"""One of two processes that train together: ``python -m tests.distributed RANK FOLDER``. What came of each job goes
to FOLDER/RANK.pt. `test_training_distributed` starts it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import cnnfast
from cnnfast.cpu import backend
from cnnfast.nn import chain
from cnnfast.norms import Norm

from .nn.test_training_features import CL, Models, Outcome, everything

SHARES = {"even": (2, 2), "uneven": (3, 1)}
WHOLE = 4
MODES = ("plain", "channels-last", "bucket-view")


def per_image(m: Models) -> nn.Sequential:
    """A generator whose images do not depend on each other."""
    return m.build(
        1,
        nn.ConvTranspose2d(8, 12, 4, bias=False),
        nn.InstanceNorm2d(12, affine=True),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(12, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 1),
        nn.ELU(),
        nn.ConvTranspose2d(8, 3, 4, 2, 1),
        nn.Tanh(),
    )


def losses(m: Models, y: Tensor, mine: slice) -> Tensor:
    """Of each of these images of the whole batch."""
    return (y * m.noise(WHOLE, *y.shape[1:], seed=5)[mine]).mean((1, 2, 3))


def share(sizes: tuple[int, ...], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


# --- jobs -------------------------------------------------------------------------------------------------------------


def ddp(rank: int, mode: str) -> Outcome:
    """Two optimiser steps, the second of two backward passes of which one does not synchronise."""
    m = Models(cnnfast.Sequential, memory_format=CL if mode == "channels-last" else torch.contiguous_format)
    inner, mine = per_image(m), share(SHARES["even"], rank)
    model = DistributedDataParallel(inner, gradient_as_bucket_view=mode == "bucket-view")
    optimizer = torch.optim.SGD(inner.parameters(), 0.5)
    for seeds in ((10,), (11, 12)):
        optimizer.zero_grad()
        for seed in seeds:
            with model.no_sync() if seed == 11 else nullcontext():
                losses(m, model(m.z(WHOLE, seed=seed)[mine]), mine).mean().backward()
        optimizer.step()
    return everything(inner)


def sync_batch_norm(rank: int, sizes: tuple[int, ...]) -> Outcome:
    """Gradients are summed by hand: shares may differ in size, and DDP takes no SyncBatchNorm on a CPU."""
    m = Models(cnnfast.Sequential)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(m.generator())
    assert type(model) is cnnfast.Sequential and isinstance(model[1], nn.SyncBatchNorm)
    mine = share(sizes, rank)
    z = m.z(WHOLE)[mine].requires_grad_()
    y = model(z)
    losses(m, y, mine).sum().backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
    return {**everything(model), "y": y.detach(), "z": z.grad}


def norm_of_an_empty_share(rank: int) -> Outcome:
    """All images on one process."""
    m = Models()
    x = m.noise(3 * (1 - rank), 6, 5, 4).requires_grad_()
    weight, bias = (m.noise(6, seed=s).requires_grad_() for s in (6, 7))
    running = {"running_mean": torch.zeros(6), "running_var": torch.ones(6)}
    how: dict[str, Any] = dict(activation="silu", use_input_stats=True, process_group=dist.group.WORLD)
    y = cnnfast.ops.norm_act(x, Norm("batch"), weight, bias, **running, **how)
    m.loss(y).mul(y.numel()).backward() if y.numel() else y.sum().backward()
    for t in (weight, bias):
        dist.all_reduce(t.grad)
    return {"y": y.detach(), "x": x.grad, "weight": weight.grad, "bias": bias.grad, **running}


def second_derivative(rank: int) -> str:
    m = Models(cnnfast.Sequential)
    model, z = nn.SyncBatchNorm.convert_sync_batchnorm(m.generator()), m.z(2).requires_grad_()
    try:
        torch.autograd.grad(m.loss(model(z)), z, create_graph=True)
    except RuntimeError as error:
        return str(error)
    return ""


class _OtherStrides(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.as_strided((3, 4, 1, 1), (4, 1, 4, 4))


class _Careless(nn.Module):
    """What a gradient in other strides than the parameter's leads to, those of dimensions of one element included."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ _OtherStrides.apply(self.weight).view(3, 4)


def careless(rank: int) -> Outcome:
    model = DistributedDataParallel(_Careless())
    model(torch.ones(2, 3)).sum().backward()
    return {}


# --- the process ------------------------------------------------------------------------------------------------------


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    backend.SMALL_IN_TRAINING = backend.SMALL = 0  # as in conftest.py
    saves = backend._saves_conversions
    backend._saves_conversions = lambda steps, elements, gradient: saves(steps, elements, False)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    jobs: dict[str, Callable[[], Any]] = {f"ddp {mode}": lambda mode=mode: ddp(rank, mode) for mode in MODES}
    jobs |= {f"sync {name}": lambda sizes=sizes: sync_batch_norm(rank, sizes) for name, sizes in SHARES.items()}
    jobs |= {
        "empty": lambda: norm_of_an_empty_share(rank),
        "second": lambda: second_derivative(rank),
        "careless": lambda: careless(rank),
    }
    results, real = {}, chain.run_step
    for name, job in jobs.items():
        fused: list[str] = []

        def spy(step: Any, o: Any, fused: list[str] = fused, **kwargs: Any) -> Tensor:
            fused.append(step.norm.kind if step.measured else "")
            return real(step, o, **kwargs)

        chain.run_step = spy
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = job()
        results[name] = {"found": found, "fused": fused, "warnings": [str(w.message) for w in caught]}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
