"""DCGAN's generator (Radford, Metz and Chintala, 2015) with the layers and ``state_dict`` keys of pytorch/examples.

One latent projection (1x1 -> 4x4), stride-2 transposed convolutions up to the image, BatchNorm and ReLU between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..nn.layers import Sequential

__all__ = ["DCGANConfig", "DCGANGenerator"]


@dataclass(frozen=True)
class DCGANConfig:
    """``nz`` channels of noise, ``ngf`` ahead of the image, ``nc`` of the image; ``image_size`` 8, 16, 32, ..."""

    nz: int = 100
    ngf: int = 64
    nc: int = 3
    image_size: int = 64

    def __post_init__(self) -> None:
        if self.image_size < 8 or self.image_size & (self.image_size - 1):
            raise ValueError(f"image_size={self.image_size} must be a power of two, at least 8")
        for name in ("nz", "ngf", "nc"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the maps of 4x4, 8x8, ..., image_size/2."""
        doublings = (self.image_size // 8).bit_length() - 1
        return tuple(self.ngf << i for i in range(doublings, -1, -1))


class DCGANGenerator(nn.Module):
    """Noise (N, nz, 1, 1) -> images (N, nc, image_size, image_size) in [-1, 1].

    ``sequential`` is the container of the layers: `cnnfast.Sequential`, or ``nn.Sequential`` for the same network run
    by plain PyTorch.
    """

    def __init__(self, config: DCGANConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = config if config is not None else DCGANConfig()
        channels, layers = self.config.nz, []
        for i, width in enumerate(self.config.widths):
            geometry = (4, 1, 0) if i == 0 else (4, 2, 1)  # kernel_size, stride, padding
            layers += [
                nn.ConvTranspose2d(channels, width, *geometry, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        layers += [nn.ConvTranspose2d(channels, self.config.nc, 4, 2, 1, bias=False), nn.Tanh()]
        self.main = sequential(*layers)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation: N(0, 0.02) for convolutions; N(1, 0.02) and 0 for BatchNorm's weight and bias."""
        for module in self.main:
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def example_input(self, batch: int = 1) -> torch.Tensor:
        """Noise for ``batch`` images, of the parameters' dtype and on their device."""
        return torch.randn(batch, self.config.nz, 1, 1).to(next(self.parameters()))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)
