"""The decoder of latent diffusion's autoencoder (Rombach, Blattmann, Lorenz, Esser and Ommer, 2022).

``state_dict`` keys are those of diffusers' ``AutoencoderKL`` without its encoder: ``decoder.*`` and
``post_quant_conv.*``. ``load_state_dict`` takes the whole autoencoder's, too, and leaves ``encoder.*`` and
``quant_conv.*`` out; of older ones it knows the attention's former names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.layers import Sequential
from .published import check_positive, drop_encoder

__all__ = ["VAEDecoder", "VAEDecoderConfig"]

_EPS = 1e-6  # of the norms
# Names of the attention's maps before diffusers 0.15, and now.
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class VAEDecoderConfig:
    """Names as in diffusers: ``latent_channels`` in, ``out_channels`` out; ``block_out_channels`` of the maps of 1,
    1/2, ... of the picture, ``layers_per_block`` of the encoder (here it is one more), ``norm_num_groups``;
    ``mid_block_add_attention``, ``use_post_quant_conv``."""

    latent_channels: int = 4
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_post_quant_conv: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))  # a list, out of JSON
        check_positive(
            self, "latent_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups"
        )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"norm_num_groups={self.norm_num_groups} does not divide {channels} channels")

    @property
    def scale(self) -> int:
        """How many times as high and wide as the latents the picture is."""
        return 2 ** (len(self.block_out_channels) - 1)


class _ResBlock(nn.Module):
    def __init__(self, before: int, after: int, groups: int, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, before, _EPS), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, after, _EPS), nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        # In a tuple they are no children, whose names would be in the state_dict a second time.
        self._steps = (
            sequential(self.norm1, nn.SiLU(), self.conv1, self.norm2, nn.SiLU(), self.conv2),
            sequential(self.conv_shortcut),
        )

    def forward(self, x: Tensor) -> Tensor:
        main, shortcut = self._steps
        return shortcut(x) + main(x)


class _Attention(nn.Module):
    """Each position looks at all others, with one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, _EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        rows = self.group_norm(x).flatten(2).transpose(1, 2)  # (N, H*W, C)
        found = F.scaled_dot_product_attention(self.to_q(rows), self.to_k(rows), self.to_v(rows))
        return x + self.to_out[0](found).transpose(1, 2).reshape(x.shape)


class _Middle(nn.Module):
    def __init__(self, config: VAEDecoderConfig, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        self.attentions = nn.ModuleList(
            [_Attention(channels, groups)] if config.mid_block_add_attention else [nn.Identity()]
        )
        self.resnets = nn.ModuleList(_ResBlock(channels, channels, groups, sequential) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class _Upsampler(nn.Module):
    def __init__(self, channels: int, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self._steps = (sequential(nn.Upsample(scale_factor=2.0), self.conv),)

    def forward(self, x: Tensor) -> Tensor:
        return self._steps[0](x)


class _Level(nn.Module):
    """Residual blocks of one size, and the upsampling to the next."""

    def __init__(
        self, before: int, after: int, up: bool, config: VAEDecoderConfig, sequential: type[nn.Sequential]
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _ResBlock(before if i == 0 else after, after, config.norm_num_groups, sequential)
            for i in range(config.layers_per_block + 1)
        )
        if up:
            self.upsamplers = nn.ModuleList([_Upsampler(after, sequential)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class _Decoder(nn.Module):
    """Its layers' names; `VAEDecoder` runs them."""

    def __init__(self, config: VAEDecoderConfig, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.Sequential(
            *(_Level(widths[max(i - 1, 0)], w, i < last, config, sequential) for i, w in enumerate(widths))
        )
        self.mid_block = _Middle(config, sequential)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)


class VAEDecoder(nn.Module):
    """Latents (N, latent_channels, H, W), already divided by the scaling factor -> pictures (N, out_channels, scale*H,
    scale*W), about in [-1, 1]. ``sequential`` as of `Pix2PixUNet`."""

    def __init__(self, config: VAEDecoderConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = c = config if config is not None else VAEDecoderConfig()
        self.decoder = d = _Decoder(c, sequential)
        self.post_quant_conv = (
            nn.Conv2d(c.latent_channels, c.latent_channels, 1) if c.use_post_quant_conv else nn.Identity()
        )
        self._steps = (
            sequential(self.post_quant_conv, d.conv_in),
            sequential(d.conv_norm_out, nn.SiLU(), d.conv_out),
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        drop_encoder(state_dict, prefix)
        attention = f"{prefix}decoder.mid_block.attentions.0."
        for before, after in _RENAMED.items():
            for what in ("weight", "bias"):
                if (value := state_dict.pop(f"{attention}{before}.{what}", None)) is not None:
                    state_dict[f"{attention}{after}.{what}"] = value
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` latents of 32x32, of the parameters' dtype and on their device."""
        return torch.randn(batch, self.config.latent_channels, 32, 32).to(next(self.parameters()))

    def forward(self, z: Tensor) -> Tensor:
        head, tail = self._steps
        return tail(self.decoder.up_blocks(self.decoder.mid_block(head(z))))
