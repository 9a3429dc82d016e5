"""How a convolution is launched: the form the kernel sees (`Lowering`) and the tile (`Plan`). `conv_choice` picks.

Everything here is pure: no tensor, no GPU, no Triton.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch

from ..spec import ConvSpec, Phase, Precision, tap_inverse
from .devices import Device

__all__ = [
    "Lowering",
    "Plan",
    "Tile",
    "by_axis",
    "in_three",
    "is_exact",
    "is_valid",
    "lower",
    "takes_three",
    "tap_map",
    "uses_wgmma",
]


# --- lowering: which gather the kernel runs ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Lowering:
    """A 2-D or 3-D convolution as `kernels/conv_transpose.py` runs it.

    ``regime`` "phases": every phase of ``spec`` on the grid. "merged": one gather over the union of the phases' input
    neighbourhoods, columns (a, b, channel). "latent": the same for a 1x1 input, every output position a column block.
    """

    regime: str
    spec: ConvSpec
    merge: tuple[int, ...]
    kernel: tuple[int, ...]  # taps of the gather: spec's own, or the union neighbourhood's
    padding: tuple[int, ...]
    channels_last: bool = True  # the layout of the result

    @property
    def merged(self) -> bool:
        return self.regime != "phases"

    @property
    def transposed(self) -> bool:
        return self.spec.transposed and not self.merged

    @property
    def phases(self) -> tuple[int, ...]:
        """Phases on the grid per dimension."""
        return self.spec.stride if self.transposed else (1,) * self.spec.ndim

    @property
    def columns(self) -> int:
        return math.prod(self.merge) * (self.spec.out_channels // self.spec.groups)

    @property
    def channels_in(self) -> int:
        return self.spec.in_channels // self.spec.groups

    @property
    def max_taps(self) -> int:
        return math.prod(self.kernel) if self.merged else self.spec.max_phase_taps

    def uniform_taps(self, dim: int) -> int:
        """Taps per phase along a dimension if all phases have the same number, else 0."""
        if self.merged:
            return self.kernel[dim]
        counts = {ph.taps for ph in self.spec.phases[dim]}
        return counts.pop() if len(counts) == 1 else 0

    @property
    def read_stride(self) -> tuple[int, ...]:
        """Input positions from one row of a phase to the next: a plain convolution's stride."""
        return (1,) * self.spec.ndim if self.spec.transposed else self.spec.stride

    def constants(self) -> dict[str, int]:
        """The geometry as the kernels' compile-time arguments."""
        s = self.spec
        gcd = [math.gcd(st, d) if self.transposed else 1 for st, d in zip(s.stride, s.dilation, strict=True)]
        inverse = [tap_inverse(st, d) if self.transposed else 0 for st, d in zip(s.stride, s.dilation, strict=True)]
        dilation = (1,) * s.ndim if self.merged else s.dilation
        return dict(
            GROUPS=s.groups, CIN=self.channels_in, COUT=s.out_channels, COLS=self.columns, TRANSPOSED=self.transposed,
            **by_axis("K", self.kernel), **by_axis("S", self.phases), **by_axis("IN_", self.read_stride),
            **by_axis("PAD_", self.padding, 0), **by_axis("D", dilation), **by_axis("G", gcd),
            **by_axis("INV_", inverse, 0), **by_axis("MERGE_", self.merge), MAX_TAPS=self.max_taps,
            **by_axis("TAPS_", [self.uniform_taps(dim) for dim in range(s.ndim)]),
        )  # fmt: skip

    def rows(self, batch: int, output_size: tuple[int, ...]) -> int:
        """Rows of the largest phase."""
        step = [p * m for p, m in zip(self.phases, self.merge, strict=True)]
        return batch * math.prod(-(-o // s) for o, s in zip(output_size, step, strict=True))


def by_axis(name: str, values: Sequence[int], flat: int = 1) -> dict[str, int]:
    """A value of each dimension as the kernels name them, by D, H and W; ``flat``: D's in two dimensions."""
    return {f"{name}{axis}": v for axis, v in zip("DHW", (flat, *values)[-3:], strict=True)}


def in_three(size: Sequence[int]) -> tuple[int | None, ...]:
    """A spatial size as the kernels take it: (D, H, W), D None where there is none."""
    return (None, *size)[-3:]


def _reach(phases: tuple[Phase, ...]) -> tuple[int, int]:
    """Smallest and largest input offset of a dimension's phases (0, 0 if no phase has a tap)."""
    offsets = [off for ph in phases for _, off in ph.pairs()] or [0]
    return min(offsets), max(offsets)


def tap_map(low: Lowering) -> list[list[list[int]]]:
    """For a merged lowering, per dimension ``map[a][u]``: the tap of ``spec`` that column block ``a`` applies at union
    tap ``u``, or -1 where it has none."""
    s = low.spec
    out = []
    for dim in range(s.ndim):
        if low.regime == "latent":
            # The one input position 0: output a takes the tap t with a + p = d*t.
            p, d, k = s.padding[dim], s.dilation[dim], s.kernel_size[dim]
            if not s.transposed:
                raise ValueError("a latent lowering is of a transposed convolution")
            rows = [[(a + p) // d if (a + p) % d == 0 and (a + p) // d < k else -1] for a in range(low.merge[dim])]
        else:
            lo, _ = _reach(s.phases[dim])
            rows = [[-1] * low.kernel[dim] for _ in range(low.merge[dim])]
            for a, ph in enumerate(s.phases[dim]):
                for tap, off in ph.pairs():
                    rows[a][off - lo] = tap
        out.append(rows)
    return out


def _phases(spec: ConvSpec) -> Lowering:
    return Lowering("phases", spec, (1,) * spec.ndim, spec.kernel_size, spec.padding)


def _merged(spec: ConvSpec) -> Lowering:
    reach = [_reach(dim) for dim in spec.phases]
    kernel = tuple(hi - lo + 1 for lo, hi in reach)
    return Lowering("merged", spec, spec.stride, kernel, tuple(-lo for lo, _ in reach))


FEW_COLUMNS = 16  # output channels below which phases share a tile


@lru_cache(maxsize=4096)
def lower(spec: ConvSpec, input_size: tuple[int, ...], channels_last: bool = True) -> Lowering:
    """The form of ``spec`` (2-D or 3-D) for an input of this size and a result in this layout."""
    return replace(_lower(spec, input_size), channels_last=channels_last)


def _lower(spec: ConvSpec, input_size: tuple[int, ...]) -> Lowering:
    if not spec.transposed:
        return _phases(spec)
    ones = (1,) * spec.ndim
    if tuple(input_size) == ones:
        return Lowering("latent", spec, spec.output_size(input_size), ones, (0,) * spec.ndim)
    if spec.stride != ones:
        merged = _merged(spec)
        wasted = math.prod(merged.kernel) * math.prod(spec.stride) > math.prod(spec.kernel_size)
        if spec.out_channels // spec.groups < FEW_COLUMNS or not wasted:
            return merged
    return _phases(spec)


# --- plan: the tile ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A tile and its schedule, for one lowering. ``splits``: whether the binary can cut K in parts at all (their number
    is a run-time argument). ``three``: exact float32's products are each three of TF32's, on tensor cores."""

    lowering: Lowering
    block_m: int
    block_n: int
    block_k: int
    unroll: int
    num_warps: int
    num_stages: int
    splits: bool = False
    split_k: int = 1
    group_m: int = 8
    three: bool = False

    @property
    def name(self) -> str:
        split = f" split{self.split_k}" if self.splits else ""
        three = " tf32x3" if self.three else ""
        return (
            f"{self.lowering.regime} {self.block_m}x{self.block_n}x{self.block_k}*{self.unroll} "
            f"w{self.num_warps} s{self.num_stages}{split}{three}"
        )

    def tiles(self, batch: int, output_size: tuple[int, ...]) -> int:
        """Programs along the grid's x axis."""
        return self.tiles_of(self.lowering.rows(batch, output_size))

    def tiles_of(self, rows: int) -> int:
        """The same, for ``rows`` rows of the largest phase."""
        low = self.lowering
        return -(-rows // self.block_m) * -(-low.columns // self.block_n) * math.prod(low.phases)

    def grid(self, batch: int, output_size: tuple[int, ...]) -> tuple[int, int, int]:
        return self.tiles(batch, output_size), self.split_k, self.lowering.spec.groups

    def steps(self) -> int:
        """Trips of the main loop of the largest phase, before splitting."""
        return self.lowering.max_taps * -(-self.lowering.channels_in // (self.block_k * self.unroll))

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of the pipeline's buffers (an upper bound of what the compiler takes, which a test compares)."""
        buffers = self.num_stages * self.unroll * (self.block_m + self.block_n) * self.block_k * itemsize
        return buffers + 64  # barriers (sm_100 has 16 bytes of them)


class Tile(Protocol):
    """What the model looks at: rows x columns x the depth of a trip, and the schedule."""

    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...
    @property
    def block_k(self) -> int: ...
    @property
    def unroll(self) -> int: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def three(self) -> bool: ...


def is_exact(precision: Precision) -> bool:
    """float32 that no tensor core multiplies in one product: on the CUDA cores, or in three (`Tile.three`)."""
    return precision.dtype == torch.float32 and not precision.tf32


MOST_K = 32  # of a block of three products: tensor cores cut their sums (docs/facts.md)


def takes_three(plan: Tile, precision: Precision, device: Device) -> bool:
    """Whether products may be as `Tile.three` says: three of exact float32 alone, and of blocks that are short enough.
    Not by tcgen05 of sm_100, which several products of a trip are not proven for (`is_valid`)."""
    tcgen05 = device.arch // 10 == 10 and plan.block_m >= 64 and plan.num_warps >= 4
    return not plan.three or is_exact(precision) and plan.block_k <= MOST_K and not tcgen05


def uses_wgmma(plan: Tile, device: Device) -> bool:
    """Whether Triton makes wgmma of sm_90 of the plan's products, not mma.sync."""
    return device.arch // 10 == 9 and plan.block_m >= 64 and plan.num_warps >= 4


def is_valid(plan: Plan, precision: Precision, device: Device) -> bool:
    """Whether a plan can run at all: the one predicate of the heuristic and of tuning."""
    m, n, k = plan.block_m, plan.block_n, plan.block_k
    if any(v & (v - 1) or v < 1 for v in (m, n, k, plan.num_warps)) or min(m, n, k) < 16 or plan.unroll < 1:
        return False
    threads = plan.num_warps * 32
    # 128 accumulators a thread leave room for operands and addresses. A CUDA-core product (float32 exact) needs more of
    # those, three products have each operand in two parts (with 64, epilogues spill), and so does a store that finds no
    # two elements of a row together.
    if m * n > threads * (32 if is_exact(precision) or not plan.lowering.channels_last else 128) or m * n < threads * 2:
        return False
    if not takes_three(plan, precision, device):
        return False
    if plan.num_warps > (m // 16) * (n // 16):  # the surplus warps would repeat the work of the others
        return False
    if plan.unroll > 1 and device.arch // 10 == 10:
        # Two pipelined tcgen05 products a trip: the compiled code gave wrong sums when executed in emulation (triton
        # 3.7.1); whether compiler or emulator is at fault is open. One product a trip is right.
        return False
    if plan.unroll > 1 and uses_wgmma(plan, device):  # between two products of a trip Triton waits for all of them
        return False
    # Rows of few channels (the input gradient of an RGB head) are loaded by elements: addresses take registers.
    if plan.lowering.channels_in < 16 and m * n > threads * 64:
        return False
    # Seen by compiling: these spill a few registers.
    if device.arch // 10 == 10 and (m, n, k) == (128, 64, 128) and plan.splits and not plan.lowering.transposed:
        return False
    if device.arch // 10 == 9 and (m, n, plan.num_warps) == (128, 128, 4) and plan.splits:
        return False
    # Seen by compiling: ptxas unrolls short loops of these, and spills a few registers.
    if device.arch // 10 == 8 and (m, n, k) == (128, 32, 32) and not plan.splits:
        return False
    if device.arch == 89 and (m, n, k, plan.unroll) == (64, 64, 64, 2) and not plan.splits:
        return False
    low = plan.lowering
    if low.spec.ndim == 3:  # more numbers to an address; the same
        if m * n > threads * (16 if low.merged else 64) and (plan.splits or low.merged):
            return False
        if device.arch // 10 == 10 and (m, n) == (64, 64) and precision.itemsize == 2:
            return False
        if low.max_taps > 32 and (m, n, k, plan.unroll) == (64, 64, 64, 2):  # a tap's mask is made anew in each trip
            return False
    if device.arch == 80 and low.channels_in < 16 and not low.transposed and max(low.spec.stride) > 1:
        if m * n >= threads * 64 and not plan.splits:
            return False
    if plan.shared_memory(precision.itemsize) > device.shared_memory:
        return False
    most = max(1, plan.steps()) if plan.splits else 1
    return 1 <= plan.split_k <= min(most, 65535)
