"""A case: `torch.nn` modules made from a seed, with their arithmetic and least memory traffic counted from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from cnnfast.spec import ConvSpec, collapse_upsample

__all__ = ["BATCH_NORMS", "CONVOLUTIONS", "LIVE_NORMS", "TRANSPOSED", "Block", "Case"]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Norms whose statistics are of the map that they normalise, which has to be there as a whole first.
LIVE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_NORMS = (*BATCH_NORMS, *LIVE_NORMS)


@dataclass(frozen=True)
class Block:
    """A convolution and what follows it up to the next one; shapes are of one image. ``spec`` has an upsampling ahead
    of the convolution collapsed into it; ``input_shape`` is then that of the small map."""

    spec: ConvSpec
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weights: int  # elements of all parameters and running statistics
    live_norm: bool

    def macs(self, batch: int) -> int:
        """Multiply-adds after phase decomposition, taps on the border included (`ConvSpec.macs`)."""
        size = self.input_shape[1:]
        if max(size) > 1 or not self.spec.transposed:
            return self.spec.macs(batch, size)
        # A 1x1 input meets one tap per output; `ConvSpec.macs` counts all taps of a phase, border or not.
        outputs = math.prod(self.spec.output_size(size))
        return batch * self.spec.in_channels * self.spec.out_channels // self.spec.groups * outputs

    def least_bytes(self, batch: int, itemsize: int) -> int:
        """See `Case.least_bytes`."""
        outputs = math.prod(self.output_shape) * (3 if self.live_norm else 1)
        return itemsize * (batch * (math.prod(self.input_shape) + outputs) + self.weights)


@dataclass(frozen=True)
class Case:
    """``make()`` returns a flat `nn.Sequential`; ``input_shape`` is (C, H, W), (C, L) or (C, D, H, W).

    ``batches`` are those of a GPU and of the rehearsal; ``cpu_batches`` those of a CPU, where they differ (none: it
    takes too long there). ``quick`` cases survive ``--quick``.
    """

    name: str
    suite: str
    input_shape: tuple[int, ...]
    batches: tuple[int, ...]
    make: Callable[[], nn.Sequential]
    quick: bool = False
    cpu_batches: tuple[int, ...] | None = None

    def batches_on(self, device: str) -> tuple[int, ...]:
        return self.cpu_batches if device == "cpu" and self.cpu_batches is not None else self.batches

    def build(self, seed: int = 0) -> nn.Sequential:
        """The modules in float32 on the CPU, in eval mode, from ``seed``.

        Weights keep the scale of what passes through (He), so that what a layer gets wrong is still seen behind many
        others; affine parameters and slopes differ between channels, and BatchNorm's running statistics are those of
        one random batch.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules = self.make()
            with torch.no_grad():
                for m in modules:
                    _initialise(m)
                norms = [m for m in modules if isinstance(m, BATCH_NORMS)]
                if norms:
                    momenta = [m.momentum for m in norms]
                    for m in norms:
                        m.momentum = 1.0
                    modules.train()(torch.randn(8, *self.input_shape))
                    for m, momentum in zip(norms, momenta, strict=True):
                        m.momentum = momentum
        return modules.eval()

    def input(self, batch: int, seed: int = 1) -> torch.Tensor:
        """(batch, *input_shape), float32, standard normal; a smaller batch is the beginning of a larger one."""
        return torch.randn(batch, *self.input_shape, generator=torch.Generator().manual_seed(seed))

    def macs(self, batch: int) -> int:
        """Multiply-adds after phase decomposition (an upsampling collapsed into its convolution)."""
        return sum(b.macs(batch) for b in self.blocks())

    def least_bytes(self, batch: int, itemsize: int) -> int:
        """Bytes of memory that cannot be avoided where each block is one fused step.

        Every block reads its input and its parameters once and writes its output once: an upsampled map or a
        convolution's own output never exists, maps between blocks do. InstanceNorm's statistics are of the whole map:
        the convolution writes it, and a second pass reads it and writes the result (three times the output).
        """
        return sum(b.least_bytes(batch, itemsize) for b in self.blocks())

    @property
    def title(self) -> str:
        """``512x4x4 -> 256x8x8``, and the modules where there is one convolution."""
        found = list(self.blocks())
        text = " -> ".join("x".join(map(str, s)) for s in (self.input_shape, found[-1].output_shape))
        if len(found) > 1:
            return f"{text}, {len(found)} convolutions"
        return f"{text}: {' + '.join(_describe(m) for m in self._skeleton())}"

    def _skeleton(self) -> nn.Sequential:
        with torch.device("meta"):
            return self.make()

    def blocks(self) -> Iterator[Block]:
        """The convolutions in order, each with what follows it."""
        shape, group = self.input_shape, []
        groups: list[list[nn.Module]] = [group]
        for m in self._skeleton():
            begins = isinstance(m, (*CONVOLUTIONS, nn.Upsample))
            if begins and any(isinstance(g, CONVOLUTIONS) for g in group):
                group = []
                groups.append(group)
            group.append(m)
        for modules in groups:
            block = _block(modules, shape)
            yield block
            shape = block.output_shape


def _initialise(m: nn.Module) -> None:
    if isinstance(m, CONVOLUTIONS):
        spread = math.prod(m.stride) if isinstance(m, TRANSPOSED) else 1
        fan = m.in_channels // m.groups * math.prod(m.kernel_size) / spread
        m.weight.normal_(0, math.sqrt(2 / max(fan, 1)))
    elif isinstance(m, _NORMS) and m.weight is not None:
        m.weight.uniform_(0.5, 1.5)
        m.bias.normal_(0, 0.1)
    elif isinstance(m, nn.PReLU):
        m.weight.uniform_(0.1, 0.4)


def _block(modules: list[nn.Module], input_shape: tuple[int, ...]) -> Block:
    conv = next(m for m in modules if isinstance(m, CONVOLUTIONS))
    assert isinstance(conv.padding, tuple)
    if isinstance(modules[0], nn.Upsample):
        assert modules[0].mode == "nearest" and isinstance(modules[0].scale_factor, float)
        factors = (int(modules[0].scale_factor),) * len(conv.kernel_size)
        assert set((*conv.stride, *conv.dilation)) == {1}
        spec = collapse_upsample(
            conv.in_channels, conv.out_channels, conv.kernel_size, factors, conv.padding, conv.groups
        )
    else:
        spec = ConvSpec.make(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.output_padding,
            conv.groups, conv.dilation, transposed=isinstance(conv, TRANSPOSED), ndim=len(conv.kernel_size),
        )  # fmt: skip
    channels, size = spec.out_channels, spec.output_size(input_shape[1:])
    for m in modules:
        if isinstance(m, nn.PixelShuffle):
            channels, size = channels // m.upscale_factor**2, tuple(m.upscale_factor * n for n in size)
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers()) if t.dim() > 0]
    live = any(isinstance(m, LIVE_NORMS) for m in modules)
    return Block(spec, input_shape, (channels, *size), sum(t.numel() for t in tensors), live)


def _describe(m: nn.Module) -> str:
    name = type(m).__name__
    if isinstance(m, CONVOLUTIONS):
        mode = "" if m.padding_mode == "zeros" else f" {m.padding_mode}"
        output = f" op{m.output_padding[0]}" if any(m.output_padding) else ""
        return f"{name} k{m.kernel_size[0]} s{m.stride[0]} p{m.padding[0]}{output}{mode}"
    if isinstance(m, nn.PixelShuffle):
        return f"{name} x{m.upscale_factor}"
    return f"{name} x{int(m.scale_factor)}" if isinstance(m, nn.Upsample) else name  # type: ignore[arg-type]
