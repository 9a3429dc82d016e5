"""Checkpoints of other people, read without running code: what `torch.save` wrote, and safetensors.

The latter is a JSON text ahead of the tensors' bytes (https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..messages import one_line
from .weights import WeightsError, load_tensors

__all__ = ["read_checkpoint"]

# Under what published checkpoints hold the generator's state_dict, where they hold more; averaged weights first.
_KEYS = ("params_ema", "params", "g_ema", "generator", "state_dict", "model_state_dict")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The ``state_dict`` (CPU tensors) that a file holds, alone or under one of the usual keys.

    ``.safetensors`` by its name, anything else as `torch.save`'s. WeightsError where there is none.
    """
    try:
        path = Path(path).expanduser()
        data = path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
        raise WeightsError(f"{path} cannot be read: {one_line(error)}") from error
    try:
        return _tensors(data) if path.suffix == ".safetensors" else _state(load_tensors(data))
    except ValueError as error:
        raise WeightsError(f"{path} is no checkpoint that can be read: {error}") from error


def _state(found: Any) -> dict[str, Tensor]:
    """Which of what a checkpoint holds is the ``state_dict``."""
    if isinstance(found, Mapping):
        for inner in (*(found[key] for key in _KEYS if key in found), found):
            if isinstance(inner, Mapping) and inner and all(isinstance(t, Tensor) for t in inner.values()):
                return dict(inner)
        holds = ", ".join(map(str, list(found)[:8])) or "nothing"
    else:
        holds = f"a {type(found).__name__}"
    raise ValueError(f"expected tensors by their names, alone or under one of {', '.join(_KEYS)}; it holds {holds}")


def _tensors(data: bytes) -> dict[str, Tensor]:
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        found = {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
            if dtype is None:
                raise ValueError(f"{name} is of {entry['dtype']}: expected one of {', '.join(_DTYPES)}")
            numbers = math.prod(shape)
            size = numbers * dtype.itemsize
            if min(begin, *shape, 0) < 0 or end - begin != size or start + end > len(data):
                raise ValueError(f"{name} of shape {shape} is {size} bytes, at {begin} to {end} of {len(data) - start}")
            # A copy, which is aligned and can be written to.
            held = bytearray(data[start + begin : start + end])
            found[name] = (
                torch.frombuffer(held, dtype=dtype).reshape(shape) if numbers else torch.empty(shape, dtype=dtype)
            )
        return found
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"it is damaged or something else: {one_line(error)}") from error
