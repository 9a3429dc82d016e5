"""Where `kernels/conv_hopper.py` runs a step, and with which tile. Pure: no tensor, no GPU, no Triton.

`why_not` is the one predicate; `candidates` gives the plans, `chosen` the one that a call takes. `HOPPER` says whether
a call takes any.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..spec import Precision
from ..step import Step
from .conv_choice import PROLOGUE, trip_clocks
from .conv_plan import Lowering, Plan, lower
from .devices import REGISTERS, Device

__all__ = ["HOPPER", "BoxPlan", "candidates", "chosen", "why_not"]

HOPPER = False
"""Whether calls take this kernel wherever `why_not` finds nothing against it. Off, because no GPU has run it: a barrier
that is wrong hangs the device, and no trial survives that. What turns it on: the stage "hopper" of `make gpu` on an
sm_90 that is right in every row and, over the layers of docs/facts.md ("The kernel for Hopper"), faster than the
pointer kernel; name the results' folder here. Until then `cnnfast.tune` tries it only for steps that this stage found
right and faster on the same machine (`tuned.hopper_allowed`)."""

LEAST_CHANNELS = 32  # in and out: with fewer, the pointer kernel's tiles fit better
ALIGNED = 8  # elements of 16 bits: a descriptor's strides are multiples of 16 bytes
TILES = ((128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (256, 64, 8), (128, 64, 4))
"""(block_m, block_n, warps that multiply): 32 to 128 sums a thread."""
MOST_STAGES = 6
COPYING = 4  # warps beside them: one copies, and Triton starts them by four
HELD = 32  # results of a thread that the epilogue has in hand: with more, the heavier activations spill
OTHER = 3072  # bytes: barriers, what is handed to the copying warp, sums of the statistics between warps
SYSTEM = 1024  # bytes that a program takes beside its own


@dataclass(frozen=True)
class BoxPlan(Plan):
    """A tile whose rows are a box of (images, rows, columns) of one phase of the result, ``block_m`` in all.

    ``num_stages`` counts buffers, ``num_warps`` the warps that multiply. ``blocks``: programs that run on a
    multiprocessor at once.
    """

    box: tuple[int, int, int] = (1, 1, 1)
    blocks: int = 1

    @property
    def name(self) -> str:
        box = "x".join(map(str, self.box))
        return (
            f"{self.lowering.regime} boxes {box} {self.block_m}x{self.block_n}x{self.block_k} "
            f"w{self.num_warps} s{self.num_stages} b{self.blocks}"
        )

    def boxes(self, batch: int, output_size: Sequence[int]) -> tuple[int, int, int]:
        """How many boxes a phase of the result takes, along images, rows and columns."""
        phase = [o // p for o, p in zip(output_size, self.lowering.phases, strict=True)]
        return tuple(-(-n // b) for n, b in zip((batch, *phase), self.box, strict=True))  # type: ignore[return-value]

    def tiles(self, batch: int, output_size: tuple[int, ...]) -> int:
        s = self.lowering.spec
        columns = -(-s.out_channels // self.block_n)
        return math.prod(self.boxes(batch, output_size)) * columns * math.prod(self.lowering.phases)

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of the buffers of operands and results (an upper bound of what the compiler takes)."""
        buffers = self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize
        return buffers + 2 * self.block_m * self.chunk * itemsize + OTHER

    @property
    def chunk(self) -> int:
        """Columns of the tile that the epilogue has in hand at a time."""
        return HELD * 32 * self.num_warps // self.block_m

    @property
    def registers(self) -> int:
        """Of a thread at the start, for so many programs a multiprocessor; the copying warps then give theirs away."""
        threads = 32 * (self.num_warps + COPYING) * self.blocks
        return min(255, REGISTERS // threads) // 8 * 8


# --- where it applies -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _gluon_why_not() -> str | None:
    for name in ("triton", "triton.experimental", "triton.experimental.gluon"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return None


def why_not(
    step: Step,
    batch: int,
    input_size: tuple[int, ...],
    precision: Precision,
    device: Device,
    channels_last: bool = True,
) -> str | None:
    """Why the kernel cannot take ``step`` on x (batch, C_in, *input_size), the size with `Step.pad`, or None: the one
    predicate. Such a step is the pointer kernel's."""
    s = step.spec
    low = lower(s, input_size, channels_last)
    if device.arch != 90:
        return f"compute capability {device.arch // 10}.{device.arch % 10}, and it is written for 9.0"
    if precision.dtype not in (torch.float16, torch.bfloat16):
        # A descriptor may round to TF32 (triton 3.7), but TF32 products take both operands with K contiguous, which a
        # transposed convolution's weight has not.
        return f"dtype {precision.dtype}, and its tensor-core products take 16 bits"
    if s.ndim != 2:
        return f"{s.ndim} dimensions, and its boxes are of two"
    if low.regime != "phases":
        return f"the regime is {low.regime}, and it runs phases"
    if not channels_last:
        return "the result is contiguous, and it stores boxes of channels-last tensors"
    if any(step.pad):
        return f"{step.pad_mode} padding, and copies fill with zeros"
    return _channels_why_not(low) or _sizes_why_not(low, input_size) or _gluon_why_not()


def _channels_why_not(low: Lowering) -> str | None:
    channels_in, columns = low.channels_in, low.columns
    if min(channels_in, columns) < LEAST_CHANNELS:
        return f"{channels_in} -> {columns} channels a group, fewer than {LEAST_CHANNELS}"
    if channels_in % ALIGNED or columns % ALIGNED:
        return f"{channels_in} -> {columns} channels a group, not multiples of {ALIGNED}"
    if _in_parts(low) and channels_in % 32:
        return f"{channels_in} input channels of a group or of a pixel of several, no multiple of 32"
    if _out_parts(low) and columns % 64:
        return f"{columns} output channels of a group or of a phase of several, no multiple of 64"
    return None


def _sizes_why_not(low: Lowering, input_size: Sequence[int]) -> str | None:
    s = low.spec
    for n, p in zip(s.output_size(input_size), low.phases, strict=True):
        if n % p:
            return f"an output of {tuple(s.output_size(input_size))} is no multiple of the stride {s.stride}"
    for n, st in zip(input_size, low.read_stride, strict=True):
        if n % st:
            return f"an input of {tuple(input_size)} is no multiple of the stride {s.stride}"
    return None


def _in_parts(low: Lowering) -> bool:
    """Whether other input channels follow on those that a product may read."""
    return low.spec.groups > 1 or low.read_stride[1] > 1


def _out_parts(low: Lowering) -> bool:
    """Whether something else follows in y on the channels that a tile may write."""
    return low.spec.groups > 1 or low.phases[1] > 1


# --- tiles ------------------------------------------------------------------------------------------------------------


def box_of(rows: int, batch: int, size: Sequence[int]) -> tuple[int, int, int]:
    """The box of ``rows`` (a power of two) that covers (batch, *size) with the fewest boxes; of those the widest."""
    powers = [1 << e for e in range(rows.bit_length())]
    found = [(rows // (h * w), h, w) for h, w in itertools.product(powers, powers) if h * w <= rows]

    def cost(box: tuple[int, int, int]) -> tuple[int, int, int]:
        return math.prod(-(-n // b) for n, b in zip((batch, *size), box, strict=True)), -box[2], -box[1]

    return min(found, key=cost)


def _stages(tile: BoxPlan, itemsize: int, device: Device) -> int:
    """Buffers that fit, where ``tile`` has one."""
    room = min(device.shared_memory, device.shared_per_multiprocessor // tile.blocks - SYSTEM)
    each = (tile.block_m + tile.block_n) * tile.block_k * itemsize
    return 1 + (room - tile.shared_memory(itemsize)) // each


def candidates(
    step: Step,
    batch: int,
    input_size: tuple[int, ...],
    precision: Precision,
    device: Device,
    channels_last: bool = True,
) -> list[BoxPlan]:
    """Every plan of the kernel for ``step`` on x (batch, C_in, *input_size), by modelled time; none where `why_not` has
    a reason."""
    if why_not(step, batch, input_size, precision, device, channels_last) is not None:
        return []
    low = lower(step.spec, input_size, channels_last)
    out = step.spec.output_size(input_size)
    plans = sorted(
        _plans(low, batch, out, precision, device), key=lambda p: modelled_clocks(p, batch, out, precision, device)
    )
    return list(dict.fromkeys(plans))


def _plans(low: Lowering, batch: int, out: Sequence[int], precision: Precision, device: Device) -> Iterator[BoxPlan]:
    channels_in, columns, itemsize = low.channels_in, low.columns, precision.itemsize
    deep = channels_in % 64 == 0 if _in_parts(low) else channels_in > 32
    block_k = 64 if deep else 32
    phase = [o // p for o, p in zip(out, low.phases, strict=True)]
    for m, n, warps in TILES:
        if n >= 2 * columns or (_out_parts(low) and columns % n):
            continue
        box = box_of(m, batch, phase)
        for blocks in (1, 2) if warps == 4 else (1,):
            tile = BoxPlan(low, m, n, block_k, 1, warps, 1, box=box, blocks=blocks)
            stages = min(MOST_STAGES, _stages(tile, itemsize, device))
            if stages >= 2:
                yield replace(tile, num_stages=stages)


def modelled_clocks(
    plan: BoxPlan, batch: int, output_size: Sequence[int], precision: Precision, device: Device
) -> float:
    """Modelled time (only comparisons mean anything): of its rounds of tiles, each as long as the slowest of tensor
    cores, shared memory and L2, and its store, which programs on one multiprocessor hide from each other."""
    parts = trip_clocks(plan, precision, device)
    trip = max(parts["tensor"], parts["shared"], parts["l2"])
    per_sm = -(-plan.tiles(batch, tuple(output_size)) // device.multiprocessors)
    store = plan.block_m * plan.block_n * precision.itemsize / 32
    return per_sm * (plan.steps() * trip + (store + PROLOGUE / 2) / plan.blocks)


@lru_cache(maxsize=4096)
def chosen(
    step: Step,
    batch: int,
    input_size: tuple[int, ...],
    precision: Precision,
    device: Device,
    channels_last: bool = True,
) -> BoxPlan | None:
    """The plan that a call takes, or None: the pointer kernel's."""
    if not HOPPER:
        return None
    found = candidates(step, batch, input_size, precision, device, channels_last)
    return found[0] if found else None
