"""What `test_training_features` asks of a CPU, of the Triton kernels, by both ways through a block (`gpu/block.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cnnfast
from cnnfast.gpu.observers import observed

from ..conftest import conv_precision
from . import test_training_features as features
from .test_training_features import CL, Models, Outcome, compare


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


# In the others no step has a kernel of its own here: few channels are for training alone, and after a convolution.
SCENARIOS = [s for s in features.FUSED if s not in (features.r1, features.ema)]
ON_ONE_DEVICE = (features.checkpoint_not_reentrant, features.checkpoint_of_the_second_half, features.save_on_cpu)
QUICK = (
    features.baseline, features.frozen_norms, features.shared_modules, features.backward_twice,
    features.saved_tensor_hooks,
)  # fmt: skip


@pytest.mark.parametrize(
    "scenario",
    [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow, id=s.__name__) for s in SCENARIOS],
)
def test_scenario(scenario: Callable[[Models], Outcome], device: torch.device, straight: list[str]) -> None:
    if scenario in ON_ONE_DEVICE and device.type == "cuda" and not torch.backends.cuda.is_built():
        pytest.skip("an emulated device's tensors, saved, are those of a CPU")
    ours = Models(cnnfast.Sequential, memory_format=CL, device=device)
    with cnnfast.backend("triton"), conv_precision("ieee"):
        with observed(launch=lambda name: None):  # by the general way
            first = here(scenario(ours))
        assert not straight
        got = here(scenario(ours))
    assert straight or scenario is features.frozen_norms, "nothing there has statistics"
    assert all(torch.equal(got[name], value) for name, value in first.items()), "the two ways differ"
    eager = [scenario(Models(memory_format=f)) for f in (torch.contiguous_format, CL)]
    compare(got, scenario(Models(dtype=torch.float64)), *eager, what=scenario.__name__)
