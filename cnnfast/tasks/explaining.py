"""``python -m cnnfast explain MODULE:FACTORY``: what of a user's own model would run fused, and why not the rest."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..messages import UsageError, one_line
from ..nn.accelerate import accelerate
from ..nn.accelerate_report import explain
from ..nn.accelerate_verify import timed

__all__ = ["made", "run", "sizes"]


def run(name: str, inputs: list[str] | None, dtype: str, times: bool) -> int:
    """Prints the table, and times where they are wanted; the exit status. UsageError for a name that makes no model,
    and for sizes that are none."""
    kind = getattr(torch, dtype)
    model = made(name).eval().to(kind)
    examples = tuple(sizes(text).to(kind) for text in inputs or ())
    with torch.no_grad():
        print(explain(model, examples or None))
        if times and examples:
            for what, timing in timed(accelerate(model), examples, {}).items():
                print(f"{what}: {timing}")
    return 0


def made(name: str) -> nn.Module:
    """The model that a function gives, or a class, or a module that is there already; "package.module:name". The
    working folder is looked at first."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise UsageError(f"{name!r} is no MODULE:FACTORY, as package.module:function")
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        model = found if isinstance(found, nn.Module) else found()
    except Exception as error:  # of whatever the user's module does
        raise UsageError(f"{name} gives no model: {one_line(error)}") from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name} gives a {type(model).__name__}, not an nn.Module")
    return model


def sizes(text: str) -> Tensor:
    """Noise of these sizes, "1,3,64,64". UsageError for others."""
    parts = text.split(",")
    if not all(p.strip().isdigit() for p in parts):
        raise UsageError(f"--input {text}: sizes are whole numbers with commas between, as 1,3,64,64")
    return torch.randn([int(p) for p in parts], generator=torch.Generator().manual_seed(0))
