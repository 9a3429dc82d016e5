"""Functions of MKL's vector library are exact at the first call of a process, on several threads, too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

# Each child is a process in which nothing ran yet. Its threads wait for work in a loop behind a product, and come to
# the function together. (By hand, 2 threads of an Ice Lake server: without the first calls 1 in 50 children fails.)
_CHILDREN = """
import os, sys
import torch
{imports}

def worst():
    torch.set_num_threads(2)
    x = torch.linspace(-2, 2, 4000)
    torch.rand(64, 64) @ torch.rand(64, 64)
    torch.zeros(200_000).add_(torch.ones(200_000))
    return max((function(x) - function(x.double())).abs().max().item() for function in (torch.tanh, torch.exp))

failed = 0
for _ in range({children}):
    child = os.fork()
    if not child:
        os._exit(1 if worst() > 1e-5 else 0)
    failed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(failed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes without a first call, in numbers")
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="of MKL")
def test_first_calls_of_several_threads_are_exact() -> None:
    code = _CHILDREN.format(imports="import cnnfast.cpu", children=150)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"]
