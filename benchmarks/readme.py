"""The README's tables, rendered from results files: ``python -m benchmarks.readme [bench.json [models.json]]``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from cnnfast.files import write_atomically

from .models import columns_of, dtype_of, heading

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ROOT / "benchmarks" / "results" / "amd-epyc-avx512-bf16" / "bench.json"
MODELS = DEFAULT.with_name("models.json")
# Whole generators and blocks, as a reader knows them.
NAMES = {
    "dcgan64": "DCGAN 64x64",
    "dcgan128": "DCGAN 128x128",
    "srvgg": "SRVGG x4, 120x90",
    "waifu2x": "waifu2x upconv_7, 142x142",
    "vocoder": "HiFi-GAN's upsampling, 100 frames",
    "style": "style transfer's decoder, 256x256",
    "upsample256": "upsample x2 + 3x3, 256 at 64x64",
    "vae.up1": "the same, VAE decoder, 512 at 64x64",
    "vae.up2": "the same, VAE decoder, 512 at 128x128",
    "vae.up3": "the same, VAE decoder, 256 at 256x256",
    "rrdb.up1": "the same, RRDB, 64 at 64x64",
    "rrdb.up2": "the same, RRDB, 64 at 128x128",
    "style.up1": "the same, InstanceNorm, 128 to 64 at 64x64",
    "style.up2": "the same, InstanceNorm, 64 to 32 at 128x128",
    "gan3d": "3D-GAN 64x64x64",
    "unet3d.nearest": "upsample x2 + 3x3x3, InstanceNorm, 64 to 32 at 32x32x32",
}
COLUMNS = {
    "eager": "eager",
    "eager channels_last": "eager channels_last",
    "torch.compile": "compile",
    "torch.compile channels_last": "compile channels_last",
    "torch.compile max-autotune": "compile max-autotune",
    "onnxruntime": "onnxruntime",
    "OpenVINO": "OpenVINO",
    "cnnfast torch.compile": "cnnfast under compile",
    "cnnfast": "**cnnfast**",
    "cnnfast frozen": "**frozen**",
}
OWN = ("cnnfast", "cnnfast frozen")
_BLOCK = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.S)
_MODELS_BLOCK = re.compile(r"(<!-- models -->\n).*?(<!-- /models -->)", re.S)


def _cell(entry: dict[str, Any] | None) -> str:
    timing = entry and entry.get("timing")
    return f"{timing['median_ms']:.2f}" if timing else "-"


def _ratio(ours: dict[str, Any] | None) -> str:
    """Ours over the best eager, with its spread where the results have one (schema 1 has none)."""
    if not ours or not ours.get("timing"):
        return "-"
    if "speedup_over" not in ours:
        return f"{ours['speedup_over_best_eager']:.2f}x"
    ratio = ours["speedup_over"].get("best eager")
    if ratio is None:
        return "-"
    spread = f" [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio["turns"] else ""
    return f"{ratio['median']:.2f}x{spread}"


def _lines(results: dict[str, Any]) -> Iterator[str]:
    env = results["environment"]
    rows = [row for row in results["rows"] if row["suite"] in ("generator", "upsample")]
    columns = [name for name in COLUMNS if any(e["name"] == name for row in rows for e in row["entries"])]
    yield (
        f"{env['processor']}, {env['instruction set']}, {env['threads']} threads, torch {env['torch']}, "
        f"onnxruntime {env['onnxruntime']}, OpenVINO {env['openvino']}; {env['date']}. Median ms:"
    )
    yield ""
    own = [name for name in OWN if name in columns]
    over = ["over the best eager" if name == "cnnfast" else "frozen over the best eager" for name in own]
    yield "| | " + " | ".join((*(COLUMNS[c] for c in columns), *over)) + " |"
    yield "|---|" + "---:|" * (len(columns) + len(own))
    for row in rows:
        entries = {e["name"]: e for e in row["entries"]}
        cells = [f"**{_cell(entries.get(c))}**" if c in OWN else _cell(entries.get(c)) for c in columns]
        name = f"{NAMES.get(row['case'], row['case'])}, {row['dtype']}, batch {row['batch']}"
        yield f"| {name} | " + " | ".join((*cells, *(_ratio(entries.get(c)) for c in own))) + " |"
    yield ""
    if "cnnfast frozen" in own:
        yield (
            'All in channels-last for cnnfast. "Frozen": with `cnnfast.freeze(model)` weights count as constant, as '
            "they do for onnxruntime and OpenVINO; without, each call sees whether somebody has written to them."
        )
        yield ""
    yield (
        "In brackets the 10th and 90th percentile of ratios within one turn. Layers, NCHW, quartiles, limits, memory "
        "and plots: [the results](benchmarks/results)."
    )


def table(results: dict[str, Any]) -> str:
    """Milliseconds of every peer and ours for generators and blocks, and ours over the better of the eager columns."""
    return "\n".join(_lines(results)) + "\n"


def models_table(results: dict[str, Any]) -> str:
    """Of each accelerated model: how many times faster it is than the better of eager and eager channels_last, in each
    dtype, on one and more threads, and how many of its convolutions are fused."""
    env = results["environment"]
    rows: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for row in results["rows"]:
        rows.setdefault(row["title"], {})[dtype_of(row), row["threads"]] = row
    columns = columns_of(results["rows"])
    lines = [
        f"{env['processor']}, {env['instruction set']}, torch {env['torch']}; {env['date']}. Inference, float32 unless "
        "said otherwise, over the better of eager and eager channels_last in the same dtype; freed memory "
        f"{env.get('freed memory', 'as the C library does')}:",
        "",
        "| | " + " | ".join(heading(*of) for of in columns) + " | fused of found |",
        "|---|" + "---:|" * (len(columns) + 1),
    ]
    for title, of in rows.items():
        known = next(iter(of.values()))
        cells = [_of_model(of.get(column)) for column in columns]
        lines.append(f"| {title} | {' | '.join(cells)} | {known['fused']} of {known['found']} |")
    means = []
    for column in columns:
        entries = [_accelerated(of.get(column)) for of in rows.values()]
        ratios = [entry["over_best_eager"]["median"] for entry in entries if entry.get("over_best_eager")]
        means.append(f"{geometric_mean(ratios):.2f}x" if ratios else "-")
    lines.append(f"| geometric mean | {' | '.join(means)} | |")
    return "\n".join(lines) + "\n"


def _accelerated(row: dict[str, Any] | None) -> dict[str, Any]:
    return next((e for e in row["entries"] if e["name"] == "accelerate"), {}) if row else {}


def _of_model(row: dict[str, Any] | None) -> str:
    entry = _accelerated(row)
    ratio = entry.get("over_best_eager")
    if not ratio:
        return entry.get("note") or "-"
    return f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def render(readme: str, results: dict[str, Any], models: dict[str, Any] | None = None) -> str:
    """``readme`` with its blocks of times replaced."""
    readme = _BLOCK.sub(lambda m: m.group(1) + table(results) + m.group(2), readme)
    if models is None:
        return readme
    return _MODELS_BLOCK.sub(lambda m: m.group(1) + models_table(models) + m.group(2), readme)


def main() -> None:
    sources = [Path(name) for name in sys.argv[1:]]
    bench, models, *_ = [*sources, *(DEFAULT, MODELS)[len(sources) :]]
    path = ROOT / "README.md"
    found = json.loads(models.read_text()) if models.exists() else None
    write_atomically(path, render(path.read_text(), json.loads(bench.read_text()), found))


if __name__ == "__main__":
    main()
