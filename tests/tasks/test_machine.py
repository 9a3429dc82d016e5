"""What is said of packages, devices and memory before any work."""

from __future__ import annotations

import os

import pytest
import torch

from cnnfast.messages import CnnfastError, UsageError
from cnnfast.tasks import machine


@pytest.mark.parametrize("device", ["meta", "gpu", "", "cuda:-1", "cuda:99", "vulkan", "hpu", "xla", "mkldnn", "cpu:x"])
def test_devices_that_cannot_compute(device: str) -> None:
    with pytest.raises(UsageError, match=f"^--device {device}: [^\n]+$"):
        machine.choose_device(device)


def test_devices_that_can() -> None:
    assert machine.choose_device("cpu") == machine.choose_device("cpu:1") == torch.device("cpu")
    assert machine.choose_device(None).type in ("cpu", "cuda")


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    machine.require_memory(1, "nothing")
    message = r"^out of memory: --width 9 needs at least 1,048,576 GiB, this machine has [\d,]+$"
    if hasattr(os, "sysconf"):
        with pytest.raises(CnnfastError, match=message):
            machine.require_memory(2**50, "--width 9")
    monkeypatch.delattr(os, "sysconf", raising=False)
    machine.require_memory(2**50, "a system that does not tell")
