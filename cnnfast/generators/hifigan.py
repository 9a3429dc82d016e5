"""HiFi-GAN's generator (Kong, Kim and Bae, 2020), mel spectrogram to waveform, under the names of jik876's hifi-gan.

Published checkpoints hold the convolutions' weights as direction and length (``weight_v``, ``weight_g``), which is how
they are trained. Such a weight is computed on every call, where it is not kept (in inference on a CPU);
`HiFiGAN.remove_weight_norm` makes plain weights of them. Either form loads either layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from ..nn.layers import Sequential
from .published import check_positive

__all__ = ["HiFiGAN", "HiFiGANConfig"]

_SLOPE = 0.1
_LAST_SLOPE = 0.01  # the published code leaves it to PyTorch there
# What PyTorch calls the length and the direction, and what its older weight_norm and checkpoints call them.
_PARTS = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


@dataclass(frozen=True)
class HiFiGANConfig:
    """Names as in the published ``config.json``. ``num_mels`` channels of the spectrogram; one upsampling for each of
    ``upsample_rates``, which halves ``upsample_initial_channel``; behind it the mean of the residual blocks of
    ``resblock_kernel_sizes`` with ``resblock_dilation_sizes``, of kind ``resblock`` "1" or "2". ``weight_norm``: for
    training, see the module.

    The defaults are ``config_v1``'s.
    """

    num_mels: int = 80
    upsample_rates: tuple[int, ...] = (8, 8, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (16, 16, 4, 4)
    upsample_initial_channel: int = 512
    resblock: str = "1"
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5),) * 3
    weight_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists, out of JSON
        object.__setattr__(self, "resblock_dilation_sizes", tuple(tuple(d) for d in self.resblock_dilation_sizes))
        check_positive(self, "num_mels", "upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes")
        for a, b in (
            ("upsample_rates", "upsample_kernel_sizes"),
            ("resblock_kernel_sizes", "resblock_dilation_sizes"),
        ):
            if len(getattr(self, a)) != len(getattr(self, b)):
                raise ValueError(f"{a}={getattr(self, a)} and {b}={getattr(self, b)} must be of the same length")
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernel_sizes, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise ValueError(f"upsample_kernel_sizes: {kernel} must exceed its rate {rate} by an even number")
        if any(kernel % 2 == 0 for kernel in self.resblock_kernel_sizes):
            raise ValueError(f"resblock_kernel_sizes={self.resblock_kernel_sizes} must be odd")
        if self.resblock not in ("1", "2"):
            raise ValueError(f"resblock={self.resblock!r} must be '1' or '2'")
        if self.upsample_initial_channel < 1 or self.upsample_initial_channel % 2 ** len(self.upsample_rates):
            raise ValueError(
                f"upsample_initial_channel={self.upsample_initial_channel} must be a multiple of "
                f"{2 ** len(self.upsample_rates)}: each of {len(self.upsample_rates)} upsamplings halves it"
            )

    @property
    def hop(self) -> int:
        """Samples of the waveform for each column of the spectrogram."""
        return math.prod(self.upsample_rates)


class _Block(nn.Module):
    """Residual convolutions: of kind 1 in pairs, of which the first is dilated; of kind 2 single dilated ones."""

    def __init__(
        self, channels: int, kernel_size: int, dilations: tuple[int, ...], kind: str, sequential: type[nn.Sequential]
    ) -> None:
        super().__init__()

        def convs(dilations: tuple[int, ...]) -> nn.ModuleList:
            return nn.ModuleList(
                nn.Conv1d(channels, channels, kernel_size, padding=d * (kernel_size // 2), dilation=d)
                for d in dilations
            )

        rows: list[tuple[nn.Module, ...]]
        if kind == "1":
            self.convs1, self.convs2 = convs(dilations), convs((1,) * len(dilations))
            rows = [
                (first, nn.LeakyReLU(_SLOPE), second) for first, second in zip(self.convs1, self.convs2, strict=True)
            ]
        else:
            self.convs = convs(dilations)
            rows = [(conv,) for conv in self.convs]
        # In a tuple they are no children, whose names would be in the state_dict a second time.
        self._steps = tuple(sequential(nn.LeakyReLU(_SLOPE), *row) for row in rows)

    def forward(self, x: Tensor) -> Tensor:
        for step in self._steps:
            x = step(x) + x
        return x


class HiFiGAN(nn.Module):
    """Mel spectrograms (N, num_mels, T) -> waveforms (N, 1, hop*T) in [-1, 1]. ``sequential`` as of `Pix2PixUNet`."""

    def __init__(self, config: HiFiGANConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = c = config if config is not None else HiFiGANConfig()
        widths = [c.upsample_initial_channel // 2**i for i in range(len(c.upsample_rates) + 1)]
        self.conv_pre = nn.Conv1d(c.num_mels, widths[0], 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(a, b, kernel, rate, (kernel - rate) // 2)
            for a, b, kernel, rate in zip(widths, widths[1:], c.upsample_kernel_sizes, c.upsample_rates, strict=False)
        )
        self.resblocks = nn.ModuleList(
            _Block(width, kernel, dilations, c.resblock, sequential)
            for width in widths[1:]
            for kernel, dilations in zip(c.resblock_kernel_sizes, c.resblock_dilation_sizes, strict=True)
        )
        self.conv_post = nn.Conv1d(widths[-1], 1, 7, padding=3)
        # An activation behind what the blocks' mean is made of cannot be taken in: it starts a step.
        first, *others = self.ups
        self._ups = (
            sequential(self.conv_pre, nn.LeakyReLU(_SLOPE), first),
            *(sequential(nn.LeakyReLU(_SLOPE), up) for up in others),
        )
        self._last = (sequential(nn.LeakyReLU(_LAST_SLOPE), self.conv_post, nn.Tanh()),)
        for conv in (*self.ups, *self.resblocks.modules(), self.conv_post):
            if isinstance(conv, (nn.Conv1d, nn.ConvTranspose1d)):
                nn.init.normal_(conv.weight, 0.0, 0.01)
        if c.weight_norm:
            for _, conv in self._convs():
                weight_norm(conv)
        self.register_state_dict_post_hook(_published_names)

    def _convs(self) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self.named_modules():
            if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
                yield name, module

    def remove_weight_norm(self) -> None:
        """Make plain weights of lengths and directions, for good: same waveforms, and fused steps."""
        for _, conv in self._convs():
            if parametrize.is_parametrized(conv, "weight"):
                parametrize.remove_parametrizations(conv, "weight")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, conv in self._convs():
            key = f"{prefix}{name}.weight"
            if parametrize.is_parametrized(conv, "weight"):
                if (weight := state_dict.pop(key, None)) is not None:
                    dims = tuple(range(1, weight.dim()))
                    state_dict[f"{key}_g"], state_dict[f"{key}_v"] = weight.norm(dim=dims, keepdim=True), weight
            elif f"{key}_g" in state_dict and f"{key}_v" in state_dict:
                state_dict[key] = torch._weight_norm(state_dict.pop(f"{key}_v"), state_dict.pop(f"{key}_g"))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` spectrograms of 32 columns, of the parameters' dtype and on their device."""
        return torch.randn(batch, self.config.num_mels, 32).to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        kinds = len(self.config.resblock_kernel_sizes)
        for i, up in enumerate(self._ups):
            x = up(x)
            x = sum(block(x) for block in self.resblocks[kinds * i : kinds * (i + 1)]) / kinds
        return self._last[0](x)


def _published_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Rename in place, in order, what PyTorch calls otherwise."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        value = state_dict.pop(name)
        for now, before in _PARTS.items():
            name = name.replace(now, before)
        state_dict[name] = value
