"""Methods that `cnnfast.tune` found faster than the rules' on this processor, kept on disk: read where a step is
planned, written by tuning alone.

A record is of one step on an input of one shape, dtype and memory format, whose result is in one memory format; of one
processor, instruction set and number of threads, under one torch and cnnfast, for one source of the methods. It names
one of `methods.METHODS`, or `MODULES`: PyTorch's own operators. ``CNNFAST_TUNED=0`` leaves everything to the rules.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

import torch

from .. import __version__, store
from ..memory_format import has_both
from ..messages import LOGGER
from ..step import Step
from .isa import cpu_model, instruction_set, lowered_products
from .methods import METHODS

__all__ = [
    "FASTER",
    "KIND",
    "MODULES",
    "RECORDERS",
    "Seen",
    "Size",
    "choice",
    "environment",
    "generation",
    "keep",
    "recorded",
    "see",
]

KIND = "methods"
MODULES = "modules"
FASTER = "tuned: PyTorch's operators were as fast or faster on this processor"


class Size(NamedTuple):
    """What a step meets: an input (N, C_in, *size) of this shape and dtype, and whether it and the result are
    channels-last (where memory fits both formats, they are)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    before: bool
    after: bool

    @classmethod
    def of(cls, step: Step, shape: tuple[int, ...], dtype: torch.dtype, before: bool, after: bool) -> Size:
        """ValueError where the shape is none that the step takes."""
        before = before or has_both(shape[1], shape[2:])
        return cls(tuple(shape), dtype, before, after or has_both(step.spec.out_channels, step.output_size(shape[2:])))


# --- records ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _sources() -> str:
    """A hash of the methods' source."""
    found = hashlib.sha256()
    for name in ("methods.py", "onednn.py", "toom_cook.py", "winograd.py"):
        found.update(resources.files(__package__).joinpath(name).read_bytes())
    return found.hexdigest()


def environment() -> dict[str, Any]:
    """What a time depends on beside the step and its size."""
    return {
        "processor": cpu_model(),
        "onednn": instruction_set().name,
        "aten": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "lowered": lowered_products(),
        "torch": torch.__version__,
        "cnnfast": __version__,
        "methods": _sources(),
    }


def _key(step: Step, size: Size) -> dict[str, Any]:
    about = {"dtype": str(size.dtype), "before": size.before, "after": size.after}
    return {**environment(), "step": repr(step), "shape": list(size.shape), **about}


def generation() -> int:
    """`store.generation` of these records: for who keeps what follows from a choice."""
    return store.generation(KIND)


def choice(step: Step, shape: tuple[int, ...], dtype: torch.dtype, before: bool, after: bool) -> str | None:
    """The name of the tuned method, `MODULES`, or None where the rules choose. See `Size`."""
    now = generation()
    if not _any(now):
        return None
    return _choice(step, tuple(shape), dtype, before, after, torch.get_num_threads(), lowered_products(), now)


@lru_cache(maxsize=1)
def _any(generation: int) -> bool:
    """Whether there are records at all, of whatever processor: without them a call looks no further."""
    if os.environ.get("CNNFAST_TUNED", "").lower() in ("0", "off", "false", "no"):
        return False
    return store.holds(KIND)


@lru_cache(maxsize=4096)
def _choice(
    step: Step, shape: tuple[int, ...], dtype: torch.dtype, before: bool, after: bool, *state: object
) -> str | None:
    try:
        key = _key(step, Size.of(step, shape, dtype, before, after))
    except ValueError:
        return None
    record = store.get(KIND, key)
    if record is None:
        return None
    name = record.get("method")
    if name != MODULES and name not in METHODS:
        LOGGER.warning("%s names no method of this version and is not used: %r", store.path(KIND, key), name)
        return None
    return str(name)


def keep(step: Step, size: Size, method: str, about: Mapping[str, Any]) -> bool:
    """Keep the name of a method for this step and size; ``about`` is for people who read the file. Returns whether it
    is on disk."""
    return store.put(KIND, _key(step, size), {"method": method, "about": dict(about)})


# --- recording --------------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """A step at one size; ``weight_channels_last``, and the elements of PReLU's weight, decide nothing."""

    step: Step
    size: Size
    weight_channels_last: bool
    slopes: int


RECORDERS: list[dict[tuple[Step, Size], Seen]] = []
"""Of the process; `recorded` alone writes it."""


@contextmanager
def recorded() -> Iterator[dict[tuple[Step, Size], Seen]]:
    """Inside the ``with`` block, what is yielded gathers every step for which a method is chosen."""
    found: dict[tuple[Step, Size], Seen] = {}
    RECORDERS.append(found)
    store.renew(KIND)  # what was chosen before is chosen anew
    try:
        yield found
    finally:
        RECORDERS.remove(found)


def see(
    step: Step,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    formats: tuple[bool, bool],
    weight_channels_last: bool,
    slopes: int,
) -> None:
    """Tell the `RECORDERS`. ``formats``: whether the input and the result are channels-last."""
    size = Size.of(step, shape, dtype, *formats)
    for found in RECORDERS:
        found.setdefault((step, size), Seen(step, size, weight_channels_last, slopes))
