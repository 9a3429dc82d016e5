"""Checkpoints of a training: one file, written whole or not at all, read without running code from it."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..fetch import write_atomically
from ..generators import DCGANGenerator, create_model

__all__ = ["FORMAT", "CheckpointError", "load_checkpoint", "load_generator", "save_checkpoint"]

FORMAT = "cnnfast gan 1"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of something else; the message says what to do."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings and containers of them). OSError where that fails: the file at
    ``path``, if any, is then as it was."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, tensors on the CPU. CheckpointError for anything else."""
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: there is no checkpoint to go on from")
    if not zipfile.is_zipfile(path):  # torch.load would take it for a pickle, and fail in any way
        raise CheckpointError(f"{path} cannot be read as a checkpoint: it is damaged or something else")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of `python -m cnnfast train gan` of this version ({FORMAT})")
    return state


def load_generator(path: Path) -> DCGANGenerator:
    """The trained generator of a checkpoint (the moving average of its weights), in eval mode on the CPU."""
    state = load_checkpoint(path)
    model = create_model("dcgan", **state["config"])
    model.load_state_dict(state["average"])
    assert isinstance(model, DCGANGenerator)
    return model.eval()
