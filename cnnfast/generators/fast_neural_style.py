"""Style transfer by one network for one style (Johnson, Alahi and Fei-Fei, 2016) with instance norms and nearest
upsampling, under the names of pytorch/examples' ``fast_neural_style`` (``TransformerNet``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.layers import Sequential
from .published import check_positive, drop_statistics

__all__ = ["FastStyle", "FastStyleConfig"]


@dataclass(frozen=True)
class FastStyleConfig:
    """``width`` channels at first, twice as many at 1/2 and four times as many at 1/4 of the size, with ``blocks``
    residual blocks there."""

    width: int = 32
    blocks: int = 5

    def __post_init__(self) -> None:
        check_positive(self, "width", "blocks")


class _Conv(nn.Module):
    """A convolution with reflected borders under its published name, and what runs ahead of it."""

    def __init__(self, before: int, after: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.reflection_pad = nn.ReflectionPad2d(kernel_size // 2)
        self.conv2d = nn.Conv2d(before, after, kernel_size, stride)


class _Block(nn.Module):
    def __init__(self, channels: int, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        self.conv1, self.in1 = _Conv(channels, channels, 3), nn.InstanceNorm2d(channels, affine=True)
        self.conv2, self.in2 = _Conv(channels, channels, 3), nn.InstanceNorm2d(channels, affine=True)
        # In a tuple it is no child, whose names would be in the state_dict a second time.
        self._steps = (sequential(*self.conv1.children(), self.in1, nn.ReLU(), *self.conv2.children(), self.in2),)

    def forward(self, x: Tensor) -> Tensor:
        return self._steps[0](x) + x


class FastStyle(nn.Module):
    """Pictures (N, 3, H, W) in [0, 255] -> (N, 3, H, W), about in [0, 255]; H and W multiples of 4, at least 8.
    ``sequential`` as of `Pix2PixUNet`."""

    def __init__(self, config: FastStyleConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = c = config if config is not None else FastStyleConfig()
        a, b, d = c.width, 2 * c.width, 4 * c.width

        def norm(channels: int) -> nn.Module:
            return nn.InstanceNorm2d(channels, affine=True)

        self.conv1, self.in1 = _Conv(3, a, 9), norm(a)
        self.conv2, self.in2 = _Conv(a, b, 3, 2), norm(b)
        self.conv3, self.in3 = _Conv(b, d, 3, 2), norm(d)
        for i in range(1, c.blocks + 1):
            self.add_module(f"res{i}", _Block(d, sequential))
        self.deconv1, self.in4 = _Conv(d, b, 3), norm(b)
        self.deconv2, self.in5 = _Conv(b, a, 3), norm(a)
        self.deconv3 = _Conv(a, 3, 9)

        def step(conv: _Conv, norm: nn.Module) -> list[nn.Module]:
            return [*conv.children(), norm, nn.ReLU()]

        self._steps = (
            sequential(*step(self.conv1, self.in1), *step(self.conv2, self.in2), *step(self.conv3, self.in3)),
            sequential(
                *(nn.Upsample(scale_factor=2.0), *step(self.deconv1, self.in4)),
                *(nn.Upsample(scale_factor=2.0), *step(self.deconv2, self.in5)),
                *self.deconv3.children(),
            ),
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        drop_statistics(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures of 256x256, of the parameters' dtype and on their device."""
        return (torch.rand(batch, 3, 256, 256) * 255).to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        down, up = self._steps
        x = down(x)
        for i in range(1, self.config.blocks + 1):
            x = getattr(self, f"res{i}")(x)
        return up(x)
