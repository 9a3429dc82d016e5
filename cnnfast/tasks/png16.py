"""PNGs that Pillow does not read whole: of 16 bits a channel in colour or with transparency, which it cuts down to 8
bits, and with a large colour profile.

After the PNG specification (W3C, third edition), numbers in brackets are its sections. Checked by Pillow where that
reads a file at all (`pictures` has it read the header, the metadata and every other kind of PNG).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["chunks", "decode", "encode", "is_deep", "split_profile"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PILLOW_S, _LARGEST = 2**20, 2**26  # bytes of a colour profile: what Pillow reads, what is read here
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type
_TYPES = {channels: colour for colour, channels in _CHANNELS.items()}
# Adam7's passes [8.1]: first column, first row, steps between columns and between rows.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def is_deep(head: bytes) -> bool:
    """Whether a file that begins like this (26 bytes) is such a PNG."""
    return (
        len(head) >= 26
        and head[:8] == _SIGNATURE
        and head[12:16] == b"IHDR"
        and head[24] == 16
        and head[25] in (2, 4, 6)
    )


def decode(data: bytes) -> np.ndarray:
    """The pixels (H, W, C) uint16 of a file that `is_deep`; a key colour (tRNS) becomes a channel of alpha.

    ValueError where the file is damaged or cut off.
    """
    width, height, _, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    channels = _CHANNELS[colour]
    compressed, key = [], None
    for kind, body in chunks(data):
        if kind == b"IDAT":
            compressed.append(body)
        elif kind == b"tRNS" and colour == 2 and len(body) == 6:
            key = np.frombuffer(body, ">u2")
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(height - y) // dy), -(-(width - x) // dx)) for x, y, dx, dy in passes]
    need = sum(h * (1 + 2 * channels * w) for h, w in sizes if h > 0 and w > 0)
    unpack = zlib.decompressobj()
    try:
        raw = unpack.decompress(b"".join(compressed), need)
    except zlib.error as error:
        raise ValueError(f"the pixels are damaged: {error}") from error
    if len(raw) < need:
        raise ValueError("the file is cut off")
    pixels = np.zeros((height, width, channels), np.uint16)
    at = 0
    for (x, y, dx, dy), (h, w) in zip(passes, sizes, strict=True):
        if h > 0 and w > 0:
            rows = np.frombuffer(raw, np.uint8, h * (1 + 2 * channels * w), at).reshape(h, -1)
            plain = _unfiltered(rows[:, 1:].reshape(h, w, 2 * channels), rows[:, 0])
            pixels[y::dy, x::dx] = np.ascontiguousarray(plain).view(">u2").reshape(h, w, channels)
            at += rows.size
    if key is None:
        return pixels
    alpha = np.where((pixels == key).all(2), 0, 65535).astype(np.uint16)
    return np.dstack([pixels, alpha])


def split_profile(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG without its colour profile [11.3.2.3], and the profile, where Pillow would refuse the file for its size (1
    MiB; those of printers are larger). Beyond 64 MiB it is left out. Other files as they are, and None."""
    at = 8 if data[:8] == _SIGNATURE else len(data)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IDAT":
            break
        end = at + 12 + length
        if kind == b"iCCP":
            unpack, compressed = zlib.decompressobj(), data[at + 8 : end - 4].partition(b"\0")[2][1:]
            try:
                profile = unpack.decompress(compressed, _LARGEST)
            except zlib.error:  # damaged: it is Pillow's to say
                break
            if len(profile) > _PILLOW_S:
                return data[:at] + data[end:], None if unpack.unconsumed_tail else profile
        at = end
    return data, None


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The parts of a PNG [5.3], (kind, body), up to IEND. ValueError where one is damaged or cut off."""
    at = 8
    while True:
        if at + 12 > len(data):
            raise ValueError("the file is cut off")
        length, kind = struct.unpack_from(">I4s", data, at)
        body, check = data[at + 8 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        if check != struct.pack(">I", zlib.crc32(kind + body)):
            raise ValueError(f"its part {kind!r} is damaged or cut off")
        yield kind, body
        if kind == b"IEND":
            return
        at += 12 + length


def _unfiltered(rows: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """Undoes the filters [9.2] of rows (H, W, bytes a pixel), one filter (H,) each.

    A pixel depends on the ones left, above and left above: those of a diagonal x + y = t are computed at once.
    """
    if filters.max(initial=0) > 4:
        raise ValueError(f"the pixels are damaged: a row has the filter {filters.max()}")
    h, w, size = rows.shape
    result = np.empty_like(rows)
    # Row y - 1 of the two diagonals before; nothing lies above the first row or left of the first column.
    last, before = np.zeros((h + 1, size), np.int16), np.zeros((h + 1, size), np.int16)
    kind = filters[:, None]
    for t in range(h + w - 1):
        first, end = max(0, t - w + 1), min(h, t + 1)
        y = np.arange(first, end)
        left, up, corner = last[first + 1 : end + 1], last[first:end], before[first:end]
        k = kind[first:end]
        guess = left + up - corner
        to_left, to_up, to_corner = abs(guess - left), abs(guess - up), abs(guess - corner)
        paeth = np.where((to_left <= to_up) & (to_left <= to_corner), left, np.where(to_up <= to_corner, up, corner))
        added = np.select([k == 1, k == 2, k == 3, k == 4], [left, up, (left + up) >> 1, paeth], 0)
        values = (rows[y, t - y] + added) & 255
        result[y, t - y] = values
        before, last = last, before
        last[first + 1 : end + 1] = values
        # A row that has not begun has no left neighbours yet.
        last[end + 1 :] = 0
    return result


def encode(pixels: np.ndarray, level: int, parts: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """A PNG of ``pixels`` (H, W, 1 to 4) uint16 by zlib's ``level``; ``parts`` (kind, body) go ahead of them."""
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    filtered = np.hstack([np.full((height, 1), 2, np.uint8), rows - above])  # "up"
    header = struct.pack(">IIBBBBB", width, height, 16, _TYPES[channels], 0, 0, 0)
    body = zlib.compress(filtered.tobytes(), level)
    chunks = [(b"IHDR", header), *parts, (b"IDAT", body), (b"IEND", b"")]
    return _SIGNATURE + b"".join(
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks
    )
