"""pix2pixHD's generator for large pictures (Wang and others, 2018): a residual network around that of half the size.

``state_dict`` keys are those of the published ``LocalEnhancer`` with one enhancer, as its 1024p checkpoint has it;
what it has inside, ``GlobalGenerator``, is a `ResNetGenerator`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.layers import Sequential
from .published import check_positive, drop_statistics
from .resnet import ResNetConfig, ResNetGenerator

__all__ = ["LocalEnhancer", "LocalEnhancerConfig"]


@dataclass(frozen=True)
class LocalEnhancerConfig(ResNetConfig):
    """As of `ResNetConfig`; ``ngf`` is the enhancer's, the inner network has twice as many. ``n_blocks_local``:
    residual blocks of the enhancer."""

    input_nc: int = 36  # of the published checkpoint: 35 labels of cityscapes, and where objects meet
    ngf: int = 32
    n_downsampling: int = 4
    use_bias: bool | None = True
    n_blocks_local: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "n_blocks_local")


class LocalEnhancer(nn.Module):
    """Pictures (N, input_nc, H, W) -> (N, output_nc, H, W) in [-1, 1]; H and W multiples of
    ``2**(n_downsampling + 1)``, at least twice that. ``sequential`` as of `Pix2PixUNet`."""

    def __init__(
        self, config: LocalEnhancerConfig | None = None, *, sequential: type[nn.Sequential] = Sequential
    ) -> None:
        super().__init__()
        self.config = c = config if config is not None else LocalEnhancerConfig()
        inner = ResNetGenerator(replace(c, ngf=2 * c.ngf), sequential=sequential).model
        self.model = inner[:-3]  # all but what makes the picture
        # The enhancer is a network of one halving, which the inner one's result joins ahead of the blocks.
        whole = ResNetGenerator(replace(c, n_downsampling=1, n_blocks=c.n_blocks_local), sequential=sequential).model
        self.model1_1, self.model1_2 = whole[:7], sequential(*list(whole)[7:])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        drop_statistics(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures of 256x256, of the parameters' dtype and on their device."""
        return torch.rand(batch, self.config.input_nc, 256, 256).to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        half = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        return self.model1_2(self.model1_1(x) + self.model(half))
