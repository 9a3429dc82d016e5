"""What a comparison found: as values and as JSON; `markdown` and `plots` show it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from cnnfast import cpu, env
from cnnfast.files import write_atomically
from cnnfast.timing import Timing

from .markdown import markdown
from .peers import EAGER
from .rows import OTHERS, OURS, Entry, Row

__all__ = ["Entry", "Report", "Row", "environment", "machine_name"]


@dataclass(frozen=True)
class Report:
    """A whole run. ``complete`` is False while rows are still to come."""

    environment: Mapping[str, str]
    command: str
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    complete: bool = False
    schema: int = 2

    def to_json(self) -> str:
        """Indented down to the entries, of which each has one line; six digits."""
        top = {key: value for key, value in asdict(self).items() if key != "rows"}
        rows = [_row(row) for row in self.rows]
        return f"{json.dumps(top, indent=1)[:-2]},\n {_dumped('rows', rows)}\n}}\n"

    def write(self, folder: Path, name: str = "bench") -> tuple[Path, Path]:
        """``name.json`` and ``name.md`` in ``folder``, each replaced as a whole."""
        paths = folder / f"{name}.json", folder / f"{name}.md"
        write_atomically(paths[0], self.to_json())
        write_atomically(paths[1], markdown(self))
        return paths


def _row(row: Row) -> str:
    limit = row.limit
    data = {f.name: getattr(row, f.name) for f in fields(row) if f.name not in ("entries", "mm")}
    data |= {"mm_tflops": row.mm_tflops, "mm": _timing(row.mm)}
    data["limit"] = None if limit is None else {"ms": 1e3 * limit.seconds, "by": limit.by}
    entries = [json.dumps(_rounded(_entry(row, e))) for e in row.entries]
    return f"{json.dumps(_rounded(data))[:-1]},\n {_dumped('entries', entries)}}}"


def _dumped(key: str, items: list[str]) -> str:
    return f'"{key}": [\n' + ",\n".join(items) + "]"


def _entry(row: Row, entry: Entry) -> dict[str, Any]:
    """Ratios of ours over every other, of the others over the best eager."""
    labels = OTHERS if entry.name in OURS else [label for label in OTHERS if OTHERS[label] == EAGER]
    ratios = {label: row.speedup(entry, OTHERS[label]) for label in labels}
    data = {f.name: getattr(entry, f.name) for f in fields(entry)} | {"timing": _timing(entry.timing)}
    data |= {"tflops": row.tflops(entry), "fraction_of_mm": row.fraction(entry)}
    data |= {"fraction_of_limit": row.of_limit(entry)}
    return data | {"speedup_over": {label: asdict(r) for label, r in ratios.items() if r is not None}}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return {k: _rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


def _timing(t: Timing | None) -> dict[str, Any] | None:
    if t is None:
        return None
    times = {"median": t.median, "low": t.low, "high": t.high}
    return {f"{k}_ms": 1e3 * v for k, v in times.items()} | {"repeats": len(t.seconds), "calls": t.calls}


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
