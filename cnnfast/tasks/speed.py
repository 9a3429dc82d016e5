"""How fast the tasks' networks are, against the same networks in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.layers import Sequential
from ..timing import Timing, measure
from . import stages
from .cutting import Cutter
from .drawing import Drawer
from .enhancement import Enhancer
from .repairing import Repairer
from .sampling import Sampler
from .styling import Styler

__all__ = ["HEADERS", "WORKLOADS", "Speed", "Workload", "said", "speed"]


@dataclass(frozen=True)
class Workload:
    """A network as its task runs it: ``build(device=..., sequential=...)``; without ``sequential``, in the containers
    that the task chooses. ``side``: pixels of the picture that it is given, of which ``example_input`` says the rest;
    None: that itself. ``layout``: of what the task gives it, by device."""

    task: str
    what: str
    build: Callable[..., nn.Module]
    batch: int = 1
    side: int | None = None
    layout: Callable[[torch.device], torch.memory_format] = lambda device: torch.channels_last

    def inputs(self, network: nn.Module) -> tuple[Tensor, ...]:
        owner: Any = network
        made = owner.example_input(self.batch)
        made = made if isinstance(made, tuple) else (made,)
        if self.side is None:
            return made
        side = self.side + 2 * getattr(network, "margin", 0)
        return (nn.functional.interpolate(made[0], (side, side)),)


class _Styled(nn.Module):
    """`Styler`'s network of one style."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        styler = Styler("mosaic", **options)
        self.network = styler.network.styled(styler.numbers)
        self.example_input = styler.network.example_input
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def _enhancer(scale: int | None = None, denoise: int | None = None) -> Callable[..., nn.Module]:
    def build(**options: Any) -> nn.Module:
        network = Enhancer(scale, denoise=denoise, **options).jobs[0].network
        assert isinstance(network, nn.Module)
        return network

    return build


WORKLOADS = (
    Workload("generate", "16 faces of 64x64", lambda **o: Sampler("faces", **o).network, 16),
    Workload("generate", "16 eyes of 128x128", lambda **o: Sampler("eyes", **o).network, 16),
    Workload("draw", "an emoji of 64x64", lambda **o: Drawer(**o).network),
    Workload("enhance", "--scale 2, 128x128", _enhancer(2), side=128),
    Workload("enhance", "--scale 4, 128x128", _enhancer(4), side=128),
    Workload("enhance", "--denoise 1, 128x128", _enhancer(denoise=1), side=128),
    Workload("repair", "128x128", lambda **o: Repairer(**o).network, side=128),
    Workload("compose", "a learnt style, 256x256", _Styled, layout=stages.layout),
    Workload("compose", "people, 256x256", lambda **o: Cutter(**o).network),
)


@dataclass(frozen=True)
class Speed:
    """Times of one workload's ``batch`` images, by candidate: "cnnfast", "eager" and "eager channels_last". ``same``:
    on this device the task runs the network in PyTorch's own containers: "cnnfast" is "eager channels_last" then."""

    task: str
    what: str
    batch: int
    times: Mapping[str, Timing]
    same: bool = False

    @property
    def best(self) -> str:
        """The faster of plain PyTorch's two."""
        return min((name for name in self.times if name != "cnnfast"), key=lambda name: self.times[name].median)

    @property
    def level(self) -> bool:
        """Whether it is the same network as the better of plain PyTorch's two."""
        return self.same and self.best == "eager channels_last"

    @property
    def ratio(self) -> Timing:
        """How many times faster than that, repeat by repeat: its median and quartiles."""
        pairs = zip(self.times[self.best].seconds, self.times["cnnfast"].seconds, strict=True)
        return Timing(tuple(plain / ours for plain, ours in pairs), 1)

    @property
    def held(self) -> bool | None:
        """Whether it is not slower, as the same network is not; None where the spread does not let one say: the median
        of the ratio is below 1, its upper quartile is not."""
        if self.level:
            return True
        return True if self.ratio.median >= 1 else False if self.ratio.high < 1 else None

    def rates(self, name: str) -> tuple[float, float, float]:
        """Images per second: the median, the quartiles."""
        timing = self.times[name]
        return self.batch / timing.median, self.batch / timing.high, self.batch / timing.low

    def cells(self) -> tuple[str, ...]:
        """As text, under `HEADERS`."""
        plain, ours = ("{:.4g} [{:.4g}, {:.4g}]".format(*self.rates(name)) for name in (self.best, "cnnfast"))
        ratio = f"{self.ratio.median:.2f}x [{self.ratio.low:.2f}, {self.ratio.high:.2f}]"
        held = "the same network" if self.level else said(self.held) or "unclear"
        return (self.task, self.what, self.best, plain, ours, ratio, held)


HEADERS = ("task", "network's work", "best of plain PyTorch", "images/s", "cnnfast, images/s", "ratio", "held")


def speed(workload: Workload, device: str | None = None, repeats: int = 20) -> Speed:
    """Time a workload, interleaved. WeightsError where the weights cannot be had."""
    options: dict[str, Any] = {"device": device}
    plain = {**options, "sequential": nn.Sequential}
    networks = {
        "eager": workload.build(**plain).to(memory_format=torch.contiguous_format),  # type: ignore[call-overload]
        "eager channels_last": workload.build(**plain).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        "cnnfast": workload.build(**options),
    }
    torch_device = next(networks["cnnfast"].parameters()).device
    layouts = {
        "eager": torch.contiguous_format,
        "eager channels_last": torch.channels_last,
        "cnnfast": workload.layout(torch_device),
    }
    calls = {}
    with torch.inference_mode():
        for name, network in networks.items():
            layout = layouts[name]
            given = tuple(x.contiguous(memory_format=layout) if x.dim() == 4 else x for x in workload.inputs(network))
            calls[name] = lambda network=network, given=given: network(*given)  # noqa: B008
        times = measure(calls, repeats=repeats, device=torch_device)
    same = layouts["cnnfast"] == torch.channels_last and not any(
        isinstance(module, Sequential) for module in networks["cnnfast"].modules()
    )
    return Speed(workload.task, workload.what, workload.batch, times, same)


def said(held: bool | None) -> str:
    return "" if held is None else "yes" if held else "NO"
