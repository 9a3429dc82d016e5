"""The mathematics in plain torch: the word of truth for every backend, in any dtype (float64 included), differentiable.

Nothing here is fast. `conv_block` is what users get wherever no faster path applies and a gradient is needed;
`gather_conv` restates `spec.py`'s phases, so that a test can hold the geometry against torch's own convolutions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import Activation, activation_derivative
from .dispatch import on_cpu
from .memory_format import format_of
from .norm_sync import shared, synchronised
from .norms import Norm, check_values, per_channel
from .spec import ConvSpec, summed_taps
from .step import Operands, Step

__all__ = [
    "Grads",
    "Saved",
    "backward_by_torch",
    "collapse_weight",
    "composition",
    "conv",
    "conv_block",
    "conv_weight",
    "epilogue",
    "finish",
    "gather_conv",
    "of_one_image",
    "run_reference",
    "upsample_conv",
]


def conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, spec: ConvSpec) -> torch.Tensor:
    """torch's own convolution for ``spec``. x (N, C_in, *size) -> (N, C_out, *output_size)."""
    s = spec
    if s.transposed:
        ct = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[s.ndim - 1]
        return ct(x, weight, bias, s.stride, s.padding, s.output_padding, s.groups, s.dilation)
    c = (F.conv1d, F.conv2d, F.conv3d)[s.ndim - 1]
    return c(x, weight, bias, s.stride, s.padding, s.dilation, s.groups)


def _per_channel(v: torch.Tensor, ndim: int) -> torch.Tensor:
    return v.reshape(-1, *(1,) * ndim)


def epilogue(
    y: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: Activation,
    slope: torch.Tensor | None,
) -> torch.Tensor:
    """``act(y * scale[c] + shift[c] + residual)`` for y (N, C, *size): float32 inside (float64 stays), y's dtype
    outside."""
    dtype, ndim = y.dtype, y.dim() - 2
    if scale is None and shift is None and residual is None:
        # torch's activations compute low precision in float32 themselves and round once.
        return activation(y, None if slope is None else slope.to(dtype))
    wide = torch.promote_types(dtype, torch.float32)
    y = y.to(wide)
    if scale is not None:
        y = y * _per_channel(scale.to(wide), ndim)
    if shift is not None:
        y = y + _per_channel(shift.to(wide), ndim)
    if residual is not None:
        y = y + residual.to(wide)
    return activation(y, None if slope is None else slope.to(wide)).to(dtype)


def conv_block(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    spec: ConvSpec,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: Activation = Activation(),  # noqa: B008 (frozen)
    slope: torch.Tensor | None = None,
) -> torch.Tensor:
    """``act(scale * (conv(x) + bias) + shift + residual)`` by torch's operators."""
    return epilogue(conv(x, weight, bias, spec), scale, shift, residual, activation, slope)


def gather_conv(x: torch.Tensor, weight: torch.Tensor, spec: ConvSpec) -> torch.Tensor:
    """A 2-D convolution by the phases of ``spec``: one matrix product per tap, scattered to its phase. x (N, C, H,
    W)."""
    n, _, *size = x.shape
    out_size = spec.output_size(size)
    y = x.new_zeros(n, spec.out_channels, *out_size)
    groups, cin = spec.groups, spec.in_channels // spec.groups
    step = spec.stride if spec.transposed else (1, 1)
    stride_in = (1, 1) if spec.transposed else spec.stride
    for ph, pw in itertools.product(*spec.phases):
        for (th, ih), (tw, iw) in itertools.product(ph.pairs(), pw.pairs()):
            qh = torch.arange(ph.size(out_size[0], step[0]))
            qw = torch.arange(pw.size(out_size[1], step[1]))
            rows, cols = qh * stride_in[0] + ih, qw * stride_in[1] + iw
            kh, kw = (rows >= 0) & (rows < size[0]), (cols >= 0) & (cols < size[1])
            oh, ow = (qh * step[0] + ph.residue)[kh], (qw * step[1] + pw.residue)[kw]
            patch = x[:, :, rows[kh]][..., cols[kw]].reshape(n, groups, cin, len(oh), len(ow))
            w = weight[..., th, tw].reshape(groups, -1, weight.shape[1])
            if not spec.transposed:
                w = w.transpose(1, 2)  # (groups, C_in/g, C_out/g)
            part = torch.einsum("ngchw,gcd->ngdhw", patch, w).reshape(n, spec.out_channels, len(oh), len(ow))
            y[:, :, oh[:, None], ow[None, :]] += part
    return y


def _sum_matrix(k: int, r: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(k + r - 1, k) zeros and ones: row j sums the taps of `spec.summed_taps`."""
    rows = [[float(t in taps) for t in range(k)] for taps in summed_taps(k, r)]
    return torch.tensor(rows, dtype=dtype, device=device)


def collapse_weight(weight: torch.Tensor, scale: Sequence[int], groups: int = 1) -> torch.Tensor:
    """Weight of `spec.collapse_upsample`: (C_out, C_in/g, *kernel) -> (C_in, C_out/g, *(k + r - 1)).

    Sums are taken in float64 and rounded once to the weight's dtype.
    """
    c_out, c_in, *kernel = weight.shape
    w = weight.double()
    for dim, (k, r) in enumerate(zip(kernel, scale, strict=True), 2):
        w = torch.tensordot(w, _sum_matrix(k, r, w.dtype, w.device), ([dim], [1])).movedim(-1, dim)
    w = w.reshape(groups, c_out // groups, c_in, *w.shape[2:]).transpose(1, 2)
    return w.reshape(groups * c_in, c_out // groups, *w.shape[3:]).to(weight.dtype)


def conv_weight(step: Step, weight: torch.Tensor) -> torch.Tensor:
    """The weight of ``step.spec`` from the layer's own weight."""
    return weight if step.upsample is None else collapse_weight(weight, step.upsample.scale, step.spec.groups)


def upsample_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: Sequence[int],
    padding: Sequence[int],
    padding_mode: str = "zeros",
    groups: int = 1,
) -> torch.Tensor:
    """Nearest upsampling by ``scale``, padding by ``padding_mode`` ("zeros", "replicate", "reflect"), stride-1
    convolution."""
    x = F.interpolate(x, scale_factor=[float(r) for r in scale], mode="nearest")
    function = F.conv3d if x.dim() == 5 else F.conv2d
    if padding_mode == "zeros":
        return function(x, weight, bias, padding=tuple(padding), groups=groups)
    ends = [p for p in reversed(padding) for _ in range(2)]
    return function(F.pad(x, ends, mode=padding_mode), weight, bias, groups=groups)


def run_reference(step: Step, o: Operands) -> torch.Tensor:
    """The step by torch's own operators, as an unfused model would run it: any dtype, any device, differentiable. A
    weight in a wider dtype than x is cast to x's."""
    s, u, y = step.spec, step.upsample, o.x
    if s is None:
        return finish(step, o)
    weight = o.weight.to(y.dtype)
    if u is None:
        y = conv(step.pad_input(y), weight, o.bias, s)
    else:
        y = upsample_conv(y, weight, o.bias, u.scale, u.padding, u.mode, s.groups)
    return finish(step, o._replace(x=y))


def finish(step: Step, o: Operands) -> Tensor:
    """Norm, residual and activation of ``step`` on its convolution's result ``o.x``, as an unfused model computes them,
    in place where autograd allows that."""
    norm, activation = step.norm, step.activation
    if norm is None or norm.kind == "affine":
        y = epilogue(o.x, o.scale, o.shift, o.residual, activation, o.slope)
        return y.clone() if norm is not None and y is o.x else y
    check_values(o.x.shape, norm, several=o.group is not None)
    y = synchronised(norm, o) if shared(norm, o) else _norm(norm, o)
    ours = not y._is_view()
    if o.residual is not None:
        dtype = torch.promote_types(y.dtype, o.residual.dtype)
        # What computed y saved its input, not y.
        y = y.add_(o.residual) if ours and y.dtype == dtype else y + o.residual
        ours = True
    row = activation.row
    # In place, one that reads its input would save its result instead: a caller's own in-place operation on that would
    # be an error, which it is not in eager mode.
    if row.in_place is not None and not row.reads_input and ours and not torch.compiler.is_compiling():
        return row.in_place(y, *activation.params)
    return activation(y, None if o.slope is None else o.slope.to(y.dtype))


def _norm(norm: Norm, o: Operands) -> Tensor:
    x = o.x
    running = [t for t in (o.mean, o.var) if t is not None]
    vectors = {t.dtype for t in (*running, o.scale, o.shift) if t is not None}
    if vectors <= {x.dtype} or (x.dtype.itemsize == 2 and vectors == {torch.float32}):
        return _unfused(norm, o)
    # Dtypes that PyTorch does not combine: everything in the widest, running tensors written back.
    wide = torch.float64 if torch.float64 in {x.dtype, *vectors} else torch.float32
    named = {"x": x, "mean": o.mean, "var": o.var, "scale": o.scale, "shift": o.shift}
    tensors: dict[str, Any] = {k: v.to(wide) for k, v in named.items() if v is not None}
    y = _unfused(norm, o._replace(**tensors)).to(x.dtype)
    if norm.measured:
        for name in ("mean", "var"):
            given = named[name]
            if given is not None and tensors[name] is not given:
                given.copy_(tensors[name])
    return y


def _unfused(norm: Norm, o: Operands) -> Tensor:
    x, mean, var, weight, bias = o.x, o.mean, o.var, o.scale, o.shift
    if norm.kind == "group":
        # Of channels-last tensors, PyTorch's CPU kernel computes E[x^2] - E[x]^2.
        x = x.contiguous() if on_cpu(x) else x
        return F.group_norm(x, norm.groups, weight, bias, norm.eps)
    if norm.kind == "instance" and x.shape[0] != 1:
        return F.instance_norm(x, mean, var, weight, bias, True, o.momentum, norm.eps)
    if norm.kind == "batch":
        return F.batch_norm(x, mean, var, weight, bias, True, o.momentum, norm.eps)
    exact = of_one_image(o, norm.eps) if norm.measured else None
    if exact is not None:
        return exact
    # Of one image, InstanceNorm is the batch norm (whose gradient is right where that of F.instance_norm is not, on a
    # CPU, for a channels-last gradient), without the check of F.batch_norm that eps is positive.
    return torch.batch_norm(
        x, weight, bias, mean, var, norm.measured, o.momentum, norm.eps, torch.backends.cudnn.enabled
    )


_FEW = 512  # values whose sum in float32 is about as exact as each of them


def of_one_image(o: Operands, eps: float) -> Tensor | None:
    """InstanceNorm of an image whose values, channels-last, PyTorch's CPU kernel would add up one after the other in
    float32: of a million values three digits are lost. (An InstanceNorm module converts to NCHW, whose kernel does
    not.) None for others, and where a gradient is wanted: there that stays."""
    given = (o.x, o.scale, o.shift)
    if (
        not on_cpu(o.x)
        or o.x.dtype != torch.float32
        or o.x.dim() not in (4, 5)
        or o.x.is_contiguous()
        or not o.x.is_contiguous(memory_format=format_of(o.x.dim(), True))
        or o.mean is not None
        or o.var is not None
        or torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given))
    ):
        return None
    rows = o.x.movedim(1, -1).flatten(0, -2)
    mean = (_sums(rows) / len(rows)).float()
    var = (_sums((rows - mean).square_()) / len(rows)).float()
    return torch.batch_norm(o.x, o.scale, o.shift, mean, var, False, 0.0, eps, False)


def _sums(rows: Tensor) -> Tensor:
    """Of (n, C) float32, in float64: (C,). Few values are added in float32."""
    whole = len(rows) // _FEW * _FEW
    parts = rows[:whole].view(-1, _FEW, rows.shape[1]).sum(1)
    return parts.sum(0, dtype=torch.float64) + rows[whole:].sum(0, dtype=torch.float64)


def composition(norm: Norm | None, o: Operands) -> Tensor:
    """The norm of ``o.x`` (N, C, ...) made of elementary operations, in float32 or x's wider dtype; differentiable any
    number of times, its statistics included. Running tensors stay as they are."""
    y = o.x.to(torch.promote_types(o.x.dtype, torch.float32))
    if norm is None:
        return y
    if norm.measured:
        shape, dims = y.shape, tuple(range(2, y.dim()))
        if norm.kind == "group":
            y, dims = y.reshape(shape[0], norm.groups, math.prod(shape[1:]) // norm.groups), (2,)
        elif norm.kind == "batch":
            dims = (0, *dims)
        var, mean = torch.var_mean(y, dims, correction=0, keepdim=True)
        y = ((y - mean) * torch.rsqrt(var + norm.eps)).reshape(shape)
    elif norm.kind == "running":
        assert o.mean is not None and o.var is not None
        mean, var = (per_channel(t.detach().to(y.dtype), y) for t in (o.mean, o.var))
        y = (y - mean) * torch.rsqrt(var + norm.eps)
    if o.scale is not None:
        y = y * per_channel(o.scale.to(y.dtype), y)
    if o.shift is not None:
        y = y + per_channel(o.shift.to(y.dtype), y)
    return y


def backward_by_torch(
    grad: Tensor,
    s: Saved,
    step: Step,
    need: Grads | tuple[bool, ...],
    reduce: Any = None,
    terms: dict[str, Tensor] | None = None,
) -> Grads:
    """`cnnfast.gpu.norm_act_backward.backward` by its equations, in float32 or x's wider dtype. Not differentiable:
    mean and deviation are constants here. ``terms`` gets what the gradients of the vectors are sums of."""
    need_x, need_weight, need_bias, need_residual, need_slope = need
    wide = torch.promote_types(s.x.dtype, torch.float32)
    x, dz = s.x.to(wide), grad.to(wide)
    (n, c), dims, norm = x.shape[:2], (0, *range(2, x.dim())), step.norm
    join = 1 if norm is None else norm.join(c)

    def spread(v: Tensor) -> Tensor:
        """(S, C / join) or (C,) against x."""
        each = v.to(wide).reshape(-1, c // join).repeat_interleave(join, 1)
        return each.reshape(*each.shape, *(1,) * (x.dim() - 2))

    rstd, xhat = torch.ones((), dtype=wide, device=x.device), x
    if s.mean is not None and norm is not None:
        mean, rstd = (spread(v) for v in (s.mean.unbind(1) if s.var is None else (s.mean, s.var)))
        rstd = rstd if s.var is None else torch.rsqrt(rstd + norm.eps)
        xhat = (x - mean) * rstd
    weight = torch.ones_like(rstd) if s.weight is None else per_channel(s.weight.to(wide), x)
    out: dict[str, Tensor | None] = {}
    if step.of:
        at = s.other
        if step.of == "x":
            z = xhat * weight if s.bias is None else xhat * weight + per_channel(s.bias.to(wide), x)
            at = z if s.other is None else z + s.other.to(wide)
            if need_slope and s.slope is not None:
                by_element = torch.where(at > 0, torch.zeros_like(at), at * dz)
                out["slope"] = by_element.sum().reshape(1) if s.slope.numel() == 1 else by_element.sum(dims)
                if terms is not None:
                    terms["slope"] = by_element
        assert at is not None
        dz = dz * activation_derivative(step.activation, at.to(wide), s.slope, of=step.of)
    sums = torch.stack([dz.sum(dims), (dz * xhat).sum(dims)])
    if terms is not None:
        terms |= {"bias": dz, "weight": dz * xhat}
    if need_bias:
        out["bias"] = sums[0]
    if need_weight:
        out["weight"] = sums[1]
    if need_residual:
        out["residual"] = dz
    if need_x:
        dx = dz * weight
        if norm is not None and norm.measured:
            if reduce is not None:
                total, number = reduce(sums)
                mean1, mean2 = (per_channel(v, x) * weight / number for v in total)
            else:
                segments = n if norm.per_image else 1
                mean1, mean2 = (spread(_means(v, segments, c // join)) for v in (dx, dx * xhat))
            dx = dx - mean1 - xhat * mean2
        out["x"] = dx * rstd
    like = {"x": s.x, "weight": s.weight, "bias": s.bias, "residual": grad, "slope": s.slope}
    return Grads(**{k: v if v is None or like[k] is None else v.to(like[k].dtype) for k, v in out.items()})  # type: ignore[union-attr]


def _means(v: Tensor, segments: int, groups: int) -> Tensor:
    """(segments, groups) of v (N, C, *size): over the batch, or over each image's groups of channels."""
    rows = v.transpose(0, 1).reshape(1, groups, -1) if segments == 1 else v.reshape(segments, groups, -1)
    return rows.mean(2)


# --- backward ---------------------------------------------------------------------------------------------------------


class Grads(NamedTuple):
    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    slope: Tensor | None = None


class Saved(NamedTuple):
    """Of the forward: its tensors; ``mean`` and ``var`` (C,) where these were given, or (segments, 2, C / join) float32
    means and 1/deviations, and None, where it took them; and ``other``, the result or the residual as `Step.of` says
    (or None)."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    slope: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    other: Tensor | None
