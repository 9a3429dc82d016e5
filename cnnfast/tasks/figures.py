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
from torch import Tensor, nn

from ..files import make_output_dir, write_atomically
from ..messages import CnnfastError, UsageError, one_line
from ..timing import Timing, measure
from . import composing, drawing, enhancement, env, repairing, stages
from .arguments import positive
from .cutting import Cutter
from .drawing import Drawer
from .emoji import SPLITS
from .enhancement import Enhancer
from .machine import choose_device, device_text, require
from .repairing import Repairer
from .sampling import Sampler
from .styling import Styler

__all__ = ["TASKS", "WORKLOADS", "Figure", "Missing", "Speed", "Workload", "add_command", "figures_of", "run", "speed"]

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
        return (self.task, self.what, plain, f"{self.ours:{form}}", self.unit, self.target, _said(self.held))


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
_ALIGNED = ("left", "left", "right", "right", "left", "left", "left")


def _said(held: bool | None) -> str:
    return "" if held is None else "yes" if held else "NO"


def _draw(device: str | None, font: Path | None) -> Iterator[Figure]:
    for row in drawing.evaluate(font=font, device=device):
        least = 95.0 if row.texts == f"{SPLITS[0]}, unseen" else None
        plain = None if row.plain_top1 is None else 100 * row.plain_top1
        yield Figure("draw", f"{row.texts}: the right one of all is the nearest", plain, 100 * row.top1, "%", least)
        yield Figure("draw", f"{row.texts}: among the nearest five", None, 100 * row.top5, "%")
        yield Figure("draw", f"{row.texts}: PSNR", row.plain_psnr, row.psnr, "dB")


def _enhance(device: str | None, font: Path | None) -> Iterator[Figure]:
    least = {"x2": 1.0, "x4": 0.9, "JPEG 30": 0.5}
    for what, photograph, plain, ours in enhancement.evaluate(device=device):
        yield Figure("enhance", f"{what}, {photograph}: PSNR", plain, ours, "dB", least[what], by_gain=True)


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


# --- how fast ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A network as its task runs it: ``build(device=..., sequential=...)``; without ``sequential``, in the containers
    that the task chooses. ``side``: pixels of the picture that it is given, of which ``example_input`` says the rest;
    None: that itself. ``layout``: of what the task gives it, by device."""

    task: str
    what: str
    build: Callable[..., nn.Module]
    batch: int = 1
    side: int | None = None
    layout: Callable[[torch.device], torch.memory_format] = lambda device: torch.channels_last

    def inputs(self, network: nn.Module) -> tuple[Tensor, ...]:
        owner: Any = network
        made = owner.example_input(self.batch)
        made = made if isinstance(made, tuple) else (made,)
        if self.side is None:
            return made
        side = self.side + 2 * getattr(network, "margin", 0)
        return (nn.functional.interpolate(made[0], (side, side)),)


class _Styled(nn.Module):
    """`Styler`'s network of one style."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        styler = Styler("mosaic", **options)
        self.network = styler.network.styled(styler.numbers)
        self.example_input = styler.network.example_input
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def _enhancer(scale: int | None = None, denoise: int | None = None) -> Callable[..., nn.Module]:
    def build(**options: Any) -> nn.Module:
        network = Enhancer(scale, denoise=denoise, **options).jobs[0].network
        assert isinstance(network, nn.Module)
        return network

    return build


WORKLOADS = (
    Workload("generate", "16 faces of 64x64", lambda **o: Sampler("faces", **o).network, 16),
    Workload("generate", "16 eyes of 128x128", lambda **o: Sampler("eyes", **o).network, 16),
    Workload("draw", "an emoji of 64x64", lambda **o: Drawer(**o).network),
    Workload("enhance", "--scale 2, 128x128", _enhancer(2), side=128),
    Workload("enhance", "--scale 4, 128x128", _enhancer(4), side=128),
    Workload("enhance", "--denoise 1, 128x128", _enhancer(denoise=1), side=128),
    Workload("repair", "128x128", lambda **o: Repairer(**o).network, side=128),
    Workload("compose", "a learnt style, 256x256", _Styled, layout=stages.layout),
    Workload("compose", "people, 256x256", lambda **o: Cutter(**o).network),
)


@dataclass(frozen=True)
class Speed:
    """Times of one workload's ``batch`` images, by candidate: "cnnfast", "eager" and "eager channels_last"."""

    task: str
    what: str
    batch: int
    times: Mapping[str, Timing]

    @property
    def best(self) -> str:
        """The faster of plain PyTorch's two."""
        return min((name for name in self.times if name != "cnnfast"), key=lambda name: self.times[name].median)

    @property
    def ratio(self) -> Timing:
        """How many times faster than that, repeat by repeat: its median and quartiles."""
        pairs = zip(self.times[self.best].seconds, self.times["cnnfast"].seconds, strict=True)
        return Timing(tuple(plain / ours for plain, ours in pairs), 1)

    @property
    def held(self) -> bool | None:
        """Whether it is not slower; None where the spread does not let one say: the median of the ratio is below 1,
        its upper quartile is not."""
        return True if self.ratio.median >= 1 else False if self.ratio.high < 1 else None

    def rates(self, name: str) -> tuple[float, float, float]:
        """Images per second: the median, the quartiles."""
        timing = self.times[name]
        return self.batch / timing.median, self.batch / timing.high, self.batch / timing.low

    def cells(self) -> tuple[str, ...]:
        """As text, under `_SPEED_HEADERS`."""
        plain, ours = ("{:.4g} [{:.4g}, {:.4g}]".format(*self.rates(name)) for name in (self.best, "cnnfast"))
        ratio = f"{self.ratio.median:.2f}x [{self.ratio.low:.2f}, {self.ratio.high:.2f}]"
        return (self.task, self.what, self.best, plain, ours, ratio, _said(self.held) or "unclear")


_SPEED_HEADERS = ("task", "network's work", "best of plain PyTorch", "images/s", "cnnfast, images/s", "ratio", "held")


def speed(workload: Workload, device: str | None = None, repeats: int = 20) -> Speed:
    """Time a workload, interleaved. WeightsError where the weights cannot be had."""
    options: dict[str, Any] = {"device": device}
    plain = {**options, "sequential": nn.Sequential}
    networks = {
        "eager": workload.build(**plain).to(memory_format=torch.contiguous_format),  # type: ignore[call-overload]
        "eager channels_last": workload.build(**plain).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        "cnnfast": workload.build(**options),
    }
    torch_device = next(networks["cnnfast"].parameters()).device
    layouts = {
        "eager": torch.contiguous_format,
        "eager channels_last": torch.channels_last,
        "cnnfast": workload.layout(torch_device),
    }
    calls = {}
    with torch.inference_mode():
        for name, network in networks.items():
            layout = layouts[name]
            given = tuple(x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in workload.inputs(network))
            calls[name] = lambda network=network, given=given: network(*given)  # noqa: B008
        times = measure(calls, repeats=repeats, device=torch_device)
    return Speed(workload.task, workload.what, workload.batch, times)


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
    return tabulate([row.cells() for row in rows], _SPEED_HEADERS, tablefmt=form, disable_numparse=True)


def _note(repeats: int) -> str:
    return (
        f"images per second: median [quartiles] of {repeats} interleaved repeats; the network alone, in memory. "
        "Held: not slower; unclear: the ratio's quartiles have 1 between them and its median lies below"
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
