"""``python -m benchmarks.host_time``: time on the host of one fused call of the Triton path, and of a block's training
step, the launch itself stubbed.

A stub driver stands in Triton's place: calls are specialised, looked up and handed to a launcher that does nothing, so
what is left is the work of Python. Tensors are on the CPU, which changes nothing up to the launch (a real launch adds
the driver's own few microseconds, and so does a kernel in any other library). Runs without a GPU.

``--before FOLDER`` compares with another checkout (which gets a copy of this file, so that both run the same calls):
its processes and ours take turns, and a table has the least and the median of both.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import nn

import cnnfast
from cnnfast.activations import Activation
from cnnfast.files import write_atomically
from cnnfast.gpu.observers import observed
from cnnfast.norms import Norm
from cnnfast.ops.run import run_step
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step
from cnnfast.timing import Timing, measure

from . import cases
from .rehearse.inspector import target
from .report import environment, machine_name

LIMIT_US = 40.0
ARCH = 90
BLOCK_SECONDS = 0.002  # short: on a shared machine, the least of many is what nothing disturbed


@triton.jit
def _empty(x_ptr):
    pass


@contextmanager
def triton_path() -> Iterator[None]:
    """CPU tensors take the Triton path inside, as CUDA tensors do anywhere; launches do nothing."""
    with target(ARCH), cnnfast.backend("triton"):
        yield


@dataclass(frozen=True)
class HostCall:
    """``steps`` fused steps per call: times are divided by it."""

    name: str
    call: Callable[[], object]
    steps: int = 1


def _operands(spec: ConvSpec, batch: int, size: int, dtype: torch.dtype) -> Operands:
    """x, weight (channels-last) and BatchNorm's vectors."""
    x = torch.randn(batch, spec.in_channels, size, size).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(spec.weight_shape).to(dtype, memory_format=torch.channels_last)
    vectors = {name: torch.rand(spec.out_channels).to(dtype) + 0.5 for name in ("mean", "var", "scale", "shift")}
    return Operands(x, weight, **vectors)


def triton_calls(dtype: torch.dtype = torch.float16) -> list[HostCall]:
    """The calls of the Triton path, for use inside `triton_path`: layers of DCGAN, channels-last."""
    calls = []
    shapes = {
        "64 images": (512, 256, 2, 1, 64, 4),
        "1 image": (512, 256, 2, 1, 1, 4),
        "latent": (100, 512, 1, 0, 64, 1),
    }
    for name, (channels_in, channels_out, stride, padding, batch, size) in shapes.items():
        spec = ConvSpec.make(channels_in, channels_out, 4, stride, padding, ndim=2)
        step, o = Step(spec, Activation("relu"), norm=Norm("running")), _operands(spec, batch, size, dtype)
        calls.append(
            HostCall(
                f"run_step, BatchNorm and ReLU, {name}",
                lambda step=step, o=o: run_step(step, o, channels_last=True, backend="triton"),  # type: ignore[misc]
            )
        )
    o = _operands(ConvSpec.make(512, 256, 4, 2, 1, ndim=2), 64, 4, dtype)
    calls.append(
        HostCall(
            "ops.conv_transpose2d, scale, shift and ReLU, 64 images",
            lambda: cnnfast.ops.conv_transpose2d(
                o.x, o.weight, None, 2, 1, scale=o.scale, shift=o.shift, activation="relu", backend="triton"
            ),
        )
    )
    case = cases.find(["dcgan64"])[-1]
    model = cnnfast.Sequential(*case.build().to(dtype)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    z = case.input(64).to(dtype)

    calls.append(HostCall("Sequential, DCGAN-64, 64 images, per layer", lambda: model(z), steps=5))
    return calls


def launches(call: Callable[[], object]) -> list[str]:
    """The plans that one call launches."""
    seen: list[str] = []
    with observed(launch=seen.append):
        call()
    return seen


BLOCKS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "BatchNorm, ReLU": lambda c_in, c_out: [
        nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(True),
    ],
    "InstanceNorm, ReLU": lambda c_in, c_out: [
        nn.ConvTranspose2d(c_in, c_out, 4, 2, 1, bias=False), nn.InstanceNorm2d(c_out), nn.ReLU(True),
    ],
    "bias, LeakyReLU": lambda c_in, c_out: [nn.ConvTranspose2d(c_in, c_out, 4, 2, 1), nn.LeakyReLU(0.2, True)],
}  # fmt: skip


def _step_of(name: str, model: nn.Sequential, x: torch.Tensor, autocast: bool = False) -> list[HostCall]:
    """Forward in training mode, and backward to the input and all parameters of one result."""
    model = cnnfast.channels_last(model.train())
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def under_autocast() -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            return model(x)

    forward: Callable[[], torch.Tensor] = under_autocast if autocast else lambda: model(x)
    y = forward()
    leaves, grad = [x, *model.parameters()], torch.randn_like(y)
    return [
        HostCall(f"{name}, forward", forward),
        HostCall(f"{name}, backward", lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True)),
    ]


def training_calls() -> list[HostCall]:
    """Steps of the Triton path on blocks of a transposed convolution, for use inside `triton_path`; small enough for
    autocast's casts, which are arithmetic, and the system's allocations not to count."""
    calls = []
    for block, make in BLOCKS.items():
        for numerics in ("float32", "float16", "autocast"):
            dtype = torch.float16 if numerics == "float16" else torch.float32
            x, model = torch.randn(4, 32, 4, 4, dtype=dtype), cnnfast.Sequential(*make(32, 32)).to(dtype)
            calls += _step_of(f"{block}, {numerics}", model, x, numerics == "autocast")
    return calls


def eager_training_calls() -> list[HostCall]:
    """The same blocks of PyTorch's modules on a CPU, too small for arithmetic to count: what is left is its dispatch,
    its autograd, and what its CPU kernels do ahead of the arithmetic (on a GPU, the launch of its kernels)."""
    x = torch.randn(1, 4, 2, 2)
    return [c for block, make in BLOCKS.items() for c in _step_of(block, nn.Sequential(*make(4, 4)), x)]


def cpu_calls() -> list[HostCall]:
    """A generator of tiny layers on the CPU: most of its time is not arithmetic."""
    case = cases.find(["mini_dcgan"], cases.MINI)[-1]
    x, found = case.input(1), []
    for container in (torch.nn.Sequential, cnnfast.Sequential):
        model = container(*case.build()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        name = f"{container.__module__.split('.')[0]}.Sequential, {case.title}, per layer"
        found.append(HostCall(name, lambda model=model: model(x), steps=3))  # type: ignore[misc]
    return found


def _timed(calls: list[HostCall], repeats: int, profile: bool) -> dict[str, Timing]:
    timings = measure({c.name: c.call for c in calls}, repeats=repeats, block_seconds=BLOCK_SECONDS)
    if profile:
        for c in calls:
            _profile(c)
    return timings


def run(repeats: int, profile: bool, output: Path | None) -> int:
    """Prints and writes the times. Returns 1 where a fused step of inference takes more than the limit."""
    torch.set_num_threads(1)  # nothing here is parallel: idle threads would only disturb
    with torch.inference_mode():
        with triton_path():
            x = torch.zeros(16)
            # As many launches as a step is allowed are no measure of cnnfast: what Triton itself takes for one.
            floor = HostCall("an empty Triton kernel of one argument", lambda: _empty[(1, 1, 1)](x))
            calls = [*triton_calls(), floor]
            plans = {c.name: ", ".join(launches(c.call)) for c in calls}
            timings = _timed(calls, repeats, profile)
        on_cpu = cpu_calls()
        timings_on_cpu = _timed(on_cpu, repeats, profile)
    with triton_path():
        training = training_calls()
        kernels = {c.name: ", ".join(plan.split()[0] for plan in launches(c.call)) for c in training}
        timings_of_training = _timed(training, repeats, profile)
    eager = eager_training_calls()
    timings_of_eager = _timed(eager, repeats, profile)
    lines = ["# Host time", "", "Written by `python -m benchmarks.host_time`. Do not edit.", ""]
    lines += [f"- {key}: {value}" for key, value in environment().items()]
    title = f"Triton path, sm_{ARCH}, float16, launch stubbed, per fused step (at most {LIMIT_US:g} us wanted):"
    lines += _table(title, calls, timings, "plans", plans)
    lines += _table("On the CPU, arithmetic included (one thread):", on_cpu, timings_on_cpu)
    title = f"Training step of one block, Triton path, sm_{ARCH}, launch stubbed:"
    lines += _table(title, training, timings_of_training, "launches", kernels)
    title = "The same of PyTorch's modules on 16 floats on the CPU, arithmetic included (its dispatch and autograd):"
    lines += _table(title, eager, timings_of_eager)
    text = "\n".join(lines) + "\n"
    print(text)
    if output is not None:
        write_atomically(output / machine_name() / "host_time.md", text)
        print(f"wrote {output / machine_name() / 'host_time.md'}")
    us = {c.name: 1e6 * timings[c.name].median / c.steps for c in calls}
    slow = [name for name, value in us.items() if value > LIMIT_US]
    for name in slow:
        print(f"above {LIMIT_US:g} us: {name}, {us[name]:.1f} us", file=sys.stderr)
    return 1 if slow else 0


def _table(
    title: str, calls: list[HostCall], timings: dict[str, Timing], more: str = "", values: dict[str, str] | None = None
) -> list[str]:
    """``more``: the title of one column more, which holds ``values``."""
    lines = ["", title, "", "| | us, median | quartiles | least |", "|---|---:|---:|---:|"]
    for c in calls:
        t = timings[c.name]
        median, low, high, least = (1e6 * v / c.steps for v in (t.median, t.low, t.high, min(t.seconds)))
        lines.append(f"| {c.name} | {median:.1f} | {low:.1f} to {high:.1f} | {least:.1f} |")
    if values is not None:
        column = [f" {more} |", "---|", *(f" {values.get(c.name, '')} |" for c in calls)]
        lines[3:] = [line + cell for line, cell in zip(lines[3:], column, strict=True)]
    return lines


def _profile(c: HostCall, calls: int = 2000) -> None:
    print(f"\n--- {c.name}: profile of {calls} calls (profiling itself costs: read the shares)")
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        c.call()
    profiler.disable()
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(18)


# --- against another checkout -----------------------------------------------------------------------------------------

_ROW = re.compile(r"^\| (.+?) \| ([\d.]+) \| [\d.]+ to [\d.]+ \| ([\d.]+) \|", re.MULTILINE)


def rows(text: str) -> dict[str, tuple[float, float]]:
    """(least, median) of each row of what `run` prints."""
    return {name: (float(least), float(median)) for name, median, least in _ROW.findall(text)}


def compare(before: Path, repeats: int, rounds: int) -> int:
    """Both checkouts' rows, processes alternating; prints the least and the median of all rounds."""
    here = Path(__file__).resolve()
    found: dict[str, list[dict[str, tuple[float, float]]]] = {"before": [], "after": []}
    shutil.copy(here, before / "benchmarks" / here.name)
    for _ in range(rounds):
        for which, folder in (("before", before), ("after", here.parent.parent)):
            with tempfile.TemporaryDirectory() as output:
                command = [sys.executable, "-m", "benchmarks.host_time", f"--repeats={repeats}", f"--output={output}"]
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if not (measured := rows(done.stdout)):
                print(done.stderr, file=sys.stderr)
                return done.returncode or 1
            found[which].append(measured)
    print("| | least, us: before | after | ratio | median, us: before | after | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in found["after"][0]:
        cells = []
        for k, of in ((0, min), (1, statistics.median)):
            old, new = (of([measured[name][k] for measured in found[which]]) for which in ("before", "after"))
            cells.append(f"{old:.1f} | {new:.1f} | {new / old:.2f}")
        print(f"| {name} | {' | '.join(cells)} |")
    return 0


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__)
    p.add_argument("--repeats", type=int, default=200, help="interleaved repeats (%(default)s)")
    p.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout to compare with")
    p.add_argument("--rounds", type=int, default=3, help="processes of each checkout (%(default)s)")
    p.add_argument("--profile", action="store_true", help="also where the time goes (cProfile)")
    p.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results", help="folder of results")
    arguments = p.parse_args(argv)
    if arguments.before is not None:
        return compare(arguments.before.resolve(), arguments.repeats, arguments.rounds)
    return run(arguments.repeats, arguments.profile, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
