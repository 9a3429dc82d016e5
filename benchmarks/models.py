"""``python -m benchmarks.models``: published models, accelerated by one line, against PyTorch and other runtimes, on a
CPU, in one run.

A run of some models replaces their rows in the results file and leaves the others.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import cnnfast
from cnnfast.files import write_atomically
from cnnfast.nn.accelerate_report import leaves
from cnnfast.tasks.allocator import CHOSEN, keep_freed_memory
from cnnfast.timing import Timing

from .peers import EAGER, onnxruntime_call, openvino_call, require_compiler, traced_onnx
from .published import MODELS, Published
from .report import environment, machine_name, table
from .timers import RATIOS, paired, wall_clock
from .workload import TOLERANCES, NotAvailable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESULTS = Path(__file__).resolve().parent / "results"
OURS, FROZEN = "accelerate", "accelerate, frozen"
WARM = 2.0
"""Seconds in which each implementation is called ahead of the timing: a weight counts as one that nobody writes to once
it has held the same for a second (`cnnfast.cpu.content`)."""


@dataclass
class Entry:
    """Of one implementation: what it calls, its largest error over the largest value of plain eager mode's result, and
    why there is no time."""

    name: str
    call: Callable[[], Any] | None = None
    error: float | None = None
    note: str = ""
    timing: Timing | None = None


@dataclass
class Row:
    """Of a model on so many threads, in a dtype. ``cpu_seconds``: of `accelerate` and of the first two calls after it,
    less what two calls take then. ``fused``, ``found``, ``convolutions``: as `cnnfast.explain` counts them."""

    model: str
    title: str
    threads: int
    dtype: str = "float32"
    entries: list[Entry] = field(default_factory=list)
    cpu_seconds: float = 0.0
    fused: int = 0
    found: int = 0
    convolutions: int = 0
    graphs: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def timing(self, name: str) -> Timing | None:
        return next((e.timing for e in self.entries if e.name == name), None)

    def as_json(self) -> dict[str, Any]:
        eager = [t for t in map(self.timing, EAGER) if t is not None]
        best = min(eager, key=lambda t: t.median, default=None)
        found = {k: v for k, v in asdict(self).items() if k != "entries"} | {"entries": []}
        for e in self.entries:
            ms = e.timing and {k: 1e3 * getattr(e.timing, k) for k in ("median", "low", "high")}
            ratio = asdict(paired(best, e.timing)) if best and e.timing else None
            found["entries"].append(
                {"name": e.name, "ms": ms, "over_best_eager": ratio, "error": e.error, "note": e.note}
            )
        return found


# --- the implementations ----------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """A ``model`` and its input ``x`` in the dtype that is measured, and both in float32, which runtimes of other
    projects take."""

    model: nn.Module
    x: Tensor
    source: nn.Module
    source_x: Tensor


Prepare = Callable[[Given], Callable[[], Any]]


def _last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() not in formats:
        raise NotAvailable(f"a {x.dim()}-D input has no channels_last")
    return x.to(memory_format=formats[x.dim()])


def _channels_last(given: Given) -> Callable[[], Any]:
    x = _last(given.x)
    twin = copy.deepcopy(given.model)
    twin.to(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)  # type: ignore[call-overload]
    return lambda: twin(x)


def _compiled(given: Given) -> Callable[[], Any]:
    require_compiler()
    compiled = torch.compile(copy.deepcopy(given.model), dynamic=False)
    return lambda: compiled(given.x)


def _onnxruntime(given: Given) -> Callable[[], Any]:
    if given.x.dtype != torch.float32:
        raise NotAvailable("onnxruntime has no bfloat16 convolutions on a CPU")
    return onnxruntime_call(traced_onnx(given.source, given.x), given.x)


def _openvino(given: Given) -> Callable[[], Any]:
    return openvino_call(traced_onnx(given.source, given.source_x), given.source_x, given.x.dtype)


def _accelerated(given: Given, row: Row) -> Callable[[], Any]:
    x = given.x
    start = time.process_time()
    ours = cnnfast.accelerate(copy.deepcopy(given.model))
    ours(x), ours(x)
    middle = time.process_time()
    ours(x), ours(x)
    row.cpu_seconds = max(0.0, 2 * middle - start - time.process_time())
    said = cnnfast.explain(ours, x)
    row.fused, row.found, row.convolutions, row.graphs = said.fused, said.found, said.convolutions, said.graphs
    row.reasons = dict(said.reasons)
    return lambda: ours(x)


def _frozen(given: Given) -> Callable[[], Any]:
    ours = cnnfast.accelerate(copy.deepcopy(given.model))
    cnnfast.freeze(ours)
    return lambda: ours(given.x)


def _implementations(row: Row) -> dict[str, Prepare]:
    return {
        "eager": lambda given: lambda: given.model(given.x),
        "eager channels_last": _channels_last,
        "torch.compile": _compiled,
        "onnxruntime": _onnxruntime,
        "OpenVINO": _openvino,
        OURS: lambda given: _accelerated(given, row),
        FROZEN: _frozen,
    }


NAMES = tuple(_implementations(Row("", "", 0)))


# --- a row ------------------------------------------------------------------------------------------------------------


def measured(
    name: str, published: Published, names: tuple[str, ...], seconds: float, dtype: torch.dtype = torch.float32
) -> Row:
    """The row of a model, with weights and input in ``dtype``. What is off by more than its tolerance is not timed."""
    row = Row(name, published.title, torch.get_num_threads(), str(dtype).removeprefix("torch."))
    torch._dynamo.reset()
    with torch.inference_mode():
        try:
            source, x = published.model(), published.input()
            expected = leaves(source(x))
        except NotAvailable as missing:
            row.entries = [Entry(n, note=str(missing)) for n in names]
            return row
        model = source if dtype == torch.float32 else copy.deepcopy(source).to(dtype)
        given = Given(model, x.to(dtype), source, x)
        for n, prepare in _implementations(row).items():
            if n in names:
                row.entries.append(_prepared(n, prepare, given, expected))
        timed = {e.name: e.call for e in row.entries if e.call is not None}
        for call in timed.values():
            until = time.monotonic() + WARM
            while time.monotonic() < until:
                call()
        for n, timing in wall_clock(seconds, repeats=(5, 25))(timed).items():
            next(e for e in row.entries if e.name == n).timing = timing
    return row


def _prepared(name: str, prepare: Prepare, given: Given, expected: Any) -> Entry:
    entry = Entry(name)
    try:
        call = prepare(given)
        call()
        found = leaves(call())
        error = max(
            ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
            for a, b in zip(found, expected, strict=True)
        )
    except NotAvailable as missing:
        entry.note = str(missing)
        return entry
    except Exception as failure:  # a peer's failure is a result of the comparison
        entry.note = f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0][:160]}"
        print(f"{name}: {entry.note}", file=sys.stderr)
        return entry
    entry.error = error
    if error > 2 * TOLERANCES[given.x.dtype]:  # of two results that are each within it
        entry.note = f"off by {error:.1e}"
        return entry
    entry.call = call
    return entry


# --- the results ------------------------------------------------------------------------------------------------------


def merged(before: Mapping[str, Any], rows: list[dict[str, Any]], env: dict[str, str]) -> dict[str, Any]:
    """The results with these rows in place of those of the same models, threads and dtype, in the list's order."""
    by = {(row["model"], row["threads"], dtype_of(row)): row for row in (*before.get("rows", ()), *rows)}
    order, dtypes = list(MODELS), list(DTYPES)
    ordered = sorted(
        by.values(), key=lambda row: (dtypes.index(dtype_of(row)), row["threads"], order.index(row["model"]))
    )
    env = {k: v for k, v in env.items() if k not in ("threads", "load at the start")}
    return {"schema": 1, "environment": env, "rows": ordered}


def dtype_of(row: Mapping[str, Any]) -> str:
    """Of the results' row. (Those written before December 2026 name none.)"""
    return row.get("dtype", "float32")


def columns_of(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """The dtypes and threads that these are of."""
    return sorted({(dtype_of(row), row["threads"]) for row in rows}, key=lambda of: (list(DTYPES).index(of[0]), of[1]))


def heading(dtype: str, threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}" + f", {dtype}" * (dtype != "float32")


def markdown(results: Mapping[str, Any]) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    yield "# Models of others, accelerated"
    yield ""
    yield "Written by `python -m benchmarks.models`. Do not edit."
    yield ""
    for name, value in results["environment"].items():
        yield f"- {name}: {value}"
    yield ""
    yield (
        "Median ms, float32 unless said otherwise, inference; every model with its weights from a seed, in PyTorch's "
        f"default layout but for eager channels_last, after {WARM:g} s of calls by each. bfloat16: of weights and "
        "input, for OpenVINO of its products. " + RATIOS + " Ratios are over the better of the two eager columns."
    )
    for dtype, threads in columns_of(results["rows"]):
        rows = [row for row in results["rows"] if (dtype_of(row), row["threads"]) == (dtype, threads)]
        names = [n for n in NAMES if any(e["name"] == n for row in rows for e in row["entries"])]
        yield ""
        yield f"## {heading(dtype, threads)}"
        yield ""
        body = []
        for row in rows:
            entries = {e["name"]: e for e in row["entries"]}
            cells = [_milliseconds(entries.get(n)) for n in names]
            ratios = [ratio(entries.get(n)) for n in (OURS, FROZEN)]
            counts = f"{row['fused']} of {row['found']} of {row['convolutions']}"
            body.append([row["title"], *cells, *ratios, counts, f"{row['cpu_seconds']:.1f}"])
        head = ["", *names, OURS, FROZEN, "fused of found of all", "accelerate, CPU s"]
        yield from table(head, body)
        found = ((row["model"], e) for row in rows for e in row["entries"] if e["note"])
        notes = sorted({f"{e['name']}: {e['note']} ({model})" for model, e in found})
        if notes:
            yield ""
            yield from (f"- {note}" for note in notes)


def _milliseconds(entry: Mapping[str, Any] | None) -> str:
    return "-" if not entry or not entry["ms"] else f"{entry['ms']['median']:.1f}"


def ratio(entry: Mapping[str, Any] | None) -> str:
    """An entry's ratio with its spread, as a cell."""
    r = entry and entry["over_best_eager"]
    if not r:
        return (entry or {}).get("note", "") or "-"
    return f"{r['median']:.2f}x" + (f" [{r['low']:.2f}, {r['high']:.2f}]" if r["turns"] else "")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    p.add_argument("--model", action="append", choices=list(MODELS), help="only this one; may be repeated")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of weights and input (default float32)")
    p.add_argument("--implementation", action="append", choices=NAMES, help="only this one; may be repeated")
    p.add_argument("--seconds", type=float, default=20.0, help="of timing for each model (default 20)")
    p.add_argument("--output", type=Path, help="folder of models.json and models.md (default: this machine's results)")
    return p


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    # Which of several models in a process gets its pages anew in every call is an accident of their order.
    chosen = ", ".join(f"{name}={os.environ[name]}" for name in CHOSEN if name in os.environ)
    kept = {"freed memory": "kept, for all alike" if keep_freed_memory() else chosen or "as the C library does"}
    folder = arguments.output or RESULTS / machine_name()
    path = folder / "models.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    names = tuple(n for n in NAMES if n in (arguments.implementation or NAMES))
    for name in arguments.model or MODELS:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            row = measured(name, MODELS[name], names, arguments.seconds, DTYPES[arguments.dtype]).as_json()
        shown = ", ".join(f"{e['name']} {_milliseconds(e)} ({ratio(e)})" for e in row["entries"])
        print(f"{name}, {heading(arguments.dtype, arguments.threads)}: {shown}", flush=True)
        results = merged(results, [row], environment() | kept)
        write_atomically(path, json.dumps(results, indent=1) + "\n")
        write_atomically(folder / "models.md", markdown(results))


if __name__ == "__main__":
    main()
