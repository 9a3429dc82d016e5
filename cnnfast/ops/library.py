"""The fused step without gradients as a `torch.library` operator, and what `torch.compile` sees of any step.

``cnnfast::conv_block`` runs `core.run_step` without gradients; it has no derivative, and says so where one is asked
for. Steps with gradients on a GPU are the operators of `library_training`. Plain eager calls skip this boundary (it
costs 14 to 60 us).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..block import Operands, Step, Upsample, plain_step, upsample_step
from ..norms import NormCall
from ..spec import Activation, ConvSpec

__all__ = ["conv_block", "conv_block_op", "traced_step"]


def _step(
    transposed: bool,
    groups: int,
    padding_mode: str,
    activation: str,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    upsample: Sequence[int],
    params: Sequence[float],
) -> Step:
    act = Activation(activation, tuple(params))
    first, second, *kernel = (int(n) for n in weight_shape)
    if upsample:
        up = Upsample((upsample[0], upsample[1]), (padding[0], padding[1]), padding_mode)
        return upsample_step(second * groups, first, (kernel[0], kernel[1]), up, groups, act)
    channels = (first, second * groups) if transposed else (second * groups, first)
    ints = (tuple(kernel), tuple(stride), tuple(padding), tuple(output_padding), tuple(dilation))
    return plain_step(ConvSpec(transposed, *channels, *ints, groups), padding_mode, act)


_known_step = lru_cache(maxsize=4096)(_step)  # where nothing is symbolic


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
    eps: float,
    transposed: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    upsample: Sequence[int],
    padding_mode: str,
    activation: str,
    params: Sequence[float],
    channels_last: bool,
    backend: str | None,  # None: the context's at run time
) -> Tensor:
    from .core import run_step

    weight = _as_4d(weight)
    sizes = (tuple(v) for v in (weight.shape, stride, padding, output_padding, dilation, upsample, params))
    step = _known_step(transposed, groups, padding_mode, activation, *sizes)
    o = Operands(x, weight, bias, mean, var, eps, scale, shift, residual, slope)
    with torch.no_grad():
        y = run_step(step, o, channels_last=channels_last, backend=backend)
    # An operator's result must be a tensor of its own: identity steps may hand back an operand.
    return y.clone() if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() and y.numel() else y


@conv_block_op.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    transposed, stride, padding, output_padding, dilation, groups, upsample, mode, activation, params = args[8:18]
    shape = _as_4d(weight).shape
    step = _step(
        transposed, groups, mode, activation, shape, stride, padding, output_padding, dilation, upsample, params
    )  # fmt: skip
    size = step.output_size((x.shape[2], x.shape[3]))
    fmt = torch.channels_last if args[18] else torch.contiguous_format
    return torch.empty((x.shape[0], step.spec.out_channels, *size), dtype=x.dtype, device=x.device, memory_format=fmt)


def conv_block(step: Step, o: Operands, channels_last: bool, backend: str | None) -> Tensor:
    """``step`` through the operator."""
    s, up = step.spec, step.upsample
    # The layer's own padding and mode: a step pads its input ahead of the convolution in other modes than zeros.
    padding = [p + q for p, q in zip(s.padding, step.pad, strict=True)] if up is None else list(up.padding)
    mode = up.mode if up is not None else step.pad_mode if any(step.pad) else "zeros"
    return conv_block_op(
        o.x,
        o.weight,
        o.bias,
        o.mean,
        o.var,
        o.scale,
        o.shift,
        o.residual,
        o.slope,
        o.eps,
        s.transposed,
        list(s.stride),
        padding,
        list(s.output_padding),
        list(s.dilation),
        s.groups,
        [] if up is None else list(up.scale),
        mode,
        step.activation.name,
        list(step.activation.params),
        channels_last,
        backend,
    )


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


def traced_step(step: Step, o: Operands, norm: NormCall | None, channels_last: bool, backend: str | None) -> Tensor:
    """`core.run_step` in traced code: an operator, or PyTorch's own operators where there is none (a gradient on a CPU,
    a functorch transform), where it does not pay, or where none is wanted: an exported program is to run without
    cnnfast."""
    from .core import by_torch, needs_gradient

    if not torch.compiler.is_dynamo_compiling() or exporting() or transformed():
        return by_torch(step, o._replace(weight=_as_4d(o.weight)), norm, channels_last)
    backend = chosen_backend() if backend is None else backend
    on_cpu = o.x.device.type == "cpu" and backend != "triton"
    if norm is None and not needs_gradient(o) and (not on_cpu or pays_on_cpu(step)):
        return conv_block(step, o, channels_last, backend)
    o = o._replace(weight=_as_4d(o.weight))
    if (o.x.is_cuda or backend == "triton") and backend != "aten":
        from . import library_training

        if library_training.takes(o, norm):
            return library_training.run(step, o, norm, channels_last, backend)
    return by_torch(step, o, norm, channels_last)
