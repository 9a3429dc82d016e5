"""`warmup`: compile, check and pack what calls need, ahead of the first one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..dispatch import on_cpu
from .devices import cuda_index
from .guard import capturing

__all__ = ["warmup"]


# --- ahead of time ----------------------------------------------------------------------------------------------------


def warmup(function: Callable[..., Any], *inputs: Any, batch_sizes: Iterable[int] = (), backward: bool = False) -> None:
    """Compile and prove every kernel that ``function(*inputs)`` launches, so that later calls of these sizes do not
    wait, and can be captured into a CUDA graph.

    Runs the function, without gradients, on ``inputs`` and then for each of ``batch_sizes`` on inputs of that batch
    (the first image of each tensor repeated; all tensors among the inputs must have the batch as dimension 0). Other
    image sizes: call it again. Under autocast where later calls are. On a CPU it packs the weights: there, each input
    runs twice, as a weight is packed when it is met again.

    ``backward``: ``function`` is a module, and a training step of it is run, in the mode that it is in: forward, and
    the gradients of parameters and of those inputs that require one. Parameters, their ``grad``, buffers (running
    statistics) and the generators of random numbers are as before afterwards. Call it ahead of capturing a training
    step, on the module itself rather than on a wrapper such as DistributedDataParallel; with SyncBatchNorm, on every
    process. Gradients of gradients (a penalty on them) launch more kernels: run such a step once as it is.

    Without ``backward`` a module must be in eval mode: training mode would move its running statistics.

    ValueError for a module in training mode without ``backward``, for ``backward`` of no module or of one without
    gradients, or a batch size below 1; RuntimeError inside a graph capture; what the function raises.
    """
    module = function if isinstance(function, torch.nn.Module) else None
    if module is not None and module.training and not backward:
        raise ValueError("warmup of a module in training mode: call its eval() first, or ask for backward=True")
    if backward and (module is None or isinstance(module, torch.nn.parallel.DistributedDataParallel)):
        raise ValueError(
            f"warmup with backward=True of a {type(function).__name__}: give the module itself, whose buffers and "
            "gradients are to stay as they are"
        )
    sizes = list(batch_sizes)
    if any(n < 1 for n in sizes):
        raise ValueError(f"batch_sizes={sizes} must be positive")
    if capturing():
        raise RuntimeError("warmup inside a CUDA graph capture: call it before")
    for n in (None, *sizes):
        given = [_of_batch(x.detach(), n) if isinstance(x, torch.Tensor) else x for x in inputs]
        if module is not None and backward:
            wanted = [x.requires_grad if isinstance(x, torch.Tensor) else False for x in inputs]
            _training_step(module, [x.requires_grad_() if want else x for x, want in zip(given, wanted, strict=True)])
        else:
            packs = any(isinstance(x, torch.Tensor) and on_cpu(x) for x in given)  # a weight that is met again
            with torch.no_grad():
                for _ in range(2 if packs else 1):
                    function(*given)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _training_step(module: torch.nn.Module, inputs: list[Any]) -> None:
    """Forward and backward that leave nothing behind."""
    tensors = [*module.parameters(), *(x for x in inputs if isinstance(x, torch.Tensor))]
    leaves = [t for t in tensors if t.requires_grad]
    gpus = {t.device for t in tensors if cuda_index(t) is not None} if torch.cuda.is_initialized() else ()
    buffers = [(m, name, b, b.clone()) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    try:
        with torch.random.fork_rng(gpus), torch.enable_grad():
            results = [y for y in tree_leaves(module(*inputs)) if isinstance(y, torch.Tensor) and y.requires_grad]
            if not results:
                raise ValueError(f"warmup with backward=True: no result of {type(module).__name__} requires a gradient")
            torch.autograd.grad(results, leaves, [torch.ones_like(y) for y in results], allow_unused=True)
    finally:
        with torch.no_grad():
            for m, name, buffer, content in buffers:
                m._buffers[name] = buffer
                buffer.copy_(content)


def _of_batch(x: torch.Tensor, n: int | None) -> torch.Tensor:
    """The first image ``n`` times, in x's memory format; for None x itself."""
    if n is None:
        return x
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    many = x[:1].repeat(n, *(1,) * (x.dim() - 1))
    return many.contiguous(memory_format=torch.channels_last) if channels_last else many
