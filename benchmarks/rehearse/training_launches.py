"""What a training step launches on a GPU that is not there: the real `cnnfast.Sequential` in training mode, forward and
backward, on a recording driver; and beside it the same step of plain modules, and as Inductor schedules it.

Bytes are those of the tensors that a launch or an operator takes and gives, each once. PyTorch's BatchNorm counts as
what its kernels do: input read twice forward, input and gradient read twice backward.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import cnnfast
from cnnfast import dispatch
from cnnfast.gpu.devices import tf32_convolutions
from cnnfast.gpu.observers import observed
from cnnfast.memory_format import format_of

from ..cases import Case
from .inspector import Call, recording
from .launches import NUMERICS, Op, counting, kinds

__all__ = ["Cost", "TrainingRun", "eager_cost", "inductor_cost", "record"]


@dataclass(frozen=True)
class Cost:
    """Of one step: what was launched, bytes read and written, and the most bytes held beyond model and input."""

    launches: tuple[str, ...]
    moved: int
    peak: int


@dataclass
class TrainingRun:
    """One training step of a case."""

    forward: list[Call] = field(default_factory=list)
    backward: list[Call] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)  # names of the launches, as `observed` tells them
    by_torch: list[str] = field(default_factory=list)  # PyTorch's operators beside them that move data
    peak: int = 0

    @property
    def calls(self) -> list[Call]:
        return self.forward + self.backward

    @property
    def cost(self) -> Cost:
        names = [c.job.function for c in self.calls] + self.by_torch
        return Cost(tuple(names), sum(map(moved, self.calls)), self.peak)


def _input(case: Case, batch: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.zeros((batch, *case.input_shape), dtype=dtype)
    return x.contiguous(memory_format=format_of(x.dim(), x.dim() > 3)).requires_grad_()


def _model(case: Case, dtype: torch.dtype, container: type[nn.Sequential]) -> nn.Sequential:
    return cnnfast.channels_last(container(*case.make()).to(dtype).train())


def moved(call: Call) -> int:
    """Bytes that a launch reads and writes. Of a kernel that can split its sums, either the result or the workspace."""
    splits = call.arguments.get("SPLITS", 1)
    unused = {"y_ptr", "out_ptr", "stats_ptr"} if splits > 1 else {"work_ptr"}
    if call.job.function not in ("conv_transpose_kernel", "conv_wgrad_kernel"):
        unused = set()
    return sum(call.bytes_of(name) for name in call.tensors if name not in unused)


# Operators of PyTorch that move no data.
_FREE = {
    "empty", "empty_like", "empty_strided", "view", "view_as", "as_strided", "reshape", "unsqueeze", "squeeze",
    "expand",
    "permute", "transpose", "t", "detach", "alias", "slice", "select", "narrow", "split", "split_with_sizes",
    "resize_",
    "result_type", "contiguous", "to", "_unsafe_view", "unbind", "lift_fresh", "new_empty", "new_empty_strided", "set_",
}  # fmt: skip


def record(case: Case, batch: int, numerics: str, arch: int) -> TrainingRun:
    """The second step of a model (the first one makes tables that later ones find)."""
    dtype, tf32 = NUMERICS[numerics]
    model, x = _model(case, dtype, cnnfast.Sequential), _input(case, batch, dtype)
    run = TrainingRun()
    with ExitStack() as stack:
        stack.enter_context(tf32_convolutions(tf32))
        stack.enter_context(kinds(numerics))
        calls = stack.enter_context(recording(arch))
        stack.enter_context(observed(launch=run.plans.append))
        for _ in range(2):
            calls.clear(), run.plans.clear()
            model.zero_grad(set_to_none=True)
            x.grad = None
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
                with dispatch.backend("triton"):
                    y = model(x)
                run.forward = list(calls)
                y.backward(torch.empty_like(y))
            del y
            run.backward = calls[len(run.forward) :]
            run.by_torch = [
                e.name
                for e in seen.events()
                if e.name.startswith("aten::")
                and e.name.removeprefix("aten::") not in _FREE
                and not any(c.name.startswith("aten::") for c in e.cpu_children)
            ]
            run.peak = _peak(seen)
    return run


def _peak(seen: Any) -> int:
    """The most bytes that were held at once beyond what was there at the start."""
    now = most = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    return most


def eager_cost(case: Case, batch: int, numerics: str) -> Cost:
    """The plain modules' step, channels-last as a GPU wants it."""
    model, x = _model(case, NUMERICS[numerics][0], nn.Sequential), _input(case, batch, NUMERICS[numerics][0])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        y = model(x)
        y.backward(torch.empty_like(y))
    peak = _peak(seen)
    ops: list[Op] = []
    x.grad = None
    model.zero_grad(set_to_none=True)
    with counting(ops):
        y = model(x)
        y.backward(torch.empty_like(y))
    return Cost(tuple(op.name for op in ops), sum(op.read + op.written + _twice(op) for op in ops), peak)


def _twice(op: Op) -> int:
    """Bytes that a norm's kernels read a second time."""
    return op.read if "batch_norm" in op.name or "group_norm" in op.name else 0


def inductor_cost(case: Case, batch: int, numerics: str) -> Cost:
    """The step as `torch.compile` schedules it (for a CPU): its nodes, and the bytes that it says they access."""
    import torch._dynamo as dynamo
    from torch._inductor import compile_fx, config, metrics

    model, x = _model(case, NUMERICS[numerics][0], nn.Sequential), _input(case, batch, NUMERICS[numerics][0])
    dynamo.reset()
    metrics.reset()
    log = compile_fx.inductor_metrics_log  # bytes are only counted for it
    before = log.level
    log.setLevel(logging.INFO)
    try:
        with config.patch(fx_graph_cache=False):
            y = torch.compile(model)(x)
            y.backward(torch.empty_like(y))
    finally:
        log.setLevel(before)
    names = [type(node).__name__ for node, _ in metrics.node_runtimes]
    return Cost(tuple(names), metrics.num_bytes_accessed, 0)
