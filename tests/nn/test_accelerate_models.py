"""Generators as their repositories have them, accelerated: results, gradients, strides, and what is fused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnfast
from cnnfast.nn.accelerate_call import record_of
from cnnfast.nn.accelerate_report import leaves
from cnnfast.nn.accelerate_verify import differs

from .test_accelerate_random import without_onednn

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


def pix2pix(width: int = 16) -> nn.Module:
    block = UnetBlock(width * 4, width * 4, None)
    block = UnetBlock(width * 4, width * 4, block, dropout=True)
    for k in (2, 1):
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


def cyclegan(width: int = 16, blocks: int = 3) -> nn.Module:
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

    def __init__(self, w: int = 16) -> None:
        super().__init__()
        self.conv1, self.in1 = ConvLayer(3, w, 9, 1), nn.InstanceNorm2d(w, affine=True)
        self.conv2, self.in2 = ConvLayer(w, 2 * w, 3, 2), nn.InstanceNorm2d(2 * w, affine=True)
        self.res = StyleBlock(2 * w)
        self.deconv1, self.in4 = ConvLayer(2 * w, w, 3, 1, upsample=2), nn.InstanceNorm2d(w, affine=True)
        self.deconv3, self.relu = ConvLayer(w, 3, 9, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.in2(self.conv2(self.relu(self.in1(self.conv1(x))))))
        return self.deconv3(self.relu(self.in4(self.deconv1(self.res(y)))))


# --- of packages, where these are installed ---------------------------------------------------------------------------


def vae_decoder() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    blocks = ("UpDecoderBlock2D",) * 2
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), up_block_types=blocks, down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=8, layers_per_block=1, sample_size=32,
    )  # fmt: skip
    return vae.decoder


def tiny_decoder() -> nn.Module:
    return pytest.importorskip("diffusers").AutoencoderTiny().decoder


def esrgan() -> nn.Module:
    return pytest.importorskip("spandrel.architectures.ESRGAN.__arch.RRDB").RRDBNet(
        in_nc=3, out_nc=3, num_filters=16, num_blocks=1, scale=4
    )


def compact() -> nn.Module:
    return pytest.importorskip("spandrel.architectures.Compact.__arch.SRVGG").SRVGGNetCompact(num_feat=16, num_conv=3)


def smp_unet() -> nn.Module:
    return pytest.importorskip("segmentation_models_pytorch").Unet("resnet18", encoder_weights=None)


def segresnet() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets")
    return nets.SegResNet(
        spatial_dims=3, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 2), blocks_up=(1,)
    )


# model, input, convolutions, those that are found at least, why others are not
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, tuple[str, ...]]] = {
    "pix2pix": (pix2pix, (2, 3, 64, 64), 10, 10, ()),
    "cyclegan": (cyclegan, (1, 3, 48, 48), 12, 12, ()),
    "style": (Style, (1, 3, 48, 48), 6, 6, ()),
    "AutoencoderKL": (vae_decoder, (1, 4, 16, 16), 16, 16, ()),
    "AutoencoderTiny": (tiny_decoder, (1, 4, 16, 16), 35, 35, ()),
    "ESRGAN": (esrgan, (1, 3, 24, 24), 21, 21, ()),
    "Compact": (compact, (1, 3, 24, 24), 5, 5, ()),
    "smp.Unet": (smp_unet, (1, 3, 64, 64), 31, 31, ()),
    "SegResNet": (segresnet, (1, 1, 16, 16, 16), 12, 12, ()),
}


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    given = x.clone().requires_grad_()
    torch.manual_seed(1)
    sum(y.square().sum() for y in leaves(model(given))).backward()  # type: ignore[union-attr]
    found = {"x": given.grad, **{name: p.grad for name, p in model.named_parameters()}}
    model.zero_grad()
    return {name: grad for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("name", CASES)
def test_published_models(name: str, state: Callable[[str], None]) -> None:
    make, shape, convolutions, found, reasons = CASES[name]
    torch.manual_seed(0)
    plain = make().eval()
    ours = cnnfast.accelerate(copy.deepcopy(plain))
    assert list(ours.state_dict()) == list(plain.state_dict()) and type(ours) is type(plain)
    # (At seed 0 a value of smp's Unet is so near a kink that PyTorch's own gradient in channels-last jumps there, too.)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for _ in range(2):
            for a, b in zip(leaves(ours(x)), leaves(plain(x)), strict=True):
                assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max().item()) and a.stride() == b.stride()
        said = cnnfast.explain(ours, x)
    state(f"{name}: {said.fused} of {said.convolutions} fused, {said.found} found, {said.reasons}")
    assert said.convolutions == convolutions and said.found >= found and said.graphs == 1, str(said)
    assert set(said.reasons) >= set(reasons)
    got, expected = gradients(ours, x), gradients(plain, x)
    with without_onednn():
        other = gradients(plain, x)
    problem = differs(got, gradients(plain.double(), x.double()), [expected, other])
    assert problem is None, f"{name}: {problem}"
    record = record_of(ours)
    assert record is not None and record.failed is None
