"""StyleGAN2's generator (Karras and others, 2020) under the names of rosinality's stylegan2-pytorch.

A modulated convolution has its weight scaled by the style along its input channels, and by what makes each output
channel's norm 1 along the output channels (demodulation). The same scales on the input and on the result leave one
weight for the whole batch: an ordinary convolution, which here is the library's (`cnnfast.ops`). The filters of up- and
downsampling are fixed, depthwise ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..nn.layers import Sequential
from .published import check_positive

__all__ = ["StyleGAN2", "StyleGAN2Config"]

_SLOPE, _GAIN, _EPS = 0.2, math.sqrt(2), 1e-8
_FILTER = (1.0, 3.0, 3.0, 1.0)


@dataclass(frozen=True)
class StyleGAN2Config:
    """``size`` of the pictures, a power of two, at least 8; ``style_dim`` numbers of a style, made by ``n_mlp``
    layers (with ``lr_mlp`` times the learning rate); maps of width w have ``channel_base / w`` channels, at most
    ``channel_max``. Published ones have a base of 32768 (``channel_multiplier=2``) or 16384."""

    size: int = 256
    style_dim: int = 512
    n_mlp: int = 8
    lr_mlp: float = 0.01
    channel_base: int = 32768
    channel_max: int = 512

    def __post_init__(self) -> None:
        check_positive(self, "style_dim", "n_mlp", "channel_max")
        if self.size < 8 or self.size & (self.size - 1):
            raise ValueError(f"size={self.size} must be a power of two, at least 8")
        if self.lr_mlp <= 0:
            raise ValueError(f"lr_mlp={self.lr_mlp} must be positive")
        if self.channel_base < self.size:
            raise ValueError(f"channel_base={self.channel_base} leaves no channels at size={self.size}")

    @property
    def doublings(self) -> int:
        """From 4x4 to ``size``."""
        return (self.size // 4).bit_length() - 1

    def channels(self, size: int) -> int:
        return min(self.channel_max, self.channel_base // size)


def _activated(x: Tensor, bias: Tensor) -> Tensor:
    return F.leaky_relu(x + bias, _SLOPE) * _GAIN


class _Linear(nn.Module):
    """A linear map whose weight is kept ``1 / lr`` times as large as a unit normal one, and scaled when it is used."""

    def __init__(self, before: int, after: int, bias: float, lr: float = 1.0, activated: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(after, before) / lr)
        self.bias = nn.Parameter(torch.full((after,), bias))
        self._lr, self._scale, self._activated = lr, lr / math.sqrt(before), activated

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight * self._scale)
        return _activated(y, self.bias * self._lr) if self._activated else y + self.bias * self._lr


class _PixelNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + _EPS)


class _Filter(nn.Module):
    """The low-pass filter that belongs to a doubling: four times as much as its weights' sum of 1."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor(_FILTER)
        self.register_buffer("kernel", torch.outer(line, line) * (4 / line.sum().square()))

    def _depthwise(self, x: Tensor, kernel: Tensor) -> Tensor:
        return kernel.expand(x.shape[1], 1, *kernel.shape).contiguous()

    def after(self, x: Tensor) -> Tensor:
        """Of a transposed convolution's result (N, C, 2*H + 1, 2*W + 1), to (N, C, 2*H, 2*W)."""
        return F.conv2d(x, self._depthwise(x, self.kernel.flip(0, 1)), padding=1, groups=x.shape[1])

    def doubled(self, x: Tensor) -> Tensor:
        """(N, C, H, W), zeros between its elements, filtered: (N, C, 2*H, 2*W)."""
        return F.conv_transpose2d(x, self._depthwise(x, self.kernel), stride=2, padding=1, groups=x.shape[1])


class _ModulatedConv(nn.Module):
    """A convolution (transposed, of stride 2, with ``up``) for each of the batch's styles."""

    def __init__(
        self, before: int, after: int, kernel_size: int, style_dim: int, up: bool, sequential: type[nn.Sequential]
    ) -> None:
        super().__init__()
        if up:
            self.blur = _Filter()
        self.weight = nn.Parameter(torch.randn(1, after, before, kernel_size, kernel_size))
        self.modulation = _Linear(before=style_dim, after=before, bias=1.0)
        self._scale = 1 / math.sqrt(before * kernel_size**2)
        self._fused = issubclass(sequential, Sequential)

    def forward(self, x: Tensor, style: Tensor, bias: Tensor | None = None, demodulate: bool = True) -> Tensor:
        weight = self.weight[0]  # a view: as a Parameter, it is packed once
        scales = self.modulation(style) * self._scale  # (N, C_in)
        x = x * scales[:, :, None, None]
        run = ops if self._fused else F
        if hasattr(self, "blur"):
            y = run.conv_transpose2d(x, weight.transpose(0, 1), bias, stride=2)
        else:
            y = run.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
        if demodulate:
            norms = F.linear(scales.square(), weight.square().sum((2, 3)))  # (N, C_out), squared
            y = y * torch.rsqrt(norms + _EPS)[:, :, None, None]
        return self.blur.after(y) if hasattr(self, "blur") else y


class _Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:
            noise = x.new_empty(x.shape[0], 1, *x.shape[2:]).normal_()
        return x + self.weight * noise


class _Bias(nn.Module):
    """A bias and the activation behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return _activated(x, self.bias[:, None, None])


class _StyledConv(nn.Module):
    def __init__(
        self, before: int, after: int, up: bool, config: StyleGAN2Config, sequential: type[nn.Sequential]
    ) -> None:
        super().__init__()
        self.conv = _ModulatedConv(before, after, 3, config.style_dim, up, sequential)
        self.noise = _Noise()
        self.activate = _Bias(after)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None) -> Tensor:
        return self.activate(self.noise(self.conv(x, style), noise))


class _ToRGB(nn.Module):
    def __init__(self, channels: int, up: bool, config: StyleGAN2Config, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        if up:
            self.upsample = _Filter()
        self.conv = _ModulatedConv(channels, 3, 1, config.style_dim, False, sequential)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor, style: Tensor, picture: Tensor | None) -> Tensor:
        y = self.conv(x, style, self.bias.flatten(), demodulate=False)
        return y if picture is None else y + self.upsample.doubled(picture)


class _Constant(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))


class _Noises(nn.Module):
    """A fixed map of noise for each layer, ``noise_0``, ``noise_1``, ..."""

    def __init__(self, doublings: int) -> None:
        super().__init__()
        for i in range(2 * doublings + 1):
            size = 4 * 2 ** ((i + 1) // 2)
            self.register_buffer(f"noise_{i}", torch.randn(1, 1, size, size))


class StyleGAN2(nn.Module):
    """Noise z (N, style_dim), of the standard normal distribution -> pictures (N, 3, size, size), about in [-1, 1].

    ``noise``: what each layer adds, a map (1 or N, 1, h, w) for each, such as `fixed_noise`; None for fresh noise on
    every call.

    In two parts: ``style`` makes w (N, style_dim) of z (truncated: ``mean + psi * (w - mean)``, mean that of many w),
    and `synthesis` the picture. ``sequential``: `cnnfast.Sequential` for the library's convolutions, ``nn.Sequential``
    for PyTorch's.
    """

    def __init__(self, config: StyleGAN2Config | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = c = config if config is not None else StyleGAN2Config()
        maps = (_Linear(c.style_dim, c.style_dim, 0.0, c.lr_mlp, activated=True) for _ in range(c.n_mlp))
        self.style = nn.Sequential(_PixelNorm(), *maps)
        widths = [c.channels(4 * 2**i) for i in range(c.doublings + 1)]
        self.input = _Constant(widths[0])
        self.conv1 = _StyledConv(widths[0], widths[0], False, c, sequential)
        self.to_rgb1 = _ToRGB(widths[0], False, c, sequential)
        pairs = list(zip(widths, widths[1:], strict=False))
        self.convs = nn.ModuleList(
            _StyledConv(a, b, a_first, c, sequential)
            for before, b in pairs
            for a, a_first in ((before, True), (b, False))
        )
        self.to_rgbs = nn.ModuleList(_ToRGB(b, True, c, sequential) for _, b in pairs)
        self.noises = _Noises(c.doublings)

    @property
    def fixed_noise(self) -> tuple[Tensor, ...]:
        """The maps of noise that the ``state_dict`` holds, for the same picture on every call."""
        return tuple(self.noises.buffers())

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures, of the parameters' dtype and on their device."""
        return torch.randn(batch, self.config.style_dim).to(next(self.parameters()))

    def synthesis(self, w: Tensor, noise: Sequence[Tensor | None] | None = None) -> Tensor:
        """Pictures of styles ``w``: (N, style_dim), or (N, 2*doublings + 2, style_dim), one for each layer and picture.

        ValueError for another shape, or another number of maps of noise.
        """
        layers = 2 * self.config.doublings + 2
        if w.dim() == 2:
            w = w[:, None].expand(-1, layers, -1)
        if w.shape[1:] != (layers, self.config.style_dim):
            raise ValueError(
                f"w must be (N, {self.config.style_dim}) or (N, {layers}, {self.config.style_dim}), "
                f"got shape {tuple(w.shape)}"
            )
        noise = [None] * (layers - 1) if noise is None else list(noise)
        if len(noise) != layers - 1:
            raise ValueError(f"noise must be {layers - 1} maps, got {len(noise)}")
        styles = w.unbind(1)
        x = self.conv1(self.input.input.expand(len(w), -1, -1, -1), styles[0], noise[0])
        picture = self.to_rgb1(x, styles[1], None)
        for i, to_rgb in enumerate(self.to_rgbs):
            for k in (2 * i, 2 * i + 1):
                x = self.convs[k](x, styles[k + 1], noise[k + 1])
            picture = to_rgb(x, styles[2 * i + 3], picture)
        return picture

    def forward(self, z: Tensor, noise: Sequence[Tensor | None] | None = None) -> Tensor:
        return self.synthesis(self.style(z), noise)
