"""``python -m cnnfast train repair``: what `job.run` needs to train a `repair_training.Trainer` on photographs.

Beside the checkpoint the output folder gets ``samples/epoch_0001.png`` ... (the same patches damaged, filled by
biharmonic functions, as the network makes them, and as they are), ``loss.png`` and at the end ``repair.npz``, the
weights in half precision, which ``repair --weights-file`` takes. Needs Pillow, matplotlib, scikit-image and tqdm.
"""

from __future__ import annotations

from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..files import make_output_dir
from . import job, repairing
from .job import CHECKPOINT, SAMPLES, Job
from .machine import REQUIRES, choose_device
from .plots import draw_curves, save_grid
from .repair_training import CHANGEABLE, CURVES, STEPS_PER_EPOCH, Options, Pictures, Trainer
from .repair_weights import save_network

__all__ = ["WEIGHTS", "run"]

WEIGHTS = "repair.npz"
_SHOWN = 16  # patches of the sample grids


def run(*, resume: bool = False, **given: Any) -> int:
    """Train with `repair_training.Options` ``given``, as `job.run` says."""
    requires = MappingProxyType({**REQUIRES, **repairing.PACKAGES})
    kind = Job("repair", requires, Options, CHANGEABLE, ("layers",), CURVES, _start, _about, _paint, _paint, _end)
    return job.run(kind, resume=resume, **given)


def _start(options: Options) -> Trainer:
    device = choose_device(options.device)
    make_output_dir(options.output)
    return Trainer(options, Pictures.load(), device)


def _about(trainer: Trainer) -> str:
    options = trainer.options
    million = sum(p.numel() for p in trainer.network.parameters()) / 1e6
    dtype = "bfloat16" if trainer.low_precision else "float32"
    return (
        f"{len(trainer.pictures.pixels) // 2} photographs, each at its size and at half of it; patches of "
        f"{options.size}x{options.size}; {million:.2f} million parameters, {dtype}\n"
        f"batches of {options.batch_size}, {STEPS_PER_EPOCH} steps an epoch, from step {trainer.steps} to epoch "
        f"{options.epochs}; writes to {options.output}"
    )


def _paint(trainer: Trainer) -> None:
    """Patches repaired, and the curves, at the end of an epoch."""
    output = trainer.options.output
    epoch = trainer.steps // STEPS_PER_EPOCH
    truth, x = trainer.batch(0)
    made = trainer.repaired(x)
    truth, x, made = (t[:_SHOWN] for t in (truth, x, made))
    damaged = torch.where(x[:, 3:] > 0, torch.ones(()), truth)
    save_grid(output / SAMPLES / f"epoch_{epoch:04d}.png", torch.cat([damaged, x[:, :3], made, truth]) * 2 - 1, len(x))
    history = trainer.history().numpy()
    panels = [("loss", [("loss", history[:, 0])]), ("dB over the biharmonic filling", [("gain", history[:, 1])])]
    title = f"repair: width {trainer.options.width}, batches of {trainer.options.batch_size}"
    draw_curves(output / "loss.png", np.arange(1, len(history) + 1) / STEPS_PER_EPOCH, panels, title)


def _end(trainer: Trainer) -> str:
    """The weights as they will be used, and what they are worth."""
    output = trainer.options.output
    given = {k: v for k, v in asdict(trainer.options).items() if k not in CHANGEABLE}
    about = {"options": given, "steps": trainer.steps, "cnnfast": __version__, "torch": torch.__version__}
    save_network(output / WEIGHTS, trainer.network, about)
    rows = repairing.evaluate(weights_file=output / WEIGHTS, device=str(trainer.device))
    return f"wrote {output / CHECKPOINT}, {WEIGHTS}, samples/ and loss.png\n{repairing.table(rows)}"
