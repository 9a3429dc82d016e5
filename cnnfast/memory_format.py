"""A model's weights in the order in which the GPU kernels read them."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

__all__ = ["channels_last"]

M = TypeVar("M", bound=nn.Module)


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
