"""What this machine can run: versions, processor, devices, and every backend with the reason where it is off."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__, store
from ..cpu import onednn
from ..cpu import tuned as of_cpu
from ..cpu.isa import cpu_name, instruction_set
from ..gpu import guard
from ..gpu import tuned as of_gpu
from ..gpu.why_not import NO_DEVICE, cuda_why_not
from ..messages import UsageError, one_line

__all__ = ["Backend", "backends", "cpu_name", "device_of", "nvidia_problem", "report", "triton_off"]


@dataclass(frozen=True)
class Backend:
    """A backend; ``off`` is why it is not used here, None where it is."""

    name: str
    off: str | None
    detail: str = ""

    def __str__(self) -> str:
        return f"off: {self.off}" if self.off is not None else f"on{f' ({self.detail})' if self.detail else ''}"


def package_version(name: str) -> str:
    """The installed version of a distribution, or "not installed"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


# --- GPU --------------------------------------------------------------------------------------------------------------


def visible_nvidia_devices() -> list[str]:
    """NVIDIA devices that the system shows, whatever torch makes of them; by name where nvidia-smi tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        try:
            listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return [f"unknown (nvidia-smi does not answer: {error})"]
        names = [line.split(" (UUID")[0] for line in listed.stdout.splitlines() if line.startswith("GPU ")]
        if names:
            return names
    nodes = sorted(str(p) for p in Path("/dev").glob("nvidia[0-9]*"))
    if nodes:
        return nodes
    return ["/proc/driver/nvidia"] if Path("/proc/driver/nvidia/version").is_file() else []


def cuda_error() -> str | None:
    """Why torch cannot use CUDA; None where it can (a small sum was computed on the device)."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA: install a CUDA build of torch"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if not torch.cuda.is_available():
                torch.cuda.init()  # raises with the cause
                return "torch.cuda.is_available() is False" + _said(caught)
            value = torch.ones(2, device="cuda").sum().item()
        except (RuntimeError, AssertionError) as error:
            why = str(error).strip().splitlines()
            note = f" (CUDA_VISIBLE_DEVICES={hidden!r})" if hidden is not None else ""
            return (why[0] if why else type(error).__name__) + note + _said(caught)
    return None if value == 2.0 else f"a sum on the device gave {value} instead of 2"


def _said(caught: list[warnings.WarningMessage]) -> str:
    texts = [str(w.message).strip().splitlines()[0] for w in caught if str(w.message).strip()]
    return f" [{'; '.join(texts)}]" if texts else ""


def device_of(text: str) -> torch.device:
    """`torch.device` of a command line's ``--device``. UsageError for what is none; torch warns of old names there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.device(text)
        except Exception as error:  # of some kinds of device its module is looked for
            raise UsageError(f"--device {text}: {one_line(error, name=False)}") from error


def nvidia_problem() -> str | None:
    """A sentence about a visible NVIDIA device that torch cannot use, with the cause; None where there is none."""
    devices = visible_nvidia_devices()
    error = cuda_error() if devices else None
    return None if error is None else f"NVIDIA device visible ({', '.join(devices)}), but torch cannot use it: {error}"


def cuda_devices() -> list[str]:
    """One line for each CUDA device that torch can use."""
    if cuda_error() is not None:
        return []
    lines = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(
            f"cuda:{i} {p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, "
            f"{p.total_memory / 2**30:.0f} GiB"
        )
    return lines


# --- backends ---------------------------------------------------------------------------------------------------------


def triton_off(index: int | None = None) -> str | None:
    """Why Triton's kernels do not run on CUDA device ``index`` (None: the current one), or None where they do."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "triton is not installed (it exists for Linux: pip install triton)"
        return f"triton cannot be imported: {error}"
    problem = nvidia_problem()
    if problem is not None:
        return problem
    if cuda_error() is not None:
        return NO_DEVICE
    if index is not None and index >= torch.cuda.device_count():
        return f"cuda:{index} does not exist: there are {torch.cuda.device_count()} CUDA devices"
    return cuda_why_not(torch.cuda.current_device() if index is None else index)


def backends() -> list[Backend]:
    """Every backend, in the order in which ``auto`` prefers them."""
    detail = f"{instruction_set().name}, {torch.get_num_threads()} threads"
    return [
        Backend("triton", triton_off(), f"triton {package_version('triton')}"),
        Backend("aten, oneDNN packed", onednn.why_missing(), detail),
        Backend("aten", None, "PyTorch's own operators"),
    ]


# --- report -----------------------------------------------------------------------------------------------------------


def _lines() -> Iterator[tuple[str, str]]:
    yield "cnnfast", f"{__version__} ({Path(__file__).resolve().parent})"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"
    for name in ("triton", "numpy"):
        yield name, package_version(name)
    yield "system", platform.platform()
    yield "processor", f"{cpu_name()}, {os.cpu_count()} CPUs"
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    isa = f"{torch.backends.cpu.get_cpu_capability()} (PyTorch), {instruction_set().name} (oneDNN)"
    yield "instruction sets", isa + (f", limited by ONEDNN_MAX_CPU_ISA={limit}" if limit else "")
    for line in cuda_devices() or [nvidia_problem() or "no NVIDIA device visible"]:
        yield "device", line
    checked = "on" if guard.enabled() else f"off: CNNFAST_GUARD={os.environ['CNNFAST_GUARD']}"
    yield "check of kernels", f"{checked}; {store.count(guard.KIND)} passed, kept in {store.where(guard.KIND)}"
    for what, kind in (("tuned plans", of_gpu.KIND), ("tuned methods", of_cpu.KIND)):
        yield what, f"{store.count(kind)}, kept in {store.where(kind)}"
    for backend in backends():
        yield f"backend {backend.name}", str(backend)


def report() -> str:
    """The text of ``python -m cnnfast env``: what to paste into a bug report."""
    from tabulate import tabulate  # here: it is slow to import

    return tabulate(list(_lines()), tablefmt="plain", disable_numparse=True)
