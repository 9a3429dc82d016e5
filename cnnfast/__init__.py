"""cnnfast: fused transposed-convolution blocks for image generators.

Attributes are loaded on first use, so that ``import cnnfast`` costs nothing over ``import torch`` and needs no triton.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops as ops
    from .activations import Activation as Activation
    from .cpu.packing import freeze as freeze
    from .cpu.packing import invalidate as invalidate
    from .cpu.packing import unfreeze as unfreeze
    from .dispatch import backend as backend
    from .generators import create_model as create_model
    from .generators import list_models as list_models
    from .gpu import guard as guard
    from .gpu.graphed import graphed as graphed
    from .gpu.warmup import warmup as warmup
    from .memory_format import channels_last as channels_last
    from .messages import CnnfastWarning as CnnfastWarning
    from .nn.accelerate import accelerate as accelerate
    from .nn.accelerate import restore as restore
    from .nn.accelerate_report import explain as explain
    from .nn.layers import ConvTranspose2dNormActivation as ConvTranspose2dNormActivation
    from .nn.layers import Sequential as Sequential
    from .ops.tuning import tune as tune
    from .spec import ConvSpec as ConvSpec

__version__ = "0.1.0"

# Public name -> the module that holds it; a name with a dot ahead is the module.
_EXPORTS = {
    "Activation": "activations",
    "CnnfastWarning": "messages",
    "ConvSpec": "spec",
    "ConvTranspose2dNormActivation": "nn.layers",
    "Sequential": "nn.layers",
    "accelerate": "nn.accelerate",
    "backend": "dispatch",
    "channels_last": "memory_format",
    "create_model": "generators",
    "explain": "nn.accelerate_report",
    "freeze": "cpu.packing",
    "graphed": "gpu.graphed",
    "guard": ".gpu.guard",
    "invalidate": "cpu.packing",
    "list_models": "generators",
    "ops": ".ops",
    "restore": "nn.accelerate",
    "tune": "ops.tuning",
    "unfreeze": "cpu.packing",
    "warmup": "gpu.warmup",
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
    where = _EXPORTS[name]
    module = importlib.import_module("." + where.removeprefix("."), __name__)
    value = module if where.startswith(".") else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
