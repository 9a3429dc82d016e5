"""What is timed: layers of real generators, whole generators and blocks, as plain `torch.nn` modules.

A case holds no tensor. `Case.build` makes its modules from a fixed seed, and its arithmetic is counted from them, so
that a new case (a layer of another generator) is one entry here and nothing elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnnfast.generators import DCGANConfig, DCGANGenerator
from cnnfast.spec import ConvSpec, collapse_upsample

__all__ = ["CASES", "DTYPES", "GEOMETRIES", "MINI", "Case", "dcgan_cases", "find", "upsample_case"]

SUITES = ("layers", "generator", "upsample")

# What each kind of device is timed in. (float16 on a CPU is no common choice.)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}


@dataclass(frozen=True)
class Case:
    """``make()`` returns a flat `nn.Sequential`; ``input_shape`` is (C, H, W); ``quick`` cases survive ``--quick``."""

    name: str
    suite: str
    input_shape: tuple[int, int, int]
    batches: tuple[int, ...]
    make: Callable[[], nn.Sequential]
    quick: bool = False

    def build(self, seed: int = 0) -> nn.Sequential:
        """The modules in float32 on the CPU, in eval mode, BatchNorm's running statistics those of one random batch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules = self.make()
            norms = [m for m in modules if isinstance(m, nn.BatchNorm2d)]
            if norms:
                momenta = [m.momentum for m in norms]
                for m in norms:
                    m.momentum = 1.0
                with torch.no_grad():
                    modules.train()(torch.randn(8, *self.input_shape))
                for m, momentum in zip(norms, momenta, strict=True):
                    m.momentum = momentum
        return modules.eval()

    def input(self, batch: int, seed: int = 1) -> torch.Tensor:
        """(batch, C, H, W), float32, standard normal; a smaller batch is the beginning of a larger one."""
        return torch.randn(batch, *self.input_shape, generator=torch.Generator().manual_seed(seed))

    def macs(self, batch: int) -> int:
        """Multiply-adds after phase decomposition (`ConvSpec.macs`; an upsampling collapsed into its convolution)."""
        return sum(_macs(spec, batch, size) for spec, size in self._convolutions())

    @property
    def title(self) -> str:
        """``512x4x4 -> 256x8x8``, and the kernel where there is one convolution."""
        found = list(self._convolutions())
        spec, size = found[-1]
        shapes = [self.input_shape, (spec.out_channels, *spec.output_size(size))]
        text = " -> ".join("x".join(map(str, s)) for s in shapes)
        if len(found) > 1:
            return f"{text}, {len(found)} convolutions"
        return f"{text}: {' + '.join(_describe(m) for m in self._skeleton())}"

    def _skeleton(self) -> nn.Sequential:
        with torch.device("meta"):
            return self.make()

    def _convolutions(self) -> Iterator[tuple[ConvSpec, tuple[int, ...]]]:
        """Each convolution's spec and the size of its input."""
        size: tuple[int, ...] = self.input_shape[1:]
        factor: tuple[int, int] | None = None
        for m in self._skeleton():
            if isinstance(m, nn.Upsample):
                assert m.mode == "nearest" and isinstance(m.scale_factor, float)
                factor = (int(m.scale_factor),) * 2
                continue
            if isinstance(m, nn.ConvTranspose2d):
                spec = ConvSpec.make(
                    m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.output_padding, m.groups,
                    m.dilation, ndim=2,
                )  # fmt: skip
            elif isinstance(m, nn.Conv2d):
                assert factor is not None and isinstance(m.padding, tuple)
                spec = collapse_upsample(m.in_channels, m.out_channels, m.kernel_size, factor, m.padding, m.groups)
            else:
                continue
            yield spec, size
            size, factor = spec.output_size(size), None


def _macs(spec: ConvSpec, batch: int, size: tuple[int, ...]) -> int:
    if max(size) > 1:
        return spec.macs(batch, size)
    # A 1x1 input meets one tap per output; `macs` counts all taps of a phase, border or not.
    return batch * spec.in_channels * spec.out_channels // spec.groups * math.prod(spec.output_size(size))


def _describe(m: nn.Module) -> str:
    name = type(m).__name__
    if isinstance(m, nn.ConvTranspose2d | nn.Conv2d):
        return f"{name} k{m.kernel_size[0]} s{m.stride[0]} p{m.padding[0]}"
    return f"{name} x{int(m.scale_factor)}" if isinstance(m, nn.Upsample) else name  # type: ignore[arg-type]


def _dcgan(config: DCGANConfig) -> nn.Sequential:
    return nn.Sequential(*DCGANGenerator(config, sequential=nn.Sequential).main)


def _dcgan_layer(config: DCGANConfig, index: int) -> nn.Sequential:
    modules = list(_dcgan(config))
    starts = [i for i, m in enumerate(modules) if isinstance(m, nn.ConvTranspose2d)]
    return nn.Sequential(*modules[starts[index] : [*starts, len(modules)][index + 1]])


def dcgan_cases(config: DCGANConfig, name: str, batches: tuple[int, ...]) -> tuple[Case, ...]:
    """Every layer with its norm and activation, then the whole generator."""
    cases, channels, size = [], config.nz, 1
    for i, width in enumerate((*config.widths, config.nc)):
        cases.append(
            Case(
                f"{name}.{i + 1}",
                "layers",
                (channels, size, size),
                batches,
                lambda i=i: _dcgan_layer(config, i),  # type: ignore[misc]
            )
        )
        channels, size = width, 4 if i == 0 else 2 * size
    return (*cases, Case(name, "generator", (config.nz, 1, 1), batches, lambda: _dcgan(config), quick=True))


def upsample_case(channels: int, size: int, name: str, batches: tuple[int, ...]) -> Case:
    """Nearest x2 and a 3x3 convolution with bias, as decoders end their stages."""

    def make() -> nn.Sequential:
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())

    return Case(name, "upsample", (channels, size, size), batches, make, quick=True)


CASES: tuple[Case, ...] = (
    *dcgan_cases(DCGANConfig(), "dcgan64", (1, 16, 64)),
    upsample_case(256, 64, "upsample256", (1, 4)),
)

# The same shapes in miniature, for tests and dry runs.
MINI: tuple[Case, ...] = (
    *dcgan_cases(DCGANConfig(nz=32, ngf=16, image_size=16), "mini_dcgan", (2,)),
    upsample_case(16, 4, "mini_upsample", (2,)),
)


def _geometry(name: str, size: tuple[int, int], *arguments: Any, **keywords: Any) -> Case:
    def make() -> nn.Sequential:
        conv = nn.ConvTranspose2d(*arguments, **keywords)
        return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.LeakyReLU())

    return Case(name, "geometry", (arguments[0], *size), (3,), make)


# Never timed: odd sizes, strides and paddings through every regime of the kernel, checked on a new GPU first.
GEOMETRIES: tuple[Case, ...] = (
    _geometry("k3s2p1op1", (7, 5), 64, 48, 3, 2, 1, 1),
    _geometry("k4s2p3", (9, 7), 32, 64, 4, 2, 3),
    _geometry("k5s3p2", (5, 6), 32, 40, 5, 3, 2),
    _geometry("k3s1p1", (6, 7), 32, 32, 3, 1, 1),
    _geometry("groups", (4, 5), 64, 64, 4, 2, 1, groups=2),
    _geometry("dilation", (5, 4), 32, 32, 3, 2, 2, 1, dilation=2),
    _geometry("kernel_is_stride", (5, 6), 48, 32, 2, 2),
    _geometry("split_k", (2, 2), 1024, 32, 4, 2, 1),
)


def find(names: list[str] | None, cases: tuple[Case, ...] = CASES) -> tuple[Case, ...]:
    """The cases of these names or suites, in the list's order; all of them for None. ValueError for an unknown one."""
    if not names:
        return cases
    known = {c.name for c in cases} | {c.suite for c in cases}
    unknown = sorted(set(names) - known)
    if unknown:
        raise ValueError(f"unknown case {', '.join(unknown)}: expected some of {', '.join(sorted(known))}")
    return tuple(c for c in cases if c.name in names or c.suite in names)
