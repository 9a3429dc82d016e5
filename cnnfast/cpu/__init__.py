"""Steps on a CPU, by oneDNN and ATen.

On import, every function that ATen takes from MKL's vector library runs once, on one thread. MKL finds out at the first
call which kernel to run; where several threads make that call at once, one of them may take a kernel of low precision
for its part (MKL 2024.2, which PyTorch links: tanh off by 4e-5, exp by 4e-4, once in some 50 processes;
pytorch/pytorch#188792).
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes

_OF_MKL = (
    *(torch.acos, torch.asin, torch.atan, torch.cos, torch.cosh, torch.erf, torch.erfc, torch.erfinv, torch.exp),
    *(torch.expm1, torch.log, torch.log10, torch.log1p, torch.log2, torch.sin, torch.sinh, torch.sqrt, torch.tan),
    torch.tanh,
)


def _first_calls() -> None:
    with _disable_current_modes(), torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            one = torch.full((1,), 0.5, dtype=dtype, device="cpu")
            for function in _OF_MKL:
                function(one)


_first_calls()
