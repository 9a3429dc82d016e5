"""``python -m cnnfast train gan``: what `job.run` needs to train a `gan.Trainer`, and ``sample``.

Beside the checkpoint the output folder gets ``samples/epoch_0001.png`` ..., ``loss.png`` and ``real.png``. Needs the
extra ``demo`` (matplotlib, pillow, tqdm), imported where it is used.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import make_output_dir
from ..generators import DCGANConfig
from ..messages import UsageError
from . import job, ranks
from .checkpoint import load_generator
from .data import load_images
from .gan import CHANGEABLE, CURVES, Options, Trainer, least_memory
from .job import CHECKPOINT, SAMPLES, Job
from .machine import REQUIRES, choose_device, require, require_memory
from .plots import draw_curves, save_grid
from .share import Share, together

__all__ = ["run", "sample"]

_SAMPLES = 64


def run(*, resume: bool = False, **given: Any) -> int:
    """Train with `gan.Options` ``given``, as `job.run` says; under torchrun by all of its processes together."""
    with together(ranks.here()) as share:
        # Made here: its parts are looked up when they are needed.
        start, kept = partial(_start, share), ("epochs", "layers")
        kind = Job("gan", REQUIRES, Options, CHANGEABLE, kept, CURVES, start, _about, _begin, _paint, _end)
        return job.run(kind, resume=resume, share=share, **given)


def sample(checkpoint: Path, output: Path, count: int, seed: int) -> int:
    """Write a PNG grid of ``count`` images by a checkpoint's generator; the exit status. UsageError, CheckpointError
    or OSError where that cannot be."""
    require("sample", {"pillow": REQUIRES["pillow"]})
    if not os.path.isfile(checkpoint):
        raise UsageError(f"{checkpoint} is not a file: expected a checkpoint.pt of `python -m cnnfast train gan`")
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder: expected the name of a PNG")
    model = load_generator(checkpoint)
    config = model.config
    require_memory(count * 4 * (config.nz + config.nc * config.image_size**2), f"--count {count}")
    make_output_dir(output.parent)
    z = torch.randn(count, config.nz, 1, 1, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        save_grid(output, torch.cat([model(part) for part in z.split(_SAMPLES)]))
    print(f"wrote {output}")
    return 0


def _start(share: Share, options: Options) -> Trainer:
    device = choose_device(options.device)
    if options.batch_size < share.size:
        raise UsageError(f"--batch-size {options.batch_size}: {share.size} processes want an image each, at least")
    if share.size > 1 and options.layers == "torch" and device.type == "cpu":
        raise UsageError("--layers torch: PyTorch's SyncBatchNorm is for GPUs; use --layers cnnfast, or one process")
    config = DCGANConfig(options.nz, options.width, 1, options.image_size)
    what = f"--width {options.width}, --image-size {options.image_size}, --batch-size {options.batch_size}"
    require_memory(least_memory(config, options.batch_size if device.type == "cpu" else 0), what)
    make_output_dir(options.output)
    return Trainer(options, load_images(options.data, options.image_size), device, share)


def _about(trainer: Trainer) -> str:
    options, images = trainer.options, trainer.images
    count = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (trainer.generator, trainer.discriminator)]
    size = options.image_size
    return (
        f"{len(images)} images of {options.data}, {size}x{size}; DCGAN of width {options.width}: "
        f"{count[0]:.2f} and {count[1]:.2f} million parameters\n"
        f"{options.loss}, batches of {options.batch_size}{_by(trainer.share)}, "
        f"{trainer.steps_per_epoch} steps an epoch, from step {trainer.steps} to epoch {options.epochs}; "
        f"writes to {options.output}"
    )


def _by(share: Share) -> str:
    return f" by {share.size} processes" if share.size > 1 else ""


def _begin(trainer: Trainer) -> None:
    save_grid(trainer.options.output / "real.png", trainer.images[:_SAMPLES].float() / 127.5 - 1)


def _paint(trainer: Trainer) -> None:
    """Samples and the loss curve, at the end of an epoch."""
    output = trainer.options.output
    epoch = trainer.steps // trainer.steps_per_epoch
    save_grid(output / SAMPLES / f"epoch_{epoch:04d}.png", trainer.sample(trainer.fixed_noise(_SAMPLES)))
    history = trainer.history().numpy()
    curve = dict(zip(CURVES, history.T, strict=True))
    unit = trainer.loss.unit
    panels = [(f"loss ({unit})", [("critic", curve["critic"]), ("generator", curve["generator"])])]
    if curve["penalty"].any():
        panels.append(("weighted gradient penalty", [("penalty", curve["penalty"])]))
    score = "mean logit" if trainer.options.loss == "bce" else "mean score"
    panels.append((score, [("real images", curve["real"]), ("generated images", curve["generated"])]))
    options = trainer.options
    title = f"DCGAN on {options.data}: {options.loss}, width {options.width}, batches of {options.batch_size}"
    epochs = np.arange(1, len(history) + 1) / trainer.steps_per_epoch
    draw_curves(output / "loss.png", epochs, panels, title)


def _end(trainer: Trainer) -> str:
    return f"wrote {trainer.options.output / CHECKPOINT}, samples/ and loss.png"
