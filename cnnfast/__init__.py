"""cnnfast: fused transposed-convolution blocks for image generators.

Attributes are loaded on first use, so that ``import cnnfast`` costs nothing over ``import torch`` and needs no triton.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import guard as guard
    from . import ops as ops
    from .dispatch import backend as backend
    from .generators import create_model as create_model
    from .generators import list_models as list_models
    from .guard import warmup as warmup
    from .layers import ConvTranspose2dNormActivation as ConvTranspose2dNormActivation
    from .layers import Sequential as Sequential
    from .memory_format import channels_last as channels_last
    from .messages import CnnfastWarning as CnnfastWarning
    from .packing import freeze as freeze
    from .packing import invalidate as invalidate
    from .packing import unfreeze as unfreeze
    from .spec import Activation as Activation
    from .spec import ConvSpec as ConvSpec
    from .tuning import tune as tune

__version__ = "0.1.0"

# Public name -> the module that holds it; a module's own name is the module.
_EXPORTS = {
    "Activation": "spec",
    "CnnfastWarning": "messages",
    "ConvSpec": "spec",
    "ConvTranspose2dNormActivation": "layers",
    "Sequential": "layers",
    "backend": "dispatch",
    "channels_last": "memory_format",
    "create_model": "generators",
    "freeze": "packing",
    "guard": "guard",
    "invalidate": "packing",
    "list_models": "generators",
    "ops": "ops",
    "tune": "tuning",
    "unfreeze": "packing",
    "warmup": "guard",
}

__all__ = ["__version__", *_EXPORTS]

# In a checkout the kernels lie beside this folder, in an installed package inside it. With this line the checkout runs
# without being installed.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "kernels" / "__init__.py").is_file():
    __path__.append(str(_root))
del _root


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_EXPORTS[name]}", __name__)
    value = module if _EXPORTS[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
