"""Tuning on a CPU: time the methods of each step at one size, PyTorch's own operators among them, and keep the choice.

Nothing is ever timed by a call of a model: methods come from the rules, or from what `cnnfast.tune` has kept (`tuned`).
Each is held against float64 by the tolerance rule before it is timed, on noise, and another than the rule's is kept
only where it is clearly faster: this processor may have other work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..dispatch import backend
from ..memory_format import convert, to_format
from ..messages import LOGGER, one_line
from ..reference import run_reference
from ..step import Operands, Step
from ..timing import Timing, measure
from ..tolerance import expected, verdict
from . import inference, tuned
from .isa import process
from .onednn import why_missing
from .tuned import MODULES, Seen, Size

__all__ = ["GAIN", "Result", "Timer", "clearly", "timer", "tune_steps"]

# Times of calls, by their names, taken in turn: as many of each.
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, Timing]]

GAIN = 1.03  # by which three of four turns must beat the rule's method: less is noise


def timer(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    """By the wall clock."""
    return measure(calls, repeats=15, block_seconds=0.005)


@dataclass(frozen=True)
class Result:
    """What tuning a step found. ``seconds``: of each method that was timed; ``refused``: reasons of others; ``rule``:
    what the rules choose; ``best``: what is in use now; ``kept``: whether it is on disk."""

    step: Step
    size: Size
    rule: str
    best: str
    seconds: Mapping[str, float]
    refused: Mapping[str, str]
    kept: bool

    @property
    def gain(self) -> float:
        """The time by the rules over that of what is in use; 1 where they are the same, or the rule's was refused."""
        if self.rule not in self.seconds:
            return 1.0
        return self.seconds[self.rule] / self.seconds[self.best]

    @property
    def title(self) -> str:
        size = "x".join(map(str, self.size.shape))
        return f"{self.step.describe()}, {str(self.size.dtype).removeprefix('torch.')}, input {size}"

    def __str__(self) -> str:
        tried = f"{len(self.seconds)} methods timed" + (f", {len(self.refused)} refused" if self.refused else "")
        found = f"{1e6 * self.seconds[self.best]:.1f} us by {self.best}, {self.gain:.2f}x the rule's"
        return f"{self.title}: {found} ({tried})" + ("" if self.kept else "; NOT KEPT on disk")


def tune_steps(
    seen: Iterable[Seen],
    timer: Timer = timer,
    *,
    seconds: float | None = None,
    tell: Callable[[str], object] = LOGGER.info,
) -> list[Result]:
    """Tune each step and keep the choice; see `cnnfast.tune`. ``timer`` gets the calls of one step, by method, all of
    them proven."""
    end = None if seconds is None else time.monotonic() + seconds
    results, steps = [], list(seen)
    for i, one in enumerate(steps):
        if end is not None and time.monotonic() >= end:
            tell(f"out of time: {len(steps) - i} of {len(steps)} steps keep the methods they have")
            break
        with torch.no_grad(), backend("auto"):
            result = _tune(one, timer)
        if result is not None:
            tell(str(result))
            results.append(result)
    return results


def clearly(rule: Timing, other: Timing) -> bool:
    """Whether ``other`` beats ``rule`` by `GAIN` in three of four turns (the lower quartile of their ratios)."""
    ratios = sorted(a / b for a, b in zip(rule.seconds, other.seconds, strict=True))
    return ratios[max(0, math.ceil(len(ratios) / 4) - 1)] > GAIN


def _tune(seen: Seen, timer: Timer) -> Result | None:
    """None where the step has no method but PyTorch's operators."""
    step, size = seen.step, seen.size
    rule, names = _by_rule(seen), inference.methods_of(step, size.shape, size.dtype, process())
    if rule is None or not names:
        return None
    o = _noise(seen)
    calls: dict[str, Callable[[], object]] = {MODULES: _modules(step, o, size)}
    refused: dict[str, str] = {}
    for name in names:
        call = _by(name, step, o, size)
        reason = _refusal(step, o, call)
        if reason is None:
            calls[name] = call
        else:
            refused[name] = reason
    if rule in refused:
        rule = MODULES
    times = timer(calls)
    faster = [name for name in calls if name != rule and clearly(times[rule], times[name])]
    best = min(faster, key=lambda name: times[name].median, default=rule)
    medians = {name: t.median for name, t in times.items()}
    kept = tuned.keep(step, size, best, {"seconds": medians, "rule": rule, "refused": refused})
    return Result(step, size, rule, best, medians, refused, kept)


def _by_rule(seen: Seen) -> str | None:
    """The method that the rules choose; None where the step cannot run here at all but by PyTorch's operators."""
    step, (shape, dtype, before, after) = seen.step, seen.size
    way = inference._way(step, shape, dtype, process())
    if why_missing() is not None or isinstance(way, str):
        return None
    norm, nchw = not step.residual and step.norm is not None, not (before or after)
    last = seen.weight_channels_last
    plain = inference.why_slower_plain(step, shape, dtype, norm=norm, slopes=seen.slopes, nchw=nchw, weight_last=last)
    return MODULES if way.slower or plain else type(way.method).__name__


def _by(name: str, step: Step, o: Operands, size: Size) -> Callable[[], torch.Tensor | None]:
    """The step by a method."""
    way = inference._way(step, size.shape, size.dtype, process(), name)
    assert not isinstance(way, str)
    ready = inference.Ready(step, size.shape, size.dtype, size.after, way)
    return lambda: ready.run(o)


def _modules(step: Step, o: Operands, size: Size) -> Callable[[], object]:
    """What modules do, and the format that follows."""

    def call() -> torch.Tensor:
        return convert(run_reference(step, o), size.dtype, size.after)

    return call


def _refusal(step: Step, o: Operands, call: Callable[[], torch.Tensor | None]) -> str | None:
    """Why a method cannot be used: its result on the first and the last image, against float64."""
    try:
        call()  # a weight is packed when it is met again
        y = call()
    except RuntimeError as error:  # of oneDNN
        return one_line(error)
    if y is None:
        return "its weight cannot be packed"
    few = sorted({0, o.x.shape[0] - 1})
    each = {"x": o.x[few], "residual": None if o.residual is None else o.residual[few]}
    return verdict(y[few], *expected(step, o._replace(**each), False))  # type: ignore[arg-type]


# --- noise ------------------------------------------------------------------------------------------------------------


def _noise(seen: Seen) -> Operands:
    """Normal noise, the same in every run; weights such that results have about unit variance. The weight is a
    Parameter, as only those are packed."""
    step, (shape, dtype, before, after) = seen.step, seen.size
    s, norm = step.spec, step.norm
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")

    taps = max(1, math.prod(s.kernel_size) // math.prod(s.stride if s.transposed else (1,)))
    weight = draw(*step.weight_shape) * (s.in_channels // s.groups * taps) ** -0.5
    vectors: dict[str, torch.Tensor] = {}
    if norm is None:
        vectors["bias"] = draw(s.out_channels)
    else:
        vectors |= {"scale": draw(s.out_channels), "shift": draw(s.out_channels)}
        if norm.kind == "running":
            vectors |= {"mean": draw(s.out_channels), "var": draw(s.out_channels).abs() + 0.1}
    if step.residual:
        out = shape[0], s.out_channels, *step.output_size(shape[2:])
        vectors["residual"] = to_format(draw(*out), after)
    if step.activation.name == "prelu":
        vectors["slope"] = draw(seen.slopes or 1).abs()
    weight = to_format(weight.to(dtype), seen.weight_channels_last)
    parameter = nn.Parameter(weight, requires_grad=False)
    o = Operands(to_format(draw(*shape).to(dtype), before), parameter)
    return o._replace(**{name: v.to(dtype) for name, v in vectors.items()})  # type: ignore[arg-type]
