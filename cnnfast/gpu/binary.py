"""`Binary`: one binary of a kernel, found by Triton at its first launch and launched directly from then on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

from . import fence

__all__ = ["Binary", "aligned"]


class Binary:
    """A kernel with its compile-time arguments and options, for arguments of one kind.

    Which binary a launch wants, Triton works out from all of its arguments, anew each time; that takes it longer than
    the launch. Whoever holds a `Binary` knows it beforehand, from the key that it is held under: the tensors' dtypes,
    and which arguments are None. Integers are not specialised on (``do_not_specialize``) and fit in 32 bits, addresses
    are multiples of 16 (or the kernel does not look), and floats are floats.

    Triton's own launch runs the first time on each device, and wherever something else stands in its place (an
    interpreter, a recorder).
    """

    __slots__ = ("_found", "constants", "fenced", "kernel", "options")

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: int) -> None:
        """``constants``: the kernel's compile-time arguments; others among them are left out. ``options``: Triton's."""
        self.kernel = kernel
        self.constants = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.options = options
        self.fenced = bool(constants.get("FENCE"))
        self._found: dict[Any, _Found] = {}  # by device

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch it on the current device and stream, with the run-time arguments in the kernel's order."""
        launch = type(self.kernel).run
        if self._found:
            active = driver.active
            device = active.get_current_device()
            found = self._found.get(device)
            if found is not None and found.by is launch:
                stream, hooks = active.get_current_stream(device), knobs.runtime
                before, after, told = hooks.launch_enter_hook, hooks.launch_exit_hook, None
                if getattr(before, "calls", before) or getattr(after, "calls", after):
                    told = found.compiled.launch_metadata(grid, stream, *args, *self.constants)
                else:  # chains of no hooks
                    before = after = None
                found.start(*grid, stream, found.function, found.packed, told, before, after, *args, *self.constants)
                return
        # Compile-time arguments by position: by name they cost 5 us a launch.
        with fence.inserted(self.fenced):
            compiled = self.kernel.run(*args, *self.constants, grid=grid, warmup=False, **self.options)
        if isinstance(compiled, CompiledKernel):
            found = _Found(launch, compiled, compiled.run, compiled.function, compiled.packed_metadata)
            self._found[driver.active.get_current_device()] = found


class _Found(NamedTuple):
    """What Triton's launch ``by`` found: the compiled kernel, and of it what a launch takes."""

    by: Any
    compiled: CompiledKernel
    start: Callable[..., None]
    function: Any
    packed: Any


# Of a thread, as many as there are. Without this, ptxas aims at 128 for occupancy, and spills a few on the way.
MAX_REGISTERS = 255


@cache
def unused(device: torch.device) -> torch.Tensor:
    """What stands for partial sums where there are none: their type is part of the binary."""
    return torch.empty(16, dtype=torch.float32, device=device)


def aligned(t: torch.Tensor) -> torch.Tensor:
    """``t`` at an address that 16 divides."""
    return t.clone() if t.data_ptr() & 15 else t
