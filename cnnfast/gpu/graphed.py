"""`graphed`: a model's inference as one CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .devices import cuda_index
from .warmup import warmup

__all__ = ["Graphed", "graphed"]

WARM_UP = 3  # calls ahead of the capture: cuDNN's search and libraries' workspaces are not for a graph


def graphed(model: torch.nn.Module, *inputs: Tensor) -> Graphed:
    """``model``'s inference on inputs like these as a CUDA graph: one launch on the host instead of one for each
    kernel, which is what a small batch waits for.

    Kernels are compiled and proven first (`warmup`), then ``model(*inputs)`` is captured without gradients, under the
    autocast that is on now. Call the result like the model: inputs of the same shapes, strides, dtypes and device are
    copied to the graph's own and the graph is launched; **the result lies at the same address every time and is
    overwritten by the next call**: ``clone()`` what is to be kept. Any other inputs, and a model that was put into
    training mode, run eagerly, without gradients.

    The graph reads weights and buffers where they lie: writes in place are seen (``load_state_dict``, an optimizer),
    tensors that take a parameter's place (``model.half()``, ``assign=True``) are not. It holds the memory of all its
    intermediate results for as long as it lives. One call at a time: two threads would share the graph's tensors.

    inputs: at least one tensor, all on one CUDA device. ValueError for others, for a model in training mode, and for
    one that gives what is no tensor and no tuple, list or dictionary of tensors; RuntimeError inside a graph capture,
    and where PyTorch cannot capture (a model that waits for the device, say). Follows PyTorch's own
    `torch.cuda.make_graphed_callables`.
    """
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise ValueError(f"graphed takes tensors as inputs, got {[type(x).__name__ for x in inputs]}")
    devices = {x.device for x in inputs}
    if len(devices) > 1 or cuda_index(inputs[0]) is None:
        raise ValueError(f"a CUDA graph needs inputs on one CUDA device, these are on {', '.join(map(str, devices))}")
    if model.training:
        raise ValueError("graphed of a module in training mode: call its eval() first")
    warmup(model, *inputs)
    return Graphed(model, inputs)


class Graphed:
    """What `graphed` returns. ``model``: the module that was captured; ``inputs``, ``outputs``: the graph's own."""

    def __init__(self, model: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.model = model
        with torch.no_grad(), torch.cuda.device(inputs[0].device):
            self.inputs = tuple(x.detach().clone(memory_format=torch.preserve_format) for x in inputs)
            self._kinds = tuple(map(_kind, self.inputs))
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    model(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self.outputs = model(*self.inputs)
        _check(self.outputs)

    def __call__(self, *inputs: Any) -> Any:
        """The model's result on ``inputs``: of the graph where they are like its own, else eagerly."""
        with torch.no_grad():
            if self.model.training or tuple(map(_kind, inputs)) != self._kinds:
                return self.model(*inputs)
            with torch.cuda.device(self.inputs[0].device):
                for own, x in zip(self.inputs, inputs, strict=True):
                    if own is not x:
                        own.copy_(x)
                self._graph.replay()
            return self.outputs


def _kind(x: Any) -> object:
    """What must be equal for a graph to serve."""
    return (type(x), x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else type(x)


def _check(outputs: Any) -> None:
    """ValueError unless these are tensors: anything else would be what it was at the capture for ever."""
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    if isinstance(outputs, (tuple, list)):
        for y in outputs:
            _check(y)
    elif not isinstance(outputs, Tensor):
        raise ValueError(f"graphed takes models that give tensors, this one gives {type(outputs).__name__}")
