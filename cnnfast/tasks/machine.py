"""What a job needs of this machine, said before any work: packages, the device."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import MappingProxyType

import torch

from .. import env

__all__ = ["REQUIRES", "choose_device", "device_text", "obstacle"]

# package -> module: the extra ``demo``
REQUIRES: Mapping[str, str] = MappingProxyType({"matplotlib": "matplotlib", "pillow": "PIL", "tqdm": "tqdm"})


def obstacle(job: str, requires: Mapping[str, str], device: str | None) -> str | None:
    """Why ``job`` cannot run here (a missing package, a device that torch cannot use), or None."""
    missing = [package for package, module in requires.items() if importlib.util.find_spec(module) is None]
    if missing:
        return f"{job} needs {', '.join(missing)}: pip install {' '.join(missing)}"
    if device is None:
        return None
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        return f"--device {device}: {str(error).splitlines()[0]}"
    problem = env.cuda_error() if kind == "cuda" else None
    return None if problem is None else f"--device {device}: {problem}"


def choose_device(device: str | None) -> torch.device:
    """The device asked for, else CUDA where torch can use it, else the CPU; warns of a GPU that torch cannot use."""
    problem = env.nvidia_problem()
    if problem is not None:
        print(f"WARNING: {problem}\nThe CPU is used instead.\n")
    return torch.device(device or ("cuda" if env.cuda_error() is None else "cpu"))


def device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{env.cpu_name()}, {torch.get_num_threads()} threads"
