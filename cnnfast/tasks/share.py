"""A training by several processes: each takes its part of every batch, and gradients and statistics are those of all.

What DistributedDataParallel does, by hand: it takes no SyncBatchNorm on a CPU, no second derivatives, and batches that
divide evenly only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .ranks import Ranks

__all__ = ["Share", "together"]


@dataclass(frozen=True)
class Share:
    """Process ``rank`` of ``size`` that train together, by the default process group; one alone needs none."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether it is this process that writes and prints."""
        return self.rank == 0

    def part(self, batch: int) -> slice:
        """Of a batch the images of this process; they differ by one in number where it does not divide."""
        return slice(batch * self.rank // self.size, batch * (self.rank + 1) // self.size)

    def weight(self, batch: int) -> float:
        """Of a mean over this process's images in the mean over all."""
        mine = self.part(batch)
        return (mine.stop - mine.start) / batch

    def synchronised(self, module: nn.Module) -> nn.Module:
        """``module``, its batch norms with the statistics of all processes."""
        return module if self.size == 1 else nn.SyncBatchNorm.convert_sync_batchnorm(module)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Each of the tensors becomes its sum over all processes, in one exchange."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(total.view(t.shape))

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of the processes: the same answer in all."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))  # on the CPU: no GPU is waited for
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)


@contextmanager
def together(ranks: Ranks) -> Iterator[Share]:
    """The share of this process, and the group around it: gloo's on a CPU, NCCL's on GPUs."""
    if ranks.size == 1:
        yield Share()
        return
    dist.init_process_group()
    try:
        yield Share(ranks.rank, ranks.size)
    finally:
        dist.destroy_process_group()
