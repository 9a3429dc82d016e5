"""A small U-Net (Ronneberger et al., 2015) that refines a picture whose holes have been filled smoothly.

The picture, what is known of it and the mask come in at half their size (a pixel unshuffle), go down to an eighth by
strided convolutions, up again by transposed ones, and what is to be added inside the mask comes out. Convolutions
without norms: a result depends on at most `RepairUNet.halo` pixels around it. Every layer is of a `cnnfast.Sequential`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.layers import Sequential

__all__ = ["RepairConfig", "RepairUNet"]

_SLOPE = 0.1


@dataclass(frozen=True)
class RepairConfig:
    """Channels of the maps of a half, a quarter and an eighth of the picture."""

    widths: tuple[int, int, int] = (48, 64, 96)

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # a list, out of JSON
        if len(self.widths) != 3 or min(self.widths) < 1:
            raise ValueError(f"widths={self.widths}: expected three positive numbers")


def _convolutions(*widths: int, sequential: type[nn.Sequential], strided: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.Conv2d(a, b, 4, 2, 1) if strided and i == 0 else nn.Conv2d(a, b, 3, 1, 1), nn.LeakyReLU(_SLOPE)]
    return sequential(*layers)


class RepairUNet(nn.Module):
    """Filled pictures in [0, 1] and their masks (1 inside the holes, 0 outside) as a fourth channel, (N, 4, H, W) ->
    refined pictures (N, 3, H, W), outside the holes as they were. H and W are multiples of 8. ``sequential`` as of
    `SPAN`."""

    halo = 56
    multiple = 8

    def __init__(self, config: RepairConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = config if config is not None else RepairConfig()
        a, b, c = self.config.widths
        self.enter = _convolutions(4 * 7, a, a, sequential=sequential)
        self.down1 = _convolutions(a, b, b, sequential=sequential, strided=True)
        self.down2 = _convolutions(b, c, c, c, sequential=sequential, strided=True)
        self.up2 = sequential(nn.ConvTranspose2d(c, b, 4, 2, 1), nn.LeakyReLU(_SLOPE))
        self.join2 = _convolutions(2 * b, b, sequential=sequential)
        self.up1 = sequential(nn.ConvTranspose2d(b, a, 4, 2, 1), nn.LeakyReLU(_SLOPE))
        self.join1 = _convolutions(2 * a, a, a, sequential=sequential)
        self.leave = sequential(nn.ConvTranspose2d(a, 3, 4, 2, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's initialisation for the slopes; the last layer is zero, so that a new network changes nothing."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                taps = math.prod(module.kernel_size)
                if isinstance(module, nn.ConvTranspose2d):  # of which a result sees as many as fall on the input
                    taps //= math.prod(module.stride)
                std = math.sqrt(2 / (1 + _SLOPE**2) / (module.in_channels * taps))
                nn.init.normal_(module.weight, 0.0, std)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.leave[0].weight)  # type: ignore[arg-type]

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures of 64x64 with a hole each, of the parameters' dtype and on their device."""
        x = torch.rand(batch, 4, 64, 64)
        x[:, 3] = 0
        x[:, 3, 24:40, 24:40] = 1
        return x.to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        filled, mask = x[:, :3] * 2 - 1, x[:, 3:]
        # A convolution cannot multiply: of what is known alone it makes the means that leave the filling out.
        inputs = torch.cat([filled, filled * (1 - mask), mask * 2 - 1], 1)
        half = self.enter(F.pixel_unshuffle(inputs, 2).contiguous(memory_format=torch.channels_last))
        quarter = self.down1(half)
        y = self.join2(torch.cat([self.up2(self.down2(quarter)), quarter], 1))
        y = self.join1(torch.cat([self.up1(y), half], 1))
        return x[:, :3] + self.leave(y) * mask
