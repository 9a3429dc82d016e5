"""One training of a text-to-image generator on emoji: network, texts, optimiser, and what a step does. The job around
it: train_text.py."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..generators import TextImageConfig, TextImageGenerator, create_model
from ..memory_format import channels_last
from .checkpoint import check_training
from .data import generator_of
from .emoji import EmojiSet
from .gan import LAYERS, fingerprint
from .machine import has_bfloat16
from .words import ALPHABET, Reading, Vocabulary, spell

__all__ = ["CHANGEABLE", "CURVES", "Options", "Texts", "Trainer", "image_loss"]

# What a step reports: the loss, and how near the images are in decibels (of the largest difference, 2).
CURVES = ("loss", "psnr")
CHANGEABLE = ("layers", "device", "output", "font")

STEPS_PER_EPOCH = 500
_WARM_UP = 100  # steps
# The learning rate follows half a cosine over so many epochs (or over more, for more), and in the last ones a line to
# nothing: a shorter training is a longer one that cools down earlier, the same bits until there.
_COSINE, _COOLING = 18, 2
# Of a text's three kinds of names, how often each is taken: English, an alias, German.
_NAMES = (0.5, 0.2, 0.3)
_SHUFFLED = 0.2  # texts whose words are put in another order
_ROWLESS = 0.1  # words that are known by their letters only
_ROW_LR = 3.0  # rows of the table are met seldom: their learning rate over the others'
_RIDGE = 0.1


@dataclass(frozen=True)
class Options:
    """What is trained. ``width``: channels ahead of the image. ``amp``: "bf16", "none", or "auto": bf16 where the
    processor (or GPU) has instructions for it.

    An epoch is `STEPS_PER_EPOCH` steps; the learning rate falls from ``lr`` to nothing over all ``epochs``, so that a
    resumed run cannot change their number. ``font``: Noto Color Emoji, None: where systems keep it.
    """

    epochs: int = 12
    batch_size: int = 64
    lr: float = 3e-3
    seed: int = 0
    width: int = 64
    image_size: int = 64
    amp: str = "auto"
    layers: str = "cnnfast"
    device: str | None = None
    font: Path | None = None
    output: Path = Path("out/text")

    def __post_init__(self) -> None:
        for name, allowed in (
            ("amp", ("auto", "bf16", "none")),
            ("layers", tuple(LAYERS)),
            ("image_size", (16, 32, 64)),
        ):
            if getattr(self, name) not in allowed:
                expected = ", ".join(map(str, allowed))
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected one of {expected}")
        for name, least in (("epochs", 1), ("batch_size", 2), ("width", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least {least}")
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed}: expected less than 2**63")
        if not 0 < self.lr <= torch.finfo(torch.float32).max:
            raise ValueError(f"--lr {self.lr}: expected a positive number")

    def config(self, words: int) -> TextImageConfig:
        """The network's, for a vocabulary of ``words``."""
        widths = (self.width * 3 // 2, self.width * 5 // 2, self.width * 7 // 4, self.width)
        channels = widths[-((self.image_size // 4).bit_length() - 1) :]
        return TextImageConfig(words, 3 + len(ALPHABET), 2 * self.width, 24, self.width * 5 // 2, channels)


@dataclass(frozen=True)
class Texts:
    """What may be said of each training image: ``rows`` (T, L) of all texts; of image i those from ``first[i]`` on,
    ``count[i]`` of each kind (English, aliases, German)."""

    rows: Tensor
    first: Tensor
    count: Tensor

    @classmethod
    def of(cls, data: EmojiSet, vocabulary: Vocabulary) -> Texts:
        """Where two images have one text, it is the one's whose English name it is, else whose alias; a text that is
        still of two is nobody's: "pilot" is in German a man, in English anyone."""
        readings = [
            [[vocabulary.read(name) for name in names] for names in ((e.english,), e.aliases, (e.german,))]
            for e in (data.emoji[i] for i in data.train)
        ]
        claims: dict[tuple[str, ...], list[set[int]]] = defaultdict(lambda: [set(), set(), set()])
        for i, kinds in enumerate(readings):
            for k, kind in enumerate(kinds):
                for reading in kind:
                    claims[reading.words][k].add(i)
        owner = {words: _owner(kinds) for words, kinds in claims.items() if words}
        texts: list[Reading] = []
        first, count = [], []
        for i, kinds in enumerate(readings):
            first.append(len(texts))
            own: list[dict[tuple[str, ...], Reading]] = [{}, {}, {}]
            for kept, kind in zip(own, kinds, strict=True):
                kept.update({r.words: r for r in kind if owner.get(r.words) == i})
            texts += [reading for kept in own for reading in kept.values()]
            count.append([len(kept) for kept in own])
        rows, _ = vocabulary.encode(texts)
        return cls(rows, torch.tensor(first), torch.tensor(count))


def _owner(claims: Sequence[set[int]]) -> int | None:
    strongest = next(images for images in claims if images)
    return next(iter(strongest)) if len(strongest) == 1 else None


class Trainer:
    """The state of a training and its step, in the manner of `gan.Trainer`: the same options and data give the same
    bits on a CPU with the same number of threads, however often the training was stopped and resumed; global random
    state is neither used nor changed.
    """

    def __init__(self, options: Options, data: EmojiSet, device: torch.device) -> None:
        self.options, self.data, self.device = options, data, device
        seen = [data.emoji[i] for i in data.train]
        self.vocabulary = Vocabulary.of(
            [name for e in seen for name in (e.english, *e.aliases)], [e.german for e in seen]
        )
        self.texts = Texts.of(data, self.vocabulary)
        has_text = self.texts.count.sum(1) > 0
        self._weights = data.weights() * has_text
        self._images = data.images[list(data.train)]
        self._letters = torch.stack([torch.zeros_like(spell("")), *(spell(word) for word in self.vocabulary.words)])
        self.config = options.config(len(self.vocabulary.words))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = create_model("text_image", sequential=LAYERS[options.layers], **asdict(self.config))
            assert isinstance(model, TextImageGenerator)
            with torch.no_grad():
                model.text.row.weight.copy_(self._first_rows())
                model.text.spelled.weight.mul_(0.1)  # at first the rows alone say what a word is
        self.generator = channels_last(model.to(device))
        rows = self.generator.text.row.weight
        others = [p for p in self.generator.parameters() if p is not rows]
        groups = [{"params": others, "weight_decay": 1e-4}, {"params": [rows], "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, options.lr, betas=(0.9, 0.98))
        self.low_precision = options.amp == "bf16" or (options.amp == "auto" and has_bfloat16(device))
        self.steps = 0
        self.curves: list[Tensor] = []  # of each step, on the device: (len(CURVES),)

    @property
    def images_per_step(self) -> int:
        return self.options.batch_size

    @property
    def steps_per_epoch(self) -> int:
        return STEPS_PER_EPOCH

    def step(self) -> Tensor:
        """One step of the optimiser; the values of `CURVES`, on the device."""
        for group, factor in zip(self.optimiser.param_groups, (1.0, _ROW_LR), strict=True):
            group["lr"] = self.options.lr * factor * self._schedule()
        chosen, rows = self._batch(generator_of(self.options.seed, "texts", self.steps))
        rows = rows[:, : int(rows.any(0).sum())]  # as long as the longest of these texts
        letters = self._letters[rows]
        draw = generator_of(self.options.seed, "letters only", self.steps)
        rows = rows.masked_fill(torch.rand(rows.shape, generator=draw) < _ROWLESS, 0)
        images = self._images[chosen].to(self.device).float() / 127.5 - 1
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            made = self.generator(rows.to(self.device), letters.to(self.device))
        made = made.float()
        loss = image_loss(made, images)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.steps += 1
        psnr = 10 * torch.log10(4 / (made.detach() - images).square().mean())
        self.curves.append(torch.stack([loss.detach(), psnr]))
        return self.curves[-1]

    def sample(self, texts: Sequence[str]) -> Tensor:
        """Images of texts (N, 3, H, W) in [-1, 1], float32 on the CPU; unknown words are left out."""
        rows, letters = self.vocabulary.encode([self.vocabulary.read(text) for text in texts])
        self.generator.eval()
        try:
            with torch.inference_mode():
                return self.generator(rows.to(self.device), letters.to(self.device)).float().cpu()
        finally:
            self.generator.train()

    def history(self) -> Tensor:
        """The curves so far, on the CPU: (steps, len(CURVES))."""
        if len(self.curves) > 1:
            self.curves = list(torch.stack(self.curves).cpu())
        return torch.stack(self.curves).cpu() if self.curves else torch.zeros(0, len(CURVES))

    def finite(self) -> bool:
        """Whether every parameter and running statistic is finite."""
        return all(bool(torch.isfinite(t).all()) for t in self.generator.state_dict().values())

    def state(self) -> dict[str, Any]:
        """Everything that goes on from here, for `checkpoint.save_checkpoint`."""
        return {
            "options": {k: v for k, v in asdict(self.options).items() if k not in CHANGEABLE},
            "layers": self.options.layers,
            "data": fingerprint(self._images),
            "words": list(self.vocabulary.words),
            "steps": self.steps,
            "generator": self.generator.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "curves": self.history(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. ValueError where its emoji were others, CheckpointError where a part of it is missing or
        of other sizes than this training's."""
        if state.get("data") != fingerprint(self._images) or state.get("words") != list(self.vocabulary.words):
            raise ValueError("--font: these are not the emoji of the checkpoint")
        optimisers = {"generator": (self.optimiser, state.get("optimiser"))}
        check_training(state, {"generator": self.generator}, optimisers, len(CURVES))
        self.generator.load_state_dict(state["generator"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps = state["steps"]
        self.curves = list(state["curves"])

    def _schedule(self) -> float:
        """The learning rate's part at this step."""
        epochs = self.options.epochs
        done = self.steps / (max(epochs, _COSINE) * STEPS_PER_EPOCH)
        left = (epochs * STEPS_PER_EPOCH - self.steps) / (min(epochs, _COOLING) * STEPS_PER_EPOCH)
        cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0))) + 0.005
        return min(1.0, (self.steps + 1) / _WARM_UP) * cosine * min(1.0, left)

    def _batch(self, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices of images (B,), and of each the rows of one of its texts (B, L)."""
        batch, texts = self.options.batch_size, self.texts
        chosen = torch.multinomial(self._weights, batch, replacement=True, generator=draw)
        count = texts.count[chosen]
        kind = torch.multinomial(torch.tensor(_NAMES) * (count > 0), 1, generator=draw)[:, 0]
        of_kind = count.gather(1, kind[:, None])[:, 0]
        before = count.cumsum(1).gather(1, kind[:, None])[:, 0] - of_kind
        which = (torch.rand(batch, generator=draw, dtype=torch.float64) * of_kind).long()
        rows = texts.rows[texts.first[chosen] + before + which].clone()
        shuffled = torch.rand(batch, generator=draw) < _SHUFFLED
        for i in shuffled.nonzero()[:, 0].tolist():
            words = rows[i][rows[i] > 0]
            if len(words) == len(words.unique()):  # of two skin tones the order says whose is which
                rows[i, : len(words)] = words[torch.randperm(len(words), generator=draw)]
        return chosen, rows

    def _first_rows(self) -> Tensor:
        """Rows (words + 1, word_width) to start from: the ridge regression of the images' principal components, each of
        variance 1, on the words of their texts. A sum of words then already says roughly what the image is, and the
        network has to learn the way back."""
        width, words = self.config.word_width, len(self.vocabulary.words)
        flat = self._images.flatten(1).float() / 127.5 - 1
        flat = flat - flat.mean(0)
        left, singular, _ = torch.svd_lowrank(flat, min(width, *flat.shape), niter=3)
        components = left * singular
        components = components / components.std(0)
        image = torch.repeat_interleave(torch.arange(len(flat)), self.texts.count.sum(1))
        bags = torch.zeros(len(image), words + 1)
        bags.scatter_add_(1, self.texts.rows, torch.ones(self.texts.rows.shape))
        bags[:, 0] = 0
        weight = self.data.weights()[image].sqrt().float()[:, None]
        bags = bags * weight
        known = bags.T @ bags + _RIDGE * torch.eye(words + 1)
        rows = torch.linalg.solve(known, bags.T @ (components[image] * weight))
        rows[0] = 0
        return F.pad(rows, (0, width - rows.shape[1]))


def image_loss(made: Tensor, images: Tensor) -> Tensor:
    """Mean absolute and squared differences of pixels, and half the absolute differences of their slopes."""

    def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.diff(dim=2), x.diff(dim=3)

    edges = sum((a - b).abs().mean() for a, b in zip(slopes(made), slopes(images), strict=True))
    return F.l1_loss(made, images) + F.mse_loss(made, images) + 0.5 * edges
