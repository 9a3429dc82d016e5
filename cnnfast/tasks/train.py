"""``python -m cnnfast train gan``: the job around `gan.Trainer`. Pictures, checkpoints, interruption, what is said.

Writes into the output folder: ``checkpoint.pt`` after every epoch, ``samples/epoch_0001.png`` ..., ``loss.png`` and
``real.png``. Needs the extra ``demo`` (matplotlib, pillow, tqdm), imported where it is used.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import make_output_dir
from ..generators import DCGANConfig
from ..messages import CnnfastError, UsageError, one_line
from .checkpoint import CheckpointError, load_checkpoint, load_generator, save_checkpoint
from .data import load_images
from .env import __version__
from .gan import CHANGEABLE, CURVES, Options, Trainer, least_memory
from .interrupt import Interrupt
from .machine import REQUIRES, choose_device, device_text, require, require_memory
from .plots import draw_curves, save_grid

__all__ = ["CHECKPOINT", "run", "sample"]

CHECKPOINT, SAMPLES = "checkpoint.pt", "samples"
_SAMPLES = 64
# Values stay on a GPU for this many steps: reading them waits for it.
_CHECK_EVERY = {"cpu": 1, "cuda": 10}


class Diverged(CnnfastError):
    """A loss or weight that is not finite."""


class TrainingError(CnnfastError):
    """A training that began and ended early; the message says why, and what is left of it."""


def run(*, resume: bool = False, **given: Any) -> int:
    """Train with `gan.Options` ``given``; with ``resume`` go on from the checkpoint in the output folder.

    Prints to standard output. The exit status: 0 when trained, 128 + the signal's number after an interruption.
    UsageError for options that cannot be, CnnfastError or OSError where it cannot start; `TrainingError` where it
    diverged, ran out of memory or could not write (the last good checkpoint stays).
    """
    require("train", REQUIRES)
    options, state = _options(resume, given)
    path = options.output / CHECKPOINT
    device = choose_device(options.device)
    config = DCGANConfig(options.nz, options.width, 1, options.image_size)
    what = f"--width {options.width}, --image-size {options.image_size}, --batch-size {options.batch_size}"
    require_memory(least_memory(config, options.batch_size if device.type == "cpu" else 0), what)
    make_output_dir(options.output)
    trainer = Trainer(options, load_images(options.data, options.image_size), device)
    if state is not None:
        _restore(trainer, state, path)
        left = options.epochs * trainer.steps_per_epoch - trainer.steps
        if left < 0:
            raise UsageError(f"--epochs {options.epochs}: {path} is past that, {_where(trainer)}")
        if left == 0:
            print(f"nothing to do: {path} is {_where(trainer)}; more with --epochs {options.epochs + 1} or above")
            return 0
    make_output_dir(options.output / SAMPLES)
    print(f"cnnfast {__version__}, torch {torch.__version__}, {device_text(device)}")
    print(_about(trainer))
    try:
        with Interrupt("stopping after this step (once more: at once)") as interrupt:
            return _train(trainer, interrupt)
    except BrokenPipeError:  # nobody listens
        raise
    except KeyboardInterrupt:
        print(f"\nstopped at once. {_remains(options.output)}", file=sys.stderr)
        return 130
    except Exception as error:
        raise TrainingError(f"{one_line(error)}. {_remains(options.output)}") from error


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


def _options(resume: bool, given: dict[str, Any]) -> tuple[Options, dict[str, Any] | None]:
    """The options of this run and the checkpoint it goes on from."""
    try:
        options = Options(**given)
    except ValueError as error:
        raise UsageError(str(error)) from error
    path = options.output / CHECKPOINT
    if not resume:
        if os.path.lexists(path):
            raise UsageError(f"{path} exists: go on from it with --resume, or choose another --output")
        return options, None
    if not os.path.isfile(path):
        raise UsageError(f"{path} is not a file: there is no checkpoint to go on from; train without --resume first")
    state = load_checkpoint(path)
    try:
        before = Options(**state["options"], epochs=state["epochs"], layers=state["layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: its options: {one_line(error)}") from error
    for name in given:
        old, new = getattr(before, name), getattr(options, name)
        if name not in CHANGEABLE and old != new:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} {new}: {path} was trained with {old}; drop {flag} or choose another --output")
    return replace(before, **{name: given[name] for name in CHANGEABLE if name in given}), state


def _restore(trainer: Trainer, state: dict[str, Any], path: Path) -> None:
    try:
        trainer.restore(state)
    except ValueError as error:  # other images
        raise UsageError(str(error)) from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _where(trainer: Trainer) -> str:
    epochs, steps = divmod(trainer.steps, trainer.steps_per_epoch)
    return f"at epoch {epochs}" + (f" and step {steps} of the next" if steps else "")


def _about(trainer: Trainer) -> str:
    options, images = trainer.options, trainer.images
    count = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (trainer.generator, trainer.discriminator)]
    size = options.image_size
    return (
        f"{len(images)} images of {options.data}, {size}x{size}; DCGAN of width {options.width}: "
        f"{count[0]:.2f} and {count[1]:.2f} million parameters\n"
        f"{options.loss}, batches of {options.batch_size}, {trainer.steps_per_epoch} steps an epoch, "
        f"from step {trainer.steps} to epoch {options.epochs}; writes to {options.output}"
    )


def _go_on(output: Path) -> str:
    where = "" if output == Options().output else f" --output {output}"
    return f"Go on with: python -m cnnfast train gan --resume{where}"


def _remains(output: Path) -> str:
    path = output / CHECKPOINT
    if not path.exists():
        return "There is no checkpoint yet."
    try:
        return f"{path} is as it was after step {load_checkpoint(path)['steps']}. {_go_on(output)}"
    except CheckpointError as error:
        return str(error)


def _train(trainer: Trainer, interrupt: Interrupt) -> int:
    from tqdm import tqdm

    options = trainer.options
    per_epoch = trainer.steps_per_epoch
    total, checked = options.epochs * per_epoch, trainer.steps
    started, epoch_start = time.perf_counter(), trainer.steps
    save_grid(options.output / "real.png", trainer.images[:_SAMPLES].float() / 127.5 - 1)
    with tqdm(
        total=total * trainer.images_per_step,
        initial=trainer.steps * trainer.images_per_step,
        unit=" images",
        unit_scale=True,
        disable=None,
    ) as bar:
        while trainer.steps < total:
            if interrupt.signal is not None:
                _save(trainer, checked)
                bar.close()
                path = options.output / CHECKPOINT
                print(f"Stopped after step {trainer.steps} of {total}; wrote {path}. {_go_on(options.output)}")
                return 128 + interrupt.signal
            trainer.step()
            bar.update(trainer.images_per_step)
            ends = trainer.steps % per_epoch == 0
            if ends or trainer.steps - checked >= _CHECK_EVERY.get(trainer.device.type, 1):
                values = _check(trainer, checked)
                checked = trainer.steps
                bar.set_description(f"epoch {-(-trainer.steps // per_epoch)}/{options.epochs}", refresh=False)
                bar.set_postfix_str(f"critic {values[0]:.3f}, generator {values[1]:.3f}", refresh=False)
            if ends:
                seconds = time.perf_counter() - started
                line = _epoch_line(trainer, trainer.steps - epoch_start, seconds)
                _finish_epoch(trainer, checked)
                tqdm.write(line)
                started, epoch_start = time.perf_counter(), trainer.steps
    print(f"trained {options.epochs} epochs; wrote {options.output / CHECKPOINT}, samples/ and loss.png")
    return 0


def _epoch_line(trainer: Trainer, steps: int, seconds: float) -> str:
    mean = trainer.history()[-steps:].mean(0).tolist()
    values = ", ".join(f"{name} {value:.3f}" for name, value in zip(CURVES, mean, strict=True))
    epoch = trainer.steps // trainer.steps_per_epoch
    rate = steps * trainer.images_per_step / seconds
    return f"epoch {epoch}/{trainer.options.epochs}: {values}; {rate:.1f} images/s, {seconds:.1f} s"


def _check(trainer: Trainer, checked: int) -> list[float]:
    """The last step's values. `Diverged` where one of those after step ``checked`` is not finite."""
    values = torch.stack(trainer.curves[checked:]).tolist()
    for step, row in enumerate(values, start=checked + 1):
        for name, value in zip(CURVES, row, strict=True):
            if not np.isfinite(value):
                raise Diverged(f"step {step}: {name} is {value}: the training diverged; a smaller --lr may help")
    return values[-1]


def _save(trainer: Trainer, checked: int) -> None:
    if trainer.steps > checked:
        _check(trainer, checked)
    if not trainer.finite():  # the losses are those before the last update
        raise Diverged(f"step {trainer.steps}: a weight is not finite: the training diverged; a smaller --lr may help")
    save_checkpoint(trainer.options.output / CHECKPOINT, trainer.state())


def _finish_epoch(trainer: Trainer, checked: int) -> None:
    """The checkpoint first: pictures can be made again."""
    _save(trainer, checked)
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
