"""Generators of others: written as their published repositories have them, and out of packages, where those are
installed. Tests accelerate small ones, `benchmarks.models` those of sizes that people use."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnfast.generators.dcgan import DCGANGenerator

from .workload import NotAvailable

__all__ = [
    "MODELS",
    "Published",
    "Style",
    "compact",
    "cyclegan",
    "esrgan",
    "hifigan",
    "pix2pix",
    "segresnet",
    "smp_unet",
    "stack",
    "tiny_decoder",
    "vae_decoder",
]


# --- written as the published pix2pix, CycleGAN and fast-neural-style are ---------------------------------------------


class UnetBlock(nn.Module):
    """pix2pix: a level of the U-Net around the next one."""

    def __init__(self, outer: int, inner: int, inside: nn.Module | None, c_in: int = 0, dropout: bool = False) -> None:
        super().__init__()
        down = nn.Conv2d(c_in or outer, inner, 4, 2, 1, bias=False)
        relu_down, relu_up = nn.LeakyReLU(0.2, True), nn.ReLU(True)
        self.outermost = bool(c_in)
        if self.outermost:
            up = nn.ConvTranspose2d(inner * 2, outer, 4, 2, 1)
            model: list[Any] = [down, inside, relu_up, up, nn.Tanh()]
        elif inside is None:
            up = nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=False)
            model = [relu_down, down, relu_up, up, nn.BatchNorm2d(outer)]
        else:
            up = nn.ConvTranspose2d(inner * 2, outer, 4, 2, 1, bias=False)
            model = [relu_down, down, nn.BatchNorm2d(inner), inside, relu_up, up, nn.BatchNorm2d(outer)]
            model += [nn.Dropout(0.5)] * dropout
        self.model = nn.Sequential(*model)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


def pix2pix(width: int = 64, levels: int = 8) -> nn.Module:
    """``levels`` halvings; the published `unet_256` by default."""
    inner = width * 2 ** min(3, levels - 3)
    block = UnetBlock(inner, inner, None)
    for _ in range(max(1, levels - 5)):
        block = UnetBlock(inner, inner, block, dropout=True)
    for k in [2**i for i in reversed(range(min(3, levels - 3)))]:
        block = UnetBlock(width * k, width * 2 * k, block)
    return UnetBlock(3, width, block, 3)


class ResnetBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        norm = functools.partial(nn.InstanceNorm2d, affine=False)
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, 3), norm(dim), nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(dim, dim, 3), norm(dim),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


def cyclegan(width: int = 64, blocks: int = 9) -> nn.Module:
    model: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.InstanceNorm2d(width), nn.ReLU(True)]
    for k in (1, 2):
        model += [nn.Conv2d(width * k, width * k * 2, 3, 2, 1), nn.InstanceNorm2d(width * k * 2), nn.ReLU(True)]
    model += [ResnetBlock(width * 4) for _ in range(blocks)]
    for k in (4, 2):
        model += [nn.ConvTranspose2d(width * k, width * k // 2, 3, 2, 1, 1), nn.InstanceNorm2d(width * k // 2)]
        model.append(nn.ReLU(True))
    return nn.Sequential(*model, nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh())


class ConvLayer(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, upsample: int | None = None) -> None:
        super().__init__()
        self.upsample = upsample
        self.reflection_pad = nn.ReflectionPad2d(kernel // 2)
        self.conv2d = nn.Conv2d(c_in, c_out, kernel, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample:
            x = F.interpolate(x, mode="nearest", scale_factor=self.upsample)
        return self.conv2d(self.reflection_pad(x))


class StyleBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = ConvLayer(channels, channels, 3, 1), ConvLayer(channels, channels, 3, 1)
        self.in1, self.in2 = nn.InstanceNorm2d(channels, affine=True), nn.InstanceNorm2d(channels, affine=True)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.in2(self.conv2(self.relu(self.in1(self.conv1(x))))) + x


class Style(nn.Module):
    """fast-neural-style: the transformer network."""

    def __init__(self, w: int = 32, blocks: int = 5) -> None:
        super().__init__()
        self.conv1, self.in1 = ConvLayer(3, w, 9, 1), nn.InstanceNorm2d(w, affine=True)
        self.conv2, self.in2 = ConvLayer(w, 2 * w, 3, 2), nn.InstanceNorm2d(2 * w, affine=True)
        self.conv3, self.in3 = ConvLayer(2 * w, 4 * w, 3, 2), nn.InstanceNorm2d(4 * w, affine=True)
        self.res = nn.Sequential(*[StyleBlock(4 * w) for _ in range(blocks)])
        self.deconv1, self.in4 = ConvLayer(4 * w, 2 * w, 3, 1, upsample=2), nn.InstanceNorm2d(2 * w, affine=True)
        self.deconv2, self.in5 = ConvLayer(2 * w, w, 3, 1, upsample=2), nn.InstanceNorm2d(w, affine=True)
        self.deconv3, self.relu = ConvLayer(w, 3, 9, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.in1(self.conv1(x)))
        y = self.relu(self.in2(self.conv2(y)))
        y = self.res(self.relu(self.in3(self.conv3(y))))
        y = self.relu(self.in4(self.deconv1(y)))
        return self.deconv3(self.relu(self.in5(self.deconv2(y))))


def stack(width: int = 128) -> nn.Module:
    """GroupNorm, SiLU, nearest x2 and a convolution, three times."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.GroupNorm(8, width), nn.SiLU(), nn.Upsample(scale_factor=2)]
        layers.append(nn.Conv2d(width, width // 2, 3, padding=1))
        width //= 2
    return nn.Sequential(*layers)


# --- of packages, where these are installed ---------------------------------------------------------------------------


def _imported(module: str) -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name != package:
            raise
        raise NotAvailable(f"{package} is not installed") from missing


def vae_decoder(width: int = 64, layers: int = 2, groups: int = 32, levels: int = 4) -> nn.Module:
    """Of latent diffusion, with attention; by default half as wide as Stable Diffusion's."""
    widths = tuple(width * min(2**k, 4) for k in range(levels))
    vae = _imported("diffusers").AutoencoderKL(
        block_out_channels=widths, up_block_types=("UpDecoderBlock2D",) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels, latent_channels=4, norm_num_groups=groups,
        layers_per_block=layers,
    )  # fmt: skip
    return vae.decoder


def tiny_decoder() -> nn.Module:
    return _imported("diffusers").AutoencoderTiny().decoder


def esrgan(width: int = 64, blocks: int = 6) -> nn.Module:
    """x4; by default of the size of RealESRGAN's for drawings."""
    return _imported("spandrel.architectures.ESRGAN.__arch.RRDB").RRDBNet(
        in_nc=3, out_nc=3, num_filters=width, num_blocks=blocks, scale=4
    )


def compact(width: int = 64, convolutions: int = 16) -> nn.Module:
    module = _imported("spandrel.architectures.Compact.__arch.SRVGG")
    return module.SRVGGNetCompact(num_feat=width, num_conv=convolutions)


def smp_unet(encoder: str = "resnet34") -> nn.Module:
    return _imported("segmentation_models_pytorch").Unet(encoder, encoder_weights=None)


def segresnet(width: int = 16, down: tuple[int, ...] = (1, 2, 2, 4), up: tuple[int, ...] = (1, 1, 1)) -> nn.Module:
    return _imported("monai.networks.nets").SegResNet(
        spatial_dims=3, init_filters=width, in_channels=1, out_channels=2, blocks_down=down, blocks_up=up
    )


def hifigan(width: int = 512) -> nn.Module:
    """The vocoder V1, of SpeechT5."""
    transformers = _imported("transformers")
    return transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(upsample_initial_channel=width))


@dataclass(frozen=True)
class Published:
    """A model as people use it: its ``title`` in a table, how it is made, and the shape of its input."""

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def model(self) -> nn.Module:
        """In eval mode, from a fixed seed. `NotAvailable` where its package is not installed."""
        torch.manual_seed(0)
        return self.make().eval()

    def input(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1))


MODELS: dict[str, Published] = {
    "dcgan": Published("DCGAN 64x64, batch 16", lambda: DCGANGenerator(sequential=nn.Sequential), (16, 100, 1, 1)),
    "pix2pix": Published("pix2pix U-Net, 256x256", pix2pix, (1, 3, 256, 256)),
    "cyclegan": Published("CycleGAN, 9 blocks, 128x128", cyclegan, (1, 3, 128, 128)),
    "style": Published("fast-neural-style, 256x256", Style, (1, 3, 256, 256)),
    "stack": Published("GroupNorm, SiLU, x2, convolution, 3 times, 32x32", stack, (1, 128, 32, 32)),
    "vae": Published("diffusers AutoencoderKL decoder, half width, to 128x128", vae_decoder, (1, 4, 16, 16)),
    "tiny": Published("diffusers AutoencoderTiny decoder, to 256x256", tiny_decoder, (1, 4, 32, 32)),
    "esrgan": Published("spandrel ESRGAN x4, 6 blocks, 48x48", esrgan, (1, 3, 48, 48)),
    "compact": Published("spandrel Compact x4, 96x96", compact, (1, 3, 96, 96)),
    "unet": Published("smp Unet, resnet34, 256x256", smp_unet, (1, 3, 256, 256)),
    "segresnet": Published("monai SegResNet, 3-D, 48x48x48", segresnet, (1, 1, 48, 48, 48)),
    "hifigan": Published("HiFi-GAN V1 (SpeechT5), 50 frames", hifigan, (1, 50, 80)),
}
