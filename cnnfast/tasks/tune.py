"""Tuning by the command line: generators by their names, on this GPU or this processor (`cnnfast.tune`)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from .. import store
from ..cpu import tuned as methods
from ..cpu.onednn import why_missing
from ..generators import create_model, list_models
from ..gpu import guard, tuned
from ..gpu.tuning import UNCHECKED
from ..memory_format import channels_last
from ..messages import CnnfastError, UsageError
from ..ops.tuning import tune
from . import env

__all__ = ["Options", "run"]


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Of ``python -m cnnfast tune``. ``models``: names of generators, all where empty; ``seconds``: for everything."""

    models: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 16)
    dtypes: tuple[torch.dtype, ...] = ()  # float16; on a CPU float32
    device: str = "cuda"
    seconds: float | None = None


def run(options: Options) -> int:
    """Tune generators by their names; prints what is found. Returns the exit status. UsageError for unknown models and
    devices, CnnfastError where nothing can be tuned here."""
    _check(options)
    end = None if options.seconds is None else time.monotonic() + options.seconds
    device, found = torch.device(options.device), []
    on_cpu = device.type == "cpu"
    for name in options.models or list_models():
        for dtype in options.dtypes or ((torch.float32,) if on_cpu else (torch.float16,)):
            model: Any = create_model(name).eval().to(device, dtype)
            model = model if on_cpu else channels_last(model)
            left = None if end is None else max(0.0, end - time.monotonic())
            print(f"{name}, {str(dtype).removeprefix('torch.')}, batch {', '.join(map(str, options.batches))}")
            example = model.example_input(options.batches[0])
            inputs = example if isinstance(example, tuple) else (example,)
            found += tune(model, *inputs, batch_sizes=options.batches[1:], seconds=left, tell=print)
    gains = sorted(r.gain for r in found)
    if gains:
        where = store.where(methods.KIND if on_cpu else tuned.KIND)
        print(f"{len(found)} steps tuned, median gain {gains[len(gains) // 2]:.2f}x; kept in {where}")
    return 0


def _check(options: Options) -> None:
    unknown = [name for name in options.models if name not in list_models()]
    if unknown:
        raise UsageError(f"unknown model {', '.join(unknown)}: expected some of {', '.join(list_models())}")
    device = env.device_of(options.device)
    if device.type == "cpu":
        if (problem := why_missing()) is not None:
            raise CnnfastError(f"nothing can be tuned here: {problem}")
        return
    if device.type != "cuda":
        raise UsageError(f"--device {options.device}: what can be tuned is a CUDA device or the CPU")
    problem = env.triton_off(device.index) or (None if guard.enabled() else UNCHECKED)
    if problem is not None:
        raise CnnfastError(f"nothing can be tuned here: {problem}")
