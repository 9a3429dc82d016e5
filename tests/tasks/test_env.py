"""``python -m cnnfast env``: what it reports, and the reasons it gives on machines unlike this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cnnfast
from cnnfast import store
from cnnfast.cpu import onednn
from cnnfast.gpu import guard
from cnnfast.tasks import env


def backend_off(name: str) -> str | None:
    return {b.name: b.off for b in env.backends()}[name]


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.fixture
def no_cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)


def test_report_names_versions_and_every_backend() -> None:
    report = env.report()
    for part in (cnnfast.__version__, torch.__version__, "triton", "numpy", sys.executable, "processor"):
        assert part in report
    for backend in env.backends():
        assert f"backend {backend.name}" in report


def test_the_check_of_kernels_and_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path))
    store.put(guard.KIND, {"kernel": 1}, {})
    assert f"off: CNNFAST_GUARD=0; 1 passed, kept in {tmp_path / 'proofs'}" in env.report()
    monkeypatch.setenv("CNNFAST_GUARD", "Off")
    assert "off: CNNFAST_GUARD=Off; 1 passed" in env.report()
    monkeypatch.delenv("CNNFAST_GUARD")
    assert f"on; 1 passed, kept in {tmp_path / 'proofs'}" in env.report()
    assert f"0, kept in {tmp_path / 'plans'}" in env.report()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path / "file"))
    assert "on; 0 passed" in env.report()


@pytest.mark.skipif(os.name != "posix", reason="modes as POSIX has them")
def test_a_store_that_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CNNFAST_CACHE", str(tmp_path))
    store.put("plans", {"kernel": 1}, {})
    (tmp_path / "plans").chmod(0o777)
    assert f"0, kept in {tmp_path / 'plans'} (not used: others can write" in env.report()


def test_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "cnnfast", "env"], capture_output=True, text=True, check=True)
    assert f"cnnfast {cnnfast.__version__}" in " ".join(done.stdout.split())


def test_onednn_limit_is_shown() -> None:
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}  # oneDNN reads it once, so this takes a new process
    command = [sys.executable, "-m", "cnnfast", "env"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=limited)
    assert "limited by ONEDNN_MAX_CPU_ISA=AVX2" in done.stdout
    assert "AMX (oneDNN)" not in done.stdout and "AVX512 (oneDNN)" not in done.stdout


def test_a_visible_device_that_a_cpu_build_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cuda_build: None
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1234)'")
    assert env.visible_nvidia_devices() == ["GPU 0: NVIDIA H100"]
    problem = env.nvidia_problem()
    assert problem is not None and "GPU 0: NVIDIA H100" in problem
    assert f"this torch ({torch.__version__}) is built without CUDA" in problem
    assert problem in env.report()


def test_cuda_that_fails_to_initialise_gives_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nMore text.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(env, "visible_nvidia_devices", lambda: ["/dev/nvidia0"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    problem = env.nvidia_problem()
    assert problem is not None and "driver on your system is too old" in problem and "More text" not in problem
    assert "CUDA_VISIBLE_DEVICES='7'" in problem


def test_nvidia_smi_without_a_device_is_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'No devices were found'; exit 6")
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert env.visible_nvidia_devices() == []
    assert env.nvidia_problem() is None


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not installed" in (backend_off("triton") or "")


def test_triton_without_a_device(monkeypatch: pytest.MonkeyPatch, no_cuda_build: None) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(env, "visible_nvidia_devices", lambda: [])
    assert backend_off("triton") == "no CUDA device"


def test_triton_on_an_old_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(env, "cuda_error", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(env, "cuda_why_not", lambda index: f"cuda:{index} is too old")
    assert backend_off("triton") == "cuda:3 is too old"


def test_onednn_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "why_missing", lambda: "no oneDNN here")
    assert backend_off("aten, oneDNN packed") == "no oneDNN here"
    assert backend_off("aten") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_working_device_has_no_problem() -> None:
    assert env.nvidia_problem() is None and env.cuda_error() is None
    assert torch.cuda.get_device_name(0) in env.report()
