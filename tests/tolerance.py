"""The tolerance rule of `cnnfast.tolerance`, asserted."""

from __future__ import annotations

import torch

from cnnfast.tolerance import verdict

__all__ = ["assert_close"]


def assert_close(
    actual: torch.Tensor,
    expected64: torch.Tensor,
    yardstick: torch.Tensor,
    what: str = "",
    before: torch.Tensor | float = 0.0,
) -> None:
    """`verdict`'s rule on copies on the CPU; AssertionError with its text, after ``what``."""
    before = before.detach().cpu() if isinstance(before, torch.Tensor) else before
    problem = verdict(*(t.detach().cpu() for t in (actual, expected64, yardstick)), before=before)
    assert problem is None, f"{what}: {problem}"
