"""Pictures of coloured shapes with names, in place of emoji: what the tests of text to image train on."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from cnnfast.tasks.emoji import SPLITS, Emoji, EmojiSet

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 60, 220), "yellow": (240, 210, 30)}
SHAPES = ("square", "bar", "post", "corner", "frame")
GERMAN = {"red": "rotes", "green": "grünes", "blue": "blaues", "yellow": "gelbes"}


def shapes(size: int = 16) -> EmojiSet:
    """20 pictures: every colour in every shape, three of them kept back, one for each split."""
    q = size // 4
    masks = {name: np.zeros((size, size), bool) for name in SHAPES}
    masks["square"][q : 3 * q, q : 3 * q] = True
    masks["bar"][q : 2 * q] = True
    masks["post"][:, 2 * q : 3 * q] = True
    masks["corner"][: 2 * q, : 2 * q] = True
    masks["frame"][:] = True
    masks["frame"][q // 2 : -(q // 2), q // 2 : -(q // 2)] = False
    emoji, images = [], []
    for colour, shape in itertools.product(COLOURS, SHAPES):
        picture = np.full((size, size, 3), 255, np.uint8)
        picture[masks[shape]] = COLOURS[colour]
        images.append(picture.transpose(2, 0, 1))
        aliases = ("framed picture",) if (colour, shape) == ("red", "frame") else ()
        emoji.append(
            Emoji(f"{colour[0]}{shape[0]}", shape, 0, f"{colour} {shape}", aliases, f"{GERMAN[colour]} {shape}")
        )
    held = (1, 7, 13)  # red bar, green post, blue corner
    train = tuple(i for i in range(len(emoji)) if i not in held)
    splits = {name: (i,) for name, i in zip(SPLITS, held, strict=True)}
    return EmojiSet(tuple(emoji), torch.from_numpy(np.stack(images)), train, splits)
