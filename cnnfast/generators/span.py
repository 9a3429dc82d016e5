"""SPAN, the Swift Parameter-free Attention Network for super-resolution (Wan et al., 2023), as it is deployed.

Six blocks of three 3x3 convolutions, each gated by the sigmoid of its own result; a pixel shuffle makes the picture.
``state_dict`` keys are those of the published code without what exists in training only (``*.eval_conv.*``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.layers import Sequential

__all__ = ["SPAN", "SPANConfig"]

_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K's pictures
_RANGE = 255.0


@dataclass(frozen=True)
class SPANConfig:
    """``features`` channels; the result is ``scale`` times as high and wide."""

    scale: int = 2
    features: int = 48

    def __post_init__(self) -> None:
        for name in ("scale", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


class _Conv(nn.Module):
    """A 3x3 convolution under its published name."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.eval_conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)


class _Block(nn.Module):
    def __init__(self, features: int, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        self.c1_r, self.c2_r, self.c3_r = (_Conv(features, features) for _ in range(3))
        # In a tuple they are no children, whose names would be in the state_dict a second time.
        first = sequential(self.c1_r.eval_conv, nn.SiLU())
        rest = sequential(self.c2_r.eval_conv, nn.SiLU(), self.c3_r.eval_conv)
        self._steps = (first, rest, sequential(*first, *rest))

    def forward(self, x: Tensor) -> Tensor:
        return _gated(x, self._steps[2](x))

    def with_first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(the block's result, what its first step gave)."""
        first, rest, _ = self._steps
        inner = first(x)
        return _gated(x, rest(inner)), inner


def _gated(x: Tensor, y: Tensor) -> Tensor:
    """(y + x) * (sigmoid(y) - 0.5). Without gradients in the memory of ``y``, which nobody else has: large tensors cost
    more to allocate than to compute."""
    total = y + x
    if torch.is_grad_enabled():
        return total * (torch.sigmoid(y) - 0.5)
    return y.sigmoid_().sub_(0.5).mul_(total)


class SPAN(nn.Module):
    """Pictures (N, 3, H, W) in [0, 1] -> (N, 3, scale*H, scale*W), about in [0, 1].

    ``sequential`` is the container of the layers: `cnnfast.Sequential`, or ``nn.Sequential`` for the same network run
    by plain PyTorch.
    """

    mean: Tensor

    def __init__(self, config: SPANConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = config if config is not None else SPANConfig()
        features, scale = self.config.features, self.config.scale
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv_1 = _Conv(3, features)
        for i in range(1, 7):
            self.add_module(f"block_{i}", _Block(features, sequential))
        self.conv_2 = _Conv(features, features)
        self.conv_cat = nn.Conv2d(4 * features, features, 1)
        self.upsampler = sequential(nn.Conv2d(features, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        self._steps = (
            sequential(self.conv_1.eval_conv),
            sequential(self.conv_2.eval_conv),
            sequential(self.conv_cat, *self.upsampler),
        )

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures of 64x64, of the parameters' dtype and on their device."""
        return torch.rand(batch, 3, 64, 64).to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        head, body, tail = self._steps
        first = y = head((x - self.mean) * _RANGE)
        blocks: list[Any] = [getattr(self, f"block_{i}") for i in range(1, 7)]
        y = outer = blocks[0](y)
        for block in blocks[1:-1]:
            y = block(y)
        y, inner = blocks[-1].with_first(y)
        return tail(torch.cat([first, body(y), outer, inner], 1))
