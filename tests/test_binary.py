"""A binary is found by Triton's own launch once, and launched directly from then on. No GPU: a driver for one that is
not there takes the launches.

That all launches of a `Binary` want the same binary is checked throughout (`conftest.binaries_of_one_kind`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cnnfast.block import Operands, Step
from cnnfast.spec import ConvSpec

pytest.importorskip("triton", reason="triton is not installed")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime import jit  # noqa: E402

from benchmarks.inspector import StubDriver, recording, target  # noqa: E402
from cnnfast.ops import launch  # noqa: E402
from cnnfast.ops.binary import Binary  # noqa: E402

GRID = (3, 2, 1)


@triton.jit(do_not_specialize=["n"])
def kernel(x_ptr, n, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.full((BLOCK,), n, tl.float32))


@pytest.fixture
def binary() -> Binary:
    return Binary(kernel, {"BLOCK": 16, "OTHER": 1}, num_warps=2)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the driver was given: grid, kernel and arguments of every launch."""
    record: list[tuple[Any, ...]] = []

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.name, self.num_warps = metadata.name, metadata.num_warps

        def __call__(
            self, x: int, y: int, z: int, stream: Any, function: Any, packed: Any, meta: Any, *rest: Any
        ) -> None:
            record.append(((x, y, z), self.name, self.num_warps, *rest[2:]))

    monkeypatch.setattr(StubDriver, "launcher_cls", Launcher)
    kernel.device_caches.clear()
    return record


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every time that Triton's own launch was asked which binary it is."""
    record: list[Any] = []
    real = jit.compute_cache_key
    monkeypatch.setattr(jit, "compute_cache_key", lambda *a: (record.append(a), real(*a))[1])
    return record


def test_launches_are_the_same_but_shorter(binary: Binary, started: list[Any], asked: list[Any]) -> None:
    x, y = torch.zeros(16), torch.zeros(64)
    with target(90):
        for t, n in ((x, 1), (y, 2**30), (x, 16)):
            binary(GRID, t, n)
    assert len(asked) == 1
    assert started == [(GRID, "kernel", 2, t, n, 16) for t, n in ((x, 1), (y, 2**30), (x, 16))]


def test_every_device_has_its_own(binary: Binary, started: list[Any], asked: list[Any]) -> None:
    x = torch.zeros(16)
    for arch in (90, 80, 90, 80):
        with target(arch):
            binary(GRID, x, 1)
    assert len(asked) == 2 and len(started) == 4
    found = [compiled.metadata.target.arch for _, compiled in binary._found.values()]
    assert found == [90, 80]


def test_what_stands_in_tritons_place_sees_every_launch(binary: Binary, started: list[Any]) -> None:
    x = torch.zeros(16)
    with target(90):
        binary(GRID, x, 1)
    with recording(90) as calls:
        for _ in range(2):
            binary(GRID, x, 1)
    assert len(calls) == 2 and len(started) == 1
    with target(90):
        binary(GRID, x, 1)
    assert len(started) == 2


def test_launch_hooks_are_called(binary: Binary, started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Profilers hang on them."""
    with target(90):
        for _ in range(2):
            binary(GRID, torch.zeros(16), 1)

        def hook(metadata: Any) -> None: ...

        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
        seen: list[Any] = []
        monkeypatch.setattr(
            CompiledKernel, "launch_metadata", lambda self, grid, stream, *args: seen.append((self.name, grid, args))
        )
        binary(GRID, x := torch.zeros(16), 7)
    assert seen == [("kernel", GRID, (x, 7, 16))]


def test_a_weight_of_another_dtype_is_gathered_by_another_binary() -> None:
    step = Step(ConvSpec.make(64, 3, 4, 2, 1))
    with recording(90) as calls, torch.no_grad():
        for dtype in (torch.float16, torch.float32):
            x, w = torch.zeros(1, 64, 4, 4, dtype=dtype), torch.zeros(64, 3, 4, 4, dtype=dtype)
            launch.run(step, Operands(x, w), True)
    gathers = [c.job.signature["w_ptr"] for c in calls if c.job.function == "gather_weight_kernel"]
    assert gathers == ["*fp16", "*fp32"]
