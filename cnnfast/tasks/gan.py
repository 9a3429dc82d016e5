"""One training: networks, optimisers, the moving average, and what a step does. The job around it: train.py."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..generators import DCGANConfig, create_model
from ..memory_format import channels_last
from ..nn.layers import Sequential
from .checkpoint import check_training
from .data import generator_of, sample_order
from .discriminator import DCGANDiscriminator
from .losses import LOSSES, critic_terms
from .share import Share

__all__ = ["CURVES", "LAYERS", "Options", "Trainer", "fingerprint", "least_memory"]

LAYERS = {"cnnfast": Sequential, "torch": nn.Sequential}

# What a step reports, float32: the critic's loss without its penalty, the generator's, the weighted penalty, and the
# mean scores of real and generated images.
CURVES = ("critic", "generator", "penalty", "real", "generated")

# The generator's moving average (StyleGAN2-ADA's): half-life in images, and its part of the images seen at the start.
_HALF_LIFE = 10_000
_RAMP_UP = 0.05


@dataclass(frozen=True)
class Options:
    """What is trained. ``width``: channels ahead of the image; ``amp`` None or "bf16".

    ``lr`` of Adam and ``instance_noise`` None: the loss's own. The latter is the standard deviation of the noise that
    the discriminator sees on every image, in units of pixels in [-1, 1] (Sonderby et al., 2017): without it, it tells
    smooth images from generated ones at once, and the generator learns nothing. A resumed run may change `CHANGEABLE`;
    the other options are the training.
    """

    data: str = "digits"
    loss: str = "bce"
    epochs: int = 30
    batch_size: int = 64
    lr: float | None = None
    instance_noise: float | None = None
    seed: int = 0
    width: int = 64
    nz: int = 100
    image_size: int = 64
    amp: str | None = None
    layers: str = "cnnfast"
    device: str | None = None
    output: Path = Path("out/gan")

    def __post_init__(self) -> None:
        for name, allowed in (("loss", tuple(LOSSES)), ("amp", (None, "bf16")), ("layers", tuple(LAYERS))):
            if getattr(self, name) not in allowed:
                expected = ", ".join(str(a) for a in allowed if a is not None)
                raise ValueError(f"--{name} {getattr(self, name)}: expected one of {expected}")
        for name, least in (("epochs", 1), ("batch_size", 1), ("width", 1), ("nz", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least {least}")
        if self.seed >= 2**63:
            raise ValueError(f"--seed {self.seed}: expected less than 2**63")
        largest = torch.finfo(torch.float32).max
        if self.lr is not None and not 0 < self.lr <= largest:
            raise ValueError(f"--lr {self.lr}: expected a positive number")
        if self.instance_noise is not None and not 0 <= self.instance_noise <= largest:
            raise ValueError(f"--instance-noise {self.instance_noise}: expected at least 0")
        DCGANConfig(nz=self.nz, ngf=self.width, image_size=self.image_size)  # its own errors


CHANGEABLE = ("epochs", "layers", "device", "output")


class Trainer:
    """The state of a training and its step.

    ``images`` uint8 (M, C, image_size, image_size). The same options and images give the same bits on a CPU with the
    same number of threads, however often the training was stopped and resumed. Global random state is neither used nor
    changed: a step's random numbers depend on the seed and its number only. With a ``share`` this is one of several
    processes that train the same together, all of them with the same options and images: to rounding, it is the
    training of one process.
    """

    def __init__(self, options: Options, images: Tensor, device: torch.device, share: Share = Share()) -> None:  # noqa: B008
        self.options, self.images, self.device, self.share = options, images, device, share
        self.loss = LOSSES[options.loss]
        self.config = DCGANConfig(options.nz, options.width, images.shape[1], options.image_size)
        container = LAYERS[options.layers]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            generator = create_model("dcgan", sequential=container, **asdict(self.config))
            discriminator = DCGANDiscriminator(self.config, norm=self.loss.norm, sequential=container)
        self.generator = channels_last(share.synchronised(generator.to(device)))
        self.discriminator = channels_last(share.synchronised(discriminator.to(device)))
        self._averaged = AveragedModel(self.generator, multi_avg_fn=self._follow, use_buffers=True)
        self._averaged.update_parameters(self.generator)  # the first is copied: the start is a part of the average
        self.average = self._averaged.module.eval().requires_grad_(False)
        lr = self.loss.lr if options.lr is None else options.lr
        self.optimisers = {
            name: torch.optim.Adam(module.parameters(), lr, self.loss.betas)
            for name, module in (("generator", self.generator), ("discriminator", self.discriminator))
        }
        self.noise = self.loss.instance_noise if options.instance_noise is None else options.instance_noise
        self.steps = 0
        self.curves: list[Tensor] = []  # of each step, on the device: (len(CURVES),)

    @property
    def images_per_step(self) -> int:
        """Real images that one step of the generator (and the critic's steps that belong to it) sees."""
        return self.options.batch_size * self.loss.critic_steps

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every image is seen at least once."""
        return -(-len(self.images) // self.images_per_step)

    def step(self) -> Tensor:
        """The critic's steps and one of the generator; the values of `CURVES`, on the device."""
        batch, seed = self.options.batch_size, self.options.seed
        draw = generator_of(seed, "noise", self.steps)  # on the CPU: the same images on any device
        blur = generator_of(seed, "instance noise", self.steps, self.device)
        mine = self.share.part(batch)  # random numbers are drawn for all images

        def score(images: Tensor) -> Tensor:
            if self.noise:
                noise = torch.empty((batch, *images.shape[1:]), device=self.device, memory_format=_format(images))
                images = images + self.noise * noise.normal_(generator=blur)[mine]
            with self._autocast():
                return self.discriminator(images).float()

        first = self.steps * self.images_per_step
        order = sample_order(seed, first, self.images_per_step, len(self.images))
        for i, indices in enumerate(order.split(batch)):
            # The generator's own step takes the images of the critic's last one, as pytorch/examples does.
            with torch.set_grad_enabled(i == self.loss.critic_steps - 1):
                fake = self._generate(batch, draw, mine)
            real = self.images[indices[mine]].to(self.device).float() / 127.5 - 1
            mix = torch.rand(batch, generator=draw)[mine].to(self.device)
            terms = critic_terms(self.loss, score, real, fake, mix)
            self._descend("discriminator", terms.total)
        self.discriminator.requires_grad_(False)  # its weights' gradients are not wanted
        generator_loss = self.loss.generator(score(fake))
        self._descend("generator", generator_loss)
        self.discriminator.requires_grad_(True)
        self.steps += 1
        self._averaged.update_parameters(self.generator)
        values = torch.stack([terms.loss, generator_loss, terms.penalty, terms.real, terms.fake]).detach()
        values *= self.share.weight(batch)
        self.share.add_up([values])
        self.curves.append(values)
        return values

    def sample(self, z: Tensor) -> Tensor:
        """Images of the moving average for noise (N, nz, 1, 1): (N, C, H, W) in [-1, 1], float32 on the CPU."""
        with torch.inference_mode():
            return self.average(z.to(self.device)).float().cpu()

    def fixed_noise(self, count: int) -> Tensor:
        """The noise of the sample grids: the same throughout a training."""
        draw = generator_of(self.options.seed, "samples", 0)
        return torch.randn(count, self.options.nz, 1, 1, generator=draw)

    def history(self) -> Tensor:
        """The curves so far, on the CPU: (steps, len(CURVES))."""
        if len(self.curves) > 1:  # a transfer of one tensor, and no list of thousands
            self.curves = list(torch.stack(self.curves).cpu())
        return torch.stack(self.curves).cpu() if self.curves else torch.zeros(0, len(CURVES))

    def finite(self) -> bool:
        """Whether every parameter and running statistic is finite."""
        tensors = [t for m in (self.generator, self.discriminator) for t in m.state_dict().values()]
        return all(bool(torch.isfinite(t).all()) for t in tensors)

    def state(self) -> dict[str, Any]:
        """Everything that goes on from here, for `checkpoint.save_checkpoint`."""
        fixed = {k: v for k, v in asdict(self.options).items() if k not in CHANGEABLE}
        return {
            "options": fixed,
            "epochs": self.options.epochs,
            "layers": self.options.layers,
            "config": asdict(self.config),
            "images": fingerprint(self.images),
            "steps": self.steps,
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "average": self.average.state_dict(),
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "curves": self.history(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. ValueError where its images were others, CheckpointError where a part of it is missing or
        of other sizes than this training's."""
        if state.get("images") != fingerprint(self.images):
            raise ValueError(f"--data {self.options.data}: these are not the images of the checkpoint")
        modules = {"generator": self.generator, "discriminator": self.discriminator, "average": self.average}
        saved = state.get("optimisers")
        held: Mapping[str, Any] = saved if isinstance(saved, Mapping) else {}
        optimisers = {name: (optimiser, held.get(name)) for name, optimiser in self.optimisers.items()}
        check_training(state, modules, optimisers, len(CURVES))
        self.generator.load_state_dict(state["generator"])
        self.discriminator.load_state_dict(state["discriminator"])
        self.average.load_state_dict(state["average"])
        for name, optimiser in self.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        self.steps = state["steps"]
        self.curves = list(state["curves"])

    def _generate(self, count: int, draw: torch.Generator, part: slice) -> Tensor:
        """Of ``count`` images these."""
        z = torch.randn(count, self.options.nz, 1, 1, generator=draw)[part].to(self.device)
        with self._autocast():
            return self.generator(z).float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.amp == "bf16")

    def _descend(self, name: str, loss: Tensor) -> None:
        optimiser = self.optimisers[name]
        optimiser.zero_grad(set_to_none=True)
        (loss * self.share.weight(self.options.batch_size)).backward()
        self.share.add_up([p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None])
        optimiser.step()

    def _follow(self, average: Sequence[Tensor], source: Sequence[Tensor], count: Tensor | int) -> None:
        """The moving average of parameters and running statistics, one step on; counts of batches are copied."""
        seen = self.steps * self.images_per_step
        weight = 1 - 0.5 ** (self.images_per_step / min(_HALF_LIFE, _RAMP_UP * seen))
        for target, value in zip(average, source, strict=True):
            if target.is_floating_point():
                target.lerp_(value, weight)
            else:
                target.copy_(value)


def _format(images: Tensor) -> torch.memory_format:
    """That of images which are dense: random numbers are drawn in the order of memory."""
    last = images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def least_memory(config: DCGANConfig, batch: int) -> int:
    """Bytes that a training cannot do without: of float32 weights, gradients, Adam's moments and the average, and of
    the maps of a batch in both networks."""
    channels = [*config.widths, config.nc]
    between = sum(a * b for a, b in zip(channels, channels[1:], strict=False))
    generator, discriminator = 16 * (config.nz * channels[0] + between), 16 * (between + channels[0])
    maps = sum(width * (4 << i) ** 2 for i, width in enumerate(channels))
    return 4 * (5 * generator + 4 * discriminator + 2 * batch * maps)


def fingerprint(images: Tensor) -> str:
    """Tells image sets apart: the SHA-256 of shape and pixels."""
    return hashlib.sha256(str(tuple(images.shape)).encode() + images.numpy().tobytes()).hexdigest()
