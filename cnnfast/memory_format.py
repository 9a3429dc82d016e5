"""Memory formats: what a tensor suggests, a new tensor's strides, and a model's weights in the order in which the GPU
kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

__all__ = ["channels_last", "has_both", "is_channels_last", "new_strides"]

M = TypeVar("M", bound=nn.Module)


def is_channels_last(t: torch.Tensor) -> bool:
    """ATen's ``suggest_memory_format`` of a 4-D tensor: strides ordered C < W < H < N, sizes of one not deciding
    alone."""
    s = t.stride()
    if t.dim() != 4 or s[1] == 0:
        return False
    size, least = t.shape, 0
    for d in (1, 3, 2, 0):
        if size[d] == 0 or s[d] < least:
            return False
        if d == 0 and least == s[1]:
            return False
        least = s[d] * size[d] if size[d] > 1 else s[d]
    return True


def new_strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Those of a new tensor (N, C, H, W), none of them 0, in this format. Where its memory fits both formats, they tell
    ATen's next operator which of them to take."""
    _, c, h, w = shape
    return (h * w * c, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)


def has_both(channels: int, size: Sequence[int]) -> bool:
    """Whether a dense tensor of these sizes is contiguous and channels-last at once."""
    return channels == 1 or all(n == 1 for n in size)


def channels_last(module: M) -> M:
    """``module.to(memory_format=torch.channels_last)`` and the same for 1-D convolutions, in place. Returns ``module``.

    PyTorch's own conversion leaves 3-D weights as they are, and a GPU kernel would copy them on every call. Here the
    weight (C_in, C_out/groups, k) of a ConvTranspose1d, or (C_out, C_in/groups, k) of a Conv1d, gets its second
    dimension contiguous, as channels_last does for four. Values, shapes and ``state_dict`` stay; ``load_state_dict``
    keeps the order. For GPUs: PyTorch's own operators copy such a 3-D weight on a CPU. Parametrized and lazy modules
    are left alone.
    """
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for m in module.modules():
        if isinstance(m, nn.Conv1d | nn.ConvTranspose1d) and type(m) in (nn.Conv1d, nn.ConvTranspose1d):
            weight = m.weight
            weight.data = weight.data.unsqueeze(2).contiguous(memory_format=torch.channels_last).squeeze(2)
    return module
