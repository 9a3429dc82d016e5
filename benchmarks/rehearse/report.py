"""The rehearsal as a summary, a table, JSON and plots."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from cnnfast.files import write_atomically
from cnnfast.gpu.conv_choice import FULL_WAVE

from ..report import environment, table
from .analysis import Analysis, Passes, Rehearsal, Row
from .model import BOUNDS, PARTS
from .rules import PRESSURE

__all__ = ["summary", "write"]


def _done(rows: Iterable[Row]) -> list[tuple[Row, Analysis]]:
    return [(r, r.result) for r in rows if isinstance(r.result, Analysis)]


def _where(row: Row) -> str:
    return f"{row.cases[0]} batch {row.input_shape[0]} {row.numerics} sm_{row.arch}"


def judged(pairs: list[tuple[Row, Analysis]]) -> list[tuple[Row, Analysis]]:
    """Those that the limit on issue pressure is for."""
    return [(r, a) for r, a in pairs if a.judged]


def summary(result: Rehearsal) -> str:
    """What was rehearsed, the worst of it with where, and every failure."""
    pairs = _done(result.rows)
    fallen = sorted({c for r in result.rows if r.why_not for c in r.cases})
    lines = [
        f"{len(result.rows)} plans ({result.binaries} binaries, {result.compiled} compiled now) in "
        f"{result.seconds:.0f} s: {len(result.failing)} fail.",
    ]
    if pairs:
        worst = max(judged(pairs), key=lambda p: p[1].pressure, default=None)
        if worst is not None:
            lines.append(f"Worst issue pressure (implicit GEMM, fp16): {worst[1].pressure:.2f}, {_where(worst[0])}.")
        r, a = min(pairs, key=lambda p: p[1].blocks * int(p[1].plan.split(" w")[1].split()[0]))
        warps = a.blocks * int(a.plan.split(" w")[1].split()[0])
        lines.append(f"Least occupancy: {warps} warps ({a.blocks} blocks, by {a.limit}), {_where(r)}.")
        bound = [p for p in pairs if p[1].bound == "dram"]
        if bound:
            r, a = max(bound, key=lambda p: p[1].ratio)
            lines.append(f"Worst bytes over the least where memory is the bound: {a.ratio:.2f}, {_where(r)}.")
        lines.append(f"Kernels that spill: {sum(a.spilled > 0 for _, a in pairs)}.")
        lines += _exceptions(pairs)
    if fallen:
        lines.append(f"Cases with steps that do not run on Triton: {', '.join(fallen)}.")
    for row in result.failing:
        plan = row.result.plan if isinstance(row.result, Analysis) else "no plan"
        lines += [f"FAILS {_where(row)}, {plan}: {f}" for f in row.failures]
    return "\n".join(lines)


def _exceptions(pairs: list[tuple[Row, Analysis]]) -> Iterator[str]:
    """How many plans break a rule that the layer's binaries cannot keep in reasonable time."""
    kinds: dict[tuple[str, int, str], list[str]] = {}
    for r, a in pairs:
        for text in a.exceptions:
            kind = next(k for k in ("issue pressure", "bytes", "programs") if k in text)
            why = (
                "no tile of the kernel does better" if "no tile" in text else "a better tile is not among its binaries"
            )
            kinds.setdefault((kind, r.arch, why), []).append(f"{_where(r)}, {a.plan}: {text}")
    for (kind, arch, why), found in sorted(kinds.items()):
        worst = max(found, key=_ratio)
        yield f"Exceptions ({why}), {kind}, sm_{arch}: {len(found)}, for one {worst.split(';')[0]}."


def _ratio(text: str) -> float:
    found = re.search(r"(?:pressure|bytes) ([\d.]+)|(\d+) programs", text)
    assert found is not None
    return float(found[1]) if found[1] else -float(found[2])


# --- JSON -------------------------------------------------------------------------------------------------------------

_COLUMNS = (
    "layer", "dtype", "arch", "plan", "grid", "programs", "waves", "blocks", "limit", "registers", "shared", "spilled",
    "tensor_cores", "pressure", "issue_over_tensor_or_memory", "instructions", "mma", "loads", "useful_macs",
    "bytes_over_least", "launches", "bound", *(f"bytes_{p}" for p in PARTS), *(f"bound_{b}" for b in BOUNDS),
    "failures", "exceptions", "not_on_triton",
)  # fmt: skip
_LAYER_COLUMNS = ("cases", "modules", "input", "output")


def _round(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _record(row: Row, layer: int) -> list[Any]:
    head, a = [layer, row.numerics, row.arch], row.result
    if not isinstance(a, Analysis):
        return [*head, *[None] * (len(_COLUMNS) - len(head) - 3), row.failures, (), row.why_not]
    return [
        *head, a.plan, a.grid, a.programs, _round(a.waves), a.blocks, a.limit, a.registers, a.shared, a.spilled, a.kind,
        _round(a.pressure), _round(a.over), a.instructions, a.mma, a.widths, _round(a.useful), _round(a.ratio),
        a.launches, a.bound, *(_round(a.parts.get(p, 0)) for p in PARTS), *(_round(a.shares[b]) for b in BOUNDS),
        a.failures, a.exceptions, row.why_not,
    ]  # fmt: skip


def _json(result: Rehearsal, about: dict[str, str]) -> str:
    """One line for each plan, values in the order of "columns"; "layer" counts the lines of "layers"."""
    layers: dict[tuple[Any, ...], int] = {}
    rows = []
    for r in result.rows:
        key = tuple(r.cases), r.modules, r.input_shape, r.output_shape
        rows.append(_line(_record(r, layers.setdefault(key, len(layers)))))
    parts = {"environment": about, "summary": summary(result).splitlines(), "not_fused": result.unrun}
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in parts.items()]
    tables = {
        "passes": [[*vars(p).values()] for p in result.passes],
        "layers": [[list(key[0]), *key[1:]] for key in layers],
    }
    columns = {"passes": [f.name for f in fields(Passes)], "layers": _LAYER_COLUMNS}
    for name, found in tables.items():
        lines += [f'"{name}_columns": {json.dumps(columns[name])}', f'"{name}": {_lines(map(_line, found))}']
    lines += [f'"columns": {json.dumps(_COLUMNS)}', f'"rows": {_lines(rows)}']
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _line(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"))


def _lines(rows: Iterable[str]) -> str:
    return "[\n" + ",\n".join(rows) + "\n]"


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _worst(values: Iterable[float], pick: Any = max) -> str:
    found = list(values)
    return f"{pick(found):.2f}" if found else ""


def _by_device(result: Rehearsal) -> Iterator[list[str]]:
    for arch, numerics in dict.fromkeys((r.arch, r.numerics) for r in result.rows):
        rows = [r for r in result.rows if (r.arch, r.numerics) == (arch, numerics)]
        pairs = _done(rows)
        bounds = [a.bound for _, a in pairs]
        yield [
            f"sm_{arch} {numerics}",
            str(len(rows)),
            str(sum(bool(r.failures) for r in rows)),
            _worst(a.pressure for _, a in judged(pairs)),
            _worst((a.ratio for _, a in pairs if a.bound == "dram")),
            _worst((a.useful for _, a in pairs), min),
            str(max((a.registers for _, a in pairs), default="")),
            str(sum(a.spilled > 0 for _, a in pairs)),
            ", ".join(f"{name} {bounds.count(name)}" for name in sorted(set(bounds), key=bounds.count, reverse=True)),
        ]


def _layers(result: Rehearsal, arch: int, numerics: str) -> Iterator[list[str]]:
    for r, a in _done(r for r in result.rows if (r.arch, r.numerics) == (arch, numerics)):
        loads = ", ".join(f"{n}x{width}" if width else f"{n} bulk" for width, n in a.widths.items())
        yield [
            f"{r.cases[0]} {r.title}", a.plan, "x".join(map(str, a.grid)), f"{a.waves:.2f}", str(a.blocks),
            str(a.registers), f"{a.shared / 1024:.0f}", f"{a.mma}/{a.instructions}", loads, f"{a.pressure:.2f}",
            f"{a.useful:.2f}", f"{a.ratio:.2f}", a.bound,
        ]  # fmt: skip


def _markdown(result: Rehearsal, about: dict[str, str]) -> Iterator[str]:
    yield "# What the benchmark cases are on GPUs that are not here"
    yield ""
    yield "Written by `python -m benchmarks.rehearse`. Do not edit. Counts from compiled code and arithmetic: nothing"
    yield "was run or timed on a GPU. What is assumed stands at the top of `benchmarks/rehearse/model.py`."
    yield ""
    yield from (f"- {k}: {v}" for k, v in about.items())
    yield ""
    yield from (f"{line}  " for line in summary(result).splitlines())
    yield ""
    yield "## By architecture and dtype"
    yield ""
    yield (
        "Issue pressure: of implicit GEMM (32 or more channels in and out, at least as many 64x64 tiles as "
        f"multiprocessors) in fp16 where tensor cores are slower than memory, at most {PRESSURE} wanted. Bytes: of "
        f"plans that memory bounds. A wave counts as full from {FULL_WAVE:.0%} of the multiprocessors."
    )
    yield ""
    head = ["", "plans", "fail", "worst issue pressure", "worst bytes / least", "least useful share of multiply-adds"]
    yield from table([*head, "most registers", "spills", "bound"], _by_device(result))
    yield ""
    yield "## Launches and bytes of a forward"
    yield ""
    yield (
        "float16 on sm_90. Eager: operators that the modules call (a convolution's bias is one more on a GPU). "
        "Inductor: the least that it could launch, each convolution and one kernel between two."
    )
    yield ""
    body = [
        [p.case, str(p.batch), str(p.ours), str(p.eager), str(p.inductor), f"{p.eager_bytes / p.ours_bytes:.2f}"]
        for p in result.passes
    ]
    yield from table(["", "batch", "cnnfast", "eager", "Inductor", "eager's bytes / ours"], body)
    reasons: dict[str, list[str]] = {}
    for case, modules in result.unrun.items():
        for module, why in modules.items():
            reasons.setdefault(f"`{module.split(chr(10))[0]}`: {why}", []).append(case)
    for r in result.rows:
        if r.why_not:
            line = f"{r.modules}, {r.input_shape[1]} -> {r.output_shape[1]} channels: {r.why_not}"
            reasons.setdefault(line, []).extend(c for c in r.cases if c not in reasons.get(line, []))
    if reasons:
        yield ""
        yield "## Not on Triton"
        yield ""
        yield from (f"- {line} ({', '.join(dict.fromkeys(names))})" for line, names in reasons.items())
    others = [(r, a) for r, a in _done(result.rows) if r.numerics == "fp16" and not a.judged and a.over > PRESSURE]
    if others:
        yield ""
        yield "## Issue slots elsewhere"
        yield ""
        yield (
            "Plans in float16 outside that limit (few channels, few tiles, or memory is slower than the tensor cores) "
            f"whose issue slots take more than {PRESSURE} of the time of the slower of tensor cores and memory."
        )
        yield ""
        head = ["", "plan", "issue pressure", "issue / max(tensor, memory)", "bound"]
        lines = ([_where(r), a.plan, f"{a.pressure:.2f}", f"{a.over:.2f}", a.bound] for r, a in others)
        yield from table(head, lines)
    for arch in (80, 90):
        body = list(_layers(result, arch, "fp16"))
        if body:
            yield ""
            yield f"## Plans in float16 on sm_{arch}"
            yield ""
            head = [
                "",
                "plan",
                "grid",
                "waves",
                "blocks",
                "registers",
                "shared KiB",
                "mma/instructions",
                "loads x bytes",
            ]
            yield from table([*head, "issue pressure", "useful", "bytes / least", "bound"], body)


# --- plots ------------------------------------------------------------------------------------------------------------


def _grid(result: Rehearsal, value: Any) -> tuple[list[str], list[int], list[list[float]]]:
    """(layers, architectures, the worst value of each over batches) in float16."""
    found: dict[str, dict[int, float]] = {}
    for r, a in _done(r for r in result.rows if r.numerics == "fp16"):
        v = value(a)
        if v is not None:
            cell = found.setdefault(r.cases[0], {})
            cell[r.arch] = max(v, cell.get(r.arch, 0.0))
    archs = sorted({arch for cells in found.values() for arch in cells})
    return list(found), archs, [[cells.get(arch, math.nan) for arch in archs] for cells in found.values()]


def _plots(result: Rehearsal, output: Path) -> Iterator[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def pressure(a: Analysis) -> float | None:
        return a.pressure if a.judged else None

    for name, title, value, top in (
        ("pressure", "issue pressure of implicit GEMM, float16 (worst batch)", pressure, 1.0),
        ("bytes", "bytes moved over the least, float16 (worst batch)", lambda a: a.ratio, 2.0),
        ("idle", "share of block slots that stay empty over the waves, float16 (worst batch)", _idle, 1.0),
    ):
        layers, archs, table = _grid(result, value)
        if not layers:
            continue
        figure, axes = plt.subplots(figsize=(7, 1.2 + 0.19 * len(layers)), layout="constrained")
        image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axes.set_xticks(range(len(archs)), [f"sm_{a}" for a in archs])
        axes.set_yticks(range(len(layers)), layers, fontsize=7)
        for i, line in enumerate(table):
            for j, v in enumerate(line):
                if not math.isnan(v):
                    color = "black" if v > 0.7 * top else "white"
                    axes.text(j, i, f"{v:.2f}", ha="center", va="center", fontsize=6, color=color)
        axes.set_title(title, fontsize=9)
        figure.colorbar(image)
        path = output / f"{name}.png"
        figure.savefig(path.with_suffix(".tmp"), dpi=100, format="png", metadata={"Software": None})
        plt.close(figure)
        path.with_suffix(".tmp").replace(path)
        yield path


def _idle(a: Analysis) -> float:
    """Share of the block slots that stay empty over all waves."""
    return 1 - a.waves / math.ceil(a.waves)


def write(result: Rehearsal, output: Path) -> list[Path]:
    """README.md, rehearsal.json and the plots in ``output``; the paths written."""
    about = {k: v for k, v in environment().items() if k in ("date", "python", "torch", "triton", "cnnfast", "commit")}
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / "README.md", output / "rehearsal.json"]
    write_atomically(paths[0], "\n".join(_markdown(result, about)) + "\n")
    write_atomically(paths[1], _json(result, about))
    return [*paths, *_plots(result, output)]
