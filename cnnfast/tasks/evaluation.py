"""How well texts are drawn: whether the real picture that lies nearest to a drawing is the right one.

Beside it, what the nearest description of the training would have given, without any network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .emoji import EmojiSet
from .words import Vocabulary

__all__ = ["HEADERS", "Row", "evaluate", "nearest_description", "retrieve"]

# Mean squared difference of values in [-1, 1] below which two pictures are the same: the font has some twice.
_SAME = 1e-4
_EVERY = 5  # picture of those that were seen in training is looked at

HEADERS = ("texts", "number", "top 1", "top 5", "PSNR, dB", "nearest description: top 1", "PSNR, dB")


@dataclass(frozen=True)
class Row:
    """One kind of texts: their ``number``; the part of them whose picture is the nearest real one (``top1``) or among
    the five nearest; mean PSNR in dB over [-1, 1]. ``plain_top1``, ``plain_psnr``: the same of the training picture
    whose description shares the most words, None where that is the picture itself."""

    texts: str
    number: int
    top1: float
    top5: float
    psnr: float
    plain_top1: float | None
    plain_psnr: float | None

    def cells(self) -> tuple[str, ...]:
        """As text, under `HEADERS`."""
        percent = [f"{100 * v:.1f} %" for v in (self.top1, self.top5)]
        plain = ("-", "-")
        if self.plain_top1 is not None:
            plain = f"{100 * self.plain_top1:.1f} %", f"{self.plain_psnr:.2f}"
        return (self.texts, str(self.number), *percent, f"{self.psnr:.2f}", *plain)


def retrieve(images: Tensor, target: Sequence[int], pool: Tensor) -> Tensor:
    """Rank (N,) of the right picture ``pool[target]`` among all of ``pool`` (M, ...), by mean squared difference to
    ``images`` (N, ...): 0 where it is the nearest, at most 5."""
    flat, made = pool.flatten(1), images.flatten(1)
    distance = flat.square().sum(1) - 2 * made @ flat.T  # and a constant for each image
    order = distance.topk(min(5, len(pool)), largest=False).indices
    right = torch.tensor(target)
    ranks = []
    for five, one in zip(order.split(64), right.split(64), strict=True):
        same = (flat[five] - flat[one][:, None]).square().mean(2) < _SAME  # the right one itself among them
        ranks.append(torch.where(same.any(1), same.int().argmax(1), 5))
    return torch.cat(ranks)


def nearest_description(texts: Tensor, known: Tensor) -> Tensor:
    """For each of ``texts`` (N, words), 1 where a word is in it, the first of ``known`` (M, words) that shares most of
    its words with it (Jaccard): int64 (N,)."""
    common = texts @ known.T
    either = texts.sum(1, keepdim=True) + known.sum(1) - common
    return (common / either.clamp(min=1)).argmax(1)


def evaluate(data: EmojiSet, vocabulary: Vocabulary, draw: Callable[[Sequence[str]], Tensor]) -> list[Row]:
    """A row for every split that the training did not see, by English and by German names, and rows for what it saw.

    ``draw``: texts -> images (N, 3, size, size) in [-1, 1], float32 on the CPU. Every picture of ``data`` can be
    retrieved. The order of the words is changed in the last row: reversed.
    """
    real = data.images.float() / 127.5 - 1
    described = [(i, name) for i in data.train for name in data.emoji[i].names]
    known = _bags(vocabulary, [name for _, name in described])

    def row(title: str, indices: Sequence[int], names: Sequence[str], known_ones: bool = False) -> Row:
        made = draw(names)
        guessed = real[[described[j][0] for j in nearest_description(_bags(vocabulary, names), known).tolist()]]
        right, rank = real[list(indices)], retrieve(made, indices, real)
        return Row(
            title,
            len(indices),
            (rank == 0).double().mean().item(),
            (rank < 5).double().mean().item(),
            psnr(made, right),
            None if known_ones else (retrieve(guessed, indices, real) == 0).double().mean().item(),
            None if known_ones else psnr(guessed, right),
        )

    rows = []
    for split, indices in data.held_out.items():
        rows.append(row(f"{split}, unseen", indices, [data.emoji[i].english for i in indices]))
        rows.append(row(f"{split}, unseen, German", indices, [data.emoji[i].german for i in indices]))
    seen = data.train[::_EVERY]
    rows.append(row("seen in training", seen, [data.emoji[i].english for i in seen], True))
    turned = [" ".join(reversed(vocabulary.read(data.emoji[i].english).words)) for i in seen]
    rows.append(row("seen, words reversed", seen, turned, True))
    return rows


def _bags(vocabulary: Vocabulary, names: Sequence[str]) -> Tensor:
    """(N, words), 1 where a word is in a name."""
    bags = torch.zeros(len(names), len(vocabulary.words) + 1)
    rows, _ = vocabulary.encode([vocabulary.read(name) for name in names])
    return bags.scatter_(1, rows, 1.0)[:, 1:]


def psnr(made: Tensor, right: Tensor) -> float:
    """Mean over images (N, ...) of the peak signal-to-noise ratio in dB; values in [-1, 1]."""
    error = (made - right).flatten(1).square().mean(1).clamp(min=1e-10)
    return (10 * torch.log10(4 / error)).mean().item()
