"""Steps with gradients as `torch.library` operators: what `torch.compile` sees of them on a GPU.

The forward is ``cnnfast::conv``, or ``cnnfast::conv_norm_act`` where something follows the convolution that its
epilogue cannot do with a gradient; the latter's derivative is ``norm_act_backward`` and that of a convolution
(`library_convolution`). Formulas and launches are those of eager mode (`training`, `norm_autograd`). Running statistics
are returned, and moved by the traced code: an operator with a derivative must not write to its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import dispatch, reference
from ..activations import Activation
from ..dispatch import watched
from ..memory_format import to_format
from ..norms import Norm, NormCall
from ..spec import DTYPES, ConvSpec
from ..step import Operands, Step
from .traced_conv import by_kernels, conv, conv_backward, empty_of, geometry_of, how_of, own, spec_of
from .why_not import norm_why_not

if TYPE_CHECKING:
    from ..reference import Grads
    from ..step import NormHow

__all__ = ["run", "takes"]


def _norm_how(
    kind: str,
    norm_groups: int,
    eps: float,
    measured: bool,
    activation: str,
    params: Sequence[float],
    channels_last: bool,
    dtype: torch.dtype,
    residual: bool,
) -> NormHow:
    from ..step import how_of as norm_how_of

    norm = Norm(kind, norm_groups, eps) if kind else None
    return norm_how_of(norm, measured, Activation(activation, tuple(params)), channels_last, dtype, residual)


# --- convolution, norm, residual, activation --------------------------------------------------------------------------


@torch.library.custom_op("cnnfast::conv_norm_act", mutates_args=())
def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    running_mean: Tensor | None,  # the statistics where the norm is not measured
    running_var: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    transposed: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    kind: str,  # of the norm; "" for none
    norm_groups: int,
    eps: float,
    measured: bool,
    updates: bool,
    activation: str,
    params: Sequence[float],
    channels_last: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(result, the convolution's result, mean, 1/deviation, and what running statistics move towards: each channel's
    mean and unbiased variance). Empty where there is no such thing."""
    spec = spec_of(weight, transposed, stride, padding, output_padding, dilation, groups)
    how = _norm_how(kind, norm_groups, eps, measured, activation, params, channels_last, x.dtype, residual is not None)
    call = None
    if how.norm is not None:
        call = NormCall(how.norm, norm_weight, norm_bias, running_mean, running_var, measured)
    moved: list[Tensor] = [x.new_empty(0, dtype=torch.float32) for _ in range(2)]
    if updates and call is not None:
        # By a momentum of one they become the batch's.
        moved = [x.new_zeros(spec.out_channels, dtype=torch.float32) for _ in range(2)]
        call = call._replace(running_mean=moved[0], running_var=moved[1], momentum=1.0)
    found = None
    if by_kernels(x, backend):
        found = _launched(x, weight, bias, residual, slope, call, spec, how, backend)
    if found is None:
        u = to_format(reference.conv(x, weight, bias, spec), True)
        found = u, *_by_torch(u, call, residual, slope, how)
    u, y, mean, rstd = found
    nothing = x.new_empty(0, dtype=torch.float32)
    if not measured or mean is None or rstd is None:
        mean, rstd = nothing, nothing.clone()
    return own(y, u), u, mean.clone(), rstd.clone(), moved[0], moved[1]


def _launched(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    call: NormCall | None,
    spec: ConvSpec,
    how: NormHow,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """(u, y, mean, rstd) by the kernels, the statistics out of the convolution's epilogue where tiles allow it; None
    where the norm's must not run."""
    from . import norm_act_autograd
    from .conv_autograd import conv_forward

    statistics = None
    if how.measured and how.norm is not None:
        statistics = "batch" if how.norm.kind == "batch" else "image"
    u, parts = conv_forward(x, weight, bias, how_of(spec, Activation(), True, backend), statistics)
    vectors = () if call is None else (call.weight, call.bias, call.running_mean, call.running_var)
    required = dispatch.resolve_backend(backend) == "triton"
    reason = norm_why_not(u, *vectors, residual, slope)
    if reason is not None:
        if required:
            raise RuntimeError(f'backend="triton" cannot run this: {reason}')
        return None
    done = norm_act_autograd.proven_forward(u, call, residual, slope, parts, how, required)
    return None if done is None else (u, done.y, done.mean, done.rstd)


def _by_torch(
    u: Tensor, call: NormCall | None, residual: Tensor | None, slope: Tensor | None, how: NormHow
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, mean, rstd) by PyTorch's operators."""
    from .. import reference as norm_aten

    y = to_format(norm_aten.norm_by_torch(u, call, residual, how.activation, slope), how.channels_last)
    if not how.measured or how.norm is None:
        return y, None, None
    n, c = u.shape[:2]
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    join = how.join(c)
    rows = wide.reshape(n, c // join, -1) if how.each else wide.transpose(0, 1).reshape(1, c, -1)
    var, mean = torch.var_mean(rows, 2, correction=0)
    return y, mean.float(), torch.rsqrt(var + how.norm.eps).float()


@conv_norm_act.register_fake
def conv_norm_act_fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    spec = spec_of(weight, *args[7:13])
    kind, norm_groups, _, measured, updates, _, _, channels_last, _ = args[13:]
    n, c = x.shape[0], spec.out_channels
    shape = (n, c, *spec.output_size(x.shape[2:]))
    statistics = (n if kind != "batch" else 1, norm_groups if kind == "group" else c) if measured else (0,)
    moved = c if updates else 0

    def empty(*size: Any) -> Tensor:
        return x.new_empty(size, dtype=torch.float32)

    y, u = empty_of(x, shape, channels_last), empty_of(x, shape, True)
    return y, u, empty(*statistics), empty(*statistics), empty(moved), empty(moved)


@torch.library.custom_op("cnnfast::norm_act_backward", mutates_args=())
def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    other: Tensor | None,
    kind: str,
    norm_groups: int,
    eps: float,
    measured: bool,
    activation: str,
    params: Sequence[float],
    channels_last: bool,
    residual: bool,
    need: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, residual and slope: empty where ``need`` does not ask for one."""
    from ..reference import Grads, Saved, backward_by_torch
    from .norm_act_autograd import proven_backward

    how = _norm_how(kind, norm_groups, eps, measured, activation, params, channels_last, x.dtype, residual)
    saved = Saved(x, weight, bias, slope, mean, rstd, other)
    wanted = Grads(*need)  # type: ignore[arg-type]
    if by_kernels(x, backend):
        found = proven_backward(grad, saved, how, wanted, None, dispatch.resolve_backend(backend) == "triton")
    else:
        found = backward_by_torch(grad, saved, how, wanted, None)
    like = (x, weight, bias, grad, slope)
    out = [
        grad.new_empty(0, dtype=torch.float32) if not n or g is None else g for g, n in zip(found, need, strict=True)
    ]
    out = [to_format(g, channels_last if k == 3 else True) if g.dim() == 4 else g.clone() for k, g in enumerate(out)]
    out[3] = own(out[3], out[0], grad)
    out[0] = own(out[0], grad)
    out = [g if t is None or not g.numel() else g.to(t.dtype) for g, t in zip(out, like, strict=True)]
    return out[0], out[1], out[2], out[3], out[4]


@norm_act_backward.register_fake
def norm_act_backward_fake(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, bias, slope = args[:3]
    channels_last, _, need, _ = args[12:]
    none = [grad.new_empty(0, dtype=torch.float32) for _ in range(5)]
    full = (
        empty_of(x, x.shape, True),
        None if weight is None else weight.new_empty(weight.shape),
        None if bias is None else bias.new_empty(bias.shape),
        empty_of(grad, grad.shape, channels_last),
        None if slope is None else slope.new_empty(slope.shape),
    )
    return tuple(f if n and f is not None else e for f, n, e in zip(full, need, none, strict=True))


class _Part(SimpleNamespace):
    """The context of one formula of an operator that has two."""

    saved_tensors: tuple[Tensor | None, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def _conv_norm_act_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    from .conv_autograd import conv_setup
    from .norm_act_autograd import norm_setup

    x, weight, bias, norm_weight, norm_bias, running_mean, running_var, residual, slope, *rest = inputs
    geometry, (kind, groups, eps, measured, _, activation, params, channels_last, backend) = rest[:6], rest[6:]
    y, u, mean, rstd, *_ = output
    need = ctx.needs_input_grad
    how = _norm_how(kind, groups, eps, measured, activation, params, channels_last, x.dtype, residual is not None)
    of_conv = _Part(needs_input_grad=need[:3])
    conv_setup(of_conv, x, weight, bias, u, how_of(spec_of(weight, *geometry), Activation(), True, backend))
    of_norm = _Part(needs_input_grad=(any(need[:3]), need[3], need[4], need[7], need[8]))
    mean, rstd = (mean, rstd) if measured else (running_mean, running_var)
    required = dispatch.resolve_backend(backend) == "triton"
    norm_setup(of_norm, u, norm_weight, norm_bias, residual, slope, mean, rstd, y, how, None, required)
    ctx.save_for_backward(*of_conv.saved_tensors, *of_norm.saved_tensors)
    ctx.of_conv, ctx.of_norm, ctx.backend = of_conv, of_norm, backend
    ctx.convs = len(of_conv.saved_tensors)
    of_conv.saved_tensors = of_norm.saved_tensors = ()
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _traced_norm_backward(ctx: Any, grad: Tensor, backend: str | None) -> Grads:
    """`norm_autograd.norm_backward` made of an operator."""
    from ..reference import Grads

    how = ctx.how
    x, *saved = ctx.saved_tensors
    need = list(ctx.needs_input_grad)
    norm = how.norm if how.norm is not None else Norm("affine")
    identity = how.activation.name == "identity"
    passes = need[3] and not identity and how.norm is not None  # the residual's gradient is a tensor of its own
    shares = need[3] and not identity and how.norm is None  # it is x's
    wanted = [need[0] or shares, need[1], need[2], passes, need[4]]
    out = norm_act_backward(
        grad,
        grad if x is None else x,
        *saved,
        "" if how.norm is None else norm.kind,
        norm.groups,
        norm.eps,
        how.measured,
        how.activation.name,
        list(how.activation.params),
        how.channels_last,
        how.residual,
        wanted,
        backend,
    )
    dx, dw, db, dres, dslope = (g if n else None for g, n in zip(out, wanted, strict=True))
    dres = grad if need[3] and identity else dx if shares else dres
    return Grads(dx if need[0] else None, dw, db, dres, dslope)


def _conv_norm_act_backward(ctx: Any, grad: Tensor | None, *of_others: None) -> tuple[Any, ...]:
    nothing = (None,) * 24
    if grad is None:
        return nothing
    saved = ctx.saved_tensors
    of_conv, of_norm = ctx.of_conv, ctx.of_norm
    of_conv.saved_tensors, of_norm.saved_tensors = saved[: ctx.convs], saved[ctx.convs :]
    if watched(grad) or not by_kernels(grad, ctx.backend):
        g = _traced_norm_backward(of_norm, grad, ctx.backend)
    else:
        from .norm_act_autograd import norm_backward

        g = norm_backward(of_norm, grad)
    of_x = (None, None, None) if g.x is None else conv_backward(of_conv, g.x)
    return *of_x, g.weight, g.bias, None, None, g.residual, g.slope, *nothing[9:]


conv_norm_act.register_autograd(_conv_norm_act_backward, setup_context=_conv_norm_act_setup_context)


# --- the step, as Dynamo traces it ------------------------------------------------------------------------------------


def takes(o: Operands, norm: NormCall | None) -> bool:
    """Whether operators stand for a step with gradients of these operands."""
    return o.x.dtype in DTYPES and (norm is None or norm.process_group is None)


def run(step: Step, o: Operands, norm: NormCall | None, channels_last: bool, backend: str | None) -> Tensor:
    """`training.run` made of operators; running statistics move in the traced code."""
    x, weight = step.pad_input(o.x), reference.conv_weight(step, o.weight)
    geometry, act = geometry_of(step.spec), step.activation
    call = norm
    if call is None and o.mean is not None:
        call = NormCall(Norm("batch", eps=o.eps), o.scale, o.shift, o.mean, o.var, use_input_stats=False)
    elif call is None and (o.scale is not None or o.shift is not None):
        call = NormCall(Norm("affine"), o.scale, o.shift)
    if call is None and o.residual is None and act.saves() != "x":
        return conv(x, weight, o.bias, *geometry, act.name, list(act.params), channels_last, backend)
    kind, groups, eps, measured, updates = "", 1, 0.0, False, False
    vectors: tuple[Tensor | None, ...] = (None,) * 4
    if call is not None:
        kind, groups, eps, measured = call.norm.kind, call.norm.groups, call.norm.eps, call.measured
        updates = measured and call.running_mean is not None
        vectors = (call.weight, call.bias, None, None) if measured else call[1:5]
        _check_sizes(step, x, call)
    y, _, _, _, mean, var = conv_norm_act(
        x, weight, o.bias, *vectors, o.residual, o.slope, *geometry, kind, groups, eps, measured, updates, act.name,
        list(act.params), channels_last, backend,
    )  # fmt: skip
    if updates and call is not None:
        with torch.no_grad():
            _move(call.running_mean, mean, call.momentum)
            _move(call.running_var, var, call.momentum)
    return y


def _move(running: Tensor | None, new: Tensor, momentum: float) -> None:
    if running is not None:
        running.copy_(running.float() * (1 - momentum) + new * momentum)


def _check_sizes(step: Step, x: Tensor, call: NormCall) -> None:
    from ..norms import check_sizes

    check_sizes(x.new_empty((x.shape[0], step.spec.out_channels, *step.spec.output_size(x.shape[2:]))), call)
