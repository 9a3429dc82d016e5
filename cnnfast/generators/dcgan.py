"""DCGAN's generator (Radford, Metz and Chintala, 2015) with the layers and ``state_dict`` keys of pytorch/examples.

One latent projection (1x1 -> 4x4), stride-2 transposed convolutions up to the image, BatchNorm and ReLU between them.
A conditional one has a one-hot label beside the noise, and a dropout after the projection (omniart-eye-generator's).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..nn.layers import Sequential

__all__ = ["DCGANConfig", "DCGANGenerator"]


@dataclass(frozen=True)
class DCGANConfig:
    """``nz`` channels of noise, ``ngf`` ahead of the image, ``nc`` of the image; ``image_size`` 8, 16, 32, ...

    ``classes`` of a conditional generator, 0 for none; ``dropout``: its probability after the projection, None for no
    such layer.
    """

    nz: int = 100
    ngf: int = 64
    nc: int = 3
    image_size: int = 64
    classes: int = 0
    dropout: float | None = None

    def __post_init__(self) -> None:
        if self.image_size < 8 or self.image_size & (self.image_size - 1):
            raise ValueError(f"image_size={self.image_size} must be a power of two, at least 8")
        for name in ("nz", "ngf", "nc"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.classes < 0:
            raise ValueError(f"classes={self.classes} must not be negative")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and less than 1")

    @property
    def inputs(self) -> int:
        """Channels of the network's input: noise, and one for each class."""
        return self.nz + self.classes

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the maps of 4x4, 8x8, ..., image_size/2."""
        doublings = (self.image_size // 8).bit_length() - 1
        return tuple(self.ngf << i for i in range(doublings, -1, -1))


class DCGANGenerator(nn.Module):
    """Noise (N, nz, 1, 1) -> images (N, nc, image_size, image_size) in [-1, 1].

    A conditional one takes (N, nz + classes, 1, 1), noise and label, of which `latent` makes one.
    ``sequential`` is the container of the layers: `cnnfast.Sequential`, or ``nn.Sequential`` for the same network run
    by plain PyTorch.
    """

    def __init__(self, config: DCGANConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = config if config is not None else DCGANConfig()
        channels, layers = self.config.inputs, []
        for i, width in enumerate(self.config.widths):
            geometry = (4, 1, 0) if i == 0 else (4, 2, 1)  # kernel_size, stride, padding
            layers += [
                nn.ConvTranspose2d(channels, width, *geometry, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            if i == 0 and self.config.dropout is not None:
                layers.append(nn.Dropout(self.config.dropout))
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

    def latent(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The input of a conditional generator: noise (N, nz, 1, 1), and labels (N,) int64 in [0, classes) or, for what
        lies between classes, their weights (N, classes).

        ValueError where the generator has no classes or the labels are not of these shapes; RuntimeError of torch for a
        label out of range.
        """
        n, classes = len(noise), self.config.classes
        if not classes:
            raise ValueError("this generator has no classes: its input is the noise")
        if labels.shape not in ((n,), (n, classes)):
            raise ValueError(f"labels must be ({n},) or ({n}, {classes}), got shape {tuple(labels.shape)}")
        weights = nn.functional.one_hot(labels, classes) if labels.dim() == 1 else labels
        return torch.cat([noise, weights.to(noise)[:, :, None, None]], 1)

    def example_input(self, batch: int = 1) -> torch.Tensor:
        """An input for ``batch`` images, of the parameters' dtype and on their device."""
        noise = torch.randn(batch, self.config.nz, 1, 1)
        if self.config.classes:
            noise = self.latent(noise, torch.arange(batch) % self.config.classes)
        return noise.to(next(self.parameters()))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)
