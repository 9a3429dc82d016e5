"""``enhance``: pictures larger, without noise and JPEG's traces. Super-resolution and denoising by trained networks.

`Enhancer` keeps its networks for many pictures; `enhance` is one call. The first network takes noise out where that is
asked for, the second enlarges; where it enlarges by more than was asked, the result is made smaller (bicubic).
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from ..cpu.packing import freeze
from ..dispatch import backend as backend_context
from ..generators import create_model
from ..messages import UsageError
from . import batch, pictures, tiles, user_models
from .data import photograph
from .machine import choose_device, choose_dtype, containers, memory_to_use, require, require_memory
from .pictures import Picture
from .pixels import resized
from .tiles import ImageJob, Means

__all__ = ["MODELS", "Enhancer", "add_command", "enhance", "evaluate", "job_of"]

PACKAGES = MappingProxyType({"pillow": "PIL", "tqdm": "tqdm"})
SCALES, LEVELS = (1, 2, 3, 4), (0, 1, 2, 3)


@dataclass(frozen=True)
class Model:
    """Networks by what they enlarge by, for which pictures they are, and whether they have transposed convolutions."""

    networks: Mapping[int, str]
    about: str
    transposed: bool = False


MODELS: Mapping[str, Model] = MappingProxyType(
    {
        "span": Model({2: "span_x2", 4: "span_x4"}, "photographs, true to the picture (default)"),
        "upconv7": Model({2: "upconv7_x2"}, "photographs, waifu2x's", transposed=True),
        "art": Model({4: "srvgg_x4"}, "drawings, quickly"),
        "art-fine": Model({4: "rrdb_anime_x4"}, "drawings, slowly"),
        "sharp": Model({4: "rrdb_x4"}, "photographs, invents detail; very slowly"),
    }
)
_DEFAULT_MODEL, _DEFAULT_SCALE = "span", 2


@dataclass(frozen=True)
class _Facts:
    """Of a network: what `ImageJob` says of its fields. Halos are receptive fields, by `user_models.reach`; floats
    are what was measured on a CPU, and a third to spare."""

    halo: int
    floats: int
    pads: bool = True
    multiple: int = 1
    differs: str | None = None


_FACTS: Mapping[str, _Facts] = MappingProxyType(
    {
        "span_x2": _Facts(halo=21, floats=1200),
        "span_x4": _Facts(halo=21, floats=1200),
        "cunet": _Facts(halo=28, floats=350, pads=False, multiple=4),
        "upconv7_x2": _Facts(halo=7, floats=500, pads=False),
        "srvgg_x4": _Facts(halo=18, floats=300),
        "rrdb_anime_x4": _Facts(halo=94, floats=3000),
        # It sees 351 pixels around; without those beyond 128 a photograph differs by 2e-7 (beyond 96: 4e-5).
        "rrdb_x4": _Facts(halo=128, floats=3000),
    }
)


def job_of(name: str, network: nn.Module) -> ImageJob:
    """The job of a network that `cnnfast.create_model` made by this name, one of those that enhance pictures."""
    family = "cunet" if name.startswith("cunet") else name
    facts = _FACTS[family]
    means = Means(network.strides, network.mean_map) if family == "cunet" else None  # type: ignore[arg-type]
    return ImageJob(
        name,
        network,
        halo=facts.halo,
        scale=network.config.scale,  # type: ignore[union-attr, arg-type]
        pads=facts.pads,
        multiple=facts.multiple,
        floats=facts.floats,
        means=means,
        differs=facts.differs,
    )


class Enhancer:
    """Makes pictures ``scale`` times as high and wide (1 to 4), and takes noise out of them (``denoise`` 0 to 3).

    ``scale``: None is 2, or 1 where only ``denoise`` is given, or what a model of one's own gives. ``model``: one of
    `MODELS`, or a checkpoint's path (``.pth``, ``.safetensors``: the extra ``models``). ``device`` and ``dtype``
    ("float32", "bfloat16", "float16") None: a GPU where there is one, in float16, else the CPU in float32. ``memory``:
    bytes for a tile, None: half of what is free. ``backend`` as of `cnnfast.backend`.

    UsageError for what is not offered; WeightsError where weights cannot be had.
    """

    def __init__(
        self,
        scale: int | None = None,
        *,
        denoise: int | None = None,
        model: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        backend: str | None = None,
        memory: float | None = None,
        sequential: type[nn.Sequential] | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.memory, self._backend = memory, backend
        made: dict[str, Any] = {} if sequential is None else {"sequential": sequential}
        if denoise is not None and denoise not in LEVELS:
            raise UsageError(f"denoise={denoise}: expected one of {', '.join(map(str, LEVELS))}")
        enlarging = self._enlarging(scale, denoise, model, self.device, made)
        self.scale = scale if scale is not None else enlarging.scale if enlarging is not None else 1
        self.jobs: list[ImageJob] = []
        if denoise is not None:
            name = f"cunet_noise{denoise}"
            self.jobs.append(job_of(name, create_model(name, pretrained=True, **made)))
        if enlarging is not None:
            self.jobs.append(enlarging)
        for job in self.jobs:
            self._place(job)

    @staticmethod
    def _enlarging(
        scale: int | None,
        denoise: int | None,
        model: str | Path | None,
        device: torch.device,
        made: Mapping[str, Any],
    ) -> ImageJob | None:
        if scale is not None and scale not in SCALES:
            raise UsageError(f"scale={scale}: expected one of {', '.join(map(str, SCALES))}")
        name = str(model) if model is not None else _DEFAULT_MODEL
        if name not in MODELS:
            if Path(name).suffix not in user_models.SUFFIXES:
                known, files = ", ".join(MODELS), ", ".join(user_models.SUFFIXES)
                raise UsageError(f"--model {name}: expected one of {known}, or a file ({files})")
            job = user_models.load(Path(name))
            if scale is not None and scale > job.scale:
                raise UsageError(f"--scale {scale}: {job.name} enlarges by {job.scale}")
            return job
        if model is None and (scale == 1 or (scale is None and denoise is not None)):
            if denoise is None:
                raise UsageError("--scale 1 changes nothing by itself: give --denoise 0 to 3, or a --model of your own")
            return None
        wanted = _DEFAULT_SCALE if scale is None and 2 in MODELS[name].networks else scale or 4
        fitting = [n for n in sorted(MODELS[name].networks) if n >= wanted]
        if not fitting:
            raise UsageError(f"--scale {wanted}: {name} enlarges by {max(MODELS[name].networks)} at most")
        network = MODELS[name].networks[fitting[0]]
        if not MODELS[name].transposed:
            made = {"sequential": containers(device), **made}
        return job_of(network, create_model(network, pretrained=True, **made))

    def _place(self, job: ImageJob) -> None:
        if isinstance(job.network, nn.Module):
            job.network.eval().requires_grad_(False)
            job.network.to(self.device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
            freeze(job.network)

    def __call__(self, image: Any, *, on_progress: Callable[[float], object] | None = None) -> Any:
        """The enhanced picture, of the kind that ``image`` is: a Pillow image (turned as its EXIF says), or an array
        (H, W) or (H, W, C), C from 1 to 4 as in `Picture`, uint8, uint16, or floats from 0 to 1.
        """
        return pictures.through(lambda picture: self.picture(picture, on_progress), image, "enhance")

    def picture(self, picture: Picture, on_progress: Callable[[float], object] | None = None) -> Picture:
        """The same for a `Picture`, whose ``info`` goes along."""
        h, w = picture.pixels.shape[:2]
        itemsize = picture.pixels.dtype.itemsize
        most = max((job.scale for job in self.jobs), default=1) ** 2
        require_memory(h * w * picture.pixels.shape[2] * (itemsize + 2 * itemsize * most), f"a picture of {w}x{h}")
        colours, alpha = picture.colours, picture.alpha
        enlarges = self.scale != 1
        solid = alpha is None or bool((alpha == alpha.flat[0]).all())
        if alpha is not None and not solid:
            colours = pictures.spread_colours(colours, alpha)
        parts = 1 + (enlarges and not solid)
        done = self._run(colours, tiles.portion(on_progress, 0, parts))
        pictures.check_result(colours, done, " and ".join(job.name for job in self.jobs))
        if alpha is not None:
            if enlarges:
                size = (*done.shape[:2], 1)
                alpha = (
                    np.full(size, alpha.flat[0], alpha.dtype)
                    if solid
                    else self._run(alpha, tiles.portion(on_progress, 1, parts), denoise=False)
                )
            done = np.concatenate([done, alpha], 2)
        return Picture(done, picture.info)

    def _run(
        self, pixels: np.ndarray, on_progress: Callable[[float], object] | None, denoise: bool = True
    ) -> np.ndarray:
        jobs = [job for job in self.jobs if denoise or job is self.jobs[-1]]
        given, size = pixels.dtype, (pixels.shape[0] * self.scale, pixels.shape[1] * self.scale)
        memory = self.memory if self.memory is not None else memory_to_use(self.device)
        with backend_context(self._backend) if self._backend is not None else nullcontext():
            for i, job in enumerate(jobs):
                # Between two networks nothing is rounded to 8 bits.
                between = np.uint16 if given == np.uint8 else given
                last = i == len(jobs) - 1
                pixels = tiles.run(
                    job,
                    pixels,
                    device=self.device,
                    dtype=self.dtype,
                    memory=memory,
                    result=given if last and pixels.shape else between,
                    on_progress=tiles.portion(on_progress, i, len(jobs)),
                )
        return pixels if pixels.shape[:2] == size else resized(pixels, size)


def enhance(image: Any, scale: int | None = None, **options: Any) -> Any:
    """``image`` enlarged, and with ``denoise=`` without noise: see `Enhancer`, whose options these are. A picture of
    Pillow's gives one, an array gives one. For many pictures keep an `Enhancer`."""
    return Enhancer(scale, **options)(image)


# --- the command ------------------------------------------------------------------------------------------------------


def add_command(commands: Any, name: str, **options: Any) -> None:
    """The task's subcommand ``name``; ``options`` are those of ``add_parser``."""
    command = commands.add_parser(name, **options)
    batch.add_batch_options(command)
    command.add_argument(
        "--scale", type=int, choices=SCALES, help="times as high and wide (2; with --denoise alone: 1)"
    )
    command.add_argument("--denoise", type=int, choices=LEVELS, metavar="0-3", help="take noise and JPEG's traces out")
    about = "; ".join(f"{name}: {model.about}" for name, model in MODELS.items())
    command.add_argument("--model", metavar="NAME|FILE", help=f"{about}; or a .pth or .safetensors of your own")
    batch.add_machine_options(command)
    command.set_defaults(work=_work, ranks=True)


def _work(arguments: argparse.Namespace) -> int:
    require("enhance", PACKAGES)
    items = batch.plan(arguments.inputs, arguments.output, arguments.recursive)
    enhancer = Enhancer(
        arguments.scale,
        denoise=arguments.denoise,
        model=arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        backend=arguments.backend,
        memory=arguments.memory,
    )
    for job in enhancer.jobs:
        if job.differs is not None:
            print(f"{job.name}: large pictures are computed by tiles, which differ from the whole: {job.differs}")

    def work(source: Path, target: Path, told: Callable[[float], object]) -> None:
        try:
            picture = pictures.read(source)
            pictures.check_target(target, picture)  # before the work
            pictures.write(target, enhancer.picture(picture, told), arguments.png_level)
        except pictures.ImageError as error:
            raise pictures.ImageError(f"{source} {error}") from error

    return batch.process(items, work, skip_existing=arguments.skip_existing)


# --- figures ----------------------------------------------------------------------------------------------------------

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")


def evaluate(names: tuple[str, ...] = PHOTOGRAPHS, **options: Any) -> list[tuple[str, str, float, float]]:
    """(what, photograph, PSNR in dB of the plain way, PSNR by the network) on scikit-image's photographs.

    Enlarging: the photograph, made smaller by Pillow's bicubic filter, against itself; the plain way is that filter.
    JPEG: the photograph at quality 30; the plain way is to leave it. Over all values of RGB. ``options`` go to
    `Enhancer`.
    """
    from PIL import Image

    rows = []
    for scale in (2, 4):
        enhancer = Enhancer(scale, **options)
        for name in names:
            whole = photograph(name)
            size = [n // scale for n in whole.size]
            truth = whole.crop((0, 0, size[0] * scale, size[1] * scale))
            small = truth.resize((size[0], size[1]), Image.Resampling.BICUBIC)
            plain = small.resize(truth.size, Image.Resampling.BICUBIC)
            rows.append((f"x{scale}", name, psnr(plain, truth), psnr(enhancer(small), truth)))
    enhancer = Enhancer(denoise=1, **options)
    for name in names:
        truth = photograph(name)
        buffer = io.BytesIO()
        truth.save(buffer, "JPEG", quality=30)
        damaged = Image.open(buffer)
        rows.append(("JPEG 30", name, psnr(damaged, truth), psnr(enhancer(damaged), truth)))
    return rows


def psnr(a: Any, b: Any) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of 8 bits."""
    error = (np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2
    return math.inf if not error.any() else 10 * math.log10(255**2 / error.mean())
