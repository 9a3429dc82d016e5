"""What a comparison found: as values, as JSON and as Markdown."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from cnnfast import cpu, env
from cnnfast.timing import Timing

from .peers import EAGER

__all__ = ["Entry", "Report", "Row", "environment", "machine_name", "write_atomically"]

# Ours, and the eager implementations that each must not be slower than: those a user of its memory format would have.
OURS: dict[str, tuple[str, ...]] = {"cnnfast": EAGER, "cnnfast NCHW": EAGER[:1], "cnnfast.ops": EAGER}
UNSTEADY = 0.25  # quartiles apart by this part of the median: other work ran


@dataclass(frozen=True)
class Entry:
    """One implementation in one row. ``status``: "timed", "not available", "wrong result", "failed"; only the first has
    a ``timing``. ``note`` is the reason of the others, ``path`` what ran, ``error`` relative to float64."""

    name: str
    status: str
    note: str = ""
    path: str = ""
    error: float | None = None
    timing: Timing | None = None


@dataclass(frozen=True)
class Row:
    """One workload. ``mm``: the time of the yardstick, a product of ``mm_size`` squared matrices, measured among the
    others; None where nothing was timed. ``tolerance`` is of the entries' ``error``."""

    case: str
    suite: str
    title: str
    dtype: str
    batch: int
    macs: int
    tolerance: float
    entries: tuple[Entry, ...]
    mm_size: int = 0
    mm: Timing | None = None

    @property
    def name(self) -> str:
        return f"{self.case}, {self.dtype}, batch {self.batch}"

    def entry(self, name: str) -> Entry | None:
        return next((e for e in self.entries if e.name == name), None)

    def tflops(self, entry: Entry) -> float | None:
        return None if entry.timing is None else 2 * self.macs / entry.timing.median / 1e12

    @property
    def mm_tflops(self) -> float | None:
        return None if self.mm is None else 2 * self.mm_size**3 / self.mm.median / 1e12

    def fraction(self, entry: Entry) -> float | None:
        """TFLOP/s over those of `torch.mm`."""
        rate, mm = self.tflops(entry), self.mm_tflops
        return None if rate is None or mm is None else rate / mm

    def best(self, names: tuple[str, ...]) -> float | None:
        """The least median of these implementations, in seconds."""
        medians = [e.timing.median for e in self.entries if e.name in names and e.timing is not None]
        return min(medians, default=None)

    def speedup(self, entry: Entry, over: tuple[str, ...] = EAGER) -> float | None:
        """How many times faster ``entry`` is than the best of ``over``."""
        best = self.best(over)
        return None if best is None or entry.timing is None else best / entry.timing.median

    @property
    def spread(self) -> float:
        timings = [e.timing for e in self.entries if e.timing is not None]
        return max(((t.high - t.low) / t.median for t in timings), default=0.0)


@dataclass(frozen=True)
class Report:
    """A whole run. ``complete`` is False while rows are still to come."""

    environment: Mapping[str, str]
    command: str
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    complete: bool = False
    schema: int = field(default=1)

    def to_json(self) -> str:
        data = asdict(self)
        for row, out in zip(self.rows, data["rows"], strict=True):
            out["mm_tflops"] = row.mm_tflops
            out["mm"] = _timing(row.mm)
            for entry, e in zip(row.entries, out["entries"], strict=True):
                e["timing"] = _timing(entry.timing)
                e["tflops"], e["fraction_of_mm"] = row.tflops(entry), row.fraction(entry)
                e["speedup_over_best_eager"] = row.speedup(entry)
        return json.dumps(data, indent=1) + "\n"

    def to_markdown(self) -> str:
        return "\n".join(_markdown(self)) + "\n"

    def write(self, folder: Path, name: str = "bench") -> tuple[Path, Path]:
        """``name.json`` and ``name.md`` in ``folder``, each replaced as a whole."""
        paths = folder / f"{name}.json", folder / f"{name}.md"
        write_atomically(paths[0], self.to_json())
        write_atomically(paths[1], self.to_markdown())
        return paths


def _timing(t: Timing | None) -> dict[str, Any] | None:
    if t is None:
        return None
    times = {"median": t.median, "low": t.low, "high": t.high}
    return {f"{k}_ms": 1e3 * v for k, v in times.items()} | {"repeats": len(t.seconds), "calls": t.calls}


def write_atomically(path: Path, text: str) -> None:
    """Write under a temporary name beside ``path``, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as f:
        f.write(text)
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _markdown(report: Report) -> Iterator[str]:
    yield "# cnnfast against its peers"
    yield ""
    yield f"Written by `{report.command}`. Do not edit."
    yield ""
    for name, value in report.environment.items():
        yield f"- {name}: {value}"
    if not report.complete:
        yield "- **incomplete: the run was interrupted**"
    yield ""
    for note in report.notes:
        yield f"{note}"
        yield ""
    if not report.rows:
        return
    yield "## cnnfast"
    yield ""
    yield "Times cnnfast is faster than each of the others (below 1: slower). Best eager: NCHW or channels_last."
    yield ""
    yield from _summary(report.rows)
    yield ""
    slower = [
        f"{row.name}: {name} {ratio:.2f}x"
        for row in report.rows
        for name, eager in OURS.items()
        if (entry := row.entry(name)) is not None and (ratio := row.speedup(entry, eager)) is not None and ratio < 1
    ]
    if any(row.mm is not None for row in report.rows):
        yield (
            "Slower than eager (the best of both formats; in NCHW, eager NCHW): "
            + ("; ".join(slower) or "nowhere")
            + "."
        )
    unsteady = [row.name for row in report.rows if row.spread > UNSTEADY]
    if unsteady:
        yield ""
        yield f"Unsteady (quartiles more than {UNSTEADY:.0%} apart, other work ran): {'; '.join(unsteady)}."
    for row in report.rows:
        yield ""
        yield from _detail(row)


def _table(head: list[str], body: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("---" if i == 0 else "---:" for i in range(len(head))) + "|"
    for line in body:
        yield "| " + " | ".join(line) + " |"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _summary(rows: tuple[Row, ...]) -> Iterator[str]:
    ours = next((name for name in OURS if any(row.entry(name) for row in rows)), "cnnfast")
    compiled = tuple(dict.fromkeys(e.name for row in rows for e in row.entries if e.name.startswith("torch.compile")))
    others = [("best eager", EAGER), ("best torch.compile", compiled)]
    others += [(name, (name,)) for name in ("onnxruntime", "OpenVINO") if any(row.entry(name) for row in rows)]
    body = []
    for row in rows:
        entry = row.entry(ours)
        if entry is None:
            continue
        ms = entry.status if entry.timing is None else f"{1e3 * entry.timing.median:.3f}"
        rate = row.fraction(entry)
        ratios = [_times(row.speedup(entry, names)) for _, names in others]
        body.append([row.name, ms, *ratios, "" if rate is None else f"{rate:.2f}", entry.path])
    yield from _table(["", f"{ours}, ms", *(f"over {name}" for name, _ in others), "of torch.mm", "path"], body)


def _detail(row: Row) -> Iterator[str]:
    mm = "" if row.mm_tflops is None else f", torch.mm ({row.mm_size} squared) {row.mm_tflops:.3f} TFLOP/s"
    yield f"### {row.name}"
    yield ""
    yield f"{row.title}; {row.macs / 1e6:.1f} M multiply-adds{mm}; error allowed {row.tolerance:.1e}."
    yield ""
    body = []
    for e in row.entries:
        error = "" if e.error is None else f"{e.error:.1e}"
        if e.timing is None:
            body.append([e.name, f"{e.status}: {e.note}", "", "", "", "", error, e.path])
            continue
        rate, part = row.tflops(e), row.fraction(e)
        body.append(
            [
                e.name,
                f"{1e3 * e.timing.median:.3f}",
                f"{1e3 * e.timing.low:.3f} to {1e3 * e.timing.high:.3f}",
                f"{rate:.3f}",
                "" if part is None else f"{part:.2f}",
                _times(row.speedup(e)),
                error,
                e.path,
            ]
        )
    head = ["", "ms, median", "quartiles", "TFLOP/s", "of torch.mm", "over best eager", "error", "path"]
    yield from _table(head, body)


# --- the machine ------------------------------------------------------------------------------------------------------


def _commit() -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git repository)"
    return f"{commit} and uncommitted changes" if changed else commit


def environment(device: str = "cpu") -> dict[str, str]:
    """Date, hardware, versions and commit, by name. Nothing that identifies the machine or its owner."""
    limits = {
        k: os.environ[k]
        for k in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
        if k in os.environ
    }
    isa = f"{cpu.instruction_set().name} (oneDNN), {torch.backends.cpu.get_cpu_capability()} (ATen)"
    if limits:
        isa += ", limited by " + " ".join(f"{k}={v}" for k, v in limits.items())
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": f"{env.cpu_name()}, {os.cpu_count()} CPUs",
        "instruction set": isa,
        "threads": str(torch.get_num_threads()),
        "load at the start": f"{os.getloadavg()[0]:.1f} (1 minute average)" if hasattr(os, "getloadavg") else "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    found |= {name: env.package_version(name) for name in ("triton", "onnxruntime", "openvino")}
    if device == "cuda":
        found |= {"GPU": "; ".join(env.cuda_devices()), "CUDA": str(torch.version.cuda)}
        found["cuDNN"] = str(torch.backends.cudnn.version())
    return found | {"cnnfast": env.__version__, "commit": _commit()}


def machine_name(device: str = "cpu") -> str:
    """The folder of this machine's results: the GPU, or the processor and its instruction set."""
    if device == "cuda":
        text = torch.cuda.get_device_name()
    else:
        text = f"{re.sub(r'@.*', '', env.cpu_name())} {cpu.instruction_set().name}"
    text = re.sub(r"\((R|TM)\)|\bCPU\b", " ", text, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
