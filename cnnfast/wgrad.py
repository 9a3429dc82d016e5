"""How a convolution's weight gradient is launched: the product that the kernel sees, its tile, and which tile.

Pure, as `plan` and `choice` are; the model of time is theirs. The tile depends on the layer alone, so that a layer
needs two binaries at most: for wide and for narrow images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .choice import FULL_WAVE, PROLOGUE, SECOND_PASS, TRIP, registers, trip_clocks
from .devices import Device, resident_blocks
from .plan import is_exact
from .spec import ConvSpec, Precision

__all__ = ["WgradPlan", "choose_wgrad_plan", "is_valid_wgrad"]

FEW_COLUMNS = 16  # channels of B below which the taps share a tile
NARROW = 4  # positions of a line that stay together where images are narrow
ALIKE = 1.1  # modelled times that do not tell two plans apart
WASTE = 1.25  # of positions that a wide run may have beyond a line's end
UNITS = 4096  # trips of the main loop for which the tile is chosen: layers are trained on many positions


@dataclass(frozen=True)
class WgradPlan:
    """A tile of ``block_m`` channels of A x ``block_n`` columns, a trip of ``block_k`` positions, and its schedule.

    A is the tensor on the grid of the gather: a transposed convolution's input, a plain one's result. ``run``: how many
    of a trip's positions lie in one line of the image; ``splits``: parts of the positions, a run-time argument.
    """

    spec: ConvSpec
    block_m: int
    block_n: int
    block_k: int
    run: int
    num_warps: int
    num_stages: int
    splits: int = 1
    unroll: int = 1

    @property
    def name(self) -> str:
        return (
            f"wgrad {self.block_m}x{self.block_n}x{self.block_k} run{self.run} w{self.num_warps} s{self.num_stages} "
            f"split{self.splits}"
        )

    @property
    def channels(self) -> tuple[int, int]:
        """Of A and B, in a group: the first two dimensions of the weight."""
        first, second, *_ = self.spec.weight_shape
        return first // self.spec.groups, second

    @property
    def merged(self) -> bool:
        """Whether a tile's columns are of several taps."""
        return self.channels[1] < FEW_COLUMNS

    def tiles(self) -> int:
        """Programs of one group and split."""
        (a, b), taps = self.channels, math.prod(self.spec.kernel_size)
        columns = -(-taps * b // self.block_n) if self.merged else taps * -(-b // self.block_n)
        return -(-a // self.block_m) * columns

    def trips(self, batch: int, grid: Sequence[int]) -> int:
        """Of the main loop over all positions, before splitting."""
        lines = self.block_k // self.run
        return -(-batch * grid[0] // lines) * -(-grid[1] // self.run)

    def grid(self) -> tuple[int, int, int]:
        return self.tiles(), self.splits, self.spec.groups

    def shared_memory(self, itemsize: int) -> int:
        """Bytes of the pipeline's buffers."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * itemsize + 64

    def workspace(self) -> int:
        """Float32 partial sums, in elements."""
        return self.splits * math.prod(self.spec.weight_shape) if self.splits > 1 else 0


def is_valid_wgrad(plan: WgradPlan, precision: Precision, device: Device) -> bool:
    """Whether a plan can run at all."""
    m, n, k = plan.block_m, plan.block_n, plan.block_k
    if any(v & (v - 1) or v < 1 for v in (m, n, k, plan.run, plan.num_warps)) or min(m, n, k) < 16 or plan.run > k:
        return False
    threads = plan.num_warps * 32
    if m * n > threads * (32 if is_exact(precision) else 128) or m * n < threads * 2:
        return False
    if plan.num_warps > (m // 16) * (n // 16):
        return False
    if plan.shared_memory(precision.itemsize) > device.shared_memory:
        return False
    return 1 <= plan.splits <= 65535


def _tiles(spec: ConvSpec, precision: Precision, device: Device, run: int) -> Iterator[WgradPlan]:
    exact, wide = is_exact(precision), precision.itemsize == 4
    k = 64 if not wide else 32 if not exact else 16
    sizes = ((64, 64), (64, 32), (32, 64), (32, 32), (32, 16), (16, 32), (16, 16)) if exact else (
        (128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (32, 128), (64, 32), (32, 64), (32, 32), (64, 16),
        (16, 64), (32, 16), (16, 32), (16, 16),
    )  # fmt: skip
    for m, n in sizes:
        if wide and m * n > 64 * 64:
            continue
        if exact:
            warps = max(1, m * n // 512)
        else:
            warps = 8 if m * n >= 128 * 128 else 4 if m * n >= 32 * 64 else 2 if m * n > 16 * 16 else 1
        plan = WgradPlan(spec, m, n, k, min(run, k), warps, 2 if exact else 3)
        if is_valid_wgrad(plan, precision, device):
            yield plan


def _clocks(plan: WgradPlan, trips: int, precision: Precision, device: Device) -> float:
    """Modelled time (only comparisons mean anything), as `choice.modelled_clocks`."""
    resident = resident_blocks(device, plan.num_warps, registers(plan), plan.shared_memory(precision.itemsize))
    per_sm = -(-plan.tiles() * plan.splits * plan.spec.groups // device.multiprocessors)
    concurrent = min(resident, per_sm)
    parts = trip_clocks(plan, precision, device)
    latency = TRIP / (plan.num_stages - 1) / concurrent
    tile = -(-trips // plan.splits) * (max(*parts.values(), latency) + sum(parts.values()) / 10)
    busy = per_sm * (tile + PROLOGUE / concurrent + plan.block_m * plan.block_n / 8)
    sums = 8 * plan.workspace()
    return busy + (SECOND_PASS + sums / device.dram_bytes_per_clock if plan.splits > 1 else 0)


SPLITS = (1, 2, 4, 8, 16, 32, 64)


@lru_cache(maxsize=1024)
def _tile(spec: ConvSpec, precision: Precision, device: Device, run: int) -> WgradPlan:
    """The layer's tile for images whose lines hold ``run`` positions of a trip."""
    found = list(_tiles(spec, precision, device, run))
    if not found:
        raise RuntimeError(f"no valid plan for the weight gradient of {spec} in {precision.dtype} on {device.name}")
    return min(found, key=lambda plan: min(_clocks(p, UNITS, precision, device) for p in _split(plan, UNITS)))


def _split(plan: WgradPlan, trips: int) -> list[WgradPlan]:
    """The plan with its positions in one part, and in parts of at least four trips."""
    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    return [WgradPlan(**{**fields, "splits": n}) for n in SPLITS if n == 1 or trips >= 4 * n]


@lru_cache(maxsize=4096)
def choose_wgrad_plan(
    spec: ConvSpec, batch: int, grid: tuple[int, int], precision: Precision, device: Device
) -> WgradPlan:
    """The plan for the weight gradient of ``spec`` (2-D) where A has ``batch`` images of size ``grid``. Deterministic.

    RuntimeError where no plan is valid.
    """
    k = 64 if precision.itemsize == 2 else 32
    wide = -(-grid[1] // k) * k <= WASTE * grid[1]
    plan = _tile(spec, precision, device, k if wide else NARROW)
    trips = plan.trips(batch, grid)
    clocks = {p: _clocks(p, trips, precision, device) for p in _split(plan, trips)}
    best = min(clocks, key=lambda p: clocks[p])
    wave = min(FULL_WAVE * device.multiprocessors, best.tiles() * best.splits * spec.groups)
    # The fewest parts that fill the GPU: they cost memory.
    alike = (p for p in clocks if clocks[p] <= ALIKE * clocks[best] and p.tiles() * p.splits * spec.groups >= wave)
    return next(alike, best)
