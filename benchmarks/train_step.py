"""``python -m benchmarks.train_step``: forward and backward of generators and blocks in training, on the CPU.

What `python -m benchmarks` is to inference: every implementation has the same float32 weights and input, its gradients
are compared with float64's before it is timed, and times are of interleaved repeats. bfloat16 is autocast.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import cnnfast

from . import cases, memory
from .cases import Case
from .peers import NotAvailable, path_of, require_compiler
from .report import Report, environment, machine_name
from .rows import Entry, Row
from .timers import RATIOS, Timer, wall_clock

RESULTS = Path(__file__).resolve().parent / "results"
SCRATCH = Path("out") / "bench"
SECONDS = 8.0

NOTES = (
    "A step is a forward in training mode and the backward of a given gradient of its result; the gradients start as "
    "None. In generators the input needs no gradient, in blocks (the middle of a network) it does. bfloat16 is "
    "autocast: float32 parameters and gradients.",
    "Every implementation has the same weights and input. It is timed if no gradient, nor the result, is off from "
    "float64's by more than four times what eager NCHW's is (2-norm of the difference over that of float64's, the "
    "worst of all tensors). Times are medians of interleaved repeats, caches warm.",
    RATIOS,
)


def _vae() -> nn.Sequential:
    """A small decoder of an autoencoder: 4x16x16 latents to RGB images of 64x64."""
    layers: list[nn.Module] = [nn.Conv2d(4, 256, 3, padding=1), nn.GroupNorm(32, 256), nn.SiLU()]
    for c_in, c_out in ((256, 128), (128, 64)):
        layers += [
            nn.Upsample(scale_factor=2),
            nn.Conv2d(c_in, c_out, 3, padding=1),
            nn.GroupNorm(32, c_out),
            nn.SiLU(),
        ]
    return nn.Sequential(*layers, nn.Conv2d(64, 3, 3, padding=1))


def training_cases() -> tuple[tuple[Case, tuple[int, ...]], ...]:
    """The cases and their batches."""
    wanted = {
        "dcgan64": (16, 64), "upsample256": (1,), "pix2pix.2": (1, 16), "pix2pix.5": (1, 16), "style.up1": (1, 4),
    }  # fmt: skip
    found = tuple((case, wanted[case.name]) for case in cases.find(list(wanted)))
    return (*found, (Case("vae_small", "generator", (4, 16, 16), (4,), _vae), (4, 16)))


# --- implementations --------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """One implementation of a case: `step` is what is timed."""

    model: Callable[[torch.Tensor], torch.Tensor]
    parameters: list[nn.Parameter]
    x: torch.Tensor
    grad: torch.Tensor
    autocast: bool
    y: torch.Tensor | None = None

    def clear(self) -> None:
        self.y = self.x.grad = None
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        self.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            y = self.model(self.x)
        y.backward(self.grad.to(y.dtype))
        self.y = y.detach()

    def results(self) -> list[torch.Tensor]:
        """After a step: the result and all gradients, copied."""
        assert self.y is not None
        grads = [t.grad for t in (self.x, *self.parameters) if t.requires_grad]
        assert all(g is not None for g in grads)
        return [t.clone() for t in (self.y, *grads) if t is not None]


def _training(
    case: Case, batch: int, bfloat16: bool, channels_last: bool, container: type[nn.Sequential], compiled: bool
) -> Training:
    if compiled:
        require_compiler()
    modules = container(*case.build()).train()
    x = case.input(batch)
    grad = torch.randn(modules(x).shape, generator=torch.Generator().manual_seed(2))
    if channels_last:
        modules = modules.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    x.requires_grad_(case.suite != "generator")
    model = torch.compile(modules, dynamic=False) if compiled else modules
    return Training(model, list(modules.parameters()), x, grad, bfloat16)


def _exact(case: Case, batch: int) -> list[torch.Tensor]:
    t = _training(case, batch, False, False, nn.Sequential, False)
    modules = case.build().train().double()
    x = t.x.detach().double().requires_grad_(t.x.requires_grad)
    exact = Training(modules, list(modules.parameters()), x, t.grad.double(), False)
    exact.step()
    return exact.results()


# name -> (channels_last, container, compiled)
IMPLEMENTATIONS: dict[str, tuple[bool, type[nn.Sequential], bool]] = {
    "eager": (False, nn.Sequential, False),
    "eager channels_last": (True, nn.Sequential, False),
    "torch.compile channels_last": (True, nn.Sequential, True),
    "cnnfast": (True, cnnfast.Sequential, False),
    "cnnfast NCHW": (False, cnnfast.Sequential, False),
}


def _error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The worst relative error of all tensors, in the 2-norm."""
    # A gradient that is zero in exact arithmetic (a bias ahead of a norm) is rounding noise: no ratio says anything.
    largest = max(e.norm().item() / e.numel() ** 0.5 for e in exact)
    pairs = [(f, e) for f, e in zip(found, exact, strict=True) if e.norm().item() > 1e-6 * largest * e.numel() ** 0.5]
    return max(((f.double() - e).norm() / e.norm()).item() for f, e in pairs)


# --- a row ------------------------------------------------------------------------------------------------------------


def row(case: Case, batch: int, bfloat16: bool, names: tuple[str, ...], timer: Timer, with_memory: bool) -> Row:
    """Every implementation of ``names`` (eager first): checked, then timed in turn."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    exact = _exact(case, batch)
    tolerance, entries, ready = float("inf"), {}, {}
    for name in names:
        channels_last, container, compiled = IMPLEMENTATIONS[name]
        before = memory.held() if with_memory else 0
        try:
            t = _training(case, batch, bfloat16, channels_last, container, compiled)
            t.step()
            error = _error(t.results(), exact)
            if name == "eager":
                tolerance = 4 * error
            if not error <= tolerance:
                entries[name] = Entry(name, "wrong result", f"relative error {error:.2g}", "", error)
                continue
            path = path_of(t.step, gradients=True) if name.startswith("cnnfast") else ""
            t.clear()
            held = memory.held() - before if with_memory else None
            peak = memory.peak(t.step) if with_memory else None
        except NotAvailable as reason:
            entries[name] = Entry(name, "not available", str(reason))
            continue
        except Exception as failure:  # a peer's failure is a result of the comparison
            traceback.print_exc()
            entries[name] = Entry(name, "failed", f"{type(failure).__name__}: {str(failure).strip()[:200]}")
            continue
        entries[name], ready[name] = Entry(name, "checked", "not timed", path, error, held=held, peak=peak), t
    timings = timer({name: t.step for name, t in ready.items()})
    for name in ready:
        entries[name] = replace(entries[name], status="timed", note="", timing=timings[name])
    dtype = "bfloat16 autocast" if bfloat16 else "float32"
    # Forward, input gradient and weight gradient: three times the multiply-adds of a forward.
    found = tuple(entries[name] for name in names)
    return Row(case.name, case.suite, case.title, dtype, batch, 3 * case.macs(batch), tolerance, found)


def _show(r: Row) -> int:
    bad = 0
    print(f"\n{r.name}: {r.title}")
    for e in r.entries:
        if e.timing is None:
            print(f"  {e.name:<28}{e.status}: {e.note}")
            bad += e.name.startswith("cnnfast") and e.status != "not available"
            continue
        peak = "" if e.peak is None else f"{e.peak / 1e6:7.1f} MB"
        print(f"  {e.name:<28}{e.timing!s:<32}{peak:<12}{r.speedup(e)!s:<22}{e.path}")
    sys.stdout.flush()
    return bad


# --- the command ------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    p.add_argument("--quick", action="store_true", help="the least batches, half the time, no torch.compile")
    p.add_argument("--case", action="append", metavar="NAME", help="only this case; may be repeated")
    p.add_argument("--batch", action="append", type=int, metavar="N", help="only this batch; may be repeated")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], help="only this one")
    p.add_argument("--seconds", type=float, default=SECONDS, help="of timing in each row (default %(default)s)")
    p.add_argument("--output", type=Path, help=f"folder (default benchmarks/results; {SCRATCH} if only a part is run)")
    return p


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 where an implementation of cnnfast fails or is wrong, else 0. ValueError for an unknown case."""
    start = time.monotonic()
    todo = [
        (case, batch, dtype == "bfloat16")
        for case, batches in training_cases()
        if not arguments.case or case.name in arguments.case
        for dtype in ("float32", "bfloat16")
        if arguments.dtype in (None, dtype)
        for batch in (batches[:1] if arguments.quick else batches)
        if not arguments.batch or batch in arguments.batch
    ]
    if not todo:
        known = ", ".join(f"{case.name} ({', '.join(map(str, batches))})" for case, batches in training_cases())
        raise ValueError(f"no such case and batch: expected some of {known}")
    names = tuple(n for n, (_, _, compiled) in IMPLEMENTATIONS.items() if not (compiled and arguments.quick))
    part = arguments.quick or arguments.case or arguments.batch or arguments.dtype
    folder = (arguments.output or (SCRATCH if part else RESULTS)) / machine_name()
    no_memory = memory.unavailable()
    note = f"Memory was not measured: {no_memory}." if no_memory else memory.METHODS["cpu"]
    command = f"python -m benchmarks.train_step {' '.join(sys.argv[1:])}".strip()
    report = Report(environment(), command, notes=(*NOTES, note))
    print("\n".join(f"{name}: {value}" for name, value in report.environment.items()))
    timer = wall_clock(arguments.seconds / (2 if arguments.quick else 1))
    bad = 0
    for i, (case, batch, bfloat16) in enumerate(todo):
        r = row(case, batch, bfloat16, names, timer, not no_memory)
        report = replace(report, rows=(*report.rows, r), complete=i == len(todo) - 1)
        paths = report.write(folder, "train_step")
        bad += _show(r)
    print(f"\nwrote {', '.join(map(str, paths))}\nelapsed: {(time.monotonic() - start) / 60:.1f} minutes")
    return 1 if bad else 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(parser().parse_args(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
