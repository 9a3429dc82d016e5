"""Images from texts: words and their letters -> a condition -> 4x4 -> upsampling blocks that the condition modulates.

Every block scales and shifts its input by the text (FiLM: Perez et al., 2018), channel by channel, then runs
Upsample(nearest, 2) + Conv2d + BatchNorm2d + ReLU, which `cnnfast.Sequential` fuses: the upsampled map never exists.
The scale and shift ahead of the convolution act on a quarter of the elements that they would meet behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.layers import Sequential

__all__ = ["TextEncoder", "TextImageConfig", "TextImageGenerator"]


@dataclass(frozen=True)
class TextImageConfig:
    """``words``: rows of the table, beside row 0 of no word; ``letters``: ids of an alphabet, 0 for none.

    ``word_width`` of a word's vector, ``width`` of the condition, ``channels`` of the maps of 4x4, 8x8, ...; the last
    block makes the ``nc`` channels of the image, twice as large as the last map, by a convolution of ``head_kernel``.
    """

    words: int = 3577
    letters: int = 39
    word_width: int = 128
    letter_width: int = 24
    width: int = 160
    channels: tuple[int, ...] = (96, 160, 112, 64)
    head_kernel: int = 5
    nc: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # a list, out of a checkpoint
        for name in ("words", "letters", "word_width", "letter_width", "width", "nc"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels={self.channels} must be one or more positive numbers")
        if self.head_kernel < 1 or self.head_kernel % 2 == 0:
            raise ValueError(f"head_kernel={self.head_kernel} must be odd")

    @property
    def image_size(self) -> int:
        """Pixels of a side."""
        return 4 << len(self.channels)


class TextEncoder(nn.Module):
    """Rows (N, L) and letters (N, L, K), int64, 0 for none -> condition (N, width).

    A word's vector is its row of a table and what a convolution finds in its letters; a word without a row (0) but with
    letters is known by those. Words are summed, and read in order by a convolution over three of them.
    """

    def __init__(self, config: TextImageConfig, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        e, d = config.word_width, config.width
        self.row = nn.Embedding(config.words + 1, e, padding_idx=0)
        self.letter = nn.Embedding(config.letters, config.letter_width, padding_idx=0)
        self.spelling = sequential(nn.Conv1d(config.letter_width, e, 5, padding=2), nn.ReLU())
        self.spelled = nn.Linear(e, e, bias=False)
        self.bag = nn.Linear(e, d)
        nn.init.orthogonal_(self.bag.weight)
        self.order = sequential(nn.Conv1d(e, d, 3, padding=1), nn.ReLU())
        self.mix = nn.Sequential(nn.Linear(2 * d, 2 * d), nn.ReLU(), nn.Linear(2 * d, d))

    def forward(self, rows: Tensor, letters: Tensor) -> Tensor:
        there = (letters > 0).any(2)  # (N, L)
        maps = self.spelling(self.letter(letters[there]).transpose(1, 2))  # of the words that there are: (M, E, K)
        spelled = self.spelled(maps.amax(2))
        words = self.row(rows).to(spelled.dtype)
        words = words.masked_scatter(there[..., None], words[there] + spelled)
        words = words * there[..., None]
        bag = self.bag(words.sum(1))
        order = self.order(words.transpose(1, 2)).transpose(1, 2) * there[..., None]
        count = there.sum(1, keepdim=True).clamp(min=1)
        return self.mix(torch.cat([bag, order.sum(1) / count.sqrt()], 1)) + bag


class Block(nn.Module):
    """x (N, C, H, W), condition (N, D) -> (N, C_out, 2H, 2W): ``layers(x * (1 + scale) + shift)``."""

    def __init__(self, channels: int, width: int, layers: nn.Sequential) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 2 * channels)
        nn.init.normal_(self.modulation.weight, 0.0, 0.02)  # at first next to none
        nn.init.zeros_(self.modulation.bias)
        self.layers = layers

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, 1)
        return self.layers(torch.addcmul(shift, x, 1 + scale))


class TextImageGenerator(nn.Module):
    """Rows (N, L) and letters (N, L, K) of words, int64 -> images (N, nc, image_size, image_size) in [-1, 1].

    ``sequential`` is the container of the layers: `cnnfast.Sequential`, or ``nn.Sequential`` for the same network run
    by plain PyTorch.
    """

    def __init__(self, config: TextImageConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = c = config if config is not None else TextImageConfig()
        self.text = TextEncoder(c, sequential=sequential)
        self.start = nn.Linear(c.width, c.channels[0] * 16)
        blocks: list[Block] = []
        for a, b in zip(c.channels, c.channels[1:], strict=False):
            conv = nn.Conv2d(a, b, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight)
            layers = sequential(nn.Upsample(scale_factor=2), conv, nn.BatchNorm2d(b), nn.ReLU())
            blocks.append(Block(a, c.width, layers))
        head = nn.Conv2d(c.channels[-1], c.nc, c.head_kernel, padding=c.head_kernel // 2)
        blocks.append(Block(c.channels[-1], c.width, sequential(nn.Upsample(scale_factor=2), head, nn.Tanh())))
        self.blocks = nn.ModuleList(blocks)

    def example_input(self, batch: int = 1) -> tuple[Tensor, Tensor]:
        """Rows and letters of a text of two words, on the parameters' device."""
        device = next(self.parameters()).device
        rows = torch.ones(batch, 2, dtype=torch.int64, device=device)
        return rows, rows[..., None]

    def forward(self, rows: Tensor, letters: Tensor) -> Tensor:
        condition = self.text(rows, letters)
        x = torch.relu(self.start(condition)).view(len(rows), -1, 4, 4)
        for block in self.blocks:
            x = block(x, condition)
        return x

    def explain(self) -> str:
        """What is fused in every block, and why the rest is not (`cnnfast.Sequential.explain`)."""
        lines = []
        for i, block in enumerate(self.blocks):
            layers = block.layers
            if isinstance(layers, Sequential):
                lines += [f"block {i}, {line}" for line in layers.explain().splitlines()]
        return "\n".join(lines)
