"""The trained network of ``repair`` as one file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .. import trained
from ..fetch import WeightsError
from ..generators import RepairUNet, create_model
from ..messages import one_line
from ..nn.layers import Sequential
from .checkpoint import difference

__all__ = ["NAME", "load_network", "save_network"]

NAME = "repair"


def save_network(path: Path, network: RepairUNet, about: dict[str, Any]) -> None:
    """Write ``network`` in half precision with its configuration; ``about`` says how it was made (JSON)."""
    arrays = {"config": np.array(json.dumps(asdict(network.config))), "about": np.array(json.dumps(about))}
    trained.save(path, network.state_dict(), arrays)


def load_network(
    weights_file: str | os.PathLike[str] | None = None, *, sequential: type[nn.Sequential] = Sequential
) -> RepairUNet:
    """The network in eval mode, float32: the shipped one, or that of ``train repair``. WeightsError where it cannot be
    read or is something else."""
    arrays = trained.load(NAME, weights_file)
    where = trained.SHIPPED[NAME].file if weights_file is None else weights_file
    try:
        config, state = json.loads(str(arrays["config"])), trained.state_dict(arrays)
        with torch.device("meta"):  # sizes first, memory when they are right
            problem = difference(create_model(NAME, **config), state)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise WeightsError(f"{where} holds no weights of {NAME!r}: {one_line(error)}") from error
    if problem is not None:
        raise WeightsError(f"{where} holds no weights of {NAME!r} of its sizes: {problem}")
    model = create_model(NAME, sequential=sequential, **config)
    assert isinstance(model, RepairUNet)
    model.load_state_dict(state)
    return model.eval()
