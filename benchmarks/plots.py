"""The plots of a results file: ``python -m benchmarks.plots bench.json``. Nothing is written without matplotlib."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnfast.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write"]

Results = dict[str, Any]

DPI = 100
OURS = "cnnfast"
# One colour for each that is compared, the same in every plot.
COLOURS = {
    "best eager": "#7f7f7f",
    "eager": "#bbbbbb",
    "eager channels_last": "#7f7f7f",
    "best torch.compile": "#e69f00",
    "torch.compile channels_last": "#e69f00",
    "onnxruntime": "#009e73",
    "OpenVINO": "#cc79a7",
    OURS: "#0072b2",
}
PEERS = ("best torch.compile", "onnxruntime", "OpenVINO")
MARKERS = {"generator": "s", "upsample": "^", "layers": "o"}


def write(results: Results | str, folder: Path, name: str = "bench") -> tuple[Path, ...]:
    """``name_speedup.png``, ``name_roofline.png`` and ``name_batch.png`` in ``folder``, those that have something to
    show. ``results``: a report's JSON, as text or read."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return ()
    data = json.loads(results) if isinstance(results, str) else results
    written = []
    for kind, draw in (("speedup", _speedup), ("roofline", _roofline), ("batch", _batch)):
        figure = draw(data)
        if figure is None:
            continue
        path = folder / f"{name}_{kind}.png"
        write_atomically(path, _png(figure))
        written.append(path)
    return tuple(written)


def _png(figure: Figure) -> bytes:
    """With a palette: a third of the size."""
    from PIL import Image  # which matplotlib requires

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    Image.open(drawn).convert("RGB").quantize(64).save(packed, format="png", optimize=True)
    return packed.getvalue()


def _figure(width: float, height: float, *shape: int, **keywords: Any) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(*shape, squeeze=False, **keywords)
    return figure, list(axes.flat)


def _entry(row: Results, name: str) -> Results | None:
    return next((e for e in row["entries"] if e["name"] == name and e["timing"]), None)


def _dtypes(rows: list[Results]) -> list[str]:
    return list(dict.fromkeys(row["dtype"] for row in rows))


def _caption(results: Results) -> str:
    env = results["environment"]
    return "; ".join(env[key] for key in ("processor", "GPU", "date") if key in env)


# --- speed-ups --------------------------------------------------------------------------------------------------------


def _speedup(results: Results) -> Figure | None:
    """A bar per row, its spread, and what the other peers reach; all over the best eager."""
    rows = [row for row in results["rows"] if (e := _entry(row, OURS)) and "best eager" in e["speedup_over"]]
    if not rows:
        return None
    dtypes = _dtypes(rows)
    labels = list(dict.fromkeys((row["suite"], row["case"], row["batch"]) for row in rows))
    size = 4.6 * len(dtypes) + 1, 1.5 + 0.155 * len(labels)
    figure, axes = _figure(*size, 1, len(dtypes), sharey=True, sharex=True)
    at = {label: -i for i, label in enumerate(labels)}
    for ax, dtype in zip(axes, dtypes, strict=True):
        own = [row for row in rows if row["dtype"] == dtype]
        ys = [at[row["suite"], row["case"], row["batch"]] for row in own]
        ratios = [_entry(row, OURS)["speedup_over"]["best eager"] for row in own]  # type: ignore[index]
        errors = [[r["median"] - r["low"] for r in ratios], [r["high"] - r["median"] for r in ratios]]
        ax.barh(ys, [r["median"] - 1 for r in ratios], left=1, height=0.75, color=COLOURS[OURS], label=OURS)
        ax.errorbar([r["median"] for r in ratios], ys, xerr=errors, fmt="none", ecolor="black", elinewidth=0.8)
        for peer, marker in zip(PEERS, ("D", "o", "s"), strict=True):
            points = [(_over_eager(row, peer), y) for row, y in zip(own, ys, strict=True)]
            found = [(x, y) for x, y in points if x is not None]
            if found:
                ax.plot(*zip(*found, strict=True), marker, color=COLOURS[peer], markersize=3.5, label=peer)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}x")
        ax.set_title(dtype, fontsize=9)
        ax.set_xlabel("times faster than the best eager (10th to 90th percentile of paired ratios)", fontsize=7)
        ax.set_ylim(-len(labels) + 0.4, 0.6)
        ax.grid(axis="x", linewidth=0.3)
        ax.tick_params(labelsize=7)
    axes[0].set_yticks([at[label] for label in labels], [f"{case}, batch {n}" for _, case, n in labels])
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, fontsize=7, ncols=len(handles), loc="outside lower center")
    figure.suptitle(f"Speed-up over the best eager: {_caption(results)}", fontsize=9)
    return figure


def _over_eager(row: Results, label: str) -> float | None:
    """What ``label`` reaches over the best eager: our ratio over eager, over ours over ``label``."""
    ours = _entry(row, OURS)
    if ours is None or not {label, "best eager"} <= set(ours["speedup_over"]):
        return None
    return ours["speedup_over"]["best eager"]["median"] / ours["speedup_over"][label]["median"]  # type: ignore[no-any-return]


# --- roofline ---------------------------------------------------------------------------------------------------------


def _roofline(results: Results) -> Figure | None:
    """Every row over its arithmetic intensity: ours, the best eager below or above it, and the two ceilings."""
    rows = [row for row in results["rows"] if _entry(row, OURS) and row.get("limit")]
    if not rows:
        return None
    dtypes = _dtypes(rows)
    figure, axes = _figure(5.5 * len(dtypes) + 0.5, 5.2, 1, len(dtypes))
    for ax, dtype in zip(axes, dtypes, strict=True):
        own = [row for row in rows if row["dtype"] == dtype]
        intensities = [2 * row["macs"] / row["least_bytes"] for row in own]
        peaks = sorted(row["mm_tflops"] for row in own)
        peak, bandwidth = peaks[len(peaks) // 2], own[0]["bandwidth"] / 1e12
        xs = [min(intensities) / 1.5, peak / bandwidth, max(*intensities, 1.1 * peak / bandwidth) * 1.5]
        ax.plot(xs, [min(peak, x * bandwidth) for x in xs], color="black", linewidth=1)
        ax.axhspan(peaks[0], peaks[-1], color="black", alpha=0.08, linewidth=0)
        for suite, marker in MARKERS.items():
            found = [(x, row) for x, row in zip(intensities, own, strict=True) if row["suite"] == suite]
            for x, row in found:
                ours, eager = _entry(row, OURS), _best_eager(row)
                assert ours is not None
                if eager is not None:
                    ax.plot([x, x], [eager, ours["tflops"]], color="#999999", linewidth=0.5, zorder=1)
                    ax.plot(x, eager, marker, color=COLOURS["best eager"], markersize=3.5, fillstyle="none")
                ax.plot(x, ours["tflops"], marker, color=COLOURS[OURS], markersize=4)
            if found:
                ax.plot([], [], marker, color=COLOURS[OURS], markersize=4, label=f"cnnfast, {suite}")
        ax.plot([], [], "o", color=COLOURS["best eager"], fillstyle="none", markersize=3.5, label="best eager")
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(
            f"{dtype}: torch.mm {peak:.3g} TFLOP/s (band: over the run), copy {1e3 * bandwidth:.3g} GB/s", fontsize=8
        )
        ax.set_xlabel("FLOP after decomposition / least byte", fontsize=8)
        ax.set_ylabel("TFLOP/s", fontsize=8)
        ax.grid(linewidth=0.3, which="major")
        ax.tick_params(labelsize=7)
        ax.legend(fontsize=7, loc="lower right")
    figure.suptitle(f"Roofline, caches warm: {_caption(results)}", fontsize=9)
    return figure


def _best_eager(row: Results) -> float | None:
    rates = [e["tflops"] for e in row["entries"] if e["name"] in ("eager", "eager channels_last") and e["timing"]]
    return max(rates, default=None)


# --- time against batch size ------------------------------------------------------------------------------------------


def _series(rows: list[Results]) -> Iterator[tuple[str, str, list[Results]]]:
    """(case, dtype, rows by batch) of what was timed at several batch sizes, whole generators first."""
    order = sorted(rows, key=lambda row: list(MARKERS).index(row["suite"]) if row["suite"] in MARKERS else 9)
    keys = dict.fromkeys((row["case"], row["dtype"]) for row in order)
    for case, dtype in keys:
        own = sorted((r for r in rows if (r["case"], r["dtype"]) == (case, dtype)), key=lambda r: r["batch"])
        if len(own) > 1:
            yield case, dtype, own


def _batch(results: Results, most: int = 4) -> Figure | None:
    """Time of one image against batch size, of the first ``most`` cases with several."""
    series = list(_series([row for row in results["rows"] if _entry(row, OURS)]))
    if not series:
        return None
    cases = list(dict.fromkeys(case for case, _, _ in series))[:most]
    dtypes = list(dict.fromkeys(dtype for _, dtype, _ in series))
    figure, axes = _figure(2.9 * len(cases) + 0.4, 2.5 * len(dtypes) + 0.7, len(dtypes), len(cases))
    where = {(d, c): axes[i * len(cases) + j] for i, d in enumerate(dtypes) for j, c in enumerate(cases)}
    for case, dtype, rows in series:
        if case not in cases:
            continue
        ax = where.pop((dtype, case))
        for name, colour in COLOURS.items():
            points = [(row["batch"], e["timing"], row["batch"]) for row in rows if (e := _entry(row, name))]
            if not points:
                continue
            x = [p[0] for p in points]
            y = [p[1]["median_ms"] / p[2] for p in points]
            errors = [[(p[1]["median_ms"] - p[1]["low_ms"]) / p[2] for p in points],
                      [(p[1]["high_ms"] - p[1]["median_ms"]) / p[2] for p in points]]  # fmt: skip
            ax.errorbar(x, y, yerr=errors, color=colour, marker="o", markersize=3, linewidth=1, label=name)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xticks([row["batch"] for row in rows], [str(row["batch"]) for row in rows])
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        ax.yaxis.set_minor_formatter(lambda y, _: f"{y:g}")
        ax.set_title(f"{case}, {dtype}", fontsize=8)
        ax.grid(linewidth=0.3, which="both")
        ax.tick_params(labelsize=6, which="both")
        ax.set_xlabel("batch", fontsize=7)
        ax.set_ylabel("ms per image", fontsize=7)
    for ax in where.values():
        ax.set_visible(False)
    handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, fontsize=7, ncols=len(handles), loc="outside lower center")
    figure.suptitle(f"Time of one image (median, quartiles): {_caption(results)}", fontsize=9)
    return figure


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m benchmarks.plots RESULTS.json", file=sys.stderr)
        return 2
    source = Path(sys.argv[1])
    for path in write(source.read_text(), source.parent, source.stem):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
