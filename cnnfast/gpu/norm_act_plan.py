"""How the norm kernels cut a tensor: segments, parts of rows, tiles, blocks of channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..activations import Activation
from ..memory_format import LAST, format_of
from ..norms import Norm
from ..step import Step
from . import guard
from .binary import MAX_REGISTERS, Binary, aligned
from .devices import cuda_index, target_device
from .guard import NormPass

__all__ = ["TILE", "Tiling", "is_last", "power", "tiling", "will_be_last"]


TILE = 2048  # elements that a program holds at a time
PROGRAMS = 8  # for each multiprocessor, at most
LEAST_TILES = 4  # of a program, where that leaves every multiprocessor one


@dataclass(frozen=True)
class Tiling:
    """``segments`` of ``rows``, each cut in ``parts`` of ``tiles`` tiles (BLOCK_M rows) and channels in BLOCK_C."""

    segments: int
    rows: int
    parts: int
    tiles: int
    grid: tuple[int, int, int]
    constants: dict[str, int]
    num_warps: int


def power(n: int, most: int) -> int:
    """The smallest power of two that holds n, ``most`` at most."""
    return min(most, 1 << max(0, n - 1).bit_length())


@lru_cache(maxsize=4096)
def tiling(batch: int, channels: int, size: int, images: bool, rows_inside: bool, multiprocessors: int) -> Tiling:
    """``images``: segments are images. ``rows_inside``: a tensor has its rows (not its channels) contiguous."""
    segments, rows = (batch, size) if images else (1, batch * size)
    if rows_inside:
        block_m = power(rows, 128)
        block_c = power(channels, TILE // block_m)
    else:
        block_c = power(channels, 64)
        block_m = power(rows, TILE // block_c)
        block_c = power(channels, min(256, TILE // block_m))
    columns = -(-channels // block_c)
    all_tiles = -(-rows // block_m)
    fill = max(1, -(-multiprocessors // (segments * columns)))  # parts that give every multiprocessor a program
    most = max(1, PROGRAMS * multiprocessors // (segments * columns))
    parts = min(all_tiles, most, max(fill, -(-all_tiles // LEAST_TILES)))
    tiles = -(-all_tiles // parts)
    parts = -(-all_tiles // tiles)
    # Channels-last addresses do not depend on what divides the number of rows: one binary for all.
    by = next(d for d in (16, 8, 1) if rows % d == 0) if rows_inside else 1
    return Tiling(
        segments,
        rows,
        parts,
        tiles,
        (segments * parts, columns, 1),
        dict(ROWS_BY=by, BLOCK_M=block_m, BLOCK_C=block_c),
        4 if block_m * block_c >= TILE else max(1, block_m * block_c // 512),
    )


# --- layouts ----------------------------------------------------------------------------------------------------------


def laid_out(t: Tensor) -> Tensor:
    """``t`` channels-last or, where it is that already, contiguous; at an address that 16 divides."""
    if not is_last(t) and not t.is_contiguous():
        t = t.contiguous(memory_format=format_of(t.dim(), True))
    return aligned(t)


def _as(t: Tensor, last: bool) -> Tensor:
    return aligned(t.contiguous(memory_format=format_of(t.dim(), last)))


def _vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    return [v if v is None or v.is_contiguous() else v.contiguous() for v in vectors]


# --- launches ---------------------------------------------------------------------------------------------------------

_Types = tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class Start:
    """A launch but for its tensors, which come ahead of ``numbers``."""

    binary: Binary
    grid: tuple[int, int, int]
    numbers: tuple[float, ...]

    def __call__(self, *tensors: Tensor | None) -> None:
        self.binary(self.grid, *tensors, *self.numbers)


def _binary(kernel: Any, constants: dict[str, Any], num_warps: int = 4) -> Binary:
    """With fewer registers allowed, ptxas spills a few (seen for three channels on sm_86)."""
    return Binary(kernel, constants, num_warps=num_warps, maxnreg=MAX_REGISTERS)


def is_last(t: Tensor) -> bool:
    """Whether t (N, C, *size) lies as (N, *size, C)."""
    return t.is_contiguous(memory_format=LAST[t.dim()])


def will_be_last(t: Tensor) -> bool:
    """`is_last` of what `laid_out` makes of t."""
    return is_last(t) or not t.is_contiguous()


def _types(*tensors: Tensor | None) -> _Types:
    return tuple([None if t is None else t.dtype for t in tensors])


def _where(x: Tensor) -> tuple[int, int | None]:
    """Multiprocessors to fill, and the index of x's CUDA device (None where there is none: nothing is guarded)."""
    return target_device(x).multiprocessors, cuda_index(x)


def _tiles(
    kernel: Any,
    shape: torch.Size,
    each: bool,
    sms: int,
    last: tuple[bool, ...],
    consts: dict[str, Any],
    *numbers: float,
) -> tuple[Tiling, Start]:
    """The launch of a kernel over tensors of this shape, of which ``last`` says whether they are channels-last: its
    input, and its result."""
    n, c, *size = shape
    inside = not all(last)
    t = tiling(n, c, math.prod(size), each or inside, inside, sms)
    consts = {**consts, **t.constants, "C": c, "X_LAST": last[0], "Y_LAST": last[-1]}
    return t, Start(_binary(kernel, consts, t.num_warps), t.grid, (t.rows, t.parts, t.tiles, *numbers))


def _common(step: Step, channels: int, slopes: int) -> dict[str, Any]:
    norm = step.norm
    join = 1 if norm is None else norm.join(channels)
    return dict(
        JOIN=join, EACH=each(norm), VAR=norm is not None and norm.kind == "running", SLOPES=slopes, OF=step.of,
        **_params(step.activation),
    )  # fmt: skip


def each(norm: Norm | None) -> bool:
    """Whether every image has its own statistics."""
    return norm is not None and norm.per_image


def eps_of(norm: Norm | None) -> float:
    return 0.0 if norm is None else float(norm.eps)


def _params(activation: Activation) -> dict[str, Any]:
    p0, p1, *_ = (*activation.params, 0.0, 0.0)
    return dict(P0=p0, P1=p1, ACT=activation.name)


# --- proofs -----------------------------------------------------------------------------------------------------------


def _told(prefix: str, t: Tiling, last: tuple[bool, ...]) -> dict[str, Any]:
    """Tiles among the constants of a proof."""
    return {f"{prefix}.{k}": v for k, v in {**t.constants, "warps": t.num_warps, "last": last}.items()}


def _proof(subject: NormPass, name: str, index: int | None, dtype: Any, types: _Types, **constants: Any) -> guard.Proof:
    if index is None:
        return guard.UNGUARDED
    kept = {"dtype": str(dtype), "types": tuple(map(str, types))}  # as a record on disk can hold them
    return guard.proof(subject, name, index, {**kept, **constants})
