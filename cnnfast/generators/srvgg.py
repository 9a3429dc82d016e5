"""SRVGGNetCompact of Real-ESRGAN (Wang et al., 2021): 3x3 convolutions with PReLU, a pixel shuffle, and the picture
itself enlarged by nearest neighbours, to which the network adds. ``state_dict`` keys are the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.layers import Sequential

__all__ = ["SRVGG", "SRVGGConfig"]


@dataclass(frozen=True)
class SRVGGConfig:
    """``convs`` inner convolutions of ``features`` channels; the result is ``scale`` times as high and wide."""

    scale: int = 4
    features: int = 64
    convs: int = 16

    def __post_init__(self) -> None:
        for name in ("scale", "features", "convs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


class SRVGG(nn.Module):
    """Pictures (N, 3, H, W) in [0, 1] -> (N, 3, scale*H, scale*W), about in [0, 1]. ``sequential`` as of `SPAN`."""

    def __init__(self, config: SRVGGConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = config if config is not None else SRVGGConfig()
        features, scale = self.config.features, self.config.scale
        layers: list[nn.Module] = [nn.Conv2d(3, features, 3, padding=1), nn.PReLU(features)]
        for _ in range(self.config.convs):
            layers += [nn.Conv2d(features, features, 3, padding=1), nn.PReLU(features)]
        self.body = sequential(*layers, nn.Conv2d(features, 3 * scale**2, 3, padding=1))
        self.upsampler = nn.PixelShuffle(scale)

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures of 64x64, of the parameters' dtype and on their device."""
        return torch.rand(batch, 3, 64, 64).to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        enlarged = F.interpolate(x, scale_factor=float(self.config.scale), mode="nearest")
        return self.upsampler(self.body(x)) + enlarged
