"""``python -m benchmarks.gpu.on_cpu SCRIPT [-- ARGUMENTS]`` or ``... pytest ARGUMENTS``: Triton kernels on a CPU.

It is ``python -m ttsem.sanitize`` for Triton 3.6 too. ttsem reads Triton's intermediate language in MLIR's generic
form, and switches the printer over by a function of MLIR's that wheels before 3.7 do not export. MLIR prints that same
form of a module that does not verify, so there each module is made to fail, once nothing but printing is left to do.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import ir
from ttsem import harness, sanitize

__all__ = ["generic", "main", "with_locations"]

_LOCATION = re.compile(r"^(#loc\d*) = (loc\(.*\))$\n?", re.MULTILINE)
_USE = re.compile(r"loc\((#loc\d*)\)|(#loc\d*)\b")


def with_locations(text: str) -> str:
    """MLIR's text with each location where it is used, not under a name ahead of or behind the module."""
    named = dict(_LOCATION.findall(text))

    def put(use: re.Match[str]) -> str:
        found = _USE.sub(put, named[use[1] or use[2]])
        return found if use[1] else found.removeprefix("loc(").removesuffix(")")

    return _USE.sub(put, _LOCATION.sub("", text))


def generic(stage_text: Callable[..., str]) -> Callable[..., str]:
    """`ttsem.harness._stage_text`, which compiles a launch as far as a stage and prints the module: in generic form."""

    def text(record: Any, stage: str, target: Any) -> str:
        before = knobs.runtime.add_stages_inspection_hook

        def hook(backend: Any, stages: MutableMapping[str, Callable[..., Any]], *rest: Any) -> None:
            if before is not None:
                before(backend, stages, *rest)
            make = stages[stage]

            def unverified(module: Any, metadata: Any) -> Any:
                module = make(module, metadata)
                module.set_attr("unverified", ir.builder(module.context).get_unit_attr())  # of no dialect: not allowed
                return module

            stages[stage] = unverified

        knobs.runtime.add_stages_inspection_hook = hook
        try:
            return with_locations(stage_text(record, stage, target))
        finally:
            knobs.runtime.add_stages_inspection_hook = before

    return text


def main() -> int:
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 7):
        harness._stage_text = generic(harness._stage_text)
    return int(sanitize.main())


if __name__ == "__main__":
    sys.exit(main())
