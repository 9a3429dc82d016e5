"""A trained text-to-image network and the words that it knows, as one file."""

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
from ..generators import TextImageGenerator, create_model
from ..messages import one_line
from ..nn.layers import Sequential
from .checkpoint import difference
from .words import Vocabulary

__all__ = ["NAME", "load_weights", "save_weights"]

NAME = "text_image"


def save_weights(path: Path, model: TextImageGenerator, vocabulary: Vocabulary, about: dict[str, Any]) -> None:
    """Write ``model`` in half precision with its configuration and words; ``about`` says how it was made (JSON)."""
    arrays = {
        "config": np.array(json.dumps(asdict(model.config))),
        "words": np.array(vocabulary.words),
        "german": np.array(sorted(vocabulary.german), dtype=str),
        "about": np.array(json.dumps(about)),
    }
    trained.save(path, model.state_dict(), arrays)


def load_weights(
    weights_file: str | os.PathLike[str] | None = None, *, sequential: type[nn.Sequential] = Sequential
) -> tuple[TextImageGenerator, Vocabulary, dict[str, Any]]:
    """(network in eval mode in float32, its words, how it was made): the shipped one, or that of ``train text``.

    WeightsError where it cannot be read or is something else.
    """
    arrays = trained.load(NAME, weights_file)
    where = trained.SHIPPED[NAME].file if weights_file is None else weights_file
    try:
        config = json.loads(str(arrays["config"]))
        about = json.loads(str(arrays["about"]))
        vocabulary = Vocabulary(tuple(arrays["words"].tolist()), frozenset(arrays["german"].tolist()))
        state = trained.state_dict(arrays)
        with torch.device("meta"):  # sizes first, memory when they are right
            problem = difference(create_model(NAME, **config), state)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise WeightsError(f"{where} holds no weights of {NAME!r}: {one_line(error)}") from error
    if problem is not None or len(vocabulary.words) != config["words"]:
        raise WeightsError(f"{where} holds no weights of {NAME!r} of its sizes: {problem or 'words are missing'}")
    model = create_model(NAME, sequential=sequential, **config)
    assert isinstance(model, TextImageGenerator)
    model.load_state_dict(state)
    return model.eval(), vocabulary, about
