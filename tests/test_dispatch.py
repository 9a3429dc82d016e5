"""Which backend runs, why not Triton, and PyTorch's precision switches."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import cnnfast
import cnnfast.gpu.backend  # noqa: F401  (ahead of tests that hide Triton from whoever imports it)
from cnnfast import dispatch
from cnnfast.gpu.devices import allocate, conv_tf32, precision_of
from cnnfast.gpu.why_not import NO_DEVICE, cuda_why_not, launch_why_not, triton_why_not, why_not
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step

GOOD = ConvSpec.make(32, 32, 4, 2, 1)


def operands(spec: ConvSpec, dtype: torch.dtype = torch.float32, size: tuple[int, int] = (4, 4)) -> Operands:
    """On the meta device: no reason depends on the values."""
    x = torch.empty(2, spec.in_channels, *size, dtype=dtype, device="meta")
    return Operands(x, torch.empty(spec.weight_shape, dtype=dtype, device="meta"))


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if triton were installed, whether it is or not."""
    monkeypatch.setattr("cnnfast.gpu.why_not.triton_why_not", lambda: None)


REASONS = {
    "few-inputs": (ConvSpec.make(15, 32, 4), {}, "15 input channels per group are fewer than 16"),
    "few-inputs-a-group": (ConvSpec.make(32, 64, 4, groups=4), {}, "8 input channels per group are fewer than 16"),
    "few-outputs-a-group": (
        ConvSpec.make(64, 24, 4, groups=2), {}, "12 output channels per group are fewer than 16 (groups=2)"
    ),
    "float64": (
        GOOD, {"dtype": torch.float64},
        "dtype torch.float64 is not one of torch.float32, torch.float16, torch.bfloat16",
    ),
    "complex": (
        GOOD, {"dtype": torch.complex64},
        "dtype torch.complex64 is not one of torch.float32, torch.float16, torch.bfloat16",
    ),
    "groups": (ConvSpec.make(65536 * 16, 65536 * 16, 1, groups=65536), {"size": (1, 1)},
               "groups=65536 exceeds the grid limit of 65535"),
    "input-image": (
        ConvSpec.make(32, 16, 1), {"size": (2**13, 2**13)}, "one input image has 2^31 elements or more"
    ),
    "output-image": (
        ConvSpec.make(16, 64, 2, 2), {"size": (2**12, 2**12)}, "one output image has 2^31 elements or more"
    ),
}  # fmt: skip


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("name", REASONS)
def test_why_not(name: str) -> None:
    spec, change, reason = REASONS[name]
    assert why_not(Step(spec), operands(spec, **change)) == reason


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_why_not_is_none(dtype: torch.dtype) -> None:
    fits = [
        GOOD,
        ConvSpec.make(16, 1, 3),
        ConvSpec.make(32, 32, 3, groups=2),
        ConvSpec.make(16, 4, 3, transposed=False),
        ConvSpec.make(32, 32, 3, (2, 1), transposed=False),
    ]
    for spec in fits:
        assert why_not(Step(spec), operands(spec, dtype)) is None


def test_why_not_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    triton_why_not.cache_clear()
    try:
        assert why_not(Step(GOOD), operands(GOOD)) == "triton is not installed"
        x = torch.randn(1, 32, 4, 4)
        with pytest.raises(RuntimeError, match='backend="triton" cannot run this: triton is not installed'):
            cnnfast.ops.conv_transpose2d(x, torch.randn(32, 32, 4, 4), backend="triton")
    finally:
        triton_why_not.cache_clear()


def test_old_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    cuda_why_not.cache_clear()
    try:
        assert cuda_why_not(0) == "compute capability 7.5 is below 8.0"
    finally:
        cuda_why_not.cache_clear()


def test_cpu_calls_do_not_import_triton() -> None:
    """`import cnnfast` and every call on CPU tensors work where triton is broken or absent."""
    code = """
        import sys
        sys.modules["triton"] = None  # importing it raises ImportError
        import torch, cnnfast
        x, w = torch.randn(1, 16, 4, 4), torch.randn(16, 8, 4, 4)
        y = cnnfast.ops.conv_transpose2d(x, w, None, 2, 1, activation="relu")
        torch.testing.assert_close(y, torch.relu(torch.nn.functional.conv_transpose2d(x, w, None, 2, 1)))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_backend_context() -> None:
    assert dispatch.resolve_backend(None) == "auto"
    with cnnfast.backend("aten"):
        assert dispatch.resolve_backend(None) == "aten"
        assert dispatch.resolve_backend("triton") == "triton"  # a call's own choice wins
        with cnnfast.backend("triton"):
            assert dispatch.resolve_backend(None) == "triton"
        assert dispatch.resolve_backend(None) == "aten"
    assert dispatch.resolve_backend(None) == "auto"


def test_backend_context_is_left_after_an_error() -> None:
    with pytest.raises(KeyError), cnnfast.backend("aten"):
        raise KeyError
    assert dispatch.resolve_backend(None) == "auto"


def test_backend_context_is_of_its_thread() -> None:
    seen = []
    with cnnfast.backend("aten"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.resolve_backend(None)))
        thread.start()
        thread.join()
    assert seen == ["auto"]


class Deep(torch.autograd.Function):
    """Backwards inside backwards: beyond 60, autograd goes on in a thread of its own, as it does for a GPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, depth: int, last: Any) -> torch.Tensor:
        ctx.depth, ctx.last = depth, last
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        with torch.enable_grad():
            y = ctx.last() if ctx.depth == 0 else Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1, ctx.last)
            y.sum().backward()
        return grad, None, None


def test_backend_context_follows_into_threads_of_autograd() -> None:
    """Where checkpointed calls are computed again on a GPU."""
    seen: list[tuple[bool, str]] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        seen.append((threading.current_thread() is threading.main_thread(), dispatch.resolve_backend(None)))
        return x * x

    def checkpointed() -> torch.Tensor:
        return checkpoint(note, torch.ones(1, requires_grad=True), use_reentrant=False)

    for name in ("aten", "triton"):
        with cnnfast.backend(name):
            Deep.apply(torch.ones(1, requires_grad=True), 70, checkpointed).sum().backward()
            assert seen == [(False, name)] * 2  # the forward, and the same again
            seen.clear()
    Deep.apply(torch.ones(1, requires_grad=True), 70, checkpointed).sum().backward()
    assert seen == [(False, "auto")] * 2


def test_backend_context_keeps_what_it_hands_to_autograd() -> None:
    """torch 2.11 takes over the reference that it is given. (An autograd thread of an earlier backward may let go of
    one in between.)"""
    before = sys.getrefcount(dispatch._NONE)
    for _ in range(100):
        with cnnfast.backend("aten"), cnnfast.backend("triton"):
            pass
    after = sys.getrefcount(dispatch._NONE)  # outside of the assert, for which pytest holds one more
    assert abs(after - before) <= 1


def test_backend_context_is_of_its_task() -> None:
    """Also inside a backward, in the same thread."""
    seen: list[str] = []

    async def one() -> None:
        with cnnfast.backend("aten"):
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def other() -> None:
        await asyncio.sleep(0)
        x = torch.ones(1, requires_grad=True)
        x.register_hook(lambda grad: seen.append(dispatch.resolve_backend(None)))
        x.sum().backward()

    async def both() -> None:
        await asyncio.gather(one(), other())

    asyncio.run(both())
    assert seen == ["auto"]


def test_unknown_backend() -> None:
    message = "unknown backend 'cudnn': expected one of auto, triton, aten"
    with pytest.raises(ValueError, match=message), cnnfast.backend("cudnn"):
        pass
    x, w = torch.randn(1, 16, 4, 4), torch.randn(16, 8, 4, 4)
    for function in (cnnfast.ops.conv_transpose2d, cnnfast.ops.upsample_conv2d):
        with pytest.raises(ValueError, match=message):
            function(x, w, backend="cudnn")


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("how", ["keyword", "context"])
def test_explicit_triton_that_cannot(how: str) -> None:
    x, w = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 4, 4)
    name = "triton" if how == "keyword" else None
    with cnnfast.backend("triton" if how == "context" else "auto"):
        with pytest.raises(RuntimeError, match='backend="triton" cannot run this: 8 input channels per group'):
            cnnfast.ops.conv_transpose2d(x, w, backend=name)
        double = torch.randn(1, 32, 4, 4, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"cannot run this: dtype torch\.float64 is not one of"):
            cnnfast.ops.conv_transpose2d(double, double.new_empty(32, 8, 4, 4), backend=name)
        complexes = torch.randn(1, 32, 4, 4, dtype=torch.complex64)
        with pytest.raises(RuntimeError, match=r"cannot run this: dtype torch\.complex64"):
            cnnfast.ops.conv_transpose2d(complexes, complexes.new_zeros(32, 8, 4, 4), backend=name)


# --- where nothing can be launched ------------------------------------------------------------------------------------


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As on a machine without a GPU. The driver's place, to put one there."""
    pytest.importorskip("triton", reason="triton is not installed")
    from triton import knobs
    from triton.runtime.driver import driver

    def none() -> None:
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    monkeypatch.setattr(driver, "_active", None)
    monkeypatch.setattr(driver, "_default", None)
    monkeypatch.setattr(sys.modules["triton.runtime.driver"], "_create_driver", none)
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    return driver


X, W = torch.randn(1, 32, 4, 4), torch.randn(32, 32, 3, 3)
CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "conv_transpose1d": lambda **k: cnnfast.ops.conv_transpose1d(X[:, :, 0], W[..., 0], **k),
    "conv_transpose2d": lambda **k: cnnfast.ops.conv_transpose2d(X, W, **k),
    "conv1d": lambda **k: cnnfast.ops.conv1d(X[:, :, 0], W[..., 0], **k),
    "conv2d": lambda **k: cnnfast.ops.conv2d(X, W, **k),
    "with a gradient": lambda **k: cnnfast.ops.conv2d(X, W.clone().requires_grad_(), **k),
    "upsample_conv2d": lambda **k: cnnfast.ops.upsample_conv2d(X, W, **k),
    "batch_norm": lambda **k: cnnfast.ops.batch_norm(X, None, None, training=True, **k),
    "instance_norm": lambda **k: cnnfast.ops.instance_norm(X, **k),
    "group_norm": lambda **k: cnnfast.ops.group_norm(X, 4, **k),
}


@pytest.mark.parametrize("how", ["keyword", "context"])
@pytest.mark.parametrize("name", CALLS)
def test_triton_without_a_gpu(name: str, how: str, no_driver: Any) -> None:
    """Said in the words of ``cnnfast env``."""
    assert NO_DEVICE == "no CUDA device"
    with cnnfast.backend("triton" if how == "context" else "auto"):
        with pytest.raises(RuntimeError, match='^backend="triton" cannot run this: no CUDA device$'):
            CALLS[name](**({"backend": "triton"} if how == "keyword" else {}))
    assert CALLS[name]().isfinite().all()


def test_explain_without_a_gpu(no_driver: Any) -> None:
    """What would raise is not called fused."""
    model = cnnfast.Sequential(nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU()).eval()
    few = cnnfast.Sequential(nn.ConvTranspose2d(8, 32, 4, 2, 1), nn.ReLU()).eval().requires_grad_(False)
    assert model.explain().endswith(" fused") and few.explain().endswith(" fused")
    with cnnfast.backend("triton"):
        for said in (model.explain(), model.explain(X)):
            assert said == "0-2: ConvTranspose2d + BatchNorm2d + ReLU could be fused, but: no CUDA device"
        assert few.explain().endswith("could be fused, but: 8 input channels per group are fewer than 16")
        for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with mode(), pytest.raises(RuntimeError, match='^backend="triton" cannot run this: no CUDA device$'):
                model(X)
    with cnnfast.backend("aten"):
        assert model.explain(X).endswith(" fused")


def test_what_stands_in_place_of_a_gpu_is_asked(no_driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An active driver says which tensors it takes; Triton's interpreter takes those of the CPU."""
    from triton import knobs

    class Driver:
        def __init__(self, device: str) -> None:
            self.device = device

        def get_active_torch_device(self) -> torch.device:
            return torch.device(self.device)

    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert launch_why_not(cpu) == launch_why_not(meta) == "no CUDA device"
    no_driver.set_active(Driver("cpu"))
    assert launch_why_not(cpu) is None
    assert launch_why_not(meta) == "the tensors are on meta, Triton launches on cpu"
    no_driver.set_active(Driver("cuda"))
    assert launch_why_not(cpu) == "the tensors are on cpu, Triton launches on cuda"
    with pytest.raises(RuntimeError, match="cannot run this: the tensors are on cpu, Triton launches on cuda$"):
        CALLS["conv2d"](backend="triton")
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert launch_why_not(cpu) is None
    assert launch_why_not(meta) == "the tensors are on meta, Triton's interpreter runs on the CPU"


def test_a_recording_driver_is_launched_on(no_driver: Any) -> None:
    from benchmarks.rehearse.inspector import recording

    model = cnnfast.Sequential(nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ReLU()).eval()
    with recording(90) as calls, cnnfast.backend("triton"), torch.no_grad():
        assert model.explain(X).endswith(" fused")
        model(X)
    assert calls and launch_why_not(torch.device("cpu")) == "no CUDA device"


# --- numerics ---------------------------------------------------------------------------------------------------------


def test_precision_follows_the_switch_of_convolutions() -> None:
    conv = torch.backends.cudnn.conv
    conv.fp32_precision = "tf32"
    assert conv_tf32() and precision_of(torch.float32).tf32
    assert not precision_of(torch.float16).tf32
    conv.fp32_precision = "ieee"
    assert not conv_tf32() and not precision_of(torch.float32).tf32


FORKED = """
    import os, sys, traceback
    import torch
    from cnnfast.gpu.devices import conv_tf32, tf32_convolutions
    cudnn = torch.backends.cudnn

    def forked(lines, then):
        sys.stdout.flush()
        if os.fork() == 0:  # in a process of its own: some states cannot be left again
            try:
                exec(lines)
                then()
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        assert os.wait()[1] == 0, lines
"""
SWITCHES = """
    for lines in sys.argv[1:]:
        forked(lines, lambda: print(conv_tf32()))
"""


def run_forked(code: str, states: Iterable[str]) -> str:
    command = [sys.executable, "-c", textwrap.dedent(FORKED) + textwrap.dedent(code), *states]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_switches_old_and_new_mixed() -> None:
    """No mixture raises, and the convolution's own switch, written last, decides."""
    expected = {
        "pass": True,
        "cudnn.allow_tf32 = False": False,
        "cudnn.allow_tf32 = True": True,
        "cudnn.conv.fp32_precision = 'ieee'": False,
        "cudnn.allow_tf32 = True; cudnn.conv.fp32_precision = 'ieee'": False,
        "cudnn.conv.fp32_precision = 'ieee'; cudnn.allow_tf32 = True": True,
        "cudnn.allow_tf32 = False; cudnn.conv.fp32_precision = 'tf32'": True,
        "torch.backends.cuda.matmul.allow_tf32 = True; cudnn.allow_tf32 = False": False,
        "cudnn.fp32_precision = 'ieee'": None,  # what the wider switches mean for a narrower one is torch's affair
        "torch.backends.fp32_precision = 'ieee'": None,
        "torch.set_float32_matmul_precision('high')": True,
    }
    found = dict(zip(expected, run_forked(SWITCHES, expected).split(), strict=True))
    assert found == {lines: found[lines] if on is None else str(on) for lines, on in expected.items()}


CONTEXT = """
    def old():
        try:
            return cudnn.allow_tf32
        except RuntimeError:
            return "raises"

    def state():
        return old(), cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, conv_tf32()

    def check():
        before = state()
        for on in (False, True):
            with tf32_convolutions(on):
                assert conv_tf32() is on, on
                assert old() in (on, "raises") and (old() == "raises") <= (before[0] == "raises"), old()
            assert state() == before, (before, state())
        try:
            with tf32_convolutions(not conv_tf32()):
                raise KeyError
        except KeyError:
            pass
        assert state() == before, (before, state())

    for lines in sys.argv[1:]:
        forked(lines, check)
    print(len(sys.argv) - 1)
"""


def test_tf32_convolutions_leaves_every_switch_as_it_was() -> None:
    states = [
        "pass",
        "cudnn.allow_tf32 = False",
        "cudnn.allow_tf32 = True",
        "cudnn.conv.fp32_precision = 'ieee'",
        "cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = 'ieee'",
        "cudnn.allow_tf32 = False; cudnn.conv.fp32_precision = 'tf32'",
        "cudnn.conv.fp32_precision = 'ieee'; cudnn.allow_tf32 = False",
        "cudnn.fp32_precision = 'ieee'",
        "torch.backends.fp32_precision = 'ieee'",
    ]
    assert run_forked(CONTEXT, states).strip() == str(len(states))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_allocate(channels_last: bool) -> None:
    like = torch.empty(1, dtype=torch.float16)
    y = allocate(like, (2, 3, 4, 5), channels_last)
    fmt = torch.channels_last if channels_last else torch.contiguous_format
    assert y.dtype == torch.float16 and y.is_contiguous(memory_format=fmt)
    assert allocate(like, (1, 1, 1, 1), channels_last, torch.float32).dtype == torch.float32


def test_steps_are_keys() -> None:
    assert hash(Step(GOOD)) == hash(Step(replace(GOOD))) and Step(GOOD) == Step(replace(GOOD))
