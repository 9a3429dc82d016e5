"""What a job needs of this machine, said before any work: packages, the device, memory."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from types import MappingProxyType

import torch

from .. import env
from ..messages import CnnfastError, UsageError, one_line

__all__ = ["REQUIRES", "choose_device", "device_text", "require", "require_memory"]

# package -> module: the extra ``demo``
REQUIRES: Mapping[str, str] = MappingProxyType({"matplotlib": "matplotlib", "pillow": "PIL", "tqdm": "tqdm"})


def require(job: str, packages: Mapping[str, str]) -> None:
    """CnnfastError where a package that ``job`` needs is not installed."""
    missing = [package for package, module in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise CnnfastError(f"{job} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def choose_device(device: str | None) -> torch.device:
    """The device asked for, else CUDA where torch can use it, else the CPU; warns of a GPU that torch cannot use.

    UsageError for one that torch does not know or cannot compute on (``meta`` among them).
    """
    chosen = None if device is None else _usable(device)
    problem = env.nvidia_problem()
    if problem is not None:
        print(f"WARNING: {problem}\nThe CPU is used instead.\n")
    return chosen or torch.device("cuda" if env.cuda_error() is None else "cpu")


def _usable(text: str) -> torch.device:
    device = env.device_of(text)
    problem = env.cuda_error() if device.type == "cuda" else None
    try:
        if problem is None and torch.ones(2, device=device).sum().item() != 2:
            problem = "a sum on it is wrong"
    except Exception as error:  # each kind of device fails in its own way
        problem = one_line(error, name=False)
    if problem is not None:
        raise UsageError(f"--device {text}: {problem}")
    return torch.device("cpu") if device.type == "cpu" else device  # there is one, whatever its number


def require_memory(need: int, what: str) -> None:
    """CnnfastError where this machine has less than ``need`` bytes. Linux would grant them, and end the process when
    they are used."""
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not told here
        return
    if need > have > 0:
        raise CnnfastError(
            f"out of memory: {what} needs at least {need / 2**30:,.0f} GiB, this machine has {have / 2**30:,.0f}"
        )


def device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{env.cpu_name()}, {torch.get_num_threads()} threads"
