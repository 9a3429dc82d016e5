"""SegResNet, a U-Net of residual blocks in three dimensions (Myronenko, 2018) without its variational part, under the
names of MONAI's ``SegResNet``: volumes (an MRI's contrasts, say) to volumes (logits of tissues).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.layers import Sequential
from .published import check_positive

__all__ = ["SegResNet", "SegResNetConfig"]


@dataclass(frozen=True)
class SegResNetConfig:
    """Names and defaults as in MONAI. ``spatial_dims`` 3 or 2; ``init_filters`` channels at first, doubled at each
    halving; ``blocks_down`` residual blocks at 1, 1/2, 1/4, ... of the size and ``blocks_up`` on the way back;
    ``num_groups`` of the norms; ``dropout_prob`` behind the first convolution, None for none; ``upsample_mode``
    "nontrainable" (linear) or "deconv"."""

    spatial_dims: int = 3
    init_filters: int = 8
    in_channels: int = 1
    out_channels: int = 2
    dropout_prob: float | None = None
    num_groups: int = 8
    blocks_down: tuple[int, ...] = (1, 2, 2, 4)
    blocks_up: tuple[int, ...] = (1, 1, 1)
    upsample_mode: str = "nontrainable"

    def __post_init__(self) -> None:
        for name in ("blocks_down", "blocks_up"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists, out of JSON
        check_positive(self, "init_filters", "in_channels", "out_channels", "num_groups", "blocks_down", "blocks_up")
        if self.spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims={self.spatial_dims} must be 2 or 3")
        if len(self.blocks_up) != len(self.blocks_down) - 1:
            raise ValueError(f"blocks_up={self.blocks_up} must be one fewer than blocks_down={self.blocks_down}")
        if self.init_filters % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} does not divide init_filters={self.init_filters}")
        if self.dropout_prob is not None and not 0 <= self.dropout_prob < 1:
            raise ValueError(f"dropout_prob={self.dropout_prob} must be at least 0 and less than 1")
        if self.upsample_mode not in ("nontrainable", "deconv"):
            raise ValueError(f"upsample_mode={self.upsample_mode!r} must be 'nontrainable' or 'deconv'")

    def conv(self, before: int, after: int, kernel_size: int = 3, stride: int = 1, bias: bool = False) -> _Named:
        made = (nn.Conv2d, nn.Conv3d)[self.spatial_dims - 2]
        return _Named("conv", made(before, after, kernel_size, stride, kernel_size // 2, bias=bias))

    def up(self, channels: int) -> nn.Module:
        if self.upsample_mode == "deconv":
            made = (nn.ConvTranspose2d, nn.ConvTranspose3d)[self.spatial_dims - 2]
            return _Named("deconv", made(channels, channels, 2, 2))
        return nn.Upsample(scale_factor=2.0, mode=("bilinear", "trilinear")[self.spatial_dims - 2], align_corners=False)

    def norm(self, channels: int) -> nn.Module:
        return nn.GroupNorm(self.num_groups, channels)


class _Named(nn.Module):
    """One module under the name that MONAI has for it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


def _bare(*modules: nn.Module) -> list[nn.Module]:
    """The modules without their names."""
    return [next(m.children()) if isinstance(m, _Named) else m for m in modules]


class _Block(nn.Module):
    def __init__(self, channels: int, config: SegResNetConfig, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        self.norm1, self.norm2 = config.norm(channels), config.norm(channels)
        self.conv1, self.conv2 = config.conv(channels, channels), config.conv(channels, channels)
        # In a tuple they are no children, whose names would be in the state_dict a second time.
        first, second = (self.norm1, nn.ReLU(), self.conv1), (self.norm2, nn.ReLU(), self.conv2)
        self._steps = (sequential(*_bare(*first, *second)),)

    def forward(self, x: Tensor) -> Tensor:
        return self._steps[0](x) + x


class SegResNet(nn.Module):
    """Volumes (N, in_channels, D, H, W), sizes multiples of ``2**(len(blocks_down) - 1)`` -> (N, out_channels, D, H,
    W), not bounded; with ``spatial_dims=2`` pictures. ``sequential`` as of `Pix2PixUNet`."""

    def __init__(self, config: SegResNetConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = c = config if config is not None else SegResNetConfig()
        widths = [c.init_filters * 2**i for i in range(len(c.blocks_down))]

        def blocks(count: int, channels: int) -> list[nn.Module]:
            return [_Block(channels, c, sequential) for _ in range(count)]

        self.convInit = c.conv(c.in_channels, widths[0])
        downs = [
            nn.Sequential(c.conv(widths[i - 1], width, stride=2) if i else nn.Identity(), *blocks(count, width))
            for i, (width, count) in enumerate(zip(widths, c.blocks_down, strict=True))
        ]
        ups = [nn.Sequential(*blocks(count, width)) for count, width in zip(c.blocks_up, widths[-2::-1], strict=True)]
        larger = [nn.Sequential(c.conv(2 * width, width, kernel_size=1), c.up(width)) for width in widths[-2::-1]]
        self.down_layers, self.up_layers, self.up_samples = (nn.ModuleList(m) for m in (downs, ups, larger))
        self.conv_final = nn.Sequential(
            c.norm(widths[0]), nn.ReLU(), c.conv(widths[0], c.out_channels, kernel_size=1, bias=True)
        )
        self.dropout: nn.Module = nn.Identity()
        if c.dropout_prob is not None:
            self.dropout = (nn.Dropout2d, nn.Dropout3d)[c.spatial_dims - 2](c.dropout_prob)
        self._first, self._last = (sequential(*_bare(self.convInit)),), (sequential(*_bare(*self.conv_final)),)
        self._down = tuple((sequential(*_bare(layers[0])), layers[1:]) for layers in downs)
        self._up = tuple((sequential(*_bare(*up)), layers) for up, layers in zip(larger, ups, strict=True))

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` volumes of 32 each way, of the parameters' dtype and on their device."""
        size = (32,) * self.config.spatial_dims
        return torch.randn(batch, self.config.in_channels, *size).to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self._first[0](x))
        passed = []
        for smaller, blocks in self._down:
            x = blocks(smaller(x))
            passed.append(x)
        passed.pop()
        for larger, blocks in self._up:
            x = blocks(larger(x) + passed.pop())
        return self._last[0](x)
