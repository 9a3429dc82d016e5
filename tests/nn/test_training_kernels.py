"""What `test_training_features` asks of a CPU, of the Triton kernels, by both ways through a block (`gpu/block.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cnnfast
from cnnfast.gpu.observers import observed

from ..conftest import conv_precision
from .test_training_features import CL, FUSED, Models, Outcome, compare


@pytest.fixture
def straight(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which halves of a block went the straight way."""
    from cnnfast.gpu import block

    went: list[str] = []

    def spy(name: str) -> None:
        real: Callable[..., Any] = getattr(block, name)

        def watched(*args: Any) -> Any:
            found = real(*args)
            if found is not None:
                went.append(name)
            return found

        monkeypatch.setattr(block, name, watched)

    spy("_straight_forward")
    spy("_straight_backward")
    return went


def here(outcome: Outcome) -> Outcome:
    return {name: t.cpu() for name, t in outcome.items()}


@pytest.mark.parametrize("scenario", FUSED, ids=lambda s: s.__name__)
def test_scenario(scenario: Callable[[Models], Outcome], device: torch.device, straight: list[str]) -> None:
    ours = Models(cnnfast.Sequential, memory_format=CL, device=device)
    with cnnfast.backend("triton"), conv_precision("ieee"):
        with observed(launch=lambda name: None):  # by the general way
            first = here(scenario(ours))
        assert not straight
        got = here(scenario(ours))
    assert "_straight_forward" in straight
    assert all(torch.equal(got[name], value) for name, value in first.items()), "the two ways differ"
    eager = [scenario(Models(memory_format=f)) for f in (torch.contiguous_format, CL)]
    compare(got, scenario(Models(dtype=torch.float64)), *eager, what=scenario.__name__)
