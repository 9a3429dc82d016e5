"""Training steps on a CPU: a convolution, a norm, a residual and an activation with gradients, by ATen's operators in
the memory format that suits them best."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu
from .block import Operands, Step, run_reference
from .norms import NormCall
from .spec import Activation

__all__ = ["run"]


def run(step: Step, o: Operands, norm: NormCall | None, channels_last: bool) -> Tensor:
    """``step`` with ``norm`` after its convolution and ahead of residual and activation; differentiable any number of
    times. Dense CPU tensors of one floating dtype (norm vectors of any), (N, C_in, H, W) -> (N, C_out, OH, OW) in x's
    dtype and the memory format asked for."""
    x = cpu.convert(o.x, o.x.dtype, True)
    if o.mean is not None or o.scale is not None or o.shift is not None:
        y = run_reference(step, o._replace(x=x))
    else:
        bare = Step(step.spec, Activation(), step.upsample, step.pad, step.pad_mode)
        y = run_reference(bare, o._replace(x=x, residual=None, slope=None))
        if norm is not None and norm.process_group is not None:
            from .ops.normalise import normalise

            return normalise(
                y, norm, o.residual, step.activation, o.slope, partials=None, channels_last=channels_last,
                backend="aten",
            )  # fmt: skip
        y = _finish(y if norm is None else _normalised(y, norm), step.activation, o)
    return cpu.convert(y, y.dtype, channels_last)


# --- norms ------------------------------------------------------------------------------------------------------------


def _normalised(y: Tensor, call: NormCall) -> Tensor:
    """y (N, C, H, W) by PyTorch's own functions, channels-last where they keep its statistics right."""
    norm, weight, bias = call.norm, call.weight, call.bias
    if norm.kind == "affine":
        return _affine(y, weight, bias)
    if norm.kind == "group":
        # Channels-last, ATen takes E[x^2] - E[x]^2: nothing right is left of it at a mean of a few hundred deviations.
        return F.group_norm(y.contiguous(), norm.groups, weight, bias, norm.eps)
    function = F.batch_norm if norm.kind == "batch" else F.instance_norm
    return function(
        y, call.running_mean, call.running_var, weight, bias, call.use_input_stats, call.momentum, norm.eps
    )  # fmt: skip


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    z = y.to(wide)
    if weight is not None:
        z = z * weight.to(wide).view(-1, 1, 1)
    if bias is not None:
        z = z + bias.to(wide).view(-1, 1, 1)
    return z.to(y.dtype)


# --- activations ------------------------------------------------------------------------------------------------------

_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
    "leaky_relu": F.leaky_relu_,
    "elu": F.elu_,
    "hardtanh": F.hardtanh_,
}


def _in_place(activation: Activation) -> Callable[..., Tensor] | None:
    """The activation that overwrites its input; None where its derivative needs that."""
    if activation.name in ("leaky_relu", "elu") and not activation.params[0] >= 0:
        return None
    return _IN_PLACE.get(activation.name)


def _finish(y: Tensor, activation: Activation, o: Operands) -> Tensor:
    """Residual (added in float32 at least) and activation of y, which is ours and which no backward needs."""
    dtype, wide = y.dtype, torch.promote_types(y.dtype, torch.float32)
    if o.residual is not None:
        y = y.to(wide) + o.residual.to(wide)
    slope = None if o.slope is None else o.slope.to(y.dtype)
    function = _in_place(activation)
    y = activation(y, slope) if function is None else function(y, *activation.params)
    return y.to(dtype)
