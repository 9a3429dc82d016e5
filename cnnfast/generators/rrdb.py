"""RRDBNet of ESRGAN (Wang et al., 2018) as Real-ESRGAN publishes it: residual-in-residual dense blocks, then two times
nearest upsampling and a convolution. ``state_dict`` keys are the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.layers import Sequential

__all__ = ["RRDB", "RRDBConfig"]

_SLOPE, _RESIDUAL = 0.2, 0.2


@dataclass(frozen=True)
class RRDBConfig:
    """``blocks`` of three dense blocks of ``features`` channels, which grow by ``growth`` with each convolution. The
    result is four times as high and wide."""

    blocks: int = 23
    features: int = 64
    growth: int = 32

    def __post_init__(self) -> None:
        for name in ("blocks", "features", "growth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")

    @property
    def scale(self) -> int:
        return 4


class _Dense(nn.Module):
    def __init__(self, features: int, growth: int, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        convs = [nn.Conv2d(features + i * growth, growth, 3, padding=1) for i in range(4)]
        self.conv1, self.conv2, self.conv3, self.conv4 = convs
        self.conv5 = nn.Conv2d(features + 4 * growth, features, 3, padding=1)
        # In tuples they are no children, whose names would be in the state_dict a second time.
        self._grow = tuple(sequential(conv, nn.LeakyReLU(_SLOPE)) for conv in convs)
        self._last = (sequential(self.conv5),)

    def forward(self, x: Tensor) -> Tensor:
        maps = x
        for step in self._grow:
            maps = torch.cat([maps, step(maps)], 1)
        return self._last[0](maps) * _RESIDUAL + x


class _Block(nn.Module):
    def __init__(self, features: int, growth: int, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (_Dense(features, growth, sequential) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.rdb3(self.rdb2(self.rdb1(x))) * _RESIDUAL + x


class RRDB(nn.Module):
    """Pictures (N, 3, H, W) in [0, 1] -> (N, 3, 4*H, 4*W), about in [0, 1]. ``sequential`` as of `SPAN`."""

    def __init__(self, config: RRDBConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = config if config is not None else RRDBConfig()
        features, growth = self.config.features, self.config.growth
        self.conv_first = nn.Conv2d(3, features, 3, padding=1)
        self.body = nn.Sequential(*(_Block(features, growth, sequential) for _ in range(self.config.blocks)))
        self.conv_body, self.conv_up1, self.conv_up2, self.conv_hr = (
            nn.Conv2d(features, features, 3, padding=1) for _ in range(4)
        )
        self.conv_last = nn.Conv2d(features, 3, 3, padding=1)
        self._steps = (
            sequential(self.conv_first),
            sequential(self.conv_body),
            sequential(
                *(nn.Upsample(scale_factor=2.0), self.conv_up1, nn.LeakyReLU(_SLOPE)),
                *(nn.Upsample(scale_factor=2.0), self.conv_up2, nn.LeakyReLU(_SLOPE)),
                *(self.conv_hr, nn.LeakyReLU(_SLOPE), self.conv_last),
            ),
        )

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures of 64x64, of the parameters' dtype and on their device."""
        return torch.rand(batch, 3, 64, 64).to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        head, body, tail = self._steps
        first = head(x)
        return tail(first + body(self.body(first)))
