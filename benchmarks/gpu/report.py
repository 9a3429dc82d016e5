"""The GPU run as Markdown: one page for each stage, from its JSON, and the summary."""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..peers import COMPILED, EAGER, GRAPH
from ..report import table

__all__ = ["Outcome", "digest", "page", "scrub", "summary"]

ROOT = Path(__file__).resolve().parents[2]
Data = Mapping[str, Any]
Row = Mapping[str, Any]

STUBBED = (
    "**Dry run: the kernels ran in an interpreter on a CPU. Results are checked; times are stubbed (there are none).**"
)
NOTES = {
    "probes": "Tensor cores' sums on chosen numbers; copies that stay in the L2 cache, at the data sheet's clock; the "
    "same launch over and over, every bit compared on the device.",
    "check": "Every implementation is compared with float64; nothing is timed.",
    "training_check": "Forward and backward are compared with float64; nothing is timed.",
    "tests": "The kernel tests of `tests/` on the device.",
    "table": "Times are of the device (CUDA events), the L2 cache overwritten before every call: medians of "
    "`triton.testing.do_bench`, repeated in turn. Where a call takes the host longer than that overwriting, its time "
    "shows; in a CUDA graph it does not. Plans are the heuristic's.",
    "tuned": "As the table, with the plans that the stage `tune` found.",
    "back_to_back": "Calls in a row on one stream (CUDA events): the host's time counts where it is the longer one.",
    "training": "Forward in training mode and backward of a given gradient, calls in a row on one stream (CUDA "
    "events): the host's time counts where it is the longer one; in a CUDA graph it does not. Parameters are float32, "
    "other dtypes autocast's. In a block the input needs a gradient too. The error is the worst of result and "
    "gradients; allowed is four times that of PyTorch's modules in NCHW, or a forward's tolerance if that is more.",
    "compiled": "As the table, beside `torch.compile`.",
    "host_time": "Time on the host of handing over one call, which is not waited for.",
    "candidates": "The plans that are to be timed: the heuristic's, and the best by the model. Each is compared with "
    "float64 at its first launch (`cnnfast.gpu.guard`).",
    "tune": "Plans of each fused step, timed in turn on noise, calls in a row; the best are kept in cnnfast's cache.",
    "prediction": "The model that chooses plans, against what was measured.",
    "hopper": "`kernels/conv_hopper.py`, which no call takes before this: each plan compared with float64 in a step of "
    "its own, then timed beside the pointer kernel's plan, calls in a row. Tuning may try it where it was right and "
    "faster.",
}
SAME = (
    "Every implementation has the same weights, input and TF32 setting, and is compared with float64 before it is "
    "timed; one that is off is not timed. cuDNN's own search is on (`torch.backends.cudnn.benchmark`). A first call, "
    "in which kernels are compiled and proven, is not timed."
)


@dataclass(frozen=True)
class Outcome:
    """``status``: "ok", "partial" (stopped at its time), "failed", "timed out" (was stopped) or "skipped"."""

    stage: str
    about: str
    status: str
    seconds: float
    detail: str
    log: str = ""
    crashes: tuple[str, ...] = ()


def scrub(text: str) -> str:
    """Without this machine's paths: results are published."""
    places = {str(ROOT): "REPOSITORY", sys.prefix: "PYTHON", sys.base_prefix: "PYTHON", str(Path.home()): "HOME"}
    places[tempfile.gettempdir()] = "TMP"
    for place, name in sorted(places.items(), key=lambda pair: -len(pair[0])):
        if len(place) > 1:
            text = text.replace(place, name)
    return text


# --- rows of times ----------------------------------------------------------------------------------------------------


def entry(row: Row, name: str) -> Mapping[str, Any]:
    return next((e for e in row.get("entries", ()) if e["name"] == name), {})


def median(row: Row, *names: str, stubbed: bool = False) -> float | None:
    """The least median in us of these implementations; stubbed ones count only where asked for."""
    timed = [e for name in names if "us" in (e := entry(row, name)) and (stubbed or not e.get("stubbed"))]
    return min((e["us"]["median"] for e in timed), default=None)


def ratio(row: Row, ours: str, *others: str) -> float | None:
    """How many times faster ``ours`` is than the fastest of ``others``."""
    mine, best = median(row, ours), median(row, *others)
    return None if mine is None or best is None else best / mine


PAIRS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("eager", "cnnfast", EAGER),
    ("eager, both in CUDA graphs", "cnnfast" + GRAPH, ("eager channels_last" + GRAPH,)),
    ("torch.compile", "cnnfast", COMPILED[:1]),
    ("torch.compile max-autotune, both in CUDA graphs", "cnnfast" + GRAPH, COMPILED[1:]),
)


def mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _means(rows: Sequence[Row]) -> Iterator[str]:
    """cnnfast over each peer, by dtype."""
    body = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows if "dtype" in row):
        for over, ours, others in PAIRS:
            found = [r for row in rows if row.get("dtype") == dtype and (r := ratio(row, ours, *others)) is not None]
            if found:
                below = sum(r < 1 for r in found)
                body.append([f"{dtype}, over {over}", str(len(found)), f"{mean(found):.2f}x",
                             f"{min(found):.2f}x", f"{max(found):.2f}x", str(below)])  # fmt: skip
    if body:
        yield from table(["cnnfast", "rows", "geometric mean", "least", "most", "slower in"], body)
        yield ""


def _cell(row: Row, name: str) -> str:
    e = entry(row, name)
    if "us" in e:
        return "stub" if e.get("stubbed") else f"{e['us']['median']:.1f}"
    return e.get("status", "")


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _mib(row: Row, *names: str) -> str:
    return " / ".join(f"{e['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in (e := entry(row, n)) else "-" for n in names)


def _timed(data: Data) -> Iterator[str]:
    rows = [row for row in data["rows"] if "entries" in row]
    names = list(dict.fromkeys(e["name"] for row in rows for e in row["entries"]))
    yield from _means(rows)
    pairs = [pair for pair in PAIRS if any(ratio(row, pair[1], *pair[2]) is not None for row in rows)]
    head = [
        "us",
        *names,
        *(f"over {over}" for over, *_ in pairs),
        "of the limit",
        "MiB, eager / cnnfast",
        "path",
        "eager's kernels",
    ]
    body = []
    for row in rows:
        ratios = [_times(ratio(row, ours, *others)) for _, ours, others in pairs]
        part = fraction(row)
        body.append(
            [
                row["key"],
                *(_cell(row, name) for name in names),
                *ratios,
                "" if part is None else f"{part:.2f}",
                _mib(row, "eager channels_last", "cnnfast"),
                entry(row, "cnnfast").get("path", ""),
                entry(row, "eager channels_last").get("path", ""),
            ]
        )
    yield from table(head, body, (0, len(head) - 2, len(head) - 1))
    if "ceilings" in data and not data.get("stubbed"):
        c = data["ceilings"]
        rates = ", ".join(f"{dtype} {flops / 1e12:.0f} TFLOP/s" for dtype, flops in c["flops"].items())
        yield ""
        yield (
            "Of the limit: the least time (arithmetic after phase decomposition at the rate of the best matrix "
            f"product, least bytes at the bandwidth of a copy; here {rates}, {c['bytes'] / 1e9:.0f} GB/s) over "
            "cnnfast's, in a CUDA graph where there is one. Above one: the maps stayed in the L2 cache."
        )


def own(row: Row, stubbed: bool = False) -> float | None:
    """cnnfast's time in us, in a CUDA graph where there is one."""
    return median(row, "cnnfast" + GRAPH, stubbed=stubbed) or median(row, "cnnfast", stubbed=stubbed)


def fraction(row: Row, stubbed: bool = False) -> float | None:
    """The least time over cnnfast's."""
    ours = own(row, stubbed)
    return None if ours is None or "least_us" not in row else row["least_us"] / ours


def _checked(data: Data) -> Iterator[str]:
    rows = [row for row in data["rows"] if "entries" in row]
    body = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        found = [(e, row) for row in rows if row["dtype"] == dtype for e in row["entries"]]
        errors = [e["error"] / row["tolerance"] for e, row in found if e["status"] in ("checked", "timed")]
        count = {s: sum(e["status"] == s for e, _ in found) for s in ("wrong result", "failed", "not available")}
        worst = f"{max(errors):.2f}" if errors else ""
        body.append([dtype, str(len(errors)), *map(str, count.values()), worst])
    head = ["", "right", "wrong", "failed", "no kernel", "worst error, in tolerances"]
    yield from table(head, body)


def _tested(data: Data) -> Iterator[str]:
    outcomes = [row["outcome"] for row in data["rows"] if "outcome" in row]
    yield ", ".join(f"{outcomes.count(o)} {o}" for o in dict.fromkeys(outcomes)) + "." if outcomes else "None ran."
    lost = [f"- {row['key']}: {row['note']}" for row in data["rows"] if row.get("outcome") == "not collected"]
    if lost:
        yield from ["", "Files that could not be read:", "", *lost]


def _tuned(data: Data) -> Iterator[str]:
    stub = data.get("stubbed")
    body = []
    for row in data["rows"]:
        for step in row.get("steps", ()):
            us, best = step.get("heuristic_us"), step.get("best_us")
            times = ["stub" if stub else f"{t:.1f}" if t is not None else "" for t in (us, best)]
            gain = "stub" if stub else f"{us / best:.2f}" if us and best else ""
            tried = f"{len(step.get('plans', ()))} of {step.get('valid', '?')}"
            body.append([row["key"], tried, step["heuristic"], step.get("best", ""), *times, gain])
    head = ["step", "plans timed", "the heuristic's", "the best", "us", "us", "heuristic over best"]
    yield from table(head, body, (0, 2, 3))
    yield from _refused(data)


def _proven(data: Data) -> Iterator[str]:
    steps = [step for row in data["rows"] for step in row.get("steps", ())]
    yield f"{len(steps)} steps, {sum(step['refused'] for step in steps)} plans refused."
    yield from _refused(data)


def _probed(data: Data) -> Iterator[str]:
    body = []
    for row in data["rows"]:
        said = row.get("note", "")
        if "truncates" in row:
            said = (
                f"{'truncates' if row['truncates'] else 'rounds'}, {row['bits']} bits below float32's last place kept"
            )
        elif "per_clock" in row:
            measured = "stub" if data.get("stubbed") else f"{row['bytes'] / 1e9:.0f} GB/s, {row['per_clock']:.0f}"
            said = f"{measured} bytes a clock and multiprocessor, {row['assumed']} assumed"
        elif "differing" in row:
            said = f"{row['differing']} of {row['launches']} launches differ from the first"
        body.append([row["key"], said])
    yield from table(["probe", ""], body, (0, 1))


def _refused(data: Data) -> Iterator[str]:
    found = [f"- {row['key']}: {line}" for row in data["rows"] for line in row.get("refused", ())]
    if found:
        yield from ["", "## Plans that cannot run here", "", *found]


def _predicted(data: Data) -> Iterator[str]:
    stub = data.get("stubbed")
    body = [
        [row["key"], str(row["count"]), *("stub" if stub else f"{row[name]:.2f}" for name in ("mean", "least", "most"))]
        for row in data["rows"]
        if "count" in row
    ]
    yield from table(["", "cases", "mean", "least", "most"], body)


def _of_boxes(data: Data) -> Iterator[str]:
    stub, body = data.get("stubbed"), []
    for row in data["rows"]:
        for layer in row.get("layers", ({"note": row["note"]},) if "note" in row else ()):
            us = layer.get("us", {})
            times = ["stub" if stub else f"{us[layer[name]]:.1f}" if us else "" for name in ("pointer", "best")]
            faster = "stub" if stub else _times(layer.get("faster"))
            body.append([row["key"], layer.get("pointer", ""), layer.get("best", ""), *times, faster,
                         layer.get("note", "")])  # fmt: skip
    yield from table(["step", "pointer kernel", "of boxes", "us", "us", "faster", ""], body, (0, 1, 2, 6))


TABLES: dict[str, Callable[[Data], Iterator[str]]] = {
    "probes": _probed,
    "check": _checked,
    "training_check": _checked,
    "tests": _tested,
    "candidates": _proven,
    "tune": _tuned,
    "prediction": _predicted,
    "hopper": _of_boxes,
}


def _failures(rows: Iterable[Row]) -> Iterator[str]:
    """Failures of cnnfast, a line each."""
    for row in rows:
        if not row.get("failures"):
            continue
        if "entries" not in row:
            yield f"{row['key']}: {row.get('note', row.get('outcome', 'failed'))}"
        for e in row.get("entries", ()):
            if e["status"] in ("failed", "wrong result"):
                yield f"{row['key']}: {e['name']}: {e['status']}: {e.get('note', '')}"


def digest(data: Data | None) -> str:
    """A stage in a line: rows, failures, what was left out, the first ratio there is."""
    if data is None:
        return "no results"
    rows, left = data["rows"], data["left_out"]
    text = f"{len(rows)} rows, {sum(row.get('failures', 0) for row in rows)} failures"
    if left:
        text += f"; left out for lack of time: {len(left)}, from {left[0]} on"
    if (found := data.get("binaries")) and sum(found.values()):
        text += f"; {found['hits']} binaries found in the cache, {found['misses']} compiled"
    for over, ours, others in PAIRS:
        found = [r for row in rows if (r := ratio(row, ours, *others)) is not None]
        if found:
            text += f"; {mean(found):.2f}x over {over} (geometric mean of {len(found)})"
    return text


def page(data: Data) -> str:
    """``STAGE.md``."""
    stage = data["stage"]
    lines = [f"# {stage}", "", "Written by `python -m benchmarks.gpu`. Do not edit.", ""]
    if data.get("stubbed"):
        lines += [STUBBED, ""]
    lines += [f"- {name}: {value}" for name, value in data.get("environment", {}).items()]
    lines += ["", NOTES.get(stage, ""), ""]
    if stage not in TABLES:
        lines += [SAME, ""]
    lines += TABLES.get(stage, _timed)(data)
    bad = list(_failures(data["rows"]))
    if bad:
        lines += ["", "## Failures", "", *(f"- {line}" for line in bad)]
    if data["crashes"]:
        lines += ["", "## Steps that ended the process", ""]
        lines += [f"- {c['key']}, {c['step']}: {c['reason']}" for c in data["crashes"]]
    if not data["ended"]:
        lines += ["", "**Incomplete: the stage did not come to its end.**"]
    if data["left_out"]:
        lines += ["", f"Left out for lack of time ({len(data['left_out'])}): {'; '.join(data['left_out'])}."]
    return scrub("\n".join(lines) + "\n")


# --- the summary ------------------------------------------------------------------------------------------------------


def summary(
    facts: Mapping[str, str], outcomes: Sequence[Outcome], dry_run: bool, folder: Path, tail: int = 25
) -> tuple[dict[str, Any], str]:
    """(``summary.json``'s content, ``summary.md``)."""
    data = {"dry_run": dry_run, "environment": dict(facts), "stages": [asdict(o) for o in outcomes]}
    lines = ["# cnnfast on a GPU" + (" (dry run: no GPU, times stubbed)" if dry_run else ""), ""]
    lines += ["Written by `python -m benchmarks.gpu`. Do not edit.", ""]
    if dry_run:
        lines += [STUBBED, ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines.append("")
    body = []
    for o in outcomes:
        link = f"[{o.stage}]({o.stage}.md)" if (folder / f"{o.stage}.md").exists() else o.stage
        body.append([link, o.about, o.status, f"{o.seconds:.0f}", o.detail])
    lines += table(["stage", "what", "result", "seconds", ""], body, (0, 1, 2, 4))
    for o in outcomes:
        if o.crashes:
            lines += ["", f"{o.stage}: steps that ended the process:", "", *(f"- {line}" for line in o.crashes)]
        log = folder / o.log
        if o.status in ("failed", "timed out") and o.log and log.exists():
            end = log.read_text(errors="replace").rstrip().splitlines()[-tail:]
            lines += ["", f"## {o.stage}: {o.status}", "", f"The end of `{o.log}`:", "", "```", *end, "```"]
    text = scrub("\n".join(lines) + "\n")
    return data, re.sub(r"\n{3,}", "\n\n", text)
