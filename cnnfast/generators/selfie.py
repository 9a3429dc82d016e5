"""MediaPipe's selfie segmentation (Google, 2021): a picture of people nearby -> where they are.

MobileNetV3's blocks down to 1/16, and a way back up by bilinear doubling whose three skips are each weighed by what
both together hold. TensorFlow's layers at stride 2 pad the lower and the right edge only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.layers import Sequential

__all__ = ["Selfie", "SelfieConfig"]


@dataclass(frozen=True)
class SelfieConfig:
    """``width`` channels at first."""

    width: int = 16

    def __post_init__(self) -> None:
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width={self.width} must be a positive multiple of 2")


def _depthwise(channels: int, kernel_size: int, stride: int) -> list[nn.Module]:
    if stride == 1:
        return [nn.Conv2d(channels, channels, kernel_size, 1, kernel_size // 2, groups=channels)]
    before = (kernel_size - 2) // 2
    after = kernel_size - 2 - before
    pad = nn.ZeroPad2d((before, after, before, after))
    return [pad, nn.Conv2d(channels, channels, kernel_size, stride, groups=channels)]


class _Gate(nn.Module):
    """Squeeze and excitation (Hu et al., 2018): factors in (0, 1) for the channels, from their means over the map."""

    def __init__(self, channels: int, inner: int, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        self.convs = sequential(nn.Conv2d(channels, inner, 1), nn.ReLU(), nn.Conv2d(inner, channels, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x.mean((2, 3), keepdim=True))


class _Block(nn.Module):
    """MobileNetV3's: wider, each channel by itself, gated (where ``gate``), narrow again; plus x where it fits."""

    def __init__(
        self,
        channels: tuple[int, int, int],
        kernel_size: int,
        stride: int,
        gate: int,
        activation: type[nn.Module],
        sequential: type[nn.Sequential],
    ) -> None:
        super().__init__()
        before, inner, after = channels
        layers = [nn.Conv2d(before, inner, 1), activation(), *_depthwise(inner, kernel_size, stride), activation()]
        self.convs = sequential(*layers)
        self.gate = _Gate(inner, gate, sequential) if gate else None
        self.project = sequential(nn.Conv2d(inner, after, 1))
        self.adds = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs(x)
        if self.gate is not None:
            y = y * self.gate(y)
        y = self.project(y)
        return y + x if self.adds else y


class _Up(nn.Module):
    """Twice as large, and what was there at this size before, weighed by what both hold."""

    def __init__(self, before: int, channels: int, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        self.conv = sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(before, channels, 1))
        self.gate = _Gate(channels, channels, sequential)
        self.mix = sequential(nn.Conv2d(channels, channels, 1), nn.ReLU())
        self.refine = sequential(*_depthwise(channels, 3, 1), nn.ReLU())

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        y = self.conv(x)
        y = self.mix(y + skip * self.gate(y + skip))
        return y + self.refine(y)


class Selfie(nn.Module):
    """Pictures (N, 3, H, W) in [0, 1], H and W multiples of 16 (it was trained on 256x256) -> (N, 1, H, W), from 0 to 1
    where people are. ``sequential`` as of `SPAN`."""

    def __init__(self, config: SelfieConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = config if config is not None else SelfieConfig()
        u = self.config.width // 2
        relu, swish = nn.ReLU, nn.Hardswish
        self.first = sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 2 * u, 3, 2), swish())
        self.to_4 = _Block((2 * u, 2 * u, 2 * u), 3, 2, u, relu, sequential)
        self.to_8 = nn.Sequential(
            _Block((2 * u, 9 * u, 3 * u), 3, 2, 0, relu, sequential),
            _Block((3 * u, 11 * u, 3 * u), 3, 1, 0, relu, sequential),
        )
        self.to_16 = nn.Sequential(
            _Block((3 * u, 12 * u, 4 * u), 5, 2, 3 * u, swish, sequential),
            *(_Block((4 * u, inner * u, 4 * u), 5, 1, inner * u // 4, swish, sequential) for inner in (16, 16, 12, 12)),
        )
        self.wide = sequential(nn.Conv2d(4 * u, 16 * u, 1), nn.ReLU())
        self.factors = sequential(nn.Conv2d(4 * u, 16 * u, 1), nn.Sigmoid())
        self.ups = nn.ModuleList(
            _Up(before, after, sequential) for before, after in ((16 * u, 3 * u), (3 * u, 2 * u), (2 * u, 2 * u))
        )
        self.last = sequential(nn.ConvTranspose2d(2 * u, 1, 2, 2), nn.Sigmoid())

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures of 256x256, of the parameters' dtype and on their device."""
        return torch.rand(batch, 3, 256, 256).to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        half = self.first(x)
        quarter = self.to_4(half)
        eighth = self.to_8(quarter)
        y = self.to_16(eighth)
        y = self.wide(y) * self.factors(y.mean((2, 3), keepdim=True))
        for up, skip in zip(self.ups, (eighth, quarter, half), strict=True):
            y = up(y, skip)
        return self.last(y)
