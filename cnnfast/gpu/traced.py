"""Steps with gradients as `torch.library` operators: what `torch.compile` sees of them on a GPU.

The forward is ``cnnfast::conv``, or ``cnnfast::conv_norm_act`` where something follows the convolution that its
epilogue cannot do with a gradient. Their derivatives are those of eager mode (`conv_autograd`, `norm_act_autograd`),
made of ``conv``, ``conv_weight_grad``, ``activation_backward`` and ``norm_act_backward``, so that a traced backward is
made of operators, too. A step crosses as its key (`step.step_key`). Running statistics are returned, and moved by the
traced code: an operator with a derivative must not write to its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, reference
from ..activations import Activation
from ..dispatch import by_kernels, watched
from ..memory_format import format_of, to_format
from ..norms import check_values
from ..reference import Grads, Saved, backward_by_torch
from ..spec import DTYPES
from ..step import Operands, Step, norm_step, output_padding_of, step_key, step_of
from . import conv_autograd, conv_wgrad, norm_act_autograd
from .block import How, block_backward, block_setup
from .conv_autograd import Primitives, conv_forward, conv_setup, wgrad_forward, wgrad_setup
from .norm_act_autograd import Forward, proven_backward, proven_forward
from .why_not import why_not

__all__ = ["run", "takes"]


def _by_kernels(x: Tensor, backend: str | None) -> bool:
    return by_kernels(x, dispatch.resolve_backend(backend))


def _required(backend: str | None) -> bool:
    return dispatch.resolve_backend(backend) == "triton"


def _empty(x: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    fmt = format_of(len(shape), channels_last)
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=fmt)


def _nothing(x: Tensor, *size: int) -> Tensor:
    """Stands for a result that was not asked for; or a vector in float32."""
    return x.new_empty(size or 0, dtype=torch.float32)


def _own(t: Tensor, *others: Tensor) -> Tensor:
    """``t`` as a tensor of its own, which an operator may return."""
    pointer = t.untyped_storage().data_ptr()
    return t.clone() if any(o.untyped_storage().data_ptr() == pointer for o in others) and t.numel() else t


def _shape(x: Tensor, step: Step) -> tuple[int, ...]:
    return (x.shape[0], step.spec.out_channels, *step.output_size(x.shape[2:]))


# --- convolution ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("cnnfast::conv", mutates_args=())
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    step: str,
    output_padding: Sequence[int],
    channels_last: bool,
    backend: str | None,
) -> Tensor:
    s = step_of(step, weight.shape, output_padding)
    if _by_kernels(x, backend):
        return conv_forward(x, weight, bias, s, channels_last, _required(backend))[0]
    return to_format(reference.conv_block(x, weight, bias, s.spec, activation=s.activation), channels_last)


@conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    step, output_padding, channels_last, _ = args
    return _empty(x, _shape(x, step_of(step, weight.shape, output_padding)), channels_last)


@torch.library.custom_op("cnnfast::conv_weight_grad", mutates_args=())
def conv_weight_grad(
    x: Tensor, grad: Tensor, like: Tensor, step: str, output_padding: Sequence[int], backend: str | None
) -> Tensor:
    s = step_of(step, like.shape, output_padding)
    if _by_kernels(x, backend):
        return wgrad_forward(x, grad, like, s, _required(backend))
    return torch.empty_like(like).copy_(conv_wgrad.by_torch(x, grad, like, s.spec))


@conv_weight_grad.register_fake
def _(x: Tensor, grad: Tensor, like: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(like)


@torch.library.custom_op("cnnfast::activation_backward", mutates_args=())
def activation_backward(
    grad: Tensor, saved: Tensor | None, step: str, bias: bool, channels_last: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    activation = step_of(step).activation
    if _by_kernels(grad, backend):
        dz, db = norm_act_autograd.activation_backward(
            grad, saved, activation, bias=bias, required=_required(backend)
        )  # fmt: skip
    else:
        dz, db = norm_act_autograd.activation_backward_by_torch(grad, saved, activation, bias=bias)
    dz = grad.new_empty(0) if saved is None else _own(to_format(dz, channels_last), grad)
    return dz, _nothing(grad) if db is None else db.float()


@activation_backward.register_fake
def _(
    grad: Tensor, saved: Tensor | None, step: str, bias: bool, channels_last: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    dz = grad.new_empty(0) if saved is None else _empty(grad, grad.shape, channels_last)
    return dz, _nothing(grad, grad.shape[1]) if bias else _nothing(grad)


# --- what a traced backward is made of --------------------------------------------------------------------------------


def _primitives(backend: str | None) -> Primitives:
    def convolution(
        x: Tensor, weight: Tensor, bias: Tensor | None, step: Step, channels_last: bool, required: bool
    ) -> Tensor:
        return conv(x, weight, bias, step_key(step), output_padding_of(step), channels_last, backend)

    def weight_gradient(x: Tensor, grad: Tensor, like: Tensor, step: Step, required: bool) -> Tensor:
        return conv_weight_grad(x, grad, like, step_key(step), output_padding_of(step), backend)

    def gradient(
        grad: Tensor, saved: Tensor | None, activation: Activation, *, bias: bool, required: bool
    ) -> tuple[Tensor, Tensor | None]:
        if saved is None and not bias:
            return grad, None
        key = step_key(norm_step(None, False, activation))
        dz, db = activation_backward(grad, saved, key, bias, True, backend)
        return grad if saved is None else dz, db if bias else None

    return Primitives(convolution, weight_gradient, gradient)


def _traced(grad: Tensor, backend: str | None) -> bool:
    """Whether a backward is to be made of operators."""
    return watched(grad) or not _by_kernels(grad, backend)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    by = _primitives(ctx.backend) if _traced(grad, ctx.backend) else None
    found = conv_autograd.conv_backward(ctx.of, ctx.saved_tensors, ctx.needs_input_grad[:3], grad, by)
    return *found, None, None, None, None


def _conv_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, step, output_padding, _, ctx.backend = inputs
    s, need = step_of(step, weight.shape, output_padding), ctx.needs_input_grad[:3]
    ctx.of, saved = conv_setup(x, weight, bias, output, s, _required(ctx.backend), need)
    ctx.save_for_backward(*saved)


conv.register_autograd(_conv_backward, setup_context=_conv_setup_context)


def _wgrad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, grad, like, step, output_padding, backend = inputs
    wgrad_setup(ctx, x, grad, step_of(step, like.shape, output_padding), _required(backend))


conv_weight_grad.register_autograd(
    lambda ctx, v: (*conv_autograd.wgrad_backward(ctx, v), None, None, None, None), setup_context=_wgrad_setup_context
)


# --- convolution, norm, residual, activation --------------------------------------------------------------------------


@torch.library.custom_op("cnnfast::conv_norm_act", mutates_args=())
def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,  # the statistics where the norm does not measure
    var: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    step: str,
    output_padding: Sequence[int],
    updates: bool,
    channels_last: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(result, the convolution's result, the means and 1/deviations that it took, and what running statistics move
    towards: each channel's mean and unbiased variance). Empty where there is no such thing."""
    s = step_of(step, weight.shape, output_padding)
    tail, required = s.tail, _required(backend)
    moved = [_nothing(x) for _ in range(2)]
    o = Operands(x, None, None, mean, var, scale, shift, residual, slope)  # type: ignore[arg-type]
    if updates:
        # By a momentum of one they become the batch's.
        moved = [x.new_zeros(s.spec.out_channels, dtype=torch.float32) for _ in range(2)]
        o = o._replace(mean=moved[0], var=moved[1], momentum=1.0)
    found = None
    if _by_kernels(x, backend):
        statistics = None
        if tail.norm is not None and tail.norm.measured:
            statistics = "image" if tail.norm.per_image else "batch"
        u, parts = conv_forward(x, weight, bias, s.bare, True, required, statistics)
        o = o._replace(x=u)
        reason = why_not(tail, o)
        if reason is None:
            found = proven_forward(tail, o, parts, channels_last, x.dtype, required)
        elif required:
            raise dispatch.refusal(reason)
    else:
        o = o._replace(x=to_format(reference.conv(x, weight, bias, s.spec), True))
    u = o.x
    y, moments = _by_torch(tail, o, channels_last) if found is None else (found.y, found.mean)
    if not tail.measured or moments is None:
        moments = _nothing(x)
    return _own(y, u), u, moments, moved[0], moved[1]


def _by_torch(tail: Step, o: Operands, channels_last: bool) -> tuple[Tensor, Tensor | None]:
    """(y, means and 1/deviations) by PyTorch's operators."""
    u, norm = o.x, tail.norm
    y = to_format(reference.finish(tail, o), channels_last)
    if norm is None or not norm.measured:
        return y, None
    n, c = u.shape[:2]
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    rows = wide.reshape(n, c // norm.join(c), -1) if norm.per_image else wide.transpose(0, 1).reshape(1, c, -1)
    var, mean = torch.var_mean(rows, 2, correction=0)
    return y, torch.stack((mean, torch.rsqrt(var + norm.eps)), 1).float()


@conv_norm_act.register_fake
def _(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    step, output_padding, updates, channels_last, _ = args[-5:]
    s = step_of(step, weight.shape, output_padding)
    n, c, norm = x.shape[0], s.spec.out_channels, s.norm
    statistics: tuple[int, ...] = ()
    if norm is not None and norm.measured:
        statistics = (n if norm.per_image else 1, 2, norm.groups if norm.kind == "group" else c)
    moved = (c,) if updates else ()
    shape = _shape(x, s)
    y, u = _empty(x, shape, channels_last), _empty(x, shape, True)
    return y, u, _nothing(x, *statistics), _nothing(x, *moved), _nothing(x, *moved)


@torch.library.custom_op("cnnfast::norm_act_backward", mutates_args=())
def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    other: Tensor | None,
    step: str,
    channels_last: bool,
    need: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, residual and slope: empty where ``need`` does not ask for one."""
    s, saved = step_of(step), Saved(x, weight, bias, slope, mean, var, other)
    wanted = tuple(need)
    if _by_kernels(x, backend):
        found = proven_backward(grad, saved, s, channels_last, wanted, None, _required(backend))
    else:
        found = backward_by_torch(grad, saved, s, wanted, None)
    like = (x, weight, bias, grad, slope)
    out = [_nothing(grad) if not n or g is None else g for g, n in zip(found, need, strict=True)]
    out = [to_format(g, channels_last if k == 3 else True) if g.dim() > 3 else g.clone() for k, g in enumerate(out)]
    out[3] = _own(out[3], out[0], grad)
    out[0] = _own(out[0], grad)
    out = [g if t is None or not g.numel() else g.to(t.dtype) for g, t in zip(out, like, strict=True)]
    return out[0], out[1], out[2], out[3], out[4]


@norm_act_backward.register_fake
def _(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    weight, bias, slope = args[:3]
    channels_last, need = args[-3:-1]
    full = (
        _empty(x, x.shape, True),
        None if weight is None else weight.new_empty(weight.shape),
        None if bias is None else bias.new_empty(bias.shape),
        _empty(grad, grad.shape, channels_last),
        None if slope is None else slope.new_empty(slope.shape),
    )
    return tuple(_nothing(grad) if f is None or not n else f for f, n in zip(full, need, strict=True))


def _tensors(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Of the operator's inputs, or of what belongs to each of them, those of `block.block_forward`."""
    return *inputs[:5], *inputs[7:9]


def _conv_norm_act_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, _, mean, var, _, _, step, output_padding, _, channels_last, ctx.backend = inputs
    y, u, moments, *_ = output
    s = step_of(step, weight.shape, output_padding)
    done = Forward(y, moments, None, None) if s.measured else Forward(y, mean, var, None)
    how = How(s, channels_last, x.dtype, _required(ctx.backend))
    ctx.of, saved = block_setup(_tensors(inputs), u, done, how, _tensors(ctx.needs_input_grad))
    ctx.save_for_backward(*saved)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _norm_pass(backend: str | None) -> norm_act_autograd.Pass:
    def norm_pass(
        grad: Tensor,
        saved: Saved,
        step: Step,
        channels_last: bool,
        need: tuple[bool, ...],
        reduce: Any,
        required: bool,
    ) -> Grads:
        """`proven_backward` as an operator, whose results are tensors of their own."""
        identity = step.activation.name == "identity"
        passes = need[3] and not identity and step.norm is not None  # the residual's gradient is a tensor of its own
        shares = need[3] and not identity and step.norm is None  # it is x's
        wanted = [need[0] or shares, need[1], need[2], passes, need[4]]
        out = norm_act_backward(grad, *saved, step_key(step), channels_last, wanted, backend)
        dx, dw, db, dres, dslope = (g if n else None for g, n in zip(out, wanted, strict=True))
        dres = grad if need[3] and identity else dx if shares else dres
        return Grads(dx if need[0] else None, dw, db, dres, dslope)

    return norm_pass


def _conv_norm_act_backward(ctx: Any, grad: Tensor | None, *of_others: None) -> tuple[Any, ...]:
    nothing = (None,) * 14
    if grad is None:
        return nothing
    backend, need, by = ctx.backend, _tensors(ctx.needs_input_grad), None
    if _traced(grad, backend):
        by = _primitives(backend), _norm_pass(backend)
    found = block_backward(ctx.of, list(ctx.saved_tensors), need, grad, None, by)
    return *found[:5], None, None, *found[5:], *nothing[9:]


conv_norm_act.register_autograd(_conv_norm_act_backward, setup_context=_conv_norm_act_setup_context)


# --- the step, as Dynamo traces it ------------------------------------------------------------------------------------


def takes(o: Operands) -> bool:
    """Whether operators stand for a step with gradients of these operands."""
    return o.x.dtype in DTYPES and o.group is None


def run(step: Step, o: Operands, channels_last: bool, backend: str | None) -> Tensor:
    """`gpu.backend.run` of a training step made of operators; running statistics move in the traced code."""
    x, weight, norm = step.pad_input(o.x), reference.conv_weight(step, o.weight), step.norm
    plain = Step(step.spec, step.activation, norm=norm, residual=step.residual)
    if norm is None and not step.residual and step.activation.saves() != "x":
        return conv(x, weight, o.bias, step_key(plain), output_padding_of(plain), channels_last, backend)
    updates, moved = False, (o.mean, o.var)
    if norm is not None and norm.measured:
        updates, moved = o.mean is not None, (None, None)
        check_values((x.shape[0], step.spec.out_channels, *step.spec.output_size(x.shape[2:])), norm)
    y, _, _, mean, var = conv_norm_act(
        x, weight, o.bias, o.scale, o.shift, *moved, o.residual, o.slope, step_key(plain), output_padding_of(plain),
        updates, channels_last, backend,
    )  # fmt: skip
    if updates:
        with torch.no_grad():
            _move(o.mean, mean, o.momentum)
            _move(o.var, var, o.momentum)
    return y


def _move(running: Tensor | None, new: Tensor, momentum: float) -> None:
    if running is not None:
        running.copy_(running.float() * (1 - momentum) + new * momentum)
