"""Memory formats: what a tensor suggests, a new tensor's strides, and a model's weights in the order in which the GPU
kernels read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = [
    "LAST",
    "channels_last",
    "convert",
    "format_of",
    "has_both",
    "in_format",
    "in_rows",
    "is_channels_last",
    "is_dense",
    "is_quick",
    "new_strides",
    "reformatted",
    "reshaped_last",
    "restrided",
    "suggests_channels_last",
    "to_format",
]


M = TypeVar("M", bound=nn.Module)


# From the densest dimension to the widest, channels-last, by the number of dimensions.
_ORDERS = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}


LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The channels-last format by the number of dimensions."""


def format_of(dims: int, channels_last: bool) -> torch.memory_format:
    """The memory format of a tensor of so many dimensions: channels_last, of five channels_last_3d."""
    return LAST.get(dims, torch.channels_last) if channels_last else torch.contiguous_format


def is_channels_last(t: torch.Tensor) -> bool:
    """ATen's ``suggest_memory_format`` of a 4-D or 5-D tensor: strides ordered C < W < H (< D) < N, sizes of one not
    deciding alone."""
    return suggests_channels_last(t.shape, t.stride())


def suggests_channels_last(size: Sequence[int], strides: Sequence[int]) -> bool:
    """`is_channels_last` of a tensor of this size and with these strides."""
    order = _ORDERS.get(len(size))
    if order is None or strides[1] == 0:
        return False
    least = 0
    for d in order:
        if size[d] == 0 or strides[d] < least:
            return False
        if d == 0 and least == strides[1]:
            return False
        least = strides[d] * size[d] if size[d] > 1 else strides[d]
    return True


def new_strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Those of a new tensor (N, C, *size), none of them 0, in this format. Where its memory fits both formats, they
    tell ATen's next operator which of them to take."""
    if len(shape) == 5:
        _, c, d, h, w = shape
        return (d * h * w * c, 1, h * w * c, w * c, c) if channels_last else (c * d * h * w, d * h * w, h * w, w, 1)
    if len(shape) == 3:
        _, c, length = shape
        return (length * c, 1, c) if channels_last else (c * length, length, 1)
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


@lru_cache(maxsize=4096)
def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the strides are a permutation of a contiguous tensor's: its elements are one run of memory."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(strides, shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def has_both(channels: int, size: Sequence[int]) -> bool:
    """Whether a dense tensor of these sizes is contiguous and channels-last at once."""
    return channels == 1 or all(n == 1 for n in size)


def channels_last(module: M) -> M:
    """``module.to(memory_format=torch.channels_last)`` and the same for 1-D and 3-D convolutions, in place. Returns
    ``module``.

    PyTorch's own conversion leaves 3-D weights as they are, and a GPU kernel would copy them on every call. Here the
    weight (C_in, C_out/groups, k) of a ConvTranspose1d, or (C_out, C_in/groups, k) of a Conv1d, gets its second
    dimension contiguous, as channels_last does for four. Values, shapes and ``state_dict`` stay; ``load_state_dict``
    keeps the order. For GPUs: PyTorch's own operators copy such a 3-D weight on a CPU. Parametrized and lazy modules
    are left alone. PyTorch's own refuses a module with tensors of five dimensions: here a Conv3d's or ConvTranspose3d's
    weight becomes channels_last_3d, and others stay as they are.
    """
    module._apply(lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t)
    for m in module.modules():
        if isinstance(m, nn.Conv3d | nn.ConvTranspose3d) and type(m) in (nn.Conv3d, nn.ConvTranspose3d):
            m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last_3d)
        if isinstance(m, nn.Conv1d | nn.ConvTranspose1d) and type(m) in (nn.Conv1d, nn.ConvTranspose1d):
            weight = m.weight
            weight.data = weight.data.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2)
    return module


def in_format(t: torch.Tensor, channels_last: bool) -> bool:
    """Whether t is dense in this memory format, sizes of one not deciding. Channels-last of three dimensions (N, C, L),
    for which PyTorch has no name, is that of (N, C, 1, L)."""
    if channels_last and t.dim() == 3:
        return t.transpose(1, 2).is_contiguous()
    return t.is_contiguous(memory_format=format_of(t.dim(), channels_last))


def to_format(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """t, or a copy of it, such that `in_format` says so."""
    if channels_last and t.dim() == 3:
        return t if in_format(t, True) else convert(t.unsqueeze(2), t.dtype, True).squeeze(2)
    return t.contiguous(memory_format=format_of(t.dim(), channels_last))


def in_rows(weight: torch.Tensor) -> torch.Tensor:
    """A weight (C_out, C_in/g, k) of one dimension as (C_out, C_in/g, 1, k).

    A view of a tensor that was made in inference mode has no ``_base``: it keeps it as an attribute, for who asks whose
    memory it is (`cpu.packing`).
    """
    view = weight.unsqueeze(2)
    if not torch.compiler.is_compiling() and weight.is_inference():
        view.viewed = weight  # type: ignore[attr-defined]
    return view


def reformatted(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """`to_format` by `convert`, for where nothing but autograd watches. A map of one channel, which is in both formats,
    gets the strides of this one: they tell ATen's next operator which to go on in, and users what they look at. So does
    one of one image, which views may give a stride of the batch that ATen does not take for channels-last."""
    if t.dim() == 3:
        return to_format(t, channels_last)
    t = convert(t, t.dtype, channels_last)
    odd = t.shape[1] == 1 or channels_last and t.shape[0] == 1 and t.stride(0) < t.numel()
    if odd and not t.requires_grad and is_channels_last(t) != channels_last:
        t = t.as_strided(t.shape, new_strides(t.shape, channels_last)).detach()  # its user may write to it
    return t


def reshaped_last(t: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """``t.reshape(shape)``, where that is a copy or a map already, channels-last."""
    if t.shape == torch.Size(shape):
        return reformatted(t, True)
    y = torch.empty(shape, dtype=t.dtype, device=t.device, memory_format=format_of(len(shape), True))
    y.view(t.shape).copy_(t)
    return y


def restrided(t: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """t, or a copy of it, with these strides, of a tensor without gaps."""
    if t.stride() == tuple(strides):
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def _at_once(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """A dense t in the other format, which is ``channels_last`` or contiguous.

    ATen's channel shuffle of a channels-last map makes each position's channels, as (groups, channels of one), those
    of (channels of one, groups): a matrix transposition in vectors. A whole image stands for such a position here, so
    that each has one thread.
    """
    n, image = t.shape[0], t.shape[1:].numel()
    groups = t.shape[1] if channels_last else t.shape[2:].numel()
    y = torch.native_channel_shuffle(t.as_strided((n, image, 1, 1), (image, 1, image, image)), groups)
    return y.as_strided(t.shape, new_strides(t.shape, channels_last)).detach()


def _at_once_16(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """`_at_once` of numbers of 16 bits, of which the shuffle has no vectors: as ones of 32 (three times their memory is
    taken for the moment)."""
    wide = t.view(torch.int16).to(torch.int32).view(torch.float32)
    return _at_once(wide, channels_last).view(torch.int32).to(torch.int16).view(t.dtype)


def _shuffled(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """`_at_once` on all threads: a run of positions with its C channels stands for a position, and what is left is a
    copy of whole runs (as much memory again is taken for the moment)."""
    n, c, *size = t.shape
    run = _run_length(math.prod(size), size[-1])

    def shuffled(t: torch.Tensor, groups: int) -> torch.Tensor:
        t = t.view(1, -1, 1, run * c).permute(0, 3, 1, 2)
        return torch.native_channel_shuffle(t, groups).permute(0, 2, 3, 1)

    if channels_last:
        runs = t.view(n, c, -1, run).transpose(1, 2).contiguous()
        return shuffled(runs, c).reshape(n, *size, c).movedim(-1, 1).detach()
    y = torch.empty_like(t, memory_format=torch.contiguous_format)
    y.view(n, c, -1, run).copy_(shuffled(t.movedim(1, -1), run).reshape(n, -1, c, run).transpose(1, 2))
    return y


def _transposed(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """`_at_once` of any dtype, as ATen's copy of a matrix for each image, which is in blocks and on one thread."""
    y = torch.empty_like(t, memory_format=format_of(t.dim(), channels_last))
    for image, source in zip(y, t, strict=True):
        if channels_last:
            image.movedim(0, -1).flatten(0, -2).copy_(source.flatten(1).t())
        else:
            image.flatten(1).copy_(source.movedim(0, -1).flatten(0, -2).t())
    return y


@lru_cache(maxsize=1024)
def _run_length(positions: int, width: int) -> int:
    """How many of an image's positions are one run: a part of it of 512 to 1024, where it has one."""
    run = width
    while run <= 512 and positions % (2 * run) == 0:
        run *= 2
    while run > 1024 and run % 2 == 0:
        run //= 2
    return run


_Way = Callable[[torch.Tensor, bool], torch.Tensor]

# Positions: more than a kernel has, as the shuffle reads like one who writes, ending a weight's watch.
_LEAST_POSITIONS = 64

# Numbers: fewer are as fast by ATen's copy; an image of so many is worth all threads; writing one of more strides over
# too much memory; of more, a second copy is too much.
_LEAST, _MANY, _MOST_WRITTEN, _MOST_TWICE = 2**13, 2**17, 2**21, 2**24
_LEAST_16, _MOST_16 = 2**15, 2**22  # likewise in 16 bits, to channels-last
_CONFLICTS_16 = 1024  # positions: see `_conflicting`
_ALONE_16, _LEAST_LARGE_16 = (2**17, 2**19), 2**20  # to contiguous: on one thread; that strides over much memory


@lru_cache(maxsize=4096)
def _way(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, threads: int) -> _Way | None:
    """The fastest of a dense tensor on a CPU, or ATen's own copy: on all threads, it strides through memory
    (docs/facts.md)."""
    channels, positions, numbers = shape[1], math.prod(shape[2:]), math.prod(shape)
    if not numbers:
        return None
    if channels >= 8 and positions >= _LEAST_POSITIONS:
        if dtype == torch.float32 and numbers >= _LEAST:
            return _way_32(shape, channels_last, threads)
        if dtype in (torch.bfloat16, torch.float16) and (way := _way_16(shape, channels_last, threads)):
            return way
    image, many = channels * positions, 16 * threads
    if channels_last:
        worth = channels >= many and image >= max(2**15, (16 if threads == 1 else 512 * threads) * channels)
        worth = worth and not (dtype.itemsize == 2 and (positions % _CONFLICTS_16 or not _conflicting()))
    else:
        worth = channels >= 2 * many and image * channels >= 2**24 * threads**2
        if dtype.itemsize == 2:
            least = 0 if _conflicting() else _LEAST_LARGE_16
            worth = worth and image >= least and (threads == 1 or numbers > _MOST_TWICE)
    return _transposed if worth and threads <= 4 else None


def is_quick(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether `convert` takes a fraction of the time of ATen's copies of a map (N, C, *size), either way."""
    return dtype == torch.float32 and _way(tuple(shape), dtype, False, 1) in (_at_once, _shuffled)


def _way_32(shape: tuple[int, ...], channels_last: bool, threads: int) -> _Way | None:
    many = shape[0] < threads and math.prod(shape) >= _MANY
    if _in_runs(shape) and (many and threads > 2 or not channels_last and math.prod(shape[1:]) > _MOST_WRITTEN):
        return _shuffled
    return None if many and threads > 4 else _at_once


def _way_16(shape: tuple[int, ...], channels_last: bool, threads: int) -> _Way | None:
    channels, numbers = shape[1], math.prod(shape)
    if channels_last:
        slow = _conflicting() and math.prod(shape[2:]) % _CONFLICTS_16 == 0
        slow = slow and channels >= max(16, 8 * threads) and threads <= 4
        return _at_once_16 if slow and _LEAST_16 <= numbers <= _MOST_16 else None
    if _conflicting() and threads == 1 and channels >= 32 and _ALONE_16[0] <= numbers <= _ALONE_16[1]:
        return _at_once_16
    few, least = channels < 64 or threads > 1, numbers if _conflicting() else math.prod(shape[1:])
    return _shuffled if few and least >= _LEAST_LARGE_16 and _in_runs(shape) else None


@lru_cache(maxsize=1)
def _conflicting() -> bool:
    """Whether ATen's copies in 16 bits take several times as long where positions meet in the same sets of the cache:
    on AMD's processors before Zen 5, by their first-level cache."""
    processor: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(processor.get("cpu_name")).startswith("AMD") and processor.get("l1d_cache_size") == 2**15


def _in_runs(shape: tuple[int, ...]) -> bool:
    positions = math.prod(shape[2:])
    run = _run_length(positions, shape[-1])
    return run >= _LEAST_POSITIONS and shape[0] * positions >= 2 * run and math.prod(shape) <= _MOST_TWICE


class _Converted(torch.autograd.Function):
    """A `_way` with a gradient, which is in whatever format it comes."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, channels_last: bool, way: _Way) -> torch.Tensor:
        return way(t, channels_last)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad, None, None


def convert(t: torch.Tensor, dtype: torch.dtype, channels_last: bool) -> torch.Tensor:
    """``t`` (N, C, *size) in this dtype and memory format; itself where it is that already."""
    memory_format = format_of(t.dim(), channels_last)
    if t.dtype == dtype and t.is_contiguous(memory_format=memory_format):
        return t
    if not channels_last and t.is_contiguous():
        return t.to(dtype)
    way = _way(t.shape, dtype, channels_last, torch.get_num_threads()) if t.device.type == "cpu" else None
    if way is not None and t.stride(-1 if channels_last else 1) == 1:
        # Whole runs are left to copy, if anything. (`to` leaves alone what only suggests the format.)
        t = t.to(dtype).contiguous(memory_format=format_of(t.dim(), not channels_last))
        return _Converted.apply(t, channels_last, way) if t.requires_grad else way(t, channels_last)
    if t.dtype == dtype:  # the cheaper call, on a path that counts microseconds
        return t.contiguous(memory_format=memory_format)
    return t.to(dtype, memory_format=memory_format)
