"""One of two processes that train a GAN together: ``python -m tests.share_jobs RANK FOLDER``. What came of each loss
goes to FOLDER/RANK.pt. `tests/tasks/test_share.py` starts it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cnnfast.tasks.gan import Options, Trainer
from cnnfast.tasks.losses import LOSSES
from cnnfast.tasks.share import Share

STEPS, BATCH = 4, 5  # which two processes do not share evenly


class Apart(Share):
    """Batch norms with the statistics of each process: what must not be."""

    def synchronised(self, module: nn.Module) -> nn.Module:
        return module


def images(channels: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (13, channels, 16, 16), generator=draw, dtype=torch.uint8)


def trained(loss: str, share: Share, channels: int = 3) -> dict[str, Any]:
    options = Options(loss=loss, batch_size=BATCH, width=8, nz=8, image_size=16)
    trainer = Trainer(options, images(channels), torch.device("cpu"), share)
    for _ in range(STEPS):
        trainer.step()
    state = trainer.state()
    return {name: state[name] for name in ("curves", "generator", "discriminator", "average")}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    share = Share(rank, 2)
    results: dict[str, Any] = {loss: trained(loss, share) for loss in LOSSES}
    results["grey"] = trained("bce", share, channels=1)
    results["apart"] = trained("bce", Apart(rank, 2))
    results["any"] = [share.any(flag) for flag in (False, rank == 1, rank == 0, True)]
    parts = [torch.full((2, 3), rank + 1.0), torch.arange(4.0).view(2, 2).t()]
    share.add_up(parts)
    results["sums"] = parts
    dist.destroy_process_group()
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
