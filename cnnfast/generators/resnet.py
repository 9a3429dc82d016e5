"""The generator of residual blocks between strided and transposed convolutions (Johnson, Alahi and Fei-Fei, 2016), as
CycleGAN (Zhu, Park, Isola and Efros, 2017) and pix2pixHD (Wang and others, 2018) publish it.

``state_dict`` keys are those of pytorch-CycleGAN-and-pix2pix's ``ResnetGenerator`` and of pix2pixHD's
``GlobalGenerator``, which are the same but for the number of halvings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.layers import Sequential
from .published import check_positive, drop_statistics, norm2d

__all__ = ["ResNetConfig", "ResNetGenerator"]

_PADDINGS: dict[str, type[nn.Module] | None] = {
    "reflect": nn.ReflectionPad2d,
    "replicate": nn.ReplicationPad2d,
    "zero": None,
}


@dataclass(frozen=True)
class ResNetConfig:
    """Names as published: ``input_nc`` and ``output_nc`` channels of the pictures, ``ngf`` after the first convolution,
    ``n_downsampling`` halvings, ``n_blocks`` residual blocks with ``padding_type`` "reflect", "replicate" or "zero"
    (with ``use_dropout`` a dropout, too); ``norm`` "batch" or "instance".

    ``use_bias`` of the convolutions ahead of a norm: None for ``ResnetGenerator``'s rule, which is with instance norms
    only; ``GlobalGenerator`` has them always.
    """

    input_nc: int = 3
    output_nc: int = 3
    ngf: int = 64
    n_downsampling: int = 2
    n_blocks: int = 9
    norm: str = "instance"
    use_dropout: bool = False
    padding_type: str = "reflect"
    use_bias: bool | None = None

    def __post_init__(self) -> None:
        check_positive(self, "input_nc", "output_nc", "ngf", "n_downsampling")
        if self.n_blocks < 0:
            raise ValueError(f"n_blocks={self.n_blocks} must not be negative")
        if self.padding_type not in _PADDINGS:
            raise ValueError(f"padding_type={self.padding_type!r} must be one of {', '.join(_PADDINGS)}")
        norm2d(self.norm, 1)

    @property
    def bias(self) -> bool:
        """Whether convolutions ahead of a norm have one."""
        return self.norm == "instance" if self.use_bias is None else self.use_bias


class _Block(nn.Module):
    def __init__(self, channels: int, config: ResNetConfig, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        pad = _PADDINGS[config.padding_type]

        def conv() -> list[nn.Module]:
            ahead = [] if pad is None else [pad(1)]
            return [
                *ahead,
                nn.Conv2d(channels, channels, 3, padding=int(pad is None), bias=config.bias),
                norm2d(config.norm, channels),
            ]

        dropout = [nn.Dropout(0.5)] if config.use_dropout else []
        self.conv_block = sequential(*conv(), nn.ReLU(inplace=True), *dropout, *conv())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class ResNetGenerator(nn.Module):
    """Pictures (N, input_nc, H, W) -> (N, output_nc, H, W) in [-1, 1]; H and W multiples of ``2**n_downsampling``, at
    least twice that. ``sequential`` as of `Pix2PixUNet`."""

    def __init__(self, config: ResNetConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = c = config if config is not None else ResNetConfig()

        def behind(channels: int) -> list[nn.Module]:
            return [norm2d(c.norm, channels), nn.ReLU(inplace=True)]

        layers = [nn.ReflectionPad2d(3), nn.Conv2d(c.input_nc, c.ngf, 7, bias=c.bias), *behind(c.ngf)]
        widths = [c.ngf * 2**i for i in range(c.n_downsampling + 1)]
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(a, b, 3, 2, 1, bias=c.bias), *behind(b)]
        layers += [_Block(widths[-1], c, sequential) for _ in range(c.n_blocks)]
        for b, a in zip(widths[:0:-1], widths[-2::-1], strict=True):
            layers += [nn.ConvTranspose2d(b, a, 3, 2, 1, 1, bias=c.bias), *behind(a)]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(c.ngf, c.output_nc, 7), nn.Tanh()]
        self.model: nn.Sequential = sequential(*layers)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        drop_statistics(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures of 256x256, of the parameters' dtype and on their device."""
        return (torch.rand(batch, self.config.input_nc, 256, 256) * 2 - 1).to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
