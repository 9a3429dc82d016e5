"""Prove on first use: a kernel runs on a GPU only after it was right there once.

The first launch of a compiled kernel in a process is a trial (`trial`): of the fused convolution, of the weight
gradient, of normalisations and their gradients alike. What passes is kept on disk and not repeated by other processes.
A kernel that is wrong, does not compile or does not fit the GPU is not used again: PyTorch's
operators run, with one warning, and `report` and `cnnfast.Sequential.explain` say why; an explicit
``backend="triton"`` raises.

``CNNFAST_GUARD=0`` (or off, false, no) switches trial and fallback off. While a CUDA graph is captured nothing is
compiled or checked: call `warmup` first. An illegal memory access of a kernel cannot be recovered from: CUDA itself is
lost then.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Any, Protocol, TypeVar

import torch

from .. import __version__, store
from ..messages import CnnfastWarning
from ..spec import ConvSpec
from ..step import Step
from .trial import Undecided, is_kernel_failure, said

__all__ = [
    "NormPass",
    "Proof",
    "Refused",
    "Subject",
    "UNGUARDED",
    "capturing",
    "describe",
    "enabled",
    "environment",
    "failures",
    "first_use",
    "proof",
    "report",
]


KIND = "proofs"  # of the records on disk


class Refused(RuntimeError):
    """An explicit ``backend="triton"`` asked for a kernel that must not run; the message says why."""


_OFF, _ON = ("0", "off", "false", "no"), ("", "1", "on", "true", "yes")


def enabled() -> bool:
    """Whether kernels are checked at their first use: not where ``CNNFAST_GUARD`` is 0, off, false or no."""
    return _is_on(os.environ.get("CNNFAST_GUARD", ""))


@lru_cache
def _is_on(value: str) -> bool:
    known = value.strip().lower()
    if known not in (*_ON, *_OFF):
        expected = f"expected {', '.join(_OFF)}, or {', '.join(_ON[1:])}"
        warnings.warn(f"cnnfast: CNNFAST_GUARD={value}: {expected}. Kernels are checked.", CnnfastWarning, stacklevel=3)
    return known not in _OFF


# --- what a proof is of -----------------------------------------------------------------------------------------------


class Subject(Protocol):
    """What a kernel computes, frozen: equal subjects with equal constants are one kernel. Its ``repr`` names everything
    that it depends on, and is kept on disk."""

    def __hash__(self) -> int: ...

    def describe(self) -> str:
        """Which operation of which layer, for people."""

    def concerns(self, step: Step) -> bool:
        """Whether ``step`` or its gradients run this."""


@dataclass(eq=False)
class Proof:
    """Whether one compiled kernel may run on one GPU; shared by all launches of that kernel.

    A call reads ``ready`` and, while that is False, goes through `first_use`. ``why_not``: why PyTorch's operators run
    for good. ``state``: the story in words. ``constants``: all that the binary depends on beside the GPU and versions.
    """

    name: str
    subject: Subject
    index: int  # of the CUDA device
    constants: Mapping[str, Any] = field(default_factory=dict)
    ready: bool = False
    why_not: str | None = None
    state: str = "not used yet"
    calls: int = 0  # that came before it was ready
    missed: bool = False  # a graph was captured without it

    def key(self) -> dict[str, Any]:
        """Of the record on disk."""
        return {**environment(self.index), "subject": repr(self.subject), "constants": dict(self.constants)}


UNGUARDED = Proof("not guarded", Step(ConvSpec.make(1, 1, 1)), -1, ready=True)
"""Of launches that are not on a CUDA device: Triton's interpreter, or a driver that emulates one."""

_proofs: dict[Hashable, Proof] = {}
_told: set[str] = set()


def proof(subject: Subject, name: str, index: int, constants: Mapping[str, Any]) -> Proof:
    """The proof of a kernel of ``subject`` with these compile-time constants on CUDA device ``index``.

    ``name`` describes its plan. ``constants``: all that the binary depends on (hashable, and of JSON's types), dtypes
    of operands among them; "dtype" is told to people.
    """
    key = (index, subject, *constants.items())
    if key not in _proofs:
        _proofs[key] = Proof(name, subject, index, constants)
    return _proofs[key]


@lru_cache(maxsize=1)
def _sources() -> str:
    """A hash of everything in ``cnnfast.kernels``: the folder is the register of the kernels."""
    files = sorted((f for f in resources.files("cnnfast.kernels").iterdir() if f.name.endswith(".py")), key=str)
    return hashlib.sha256(b"\0".join(part for f in files for part in (f.name.encode(), f.read_bytes()))).hexdigest()


@lru_cache(maxsize=64)
def environment(index: int) -> dict[str, str]:
    """What a result depends on beside the launch itself: the GPU, the versions and the kernels' source."""
    import triton

    major, minor = torch.cuda.get_device_capability(index)
    return {
        "gpu": torch.cuda.get_device_name(index),
        "capability": f"{major}.{minor}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cnnfast": __version__,
        "kernels": _sources(),
    }


# --- the first use ----------------------------------------------------------------------------------------------------


_Result = TypeVar("_Result")


def first_use(
    proof: Proof, start: Callable[[], _Result], trial: Callable[[], str | None], required: bool
) -> _Result | None:
    """The result of ``start()``, which launches the kernel on the caller's tensors, once that is known to be right;
    None where PyTorch's operators must run.

    ``trial()`` launches the kernel on other operands and says what is wrong with its results, or None; it raises
    `trial.Undecided` where that cannot be found out now. ``required``: `Refused` with the reason instead of None (an
    explicit ``backend="triton"``).
    """
    if proof.why_not is None and capturing():
        reason = "a CUDA graph is being captured and this kernel was not used before: call cnnfast.warmup first"
        if required:
            raise Refused(f'backend="triton" cannot run this: {reason}')
        if not proof.missed:
            proof.missed = True
            _warn(proof, f"{reason}. The graph holds PyTorch's operators.")
        return None
    cause: Exception | None = None
    if proof.why_not is None:
        try:
            decided, problem = _try(proof, trial)
            if problem is None:
                if not decided and not required:
                    return None
                result = start()
                proof.ready = decided
                return result
            proof.why_not = f"gave wrong results on {environment(proof.index)['gpu']}: {problem}"
        except Exception as error:
            if not enabled() or not is_kernel_failure(error):
                raise
            cause, proof.why_not = error, f"cannot run on {environment(proof.index)['gpu']}: {said(error)}"
        proof.state = f"PyTorch's operators run: the kernel {proof.why_not}"
        if not required and proof.why_not not in _told:  # a missing compiler is not told of for every layer
            _told.add(proof.why_not)
            _warn(proof, f"the Triton kernel {proof.why_not}. PyTorch's operators run instead.")
    if required:
        raise Refused(f'backend="triton" cannot run this: the kernel {proof.why_not}') from cause
    return None


def _warn(proof: Proof, text: str) -> None:
    warnings.warn(f"cnnfast: {describe(proof)}: {text}", CnnfastWarning, stacklevel=4)


def _try(proof: Proof, trial: Callable[[], str | None]) -> tuple[bool, str | None]:
    """(whether it is decided that the kernel may run or not, what is wrong with it or None). Sets `Proof.state`."""
    if not enabled():
        proof.state = f"not checked (CNNFAST_GUARD={os.environ['CNNFAST_GUARD']})"
        return True, None
    if store.get(KIND, proof.key()) is not None:
        proof.state = "right (checked by an earlier process)"
        return True, None
    calls, proof.calls = proof.calls, proof.calls + 1
    if calls & (calls - 1):  # what could not be decided is tried again at calls 1, 2, 3, 5, 9, 17, ...
        return False, None
    try:
        problem = trial()
    except Undecided as reason:
        proof.state = f"not checked yet, PyTorch's operators run: {reason}"
        return False, None
    if problem is None:
        kept = store.put(KIND, proof.key(), {"kernel": describe(proof)})
        proof.state = "right (checked)" if kept else f"right (checked; cannot be kept in {store.where(KIND)})"
    return True, problem


def capturing() -> bool:
    """Whether the current stream is being captured into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


# --- telling ----------------------------------------------------------------------------------------------------------


def describe(proof: Proof) -> str:
    """Which kernel: what it computes and its plan."""
    dtype = str(proof.constants.get("dtype", "")).removeprefix("torch.")
    return f"{proof.subject.describe()}, {dtype}, {proof.name}, cuda:{proof.index}"


def report() -> list[str]:
    """A line for each kernel that this process has launched or tried to: which, and whether it is proven."""
    return [f"{describe(p)}: {p.state}" for p in _proofs.values()]


def failures(step: Step, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Why PyTorch's operators run in place of kernels of this step and of its gradients on ``device``: a line for each
    that failed. Kernels of other dtypes than ``dtype``, and other kernels than the step's own, are named in it."""
    here = (p for p in _proofs.values() if p.index == device.index and p.why_not is not None)
    return [
        f"{p.name if p.subject == step and p.constants.get('dtype') == str(dtype) else f'of the {describe(p)}:'} "
        f"{p.why_not}"
        for p in here
        if p.subject.concerns(step)
    ]


def forget() -> None:
    """Drop what this process knows of kernels, as a new process would start (for tests)."""
    _proofs.clear()
    _told.clear()
    environment.cache_clear()
    _is_on.cache_clear()


@dataclass(frozen=True)
class NormPass:
    """What the kernels of one pass compute, for `guard`. ``what``: ahead of the operation's name."""

    what: str
    step: Step  # without a convolution
    channels: int

    def describe(self) -> str:
        return f"{self.what}{self.step.describe()} of {self.channels} channels"

    def concerns(self, step: Step) -> bool:
        """The norm that follows a step is not part of its convolution: one of as many channels, and its activation."""
        return self.channels == step.spec.out_channels and self.step.activation == step.activation
