"""The fence between a copy to shared memory and the tensor cores of sm_90 that Triton before 3.7 leaves out.

wgmma reads its operands from shared memory through the asynchronous proxy. What cp.async or an ordinary store wrote
there is visible to that proxy only after a ``fence.proxy.async`` (PTX ISA, "Async proxy"); without one the result of
the product is undefined, whatever barriers there are. Triton 3.7 puts it behind the barrier that follows the wait for
the copies; here it is put into the PTX of this library's kernels, ahead of each ``wgmma.fence``.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import cache
from typing import Any

__all__ = ["inserted", "needed", "with_fences"]

_WGMMA_FENCE = re.compile(r"^([ \t]*)(wgmma\.fence\.sync\.aligned;)", re.MULTILINE)
_lock = threading.RLock()  # the hook is one of the process


@cache
def _left_out() -> bool:
    """Whether this Triton leaves the fence out."""
    import triton

    return tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 7)


def needed(arch: int) -> bool:
    """Whether kernels for compute capability ``arch`` (90: 9.0) must be compiled inside `inserted`. Part of a kernel's
    compile-time constants (``FENCE``), and so of its key in Triton's cache and of its proof."""
    return arch == 90 and _left_out()


def with_fences(ptx: str) -> str:
    """``ptx`` with a ``fence.proxy.async`` ahead of every ``wgmma.fence``."""
    return _WGMMA_FENCE.sub(r"\1fence.proxy.async.shared::cta;\n\1\2", ptx)


@contextmanager
def inserted(on: bool = True) -> Iterator[None]:
    """Triton compiles inside the block with the fence, where ``on``.

    Through Triton's hook on its compiler's stages, which is the process's: what another thread compiles meanwhile gets
    the fence too, and stays right. A hook that somebody else has set runs first.
    """
    if not on:
        yield
        return
    from triton import knobs

    with _lock:
        before: Callable[..., Any] | None = knobs.runtime.add_stages_inspection_hook

        def hook(*args: Any) -> Any:
            if not args:  # newer versions ask what the hook adds to the keys of their caches
                key, digest = before() if before is not None else ("", "")
                return f"{key}cnnfast-fence", f"{digest}cnnfast-fence"
            if before is not None:
                before(*args)
            stages: MutableMapping[str, Callable[[Any, Any], Any]] = args[1]
            make = stages["ptx"]
            stages["ptx"] = lambda source, metadata: with_fences(make(source, metadata))
            return None

        knobs.runtime.add_stages_inspection_hook = hook
        try:
            yield
        finally:
            knobs.runtime.add_stages_inspection_hook = before
