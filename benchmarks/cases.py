"""What is timed: layers of real generators, blocks and whole generators, as plain `torch.nn` modules.

The one list. A new case (a layer of another generator) is one entry here and nothing elsewhere. A layer that a
generator repeats stands once.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cnnfast.generators import DCGANConfig, DCGANGenerator

from .case import Block, Case

__all__ = [
    "CASES",
    "DTYPES",
    "GEOMETRIES",
    "MINI",
    "SUITES",
    "TRAINING",
    "Block",
    "Case",
    "dcgan_cases",
    "find",
    "upsample_case",
]

# "layers": one convolution with its norm and activation; "upsample": an upsampling and its convolution; "generator":
# a whole flat network.
SUITES = ("generator", "upsample", "layers")

# What each kind of device is timed in. (float16 on a CPU is no common choice.)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}

# --- the generators ---------------------------------------------------------------------------------------------------


def _case(
    name: str,
    suite: str,
    input_shape: tuple[int, ...],
    batches: tuple[int, ...],
    *modules: Callable[[], nn.Module],
    cpu: tuple[int, ...] | None = None,
    quick: bool = False,
) -> Case:
    """A case of one module per factory."""
    return Case(name, suite, input_shape, batches, lambda: nn.Sequential(*(m() for m in modules)), quick, cpu)


def _m(cls: type[nn.Module], *arguments: Any, **keywords: Any) -> Callable[[], nn.Module]:
    return lambda: cls(*arguments, **keywords)


def _up(factor: int = 2) -> Callable[[], nn.Module]:
    return _m(nn.Upsample, scale_factor=factor)


def _conv(c_in: int, c_out: int, kernel: int = 3, **keywords: Any) -> Callable[[], nn.Module]:
    """A convolution that keeps the size."""
    return _m(nn.Conv2d, c_in, c_out, kernel, padding=kernel // 2, **keywords)


RELU, TANH = _m(nn.ReLU), _m(nn.Tanh)


def _dcgan(config: DCGANConfig) -> nn.Sequential:
    return nn.Sequential(*DCGANGenerator(config, sequential=nn.Sequential).main)


def _dcgan_layer(config: DCGANConfig, index: int) -> nn.Sequential:
    modules = list(_dcgan(config))
    starts = [i for i, m in enumerate(modules) if isinstance(m, nn.ConvTranspose2d)]
    return nn.Sequential(*modules[starts[index] : [*starts, len(modules)][index + 1]])


def dcgan_cases(
    config: DCGANConfig,
    name: str,
    batches: tuple[int, ...],
    cpu: tuple[int, ...] | None = None,
    whole: tuple[int, ...] | None = None,
    quick: bool = False,
) -> tuple[Case, ...]:
    """Every layer with its norm and activation, on a CPU with the batches ``cpu``, then the ``whole`` generator."""
    cases, channels, size = [], config.nz, 1
    for i, width in enumerate((*config.widths, config.nc)):
        cases.append(
            Case(
                f"{name}.{i + 1}",
                "layers",
                (channels, size, size),
                batches,
                lambda i=i: _dcgan_layer(config, i),  # type: ignore[misc]
                cpu_batches=cpu,
            )
        )
        channels, size = width, 4 if i == 0 else 2 * size
    return (*cases, Case(name, "generator", (config.nz, 1, 1), batches, lambda: _dcgan(config), quick, whole))


def upsample_case(channels: int, size: int, name: str, batches: tuple[int, ...]) -> Case:
    """Nearest x2 and a 3x3 convolution with bias, as decoders end their stages."""
    modules = (_up(), _conv(channels, channels), RELU)
    return _case(name, "upsample", (channels, size, size), batches, *modules, quick=True)


def _pix2pix(batches: tuple[int, ...], cpu: tuple[int, ...]) -> Iterator[Case]:
    """The decoder of the U-Net for 256x256 (Isola et al. 2017), with the ReLU that its successor applies first."""
    widths = ((512, 512), *((1024, 512),) * 3, (1024, 256), (512, 128), (256, 64))
    for i, (c_in, c_out) in enumerate(widths):
        conv = _m(nn.ConvTranspose2d, c_in, c_out, 4, 2, 1, bias=False)
        shape, norm = (c_in, 2**i, 2**i), _m(nn.BatchNorm2d, c_out)
        yield _case(f"pix2pix.{i + 1}", "layers", shape, batches, conv, norm, RELU, cpu=cpu, quick=i == 4)
    head = _m(nn.ConvTranspose2d, 128, 3, 4, 2, 1)
    yield _case("pix2pix.8", "layers", (128, 128, 128), batches, head, TANH, cpu=cpu)


def _cyclegan(batches: tuple[int, ...], cpu: tuple[int, ...]) -> Iterator[Case]:
    """The residual layer, the upsampling layers and the head of the generator for 256x256 (Zhu et al. 2017)."""
    residual = _conv(256, 256, padding_mode="reflect"), _m(nn.InstanceNorm2d, 256), RELU
    yield _case("cyclegan.res", "layers", (256, 64, 64), batches, *residual, cpu=cpu)
    for i, (channels, size) in enumerate(((256, 64), (128, 128))):
        conv = _m(nn.ConvTranspose2d, channels, channels // 2, 3, 2, 1, 1)
        modules = conv, _m(nn.InstanceNorm2d, channels // 2), RELU
        yield _case(f"cyclegan.up{i + 1}", "layers", (channels, size, size), batches, *modules, cpu=cpu, quick=i == 0)
    head = _conv(64, 3, 7, padding_mode="reflect"), TANH
    yield _case("cyclegan.head", "layers", (64, 256, 256), batches, *head, cpu=cpu)


def _vae(batches: tuple[int, ...]) -> Iterator[Case]:
    """Decoder of a latent diffusion model's autoencoder for 512x512 (Rombach et al. 2022)."""
    for i, (channels, size, cpu) in enumerate(((512, 64, (1,)), (512, 128, ()), (256, 256, ()))):
        modules = _up(), _conv(channels, channels)
        yield _case(f"vae.up{i + 1}", "upsample", (channels, size, size), batches, *modules, cpu=cpu)
    yield _case("vae.conv", "layers", (512, 64, 64), batches, _conv(512, 512), cpu=(1,))
    yield _case("vae.out", "layers", (128, 512, 512), batches, _conv(128, 3), cpu=(1,))


def _srvgg(batches: tuple[int, ...]) -> Iterator[Case]:
    """SRVGGNetCompact x4 with 16 inner convolutions (Real-ESRGAN, 2021); the image that it adds to is left out."""

    def body() -> tuple[Callable[[], nn.Module], ...]:
        return _conv(64, 64), _m(nn.PReLU, 64)

    tail = _conv(64, 48), _m(nn.PixelShuffle, 4)
    net = _conv(3, 64), _m(nn.PReLU, 64), *(m for _ in range(16) for m in body()), *tail
    yield _case("srvgg.body", "layers", (64, 90, 120), batches, *body(), cpu=(1,))
    yield _case("srvgg.tail", "layers", (64, 90, 120), batches, *tail, cpu=(1,))
    yield _case("srvgg", "generator", (3, 90, 120), batches, *net, cpu=(1,))


def _rrdb(batches: tuple[int, ...]) -> Iterator[Case]:
    """Layers of RRDBNet x4 (ESRGAN, Wang et al. 2018): a dense block's, the tail's."""
    leaky = _m(nn.LeakyReLU, 0.2)
    for i in range(5):
        c_in = 64 + 32 * i
        modules = (_conv(c_in, 32), leaky) if i < 4 else (_conv(c_in, 64),)
        yield _case(f"rrdb.{i + 1}", "layers", (c_in, 64, 64), batches, *modules, cpu=(1,))
    for i, size in enumerate((64, 128)):
        yield _case(f"rrdb.up{i + 1}", "upsample", (64, size, size), batches, _up(), _conv(64, 64), leaky, cpu=(1,))
    yield _case("rrdb.hr", "layers", (64, 256, 256), batches, _conv(64, 64), leaky, cpu=(1,))
    yield _case("rrdb.last", "layers", (64, 256, 256), batches, _conv(64, 3), cpu=(1,))


def _waifu2x(batches: tuple[int, ...]) -> Iterator[Case]:
    """upconv_7 (waifu2x): convolutions without padding, then the transposed one."""
    widths, net = (3, 16, 32, 64, 128, 128, 256), []
    for c_in, c_out in zip(widths, widths[1:], strict=False):
        net += [_m(nn.Conv2d, c_in, c_out, 3), _m(nn.LeakyReLU, 0.1)]
    last = _m(nn.ConvTranspose2d, 256, 3, 4, 2, 3)
    yield _case("waifu2x.last", "layers", (256, 130, 130), batches, last, cpu=(1,))
    yield _case("waifu2x", "generator", (3, 142, 142), batches, *net, last, cpu=(1,))


def _vocoder(batches: tuple[int, ...]) -> Iterator[Case]:
    """The upsampling layers of HiFi-GAN (Kong et al. 2020, V1), for 100 frames; the whole leaves out what stands
    between them (residual blocks)."""
    leaky = _m(nn.LeakyReLU, 0.1)
    stack, length = [_m(nn.Conv1d, 80, 512, 7, padding=3), leaky], 100
    for i, (c_in, kernel, stride) in enumerate(((512, 16, 8), (256, 16, 8), (128, 4, 2), (64, 4, 2))):
        layer = _m(nn.ConvTranspose1d, c_in, c_in // 2, kernel, stride, (kernel - stride) // 2), leaky
        yield _case(f"vocoder.{i + 1}", "layers", (c_in, length), batches, *layer, cpu=(1,), quick=i == 0)
        stack += layer
        length *= stride
    stack += [_m(nn.Conv1d, 32, 1, 7, padding=3), TANH]
    yield _case("vocoder", "generator", (80, 100), batches, *stack, cpu=(1, 16))


def _style(batches: tuple[int, ...]) -> Iterator[Case]:
    """The decoder of fast style transfer (Johnson et al. 2016) with upsampling and InstanceNorm, for 256x256."""
    stages = []
    for i, (channels, size) in enumerate(((128, 64), (64, 128))):
        half = channels // 2
        norm = _m(nn.InstanceNorm2d, half, affine=True)
        stage = _up(), _conv(channels, half, padding_mode="reflect"), norm, RELU
        yield _case(f"style.up{i + 1}", "upsample", (channels, size, size), batches, *stage, cpu=(1,))
        stages += stage
    head = _conv(32, 3, 9, padding_mode="reflect")
    yield _case("style.head", "layers", (32, 256, 256), batches, head, cpu=(1,))
    yield _case("style", "generator", (128, 64, 64), batches, *stages, head, cpu=(1,))


def _gan3d(batches: tuple[int, ...]) -> Iterator[Case]:
    """3D-GAN (Wu et al. 2016): voxels of 64x64x64, as DCGAN makes images."""
    channels, stack = (200, 512, 256, 128, 64, 1), []
    for i, (c_in, c_out) in enumerate(itertools.pairwise(channels)):
        geometry = (4, 1, 0) if i == 0 else (4, 2, 1)
        conv = _m(nn.ConvTranspose3d, c_in, c_out, *geometry, bias=False)
        layer = (conv, _m(nn.Sigmoid)) if c_out == 1 else (conv, _m(nn.BatchNorm3d, c_out), RELU)
        size = 1 if i == 0 else 2 ** (i + 1)
        yield _case(f"gan3d.{i + 1}", "layers", (c_in, size, size, size), batches, *layer, cpu=())
        stack += layer
    yield _case("gan3d", "generator", (200, 1, 1, 1), batches, *stack, cpu=())


def _unet3d(batches: tuple[int, ...]) -> Iterator[Case]:
    """The decoder of nnU-Net's networks for volumes (Isensee et al. 2021), and nearest upsampling in its place."""
    norm, act = _m(nn.InstanceNorm3d, 32, affine=True), _m(nn.LeakyReLU, 0.01)
    conv = _m(nn.Conv3d, 32, 32, 3, padding=1)
    yield _case("unet3d.conv", "layers", (32, 64, 64, 64), batches, conv, norm, act, cpu=())
    yield _case("unet3d.up", "layers", (64, 32, 32, 32), batches, _m(nn.ConvTranspose3d, 64, 32, 2, 2), cpu=())
    conv = _m(nn.Conv3d, 64, 32, 3, padding=1)
    yield _case("unet3d.nearest", "upsample", (64, 32, 32, 32), batches, _up(), conv, norm, act, cpu=())


CASES: tuple[Case, ...] = (
    *dcgan_cases(DCGANConfig(), "dcgan64", (1, 16, 64), cpu=(1, 64), quick=True),
    *dcgan_cases(DCGANConfig(image_size=128), "dcgan128", (1, 16, 64), cpu=(), whole=(1, 16)),
    *_pix2pix((1, 16, 64), cpu=(1,)),
    *_cyclegan((1, 16), cpu=(1,)),
    upsample_case(256, 64, "upsample256", (1, 4)),
    *_vae((1, 4)),
    *_srvgg((1, 16)),
    *_rrdb((1, 16)),
    *_waifu2x((1, 16)),
    *_vocoder((1, 16, 64)),
    *_style((1, 16)),
    *_gan3d((1, 16)),
    *_unet3d((1, 4)),
)

# The same kinds in miniature, for tests and dry runs.
MINI: tuple[Case, ...] = (
    *dcgan_cases(DCGANConfig(nz=32, ngf=16, image_size=16), "mini_dcgan", (2,), quick=True)[:-1],
    _case("mini_1d", "layers", (32, 9), (2,), _m(nn.ConvTranspose1d, 32, 16, 16, 8, 4), _m(nn.LeakyReLU, 0.1)),
    _case("mini_conv", "layers", (16, 6, 5), (2,), _conv(16, 32), _m(nn.PReLU, 32)),
    _case("mini_shuffle", "layers", (16, 4, 5), (2,), _conv(16, 12), _m(nn.PixelShuffle, 2)),
    _case(
        "mini_norm",
        "upsample",
        (16, 5, 4),
        (2,),
        *(_up(), _conv(16, 8, padding_mode="reflect"), _m(nn.InstanceNorm2d, 8, affine=True), RELU),
    ),
    _case("mini_3d", "layers", (16, 2, 3, 2), (2,), _m(nn.ConvTranspose3d, 16, 16, 4, 2, 1), _m(nn.BatchNorm3d, 16)),
    dcgan_cases(DCGANConfig(nz=32, ngf=16, image_size=16), "mini_dcgan", (2,), quick=True)[-1],
    upsample_case(16, 4, "mini_upsample", (2,)),
)


def _geometry(name: str, size: tuple[int, int], *arguments: Any, **keywords: Any) -> Case:
    def make() -> nn.Sequential:
        conv = nn.ConvTranspose2d(*arguments, **keywords)
        return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.LeakyReLU())

    return Case(name, "geometry", (arguments[0], *size), (3,), make)


# Never timed: odd sizes, strides and paddings through every regime of the kernel, checked on a new GPU first.
GEOMETRIES: tuple[Case, ...] = (
    _geometry("k3s2p1op1", (7, 5), 64, 48, 3, 2, 1, 1),
    _geometry("k4s2p3", (9, 7), 32, 64, 4, 2, 3),
    _geometry("k5s3p2", (5, 6), 32, 40, 5, 3, 2),
    _geometry("k3s1p1", (6, 7), 32, 32, 3, 1, 1),
    _geometry("groups", (4, 5), 64, 64, 4, 2, 1, groups=2),
    _geometry("dilation", (5, 4), 32, 32, 3, 2, 2, 1, dilation=2),
    _geometry("kernel_is_stride", (5, 6), 48, 32, 2, 2),
    _geometry("split_k", (2, 2), 1024, 32, 4, 2, 1),
)


def find(names: list[str] | None, cases: tuple[Case, ...] = CASES) -> tuple[Case, ...]:
    """The cases of these names, suites or patterns (``pix2pix.*``), in the list's order; all of them for None.
    ValueError for a name that no case has."""
    if not names:
        return cases
    unknown = sorted(n for n in set(names) if not any(_named(c, n) for c in cases))
    if unknown:
        known = sorted({c.name for c in cases} | {c.suite for c in cases})
        raise ValueError(f"unknown case {', '.join(unknown)}: expected some of {', '.join(known)}, or a pattern of *")
    return tuple(c for c in cases if any(_named(c, n) for n in names))


def _named(case: Case, name: str) -> bool:
    return case.suite == name or fnmatch.fnmatchcase(case.name, name)


# --- training ---------------------------------------------------------------------------------------------------------


def _small_vae() -> Iterator[Callable[[], nn.Module]]:
    """The decoder of an autoencoder: 4x16x16 latents to RGB images of 64x64."""
    yield from (_conv(4, 256), _m(nn.GroupNorm, 32, 256), _m(nn.SiLU))
    for c_in, c_out in ((256, 128), (128, 64)):
        yield from (_up(), _conv(c_in, c_out), _m(nn.GroupNorm, 32, c_out), _m(nn.SiLU))
    yield _conv(64, 3)


# Timed as training steps, in batches that are trained with; the most telling first.
TRAINING: tuple[Case, ...] = (
    *(
        replace(find([name])[0], batches=gpu, cpu_batches=cpu)
        for name, gpu, cpu in (
            ("dcgan64", (16, 64, 256), (16, 64)),
            ("upsample256", (4, 16), (1,)),
            ("style.up1", (4, 16), (1, 4)),
            ("pix2pix.2", (1, 16), (1, 16)),
            ("pix2pix.5", (1, 16), (1, 16)),
            ("cyclegan.up1", (1, 16), ()),
            ("rrdb.hr", (4, 16), ()),
        )
    ),
    _case("vae_small", "generator", (4, 16, 16), (16, 64), *_small_vae(), cpu=(4, 16)),
)
