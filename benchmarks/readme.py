"""The README's table of times, rendered from a results file: ``python -m benchmarks.readme [bench.json]``."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "benchmarks" / "results" / "intel-xeon-processor-amx" / "bench.json"
CASES = {"dcgan64": "DCGAN generator, 64x64", "upsample256": "upsample x2 + 3x3, 256 channels at 64x64"}
COLUMNS = ("eager", "eager channels_last", "torch.compile", "torch.compile channels_last", "onnxruntime", "OpenVINO")
_BLOCK = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.S)


def _cell(entry: dict[str, Any] | None) -> str:
    timing = entry and entry.get("timing")
    return f"{timing['median_ms']:.2f}" if timing else "-"


def table(results: dict[str, Any]) -> str:
    """Milliseconds of every peer, ours, and ours against the better of the two eager columns."""
    env = results["environment"]
    out = [f"{env['processor']}, {env['instruction set']}, {env['threads']} threads, torch {env['torch']}, "]
    out[0] += f"onnxruntime {env['onnxruntime']}, OpenVINO {env['openvino']}; {env['date']}. Median ms:"
    out += ["", "| | " + " | ".join((*COLUMNS, "**cnnfast**", "over the best eager")) + " |"]
    out.append("|---|" + "---:|" * (len(COLUMNS) + 2))
    for row in results["rows"]:
        if row["case"] not in CASES:
            continue
        entries = {e["name"]: e for e in row["entries"]}
        ours = entries["cnnfast"]
        cells = [_cell(entries.get(name)) for name in COLUMNS]
        ratio = f"{ours['speedup_over_best_eager']:.2f}x" if ours.get("timing") else "-"
        name = f"{CASES[row['case']]}, {row['dtype']}, batch {row['batch']}"
        out.append(f"| {name} | " + " | ".join((*cells, f"**{_cell(ours)}**", ratio)) + " |")
    out += ["", "All in channels-last for cnnfast; layers, NCHW rows and quartiles: [the results](benchmarks/results)."]
    return "\n".join(out) + "\n"


def render(readme: str, results: dict[str, Any]) -> str:
    """``readme`` with its block of times replaced."""
    return _BLOCK.sub(lambda m: m.group(1) + table(results) + m.group(2), readme)


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    path = ROOT / "README.md"
    text = render(path.read_text(), json.loads(source.read_text()))
    with tempfile.NamedTemporaryFile("w", dir=ROOT, delete=False) as f:
        f.write(text)
    os.chmod(f.name, 0o644)
    os.replace(f.name, path)


if __name__ == "__main__":
    main()
