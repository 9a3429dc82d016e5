"""The fused step without gradients as a `torch.library` operator, and what `torch.compile` sees of any step.

``cnnfast::conv_block`` runs `run.run_step` without gradients; it has no derivative, and says so where one is asked
for. Steps with gradients on a GPU are the operators of `gpu.traced`. Plain eager calls skip this boundary (it costs 14
to 60 us).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import by_kernels, on_cpu
from ..memory_format import format_of, to_format
from ..reference import run_reference
from ..step import Operands, Step, output_padding_of, step_key, step_of
from .run import run_step

__all__ = ["conv_block", "conv_block_op", "traced_step"]


def _as_4d(weight: Tensor) -> Tensor:
    """(C_in, C_out/g, k) as (C_in, C_out/g, 1, k): a view, made here so that a Parameter reaches the operator as it is,
    and what is packed for it is found again."""
    return weight.unsqueeze(2) if weight.dim() == 3 else weight


@torch.library.custom_op("cnnfast::conv_block", mutates_args=())
def conv_block_op(
    x: Tensor,
    weight: Tensor,  # 4-D; 3-D of a layer of one dimension, whose x has height 1
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    step: str,  # its `step_key`
    output_padding: Sequence[int],
    channels_last: bool,
    backend: str | None,  # None: the context's at run time
) -> Tensor:
    weight = _as_4d(weight)
    o = Operands(x, weight, bias, mean, var, scale, shift, residual, slope)
    with torch.no_grad():
        y = run_step(step_of(step, weight.shape, output_padding), o, channels_last=channels_last, backend=backend)
    # An operator's result must be a tensor of its own: identity steps may hand back an operand.
    return y.clone() if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and y.numel() else y


@conv_block_op.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    key, output_padding, channels_last, _ = args[-4:]
    step = step_of(key, _as_4d(weight).shape, output_padding)
    shape = (x.shape[0], step.spec.out_channels, *step.output_size(x.shape[2:]))
    fmt = format_of(len(shape), channels_last)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=fmt)


def conv_block(step: Step, o: Operands, channels_last: bool, backend: str | None) -> Tensor:
    """``step`` through the operator."""
    return conv_block_op(*o[:9], step_key(step), output_padding_of(step), channels_last, backend)


# --- what Dynamo traces -----------------------------------------------------------------------------------------------


@torch._dynamo.assume_constant_result  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
def transformed() -> bool:
    """Whether a functorch transform is at work: Dynamo enters those of traced code while it traces, and guards those
    around it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@torch._dynamo.assume_constant_result  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
def exporting() -> bool:
    """`torch.compiler.is_exporting`, which Dynamo takes for true whenever it traces (torch 2.11)."""
    return torch.compiler.is_exporting()


@torch._dynamo.assume_constant_result  # type: ignore[no-untyped-call, untyped-decorator, unused-ignore]
def chosen_backend() -> str | None:
    """The context's backend at tracing where one was chosen. Dynamo cannot guard it: it stays with the traced code.
    None: what holds when that code runs."""
    name = dispatch.resolve_backend(None)
    return None if name == "auto" else name


def pays_on_cpu(step: Step) -> bool:
    """Whether the operator beats, on a CPU, what Inductor makes of PyTorch's operators: where the packed form saves
    arithmetic or layouts, not where it saves passes over memory, which Inductor saves as well."""
    return step.spec.groups == 1 and (step.spec.transposed or step.upsample is not None)


def takes(step: Step, kernels: bool) -> bool:
    """Whether there may be an operator for the step: not without a convolution, and in three dimensions for the GPU's
    ``kernels`` alone."""
    return step.spec is not None and (kernels or len(step.spec.kernel_size) < 3)


def traced_step(step: Step, o: Operands, channels_last: bool, backend: str | None) -> Tensor:
    """`run.run_step` in traced code: an operator, or PyTorch's own operators where there is none (a gradient on a CPU,
    a functorch transform), where it does not pay, or where none is wanted: an exported program is to run without
    cnnfast."""
    if torch.compiler.is_dynamo_compiling() and not exporting() and not transformed():
        backend = chosen_backend() if backend is None else backend
        kernels = backend == "triton" or not on_cpu(o.x)
        measured, may = step.norm is not None and step.norm.measured, takes(step, kernels)
        if may and not measured and not dispatch.needs_gradient(o) and (kernels or pays_on_cpu(step)):
            return conv_block(step, o, channels_last, backend)
        if may and by_kernels(o.x, backend):
            from ..gpu import traced  # imports triton

            if traced.takes(o):
                return traced.run(step, o._replace(weight=_as_4d(o.weight)), channels_last, backend)
    weight = o.weight if step.spec is None else _as_4d(o.weight)
    return to_format(run_reference(step, o._replace(weight=weight)), channels_last)
