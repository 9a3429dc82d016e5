"""A training as a job: its options and checkpoint, resumption, interruption, divergence, and what is said.

A `Job` says what is trained; `run` is the same for all of them. The output folder gets ``checkpoint.pt`` after every
epoch, and what the job itself writes there.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..files import make_output_dir
from ..messages import CnnfastError, UsageError, one_line
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .interrupt import Interrupt
from .machine import device_text, require
from .share import Share

__all__ = ["CHECKPOINT", "SAMPLES", "Diverged", "Job", "Trainer", "TrainingError", "run"]

CHECKPOINT, SAMPLES = "checkpoint.pt", "samples"
# Values stay on a GPU for this many steps: reading them waits for it.
_CHECK_EVERY = {"cpu": 1, "cuda": 10}


class Diverged(CnnfastError):
    """A loss or weight that is not finite."""


class TrainingError(CnnfastError):
    """A training that began and ended early; the message says why, and what is left of it."""


class Trainer(Protocol):
    """What is trained. ``options`` has ``epochs`` and ``output``; ``steps`` are done; ``curves`` holds the values that
    each of them reported, on the device."""

    options: Any
    device: torch.device
    steps: int
    curves: list[Tensor]

    @property
    def images_per_step(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def step(self) -> Tensor: ...

    def history(self) -> Tensor: ...

    def finite(self) -> bool: ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """ValueError where the checkpoint is of other data, CheckpointError where a part of it does not fit."""


@dataclass(frozen=True)
class Job:
    """One kind of training: ``python -m cnnfast train NAME``.

    ``options``: a frozen dataclass of what can be asked for; ValueError for what cannot. ``changeable``: fields that a
    resumed run may change; ``kept``: those of them that the checkpoint remembers. ``curves``: names of a step's values,
    the first two of which the progress bar shows. ``start`` makes the trainer, after whatever can be refused.
    ``about``: lines on it; ``begin``, ``epoch_ends``: write pictures; ``end``: writes what is left to write, and says
    what the folder holds.
    """

    name: str
    requires: Mapping[str, str]
    options: Callable[..., Any]
    changeable: tuple[str, ...]
    kept: tuple[str, ...]
    curves: tuple[str, ...]
    start: Callable[[Any], Trainer]
    about: Callable[[Any], str]
    begin: Callable[[Any], None]
    epoch_ends: Callable[[Any], None]
    end: Callable[[Any], str]


def run(job: Job, *, resume: bool = False, share: Share = Share(), **given: Any) -> int:  # noqa: B008
    """Train with the job's options ``given``; with ``resume`` go on from the checkpoint in the output folder.

    Of several processes (``share``) the first prints, writes and paints, and all stop after the same step.

    Prints to standard output. The exit status: 0 when trained, 128 + the signal's number after an interruption.
    UsageError for options that cannot be, CnnfastError or OSError where it cannot start; `TrainingError` where it
    diverged, ran out of memory or could not write (the last good checkpoint stays).
    """
    require("train", job.requires)
    options, state = _options(job, resume, given)
    path = options.output / CHECKPOINT
    trainer = job.start(options)
    if state is not None:
        _restore(trainer, state, path)
        left = options.epochs * trainer.steps_per_epoch - trainer.steps
        if left < 0:
            raise UsageError(f"--epochs {options.epochs}: {path} is past that, {_where(trainer)}")
        if left == 0:
            more = f"; more with --epochs {options.epochs + 1} or above" if "epochs" in job.changeable else ""
            _say(share, f"nothing to do: {path} is {_where(trainer)}{more}")
            return 0
    make_output_dir(options.output / SAMPLES)
    _say(share, f"cnnfast {__version__}, torch {torch.__version__}, {device_text(trainer.device)}")
    _say(share, job.about(trainer))
    try:
        with Interrupt("stopping after this step (once more: at once)") as interrupt:
            return _train(job, trainer, interrupt, share)
    except BrokenPipeError:  # nobody listens
        raise
    except KeyboardInterrupt:
        print(f"\nstopped at once. {_remains(job, options.output)}", file=sys.stderr)
        return 130
    except Exception as error:
        raise TrainingError(f"{one_line(error)}. {_remains(job, options.output)}") from error


def _options(job: Job, resume: bool, given: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """The options of this run and the checkpoint it goes on from."""
    try:
        options = job.options(**given)
    except ValueError as error:
        raise UsageError(str(error)) from error
    path = options.output / CHECKPOINT
    if not resume:
        if os.path.lexists(path):
            raise UsageError(f"{path} exists: go on from it with --resume, or choose another --output")
        return options, None
    if not os.path.isfile(path):
        raise UsageError(f"{path} is not a file: there is no checkpoint to go on from; train without --resume first")
    state = load_checkpoint(path, job.name)
    try:
        before = job.options(**state["options"], **{name: state[name] for name in job.kept})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: its options: {one_line(error)}") from error
    for name in given:
        old, new = getattr(before, name), getattr(options, name)
        if name not in job.changeable and old != new:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} {new}: {path} was trained with {old}; drop {flag} or choose another --output")
    return replace(before, **{name: given[name] for name in job.changeable if name in given}), state


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


def _go_on(job: Job, output: Path) -> str:
    where = "" if output == job.options().output else f" --output {output}"
    return f"Go on with: python -m cnnfast train {job.name} --resume{where}"


def _remains(job: Job, output: Path) -> str:
    path = output / CHECKPOINT
    if not path.exists():
        return "There is no checkpoint yet."
    try:
        return f"{path} is as it was after step {load_checkpoint(path, job.name)['steps']}. {_go_on(job, output)}"
    except CheckpointError as error:
        return str(error)


def _say(share: Share, text: str) -> None:
    if share.first:
        print(text)


def _train(job: Job, trainer: Trainer, interrupt: Interrupt, share: Share) -> int:
    from tqdm import tqdm

    options = trainer.options
    per_epoch = trainer.steps_per_epoch
    total, checked = options.epochs * per_epoch, trainer.steps
    started, epoch_start = time.perf_counter(), trainer.steps
    if share.first:
        job.begin(trainer)
    with tqdm(
        total=total * trainer.images_per_step,
        initial=trainer.steps * trainer.images_per_step,
        unit=" images",
        unit_scale=True,
        disable=None if share.first else True,
    ) as bar:
        while trainer.steps < total:
            if share.any(interrupt.signal is not None):
                _save(job, trainer, checked, share)
                bar.close()
                path = options.output / CHECKPOINT
                go_on = _go_on(job, options.output)
                _say(share, f"Stopped after step {trainer.steps} of {total}; wrote {path}. {go_on}")
                return 128 + (interrupt.signal or signal.SIGTERM)
            trainer.step()
            bar.update(trainer.images_per_step)
            ends = trainer.steps % per_epoch == 0
            if ends or trainer.steps - checked >= _CHECK_EVERY.get(trainer.device.type, 1):
                values = _check(job, trainer, checked)
                checked = trainer.steps
                told = ", ".join(f"{name} {value:.3f}" for name, value in zip(job.curves[:2], values, strict=False))
                bar.set_description(f"epoch {-(-trainer.steps // per_epoch)}/{options.epochs}", refresh=False)
                bar.set_postfix_str(told, refresh=False)
            if ends:
                line = _epoch_line(job, trainer, trainer.steps - epoch_start, time.perf_counter() - started)
                _save(job, trainer, checked, share)  # first: pictures can be made again
                if share.first:
                    job.epoch_ends(trainer)
                    tqdm.write(line)
                started, epoch_start = time.perf_counter(), trainer.steps
    if share.first:
        print(f"trained {options.epochs} epochs; {job.end(trainer)}")
    return 0


def _epoch_line(job: Job, trainer: Trainer, steps: int, seconds: float) -> str:
    mean = trainer.history()[-steps:].mean(0).tolist()
    values = ", ".join(f"{name} {value:.3f}" for name, value in zip(job.curves, mean, strict=True))
    epoch = trainer.steps // trainer.steps_per_epoch
    rate = steps * trainer.images_per_step / seconds
    return f"epoch {epoch}/{trainer.options.epochs}: {values}; {rate:.1f} images/s, {seconds:.1f} s"


def _check(job: Job, trainer: Trainer, checked: int) -> list[float]:
    """The last step's values. `Diverged` where one of those after step ``checked`` is not finite."""
    values = torch.stack(trainer.curves[checked:]).tolist()
    for step, row in enumerate(values, start=checked + 1):
        for name, value in zip(job.curves, row, strict=True):
            if not np.isfinite(value):
                raise Diverged(f"step {step}: {name} is {value}: the training diverged; a smaller --lr may help")
    return values[-1]


def _save(job: Job, trainer: Trainer, checked: int, share: Share) -> None:
    if trainer.steps > checked:
        _check(job, trainer, checked)
    if not trainer.finite():  # the losses are those before the last update
        raise Diverged(f"step {trainer.steps}: a weight is not finite: the training diverged; a smaller --lr may help")
    if share.first:
        save_checkpoint(trainer.options.output / CHECKPOINT, trainer.state(), job.name)
