"""Tuning: time every valid plan of the fused steps of a forward on this GPU, and keep the fastest for later processes.

Nothing is ever timed by a call of a model: plans come from the heuristic, or from what `tune` (``python -m cnnfast
tune``) has kept. Every plan is proven by `guard` before it is timed, on noise; plans are timed in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import dispatch, env, guard, store, trial, tuned
from .block import Operands, Step
from .choice import candidates, choose_plan
from .generators import create_model, list_models
from .messages import LOGGER, CnnfastError, UsageError
from .plan import Plan
from .timing import Timing, measure

__all__ = ["Options", "Result", "Task", "Timer", "cuda_timer", "record", "run", "tune", "tune_steps"]

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
    eps: float
    channels_last: bool
    tf32: bool
    device: torch.device

    @classmethod
    def of(cls, step: Step, o: Operands, channels_last: bool) -> Task:
        likes = tuple((name, _Like.of(t)) for name, t in o._asdict().items() if isinstance(t, torch.Tensor))
        return cls(step, likes, o.eps, channels_last, dispatch.precision_of(o.x.dtype).tf32, o.x.device)

    def operands(self) -> Operands:
        """Noise."""
        made: dict[str, Any] = {name: like.make(self.device) for name, like in self.likes}
        o = Operands(eps=self.eps, **made)
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


def tune(
    function: Callable[..., Any],
    *inputs: Any,
    batch_sizes: Iterable[int] = (),
    seconds: float | None = None,
    tell: Callable[[str], object] = LOGGER.info,
) -> list[Result]:
    """Tune every fused step that ``function(*inputs)`` launches on a GPU, for these sizes; as `warmup`, for each of
    ``batch_sizes`` too.

    Plans are kept under ``$CNNFAST_CACHE`` (``~/.cache/cnnfast``) and used by this and later processes for exactly
    these layers and sizes on this GPU, until torch, triton or cnnfast changes. ``seconds``: stop after about this time,
    with what was found. ``tell`` gets a line for each step; by default the logger "cnnfast" does. Takes some seconds
    for each plan that was not compiled before.

    RuntimeError where nothing was launched on a GPU, and where ``CNNFAST_GUARD`` switches the check of kernels off.
    """
    tasks = record(function, *inputs, batch_sizes=batch_sizes)
    if not tasks:
        raise RuntimeError(
            "nothing to tune: the forward launched no Triton kernel on a GPU (Sequential.explain says why)"
        )
    return tune_steps(tasks, seconds=seconds, tell=tell)


def record(function: Callable[..., Any], *inputs: Any, batch_sizes: Iterable[int] = ()) -> list[Task]:
    """The fused steps that a forward launches on a GPU, each size once."""
    tasks: dict[Task, None] = {}

    def see(step: Step, o: Operands, channels_last: bool) -> None:
        if o.x.is_cuda:
            tasks[Task.of(step, o, channels_last)] = None

    with _observed(see):
        guard.warmup(function, *inputs, batch_sizes=batch_sizes)
    return list(tasks)


@contextmanager
def _observed(see: Callable[[Step, Operands, bool], None]) -> Iterator[None]:
    from .ops import launch

    before, launch.OBSERVER = launch.OBSERVER, see
    try:
        yield
    finally:
        launch.OBSERVER = before


def tune_steps(
    tasks: Sequence[Task],
    timer: Timer = cuda_timer,
    *,
    seconds: float | None = None,
    limit: int = CANDIDATES,
    tell: Callable[[str], object] = LOGGER.info,
) -> list[Result]:
    """Tune each task and keep the best plans; see `tune`. ``timer`` gets the calls of one step, by plan, all of them
    compiled and proven. ``limit``: the most plans of a step that are tried."""
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


def _refusal(task: Task, o: Operands, plan: Plan) -> str | None:
    """Why a plan cannot be used: launches it, which compiles and proves it."""
    from .ops import launch

    try:
        launch.run(task.step, o, task.channels_last, plan)
    except (guard.Refused, torch.OutOfMemoryError) as error:
        return str(error)
    proof = launch.lookup(task.step, o, task.channels_last, plan).proof
    return None if proof.ready else proof.state


def _tune(task: Task, timer: Timer, limit: int, end: float | None) -> Result:
    from .ops import launch

    with torch.no_grad(), dispatch.tf32_convolutions(task.tf32):
        o = task.operands()
        precision, device = dispatch.precision_of(o.x.dtype), dispatch.target_device(o.x)
        batch, _, *image = o.x.shape
        size = tuple(n + 2 * p for n, p in zip(image, task.step.pad, strict=True))
        spec, index = task.step.spec, o.x.device.index or 0
        heuristic = choose_plan(spec, batch, size, precision, device, task.channels_last)
        others = candidates(spec, batch, size, precision, device, task.channels_last)
        plans = [heuristic, *(p for p in others if p != heuristic)][:limit]
        calls: dict[str, Callable[[], object]] = {}
        refused: dict[str, str] = {}
        for plan in plans:
            if calls and end is not None and time.monotonic() >= end:
                break
            reason = _refusal(task, o, plan)
            if reason is None:
                calls[plan.name] = lambda plan=plan: launch.run(task.step, o, task.channels_last, plan)  # type: ignore[misc]
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
        launch.prepare.cache_clear()
    return Result(task, heuristic, best, times, refused, kept)


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Of ``python -m cnnfast tune``. ``models``: names of generators, all where empty; ``seconds``: for everything."""

    models: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 16)
    dtypes: tuple[torch.dtype, ...] = (torch.float16,)
    device: str = "cuda"
    seconds: float | None = None


def run(options: Options) -> int:
    """Tune generators by their names; prints what is found. Returns the exit status. UsageError for unknown models and
    devices, CnnfastError where nothing can be tuned here."""
    _check(options)
    end = None if options.seconds is None else time.monotonic() + options.seconds
    device, found = torch.device(options.device), []
    for name in options.models or list_models():
        for dtype in options.dtypes:
            model: Any = create_model(name).eval().to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
            left = None if end is None else max(0.0, end - time.monotonic())
            print(f"{name}, {str(dtype).removeprefix('torch.')}, batch {', '.join(map(str, options.batches))}")
            z = model.example_input(options.batches[0])
            found += tune(model, z, batch_sizes=options.batches[1:], seconds=left, tell=print)
    gains = sorted(r.gain for r in found)
    if gains:
        print(f"{len(found)} steps tuned, median gain {gains[len(gains) // 2]:.2f}x; kept in {store.where(tuned.KIND)}")
    return 0


def _check(options: Options) -> None:
    unknown = [name for name in options.models if name not in list_models()]
    if unknown:
        raise UsageError(f"unknown model {', '.join(unknown)}: expected some of {', '.join(list_models())}")
    device = env.device_of(options.device)
    if device.type != "cuda":
        raise UsageError(f"--device {options.device}: plans are of CUDA devices")
    problem = env.triton_off(device.index) or (None if guard.enabled() else UNCHECKED)
    if problem is not None:
        raise CnnfastError(f"nothing can be tuned here: {problem}")
