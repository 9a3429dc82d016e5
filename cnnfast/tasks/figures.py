"""``python -m cnnfast evaluate``: how well each task does on fixed held-out data, and how fast.

The figures are of the tasks' own ``evaluate``; here they are put beside what is aimed at. Times are of each task's
network against the same network in plain PyTorch.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tabulate import tabulate

from ..files import make_output_dir, write_atomically
from ..messages import CnnfastError, UsageError, one_line
from . import composing, drawing, enhancement, env, repairing
from .arguments import positive
from .emoji import SPLITS
from .machine import choose_device, device_text, require
from .speed import HEADERS, WORKLOADS, Speed, said, speed

__all__ = ["ENHANCE_LEAST", "TASKS", "Figure", "Missing", "add_command", "figures_of", "run"]

TASKS = ("generate", "draw", "enhance", "repair", "compose")
JSON, MARKDOWN = "evaluation.json", "evaluation.md"

_DECIMALS = MappingProxyType({"dB": ".2f", "%": ".1f", "cases": ".0f", "": ".3g"})


# --- how well ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """``ours``, and what the plain way gives where there is one, in ``unit`` (dB, %, cases or ""). ``least``: what is
    aimed at, of ``ours``, or with ``by_gain`` of its difference to ``plain``; None: nothing is."""

    task: str
    what: str
    plain: float | None
    ours: float
    unit: str
    least: float | None = None
    by_gain: bool = False

    @property
    def held(self) -> bool | None:
        """Whether the target is held, None without one."""
        if self.least is None:
            return None
        return self.ours - (self.plain or 0.0 if self.by_gain else 0.0) >= self.least

    @property
    def target(self) -> str:
        """In words, "" for none."""
        if self.least is None:
            return ""
        return f"gain >= {self.least:g} {self.unit}" if self.by_gain else f">= {self.least:g} {self.unit}"

    def cells(self) -> tuple[str, ...]:
        """As text, under `_HEADERS`."""
        form = _DECIMALS[self.unit]
        plain = "-" if self.plain is None else f"{self.plain:{form}}"
        return (self.task, self.what, plain, f"{self.ours:{form}}", self.unit, self.target, said(self.held))


_HEADERS = ("task", "what", "plain", "ours", "", "target", "held")
# What the plain way is.
_PLAIN = MappingProxyType(
    {
        "draw": "the picture whose description, of the training's, shares the most words",
        "enhance": "Pillow's bicubic filter; of a JPEG, the JPEG itself",
        "repair": "scikit-image's biharmonic filling",
        "compose": "the network asked once of 256x256 pixels; each tile styled by itself",
    }
)
ENHANCE_LEAST: Mapping[str, float] = MappingProxyType({"x2": 1.0, "x4": 0.9, "JPEG 30": 0.5})  # dB, on every photograph
_ALIGNED = ("left", "left", "right", "right", "left", "left", "left")


def _draw(device: str | None, font: Path | None) -> Iterator[Figure]:
    for row in drawing.evaluate(font=font, device=device):
        least = 95.0 if row.texts == f"{SPLITS[0]}, unseen" else None
        plain = None if row.plain_top1 is None else 100 * row.plain_top1
        yield Figure("draw", f"{row.texts}: the right one of all is the nearest", plain, 100 * row.top1, "%", least)
        yield Figure("draw", f"{row.texts}: among the nearest five", None, 100 * row.top5, "%")
        yield Figure("draw", f"{row.texts}: PSNR", row.plain_psnr, row.psnr, "dB")


def _enhance(device: str | None, font: Path | None) -> Iterator[Figure]:
    for what, photograph, plain, ours in enhancement.evaluate(device=device):
        yield Figure("enhance", f"{what}, {photograph}: PSNR", plain, ours, "dB", ENHANCE_LEAST[what], by_gain=True)


def _repair(device: str | None, font: Path | None) -> Iterator[Figure]:
    rows = repairing.evaluate(device=device)
    for row in rows:
        yield Figure("repair", f"{row.damage}, {row.photograph}: PSNR inside", row.biharmonic, row.repaired, "dB")
    plain, ours = (statistics.fmean(values) for values in zip(*((r.biharmonic, r.repaired) for r in rows), strict=True))
    better = 100 * sum(row.gain > 0 for row in rows) / len(rows)
    yield Figure("repair", "number of cases", None, len(rows), "cases", 20)
    yield Figure("repair", "mean of all cases: PSNR inside", plain, ours, "dB", 0.5, by_gain=True)
    yield Figure("repair", "better than the plain way", None, better, "%", 80)


def _compose(device: str | None, font: Path | None) -> Iterator[Figure]:
    for what, name, plain, ours in composing.evaluate(device=device):
        better = "" if what == "overlap" else " (less is better)"
        yield Figure("compose", f"{what}, {name}{better}", plain, ours, "")


_FIGURES: Mapping[str, Callable[[str | None, Path | None], Iterator[Figure]]] = MappingProxyType(
    {"draw": _draw, "enhance": _enhance, "repair": _repair, "compose": _compose}
)


def figures_of(task: str, device: str | None = None, font: Path | None = None) -> list[Figure]:
    """The figures of one of `TASKS`; none for "generate", whose networks are others'. What ``evaluate`` of the task
    raises is raised."""
    return list(_FIGURES[task](device, font)) if task in _FIGURES else []


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Missing:
    """What could not be computed, and why."""

    task: str
    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.task}, {self.what}: could not be had: {self.why}"


def run(
    tasks: Sequence[str] = TASKS,
    output: Path = Path("out"),
    *,
    font: Path | None = None,
    device: str | None = None,
    repeats: int = 20,
) -> int:
    """Evaluate the ``tasks``, print each as it is done, and write all as `JSON` and `MARKDOWN` into ``output``.

    What cannot be had here (a font, weights, photographs) is said in a line, and the rest goes on. Returns the exit
    status: 1 where a target is missed (not where times do not tell) or something could not be had. UsageError for an
    unknown task or device.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UsageError(f"no task {unknown[0]!r}: expected some of {', '.join(TASKS)}")
    require("evaluate", repairing.PACKAGES)
    where = choose_device(device)
    make_output_dir(output)
    about = f"cnnfast {env.__version__}, torch {torch.__version__}, {device_text(where)}"
    print(about)
    figures: list[Figure] = []
    speeds: list[Speed] = []
    missing: list[Missing] = []
    for task in dict.fromkeys(tasks):
        found: list[Figure] = []
        try:
            found = figures_of(task, str(where), font)
        except (CnnfastError, OSError) as error:
            missing.append(Missing(task, "figures", one_line(error)))
            print(f"\n{missing[-1]}", flush=True)
        if found:
            print(f"\n{_table(found, 'plain')}\nplain: {_PLAIN[task]}", flush=True)
        figures += found
    for workload in (w for w in WORKLOADS if w.task in tasks):
        try:
            speeds.append(speed(workload, str(where), repeats))
        except (CnnfastError, OSError) as error:
            missing.append(Missing(workload.task, f"speed of {workload.what}", one_line(error)))
            print(f"\n{missing[-1]}", flush=True)
    if speeds:
        print(f"\n{_speed_table(speeds, 'plain')}\n{_note(repeats)}")
    rows: list[Figure | Speed] = [*figures, *speeds]
    missed = [f"{row.task}, {row.what}" for row in rows if row.held is False]
    _write(output, about, figures, speeds, missing, repeats)
    print(f"\nwrote {output / JSON} and {output / MARKDOWN}")
    unclear = [f"{row.task}, {row.what}" for row in speeds if row.held is None]
    held = sum(row.held is True for row in rows)
    had = f"; {len(missing)} of the above could not be had" if missing else ""
    print(f"{held} of {held + len(missed) + len(unclear)} targets are held{had}")
    for line in (*(f"missed: {what}" for what in missed), *(f"unclear: {what}" for what in unclear)):
        print(line)
    return 1 if missed or missing else 0


def _table(rows: Sequence[Figure], form: str) -> str:
    return tabulate([r.cells() for r in rows], _HEADERS, tablefmt=form, disable_numparse=True, colalign=_ALIGNED)


def _speed_table(rows: Sequence[Speed], form: str) -> str:
    return tabulate([row.cells() for row in rows], HEADERS, tablefmt=form, disable_numparse=True)


def _note(repeats: int) -> str:
    return (
        f"images per second: median [quartiles] of {repeats} interleaved repeats; the network alone, in memory. "
        "Held: not slower; unclear: the ratio's quartiles have 1 between them and its median lies below; the same "
        "network: on this device the task runs it in PyTorch's own containers, in the faster layout"
    )


def _write(
    output: Path,
    about: str,
    figures: Sequence[Figure],
    speeds: Sequence[Speed],
    missing: Sequence[Missing],
    repeats: int,
) -> None:
    record = {
        "about": about,
        "figures": [{**asdict(f), "target": f.target, "held": f.held} for f in figures],
        "speed": [
            {
                "task": s.task,
                "what": s.what,
                "images": s.batch,
                "seconds": {name: timing.seconds for name, timing in s.times.items()},
                "images_per_second": {name: s.rates(name)[0] for name in s.times},
                "best_plain": s.best,
                "ratio": [s.ratio.median, s.ratio.low, s.ratio.high],
                "same_network": s.level,
                "held": s.held,
            }
            for s in speeds
        ],
        "missing": [asdict(m) for m in missing],
    }
    write_atomically(output / JSON, json.dumps(record, indent=1) + "\n")
    parts = [f"# The image tasks in figures\n\n{about}"]
    if figures:
        parts.append(_table(figures, "pipe"))
        shown = (task for task in _PLAIN if any(f.task == task for f in figures))
        parts.append("\n".join(f"- Plain, {task}: {_PLAIN[task]}." for task in shown))
    if speeds:
        parts.append(f"{_speed_table(speeds, 'pipe')}\n\n{_note(repeats)}.")
    parts += [f"{m}." for m in missing]
    write_atomically(output / MARKDOWN, "\n\n".join(parts) + "\n")


def add_command(commands: Any, name: str, **options: Any) -> None:
    """The subcommand ``name``; ``options`` are those of ``add_parser``."""
    command = commands.add_parser(name, **options)
    command.add_argument("tasks", nargs="*", metavar="TASK", help=f"some of {', '.join(TASKS)} (all)")
    command.add_argument(
        "--output", type=Path, default=Path("out"), metavar="DIR", help=f"for {JSON} and {MARKDOWN} (%(default)s)"
    )
    command.add_argument("--repeats", type=positive, default=20, help="timings of each candidate (%(default)s)")
    command.add_argument("--font", type=Path, metavar="FILE", help="Noto Color Emoji, for draw (where systems keep it)")
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where torch can use it)")
    command.set_defaults(work=_work)


def _work(arguments: argparse.Namespace) -> int:
    return run(
        arguments.tasks or TASKS,
        arguments.output,
        font=arguments.font,
        device=arguments.device,
        repeats=arguments.repeats,
    )
