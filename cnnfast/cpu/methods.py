"""The methods to run a convolution on a CPU: those of `onednn`, and `winograd`. `inference` chooses between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from ..spec import ConvSpec
from .isa import InstructionSet, Process, cache_bytes
from .onednn import Convolution, Deconvolution, Gathered, Merged, Method, Projection
from .winograd import Winograd

__all__ = ["METHODS", "applicable", "by_patches", "by_rule", "gathers", "winograd_gain"]

METHODS: dict[str, type[Method]] = {
    kind.__name__: kind for kind in (Convolution, Deconvolution, Gathered, Merged, Projection, Winograd)
}


def applicable(spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype, matmul: bool) -> list[str]:
    """The names of the methods that are right for an input (N, C_in, *size) whose border is already repeated;
    ``dtype``: of the products; ``matmul``: they may be matrix products."""
    found = []
    if dtype == torch.float32 and matmul and Winograd.applies(spec, shape):
        found.append("Winograd")
    if not spec.transposed:
        return ["Convolution", *found]
    # oneDNN has no deconvolution whose output padding reaches the stride.
    if all(p < s for p, s in zip(spec.output_padding, spec.stride, strict=True)):
        found.append("Deconvolution")
    if spec.ndim == 3:
        return found
    if Merged.applies(spec):
        found.append("Merged")
    if matmul and Gathered.applies(spec):
        found.append("Gathered")
    if matmul and Projection.applies(spec, shape):
        found.append("Projection")
    return found


def by_rule(
    spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype, isa: InstructionSet, now: Process, right: list[str]
) -> type[Method]:
    """The method for products in ``dtype`` on an input (N, C_in, *size) whose border is already repeated; ``right``:
    of `applicable`."""
    if "Projection" in right:
        return Projection
    if "Merged" in right and Merged.padded_macs(spec) < Deconvolution.padded_macs(spec):
        return Merged
    if "Gathered" in right and gathers(spec, shape, dtype, isa):
        return Gathered
    if "Winograd" in right and winograd_gain(spec, shape, now) > 1:
        return Winograd
    return Deconvolution if spec.transposed else Convolution


def by_patches(spec: ConvSpec | None, shape: Sequence[int]) -> bool:
    """Whether PyTorch runs this float32 convolution of a contiguous map (N, C_in, H, W) by patches and a matrix
    product, not by oneDNN: for a small sample, by its sizes."""
    if spec is None or spec.transposed or spec.ndim != 2:
        return False
    kernel = spec.kernel_size
    return shape[0] == 1 == spec.groups and math.prod(shape) <= 20480 and max(kernel) > 1 and min(kernel) <= 3


def moving(now: Process) -> float:
    """The multiply-adds in the time that a number is moved in, over those where a core takes 16 of them in a cycle: of
    twice as many in a cycle, memory and calls take as long as before. (Measured: docs/facts.md, "Winograd".)"""
    return 2.2 if now.full_width else 1.0


@lru_cache(maxsize=4096)
def winograd_gain(spec: ConvSpec, shape: tuple[int, ...], now: Process) -> float:
    """What `Winograd` is expected to be faster by than `Convolution` or `Deconvolution` inside of a model; 1 where it
    does not apply. (What `Winograd.gain` says of hot caches and a busy machine, held against models: docs/facts.md.)"""
    if not Winograd.applies(spec, shape):
        return 1.0
    gain = Winograd(spec, shape, torch.float32).gain(now.threads, moving(now))
    return gain / float(0.95 * now.threads**0.075)


def gathers(spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype, isa: InstructionSet) -> bool:
    """Whether a transposed convolution is better off as matrix products on gathered patches.

    oneDNN's deconvolution streams the whole weight for every few rows of the image; where the maps are small and the
    weight is larger than the cache, products read it once.
    """
    positions, rows = math.prod(shape[2:]), shape[0] * math.prod(shape[2:])
    fast_products = isa >= InstructionSet.AMX and dtype != torch.float32
    most_positions, least_rows = (36, 64) if fast_products else (16, 128)
    size = math.prod(spec.weight_shape) * dtype.itemsize
    # Without AMX the deconvolution is the faster one until the weight fills the last cache, too.
    large = size > cache_bytes() if isa >= InstructionSet.AMX else size >= 2**24
    return (
        large
        and positions <= most_positions
        and rows >= least_rows
        and isa >= InstructionSet.AVX512
        and Gathered.applies(spec)
    )
