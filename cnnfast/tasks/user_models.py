"""A user's own network for enhancing pictures: a checkpoint that spandrel knows (the extra ``models``)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..messages import CnnfastError, UsageError, one_line
from .tiles import ImageJob

__all__ = ["SUFFIXES", "load", "reach"]

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")
_LARGEST_HALO = 64
_NUMBERS = 6144  # a pixel, where nothing is known of the network: the most of those that we know, with some to spare


def load(path: Path) -> ImageJob:
    """The network of a checkpoint, as a job. UsageError for a file that is none or of a kind that is not known,
    CnnfastError where spandrel cannot be used here."""
    if not path.is_file():
        raise UsageError(f"--model {path}: no such file, and none of the models' names")
    spandrel = _spandrel()
    try:
        found = spandrel.ModelLoader(device="cpu").load_from_file(path)
    except Exception as error:  # of whatever is in the file
        raise UsageError(f"--model {path}: spandrel does not read it: {one_line(error)}") from error
    if not isinstance(found, spandrel.ImageModelDescriptor):
        raise UsageError(f"--model {path} is a {found.architecture.name} for {found.purpose}: it needs a mask besides")
    if found.input_channels != found.output_channels or found.input_channels not in (1, 3):
        raise UsageError(
            f"--model {path} takes {found.input_channels} channels and gives {found.output_channels}: 1 or 3 are taken"
        )
    network = found.model.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return _job(spandrel, found, network, path)


def _spandrel() -> Any:
    try:
        return importlib.import_module("spandrel")
    except ModuleNotFoundError as error:
        if error.name == "spandrel":
            raise CnnfastError(
                "a model of your own is read by spandrel: pip install 'cnnfast[models]', or pip install spandrel"
            ) from error
        raise CnnfastError(f"spandrel cannot be imported: {one_line(error)}") from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # torchvision's compiled part is for one release of torch; where it does not load, its operators are missing.
        hint = (
            f"; torchvision has to be the release that fits torch {torch.__version__}" if _is_torchvision(error) else ""
        )
        raise CnnfastError(f"spandrel cannot be imported: {one_line(error)}{hint}") from error


def _is_torchvision(error: BaseException) -> bool:
    return "torchvision" in str(error) or "torchvision" in str(getattr(error, "name", ""))


def _job(spandrel: Any, found: Any, network: nn.Module, path: Path) -> ImageJob:
    needs = found.size_requirements
    multiple = needs.multiple_of or 1
    name, differs = f"{path.name} ({found.architecture.name})", None
    tiled = found.tiling is not spandrel.ModelTiling.INTERNAL
    halo = 0
    if tiled:
        halo = reach(network, found.input_channels, max(needs.minimum or 0, 1), multiple, needs.square)
        if found.tiling is spandrel.ModelTiling.DISCOURAGED:
            differs = "its results depend on the whole picture"
        elif halo >= _LARGEST_HALO:
            differs = f"its results depend on more than {_LARGEST_HALO} pixels around"
    return ImageJob(
        name,
        _fitted(network, needs.minimum or 0, needs.square, found.scale),
        halo=halo,
        scale=found.scale,
        channels=found.input_channels,
        multiple=multiple,
        floats=_NUMBERS * max(1, found.scale**2 // 16),
        differs=differs,
        tiled=tiled,
    )


class _Fitted(nn.Module):
    """``network`` for pictures smaller than it takes, or not square where it wants that: their edge is repeated."""

    def __init__(self, network: nn.Module, minimum: int, square: bool, scale: int) -> None:
        super().__init__()
        self.network, self.minimum, self.square, self.scale = network, minimum, square, scale

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        sides = [max(h, self.minimum), max(w, self.minimum)]
        if self.square:
            sides = [max(sides)] * 2
        if sides != [h, w]:
            x = nn.functional.pad(x, (0, sides[1] - w, 0, sides[0] - h), mode="replicate")
        return self.network(x)[..., : h * self.scale, : w * self.scale]


def _fitted(network: nn.Module, minimum: int, square: bool, scale: int) -> nn.Module:
    return _Fitted(network, minimum, square, scale) if minimum > 1 or square else network


def reach(
    network: Callable[[Tensor], Tensor],
    channels: int = 3,
    minimum: int = 1,
    multiple: int = 1,
    square: bool = False,
    share: float = 1e-6,
    largest: int = _LARGEST_HALO,
) -> int:
    """How far a pixel of the result sees: the radius, in pixels of the input, outside of which less than ``share`` of
    the gradient lies (of the sum of absolute values, for the result's middle, on noise); ``largest`` at most.

    0 takes every weight into account; the far ones of a deep network count for nothing in the result.
    """
    side = -(-max(2 * largest + 2, minimum) // multiple) * multiple
    x = torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.enable_grad():
        y = network(x)
        scale = y.shape[-1] / side
        middle = int(scale * (side // 2))
        (gradient,) = torch.autograd.grad(y[..., middle, middle].sum(), x)
    seen = gradient.detach().double().abs().sum((0, 1))
    distance = torch.arange(side).sub(side // 2).abs()
    rings = torch.zeros(side).double()
    rings.index_add_(0, torch.maximum(distance[:, None], distance[None, :]).flatten(), seen.flatten())
    total = float(rings.sum())
    if not math.isfinite(total) or total == 0:
        return largest
    outside = rings.flip(0).cumsum(0).flip(0)  # of this ring and those beyond
    return min(max(int((outside > share * total).sum()) - 1, 0), largest)  # rings begin with the pixel itself
