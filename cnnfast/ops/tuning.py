"""`tune`: let measurement choose, on the machine at hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from ..cpu import tuning as on_cpu
from ..cpu.tuned import recorded
from ..gpu import tuning as on_gpu
from ..messages import LOGGER

__all__ = ["tune"]


def tune(
    function: Callable[..., Any],
    *inputs: Any,
    batch_sizes: Iterable[int] = (),
    seconds: float | None = None,
    tell: Callable[[str], object] = LOGGER.info,
) -> list[on_gpu.Result | on_cpu.Result]:
    """Tune every step of ``function(*inputs)``, for these sizes; as `warmup`, for each of ``batch_sizes`` too.

    On a GPU, every valid plan of each fused step that is launched is timed; on a CPU, every method that is right for a
    convolution with its norm and activation, PyTorch's own operators among them (in inference; not where a graph of
    `torch.compile` holds them). What is chosen is kept under ``$CNNFAST_CACHE`` (``~/.cache/cnnfast``) and used by this
    and later processes for exactly these layers, sizes, dtypes and memory formats, on this GPU or on this processor
    with this instruction set and as many threads, until torch, triton or cnnfast changes. Nothing that was not proven
    right is timed, and nothing else than the rule's choice is kept on a CPU unless it is faster by 3 % in three of four
    turns. ``CNNFAST_TUNED=0`` leaves a CPU's choice to the rules; deleting the folder forgets it.

    ``function``: a model with `cnnfast.Sequential` in it, one that `accelerate` took, or anything that calls
    `cnnfast.ops`. ``seconds``: stop after about this time, with what was found. ``tell`` gets a line for each step; by
    default the logger "cnnfast" does. Takes some seconds for each plan of a GPU that was not compiled before, and a
    tenth of a second or the time of a hundred calls for each step on a CPU. Leave the machine alone meanwhile.

    RuntimeError where nothing ran that could be tuned, and on a GPU where ``CNNFAST_GUARD`` switches the check of
    kernels off; what `warmup` raises.
    """
    end = None if seconds is None else time.monotonic() + seconds
    with recorded() as seen:
        tasks = on_gpu.record(function, *inputs, batch_sizes=batch_sizes)
    if not tasks and not seen:
        raise RuntimeError(
            "nothing to tune: the forward launched no Triton kernel on a GPU, and on a CPU ran no step that could be "
            "fused (cnnfast.explain says why)"
        )
    results: list[on_gpu.Result | on_cpu.Result] = []
    if tasks:
        results += on_gpu.tune_steps(tasks, seconds=seconds, tell=tell)
    left = None if end is None else max(0.0, end - time.monotonic())
    return results + on_cpu.tune_steps(seen.values(), seconds=left, tell=tell)
