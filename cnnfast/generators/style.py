"""Style transfer by one network for many styles: the style is in the norms' factors and summands alone.

`StyleTransfer` is the network of "A Learned Representation for Artistic Style" (Dumoulin, Shlens and Kudlur, 2017),
whose styles are learnt, and of "Exploring the Structure of a Real-time, Arbitrary Neural Artistic Stylization Network"
(Ghiasi and others, 2017), where `StylePredictor`, a MobileNetV2 (Sandler and others, 2018), makes a vector of any
picture. In both a norm's vectors are linear in what says the style: the weights of the styles, or the predicted vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.layers import Sequential

__all__ = ["Moments", "Section", "StyleConfig", "StylePredictor", "StylePredictorConfig", "StyleTransfer"]

# (mean, variance) of a norm's channels over a whole map, (C,) each.
Moments = tuple[Tensor, Tensor]
_EPS = 1e-5  # of the norms


@dataclass(frozen=True)
class StyleConfig:
    """``numbers`` that say the style; ``contract``: channels ahead of the ``blocks`` residual blocks, at 1, 1/2 and 1/4
    of the size; ``expand``: behind them, at 1/2 and 1. ``predicted``: the numbers come from a `StylePredictor`; the
    norms' maps have biases then, and there is none in ``contract``."""

    numbers: int = 26
    contract: tuple[int, int, int] = (32, 32, 32)
    blocks: int = 6
    expand: tuple[int, int] = (8, 4)
    predicted: bool = False

    def __post_init__(self) -> None:
        if len(self.contract) != 3 or len(self.expand) != 2:
            raise ValueError(f"contract={self.contract} and expand={self.expand}: expected three numbers and two")
        for name in ("numbers", "contract", "blocks", "expand"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise ValueError(f"{name}={value} must be positive")


class _ConditionalNorm(nn.Module):
    """An instance norm whose factors and summands are linear in the numbers that say the style."""

    def __init__(self, channels: int, config: StyleConfig) -> None:
        super().__init__()
        self.gamma = nn.Linear(config.numbers, channels, bias=config.predicted)
        self.beta = nn.Linear(config.numbers, channels, bias=config.predicted)
        if config.predicted:  # of a network that is not trained: to begin with a plain norm
            nn.init.ones_(self.gamma.bias)
        else:
            nn.init.ones_(self.gamma.weight)
            nn.init.zeros_(self.beta.weight)

    def vectors(self, style: Tensor) -> tuple[Tensor, Tensor]:
        return self.gamma(style), self.beta(style)

    def styled(self, style: Tensor, moments: Moments | None) -> nn.Module:
        """The norm of one style, by its input's own moments or by those given, which makes it a BatchNorm."""
        vectors = [v.detach() for v in self.vectors(style)]
        norm: nn.InstanceNorm2d | nn.BatchNorm2d
        if moments is None:
            norm = nn.InstanceNorm2d(len(vectors[0]), _EPS, affine=True)
        else:
            norm = nn.BatchNorm2d(len(vectors[0]), _EPS)
            # Sums of 16 bits' range and more: in float32 whatever the network is in.
            vectors = [v.to(torch.promote_types(v.dtype, torch.float32)) for v in vectors]
            norm.running_mean, norm.running_var = (m.to(vectors[0]) for m in moments)
        norm.weight, norm.bias = (nn.Parameter(v, requires_grad=False) for v in vectors)
        return norm.eval()


class _Layer(nn.Module):
    """A convolution with reflected borders, the norm behind it where there is one, and what surrounds both."""

    def __init__(
        self,
        channels: tuple[int, int],
        kernel_size: int,
        stride: int,
        up: int,
        act: str,
        config: StyleConfig,
        norm: bool,
    ) -> None:
        super().__init__()
        before, after = channels
        pad = kernel_size // 2
        self.conv = nn.Conv2d(before, after, kernel_size, stride, pad, bias=not norm, padding_mode="reflect")
        self.norm = _ConditionalNorm(after, config) if norm else None
        self.up, self.act = up, act

    def modules_for(self, style: Tensor, moments: Moments | None, raw: bool = False) -> Iterator[nn.Module]:
        """The layer of one style; ``raw``: the convolution's result as it is."""
        if self.up > 1:
            yield nn.Upsample(scale_factor=self.up)
        yield self.conv
        if not raw:
            yield from self.behind(style, moments)

    def behind(self, style: Tensor, moments: Moments | None) -> Iterator[nn.Module]:
        """What follows the convolution."""
        if self.norm is not None:
            yield self.norm.styled(style, moments)
        if self.act:
            yield nn.ReLU() if self.act == "relu" else nn.Sigmoid()


class _Residual(nn.Module):
    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@dataclass(frozen=True)
class Section:
    """A run of layers for whoever computes a picture by tiles and needs the norms' moments over all of it.

    ``layers``: their numbers. ``up`` and ``down``: the result is ``up/down`` times as large. ``halo``: pixels of the
    input around a pixel on which its result depends. ``adds``: behind it what went into the section before this is
    added (the second layer of a residual block).
    """

    layers: tuple[int, ...]
    up: int
    down: int
    halo: int
    adds: bool = False


class StyleTransfer(nn.Module):
    """Pictures (N, 3, H, W) in [0, 1], H and W multiples of 4 from 8 on, in the style that ``style`` (numbers,) says ->
    (N, 3, H, W) in (0, 1). Where the styles are learnt, ``style`` are their weights, which should add up to 1.

    `styled` is the network of one style: made once, it serves many pictures. ``sequential`` as of `SPAN`.
    """

    def __init__(self, config: StyleConfig | None = None, *, sequential: type[nn.Sequential] = Sequential) -> None:
        super().__init__()
        self.config = c = config if config is not None else StyleConfig()
        self._sequential = sequential
        a, b, width = c.contract
        d, e = c.expand

        def layer(channels: tuple[int, int], kernel: int, stride: int, up: int, act: str, norm: bool = True) -> _Layer:
            return _Layer(channels, kernel, stride, up, act, c, norm)

        normed = not c.predicted
        self.contract = nn.ModuleList(
            [
                layer((3, a), 9, 1, 1, "relu", normed),
                layer((a, b), 3, 2, 1, "relu", normed),
                layer((b, width), 3, 2, 1, "relu", normed),
            ]
        )
        self.res = nn.ModuleList(
            nn.ModuleList([layer((width, width), 3, 1, 1, "relu"), layer((width, width), 3, 1, 1, "")])
            for _ in range(c.blocks)
        )
        self.expand = nn.ModuleList(
            [
                layer((width, d), 3, 1, 2, "relu"),
                layer((d, e), 3, 1, 2, "relu"),
                layer((e, 3), 9, 1, 1, "sigmoid"),
            ]
        )

    @property
    def layers(self) -> tuple[_Layer, ...]:
        """In the order of computation."""
        return tuple(module for module in self.modules() if isinstance(module, _Layer))

    @property
    def sections(self) -> tuple[Section, ...]:
        """The whole network: down to 1/4, the layers of the residual blocks one by one, up again."""
        n = 2 * self.config.blocks
        middle = [Section((3 + i,), 1, 1, 1, adds=i % 2 == 1) for i in range(n)]
        # 4 pixels by the first layer and 1, 2 by the next; behind the blocks 2, 1 and 4 of the picture.
        return (Section((0, 1, 2), 1, 4, 8), *middle, Section((n + 3, n + 4, n + 5), 4, 1, 2))

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures of 256x256, of the parameters' dtype and on their device."""
        return torch.rand(batch, 3, 256, 256).to(next(self.parameters()))

    def styled(self, style: Tensor) -> nn.Sequential:
        """The network of one style (numbers,), which shares its convolutions. No gradient reaches ``style`` and what
        the norms make of it: `forward` is for that."""

        def run(layers: Sequence[_Layer]) -> list[nn.Module]:
            return [module for layer in layers for module in layer.modules_for(style, None)]

        made = self._sequential
        blocks = [_Residual(made(*run(pair))) for pair in self.res]  # type: ignore[arg-type]
        return made(*run(self.contract), *blocks, *run(self.expand)).train(self.training)  # type: ignore[arg-type]

    def part(self, layers: Sequence[int], style: Tensor, moments: Sequence[Moments | None], raw: bool) -> nn.Sequential:
        """The layers with these numbers, one after the other, for one style and with the moments given. ``raw``: of the
        last one the convolution's result."""
        found = [self.layers[i] for i in layers]
        last = len(found) - 1
        pairs = enumerate(zip(found, moments, strict=True))
        made = (module for i, (layer, m) in pairs for module in layer.modules_for(style, m, raw and i == last))
        return self._sequential(*made).eval()

    def forward(self, x: Tensor, style: Tensor | None = None) -> Tensor:
        """``style`` None: as much of each number, 1 in all."""
        if style is None:
            style = x.new_full((self.config.numbers,), 1 / self.config.numbers)
        network = self.styled(style)
        if not torch.is_grad_enabled():
            return network(x)
        norms = [name for name, m in network.named_modules() if isinstance(m, nn.InstanceNorm2d)]
        vectors: dict[str, Tensor] = {}
        for name, norm in zip(norms, (n for n in (layer.norm for layer in self.layers) if n is not None), strict=True):
            vectors[f"{name}.weight"], vectors[f"{name}.bias"] = norm.vectors(style)
        return torch.func.functional_call(network, vectors, (x,))


# --- styles out of pictures -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StylePredictorConfig:
    """``numbers`` that say a style; ``width`` channels at first."""

    numbers: int = 100
    width: int = 32

    def __post_init__(self) -> None:
        if self.width < 4 or self.width % 4 or self.numbers < 1:
            raise ValueError(f"width={self.width} must be a positive multiple of 4, numbers={self.numbers} positive")


# MobileNetV2's: how many times as wide inside, channels in eighths of ``width``, how many, the first one's stride.
_BLOCKS = ((1, 4, 1, 1), (6, 6, 2, 2), (6, 8, 3, 2), (6, 16, 4, 2), (6, 24, 3, 1), (6, 40, 3, 2), (6, 80, 1, 1))
_LAST = 320


class _Inverted(nn.Module):
    def __init__(self, before: int, after: int, wider: int, stride: int, sequential: type[nn.Sequential]) -> None:
        super().__init__()
        inner = before * wider
        layers: list[nn.Module] = [nn.Conv2d(before, inner, 1), nn.ReLU6()] if wider > 1 else []
        layers += [*_strided(inner, inner, stride, inner), nn.ReLU6(), nn.Conv2d(inner, after, 1)]
        self.body = sequential(*layers)
        self.adds = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y + x if self.adds else y


def _strided(before: int, after: int, stride: int, groups: int = 1) -> list[nn.Module]:
    """A 3x3 convolution; TensorFlow's at stride 2 pad the lower and the right edge only."""
    if stride == 1:
        return [nn.Conv2d(before, after, 3, 1, 1, groups=groups)]
    return [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(before, after, 3, stride, groups=groups)]


class StylePredictor(nn.Module):
    """Pictures (N, 3, 256, 256) in [0, 1] -> the vectors that say their styles (N, numbers). ``sequential`` as of
    `SPAN`."""

    def __init__(
        self, config: StylePredictorConfig | None = None, *, sequential: type[nn.Sequential] = Sequential
    ) -> None:
        super().__init__()
        self.config = config if config is not None else StylePredictorConfig()
        width = self.config.width
        self.first = sequential(*_strided(3, width, 2), nn.ReLU6())
        blocks, before = [], width
        for wider, eighths, count, stride in _BLOCKS:
            after = eighths * width // 8
            for i in range(count):
                blocks.append(_Inverted(before, after, wider, stride if i == 0 else 1, sequential))
                before = after
        self.blocks = nn.Sequential(*blocks)
        self.last = sequential(nn.Conv2d(before, _LAST * width // 8, 1), nn.ReLU6())
        self.vector = nn.Conv2d(_LAST * width // 8, self.config.numbers, 1)

    def example_input(self, batch: int = 1) -> Tensor:
        """Noise for ``batch`` pictures, of the parameters' dtype and on their device."""
        return torch.rand(batch, 3, 256, 256).to(next(self.parameters()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.blocks(self.first(x)))
        return self.vector(y.mean((2, 3), keepdim=True)).flatten(1)
