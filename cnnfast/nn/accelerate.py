"""`accelerate`: a model that someone else wrote, with fused steps, in place."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from .accelerate_call import restore, switch_on
from .accelerate_verify import verify

__all__ = ["accelerate", "restore"]

M = TypeVar("M", bound=nn.Module)


def accelerate(model: M, example_inputs: Any = None) -> M:
    """Let ``model`` run with fused steps, in place. Returns ``model``.

    Its calls, and those of its direct children (so that methods such as ``encode`` and ``decode`` have them, too), go
    through `torch.compile`'s front end, which gives the graph of what PyTorch computes; convolutions in it, with what
    is ahead of them and follows, become the steps that `cnnfast.Sequential` makes of modules. Everything else runs as
    PyTorch runs it. Weights are read on every call; the model may be trained, moved, cast, reloaded, hooked and changed
    as before, and compiles anew where that matters. The first call of each kind takes up to some seconds.

    Outputs, gradients and running statistics are those of the plain model within rounding; strides and errors are, too.
    Under `torch.jit.trace`, functorch's transforms, dispatch and function modes and hooks on every module, the plain
    model runs. ``copy.deepcopy`` and ``pickle`` give the plain model; `restore` gives it back.

    Args:
        model: any `torch.nn.Module`. `cnnfast.Sequential` needs no help.
        example_inputs: a tensor, or the positional arguments in a tuple, or the keyword arguments in a dict. With them
            the model is run here: results and gradients are compared with the plain model's, what differs by more than
            rounding is switched off, and where the whole is no faster than the plain model, it is restored. Buffers,
            gradients and random state are as before afterwards. `cnnfast.explain` says what was found.

    Raises:
        TypeError: ``model`` is no module. UsageError: it is a scripted or already compiled one.
    """
    switch_on(model)
    if example_inputs is not None:
        verify(model, example_inputs)
    return model
