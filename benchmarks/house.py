"""``python -m benchmarks.house``: the plan of the code in numbers.

What `tests/benchmarks/test_house.py` and a reader want to know: circles of imports, imports inside functions, where a
device is asked for, how many files and functions a warm call passes on its way to the launch. ``--check`` exits 1 where
a limit of `LIMITS` is passed.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "cnnfast"

# The most of each, held by a test.
LIMITS = {
    "circles of imports": 0,
    "files in the package's root": 17,
    "lines that ask for a device": 12,
    "files that ask for a device": 5,
    "imports inside functions": 5,
    "files of a warm training step": 16,
}


# --- what the files say -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """``target``: a module of the package; ``deferred``: inside a function."""

    module: str
    target: str
    line: int
    deferred: bool


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The package's modules by name (the kernels are its subpackage)."""
    found = {}
    for folder, name in ((root / PACKAGE, PACKAGE), (root / "kernels", f"{PACKAGE}.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((name, *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return found


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _statements(node: ast.AST, deferred: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, deferred
        elif not _type_checking(child):
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _statements(child, deferred or inside)


def imports(root: Path = ROOT) -> list[Import]:
    """What the package's modules import of each other, but for type checkers."""
    known, found = modules(root), []
    for name, path in known.items():
        for node, deferred in _statements(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [a.name for a in node.names]
            else:
                base = (name if path.name == "__init__.py" else name.rpartition(".")[0]).split(".")
                base = base[: len(base) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                targets = [t if (t := f"{module}.{a.name}") in known else module for a in node.names]
            found += [Import(name, t, node.lineno, deferred) for t in dict.fromkeys(targets) if t in known]
    return found


def circles(found: list[Import]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not, inside functions or not (Tarjan, 1972)."""
    arrows: dict[str, list[str]] = {}
    for i in found:
        if i.module != i.target:
            arrows.setdefault(i.module, []).append(i.target)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    out: list[list[str]] = []

    def visit(m: str) -> None:
        index[m] = low[m] = len(index)
        stack.append(m)
        for t in arrows.get(m, ()):
            if t not in index:
                visit(t)
                low[m] = min(low[m], low[t])
            elif t in stack:
                low[m] = min(low[m], index[t])
        if low[m] == index[m]:
            group = stack[stack.index(m) :]
            del stack[stack.index(m) :]
            if len(group) > 1:
                out.append(sorted(group))

    for m in list(arrows):
        if m not in index:
            visit(m)
    return out


DEVICE = re.compile(r"\.is_cuda\b|\.is_cpu\b|\bdevice\.type\b|\bdevice_type\b")


CPU = re.compile(r"\bon_cpu\(")  # `dispatch.on_cpu`: facts about PyTorch's own operators


def device_lines(root: Path = ROOT, pattern: re.Pattern[str] = DEVICE) -> list[tuple[str, int]]:
    """Lines that ask what kind of device a tensor is on (file, number), the command line's and the tasks' left out."""
    found = []
    for name, path in modules(root).items():
        if ".tasks." in name or name.endswith("__main__"):
            continue
        lines = enumerate(path.read_text().splitlines(), 1)
        found += [(str(path.relative_to(root)), i) for i, line in lines if pattern.search(line.split("#")[0])]
    return found


def lines_of(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


# --- what a call passes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trip:
    """The package's files and functions that one call passes, and how often it goes from one file to another."""

    files: int
    functions: int
    changes: int

    def __str__(self) -> str:
        return f"{self.files} files, {self.functions} functions, {self.changes} changes of file"


def trip(call: Callable[[], object], root: Path = ROOT) -> Trip:
    folders = tuple(str(root / folder) + "/" for folder in (PACKAGE, "kernels"))
    seen: set[tuple[str, str, int]] = set()
    changes, last = 0, ""

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal changes, last
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folders):
            seen.add((code.co_filename, code.co_name, code.co_firstlineno))
            changes += last != "" and code.co_filename != last
            last = code.co_filename

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Trip(len({file for file, *_ in seen}), len(seen), changes)


def trips() -> dict[str, Trip]:
    """Of a warm ConvTranspose2d + BatchNorm2d + ReLU on the Triton path, the launch stubbed."""
    import torch
    from torch import nn

    import cnnfast

    from .rehearse.inspector import target

    def block() -> nn.Sequential:
        layers = nn.ConvTranspose2d(32, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(True)
        return cnnfast.channels_last(cnnfast.Sequential(*layers).half())

    x = torch.randn(4, 32, 4, 4).half().contiguous(memory_format=torch.channels_last)
    found = {}
    with target(90), cnnfast.backend("triton"):
        model = block().eval()
        with torch.inference_mode():
            model(x), model(x)
            found["inference"] = trip(lambda: model(x))
        model, leaf = block().train(), x.clone().requires_grad_()
        leaves = [leaf, *model.parameters()]
        for _ in range(2):
            y = model(leaf)
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        found["training, forward"] = trip(lambda: model(leaf))
        y = model(leaf)
        found["training, backward"] = trip(lambda: torch.autograd.grad(y, leaves, torch.ones_like(y)))

        def step() -> None:
            y = model(leaf)
            torch.autograd.grad(y, leaves, torch.ones_like(y))

        found["training step"] = trip(step)
        model = block().eval()
        with torch.no_grad():
            compiled = torch.compile(model, backend="aot_eager")
            compiled(x), compiled(x)
            found["compiled"] = trip(lambda: compiled(x))
    return found


# --- the report -------------------------------------------------------------------------------------------------------


def numbers(root: Path = ROOT, calls: bool = True) -> dict[str, object]:
    found, devices = imports(root), device_lines(root)
    deferred = [i for i in found if i.deferred]
    out: dict[str, object] = {
        "circles of imports": len(circles(found)),
        "modules": len(modules(root)),
        "files in the package's root": len(list((root / PACKAGE).glob("*.py"))),
        "lines that ask for a device": len(devices),
        "files that ask for a device": len({file for file, _ in devices}),
        "lines that ask whether PyTorch's CPU operators run": len(device_lines(root, CPU)),
        "imports inside functions": len({(i.module, i.line) for i in deferred}),
        **{f"lines of {f}": lines_of(root / f) for f in (PACKAGE, "kernels", "benchmarks", "tests")},
    }
    if calls:
        found_trips = trips()
        out |= found_trips
        ways = (found_trips[f"training, {way}"].files for way in ("forward", "backward"))
        out["files of a warm training step"] = max(ways)  # on the longer one of its two ways
    return out


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.house", description=__doc__)
    p.add_argument("--check", action="store_true", help="exit 1 where a limit is passed")
    p.add_argument("--list", action="store_true", help="also which lines and imports they are")
    arguments = p.parse_args(argv)
    found, bad = numbers(), 0
    for name, value in found.items():
        limit = LIMITS.get(name)
        over = limit is not None and isinstance(value, int) and value > limit
        bad += over
        print(f"{name:<52}{value}" + (f"  (at most {limit})" if limit is not None else "") + ("  OVER" if over else ""))
    if arguments.list:
        for group in circles(imports()):
            print("circle: " + ", ".join(group))
        for i in imports():
            if i.deferred:
                print(f"inside a function: {i.module}:{i.line} imports {i.target}")
        for file, line in device_lines():
            print(f"asks for a device: {file}:{line}")
    return 1 if bad and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
