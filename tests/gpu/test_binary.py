"""A binary is found by Triton's own launch once, and launched directly from then on. No GPU: a driver for one that is
not there takes the launches.

That all launches of a `Binary` want the same binary is checked throughout (`conftest.binaries_of_one_kind`)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast.gpu.norm_act_backward import _activation, _backward
from cnnfast.norms import Norm
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step

pytest.importorskip("triton", reason="triton is not installed")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402
from triton.runtime import jit  # noqa: E402

from benchmarks.rehearse.inspector import StubDriver, recording, target  # noqa: E402
from cnnfast.gpu import conv, conv_autograd, conv_wgrad, norm_act, norm_act_plan  # noqa: E402
from cnnfast.gpu import weight as weights
from cnnfast.gpu.binary import Binary  # noqa: E402

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
    found = [f.compiled.metadata.target.arch for f in binary._found.values()]
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
            conv.run(step, Operands(x, w), True)
    gathers = [c.job.signature["w_ptr"] for c in calls if c.job.function == "gather_weight_kernel"]
    assert gathers == ["*fp16", "*fp32"]


# --- training ---------------------------------------------------------------------------------------------------------

BLOCKS: dict[str, tuple[nn.Module, ...]] = {
    "batch": (nn.ConvTranspose2d(32, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    "instance": (nn.Upsample(scale_factor=2), nn.Conv2d(32, 32, 3, padding=1), nn.InstanceNorm2d(32), nn.SiLU()),
    "group": (nn.Conv2d(32, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.PReLU(32)),
    "bias": (nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.LeakyReLU(0.2)),
}


def train(name: str, x: torch.Tensor) -> None:
    model = cnnfast.channels_last(cnnfast.Sequential(*copy.deepcopy(BLOCKS[name]))).to(x.dtype).train()
    x.requires_grad_()
    with cnnfast.backend("triton"):
        y = model(x)
        y.backward(torch.zeros_like(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_later_training_step_looks_up_and_nothing_else(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = (
        conv.prepare, conv_wgrad.prepare, weights._gather, weights._sum, norm_act.statistics_of, norm_act.merge_of,
        norm_act._forward, _backward, _activation, conv_autograd.input_gradient_step,
    )  # fmt: skip
    for cached in caches:
        cached.cache_clear()
    with recording(90) as calls:
        train(name, torch.zeros(2, 32, 4, 4, dtype=dtype))
        first, misses = len(calls), [cached.cache_info().misses for cached in caches]
        for module in (conv, conv_wgrad, weights, norm_act_plan):
            monkeypatch.setattr(module, "Binary", None)
        train(name, torch.zeros(2, 32, 4, 4, dtype=dtype))
    assert len(calls) == 2 * first and [c.job.key for c in calls[:first]] == [c.job.key for c in calls[first:]]
    assert [cached.cache_info().misses for cached in caches] == misses and sum(misses) > 2


@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
def test_addresses_layouts_and_numbers_of_a_norm_want_no_other_binary(kind: str) -> None:
    """`conftest.binaries_of_one_kind` looks at every launch."""

    def odd(t: torch.Tensor) -> torch.Tensor:
        return t.new_zeros(t.numel() + 1)[1:].as_strided(t.shape, t.stride())

    def tensors(dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.zeros(3, 32, 5, 4, dtype=dtype), *(torch.zeros(32) for _ in range(4))]

    norm, few = Norm(kind, 4 if kind == "group" else 1), Norm(kind, 4 if kind == "group" else 1, eps=1)
    running = kind != "group"
    with recording(90) as calls:
        for dtype in (torch.float32, torch.float16):
            plain = tensors(dtype)
            last = [plain[0].contiguous(memory_format=torch.channels_last), *plain[1:]]
            spread = [plain[0][:, :, :, ::2].repeat_interleave(2, 3)[..., :4], *(t.repeat(2)[::2] for t in plain[1:])]
            for given in (plain, [odd(t) for t in plain], last, [odd(t) for t in last], spread):
                for how, momentum in ((norm, 0.1), (few, 1), (norm, 0), (few, 0.5)):
                    x, weight, bias, mean, var = (t.detach() for t in given)
                    leaves = [t.requires_grad_() for t in (x, weight, bias)]
                    more = dict(running_mean=mean, running_var=var) if running else {}
                    y = cnnfast.ops.norm_act(
                        x, how, weight, bias, momentum=momentum, residual=x, activation="relu", backend="triton", **more
                    )
                    torch.autograd.grad(y, leaves, y.detach())
    assert len(calls) >= 2 * 5 * 4 * 5
