"""Tuning: time every valid plan of the fused steps of a forward on this GPU, and keep the fastest for later processes.

Nothing is ever timed by a call of a model: plans come from the heuristic, or from what `tune` (``python -m cnnfast
tune``) has kept. Every plan is proven by `guard` before it is timed, on noise; plans are timed in turn.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..messages import LOGGER
from ..spec import Precision
from ..step import Operands, Step
from ..timing import Timing, measure
from . import conv_hopper_plan, guard, trial, tuned
from .conv_choice import candidates, choose_plan
from .conv_plan import Plan
from .devices import Device, cuda_index, precision_of, target_device, tf32_convolutions
from .observers import observed
from .warmup import warmup
from .why_not import triton_why_not

if triton_why_not() is None:
    from . import conv

__all__ = ["Result", "Task", "Timer", "cuda_timer", "record", "tried", "tune_steps"]


# Times of calls, by their names, taken in turn.
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, Timing]]

CANDIDATES = 24  # plans of a step that are timed, the best by the model first
UNCHECKED = "tuning needs the check of kernels: unset CNNFAST_GUARD"
GAIN = 0.02  # by which a plan must beat the heuristic's: less is noise


def cuda_timer(calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    """Calls back to back on the current stream, timed by CUDA events."""
    return measure(calls, repeats=9, block_seconds=0.005, device="cuda")


class _Like(NamedTuple):
    """A dense tensor to be made."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: torch.Tensor) -> _Like:
        like = torch.empty_like(t, device="meta")
        return cls(tuple(like.shape), tuple(like.stride()), like.dtype)

    def make(self, device: torch.device) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Task:
    """A fused step at one size, and what its operands are like: nothing of a model is held."""

    step: Step
    likes: tuple[tuple[str, _Like], ...]
    channels_last: bool
    tf32: bool
    device: torch.device

    @classmethod
    def of(cls, step: Step, o: Operands, channels_last: bool) -> Task:
        likes = tuple((name, _Like.of(t)) for name, t in o._asdict().items() if isinstance(t, torch.Tensor))
        return cls(step, likes, channels_last, precision_of(o.x.dtype).tf32, o.x.device)

    def operands(self) -> Operands:
        """Noise."""
        made: dict[str, Any] = {name: like.make(self.device) for name, like in self.likes}
        o = Operands(**made)
        trial.fill_with_noise(self.step, o)
        return o

    @property
    def title(self) -> str:
        x = dict(self.likes)["x"]
        size = "x".join(map(str, x.shape))
        return f"{self.step.describe()}, {str(x.dtype).removeprefix('torch.')}, input {size}"


@dataclass(frozen=True)
class Result:
    """What tuning a task found. ``seconds``: of each plan that was timed, by its name; ``refused``: reasons of others.

    ``best`` is what is in use now, the heuristic's where no other was faster by `GAIN`, None where no plan works;
    ``kept`` whether it is on disk.
    """

    task: Task
    heuristic: Plan
    best: Plan | None
    seconds: Mapping[str, float]
    refused: Mapping[str, str]
    kept: bool

    @property
    def gain(self) -> float:
        """The heuristic's time over the best one's; 1 where they are the same, or where the heuristic's was refused."""
        if self.best is None or self.heuristic.name not in self.seconds:
            return 1.0
        return self.seconds[self.heuristic.name] / self.seconds[self.best.name]

    def __str__(self) -> str:
        if self.best is None:
            return f"{self.task.title}: no plan works; PyTorch's operators run"
        tried = f"{len(self.seconds)} plans timed" + (f", {len(self.refused)} refused" if self.refused else "")
        found = f"{1e6 * self.seconds[self.best.name]:.1f} us with {self.best.name}, {self.gain:.2f}x the heuristic's"
        return f"{self.task.title}: {found} ({tried})" + ("" if self.kept else "; NOT KEPT on disk")


def record(function: Callable[..., Any], *inputs: Any, batch_sizes: Iterable[int] = ()) -> list[Task]:
    """The fused steps that a forward launches on a GPU, each size once."""
    tasks: dict[Task, None] = {}

    def see(step: Step, o: Operands, channels_last: bool) -> None:
        if cuda_index(o.x) is not None:
            tasks[Task.of(step, o, channels_last)] = None

    with observed(step=see):
        warmup(function, *inputs, batch_sizes=batch_sizes)
    return list(tasks)


def tune_steps(
    tasks: Sequence[Task],
    timer: Timer = cuda_timer,
    *,
    seconds: float | None = None,
    limit: int = CANDIDATES,
    tell: Callable[[str], object] = LOGGER.info,
) -> list[Result]:
    """Tune each task and keep the best plans; see `cnnfast.tune`. ``timer`` gets the calls of one step, by plan, all of
    them compiled and proven. ``limit``: the most plans of a step that are tried."""
    if not guard.enabled():
        raise RuntimeError(UNCHECKED)
    end = None if seconds is None else time.monotonic() + seconds
    results = []
    for i, task in enumerate(tasks):
        if end is not None and time.monotonic() >= end:
            tell(f"out of time: {len(tasks) - i} of {len(tasks)} steps keep the plans they have")
            break
        result = _tune(task, timer, limit, end)
        tell(str(result))
        results.append(result)
    return results


def tried(
    step: Step,
    batch: int,
    input_size: tuple[int, ...],
    precision: Precision,
    device: Device,
    channels_last: bool,
    hopper: bool = False,
) -> list[Plan]:
    """The plans of ``step`` that tuning tries on x (batch, C_in, *input_size), the size with `Step.pad`: the
    heuristic's, then the others by the model, kinds in turn. ``hopper``: those of `kernels/conv_hopper.py`, too."""
    asked = (batch, input_size, precision, device, channels_last)
    heuristic = conv_hopper_plan.chosen(step, *asked) or choose_plan(step.spec, *asked)
    boxes = conv_hopper_plan.candidates(step, *asked) if hopper else []
    others = [*boxes, *candidates(step.spec, *asked)]
    return [heuristic, *_in_turn([p for p in others if p != heuristic])]


def _in_turn(plans: list[Plan]) -> list[Plan]:
    """The best of each kind (`Plan.three`), then the second of each, and so on: how the kinds compare, no model knows
    yet."""
    of_each = ([p for p in plans if p.three is three] for three in (True, False))
    return [p for turn in itertools.zip_longest(*of_each) for p in turn if p is not None]


def _refusal(task: Task, o: Operands, plan: Plan) -> str | None:
    """Why a plan cannot be used: launches it, which compiles and proves it."""
    try:
        conv.run(task.step, o, task.channels_last, plan)
    except (guard.Refused, torch.OutOfMemoryError) as error:
        return str(error)
    proof = conv.lookup(task.step, o, task.channels_last, plan).proof
    return None if proof.ready else proof.state


def _tune(task: Task, timer: Timer, limit: int, end: float | None) -> Result:
    with torch.no_grad(), tf32_convolutions(task.tf32):
        o = task.operands()
        precision, device = precision_of(o.x.dtype), target_device(o.x)
        batch, _, *image = o.x.shape
        size = tuple(n + 2 * p for n, p in zip(image, task.step.pad, strict=True))
        spec, index = task.step.spec, cuda_index(o.x) or 0
        hopper = tuned.hopper_allowed(task.step, batch, size, precision, index, task.channels_last)
        plans = tried(task.step, batch, size, precision, device, task.channels_last, hopper)[:limit]
        heuristic = plans[0]
        calls: dict[str, Callable[[], object]] = {}
        refused: dict[str, str] = {}
        for plan in plans:
            if calls and end is not None and time.monotonic() >= end:
                break
            reason = _refusal(task, o, plan)
            if reason is None:
                calls[plan.name] = lambda plan=plan: conv.run(task.step, o, task.channels_last, plan)  # type: ignore[misc]
            else:
                refused[plan.name] = reason
        times = {name: t.median for name, t in timer(calls).items()} if calls else {}
    best = min((p for p in plans if p.name in times), key=lambda p: times[p.name], default=None)
    if best is not None and times.get(heuristic.name, float("inf")) <= times[best.name] * (1 + GAIN):
        best = heuristic
    kept = False
    if best is not None:
        about = {"seconds": times, "heuristic": heuristic.name}
        kept = tuned.keep(spec, batch, size, precision, index, best, about)
        conv.prepare.cache_clear()
    return Result(task, heuristic, best, times, refused, kept)
