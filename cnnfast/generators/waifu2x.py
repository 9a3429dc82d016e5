"""waifu2x's networks (nagadomi): ``upconv_7``, which doubles a picture, and ``cunet``, which takes noise and JPEG's
traces out of it, under the names of nunif. No convolution pads: a result is smaller than the input by ``2*margin`` (in
pixels of the input), and each of its pixels is the same in every cut-out that holds its surroundings. `CUNet` alone has
global means besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.layers import Sequential

__all__ = ["CUNet", "CUNetConfig", "UpConv7", "UpConv7Config"]

_SLOPE = 0.1


def _leaky() -> nn.Module:
    return nn.LeakyReLU(_SLOPE)


@dataclass(frozen=True)
class UpConv7Config:
    """``width`` channels at first; the result is twice as high and wide."""

    width: int = 16

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width} must be positive")

    @property
    def scale(self) -> int:
        return 2


class UpConv7(nn.Module):
    """Pictures (N, 3, H, W) in [0, 1] -> (N, 3, 2*(H - 14), 2*(W - 14)). ``sequential`` as of `SPAN`."""

    margin = 7

    def __init__(self, config: UpConv7Config | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = config if config is not None else UpConv7Config()
        w = self.config.width
        layers: list[nn.Module] = []
        for a, b in ((3, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w), (8 * w, 8 * w), (8 * w, 16 * w)):
            layers += [nn.Conv2d(a, b, 3), _leaky()]
        self.net = sequential(*layers, nn.ConvTranspose2d(16 * w, 3, 4, 2, 3))

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures of 64x64, of the parameters' dtype and on their device."""
        return torch.rand(batch, 3, 64 + 2 * self.margin, 64 + 2 * self.margin).to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@dataclass(frozen=True)
class CUNetConfig:
    """``width`` channels at the first level."""

    width: int = 64

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width={self.width} must be a multiple of 8")

    @property
    def scale(self) -> int:
        return 1


class _Gate(nn.Module):
    """Squeeze and excitation (Hu et al., 2018): a factor in (0, 1) for each channel, from the channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, channels // 8, 1), nn.Conv2d(channels // 8, channels, 1)

    def forward(self, mean: Tensor) -> Tensor:
        return torch.sigmoid(self.conv2(torch.relu(self.conv1(mean))))


class _Pair(nn.Module):
    """Two 3x3 convolutions, and a gate where there is one."""

    def __init__(self, widths: tuple[int, int, int], gated: bool, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        a, b, c = widths
        self.conv = sequential(nn.Conv2d(a, b, 3), _leaky(), nn.Conv2d(b, c, 3), _leaky())
        if gated:
            self.seblock = _Gate(c)


class _Means:
    """The global means of one pass: ``given`` ones first, then those of the maps that pass by.

    With ``stop``, the first map whose mean is not given ends the pass as `_Reached`.
    """

    def __init__(self, given: Sequence[Tensor] = (), stop: bool = False) -> None:
        self._given, self._stop, self._next = given, stop, 0

    def __call__(self, x: Tensor) -> Tensor:
        i, self._next = self._next, self._next + 1
        if i < len(self._given):
            return self._given[i].to(x)
        if self._stop:
            raise _Reached(x)
        return x.mean((2, 3), keepdim=True)


class _Reached(Exception):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


def _pair(pair: _Pair, x: Tensor, means: _Means) -> Tensor:
    y = pair.conv(x)
    return y * pair.seblock(means(y)) if hasattr(pair, "seblock") else y


def _inside(x: Tensor, crop: int) -> Tensor:
    return x[..., crop:-crop, crop:-crop]


class _UNet1(nn.Module):
    def __init__(self, w: int, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        self.conv1 = _Pair((3, w // 2, w), False, sequential)
        self.conv1_down = nn.Conv2d(w, w, 2, 2)
        self.conv2 = _Pair((w, 2 * w, w), True, sequential)
        self.conv2_up = nn.ConvTranspose2d(w, w, 2, 2)
        self.conv3 = nn.Conv2d(w, w, 3)
        self.conv_bottom = nn.Conv2d(w, 3, 3)
        self._steps = (
            sequential(self.conv1_down, _leaky()),
            sequential(self.conv2_up, _leaky()),
            sequential(self.conv3, _leaky(), self.conv_bottom),
        )

    def forward(self, x: Tensor, means: _Means) -> Tensor:
        down, up, last = self._steps
        x1 = self.conv1.conv(x)
        return last(_inside(x1, 4) + up(_pair(self.conv2, down(x1), means)))


class _UNet2(nn.Module):
    def __init__(self, w: int, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        self.conv1 = _Pair((3, w // 2, w), False, sequential)
        self.conv1_down = nn.Conv2d(w, w, 2, 2)
        self.conv2 = _Pair((w, w, 2 * w), True, sequential)
        self.conv2_down = nn.Conv2d(2 * w, 2 * w, 2, 2)
        self.conv3 = _Pair((2 * w, 4 * w, 2 * w), True, sequential)
        self.conv3_up = nn.ConvTranspose2d(2 * w, 2 * w, 2, 2)
        self.conv4 = _Pair((2 * w, w, w), True, sequential)
        self.conv4_up = nn.ConvTranspose2d(w, w, 2, 2)
        self.conv5 = nn.Conv2d(w, w, 3)
        self.conv_bottom = nn.Conv2d(w, 3, 3)
        self._steps = (
            sequential(self.conv1_down, _leaky()),
            sequential(self.conv2_down, _leaky()),
            sequential(self.conv3_up, _leaky()),
            sequential(self.conv4_up, _leaky()),
            sequential(self.conv5, _leaky(), self.conv_bottom),
        )

    def forward(self, x: Tensor, means: _Means) -> Tensor:
        down1, down2, up3, up4, last = self._steps
        x1 = self.conv1.conv(x)
        x2 = _pair(self.conv2, down1(x1), means)
        x3 = _pair(self.conv3, down2(x2), means)
        x4 = _pair(self.conv4, _inside(x2, 4) + up3(x3), means)
        return last(_inside(x1, 16) + up4(x4))


class CUNet(nn.Module):
    """Pictures (N, 3, H, W) in [0, 1] -> (N, 3, H - 56, W - 56), H and W multiples of 4. ``sequential`` as of `SPAN`.

    Its four global means, in the order in which they are needed, come from maps of ``1/strides`` of the picture:
    `mean_map` gives the map of the next one, and a forward takes ``means``, (N, C, 1, 1) each, in the place of the
    input's own. So the parts of a picture are computed with the means of the whole.
    """

    margin = 28
    strides = (2, 2, 4, 2)

    def __init__(self, config: CUNetConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = config if config is not None else CUNetConfig()
        self.unet1 = _UNet1(self.config.width, sequential)
        self.unet2 = _UNet2(self.config.width, sequential)

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures of 64x64, of the parameters' dtype and on their device."""
        return torch.rand(batch, 3, 64 + 2 * self.margin, 64 + 2 * self.margin).to(next(self.parameters()))

    def forward(self, x: Tensor, means: Sequence[Tensor] = ()) -> Tensor:
        return self._run(x, _Means(means))

    def mean_map(self, x: Tensor, means: Sequence[Tensor]) -> Tensor:
        """The map (N, C, h, w) of whose whole the mean number ``len(means)`` is taken."""
        try:
            self._run(x, _Means(means, stop=True))
        except _Reached as reached:
            return reached.x
        raise ValueError(f"there are {len(self.strides)} means, {len(means)} were given")

    def _run(self, x: Tensor, means: _Means) -> Tensor:
        y = self.unet1(x, means)
        z = self.unet2(y, means)
        return _inside(y, 20) + z
