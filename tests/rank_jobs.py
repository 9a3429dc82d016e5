"""What `tests.tasks.test_ranks` runs in processes of their own: ``python -m tests.rank_jobs JOB ...``, or by torchrun.

generate ...            the command, with a small generator of random weights
copy SLOW IN... OUT     copies files as a task does; empty ones are damaged, that named SLOW takes two seconds
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from cnnfast.__main__ import main
from cnnfast.generators import DCGANConfig, DCGANGenerator
from cnnfast.messages import CnnfastError
from cnnfast.tasks import batch, sampling


def small_generator(name: str, pretrained: bool, weights_file: object, *, sequential: type[nn.Sequential]) -> nn.Module:
    """In the place of `create_model`: the same weights in every process."""
    config = DCGANConfig(nz=6, ngf=4, image_size=32, classes=8 if name == "dcgan_eyes" else 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = DCGANGenerator(config, sequential=sequential)
        with torch.no_grad():  # pictures with something in them
            for p in made.parameters():
                if p.dim() == 4:
                    p.mul_(10)
    return made.eval()


def copy(slow: str, files: list[str], folder: str) -> int:
    def work(source: Path, target: Path, told: Callable[[float], object]) -> None:
        if source.name == slow:
            time.sleep(2)
        if not source.stat().st_size:
            raise CnnfastError(f"{source.name} is damaged")
        target.write_bytes(source.read_bytes())

    return batch.process(batch.plan([Path(f) for f in files], Path(folder)), work)


if __name__ == "__main__":
    if sys.argv[1] == "copy":
        sys.exit(copy(sys.argv[2], sys.argv[3:-1], sys.argv[-1]))
    sampling.create_model = small_generator  # type: ignore[assignment]
    sys.exit(main(sys.argv[1:]))
