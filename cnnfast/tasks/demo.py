"""``python -m cnnfast demo``: faces by a trained generator, in plain PyTorch and in cnnfast, compared and timed.

Needs the extra ``demo`` (matplotlib, pillow, tqdm), imported where it is used.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..files import make_output_dir, write_atomically
from ..generators import create_model
from ..gpu.devices import tf32_convolutions
from ..gpu.warmup import warmup
from ..messages import UsageError
from ..nn.layers import Sequential
from ..timing import Timing, measure
from . import env
from .machine import REQUIRES, choose_device, device_text, require
from .plots import grid

__all__ = ["FLOAT32_TOLERANCE", "Options", "Row", "run"]

# Largest |cnnfast - PyTorch| over largest |PyTorch| that float32 may show: a few roundings of sums of 8192 products.
FLOAT32_TOLERANCE = 1e-5

FACES = 64
DTYPES = (torch.float32, torch.bfloat16)
BATCHES = (1, 16)
CANDIDATES = ("eager", "eager channels_last", "cnnfast")

UNSTEADY = 0.25  # quartiles apart by this part of the median: neighbours, not the network
FEW = 5  # repeats below this show no spread

# Builds the generator in eval mode, out of the given container of layers.
Builder = Callable[[type[nn.Sequential]], nn.Module]


@dataclass(frozen=True)
class Options:
    """``repeats``: interleaved timings of each candidate; ``device`` None: CUDA where torch can use it."""

    output: Path = Path("out")
    seed: int = 0
    repeats: int = 20
    device: str | None = None
    weights_file: Path | None = None


@dataclass(frozen=True)
class Row:
    """Times of one dtype and batch size, by candidate."""

    dtype: torch.dtype
    batch: int
    times: Mapping[str, Timing]

    @property
    def title(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, batch {self.batch}"

    @property
    def ratio(self) -> float:
        """How many times faster cnnfast is than the best of the others."""
        best = min(t.median for name, t in self.times.items() if name != "cnnfast")
        return best / self.times["cnnfast"].median


def run(options: Options, build: Builder | None = None) -> int:
    """The whole demonstration; prints to standard output and writes ``faces.png`` and ``timing.png``.

    Returns the exit status: 1 where float32 differs from plain PyTorch by more than `FLOAT32_TOLERANCE`. CnnfastError
    (of it UsageError) and OSError where it cannot run here, before anything is computed.
    """
    require("the demo", REQUIRES)
    device = choose_device(options.device)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: times are taken on the CPU and on CUDA devices")
    if options.weights_file is not None and not options.weights_file.expanduser().is_file():
        raise UsageError(f"--weights-file: {options.weights_file} is not a file")
    make_output_dir(options.output)
    print(f"cnnfast {env.__version__}, torch {torch.__version__}, {device_text(device)}")
    if build is None:

        def build(container: type[nn.Sequential]) -> nn.Module:
            return create_model("dcgan_faces", pretrained=True, weights_file=options.weights_file, sequential=container)

    z = torch.randn(FACES, 100, 1, 1, generator=torch.Generator().manual_seed(options.seed))
    pictures, error = _compare(build, z, device)
    rows = _measure(build, z, device, options.repeats)
    print("\n" + table(rows))
    draw_faces(options.output / "faces.png", pictures)
    draw_times(options.output / "timing.png", rows, device_text(device))
    print(f"\nwrote {options.output / 'faces.png'} and {options.output / 'timing.png'}")
    if not error <= FLOAT32_TOLERANCE:
        print(f"FAILED: float32 relative error {error:.3g} is above {FLOAT32_TOLERANCE:g}", file=sys.stderr)
        return 1
    return 0


# --- comparison -------------------------------------------------------------------------------------------------------


def _compare(build: Builder, z: torch.Tensor, device: torch.device) -> tuple[dict[str, torch.Tensor], float]:
    """The float32 pictures of both, (N, 3, H, W) on the CPU, and cnnfast's relative error. Prints what it found."""
    images = {}
    with tf32_convolutions(False):  # PyTorch's default for convolutions on a GPU would hide differences
        for name, container in (("plain PyTorch", nn.Sequential), ("cnnfast", Sequential)):
            for dtype in DTYPES:
                model, x = build(container).to(device, dtype), z.to(device, dtype)
                warmup(model, x)  # what is compared are packed weights
                with torch.inference_mode():
                    images[name, dtype] = model(x).float().cpu()
    expected = images["plain PyTorch", torch.float32]
    largest, error = difference(images["cnnfast", torch.float32], expected)
    print(f"\n{len(z)} faces, the same weights and noise, cnnfast against plain PyTorch:")
    print(f"  float32:  largest difference {largest:.2e}, relative error {error:.2e}")
    low = {name: difference(images[name, torch.bfloat16], expected)[0] for name in ("plain PyTorch", "cnnfast")}
    print(
        f"  bfloat16: largest difference to float32 {low['cnnfast']:.3f}"
        f" (plain PyTorch's own bfloat16: {low['plain PyTorch']:.3f})"
    )
    return {name: image for (name, dtype), image in images.items() if dtype == torch.float32}, error


def difference(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(largest absolute difference, the same over the largest expected magnitude)."""
    largest = (actual.double() - expected.double()).abs().max().item()
    return largest, largest / expected.double().abs().max().item()


# --- times ------------------------------------------------------------------------------------------------------------


def _measure(build: Builder, z: torch.Tensor, device: torch.device, repeats: int) -> list[Row]:
    from tqdm import tqdm

    rows = []
    with tqdm(total=len(DTYPES) * len(BATCHES) * repeats, desc="timing", leave=False, disable=None) as bar:
        for dtype in DTYPES:
            models = {
                "eager": build(nn.Sequential).to(device, dtype),
                "eager channels_last": _channels_last(build(nn.Sequential).to(device, dtype)),
                "cnnfast": _channels_last(build(Sequential).to(device, dtype)),
            }
            for batch in BATCHES:
                x = z[:batch].to(device, dtype)
                calls = {name: (lambda model=model, x=x: model(x)) for name, model in models.items()}
                with torch.inference_mode():
                    times = measure(calls, repeats=repeats, device=device, on_repeat=lambda: bar.update())
                rows.append(Row(dtype, batch, times))
    return rows


def _channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def table(rows: list[Row]) -> str:
    """The times as text: milliseconds per batch, medians with quartiles."""
    from tabulate import tabulate  # here: it is slow to import

    head = ["", *CANDIDATES, "cnnfast against the best eager"]
    body = [[row.title, *(_cell(row.times[name]) for name in CANDIDATES), f"{row.ratio:.2f}x"] for row in rows]
    lines = [tabulate(body, head, tablefmt="plain", disable_numparse=True)]
    repeats = len(next(iter(rows[0].times.values())).seconds)
    lines.append(f"ms per batch: median [quartiles] of {repeats} interleaved repeats; above 1x cnnfast is faster")
    spread = max((t.high - t.low) / t.median for row in rows for t in row.times.values())
    if repeats < FEW:
        lines.append(f"NOTE: too few repeats ({repeats}) to know the spread: take ratios from --repeats {FEW} or more")
    if spread > UNSTEADY:
        lines.append("NOTE: the spread is large: other work runs on this machine; repeat when it is quiet")
    return "\n".join(lines)


def _cell(timing: Timing) -> str:
    return f"{1e3 * timing.median:.2f} [{1e3 * timing.low:.2f}, {1e3 * timing.high:.2f}]"


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_faces(path: Path, pictures: Mapping[str, torch.Tensor]) -> None:
    """One PNG: each set of pictures as a grid under its name, side by side, pixel for pixel."""
    from PIL import Image, ImageDraw, ImageFont

    grids = {name: grid(images) for name, images in pictures.items()}
    title, margin = 30, 12
    height = title + max(g.shape[0] for g in grids.values()) + margin
    width = margin + sum(g.shape[1] + margin for g in grids.values())
    sheet = Image.new("RGB", (width, height), "white")
    pen, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(16), margin
    for name, pixels in grids.items():
        pen.text((left + pixels.shape[1] // 2, title // 2), name, fill="black", font=font, anchor="mm")
        sheet.paste(Image.fromarray(pixels), (left, title))
        left += pixels.shape[1] + margin
    _write(path, lambda buffer: sheet.save(buffer, format="PNG"))


def draw_times(path: Path, rows: list[Row], device: str) -> None:
    """One PNG: a panel of bars for each dtype and batch size (their scales differ), whiskers at the quartiles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.0 * len(rows), 3.6), layout="constrained")
    colours = {"eager": "#9aa5b1", "eager channels_last": "#5b7083", "cnnfast": "#e4572e"}
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        times = [row.times[name] for name in CANDIDATES]
        medians = np.array([1e3 * t.median for t in times])
        whiskers = np.abs(np.array([[1e3 * t.low for t in times], [1e3 * t.high for t in times]]) - medians)
        labels = [name.replace(" ", "\n") for name in CANDIDATES]
        bars = axes.bar(labels, medians, yerr=whiskers, capsize=4, color=[colours[name] for name in CANDIDATES])
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.margins(y=0.15)
        axes.set_title(f"{row.title}: {row.ratio:.2f}x")
        axes.set_ylabel("ms per batch")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"DCGAN 64x64 on {device} (lower is better; medians, quartiles)", fontsize=10)
    _write(path, lambda buffer: figure.savefig(buffer, format="png", dpi=120))


def _write(path: Path, save: Callable[[io.BytesIO], object]) -> None:
    buffer = io.BytesIO()
    save(buffer)
    write_atomically(path, buffer.getvalue())
