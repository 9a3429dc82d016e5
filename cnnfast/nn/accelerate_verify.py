"""What `cnnfast.accelerate` does with example inputs: compare with the plain model, switch off what differs, time."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..messages import CnnfastWarning, one_line
from ..timing import Timing, measure
from ..tolerance import model_verdict
from .accelerate_call import plain_call, record_of, restore
from .accelerate_report import arguments, copied, leaves, unchanged
from .accelerate_worth import never_standing
from .rewrite_site import Site

__all__ = ["differs", "moved", "timed", "verify", "without_onednn"]

# What is smaller in float64, or than so much of the largest value, is rounding: the gradient of a bias ahead of a norm.
_NOTHING, _NOTHING_OF = 1e-9, 1e-12
_MOVED = 2.0**-14  # of a parameter: a hundred times float32's errors, so that a hundred times as many kinks are crossed
_SECONDS = 1.5  # of timing, for each of the ways to call a model
_NO_GRADIENT = "there is no gradient"
Outcome = dict[str, Tensor]  # results, gradients and buffers by name


def verify(model: nn.Module, example_inputs: Any) -> None:
    """Of an accelerated model, as `cnnfast.accelerate` says. What is wrong with a site is its ``off`` afterwards."""
    args, kwargs = arguments(example_inputs)
    trial = _Trial(model, args, kwargs)
    modes = [False] + [True] * torch.is_grad_enabled()
    for gradients in list(modes):
        reason = trial.prepare(gradients)
        if reason == _NO_GRADIENT:
            modes.remove(gradients)
        if reason is not None:
            trial.record.notes.append(f"not verified{' with gradients' if gradients else ''}: {reason}")
            continue
        for site, problem in trial.culprits(trial.sites()):
            site.off = site.verified = f"differs from PyTorch's: {problem}"
            warnings.warn(
                f"cnnfast: {', '.join(site.paths) or type(model).__name__}: fused, it {site.off}; PyTorch's operators "
                "run instead",
                CnnfastWarning,
                stacklevel=3,
            )
        for site in trial.sites():
            site.verified = "yes"
    _veto(model, args, kwargs, modes)


def differs(got: Outcome, exact: Outcome, yardsticks: Sequence[Outcome]) -> str | None:
    """What is wrong with ``got``, or None: each tensor is to be as near to ``exact`` (float64) as the tolerance rule
    for whole models allows by one of ``yardsticks`` (`tolerance.model_verdict`)."""
    some = _something(exact)
    for name, expected in exact.items():
        if name not in got:
            return f"{name} is missing"
        if name not in some:
            continue
        others = [other[name] for other in yardsticks if name in other]
        if any(torch.equal(got[name], other) for other in others):
            continue
        problem = model_verdict(got[name], expected, others)
        if problem is not None:
            return f"{name}: {problem}"
    return None


class _Trial:
    """Runs of a model on the same inputs, buffers and random numbers."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        record = record_of(model)
        assert record is not None
        self.record = record
        self.gradients = False
        self.yardsticks: list[Outcome] = []
        self.exact: Outcome = {}

    def sites(self) -> list[Site]:
        """Those that have run, and are on."""
        return [s for graph in self.record.graphs for s in graph.sites if s.ran and s.off is None]

    def prepare(self, gradients: bool) -> str | None:
        """What to compare with, and a first run. Why that cannot be, or None.

        The yardsticks are the plain model with and without oneDNN: PyTorch's own arithmetic in two orders. (Not in
        channels-last, where PyTorch 2.13 itself crashes in some backwards.) Where float64 gives something else
        altogether, as a dropout does, the two are compared with each other.

        A gradient jumps where a value beside the kink of a ReLU, or two beside each other in a max-pooling, round the
        other way: one of a million such values does in any float32 run, and moves a weight's gradient by 1e-3 of its
        size. Which ones do is chance, so that for gradients the plain model with its parameters moved a little is a
        yardstick as well.
        """
        self.gradients = gradients
        with plain_call(self.model):
            plain = self._run(self.model, self.args, self.kwargs)
            with without_onednn():
                other = self._run(self.model, self.args, self.kwargs)
        if gradients and not any(name.startswith("gradient") for name in plain):
            return _NO_GRADIENT
        try:
            twin = copy.deepcopy(self.model).double()
            self.exact = self._run(twin, *tree_map(_double, (self.args, self.kwargs)))
            self.yardsticks = [plain, other]
            same = plain.keys() == self.exact.keys()
            some = _something(self.exact)
            same = same and all(name not in some or _near(t, self.exact[name]) for name, t in plain.items())
        except Exception as error:  # of whatever the model does
            self.record.notes.append(f"compared with float32: in float64 it does not run ({one_line(error)})")
            same = False
        if not same:
            self.exact, self.yardsticks = {name: t.double() for name, t in plain.items()}, [other]
            if not all(_near(t, self.exact[name]) for name, t in other.items()):
                return "the plain model itself gives something else at a second run"
        if gradients:
            self._move()
        self._run(self.model, self.args, self.kwargs)
        return None

    def _move(self) -> None:
        """The yardstick for kinks, where the model can be copied."""
        try:
            found = self._run(moved(self.model), self.args, self.kwargs)
        except Exception as error:  # of whatever the model holds
            self.record.notes.append(f"gradients compared without regard to kinks: {one_line(error)}")
        else:
            self.yardsticks.append({name: t for name, t in found.items() if name.startswith("gradient")})

    def _run(self, model: nn.Module, args: Any, kwargs: Any) -> Outcome:
        with unchanged(model), never_standing(), torch.set_grad_enabled(self.gradients):
            torch.manual_seed(0)
            args, kwargs = copied((args, kwargs))
            results = leaves(model(*args, **kwargs))
            found = {f"result {k}": t for k, t in enumerate(results)}
            if self.gradients:
                found |= self._gradients(model, results, leaves((args, kwargs)))
            found |= {f"buffer {name}": b for name, b in model.named_buffers() if b.is_floating_point()}
            return {name: t.detach().clone() for name, t in found.items()}

    @staticmethod
    def _gradients(model: nn.Module, results: Sequence[Tensor], inputs: Sequence[Tensor]) -> Outcome:
        of = [t for t in results if t.requires_grad]
        if not of:
            return {}
        noise = torch.Generator().manual_seed(1)
        by = [torch.randn(t.shape, generator=noise).to(t.device, t.dtype) for t in of]
        named: Outcome = {f"gradient of {name}": p for name, p in model.named_parameters() if p.requires_grad}
        named |= {f"gradient of input {k}": t for k, t in enumerate(inputs) if t.requires_grad}
        grads = torch.autograd.grad(of, list(named.values()), by, allow_unused=True)
        return {name: g for name, g in zip(named, grads, strict=True) if g is not None}

    def wrong(self, on: Sequence[Site]) -> str | None:
        """What differs where these sites alone are on, or None. (Two runs: a weight is packed in the second.)"""
        others = [s for s in self.sites() if s not in on]
        for s in others:
            s.off = "others are verified"
        try:
            for _ in range(2):
                got = self._run(self.model, self.args, self.kwargs)
                if problem := differs(got, self.exact, self.yardsticks):
                    return problem
        finally:
            for s in others:
                s.off = None
        return None

    def culprits(self, sites: Sequence[Site]) -> list[tuple[Site, str]]:
        """Those of the sites that make a difference, by bisection, and which."""
        problem = self.wrong(sites) if sites else None
        if problem is None:
            return []
        if len(sites) == 1:
            return [(sites[0], problem)]
        half = len(sites) // 2
        # What differs only together is switched off together.
        together = [(site, f"{problem} (by {len(sites)} sites together)") for site in sites]
        return [*self.culprits(sites[:half]), *self.culprits(sites[half:])] or together


def _something(exact: Outcome) -> set[str]:
    """The tensors that are not zero but for rounding in float64, which leave something to compare."""
    largest = {name: t.abs().max().item() if t.numel() else math.inf for name, t in exact.items()}
    least = max(_NOTHING, _NOTHING_OF * max((n for n in largest.values() if n < math.inf), default=0.0))
    return {name for name, n in largest.items() if not n < least}  # a NaN is something


def _near(t: Tensor, exact: Tensor) -> bool:
    """Whether they are the same thing in another precision."""
    if t.shape != exact.shape or not t.numel():
        return t.shape == exact.shape
    error, size = (v.double().square().mean().sqrt() for v in (t.double() - exact, exact))
    return bool(error <= 0.05 * size + 1e-6)


@contextmanager
def without_onednn() -> Iterator[None]:
    """(`torch.backends.mkldnn.flags` warns of GPUs.)"""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def moved(model: nn.Module, by: float = _MOVED) -> nn.Module:
    """A plain copy, whose floating-point parameters are off by this share of their size."""
    twin = copy.deepcopy(model)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in twin.parameters():
            if p.is_floating_point():
                p.mul_(1 + by * torch.randn(p.shape, generator=noise).to(p.device, p.dtype))
    return twin


def _double(t: Any) -> Any:
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


# --- speed ------------------------------------------------------------------------------------------------------------


def _veto(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], modes: Sequence[bool]) -> None:
    """Restore a model that is slower than the better of the plain one and its channels-last form; where it is so in one
    of the ``modes`` alone, with gradients or without, switch that mode's sites off."""
    record = record_of(model)
    assert record is not None
    slower: dict[bool, str] = {}
    for gradients in modes:
        times = timed(model, args, kwargs, gradients=gradients)
        ours = times.pop("cnnfast")
        name, best = min(times.items(), key=lambda item: item[1].median)
        if ours.low > best.median:  # on a busy machine, medians of the same code differ
            slower[gradients] = f"{name} takes {best}, accelerated {ours}"
    if not slower:
        return
    if len(slower) == len(modes):
        restore(model)
        what = "is restored"
    else:
        ((gradients, why),) = slower.items()
        what = f"runs as it stands with{'' if gradients else 'out'} gradients"
        for graph in record.graphs:
            for site in graph.sites if graph.gradients is gradients else ():
                site.off = site.off or f"slower in all: {why}"
    said = "; with gradients ".join(slower.values())
    warnings.warn(f"cnnfast: {type(model).__name__} {what}: on these inputs {said}", CnnfastWarning, stacklevel=4)


def timed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, gradients: bool = False
) -> dict[str, Timing]:
    """Seconds of a call of the accelerated model and of the plain one, with ``gradients`` and its backward; without, of
    its channels-last form, too, where there is one. (Some backwards of that crash in PyTorch 2.13.)"""
    device = next((t.device for t in (*model.parameters(), *leaves((args, kwargs)))), torch.device("cpu"))

    def call(which: nn.Module, *given: Any) -> object:
        with torch.set_grad_enabled(gradients):
            results = which(*given[0], **given[1])
            if not gradients:
                return results
            of = [t for t in leaves(results) if t.requires_grad]
            to = [t for t in (*which.parameters(), *leaves(given)) if t.requires_grad]
            return torch.autograd.grad(of, to, [torch.ones_like(t) for t in of], allow_unused=True)

    def plain() -> object:
        with plain_call(model):
            return call(model, args, kwargs)

    candidates: dict[str, Callable[[], object]] = {"cnnfast": lambda: call(model, args, kwargs), "plain": plain}
    if not gradients:
        try:
            twin: Any = copy.deepcopy(model)
            twin.to(memory_format=torch.channels_last)
        except Exception as error:  # of whatever the model holds
            record = record_of(model)
            assert record is not None
            record.notes.append(f"not timed in channels-last: {one_line(error)}")
        else:
            last = tree_map(channels_last, (args, kwargs))
            candidates["channels-last"] = lambda: call(twin, *last)
    with unchanged(model):
        start = time.perf_counter()
        plain()
        repeats = int(_SECONDS / (time.perf_counter() - start))
        return measure(candidates, repeats=min(max(repeats, 5), 7), device=device)


def channels_last(t: Any) -> Any:
    return t.contiguous(memory_format=torch.channels_last) if isinstance(t, Tensor) and t.dim() == 4 else t
