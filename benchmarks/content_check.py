"""``python -m benchmarks.content_check``: what it costs on a CPU that no old weight is ever served.

Every bit of a weight is hashed (`cnnfast.cpu.content`) once, and again after whatever could have written to it. Two
tables: the rate of that hash beside other ways to see a change and beside a copy, and what looking costs of a DCGAN's
call. Times are medians of interleaved repeats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import cnnfast
from cnnfast.cpu.content import _hash as hash_of
from cnnfast.generators import create_model
from cnnfast.timing import Timing, measure

from .report import environment

SIZES = (2**18, 2**20, 2**21, 2**23, 2**24, 2**26)  # bytes
BATCHES = (1, 16, 64)
DTYPES = (torch.float32, torch.bfloat16)


def _rates(size: int) -> dict[str, float]:
    """GB/s of a weight of ``size`` bytes, by way; each reads it once (the copy writes as much, `torch.equal` and
    its copy read twice as much)."""
    weight = torch.randn(size // 4)
    copy, target = weight.clone(), torch.empty_like(weight)
    ways: dict[str, Callable[[], object]] = {
        "XXH3": lambda: hash_of(weight),
        "torch.equal with a copy": lambda: torch.equal(weight, copy),
        "torch.hash_tensor": lambda: torch.hash_tensor(weight),
        "sum of int64": lambda: weight.view(torch.int64).sum().item(),
        "copy": lambda: target.copy_(weight),
    }
    return {name: size / t.median / 1e9 for name, t in measure(ways, repeats=30, block_seconds=0.01).items()}


def _calls(batch: int, dtype: torch.dtype) -> dict[str, Timing]:
    models: dict[str, nn.Module] = {}
    for name, container in (("eager", nn.Sequential), ("checked", cnnfast.Sequential), ("frozen", cnnfast.Sequential)):
        model = create_model("dcgan", sequential=container).eval().to(dtype).to(memory_format=torch.channels_last)
        models[name] = model
    cnnfast.freeze(models["frozen"])
    z = torch.randn(batch, 100, 1, 1).to(dtype)
    with torch.inference_mode():
        return measure({name: (lambda m=m: m(z)) for name, m in models.items()}, repeats=40)


def main() -> None:
    env = environment()
    print("; ".join(f"{name}: {env[name]}" for name in ("date", "processor", "instruction set", "threads", "torch")))
    rows = {size: _rates(size) for size in SIZES}
    names = list(rows[SIZES[0]])
    print("\nGB/s of a weight's bytes")
    print(f"{'':>10}" + "".join(f"{name:>26}" for name in names))
    for size, found in rows.items():
        print(f"{size / 2**20:>7.2f} MB" + "".join(f"{found[name]:>26.1f}" for name in names))
    print("\nDCGAN 64x64, channels-last: ms of a call [quartiles]; share of the check: 1 - frozen / checked")
    for dtype in DTYPES:
        for batch in BATCHES:
            t = _calls(batch, dtype)
            share = 1 - t["frozen"].median / t["checked"].median
            print(
                f"{str(dtype).removeprefix('torch.'):<9} batch {batch:<3}"
                + "".join(f" {name} {timing!s:<26}" for name, timing in t.items())
                + f" share {share:.1%}"
            )


if __name__ == "__main__":
    main()
