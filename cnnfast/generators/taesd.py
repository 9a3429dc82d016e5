"""The decoder of TAESD, the tiny autoencoder for Stable Diffusion (Ollin Boer Bohan, 2023): 3x3 convolutions and ReLU.

``state_dict`` keys are those of diffusers' ``AutoencoderTiny`` without its encoder: ``decoder.layers.*``.
``load_state_dict`` takes the whole autoencoder's, too, and leaves ``encoder.*`` out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.layers import Sequential
from .published import check_positive, drop_encoder

__all__ = ["TinyDecoder", "TinyDecoderConfig"]

_LIMIT = 3.0  # of a latent's size


@dataclass(frozen=True)
class TinyDecoderConfig:
    """``latent_channels`` in, ``out_channels`` out, ``width`` channels; ``blocks`` at 1, 2, 4, ... times the latents'
    size."""

    latent_channels: int = 4
    out_channels: int = 3
    width: int = 64
    blocks: tuple[int, ...] = (3, 3, 3, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))  # a list, out of JSON
        check_positive(self, "latent_channels", "out_channels", "width", "blocks")

    @property
    def scale(self) -> int:
        """How many times as high and wide as the latents the picture is."""
        return 2 ** (len(self.blocks) - 1)


class _Block(nn.Module):
    def __init__(self, width: int, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.conv = sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class _Layers(nn.Module):
    def __init__(self, config: TinyDecoderConfig, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        width = config.width
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for i, count in enumerate(config.blocks):
            if i:
                layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1, bias=False)]
            layers += [_Block(width, sequential) for _ in range(count)]
        self.layers = sequential(*layers, nn.Conv2d(width, config.out_channels, 3, padding=1))


class TinyDecoder(nn.Module):
    """Latents (N, latent_channels, H, W) -> pictures (N, out_channels, scale*H, scale*W), about in [-1, 1].
    ``sequential`` as of `Pix2PixUNet`."""

    def __init__(
        self, config: TinyDecoderConfig | None = None, *, sequential: type[nn.Sequential] = Sequential
    ) -> None:
        super().__init__()
        self.config = config if config is not None else TinyDecoderConfig()
        self.decoder = _Layers(self.config, sequential)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        drop_encoder(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` latents of 32x32, of the parameters' dtype and on their device."""
        return torch.randn(batch, self.config.latent_channels, 32, 32).to(next(self.parameters()))

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder.layers(torch.tanh(z / _LIMIT) * _LIMIT) * 2 - 1
