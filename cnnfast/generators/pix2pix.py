"""pix2pix's U-Net (Isola, Zhu, Zhou and Efros, 2017) under the names of pytorch-CycleGAN-and-pix2pix's
``UnetGenerator`` (``unet_128``, ``unet_256``).

There each level holds the next one (``model.model.1.model.3.model...``), and its LeakyReLU works in place, so that what
goes to the other side is its result. Of that the ReLU over there makes the same as of its input: here the maps go down
and up again in two loops, and every convolution has its norm and its activation behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.layers import Sequential
from .published import check_positive, drop_statistics, norm2d

__all__ = ["Pix2PixConfig", "Pix2PixUNet"]

_SLOPE = 0.2


@dataclass(frozen=True)
class Pix2PixConfig:
    """Names as published: ``input_nc`` and ``output_nc`` channels of the pictures, ``num_downs`` halvings, ``ngf``
    channels after the first one (8 times as many from the fourth on), ``norm`` "batch" or "instance" (its convolutions
    have a bias), ``use_dropout`` in the levels between the innermost one and the outer four."""

    input_nc: int = 3
    output_nc: int = 3
    num_downs: int = 8
    ngf: int = 64
    norm: str = "batch"
    use_dropout: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "input_nc", "output_nc", "ngf")
        if self.num_downs < 5:
            raise ValueError(f"num_downs={self.num_downs} must be at least 5")
        norm2d(self.norm, 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the maps of 1/2, 1/4, ... of the picture."""
        return tuple(self.ngf * min(2**i, 8) for i in range(self.num_downs))


class _Level(nn.Module):
    """The layers of one level and the level inside it, under their published names."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*layers)


class Pix2PixUNet(nn.Module):
    """Pictures (N, input_nc, H, W) in [-1, 1] -> (N, output_nc, H, W) in [-1, 1]; H and W multiples of
    ``2**num_downs``.

    ``sequential`` is the container of the steps: `cnnfast.Sequential`, or ``nn.Sequential`` for the same network run by
    plain PyTorch.
    """

    def __init__(self, config: Pix2PixConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = c = config if config is not None else Pix2PixConfig()
        bias, last = c.norm == "instance", c.num_downs - 1
        level: _Level | None = None
        downs: list[nn.Module] = []
        ups: list[nn.Module] = []
        for i in range(last, -1, -1):
            outer, inner = c.widths[i - 1] if i else c.output_nc, c.widths[i]
            down = nn.Conv2d(outer if i else c.input_nc, inner, 4, 2, 1, bias=bias)
            up = nn.ConvTranspose2d(inner * (1 if i == last else 2), outer, 4, 2, 1, bias=bias or i == 0)
            # Ahead of `down` as published, for the sake of the numbers in the names; here it is behind the level above.
            before, relu = nn.LeakyReLU(_SLOPE), nn.ReLU()
            normed: list[nn.Module] = [] if i in (0, last) else [norm2d(c.norm, inner)]
            after: list[nn.Module] = [norm2d(c.norm, outer)] if i else [nn.Tanh()]
            if c.use_dropout and 4 <= i < last:
                after.append(nn.Dropout(0.5))
            level = _Level(*([before] if i else []), down, *normed, *([level] if level else []), relu, up, *after)
            downs.append(sequential(down, *normed, nn.ReLU() if i == last else nn.LeakyReLU(_SLOPE)))
            ups.append(sequential(up, *after, *([nn.ReLU()] if i else [])))
        assert level is not None
        self.model = level
        # In tuples they are no children, whose names would be in the state_dict a second time.
        self._downs, self._ups = tuple(reversed(downs)), tuple(ups)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation: N(0, 0.02) for convolutions, N(1, 0.02) for the norms' factors, 0 elsewhere."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        drop_statistics(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures, 2**num_downs pixels each way, of the parameters' dtype and on their device."""
        size = 2**self.config.num_downs
        return (torch.rand(batch, self.config.input_nc, size, size) * 2 - 1).to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        outer = []
        for down in self._downs:
            x = down(x)
            outer.append(x)
        x = self._ups[0](outer.pop())
        for up in self._ups[1:]:
            x = up(torch.cat([F.relu(outer.pop()), x], 1))
        return x
