"""Weights that this project trained and ships, in half precision: compressed NumPy archives beside this file.

Each is made again by the command that stands in it (`Shipped.command`); licences of what they were trained on: NOTICE.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from ..fetch import WeightsError
from ..files import write_atomically
from ..messages import one_line

__all__ = ["SHIPPED", "Shipped", "load", "save", "state_dict"]

_STATE = "state/"  # ahead of the names of a state_dict's tensors; other arrays are the task's own


@dataclass(frozen=True)
class Shipped:
    """``file`` beside this one; ``command`` makes it again."""

    file: str
    about: str
    licence: str
    command: str


SHIPPED: Mapping[str, Shipped] = MappingProxyType(
    {
        "repair": Shipped(
            "repair.npz",
            "a U-Net that refines filled holes, trained on eleven photographs",
            "MIT",
            "python -m cnnfast train repair --epochs 8",
        ),
        "text_image": Shipped(
            "text.npz",
            "emoji from their English and German names, trained on Noto Color Emoji 2.042",
            "MIT",
            "python -m cnnfast train text",
        ),
    }
)


def load(name: str, weights_file: str | os.PathLike[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a shipped file, or of a local one of its kind. WeightsError where it cannot be read."""
    try:
        if weights_file is None:
            data = resources.files(__package__).joinpath(SHIPPED[name].file).read_bytes()
        else:
            data = Path(weights_file).read_bytes()
    except OSError as error:
        raise WeightsError(f"the weights of {name!r} cannot be read: {one_line(error)}") from error
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, KeyError, AttributeError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        where = SHIPPED[name].file if weights_file is None else weights_file
        raise WeightsError(f"{where} holds no weights of {name!r}: {one_line(error)}") from error


def state_dict(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The state_dict among the arrays, in float32 (counts as they are)."""
    state = {k.removeprefix(_STATE): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(_STATE)}
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def save(path: Path, state: Mapping[str, torch.Tensor], arrays: Mapping[str, np.ndarray]) -> None:
    """Write ``state`` in half precision, and ``arrays`` as they are. Equal contents give equal bytes."""
    half = {f"{_STATE}{name}": _half(tensor) for name, tensor in state.items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in {**arrays, **half}.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
            # With a date of its own, which numpy.savez does not leave out.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue(), zipfile.ZIP_DEFLATED, 9)
    write_atomically(path, buffer.getvalue())


def _half(tensor: torch.Tensor) -> np.ndarray:
    t = tensor.detach().cpu().contiguous()
    return (t.half() if t.is_floating_point() else t).numpy()
