"""The README: its code runs, what it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import cnnfast
from benchmarks import readme
from cnnfast.nn import chain

from .tolerance import assert_close

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_drop_in_runs_fused_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", TEXT, re.S)[0]
    assert len([line for line in code.splitlines() if line]) == 5
    steps = []
    run_step = chain.run_step
    monkeypatch.setattr(chain, "run_step", lambda *args, **kw: (steps.append(args[0]), run_step(*args, **kw))[1])
    monkeypatch.setattr("cnnfast.cpu.backend._ready", lambda *how: None)  # all by `run_step`
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    model, images = names["model"], names["images"]
    assert type(model) is cnnfast.Sequential and isinstance(images, torch.Tensor) and images.shape == (1, 64, 32, 32)
    assert [step.activation.name for step in steps] == ["relu"], "one fused step"
    x = torch.randn(1, 128, 16, 16)
    with torch.inference_mode():
        assert_close(model(x), nn.Sequential(*model).double()(x.double()), nn.Sequential(*model).float()(x))


def test_files_and_commands_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", TEXT):
        assert (ROOT / (path[0] or path[1])).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([a-z-]+)", TEXT)) | set(re.findall(r"^make ([a-z-]+)", TEXT, re.M))
    assert named and named <= targets, named - targets


def test_gpu_status_is_stated() -> None:
    assert "No kernel has run on a physical GPU yet" in TEXT


def test_times_are_those_of_the_results_file() -> None:
    assert readme.render(TEXT, json.loads(readme.DEFAULT.read_text())) == TEXT, "run python -m benchmarks.readme"
