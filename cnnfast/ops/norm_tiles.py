"""How the norm kernels cut a tensor: segments, parts of rows, tiles, blocks of channels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

__all__ = ["TILE", "Tiling", "power", "tiling"]

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
