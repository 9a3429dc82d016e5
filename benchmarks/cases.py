"""What is timed: layers of real generators, blocks and whole generators, as plain `torch.nn` modules.

A case holds no tensor. `Case.build` makes its modules from a fixed seed, and its arithmetic and least memory traffic
are counted from them, so that a new case (a layer of another generator) is one entry here and nothing elsewhere. A
layer that a generator repeats stands once.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnnfast.generators import DCGANConfig, DCGANGenerator
from cnnfast.spec import ConvSpec, collapse_upsample

__all__ = ["CASES", "DTYPES", "GEOMETRIES", "MINI", "SUITES", "Block", "Case", "dcgan_cases", "find", "upsample_case"]

# "layers": one convolution with its norm and activation; "upsample": an upsampling and its convolution; "generator":
# a whole flat network.
SUITES = ("generator", "upsample", "layers")

# What each kind of device is timed in. (float16 on a CPU is no common choice.)
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_NORMS = (*_BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d)
# Norms whose statistics are of the map that they normalise, which has to be there as a whole first.
_LIVE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d)


@dataclass(frozen=True)
class Block:
    """A convolution and what follows it up to the next one; shapes are of one image. ``spec`` has an upsampling ahead
    of the convolution collapsed into it; ``input_shape`` is then that of the small map."""

    spec: ConvSpec
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weights: int  # elements of all parameters and running statistics
    live_norm: bool

    def macs(self, batch: int) -> int:
        """Multiply-adds after phase decomposition, taps on the border included (`ConvSpec.macs`)."""
        size = self.input_shape[1:]
        if max(size) > 1 or not self.spec.transposed:
            return self.spec.macs(batch, size)
        # A 1x1 input meets one tap per output; `ConvSpec.macs` counts all taps of a phase, border or not.
        outputs = math.prod(self.spec.output_size(size))
        return batch * self.spec.in_channels * self.spec.out_channels // self.spec.groups * outputs

    def least_bytes(self, batch: int, itemsize: int) -> int:
        """See `Case.least_bytes`."""
        outputs = math.prod(self.output_shape) * (3 if self.live_norm else 1)
        return itemsize * (batch * (math.prod(self.input_shape) + outputs) + self.weights)


@dataclass(frozen=True)
class Case:
    """``make()`` returns a flat `nn.Sequential`; ``input_shape`` is (C, H, W) or (C, L).

    ``batches`` are those of a GPU and of the rehearsal; ``cpu_batches`` those of a CPU, where they differ (none: it
    takes too long there). ``quick`` cases survive ``--quick``.
    """

    name: str
    suite: str
    input_shape: tuple[int, ...]
    batches: tuple[int, ...]
    make: Callable[[], nn.Sequential]
    quick: bool = False
    cpu_batches: tuple[int, ...] | None = None

    def batches_on(self, device: str) -> tuple[int, ...]:
        return self.cpu_batches if device == "cpu" and self.cpu_batches is not None else self.batches

    def build(self, seed: int = 0) -> nn.Sequential:
        """The modules in float32 on the CPU, in eval mode, from ``seed``.

        Weights keep the scale of what passes through (He), so that what a layer gets wrong is still seen behind many
        others; affine parameters and slopes differ between channels, and BatchNorm's running statistics are those of
        one random batch.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules = self.make()
            with torch.no_grad():
                for m in modules:
                    _initialise(m)
                norms = [m for m in modules if isinstance(m, _BATCH_NORMS)]
                if norms:
                    momenta = [m.momentum for m in norms]
                    for m in norms:
                        m.momentum = 1.0
                    modules.train()(torch.randn(8, *self.input_shape))
                    for m, momentum in zip(norms, momenta, strict=True):
                        m.momentum = momentum
        return modules.eval()

    def input(self, batch: int, seed: int = 1) -> torch.Tensor:
        """(batch, *input_shape), float32, standard normal; a smaller batch is the beginning of a larger one."""
        return torch.randn(batch, *self.input_shape, generator=torch.Generator().manual_seed(seed))

    def macs(self, batch: int) -> int:
        """Multiply-adds after phase decomposition (an upsampling collapsed into its convolution)."""
        return sum(b.macs(batch) for b in self.blocks())

    def least_bytes(self, batch: int, itemsize: int) -> int:
        """Bytes of memory that cannot be avoided where each block is one fused step.

        Every block reads its input and its parameters once and writes its output once: an upsampled map or a
        convolution's own output never exists, maps between blocks do. InstanceNorm's statistics are of the whole map:
        the convolution writes it, and a second pass reads it and writes the result (three times the output).
        """
        return sum(b.least_bytes(batch, itemsize) for b in self.blocks())

    @property
    def title(self) -> str:
        """``512x4x4 -> 256x8x8``, and the modules where there is one convolution."""
        found = list(self.blocks())
        text = " -> ".join("x".join(map(str, s)) for s in (self.input_shape, found[-1].output_shape))
        if len(found) > 1:
            return f"{text}, {len(found)} convolutions"
        return f"{text}: {' + '.join(_describe(m) for m in self._skeleton())}"

    def _skeleton(self) -> nn.Sequential:
        with torch.device("meta"):
            return self.make()

    def blocks(self) -> Iterator[Block]:
        """The convolutions in order, each with what follows it."""
        shape, group = self.input_shape, []
        groups: list[list[nn.Module]] = [group]
        for m in self._skeleton():
            begins = isinstance(m, (*_CONVOLUTIONS, nn.Upsample))
            if begins and any(isinstance(g, _CONVOLUTIONS) for g in group):
                group = []
                groups.append(group)
            group.append(m)
        for modules in groups:
            block = _block(modules, shape)
            yield block
            shape = block.output_shape


def _initialise(m: nn.Module) -> None:
    if isinstance(m, _CONVOLUTIONS):
        spread = math.prod(m.stride) if isinstance(m, _TRANSPOSED) else 1
        fan = m.in_channels // m.groups * math.prod(m.kernel_size) / spread
        m.weight.normal_(0, math.sqrt(2 / max(fan, 1)))
    elif isinstance(m, _NORMS) and m.weight is not None:
        m.weight.uniform_(0.5, 1.5)
        m.bias.normal_(0, 0.1)
    elif isinstance(m, nn.PReLU):
        m.weight.uniform_(0.1, 0.4)


def _block(modules: list[nn.Module], input_shape: tuple[int, ...]) -> Block:
    conv = next(m for m in modules if isinstance(m, _CONVOLUTIONS))
    assert isinstance(conv.padding, tuple)
    if isinstance(modules[0], nn.Upsample):
        assert modules[0].mode == "nearest" and isinstance(modules[0].scale_factor, float)
        factors = (int(modules[0].scale_factor),) * len(conv.kernel_size)
        assert set((*conv.stride, *conv.dilation)) == {1}
        spec = collapse_upsample(
            conv.in_channels, conv.out_channels, conv.kernel_size, factors, conv.padding, conv.groups
        )
    else:
        spec = ConvSpec.make(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.output_padding,
            conv.groups, conv.dilation, transposed=isinstance(conv, _TRANSPOSED), ndim=len(conv.kernel_size),
        )  # fmt: skip
    channels, size = spec.out_channels, spec.output_size(input_shape[1:])
    for m in modules:
        if isinstance(m, nn.PixelShuffle):
            channels, size = channels // m.upscale_factor**2, tuple(m.upscale_factor * n for n in size)
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers()) if t.dim() > 0]
    live = any(isinstance(m, _LIVE_NORMS) for m in modules)
    return Block(spec, input_shape, (channels, *size), sum(t.numel() for t in tensors), live)


def _describe(m: nn.Module) -> str:
    name = type(m).__name__
    if isinstance(m, _CONVOLUTIONS):
        mode = "" if m.padding_mode == "zeros" else f" {m.padding_mode}"
        output = f" op{m.output_padding[0]}" if any(m.output_padding) else ""
        return f"{name} k{m.kernel_size[0]} s{m.stride[0]} p{m.padding[0]}{output}{mode}"
    if isinstance(m, nn.PixelShuffle):
        return f"{name} x{m.upscale_factor}"
    return f"{name} x{int(m.scale_factor)}" if isinstance(m, nn.Upsample) else name  # type: ignore[arg-type]


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
    config: DCGANConfig, name: str, batches: tuple[int, ...], cpu: tuple[int, ...] | None = None, quick: bool = False
) -> tuple[Case, ...]:
    """Every layer with its norm and activation, then the whole generator."""
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
    return (*cases, Case(name, "generator", (config.nz, 1, 1), batches, lambda: _dcgan(config), quick))


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


def _vocoder(batches: tuple[int, ...], cpu: tuple[int, ...]) -> Iterator[Case]:
    """The upsampling layers of HiFi-GAN (Kong et al. 2020, V1), for 100 frames; the whole leaves out what stands
    between them (residual blocks)."""
    leaky = _m(nn.LeakyReLU, 0.1)
    stack, length = [_m(nn.Conv1d, 80, 512, 7, padding=3), leaky], 100
    for i, (c_in, kernel, stride) in enumerate(((512, 16, 8), (256, 16, 8), (128, 4, 2), (64, 4, 2))):
        layer = _m(nn.ConvTranspose1d, c_in, c_in // 2, kernel, stride, (kernel - stride) // 2), leaky
        yield _case(f"vocoder.{i + 1}", "layers", (c_in, length), batches, *layer, cpu=cpu, quick=i == 0)
        stack += layer
        length *= stride
    stack += [_m(nn.Conv1d, 32, 1, 7, padding=3), TANH]
    yield _case("vocoder", "generator", (80, 100), batches, *stack, cpu=cpu)


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


CASES: tuple[Case, ...] = (
    *dcgan_cases(DCGANConfig(), "dcgan64", (1, 16, 64), quick=True),
    *dcgan_cases(DCGANConfig(image_size=128), "dcgan128", (1, 16, 64), cpu=(16,)),
    *_pix2pix((1, 16, 64), cpu=(1,)),
    *_cyclegan((1, 16), cpu=(1,)),
    upsample_case(256, 64, "upsample256", (1, 4)),
    *_vae((1, 4)),
    *_srvgg((1, 16)),
    *_rrdb((1, 16)),
    *_waifu2x((1, 16)),
    *_vocoder((1, 16, 64), cpu=(1, 16)),
    *_style((1, 16)),
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
