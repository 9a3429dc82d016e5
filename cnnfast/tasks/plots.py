"""PNGs: grids of images, curves of a training. matplotlib and Pillow are imported where they are used."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..files import write_atomically

__all__ = ["draw_curves", "grid", "save_grid"]


def grid(images: torch.Tensor, columns: int = 8, gap: int = 2) -> np.ndarray:
    """(N, 1 or 3, H, W) in [-1, 1] -> one uint8 picture (rows*(H+gap)+gap, columns*(W+gap)+gap, 3) on white."""
    n, _, h, w = images.shape
    rows = -(-n // columns)
    colours = images.expand(n, 3, h, w)
    pixels = ((colours.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    picture = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, (row, column) in zip(range(n), itertools.product(range(rows), range(columns)), strict=False):
        top, left = gap + row * (h + gap), gap + column * (w + gap)
        picture[top : top + h, left : left + w] = pixels[i]
    return picture


def save_grid(path: Path, images: torch.Tensor, columns: int = 8) -> None:
    """`grid` of ``images`` as a PNG, under a temporary name first. OSError where it cannot be written."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(grid(images, columns)).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` values (fewer at the start)."""
    sums = np.cumsum(np.insert(values.astype(np.float64), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw_curves(
    path: Path, epochs: np.ndarray, panels: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]], title: str
) -> None:
    """Curves over ``epochs`` (steps,) as a PNG: each step faintly, a running mean boldly.

    A panel is the label of its axis (with the unit) and (name, values (steps,)) of its curves.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.8 * len(panels)), layout="constrained")
    window = max(1, len(epochs) // 30)
    colours = ("#e4572e", "#2e6fe4", "#5b7083")
    for axes, (label, curves) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for colour, (name, values) in zip(colours, curves, strict=False):
            axes.plot(epochs, values, color=colour, alpha=0.25, linewidth=0.6)
            axes.plot(epochs, _smooth(values, window), color=colour, linewidth=1.6, label=name)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}\nbold: mean of {window} step{'s' if window > 1 else ''}", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
