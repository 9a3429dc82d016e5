"""The implementations of the GPU run: PyTorch with cuDNN, `torch.compile`, cnnfast; each with and without CUDA graph.

Every one is checked before it is timed (`Workload.check`), which also is its warm-up: compilation, cuDNN's
search and the proof of a kernel at its first launch happen there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

import cnnfast

from ..peers import named, path_of
from ..workload import Implementation, NotAvailable, Prepared, Workload
from .timing import captured

__all__ = ["BASELINES", "COMPILED", "GPU_IMPLEMENTATIONS", "GRAPH", "OURS", "backend", "find", "fused"]

GRAPH = ", CUDA graph"


def _eager(channels_last: bool) -> Callable[[Workload], Prepared]:
    def prepare(w: Workload) -> Prepared:
        return Prepared(w.call(w.modules(channels_last=channels_last), channels_last))

    return prepare


def backend() -> str:
    """What a user has on a GPU: Triton where it applies. A machine that only pretends to have one (a function mode of
    torch) runs Triton's kernels where they are asked for."""
    return "auto" if torch.version.cuda is not None else "triton"


def fused(w: Workload) -> cnnfast.Sequential:
    """The modules as a user has them who wants speed on a GPU: weights in the order in which the kernels read them."""
    model = cnnfast.channels_last(w.modules(cnnfast.Sequential))
    assert isinstance(model, cnnfast.Sequential)
    return model


def _cnnfast(w: Workload) -> Prepared:
    """`cnnfast.Sequential`. NotAvailable where no step of it runs as a Triton kernel; RuntimeError where one that could
    was given up at its first use (`cnnfast.guard`)."""
    model = fused(w)
    plain = w.call(model, True)

    def call() -> object:
        with cnnfast.backend(backend()):
            return plain()

    with torch.inference_mode(not w.gradients):
        call()
    given_up = [line for line in model.explain().splitlines() if "PyTorch's operators run" in line]
    if given_up:
        raise RuntimeError("; ".join(given_up))
    path = path_of(call, w.gradients)
    if "Triton" not in path:
        raise NotAvailable(f"no step of it has a Triton kernel: {path or 'no convolution seen'}")
    return Prepared(call, path=lambda: path_of(call, w.gradients))


def _compiled(container: type[nn.Sequential], mode: str | None) -> Callable[[Workload], Prepared]:
    def prepare(w: Workload) -> Prepared:
        torch._dynamo.reset()  # else each workload counts as a recompilation of one function
        return Prepared(w.call(torch.compile(w.modules(container, True), dynamic=False, mode=mode), True))

    return prepare


def _graph(prepare: Callable[[Workload], Prepared]) -> Callable[[Workload], Prepared]:
    """The same, captured by `torch.cuda.graph`; what is timed is a replay."""

    def graphed(w: Workload) -> Prepared:
        ready = prepare(w)
        # A first capture in inference mode leaves generator state behind that no later one may write (PyTorch #166792).
        with torch.inference_mode(False), torch.set_grad_enabled(w.gradients):
            return replace(ready, call=captured(ready.call))

    return graphed


GPU_IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("eager", _eager(False)),
    Implementation("eager channels_last", _eager(True)),
    Implementation("eager channels_last" + GRAPH, _graph(_eager(True))),
    Implementation("torch.compile", _compiled(nn.Sequential, None)),
    Implementation("torch.compile max-autotune", _compiled(nn.Sequential, "max-autotune")),
    Implementation("cnnfast", _cnnfast),
    Implementation("cnnfast" + GRAPH, _graph(_cnnfast)),
    Implementation("cnnfast under torch.compile", _compiled(cnnfast.Sequential, None)),
)
BASELINES = ("eager", "eager channels_last")
COMPILED = ("torch.compile", "torch.compile max-autotune")
OURS = tuple(i.name for i in GPU_IMPLEMENTATIONS if i.name.startswith("cnnfast"))


def find(*names: str) -> tuple[Implementation, ...]:
    """The implementations of these names, in the list's order. ValueError for an unknown one."""
    return named(*names, among=GPU_IMPLEMENTATIONS)
