"""Prove on first use: kernels that are wrong, do not compile or do not fit end in PyTorch's operators, and say so."""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cnnfast
from cnnfast import store
from cnnfast.activations import Activation
from cnnfast.cpu import inference, methods
from cnnfast.cpu.packing import PACKS
from cnnfast.gpu import guard, trial
from cnnfast.norms import Norm
from cnnfast.ops.run import run_step
from cnnfast.reference import run_reference
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step

from ..cases import PRECISIONS, Case, reference
from ..conftest import conv_precision
from ..tolerance import assert_close
from .test_conv import REGIMES

STEP = Step(ConvSpec.make(32, 32, 4, 2, 1), Activation("relu"))


def operands(device: torch.device | str, batch: int = 2, dtype: torch.dtype = torch.float16) -> Operands:
    g = torch.Generator().manual_seed(1)
    x, w = torch.randn(batch, 32, 3, 4, generator=g), torch.randn(STEP.spec.weight_shape, generator=g) / 11
    x, w, b = (t.type(dtype).to(device) for t in (x, w, torch.randn(32, generator=g)))
    return Operands(x.contiguous(memory_format=torch.channels_last), w, b)


def forget() -> None:
    """As a new process starts."""
    from cnnfast.gpu import conv

    conv.prepare.cache_clear()
    guard.forget()
    store.forget()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CNNFAST_GUARD", "1")
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path))
    pytest.importorskip("triton", reason="triton is not installed")
    forget()
    yield tmp_path
    forget()


@pytest.fixture
def starts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch of every launch, trials included."""
    from cnnfast.gpu import conv

    record: list[int] = []
    real = conv._launch
    monkeypatch.setattr(conv, "_launch", lambda x, *rest: (record.append(x.shape[0]), real(x, *rest))[1])
    return record


Spoil = Callable[..., None]


@pytest.fixture
def spoil(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Launch kernels with other compile-time constants than the right ones."""
    from cnnfast.gpu import conv

    def change(**constants: Any) -> None:
        real = conv.constants
        monkeypatch.setattr(conv, "constants", lambda *a, **k: {**real(*a, **k), **constants})

    return change


def capture(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: on)


def run(o: Operands, step: Step = STEP, backend: str = "auto") -> torch.Tensor:
    with torch.no_grad():
        return run_step(step, o, channels_last=True, backend=backend)


def check(y: torch.Tensor, o: Operands, step: Step = STEP) -> None:
    exact, yardstick, before = reference(step, o, tf32=False)
    assert_close(y, exact, yardstick, "", before)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- a right kernel ---------------------------------------------------------------------------------------------------


def test_a_right_kernel_is_checked_once(device: torch.device, starts: list[int], cache: Path) -> None:
    o = operands(device)
    with silent():
        for _ in range(3):
            check(run(o), o)
    assert starts == [2, 2, 2, 2]  # the trial, then one launch a call
    (line,) = guard.report()
    assert line.startswith("conv_transpose 32 -> 32, kernel 4x4, float16, phases ") and line.endswith("right (checked)")
    assert len(list((cache / "proofs").iterdir())) == 1


def test_other_processes_do_not_check_again(device: torch.device, starts: list[int]) -> None:
    o = operands(device)
    run(o)
    forget()
    starts.clear()
    check(run(o), o)
    assert starts == [2]
    assert guard.report()[0].endswith("right (checked by an earlier process)")


@pytest.mark.parametrize("what", ["gpu", "triton", "torch", "kernels", "cnnfast"])
def test_a_proof_is_of_its_gpu_and_versions(
    what: str, device: torch.device, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    o = operands(device)
    run(o)
    forget()
    other = {**guard.environment(0), what: "another"}
    starts.clear()
    with monkeypatch.context() as patched:
        patched.setattr(guard, "environment", lambda index: other)
        run(o)
    assert starts == [2, 2]


def test_every_file_of_the_kernels_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import resources

    real = sorted(f.name for f in resources.files("cnnfast.kernels").iterdir() if f.name.endswith(".py"))
    assert {"conv_transpose.py", "conv_wgrad.py", "norm_act.py", "norm_act_backward.py", "weight.py"} <= set(real)
    folder = tmp_path / "kernels"
    shutil.copytree(str(resources.files("cnnfast.kernels")), folder)
    before = guard._sources()
    monkeypatch.setattr(guard.resources, "files", lambda name: folder)
    hashes = {before}
    for name in real:
        guard._sources.cache_clear()
        assert guard._sources() in hashes, "a copy is the same"
        (folder / name).write_text((folder / name).read_text() + "# changed")
        guard._sources.cache_clear()
        hashes.add(guard._sources())
    assert len(hashes) == 1 + len(real)
    guard._sources.cache_clear()


def test_a_damaged_proof_is_no_proof(device: torch.device, starts: list[int], cache: Path) -> None:
    o = operands(device)
    run(o)
    forget()
    for file in (cache / "proofs").iterdir():
        file.write_bytes(file.read_bytes()[:-20])
    starts.clear()
    check(run(o), o)
    assert starts == [2, 2]


def test_a_place_that_cannot_be_written(device: torch.device, cache: Path) -> None:
    (cache / "proofs").write_text("not a folder")
    o = operands(device)
    with silent():
        check(run(o), o)
    assert f"right (checked; cannot be kept in {cache / 'proofs'})" in guard.report()[0]


def test_one_proof_for_all_sizes_of_a_kernel(device: torch.device, starts: list[int]) -> None:
    for batch in (2, 3, 1):
        o = operands(device, batch)
        check(run(o), o)
    names = {line for line in guard.report()}
    assert len(starts) == 3 + len(names) < 6


def test_what_the_binary_depends_on_is_proven_apart(device: torch.device) -> None:
    o = operands(device)
    run(o)
    run(o._replace(bias=None))
    affine = replace(STEP, norm=Norm("affine"))
    run(o._replace(scale=torch.ones(32).to(device)), affine)
    run(o._replace(scale=torch.ones(32).half().to(device)), affine)
    run(o._replace(residual=torch.zeros(2, 32, 6, 8).half().to(device)), replace(STEP, residual=True))
    run(o, replace(STEP, activation=Activation("tanh")))
    with torch.no_grad():
        run_step(STEP, o, channels_last=False)
    assert len(guard.report()) == 7 and all("right" in line for line in guard.report())


def test_split_k_is_proven_with_its_second_kernel(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnfast.gpu import conv

    real = conv.choose_plan
    monkeypatch.setattr(conv, "choose_plan", lambda *a: replace(real(*a), splits=True, split_k=2))
    o = operands(device)
    check(run(o), o)
    monkeypatch.setattr(conv, "choose_plan", lambda *a: replace(real(*a), splits=True, split_k=1))
    conv.prepare.cache_clear()
    check(run(o), o)
    assert len(guard.report()) == 2


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_the_first_input_s_values_do_not_matter(value: float, device: torch.device, starts: list[int]) -> None:
    o = operands(device)
    with silent():
        run(o._replace(x=torch.full_like(o.x, value)))
    check(run(o), o)
    assert starts == [2, 2, 2] and guard.report()[0].endswith("right (checked)")


def test_operands_at_odd_addresses_are_the_same_kernel(device: torch.device, starts: list[int]) -> None:
    from cnnfast.gpu import conv

    o = operands(device)
    check(run(o), o)

    def odd(t: torch.Tensor) -> torch.Tensor:
        moved = t.new_zeros(t.numel() + 1)[1:].as_strided(t.shape, t.stride())
        return moved.copy_(t)

    seen = []
    real = conv._launch

    def look(x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, residual: Any, vectors: Any, *rest: Any) -> None:
        seen.extend(t.data_ptr() % 16 for t in (x, weight, y, *(v for v in vectors if v is not None)))
        real(x, weight, y, residual, vectors, *rest)

    conv._launch = look  # the fixture `starts` puts the real one back
    moved = Operands(*(odd(t) if isinstance(t, torch.Tensor) else t for t in o))
    assert moved.x.data_ptr() % 16
    check(run(moved), o)
    assert seen == [0] * 4 and len(guard.report()) == 1


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
@pytest.mark.parametrize("case", REGIMES, ids=lambda case: case.id)
def test_right_kernels_of_every_regime_pass(case: Case, precision: str, device: torch.device) -> None:
    from cnnfast.gpu import conv

    dtype, switch = PRECISIONS[precision]
    with conv_precision(switch), torch.no_grad():
        o = case.operands(dtype, device)
        plan = replace(conv.lookup(case.step, o, case.channels_last).plan, **dict(case.plan))
        for statistics in (None, "batch", "image"):
            how = dict(channels_last=case.channels_last, statistics=statistics, plan=plan)
            start = functools.partial(conv.run_with_statistics, case.step, **how)
            assert trial.problem(start, case.step, o, precision == "tf32") is None


# --- kernels that must not run ----------------------------------------------------------------------------------------

WRONG = {"tap": {"PAD_W": 0}, "activation": {"ACT": "identity"}, "channels": {"W_TAP": 0}}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel(name: str, device: torch.device, starts: list[int], spoil: Spoil, cache: Path) -> None:
    spoil(**WRONG[name])
    o = operands(device)
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(3):
            check(run(o), o)
    assert starts == [2]
    (warning,) = caught
    text = str(warning.message)
    assert text.startswith("cnnfast: conv_transpose 32 -> 32, kernel 4x4, float16, phases ")
    assert "the Triton kernel gave wrong results on " in text and "max error" in text
    assert text.endswith("PyTorch's operators run instead.")
    (line,) = guard.report()
    assert "PyTorch's operators run: the kernel gave wrong results" in line
    assert not list(cache.rglob("*.json")), "a failure was kept: a new driver may mend it"
    with pytest.raises(RuntimeError, match='backend="triton" cannot run this: the kernel gave wrong results on .*max'):
        run(o, backend="triton")


def test_a_wrong_kernel_is_found_by_a_first_input_of_zeros(device: torch.device, spoil: Spoil) -> None:
    spoil(**WRONG["tap"])
    o = operands(device)
    zeros = o._replace(x=torch.zeros_like(o.x), weight=torch.zeros_like(o.weight))
    with pytest.warns(RuntimeWarning, match="wrong results"):
        run(zeros)


def test_a_kernel_that_does_not_compile(device: torch.device, spoil: Spoil) -> None:
    spoil(ACT="nonsense")
    o = operands(device)
    with pytest.warns(RuntimeWarning) as caught:
        for _ in range(3):
            check(run(o), o)
    (warning,) = caught
    said = "cannot run on .*: CompileTimeAssertionFailure: .*activation without a device function"
    assert re.search(said, str(warning.message)) and re.search(said, guard.report()[0])
    with pytest.raises(RuntimeError, match=said):
        run(o, backend="triton")


def test_an_explicit_backend_raises_at_once_with_the_cause(device: torch.device, spoil: Spoil) -> None:
    from triton.compiler.errors import CompilationError

    spoil(ACT="nonsense")
    with silent(), pytest.raises(RuntimeError, match='backend="triton" cannot run this: the kernel') as caught:
        run(operands(device), backend="triton")
    assert isinstance(caught.value.__cause__, CompilationError)


@contextlib.contextmanager
def shared_memory_of_a_gpu() -> Iterator[None]:
    """ttsem counts shared memory where it is told to; a GPU does by itself."""
    if torch.version.cuda is not None:
        yield
        return
    from ttsem import sanitize

    with sanitize.session() as session:
        session.shared_limit = (90, 232448)
        yield


def test_a_kernel_that_asks_for_too_much_shared_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnfast.gpu import conv

    real = conv.choose_plan
    big = dict(block_m=128, block_n=128, block_k=32, num_stages=32, num_warps=8)
    monkeypatch.setattr(conv, "choose_plan", lambda *a: replace(real(*a), **big))
    with shared_memory_of_a_gpu():
        o = operands(device)
        with pytest.warns(RuntimeWarning, match="cannot run on .*shared memory") as caught:
            for _ in range(3):
                check(run(o), o)
        assert len(caught) == 1
        assert "shared memory" in guard.report()[0]
        with pytest.raises(RuntimeError, match="shared memory"):
            run(o, backend="triton")


def test_explain_names_the_failure(device: torch.device, spoil: Spoil) -> None:
    model = cnnfast.Sequential(nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ReLU(), nn.Flatten())
    model = model.half().eval().to(device)
    assert "PyTorch's operators run" not in model.explain()
    spoil(PAD_W=0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="wrong results"), cnnfast.backend("triton"):
        model(operands(device).x)
    first, second = model.explain().splitlines()
    assert "fused, but PyTorch's operators run: the kernel phases " in first and "gave wrong results on" in first
    assert "wrong results" not in second
    assert guard.failures(STEP, torch.float16, torch.device("cpu")) == []


def test_a_kernel_fault_is_not_taken_for_a_failure(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what Triton's compiler or driver raises counts."""
    from cnnfast.gpu import conv

    def broken(*args: Any) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr(conv, "_launch", broken)
    for backend in ("auto", "triton"):
        with silent(), pytest.raises(ValueError, match="a mistake"):
            run(operands(device), backend=backend)


def test_the_switch(device: torch.device, starts: list[int], spoil: Spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNFAST_GUARD", "0")
    spoil(ACT="identity")
    o = operands(device)
    with silent():
        y = run(o)
    assert starts == [2] and (y < 0).any(), "the kernel's own result, as it is"
    assert guard.report()[0].endswith("not checked (CNNFAST_GUARD=0)")
    forget()
    from triton.compiler.errors import CompilationError

    spoil(ACT="nonsense")
    with pytest.raises(CompilationError):
        run(o)


# --- out of memory ----------------------------------------------------------------------------------------------------


def test_out_of_memory_in_the_check(device: torch.device, starts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    real, tries = trial.expected, []

    def full(*args: Any) -> Any:
        tries.append(1)
        if len(tries) < 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return real(*args)

    monkeypatch.setattr(trial, "expected", full)
    o = operands(device)
    with silent():
        check(run(o), o)
        assert starts == [2] and "not checked yet, PyTorch's operators run: OutOfMemoryError" in guard.report()[0]
        counts = []
        for _ in range(6):
            check(run(o), o)
            counts.append(len(tries))
    assert counts == [2, 3, 3, 4, 4, 4], "not at every call"
    assert guard.report()[0].endswith("right (checked)")


def test_out_of_memory_in_the_check_of_an_explicit_backend(
    device: torch.device, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial, "expected", full)
    o = operands(device)
    check(run(o, backend="triton"), o)
    assert starts == [2, 2], "the trial and the launch that was asked for"


def test_out_of_memory_in_the_launch_is_the_caller_s(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnfast.gpu import conv

    monkeypatch.setenv("CNNFAST_GUARD", "0")

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(conv, "_launch", full)
    with pytest.raises(torch.OutOfMemoryError):
        run(operands(device))


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["new", "proven-by-another-process"])
@pytest.mark.parametrize("switch", ["0", "1"])
def test_capture_of_a_kernel_that_was_not_used(
    switch: str, known: bool, device: torch.device, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNNFAST_GUARD", switch)
    o = operands(device)
    if known:
        run(o)
        forget()
        starts.clear()
    capture(monkeypatch, True)
    with pytest.warns(RuntimeWarning, match="call cnnfast.warmup first. The graph holds PyTorch's") as caught:
        for _ in range(2):
            check(run(o), o)
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match='backend="triton" cannot run this: a CUDA graph is being captured'):
        run(o, backend="triton")
    assert not starts, "launched in a capture"
    capture(monkeypatch, False)
    with silent():
        check(run(o), o)
    assert starts == [2] * (2 if switch == "1" and not known else 1)


def test_a_failure_is_told_of_after_a_capture_that_missed_it(
    device: torch.device, spoil: Spoil, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(**WRONG["tap"])
    capture(monkeypatch, True)
    o = operands(device)
    with pytest.warns(RuntimeWarning, match="call cnnfast.warmup first"):
        run(o)
    capture(monkeypatch, False)
    with pytest.warns(RuntimeWarning, match="gave wrong results"):
        run(o)


def test_capture_after_warmup(device: torch.device, starts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = cnnfast.Sequential(nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ReLU()).half().eval().to(device)
    with cnnfast.backend("triton"):
        cnnfast.warmup(model, operands(device, 1).x, batch_sizes=(2, 4))
        assert len(starts) == 3 + len(guard.report())
        capture(monkeypatch, True)
        monkeypatch.setattr(guard, "first_use", None)
        starts.clear()
        with silent(), torch.no_grad():
            for n in (1, 2, 4):
                model(operands(device, n).x)
    assert starts == [1, 2, 4]


# --- without a GPU, Triton's own errors -------------------------------------------------------------------------------


def a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a card")


@pytest.fixture
def no_ttsem() -> None:
    if "ttsem" in sys.modules:
        pytest.skip("ttsem stands in the place of Triton and the device")


@pytest.fixture
def pretended(no_ttsem: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An RTX 3090 for which launches are compiled and do nothing, and CPU tensors that count as its."""
    from benchmarks.rehearse.inspector import target
    from cnnfast.gpu.devices import DEVICES

    with target(86), monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
        patched.setattr(torch.cuda, "current_device", lambda: 0)
        a_card(patched)
        patched.setattr("cnnfast.gpu.conv.target_device", lambda x: DEVICES[86])
        patched.setattr("cnnfast.gpu.why_not.cuda_why_not", lambda index: None)
        yield


@pytest.mark.usefixtures("pretended")
def test_too_much_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    from cnnfast.gpu import conv

    real = conv.choose_plan
    big = dict(block_m=128, block_n=128, block_k=32, num_stages=8, num_warps=8)
    monkeypatch.setattr(conv, "choose_plan", lambda *a: replace(real(*a), **big))
    o = operands("cpu")
    with pytest.warns(
        RuntimeWarning, match="cannot run on a card: OutOfResources: out of resource: shared memory"
    ) as w:
        for _ in range(3):
            check(run(o), o)
    assert len(w) == 1 and "Hardware limit: 101376" in guard.report()[0]
    with pytest.raises(guard.Refused) as caught:
        run(o, backend="triton")
    assert "shared memory" in str(caught.value)
    forget()
    with pytest.raises(guard.Refused) as caught:
        run(o, backend="triton")
    assert isinstance(caught.value.__cause__, OutOfResources)


@pytest.mark.usefixtures("pretended")
def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """ptxas refuses; the same reason is told of once, for whatever number of layers."""
    from triton import knobs
    from triton.backends.nvidia import compiler

    class Broken:
        path, version = "/bin/false", "12.9"

    monkeypatch.setattr(compiler, "get_ptxas", lambda *a: Broken())
    monkeypatch.setattr(knobs.compilation, "always_compile", True)
    o = operands("cpu")
    with pytest.warns(RuntimeWarning, match="cannot run on a card: PTXASError: PTXAS error: .*failed") as w:
        check(run(o), o)
        tanh = replace(STEP, activation=Activation("tanh"))
        check(run(o, tanh), o, tanh)
    assert len(guard.report()) == 2 and 1 <= len(w) <= 2  # the text names a temporary file
    assert all("PyTorch's operators run: the kernel cannot run" in line for line in guard.report())


@pytest.mark.usefixtures("pretended")
def test_a_launch_that_writes_nothing() -> None:
    o = operands("cpu")
    with pytest.warns(RuntimeWarning, match="gave wrong results on a card"):
        check(run(o), o)


# --- without a kernel -------------------------------------------------------------------------------------------------


def test_noise_is_like_the_operands() -> None:
    o = operands("cpu", 300)._replace(var=torch.zeros(32), mean=torch.zeros(32))
    o = o._replace(x=o.x.contiguous(), slope=torch.zeros(1))
    noise = trial.noise(STEP, o)
    for name, like in o._asdict().items():
        got = getattr(noise, name)
        if isinstance(like, torch.Tensor):
            assert got.shape == like.shape and got.stride() == like.stride() and got.dtype == like.dtype
            assert got.isfinite().all() and (got != 0).any()
        else:
            assert got == like
    assert noise.x.numel() > trial._PERIOD and noise.var.min() > 0
    assert noise.x.float().std().item() == pytest.approx(1, abs=0.02)
    y = torch.nn.functional.conv_transpose2d(noise.x.float(), noise.weight.float(), None, 2, 1)[:, :, 2:4, 2:4]
    assert y.std().item() == pytest.approx(1, abs=0.1)
    rows = noise.x.permute(0, 2, 3, 1).reshape(-1, 32)
    assert len(torch.unique(rows, dim=0)) > 0.99 * len(rows), "rows repeat: a wrong row could look right"
    again = trial.noise(STEP, o)
    assert all(torch.equal(a, b) for a, b in zip(noise, again, strict=True) if isinstance(a, torch.Tensor))


@pytest.mark.usefixtures("no_ttsem")
def test_autocast_does_not_loosen_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    a_card(monkeypatch)
    o = operands("cpu", dtype=torch.float32)

    def start(o: Operands, off: float) -> tuple[torch.Tensor, None]:
        with torch.autocast("cpu", enabled=False):
            return run_reference(STEP, o) * (1 + off), None

    for off, right in ((0.0, True), (1e-3, False)):
        proof = guard.Proof("a plan", STEP, 0, {"off": off})
        first = functools.partial(start, off=off)
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = guard.first_use(
                proof, functools.partial(first, o), functools.partial(trial.problem, first, STEP, o, False), False
            )
        assert (y is not None) is right is proof.ready, proof.state


def test_the_same_reason_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    a_card(monkeypatch)

    def start() -> Any:
        raise OutOfResources(3, 2, "shared memory")

    with pytest.warns(RuntimeWarning, match="shared memory") as caught:
        for name in ("one", "two"):
            assert guard.first_use(guard.Proof(name, STEP, 0), start, start, False) is None
    assert len(caught) == 1


def test_whose_failure() -> None:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    for error in (
        OutOfResources(300_000, 232_448, "shared memory"),
        PTXASError("no"),
        CompilationError("", None, "no"),
    ):
        assert trial.is_kernel_failure(error)
    for error in (ValueError("a mistake"), RuntimeError("a size"), torch.OutOfMemoryError("CUDA out of memory")):
        assert not trial.is_kernel_failure(error)
    assert not trial.is_kernel_failure(RuntimeError("Triton Error [CUDA]: out of memory"))


def test_plain_exceptions_out_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing C compiler, a failing one."""
    from triton.runtime import build

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="Failed to find C compiler") as caught:
        build._build("a", "a.c", ".", [], [], [], [])
    assert trial.is_kernel_failure(caught.value)
    monkeypatch.setenv("CC", sys.executable)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build._build("a", "/nowhere/a.c", ".", [], [], [], [])
    assert trial.is_kernel_failure(failed.value)


def test_warmup_runs_every_batch_without_gradients() -> None:
    seen: list[tuple[Any, ...]] = []

    def function(x: torch.Tensor, scale: float, z: torch.Tensor) -> None:
        last = x.is_contiguous(memory_format=torch.channels_last)
        seen.append((tuple(x.shape), last, scale, tuple(z.shape), torch.is_grad_enabled()))

    x = torch.randn(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)
    cnnfast.warmup(function, x, 2.0, torch.randn(2, 5), batch_sizes=(1, 4))
    assert seen == [((n, 8, 3, 4), True, 2.0, (n, 5), False) for n in (2, 2, 1, 1, 4, 4)]  # twice: it is a CPU


def test_warmup_packs_the_weights_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = cnnfast.Sequential(nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.Tanh()).eval(), torch.randn(2, 64, 16, 16)
    cnnfast.warmup(model, x)
    gc.collect()  # what models of other tests left
    packs = len(PACKS)
    monkeypatch.setattr(inference, "packed", lambda *args: pytest.fail("packed after warmup"))
    with torch.inference_mode():
        model(x)
    assert len(PACKS) == packs and (packs or methods.why_missing() is not None)


def test_warmup_refuses() -> None:
    model = cnnfast.Sequential(nn.ConvTranspose2d(4, 4, 2))
    x = torch.randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match="warmup of a module in training mode: call its eval"):
        cnnfast.warmup(model, x)
    with pytest.raises(ValueError, match="warmup with backward=True of a function: give the module itself"):
        cnnfast.warmup(lambda x: model(x), x, backward=True)
    frozen = nn.Sequential(nn.ConvTranspose2d(4, 4, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="no result of Sequential requires a gradient"):
        cnnfast.warmup(frozen, x, backward=True)
    with pytest.raises(ValueError, match=r"batch_sizes=\[1, 0\] must be positive"):
        cnnfast.warmup(model.eval(), x, batch_sizes=(1, 0))


def test_warmup_refuses_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    capture(monkeypatch, True)
    with pytest.raises(RuntimeError, match="inside a CUDA graph capture"):
        cnnfast.warmup(lambda x: x, torch.randn(1, 2))


# --- the variable -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["0", "off", "OFF", "false", "False", "no", " No "])
def test_words_for_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNFAST_GUARD", value)
    with silent():
        assert not guard.enabled()


@pytest.mark.parametrize("value", [None, "", "1", "on", "True", "YES"])
def test_words_for_on(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CNNFAST_GUARD", raising=False)
    if value is not None:
        monkeypatch.setenv("CNNFAST_GUARD", value)
    with silent():
        assert guard.enabled()


def test_another_word_is_said_once_and_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    guard.forget()
    monkeypatch.setenv("CNNFAST_GUARD", "nope")
    expected = "CNNFAST_GUARD=nope: expected 0, off, false, no, or 1, on, true, yes. Kernels are checked."
    with pytest.warns(cnnfast.CnnfastWarning, match=expected) as caught:
        assert guard.enabled() and guard.enabled()
    assert len(caught) == 1
