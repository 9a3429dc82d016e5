"""Whole jobs on top of the library, for the command line and for programs. Nothing of the library imports them.

``draw(text)``, ``enhance(image, ...)``, ``generate(model, count)``, ``repair(image, mask)``, ``style(image, ...)`` and
``cut_out(image, ...)``, and `Drawer`, `Enhancer`, `Sampler`, `Repairer`, `Styler` and `Cutter`, which keep their
networks for many pictures, are loaded on first use. Modules are named after the work and functions after what they do,
so that no name means both.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cutting import Cutter as Cutter
    from .cutting import cut_out as cut_out
    from .drawing import Drawer as Drawer
    from .drawing import draw as draw
    from .enhancement import Enhancer as Enhancer
    from .enhancement import enhance as enhance
    from .repairing import Repairer as Repairer
    from .repairing import repair as repair
    from .sampling import Sampler as Sampler
    from .sampling import generate as generate
    from .styling import Styler as Styler
    from .styling import style as style

_EXPORTS = {
    "Cutter": "cutting",
    "Drawer": "drawing",
    "Enhancer": "enhancement",
    "Repairer": "repairing",
    "Sampler": "sampling",
    "Styler": "styling",
    "cut_out": "cutting",
    "draw": "drawing",
    "enhance": "enhancement",
    "generate": "sampling",
    "repair": "repairing",
    "style": "styling",
}

__all__ = [*_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
