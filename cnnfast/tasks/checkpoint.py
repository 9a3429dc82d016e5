"""Checkpoints of a training: one file, written whole or not at all, read without running code from it."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically
from ..generators import DCGANGenerator, create_model
from ..generators.weights import load_tensors
from ..messages import CnnfastError, one_line

__all__ = [
    "CheckpointError",
    "check_training",
    "difference",
    "load_checkpoint",
    "load_generator",
    "save_checkpoint",
]


def _format(job: str) -> str:
    return f"cnnfast {job} 1"


class CheckpointError(CnnfastError):
    """A checkpoint that is missing, damaged or of something else; the message says what to do."""


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any], job: str = "gan") -> None:
    """Write ``state`` (tensors, numbers, strings and containers of them) of ``train JOB``. OSError where that fails:
    the file at ``path``, if any, is then as it was."""
    buffer = io.BytesIO()
    torch.save({"format": _format(job), **state}, buffer)
    write_atomically(Path(path), buffer.getvalue())


def load_checkpoint(path: str | os.PathLike[str], job: str = "gan") -> dict[str, Any]:
    """What `save_checkpoint` wrote, tensors on the CPU. CheckpointError for anything else."""
    path = Path(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is not a file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {one_line(error)}") from error
    if not zipfile.is_zipfile(io.BytesIO(data)):  # torch.load would take it for a pickle, and fail in any way
        raise CheckpointError(f"{path} cannot be read as a checkpoint: it is damaged or something else")
    try:
        state = load_tensors(data)
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(state, dict) or state.get("format") != _format(job):
        raise CheckpointError(
            f"{path} is no checkpoint of `python -m cnnfast train {job}` of this version ({_format(job)})"
        )
    return state


def load_generator(path: str | os.PathLike[str]) -> DCGANGenerator:
    """The trained generator of a checkpoint (the moving average of its weights), in eval mode on the CPU.
    CheckpointError where there is none in it."""
    state = load_checkpoint(path)
    try:
        config = dict(state["config"])
        with torch.device("meta"):  # sizes first, memory when they are right
            problem = difference(create_model("dcgan", **config), state["average"])
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} holds no generator: {one_line(error)}") from error
    if problem is not None:
        raise CheckpointError(f"{path} holds no generator of its sizes: {problem}")
    model = create_model("dcgan", **config)
    model.load_state_dict(state["average"])
    assert isinstance(model, DCGANGenerator)
    return model.eval()


def check_training(
    state: Mapping[str, Any],
    modules: Mapping[str, torch.nn.Module],
    optimisers: Mapping[str, tuple[torch.optim.Optimizer, Any]],
    curves: int,
) -> None:
    """CheckpointError where a training of these ``modules``, each under its name in ``state``, cannot go on from it.

    ``optimisers``: the name of the module that each trains -> it and what was saved of it. ``state`` has, beside them,
    the number of "steps" and their "curves" (steps, ``curves``).
    """
    steps, values = state.get("steps"), state.get("curves")
    if type(steps) is not int or steps < 0:
        raise CheckpointError(f"steps is {steps!r}")
    if not isinstance(values, torch.Tensor) or values.shape != (steps, curves):
        raise CheckpointError(f"there are no curves of {steps} steps")
    for name, module in modules.items():
        found = difference(module, state.get(name))
        if found is not None:
            raise CheckpointError(f"{name}: {found}")
    for name, (optimiser, saved) in optimisers.items():
        if not _optimiser_fits(optimiser, saved, begun=steps > 0):
            raise CheckpointError(f"the optimiser is not of the {name}'s parameters")


def difference(module: torch.nn.Module, state: object) -> str | None:
    """What of ``state`` does not fit ``module`` (keys, shapes, dtypes), or None where ``load_state_dict`` takes it."""
    if not isinstance(state, Mapping):
        return f"expected a state_dict, found {type(state).__name__}"
    own = module.state_dict()
    for name in state:
        if name not in own:
            return f"{name} is unknown"
    for name, tensor in own.items():
        if name not in state:
            return f"{name} is missing"
        found = state[name]
        if not isinstance(found, torch.Tensor):
            return f"{name} is no tensor"
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            expected = f"{tuple(tensor.shape)} of {tensor.dtype}"
            return f"{name} has the shape {tuple(found.shape)} of {found.dtype}, expected {expected}"
    return None


def _optimiser_fits(optimiser: torch.optim.Optimizer, state: Any, begun: bool) -> bool:
    """Whether ``load_state_dict`` takes ``state`` and an Adam goes on from it; ``begun``: it has made steps."""
    groups = optimiser.param_groups
    try:
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in state["param_groups"]]:
            return False
        shapes = [p.shape for g in groups for p in g["params"]]
        return not begun or all(
            state["state"][i][name].shape == shape
            for i, shape in enumerate(shapes)
            for name in ("exp_avg", "exp_avg_sq")
        )
    except (KeyError, TypeError, AttributeError):
        return False
