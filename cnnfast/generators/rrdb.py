"""RRDBNet of ESRGAN (Wang et al., 2018) as Real-ESRGAN publishes it: residual-in-residual dense blocks, then two times
nearest upsampling and a convolution. ``state_dict`` keys are the published ones; ``load_state_dict`` knows those of
ESRGAN's first two releases, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.layers import Sequential

__all__ = ["RRDB", "RRDBConfig"]

_SLOPE, _RESIDUAL = 0.2, 0.2
# How names began in ESRGAN's first release and in its second one.
_FORMER = {
    r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.": r"body.\1.rdb\2.conv\3.",
    r"model\.1\.sub\.\d+\.(?=weight|bias)": "conv_body.",
    **{
        rf"model\.{number}\.": f"{name}."
        for number, name in ((0, "conv_first"), (3, "conv_up1"), (6, "conv_up2"), (8, "conv_hr"), (10, "conv_last"))
    },
    r"RRDB_trunk\.(\d+)\.RDB(\d)\.": r"body.\1.rdb\2.",
    r"trunk_conv\.": "conv_body.",
    r"upconv(\d)\.": r"conv_up\1.",
    r"HRconv\.": "conv_hr.",
}


@dataclass(frozen=True)
class RRDBConfig:
    """``blocks`` of three dense blocks of ``features`` channels, which grow by ``growth`` with each convolution. The
    result is four times as high and wide; half as much with ``unshuffle=2``, which starts by taking 2x2 pixels for one
    of four times the channels (Real-ESRGAN's x2), and as large with 4."""

    blocks: int = 23
    features: int = 64
    growth: int = 32
    unshuffle: int = 1

    def __post_init__(self) -> None:
        for name in ("blocks", "features", "growth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.unshuffle not in (1, 2, 4):
            raise ValueError(f"unshuffle={self.unshuffle} must be 1, 2 or 4")

    @property
    def scale(self) -> int:
        return 4 // self.unshuffle


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
    """Pictures (N, 3, H, W) in [0, 1] -> (N, 3, scale*H, scale*W), about in [0, 1]; H and W multiples of ``unshuffle``.
    ``sequential`` as of `SPAN`."""

    def __init__(self, config: RRDBConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = config if config is not None else RRDBConfig()
        features, growth = self.config.features, self.config.growth
        self.conv_first = nn.Conv2d(3 * self.config.unshuffle**2, features, 3, padding=1)
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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            for former, now in _FORMER.items():
                renamed, found = re.subn(rf"\A{former}", now, name.removeprefix(prefix))
                if found:
                    state_dict[prefix + renamed] = state_dict.pop(name)
                    break
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures of 64x64, of the parameters' dtype and on their device."""
        return torch.rand(batch, 3, 64, 64).to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        head, body, tail = self._steps
        first = head(F.pixel_unshuffle(x, self.config.unshuffle) if self.config.unshuffle > 1 else x)
        return tail(first + body(self.body(first)))
