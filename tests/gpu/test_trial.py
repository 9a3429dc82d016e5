"""A trial by itself, on functions that stand for kernels: what it runs under, and whose an error is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cnnfast.activations import Activation
from cnnfast.gpu import guard, trial
from cnnfast.reference import run_reference
from cnnfast.spec import ConvSpec
from cnnfast.step import Operands, Step

pytest.importorskip("triton", reason="triton is not installed")

STEP = Step(ConvSpec.make(16, 16, 4, 2, 1), Activation("relu"))
X, WEIGHT = torch.empty(2, 16, 3, 4), torch.empty(STEP.spec.weight_shape)
OPERANDS = Operands(X, WEIGHT)


def right(o: Operands) -> tuple[torch.Tensor, None]:
    return run_reference(STEP, o), None


def problem(start: Any = right) -> str | None:
    return trial.problem(start, STEP, OPERANDS, False)


def problem_of(run: Any = torch.square) -> str | None:
    return trial.problem_of(lambda x: {"y": run(x)}, lambda x: {"y": x * x}, {"x": X})


TRIALS = {"convolution": problem, "another kernel": problem_of}


@pytest.fixture
def device_error() -> Any:
    return torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What the device says when it is waited for, one after the other."""
    answers: list[Exception | None] = []

    def synchronize() -> None:
        if answers and (error := answers.pop(0)) is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return answers


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("name", TRIALS)
def test_without_cudnns_search(name: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the kernel's turn and in the reference's, as it was afterwards, also after an error."""
    seen: list[bool] = []

    def note(*args: Any) -> Any:
        seen.append(torch.backends.cudnn.benchmark)
        return right(*args) if name == "convolution" else torch.square(*args)

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", on)
    real = trial.verdict
    monkeypatch.setattr(trial, "verdict", lambda *a: (seen.append(torch.backends.cudnn.benchmark), real(*a))[1])
    assert TRIALS[name](note) is None
    assert seen == [False, False] and torch.backends.cudnn.benchmark is on
    with pytest.raises(ZeroDivisionError):
        TRIALS[name](lambda *args: 1 / 0)
    assert torch.backends.cudnn.benchmark is on


@pytest.mark.parametrize("name", TRIALS)
def test_an_error_of_the_device_is_the_kernels(
    name: str, waits: list[Exception | None], device_error: Exception
) -> None:
    """A launch does not wait: it is told of when something does, and not by the reference, as one that could not be
    held."""
    waits[:] = [None, device_error]
    with pytest.raises(trial.KernelError) as caught:
        TRIALS[name]()
    assert trial.is_kernel_failure(caught.value)
    assert trial.said(caught.value) == "AcceleratorError: CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize("name", TRIALS)
def test_an_error_of_earlier_work_is_not(name: str, waits: list[Exception | None], device_error: Exception) -> None:
    waits[:] = [device_error]
    with pytest.raises(torch.AcceleratorError) as caught:
        TRIALS[name]()
    assert not trial.is_kernel_failure(caught.value)


@pytest.mark.parametrize("name", TRIALS)
def test_a_device_out_of_memory_decides_nothing(name: str, waits: list[Exception | None]) -> None:
    waits[:] = [None, torch.AcceleratorError("CUDA error: out of memory")]
    with pytest.raises(trial.Undecided):
        TRIALS[name]()


def test_such_a_kernel_is_not_used_again(
    waits: list[Exception | None], device_error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CNNFAST_GUARD", "1")
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(guard, "environment", lambda index: {"gpu": "a GPU"})
    monkeypatch.setattr(guard, "capturing", lambda: False)
    proof = guard.Proof("phases 64x64x64", STEP, 0)
    waits[:] = [None, device_error]
    with pytest.warns(UserWarning, match="cannot run on a GPU: AcceleratorError: CUDA error: an illegal memory"):
        assert guard.first_use(proof, lambda: "started", problem, False) is None
    assert proof.why_not is not None and not proof.ready
    with pytest.raises(guard.Refused, match="an illegal memory access"):
        guard.first_use(proof, lambda: "started", problem, True)
