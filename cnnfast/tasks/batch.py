"""One file, several or a folder: which results they make, and the work on them one after the other.

And the options that all image tasks share. A task's ``work`` takes a picture's path, its result's and a function that
is told the part that is done; this module says what was done, goes on after a failure, and ends with the exit status.
Under ``torchrun`` each process takes its part of the files (`ranks`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import make_output_dir
from ..messages import UsageError, one_line
from . import ranks
from .interrupt import exit_status
from .machine import size_in_bytes
from .pictures import READ, WRITTEN, check_target

__all__ = ["Item", "Work", "add_batch_options", "add_machine_options", "plan", "process"]

Work = Callable[[Path, Path, Callable[[float], object]], None]


@dataclass(frozen=True)
class Item:
    source: Path
    target: Path


def add_batch_options(command: argparse.ArgumentParser) -> None:
    """The pictures and where their results go."""
    command.add_argument("inputs", nargs="+", type=Path, metavar="IN", help="pictures, or folders of them")
    command.add_argument(
        "--output", type=Path, required=True, metavar="OUT", help="a .png, .jpg or .webp; of several pictures a folder"
    )
    command.add_argument("--recursive", action="store_true", help="folders within folders too")
    command.add_argument(
        "--skip-existing", action="store_true", help="leave results that are there: go on after a stop"
    )
    command.add_argument(
        "--png-level", type=int, choices=range(10), default=1, metavar="0-9", help="effort to make PNGs small (1)"
    )


def add_machine_options(command: argparse.ArgumentParser, memory: bool = True) -> None:
    """Where and how networks run; ``memory``: whether they run by tiles, whose size it bounds."""
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where torch can use it)")
    command.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="(default: float32 on a CPU, float16 on a GPU)"
    )
    command.add_argument("--backend", choices=["auto", "triton", "aten"], help="as cnnfast.backend (auto)")
    if memory:
        command.add_argument(
            "--memory",
            type=size_in_bytes,
            metavar="SIZE",
            help="for a tile: 512M, 4G, ... (default: half of what is free)",
        )


# --- which ------------------------------------------------------------------------------------------------------------


def plan(inputs: Sequence[Path], output: Path, recursive: bool = False, written: Sequence[str] = WRITTEN) -> list[Item]:
    """What is to be made of what, in the order of names.

    One picture goes to ``output`` itself where that is no folder and is named like a picture; otherwise ``output`` is a
    folder, in which results have their pictures' names (and, below a folder, the folders in it), with the suffix .png
    where a kind is not among those ``written``. UsageError for what is not there, no pictures, two results of one name,
    and a result in the place of a picture.
    """
    found = [pair for path in inputs for pair in _pictures(path, output, recursive)]
    single = len(inputs) == 1 and not os.path.isdir(inputs[0])
    if single and not os.path.isdir(output):
        if not output.suffix:
            raise UsageError(f"--output {output}: expected a name that ends in {', '.join(written)}, or a folder")
        check_target(output, written=written)
        items = [Item(inputs[0], output)]
    else:
        if os.path.lexists(output) and not os.path.isdir(output):
            raise UsageError(f"--output {output} is a file: several pictures need a folder")
        if not os.path.lexists(output) and output.suffix.lower() in READ:
            raise UsageError(f"--output {output}: several pictures need a folder, that is named like a picture")
        items = [Item(source, output / _named(inside, written)) for source, inside in found]
    sources = {os.path.realpath(item.source): item.source for item in items}
    targets: dict[str, Path] = {}
    for item in items:
        target = os.path.realpath(item.target)
        if target in sources:
            raise UsageError(f"{item.target} is a picture that is to be read: choose another --output")
        if target in targets:
            raise UsageError(f"{targets[target]} and {item.source} would both become {item.target}")
        targets[target] = item.source
    return items


def _named(inside: Path, written: Sequence[str]) -> Path:
    return inside if inside.suffix.lower() in written else inside.with_suffix(".png")


def _pictures(path: Path, output: Path, recursive: bool) -> Iterator[tuple[Path, Path]]:
    """(picture, its place below the output folder). Hidden files are left out, and results below the folder itself."""
    if not os.path.isdir(path):
        if not os.path.lexists(path):
            raise UsageError(f"{path} does not exist")
        yield path, Path(path.name)
        return
    files = sorted(path.rglob("*") if recursive else path.iterdir())
    inside = [p.relative_to(path) for p in files if p.suffix.lower() in READ and p.is_file()]
    inside = [p for p in inside if not any(part.startswith(".") for part in p.parts)]
    results = os.path.realpath(output)
    if results != os.path.realpath(path):
        inside = [p for p in inside if not os.path.realpath(path / p).startswith(os.path.join(results, ""))]
    if not inside:
        more = "" if recursive else "; folders within it: --recursive"
        raise UsageError(f"{path} has no pictures ({', '.join(READ)}){more}")
    yield from ((path / p, p) for p in inside)


# --- work -------------------------------------------------------------------------------------------------------------


def process(items: Sequence[Item], work: Work, *, skip_existing: bool = False) -> int:
    """``work`` on each of the items that this process has; the exit status, 130 after Ctrl-C and 143 after
    SIGTERM.

    Of a single one, what goes wrong is raised. Of several a failure is told, and the others go on.
    """
    here = ranks.here()
    mine = here.part(items)  # whatever is there already: processes that begin later see more
    waiting = [item for item in mine if not (skip_existing and os.path.lexists(item.target))]
    for folder in sorted({item.target.parent for item in waiting}):
        make_output_dir(folder)
    done, failed = 0, 0
    from tqdm import tqdm

    try:
        with tqdm(total=len(waiting), unit=" pictures", disable=here.bar_off, bar_format=_BAR) as bar:
            for number, item in enumerate(waiting):
                bar.set_description(item.source.name, refresh=False)

                def told(part: float, number: int = number) -> None:
                    bar.n = number + part
                    bar.refresh()

                try:
                    work(item.source, item.target, told)
                    done += 1
                except Exception as error:
                    if len(items) == 1:
                        raise
                    failed += 1
                    tqdm.write(f"{here.name}error: {one_line(error)}", file=sys.stderr)
                bar.n = number + 1
                bar.refresh()
    except KeyboardInterrupt as error:
        again = "; the same command with --skip-existing goes on" if len(items) > 1 else ""
        print(f"\n{here.name}stopped: {done} of {len(waiting)} written{again}", file=sys.stderr)
        return exit_status(error)
    if len(items) == 1 and done:
        print(f"{here.name}wrote {waiting[0].target}")
    else:
        skipped = len(mine) - len(waiting)
        counts = [(done, "written"), (skipped, "there already"), (failed, "failed")]
        print(here.name + ", ".join(f"{n} {what}" for n, what in counts if n or what == "written"), flush=True)
    ranks.finish(here, failed > 0)
    return 1 if failed else 0


_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
