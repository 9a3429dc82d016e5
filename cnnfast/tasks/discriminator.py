"""DCGAN's discriminator: the generator's mirror image, without the last sigmoid (its output is a logit or a score)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from ..generators import DCGANConfig
from ..nn.layers import Sequential

__all__ = ["NORMS", "DCGANDiscriminator"]

NORMS: Mapping[str, Callable[[int], nn.Module | None]] = MappingProxyType(
    {
        "batch": nn.BatchNorm2d,
        "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
        "none": lambda channels: None,
    }
)


class DCGANDiscriminator(nn.Module):
    """Images (N, nc, image_size, image_size) -> one score for each, (N,).

    ``config`` is the generator's: the same sizes and channels in reverse. ``norm``, one of `NORMS`, follows every
    convolution but the first and the last; ``sequential`` as in `cnnfast.generators.DCGANGenerator`.
    """

    def __init__(
        self, config: DCGANConfig, *, norm: str = "batch", sequential: type[nn.Sequential] = Sequential
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}: expected one of {', '.join(NORMS)}")
        self.config = config
        channels = config.nc
        layers: list[nn.Module] = []
        for i, width in enumerate(reversed(config.widths)):
            normalise = NORMS[norm](width) if i else None
            # A norm's own shift replaces the bias.
            layers.append(nn.Conv2d(channels, width, 4, 2, 1, bias=norm == "none"))
            layers += [normalise] if normalise is not None else []
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            channels = width
        layers.append(nn.Conv2d(channels, 1, 4, 1, 0, bias=False))
        self.main = sequential(*layers)
        self.reset_parameters(norm)

    def reset_parameters(self, norm: str) -> None:
        """The paper's initialisation as in the generator; without a norm He's, since 0.02 would make signals vanish."""
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                if norm == "none":
                    nn.init.kaiming_normal_(module.weight, 0.2)
                else:
                    nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.main(images).flatten()
