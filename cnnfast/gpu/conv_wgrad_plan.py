"""How a convolution's weight gradient is launched: the product that the kernel sees, its tile, and which tile.

Pure, as `conv_plan` and `conv_choice` are; the model of time is theirs, with the instructions of this kernel's loop. A
layer has a tile for each of `SIZES`, and of each two binaries at most: for images that boxes of positions fill, and for
others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ..spec import ConvSpec, Precision
from .conv_choice import FULL_WAVE, PROLOGUE, SECOND_PASS, TRIP, kinds, registers, trip_clocks
from .conv_plan import is_exact, takes_three
from .devices import Device, resident_blocks

__all__ = ["SIZES", "WgradPlan", "choose_wgrad_plan", "is_valid_wgrad"]

ALIKE = 1.1  # modelled times that do not tell two plans apart
COPIES = {2: 16, 4: 8}  # by itemsize, of a thread and operand in a trip: more take too many registers
SIZES = (2**9, 2**12, 2**15)  # positions for which a layer's tiles are chosen: within 2 % of a tile for every size


@dataclass(frozen=True)
class WgradPlan:
    """A tile of ``block_m`` channels of A x ``block_n`` columns, a trip of ``block_k`` positions, and its schedule.

    A is the tensor on the grid of the gather: a transposed convolution's input, a plain one's result. Columns are (tap,
    channel of B). ``box``: images, lines and positions of a line that a trip takes, run-time arguments; ``even``:
    whether boxes are full and fill the grid; ``splits``: parts of the boxes, a run-time argument.
    """

    spec: ConvSpec
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    box: tuple[int, int, int] = (1, 1, 1)
    even: bool = False
    splits: int = 1
    unroll: int = 1
    three: bool = False  # exact float32's products are each three of TF32's

    @property
    def name(self) -> str:
        box = "x".join(map(str, self.box)) + ("" if self.even else " ragged")
        return (
            f"wgrad {self.block_m}x{self.block_n}x{self.block_k} box{box} w{self.num_warps} s{self.num_stages} "
            f"split{self.splits}{' tf32x3' if self.three else ''}"
        )

    @property
    def channels(self) -> tuple[int, int]:
        """Of A and B, in a group: the first two dimensions of the weight."""
        first, second, *_ = self.spec.weight_shape
        return first // self.spec.groups, second

    def tiles(self) -> int:
        """Programs of one group and split."""
        a, b = self.channels
        return -(-a // self.block_m) * -(-math.prod(self.spec.kernel_size) * b // self.block_n)

    def trips(self, batch: int, grid: Sequence[int]) -> int:
        """Of the main loop over all positions, before splitting."""
        return _boxes((batch, *grid), self.box)

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
    if any(v & (v - 1) or v < 1 for v in (m, n, k, plan.num_warps)) or min(m, n, k) < 16:
        return False
    if min(plan.box) < 1 or math.prod(plan.box) > k or plan.even and math.prod(plan.box) < k:
        return False
    threads = plan.num_warps * 32
    if m * n > threads * (32 if is_exact(precision) else 128) or m * n < threads * 2:
        return False
    if not takes_three(plan, precision, device):
        return False
    if plan.num_warps > (m // 16) * (n // 16):
        return False
    if plan.shared_memory(precision.itemsize) > device.shared_memory:
        return False
    return 1 <= plan.splits <= 65535


def _boxes(positions: Sequence[int], box: Sequence[int]) -> int:
    """How many boxes cover the positions (images, lines, positions of a line)."""
    return math.prod(-(-n // r) for n, r in zip(positions, box, strict=True))


def _box(batch: int, grid: tuple[int, int], k: int) -> tuple[tuple[int, int, int], bool]:
    """The box of a trip of ``k`` positions, a power of two, and whether it is even: the widest of the even ones,
    otherwise the widest of those that cover all positions in the fewest trips."""
    h, w = grid
    rw = min(k, w & -w)
    rh = min(k // rw, h & -h)
    rn = k // (rw * rh)
    if batch % rn == 0:
        return (rn, rh, rw), True
    pairs = ((rh, rw) for rw in range(min(k, w), 0, -1) for rh in range(min(k // rw, h), 0, -1))
    found = ((min(k // (rh * rw), batch), rh, rw) for rh, rw in pairs)
    return min(found, key=lambda box: _boxes((batch, h, w), box)), False


def _tiles(spec: ConvSpec, precision: Precision, device: Device, three: bool) -> Iterator[WgradPlan]:
    exact, wide, generation = is_exact(precision) and not three, precision.itemsize == 4, device.arch // 10
    k = 64 if not wide else 32 if not exact else 16
    sizes = ((64, 64), (64, 32), (32, 64), (32, 32), (32, 16), (16, 32), (16, 16)) if exact or three else (
        (128, 128), (128, 64), (64, 128), (64, 64), (128, 32), (32, 128), (64, 32), (32, 64), (32, 32), (64, 16),
        (16, 64), (32, 16), (16, 32), (16, 16),
    )  # fmt: skip
    if three:
        sizes = ((128, 64), *sizes)
    if generation in (9, 10) and not wide:  # their operands stay out of registers
        sizes = ((256, 128), (128, 256), *sizes)
    for m, n in sizes:
        if exact:
            warps = max(1, m * n // 512)
        else:
            most = 128 * 64 if three else 128 * 128
            warps = 8 if m * n >= most else 4 if m * n >= 32 * 64 else 2 if m * n > 16 * 16 else 1
        plan = WgradPlan(spec, m, n, k, warps, 2 if exact else 3, three=three)
        copies = _copies(plan, precision)
        few = m * n <= 32 * 32 or max(copies) <= COPIES[precision.itemsize]
        if generation == 12 and not wide and m * n > 64 * 64 and sum(copies) > COPIES[precision.itemsize]:
            few = False  # seen by compiling: of odd channels, the largest tile spills
        if few and is_valid_wgrad(plan, precision, device):
            yield plan


def _copies(plan: WgradPlan, precision: Precision) -> tuple[float, float]:
    """Of a thread in a trip, from A and B: of 16 bytes, or narrower where channels are odd."""
    widths = (math.gcd(16, channels * precision.itemsize) for channels in plan.channels)
    a, b = (n / width for n, width in zip((plan.block_m, plan.block_n), widths, strict=True))
    per_thread = plan.block_k * precision.itemsize / (32 * plan.num_warps)
    return a * per_thread, b * per_thread


def _issue(plan: WgradPlan, precision: Precision, device: Device) -> float:
    """Clocks of the issue slots that a trip's instructions take, as counted in compiled code with even boxes: each
    within 10 % from 64x64 up. A copy of A takes an address, one of B tests and clamps it too; TF32's operands are read
    from shared memory and rounded."""
    m, n, k, warps, size = plan.block_m, plan.block_n, plan.block_k, plan.num_warps, precision.itemsize
    generation = device.arch // 10 if m >= 64 and warps >= 4 else 0
    if generation == 9:  # wgmma
        a, b, rest = 4, 12, 57 + m * k * size / (128 * warps)
    elif generation == 10:  # tcgen05, issued by one thread
        a, b, rest = 6, 14, 70
    else:  # mma.sync
        a, b, rest = 4, 12, 35 + m * n * k * size / warps / (2730 if size == 2 else 4096)
    copies_a, copies_b = _copies(plan, precision)
    instructions = rest + a * copies_a + b * copies_b
    if size == 4:
        read = (m + n) / warps
        if not generation:  # by each warp for its own part of the tile
            read = min(m // i + max(n * i // warps, 8) for i in (1, 2, 4, 8) if i <= warps and i * 16 <= m)
        instructions += 3.4 * read * k / 32
    return instructions * warps / 4


def _clocks(plan: WgradPlan, trips: int, precision: Precision, device: Device) -> float:
    """Modelled time (only comparisons mean anything), as `conv_choice.modelled_clocks`."""
    resident = resident_blocks(device, plan.num_warps, registers(plan), plan.shared_memory(precision.itemsize))
    per_sm = -(-plan.tiles() * plan.splits * plan.spec.groups // device.multiprocessors)
    concurrent = min(resident, per_sm)
    parts = trip_clocks(plan, precision, device)
    if not is_exact(precision):  # of exact ones the forward's are within 10 %
        parts["issue"] = _issue(plan, precision, device)
    latency = TRIP / (plan.num_stages - 1) / concurrent
    tile = -(-trips // plan.splits) * (max(*parts.values(), latency) + sum(parts.values()) / 10)
    busy = per_sm * (tile + PROLOGUE / concurrent + plan.block_m * plan.block_n / 8)
    sums = 8 * plan.workspace()
    return busy + (SECOND_PASS + sums / device.dram_bytes_per_clock if plan.splits > 1 else 0)


SPLITS = (1, 2, 4, 8, 16, 32, 64)


@lru_cache(maxsize=1024)
def _tile(spec: ConvSpec, precision: Precision, device: Device, positions: int, among: tuple[bool, ...]) -> WgradPlan:
    """The layer's tile for about so many positions, of these kinds (`conv_choice.KINDS`)."""
    found = [plan for three in among for plan in _tiles(spec, precision, device, three)]
    if not found:
        raise RuntimeError(f"no valid plan for the weight gradient of {spec} in {precision.dtype} on {device.name}")
    trips = {plan: positions // plan.block_k for plan in found}
    return min(found, key=lambda p: min(_clocks(q, trips[p], precision, device) for q in _split(p, trips[p], device)))


def _split(plan: WgradPlan, trips: int, device: Device) -> list[WgradPlan]:
    """The plan with its positions in one part, and in parts of at least four trips: powers of two, and as many as fill
    the multiprocessors one to four times."""
    tiles = plan.tiles() * plan.spec.groups
    waves = (n * device.multiprocessors // tiles for n in (1, 2, 3, 4))
    return [replace(plan, splits=n) for n in sorted({*SPLITS, *waves}) if n == 1 or 2 <= n <= trips // 4]


@lru_cache(maxsize=4096)
def choose_wgrad_plan(
    spec: ConvSpec, batch: int, grid: tuple[int, int], precision: Precision, device: Device
) -> WgradPlan:
    """The plan for the weight gradient of ``spec`` where A has ``batch`` images (in three dimensions: planes) of size
    ``grid``. Deterministic.

    RuntimeError where no plan is valid.
    """
    positions = math.log(batch * math.prod(grid))
    size = min(SIZES, key=lambda size: abs(math.log(size) - positions))
    plan = _tile(spec, precision, device, size, kinds(precision))
    box, even = _box(batch, grid, plan.block_k)
    plan = replace(plan, box=box, even=even)
    trips = plan.trips(batch, grid)
    clocks = {p: _clocks(p, trips, precision, device) for p in _split(plan, trips, device)}
    best = min(clocks, key=lambda p: clocks[p])
    wave = min(FULL_WAVE * device.multiprocessors, best.tiles() * best.splits * spec.groups)
    # The fewest parts that fill the GPU: they cost memory.
    alike = (p for p in clocks if clocks[p] <= ALIKE * clocks[best] and p.tiles() * p.splits * spec.groups >= wave)
    return next(alike, best)
