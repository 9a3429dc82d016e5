"""``python -m cnnfast train text``: what `job.run` needs to train a `text_image.Trainer` on emoji.

Beside the checkpoint the output folder gets ``samples/epoch_0001.png`` ... (rows of real pictures that the training
never sees, and under each what the network draws from their names), ``loss.png``, ``real.png`` and at the end
``text.npz``, the weights in half precision, which ``draw --weights-file`` takes. Needs Pillow, matplotlib and tqdm.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from .. import __version__
from ..files import make_output_dir
from . import evaluation, job
from .drawing import Drawer
from .emoji import load_emoji
from .job import CHECKPOINT, SAMPLES, Job
from .machine import REQUIRES, choose_device
from .plots import draw_curves, save_grid
from .text_image import CHANGEABLE, CURVES, Options, Trainer
from .text_weights import save_weights

__all__ = ["WEIGHTS", "run"]

WEIGHTS = "text.npz"
_COLUMNS, _ROWS = 16, 4
_UNITS = ("loss", "PSNR, dB")  # of `CURVES`


def run(*, resume: bool = False, **given: Any) -> int:
    """Train with `text_image.Options` ``given``, as `job.run` says."""
    kind = Job("text", REQUIRES, Options, CHANGEABLE, ("layers",), CURVES, _start, _about, _begin, _paint, _end)
    return job.run(kind, resume=resume, **given)


def _start(options: Options) -> Trainer:
    device = choose_device(options.device)
    make_output_dir(options.output)
    return Trainer(options, load_emoji(options.image_size, options.font), device)


def _about(trainer: Trainer) -> str:
    options, data = trainer.options, trainer.data
    million = sum(p.numel() for p in trainer.generator.parameters()) / 1e6
    held_out = ", ".join(f"{len(indices)} {name}" for name, indices in data.held_out.items())
    return (
        f"{len(data.train)} emoji and {len(trainer.texts.rows)} texts of {len(trainer.vocabulary.words)} words; kept "
        f"back: {held_out}\n"
        f"{options.image_size}x{options.image_size}, {million:.2f} million parameters, "
        f"{'bfloat16' if trainer.low_precision else 'float32'}; batches of {options.batch_size}, "
        f"{trainer.steps_per_epoch} steps an epoch, from step {trainer.steps} to epoch {options.epochs}; "
        f"writes to {options.output}"
    )


def _shown(trainer: Trainer) -> list[int]:
    """Pictures of every split that the training does not see."""
    splits = [indices[:: max(1, len(indices) // _COLUMNS)][:_COLUMNS] for indices in trainer.data.held_out.values()]
    return [i for indices in splits for i in indices]


def _begin(trainer: Trainer) -> None:
    train = list(trainer.data.train)
    some = train[:: max(1, len(train) // (_COLUMNS * _ROWS))][: _COLUMNS * _ROWS]
    save_grid(trainer.options.output / "real.png", trainer.data.images[some].float() / 127.5 - 1, _COLUMNS)


def _paint(trainer: Trainer) -> None:
    """Drawings under the real pictures, and the curves, at the end of an epoch."""
    output, data = trainer.options.output, trainer.data
    epoch = trainer.steps // trainer.steps_per_epoch
    shown = _shown(trainer)
    made = trainer.sample([data.emoji[i].english for i in shown])
    real = data.images[shown].float() / 127.5 - 1
    pairs = [part for a, b in zip(real.split(_COLUMNS), made.split(_COLUMNS), strict=True) for part in (a, b)]
    save_grid(output / SAMPLES / f"epoch_{epoch:04d}.png", torch.cat(pairs), _COLUMNS)
    history = trainer.history().numpy()
    panels = [(unit, [(name, history[:, i])]) for i, (name, unit) in enumerate(zip(CURVES, _UNITS, strict=True))]
    title = f"text to image: width {trainer.options.width}, batches of {trainer.options.batch_size}"
    draw_curves(output / "loss.png", np.arange(1, len(history) + 1) / trainer.steps_per_epoch, panels, title)


def _end(trainer: Trainer) -> str:
    """The weights as they will be used, and what they are worth."""
    output = trainer.options.output
    given = {k: v for k, v in asdict(trainer.options).items() if k not in CHANGEABLE}
    about = {"options": given, "steps": trainer.steps, "cnnfast": __version__, "torch": torch.__version__}
    save_weights(output / WEIGHTS, trainer.generator, trainer.vocabulary, about)
    rows = evaluation.evaluate(trainer.data, trainer.vocabulary, Drawer(output / WEIGHTS).images)
    table = tabulate([row.cells() for row in rows], evaluation.HEADERS, disable_numparse=True)
    return f"wrote {output / CHECKPOINT}, {WEIGHTS}, samples/ and loss.png\n{table}"
