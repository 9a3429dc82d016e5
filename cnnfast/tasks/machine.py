"""What a job needs of this machine, said before any work: packages, the device, memory."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import nn

from ..cpu.isa import InstructionSet, instruction_set, products_dtype
from ..messages import CnnfastError, UsageError, one_line
from ..nn.layers import Sequential
from . import env, ranks

__all__ = [
    "REQUIRES",
    "choose_device",
    "choose_dtype",
    "containers",
    "device_text",
    "has_bfloat16",
    "memory_to_use",
    "require",
    "require_memory",
    "size_in_bytes",
]

_DEFAULT_MEMORY = 2.0 * 2**30  # free, where the system does not tell

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


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; None: float16 on a GPU, float32 on a CPU, which is exact and on most of them the fastest.
    UsageError for half precision on a CPU without instructions for it."""
    if name is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    if device.type == "cpu" and name != "float32":
        found = instruction_set()
        needed = {"bfloat16": InstructionSet.AVX512_BF16, "float16": InstructionSet.AMX_FP16}[name]
        if found < needed:
            raise UsageError(f"--dtype {name}: this CPU has no instructions for it ({found.name}): use float32")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


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


def containers(device: torch.device) -> type[nn.Sequential]:
    """The containers of a network of plain convolutions without norms (and of few transposed ones): on a CPU, where
    fusing these gains less than a step costs in Python (docs/facts.md, "SPAN"), PyTorch's."""
    return nn.Sequential if device.type == "cpu" else Sequential


def device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{env.cpu_name()}, {torch.get_num_threads()} threads"


def memory_to_use(device: torch.device) -> float:
    """Bytes that a job may take by itself: half of what is free on ``device``, or on this machine and in its group of
    processes (cgroup). Under ``torchrun`` its part of that."""
    sharing = ranks.here().local_size
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2 / -(-sharing // torch.cuda.device_count())
    free = [_DEFAULT_MEMORY]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")] or free
    except (OSError, ValueError, IndexError):  # not told here
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        free.append(float(limit) - float(used))
    except (OSError, ValueError):  # no limit is "max"
        pass
    return max(min(free), 0.0) / 2 / sharing


def size_in_bytes(text: str) -> float:
    """The value of ``--memory``: 512M, 4G, a plain number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    value = float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ") if found else 0.0
    if value < 2**20:
        raise argparse.ArgumentTypeError(f"expected a size of at least 1M, such as 512M or 4G, got {text!r}")
    return value


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 by itself."""
    if device.type == "cpu":
        return products_dtype(torch.bfloat16, instruction_set()) == torch.bfloat16
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
