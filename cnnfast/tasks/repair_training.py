"""One training of the network that refines filled holes: pictures, damage, optimiser, and what a step does. The job
around it: train_repair.py."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..generators import RepairConfig, RepairUNet, create_model
from ..memory_format import channels_last
from .checkpoint import check_training
from .damage import draw_mask
from .data import TRAINING, photograph
from .filling import biharmonic
from .gan import LAYERS
from .machine import has_bfloat16

__all__ = ["CHANGEABLE", "CURVES", "STEPS_PER_EPOCH", "Options", "Pictures", "Trainer"]

# What a step reports: the loss, and by how much (decibels, over the pixels of all holes) the result is nearer to the
# truth than the biharmonic filling.
CURVES = ("loss", "gain")
CHANGEABLE = ("layers", "device", "output")

STEPS_PER_EPOCH = 250
_WARM_UP = 50  # steps
_FALL = 0.4  # the part of the training in which the learning rate falls
_SMALLEST = 1e-8  # of a mean squared error: flat pictures are filled without any
_KINDS = ("scratches", "holes", "text", "mixed")
# A patch counts for the less, the worse its biharmonic filling is: by these means of absolute and squared errors.
_USUAL_ERROR, _USUAL_SQUARE = 0.05, 8e-3
_DENSE = 2  # as of `damage.draw_mask`: more to learn from a patch than people have on it


@dataclass(frozen=True)
class Options:
    """What is trained. ``size``: pixels of a patch's side; ``width``: channels at a half of the picture's size.
    ``amp``: "bf16", "none", or "auto": bf16 where the processor (or GPU) has instructions for it.

    An epoch is `STEPS_PER_EPOCH` steps; at the end of all ``epochs`` the learning rate falls from ``lr`` to nothing,
    so that a resumed run cannot change their number.
    """

    epochs: int = 24
    batch_size: int = 16
    size: int = 64
    lr: float = 2e-3
    seed: int = 0
    width: int = 48
    amp: str = "auto"
    layers: str = "cnnfast"
    device: str | None = None
    output: Path = Path("out/repair")

    def __post_init__(self) -> None:
        for name, allowed in (("amp", ("auto", "bf16", "none")), ("layers", tuple(LAYERS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"--{name} {getattr(self, name)}: expected one of {', '.join(allowed)}")
        for name, least in (("epochs", 1), ("batch_size", 1), ("size", 16), ("width", 3), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least {least}")
        if self.size % RepairUNet.multiple or self.size > _LARGEST:
            raise ValueError(f"--size {self.size}: expected a multiple of {RepairUNet.multiple}, at most {_LARGEST}")
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed}: expected less than 2**63")
        if not 0 < self.lr <= torch.finfo(torch.float32).max:
            raise ValueError(f"--lr {self.lr}: expected a positive number")

    def config(self) -> RepairConfig:
        return RepairConfig((self.width, self.width * 4 // 3, self.width * 2))


_LARGEST = 192  # as large as the smallest picture


@dataclass(frozen=True)
class Pictures:
    """uint8 pictures (H, W, 3), and how often a patch is taken from each of them (sums to 1)."""

    pixels: tuple[np.ndarray, ...]
    shares: tuple[float, ...]

    @classmethod
    def load(cls) -> Pictures:
        """`data.TRAINING`, each at its size and at half of it. WeightsError where they cannot be had."""
        from PIL import Image

        pixels, weights = [], []
        for name in TRAINING:
            whole = photograph(name)
            for factor in (1, 2):
                size = whole.width // factor, whole.height // factor
                pixels.append(np.array(whole.resize(size, Image.Resampling.LANCZOS) if factor > 1 else whole))
                weights.append(_SHARES.get(name, 1.0) * math.sqrt(size[0] * size[1]))
        return cls(tuple(pixels), tuple(w / sum(weights) for w in weights))

    def fingerprint(self) -> str:
        """Tells sets apart: the SHA-256 of shapes, pixels and shares."""
        found = hashlib.sha256(repr(self.shares).encode())
        for a in self.pixels:
            found.update(repr(a.shape).encode() + a.tobytes())
        return found.hexdigest()


# Of the photographs that are no scenes: stars, a retina, and textures, of which a hole's contents cannot be guessed.
_SHARES = {"hubble_deep_field": 0.3, "retina": 0.3, "brick": 0.25, "grass": 0.25, "gravel": 0.25}


class Trainer:
    """The state of a training and its step, in the manner of `gan.Trainer`: the same options and pictures give the same
    bits on a CPU with the same number of threads, however often the training was stopped and resumed; global random
    state is neither used nor changed.
    """

    def __init__(self, options: Options, pictures: Pictures, device: torch.device) -> None:
        self.options, self.pictures, self.device = options, pictures, device
        self.config = options.config()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = create_model("repair", sequential=LAYERS[options.layers], **asdict(self.config))
        assert isinstance(model, RepairUNet)
        self.network = channels_last(model.to(device))
        self.optimiser = torch.optim.AdamW(self.network.parameters(), options.lr, betas=(0.9, 0.99), weight_decay=1e-3)
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
        for group in self.optimiser.param_groups:
            group["lr"] = self.options.lr * self._schedule()
        truth, x = (t.to(self.device) for t in self.batch(self.steps))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low_precision):
            made = self.network(x)
        loss, before, after = losses(made.float(), x[:, :3], truth, x[:, 3:])
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimiser.step()
        self.steps += 1
        self.curves.append(torch.stack([loss.detach(), 10 * torch.log10(before / after.detach())]))
        return self.curves[-1]

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Of step ``number``: patches (N, 3, size, size) in [0, 1], and the network's input (N, 4, size, size)."""
        rng = np.random.default_rng([self.options.seed, number])
        made = [_sample(rng, self.pictures, self.options.size) for _ in range(self.options.batch_size)]
        truth = torch.from_numpy(np.stack([patch for patch, _, _ in made])).permute(0, 3, 1, 2)
        filled = torch.from_numpy(np.stack([filled for _, _, filled in made])).permute(0, 3, 1, 2)
        mask = torch.from_numpy(np.stack([mask for _, mask, _ in made]))[:, None].float()
        return truth.contiguous(), torch.cat([filled, mask], 1)

    def repaired(self, x: Tensor) -> Tensor:
        """The network's result (N, 3, H, W) in [0, 1] for an input of `batch`, float32 on the CPU."""
        with torch.inference_mode():
            return self.network(x.to(self.device)).float().clamp(0, 1).cpu()

    def history(self) -> Tensor:
        """The curves so far, on the CPU: (steps, len(CURVES))."""
        if len(self.curves) > 1:
            self.curves = list(torch.stack(self.curves).cpu())
        return torch.stack(self.curves).cpu() if self.curves else torch.zeros(0, len(CURVES))

    def finite(self) -> bool:
        """Whether every parameter is finite."""
        return all(bool(torch.isfinite(t).all()) for t in self.network.state_dict().values())

    def state(self) -> dict[str, Any]:
        """Everything that goes on from here, for `checkpoint.save_checkpoint`."""
        return {
            "options": {k: v for k, v in asdict(self.options).items() if k not in CHANGEABLE},
            "layers": self.options.layers,
            "pictures": self.pictures.fingerprint(),
            "steps": self.steps,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "curves": self.history(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. ValueError where its pictures were others, CheckpointError where a part of it is missing
        or of other sizes than this training's."""
        if state.get("pictures") != self.pictures.fingerprint():
            raise ValueError("these are not the photographs of the checkpoint")
        optimisers = {"network": (self.optimiser, state.get("optimiser"))}
        check_training(state, {"network": self.network}, optimisers, len(CURVES))
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps = state["steps"]
        self.curves = list(state["curves"])

    def _schedule(self) -> float:
        """The learning rate's part at this step: a short rise, then 1, and at the end a line down to nothing."""
        left = 1 - self.steps / (self.options.epochs * STEPS_PER_EPOCH)
        return min((self.steps + 1) / _WARM_UP, 1.0, left / _FALL)


def losses(made: Tensor, filled: Tensor, truth: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; the mean squared errors of ``filled`` and of ``made`` inside the holes, never 0. All (N, C, H, W).

    Absolute and squared errors, each patch's over what its filling has of them and a constant: a texture that nobody
    can guess does not outweigh the rest, and neither does a flat wall.
    """
    inside = mask.sum((1, 2, 3)) * made.shape[1]

    def mean(error: Tensor) -> Tensor:
        return (error * mask).sum((1, 2, 3)) / inside

    error, before = made - truth, filled - truth
    absolute = mean(error.abs()) / (mean(before.abs()) + _USUAL_ERROR)
    squared = mean(error.square()) / (mean(before.square()) + _USUAL_SQUARE)
    total = inside.sum()
    pooled = [(e.square() * mask).sum() / total + _SMALLEST for e in (before, error)]
    return (absolute + squared).mean() / 2, pooled[0], pooled[1]


def _sample(rng: np.random.Generator, pictures: Pictures, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A patch (size, size, 3) in [0, 1], its mask (size, size) and the patch filled; float32 and bool."""
    whole = pictures.pixels[rng.choice(len(pictures.pixels), p=pictures.shares)]
    top, left = (int(rng.integers(0, n - size + 1)) for n in whole.shape[:2])
    patch = _altered(rng, whole[top : top + size, left : left + size] / 255.0)
    mask = draw_mask(rng, (size, size), _KINDS[rng.integers(len(_KINDS))], _DENSE)
    return patch.astype(np.float32), mask, biharmonic(patch, mask).astype(np.float32)


def _altered(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    """Mirrored and turned; with other colours, negative, grey, or of less contrast."""
    patch = patch[..., rng.permutation(3)]
    if rng.random() < 0.5:
        patch = 1 - patch
    if rng.random() < 0.2:
        patch = np.repeat(patch.mean(2, keepdims=True), 3, 2)
    if rng.random() < 0.5:
        patch = (patch * rng.uniform(0.6, 1) + rng.uniform(0, 0.2, 3)).clip(0, 1)
    patch = patch[:: _sign(rng), :: _sign(rng)]
    return np.ascontiguousarray(patch.transpose(1, 0, 2) if rng.random() < 0.5 else patch)


def _sign(rng: np.random.Generator) -> int:
    return -1 if rng.random() < 0.5 else 1
