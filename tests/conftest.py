"""Fixtures of the kernel tests: where they run, in which precision, and a record of what was launched."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch

TEST_DEVICE = "CNNFAST_TEST_DEVICE"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernel: launches a Triton kernel (every test that takes the fixture `device`)")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's, for what runs in the background: tests stop, too
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "device" in getattr(item, "fixturenames", ()):
            item.add_marker("kernel")


_statements = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def state(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Put a line into the summary at the end of the run (what a test did, beside that it passed)."""
    return request.config.stash.setdefault(_statements, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(_statements, []):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def small_chains() -> Iterator[None]:
    """Maps of tests are small and stand for larger ones, and layers for generators: chains run fused whatever their
    size, and so do accelerated models. (Tests of those rules set `backend.SMALL`, the wrapped
    `backend._converts_anyway` and `backend._saves_conversions`, and `accelerate_worth.FINDING`, again.)"""
    from cnnfast.cpu import backend
    from cnnfast.nn import accelerate_worth

    saves, converts = backend._saves_conversions, backend._converts_anyway

    @functools.wraps(saves)
    def as_without_gradients(steps: Any, elements: list[int], gradient: bool) -> bool:
        return saves(steps, elements, False)

    @functools.wraps(converts)
    def always(steps: Any, shapes: Any) -> bool:
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "SMALL", 0)  # of training; in inference it is `_converts_anyway`'s
        patch.setattr(backend, "_converts_anyway", always)
        patch.setattr(backend, "SMALL_IN_TRAINING", 0)
        patch.setattr(backend, "LEAST_SAVED", 0)
        patch.setattr(backend, "_saves_conversions", as_without_gradients)
        patch.setattr(accelerate_worth, "FINDING", -1.0)
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of many tiny operators: on a busy machine OpenMP's barriers would take far longer than they do. Random numbers
    begin anew."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run: a CUDA device (a real one, or ttsem's), else CPU tensors where CNNFAST_TEST_DEVICE=cpu
    says that Triton's interpreter or an emulating driver takes them."""
    pytest.importorskip("triton", reason="triton is not installed")
    wanted = os.environ.get(TEST_DEVICE, "cuda")
    if wanted not in ("cpu", "cuda"):
        raise ValueError(f"{TEST_DEVICE}={wanted!r}: expected cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        pytest.skip(
            "no CUDA device: run under `python -m ttsem.sanitize pytest`, or with TRITON_INTERPRET=1 and "
            f"{TEST_DEVICE}=cpu"
        )
    return torch.device(wanted)


@pytest.fixture
def interpreter() -> None:
    """Triton's interpreter, as far as it can run loops whose bounds are known at run time only."""
    triton = pytest.importorskip("triton", reason="triton is not installed")
    versions = [tuple(int(n) for n in m.__version__.split(".")[:2]) for m in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        pytest.skip(
            f"the interpreter of Triton {triton.__version__} takes int() of arrays of one element, which NumPy 2.4 and "
            f"newer refuse (here {numpy.__version__}): a newer Triton or an older NumPy runs this test"
        )


@pytest.fixture
def launches(device: torch.device) -> Iterator[list[str]]:
    """The plans of the Triton launches of the test, in order."""
    from cnnfast.gpu.observers import observed

    record: list[str] = []
    with observed(launch=record.append):
        yield record


@pytest.fixture
def poison() -> Iterator[None]:
    """Uninitialised memory is NaN: an element that a kernel does not write cannot look right."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(64).isnan().all()
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def unguarded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No check at a kernel's first use, which would launch everything twice: the tests check results themselves. And no
    plans that were tuned on this machine."""
    monkeypatch.setenv("CNNFAST_GUARD", "0")
    if "device" in request.fixturenames:
        monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


_kinds: dict[Any, object] = {}  # of every `Binary` launched in this process: what its first launch asked of Triton


@pytest.fixture(autouse=True)
def binaries_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is launched: all arguments of a `Binary` want the binary that those of its first launch wanted (their
    dtypes, divisibility and values, as Triton specialises on them)."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from cnnfast.gpu.binary import Binary

    real = Binary.__call__

    def call(self: Binary, grid: tuple[int, int, int], *args: Any) -> None:
        if isinstance(self.kernel, JITFunction):  # Triton's interpreter compiles nothing
            binder = self.kernel.device_caches[driver.active.get_current_device()][-1]
            _, specialization, _ = binder(*args, *self.constants, **self.options)
            assert _kinds.setdefault(self, specialization) == specialization, self.kernel
        real(self, grid, *args)

    monkeypatch.setattr(Binary, "__call__", call)


@contextmanager
def conv_precision(value: str) -> Iterator[None]:
    """PyTorch's switch for float32 convolutions on CUDA: "tf32" or "ieee"."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = value
    try:
        yield
    finally:
        conv.fp32_precision = before


@pytest.fixture(autouse=True)
def restored_precision() -> Iterator[None]:
    """No test leaves PyTorch's precision switches changed, the older ones and the newer."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    old, new = (cudnn.allow_tf32, matmul.allow_tf32), (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
    yield
    cudnn.allow_tf32, matmul.allow_tf32 = old
    if (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) != new:
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = new


@pytest.fixture
def gluon_under_ttsem(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ttsem 0.1.0 lacks to run a Gluon kernel: such a kernel has no TTIR, it begins as TTGIR; and what it stores
    through a host descriptor must come back into the descriptor's tensor. (Nothing where ttsem does not run this.)"""
    harness: Any = sys.modules.get("ttsem.harness")
    if harness is None:
        return
    from ttsem import mlir

    read, run = harness.ir_for_launch, harness.execute

    def ir_for_launch(record: Any, stage: str, target: Any, *rest: Any) -> str:
        if not record.fn.is_gluon():
            return read(record, stage, target, *rest)
        mlir.enable_generic_printing()
        return mlir.to_generic(harness._stage_text(record, "ttgir", target), None)

    def execute(record: Any, *args: Any, **kwargs: Any) -> Any:
        done = run(record, *args, **kwargs)
        for name, value in record.bound.items():
            if done.failure is None and hasattr(value, "block_shape"):
                bits = numpy.ascontiguousarray(done.buffer(record, name)).view(numpy.uint8).reshape(-1)
                into = torch.empty(0, dtype=torch.uint8).set_(value.base.untyped_storage())
                into[: bits.size].copy_(torch.from_numpy(bits.copy()))
        return done

    monkeypatch.setattr(harness, "ir_for_launch", ir_for_launch)
    monkeypatch.setattr(harness, "execute", execute)
