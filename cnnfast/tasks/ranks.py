"""One of several processes that ``torchrun`` started (or anything else that sets its variables): its part of the work.

Piece k belongs to process k modulo their number. Which pieces there are follows from the command line, and none needs
another's result: nothing is exchanged, so there is no process group, which would have to be set up, could time out and
would take as long as its slowest member. Only where one has failed does it matter what the others do: see `finish`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..messages import UsageError

__all__ = ["Ranks", "finish", "here", "take_device"]

Piece = TypeVar("Piece")


@dataclass(frozen=True)
class Ranks:
    """``rank`` of ``size`` processes, on this machine ``local_rank`` of ``local_size``."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def part(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Those of this process."""
        return pieces[self.rank :: self.size]

    @property
    def name(self) -> str:
        """What its messages begin with; empty where it is alone."""
        return f"rank {self.rank} of {self.size}: " if self.size > 1 else ""

    @property
    def bar_off(self) -> bool | None:
        """tqdm's ``disable``: one bar on a terminal, that of the first process."""
        return None if self.rank == 0 else True


def here() -> Ranks:
    """This process, by ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``; without them it is alone, and
    without the last two there is one process a machine. UsageError for values that cannot be."""
    given = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    if given["RANK"] is None and given["WORLD_SIZE"] is None:
        return Ranks()
    try:
        rank, size = int(given["RANK"] or ""), int(given["WORLD_SIZE"] or "")
        local_rank, local_size = int(given["LOCAL_RANK"] or 0), int(given["LOCAL_WORLD_SIZE"] or 1)
        known = 0 <= rank < size and local_rank >= 0 and local_size >= 1
    except ValueError:
        known = False
    if not known:
        said = " ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise UsageError(f"{said}: expected 0 <= RANK < WORLD_SIZE, both as torchrun sets them, or neither")
    return Ranks(rank, size, local_rank, local_size)


def take_device(ranks: Ranks) -> None:
    """Of several CUDA devices make the one of this process's turn the current one: what "cuda" means from now on. More
    processes than devices share them."""
    import torch  # here: a command that is refused needs none

    if ranks.size > 1 and torch.cuda.device_count() > 1:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())


def finish(ranks: Ranks, failed: bool) -> None:
    """Say that this process has done its part; one that has ``failed`` on some pieces returns when all have.

    torchrun ends all processes as soon as one ends with a failure: a damaged picture would keep the others from their
    work, and at the next try again. Only torchrun does, and it keeps a store for its processes.
    """
    if ranks.size == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    done = f"cnnfast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/done"
    store.add(done, 1)
    while failed and store.add(done, 0) < ranks.size:
        time.sleep(0.2)
