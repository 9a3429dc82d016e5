"""A convolution with gradients on a CPU: matrix products where oneDNN's convolutions, called from ATen, are slow.

Those are made for large maps: on maps of 4x4 and on 1x1 inputs they spend their time on the weight, bringing it into
a layout of their own and back. There the gradients of a transposed convolution are two products with the patches of
the incoming gradient, which are gathered once; the forward is one product for each phase. Contiguous maps that a large
contiguous weight outweighs stay so (`columns`). `ways` and `contiguous_ways` have the rules, which were measured
(docs/facts.md). One sample of three dimensions, which ATen leaves to loops, runs as two (`halves`).
Everything else is ATen's own convolution, channels-last.

The backward under ``create_graph`` is ATen's own, which is differentiable.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..dispatch import is_batched
from ..gradients import enter, keep_strides, restrided
from ..memory_format import convert, is_channels_last, new_strides
from ..spec import DTYPES, ConvSpec
from . import columns, halves
from .isa import InstructionSet, instruction_set, lowered_products, products_dtype
from .methods import gathers
from .onednn import Deconvolution, Gathered, Merged, PostOp, adds_by_element, why_missing

__all__ = [
    "Ways",
    "by_aten",
    "contiguous_convolution",
    "contiguous_ways",
    "convolution",
    "suited",
    "volume_convolution",
    "ways",
]


class Ways(NamedTuple):
    """How one convolution runs. ``forward``: "aten", "product" (1x1 inputs), "phases", "merged", "halves" or "columns";
    ``backward``: "aten", "product", "patches", "halves" or "columns"; both with products in ``dtype``."""

    forward: str
    backward: str
    dtype: torch.dtype

    @property
    def contiguous(self) -> bool:
        """Whether it is of contiguous maps, in two dimensions."""
        return self.backward == "columns"


# Multiply-adds of a forward below which ATen's convolution has the lesser fixed cost: packing for merged phases takes
# 200 us, patches and a Function of ours 50 us more than ATen's own derivative.
_LEAST, _LEAST_MERGED = 2e6, 8e6
# And positions of three dimensions below which patches are small beside the weight, whose products ATen's loops are.
_LEAST_POSITIONS = 256


@lru_cache(maxsize=4096)
def _macs(spec: ConvSpec, shape: tuple[int, ...]) -> int:
    return spec.macs(shape[0], shape[2:])


@lru_cache(maxsize=4096)
def ways(
    spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype, lowered: bool = False, contiguous: bool = False
) -> Ways:
    """How to run ``spec`` on an x of this shape (N, C_in, *size) and dtype; ``lowered``: what `lowered_products` is;
    ``contiguous``: the weight is, and would be brought into the order of phases."""
    if dtype not in DTYPES or not all(shape):
        return Ways("aten", "aten", dtype)
    isa = instruction_set()
    compute = products_dtype(dtype, isa)
    if spec.ndim == 3:
        positions = math.prod(min(shape[2:], spec.output_size(shape[2:]), key=math.prod))
        enough = _macs(spec, shape) >= _LEAST and positions >= _LEAST_POSITIONS and max(spec.kernel_size) > 1 < shape[1]
        way = "halves" if enough and halves.applies(spec, shape, compute) else "aten"
        return Ways(way, way, compute)
    if not spec.transposed or spec.groups > 1:
        return Ways("aten", "aten", compute)
    matmul = not lowered or compute != torch.float32
    if matmul and _is_product(spec, shape):
        return Ways("product", "product", compute)
    forward, macs = "aten", _macs(spec, shape)
    if (
        macs >= _LEAST_MERGED
        and Merged.applies(spec)
        and Merged.padded_macs(spec) < Deconvolution.padded_macs(spec)
        and _has_packed()
    ):
        forward = "merged"
    elif matmul and gathers(spec, shape, compute, isa) and not (contiguous and isa < InstructionSet.AMX):
        forward = "phases"
    patches = matmul and macs >= _LEAST and _takes_patches(spec, shape, compute, isa)
    return Ways(forward, "patches" if patches else "aten", compute)


@lru_cache(maxsize=4096)
def contiguous_ways(spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype, lowered: bool = False) -> Ways | None:
    """How to run ``spec`` on a contiguous x of this shape (N, C_in, H, W) and dtype, with a contiguous weight, better
    than ATen does; None: it does not get better. ``lowered``: as of `ways`."""
    if dtype not in DTYPES or not all(shape):
        return None
    compute = products_dtype(dtype, instruction_set())
    forward, backward = columns.faster(spec, shape, compute)
    if not backward or lowered and compute == torch.float32:
        return None
    return Ways("columns" if forward else "aten", "columns", compute)


def _is_product(spec: ConvSpec, shape: tuple[int, ...]) -> bool:
    """Whether each output position has a tap of its own, which meets the only input position."""
    plain = not any(spec.padding) and not any(spec.output_padding) and all(d == 1 for d in spec.dilation)
    return plain and shape[2:] == (1, 1)


def _has_packed() -> bool:
    return why_missing() is None and torch._C._get_mkldnn_enabled()


def _takes_patches(spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype, isa: InstructionSet) -> bool:
    """The more positions, the better oneDNN's convolutions are and the larger are the patches."""
    positions, rows, weights = math.prod(shape[2:]), shape[0] * math.prod(shape[2:]), math.prod(spec.weight_shape)
    if rows <= 256:
        return True
    if isa >= InstructionSet.AMX and dtype != torch.float32:
        return positions <= 144 and rows <= 1024 or positions <= 64 and rows <= 4096 and weights >= 2**18
    most = 512 if InstructionSet.AVX512 <= isa < InstructionSet.AMX else 1024
    return rows <= most and weights * dtype.itemsize > 2**22


def by_aten(spec: ConvSpec, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether ATen's own convolution runs ``spec`` on a contiguous x of this shape, forward and backward, as fast as
    channels-last: a plain one (oneDNN brings it into a layout of its own in any case), little work, other dtypes."""
    how = ways(spec, shape, dtype, lowered_products())
    if how != ("aten", "aten", dtype):
        return False
    return not spec.transposed or dtype == torch.float64 or _macs(spec, shape) < _LEAST


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """x (N, C_in, H, W) -> (N, C_out, OH, OW), channels-last and new; x, weight and bias of one dtype. The weight's
    gradient has the weight's strides."""
    how = ways(spec, tuple(x.shape), x.dtype, lowered_products(), weight.is_contiguous())
    x = convert(x, x.dtype, True)
    weight = keep_strides(weight, True)
    # ATen takes twice as long for a transposed convolution's weight gradient where it sums the bias's beside it.
    apart = bias is not None and spec.transposed and _macs(spec, x.shape) >= _LEAST
    if how == ("aten", "aten", x.dtype) and (not apart or x.dtype == torch.float64):
        return convert(reference.conv(suited(x, weight), weight, bias, spec), x.dtype, True)
    return _Convolution.apply(x, weight, bias, spec, how)


def volume_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """x (N, C_in, D, H, W) -> (N, C_out, OD, OH, OW), contiguous or channels-last; x, weight and bias of one dtype. The
    weight's gradient has the weight's strides."""
    how = ways(spec, tuple(x.shape), x.dtype, lowered_products())
    weight = keep_strides(weight, None)
    if how.forward == "aten":
        return reference.conv(x, weight, bias, spec)
    return _Convolution.apply(convert(x, x.dtype, is_channels_last(x)), weight, bias, spec, how)


def contiguous_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec, how: Ways) -> Tensor:
    """x (N, C_in, H, W) -> (N, C_out, OH, OW), contiguous, as `contiguous_ways` says; x, weight and bias of one dtype,
    the weight contiguous."""
    return _Convolution.apply(convert(x, x.dtype, False), keep_strides(weight, False), bias, spec, how)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec, how: Ways) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.spec, ctx.how = spec, how
        ctx.bias_size = None if bias is None else list(bias.shape)
        dtype = how.dtype
        b = None if bias is None else bias.to(dtype)
        y = _FORWARD[how.forward](x.to(dtype), weight.to(dtype), b, spec)
        last = _is_last(x, how)
        # No view in autograd's eyes: what follows may overwrite it.
        return _plain(convert(y, x.dtype, last), last).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        spec, how = ctx.spec, ctx.how
        need = ctx.needs_input_grad[:3]
        # ATen's has a derivative, and a rule for batches of gradients (``is_grads_batched``).
        if torch.is_grad_enabled() or is_batched(grad) or not any(need):
            return *_by_aten(grad, x, weight, ctx.bias_size, spec, need), None, None
        dtype = how.dtype
        last = _is_last(x, how)
        grad = convert(grad, dtype, last)
        with torch._C._DisableAutocast():  # which lowers matrix products, but no convolution's gradients
            dx, dw, db = _BACKWARD[how.backward](grad, x.to(dtype), weight.to(dtype), ctx.bias_size, spec, need)
        dx = None if dx is None else _plain(convert(dx, x.dtype, last), last)
        db = None if db is None else db.to(x.dtype)
        dw = None if dw is None else restrided(dw, torch.empty_like(weight, device="meta").stride(), weight.dtype)
        return dx, dw, db, None, None


def _is_last(x: Tensor, how: Ways) -> bool:
    """The format of a convolution: two dimensions are channels-last, but for `contiguous_ways`."""
    return not how.contiguous if x.dim() == 4 else is_channels_last(x)


def _plain(y: Tensor, channels_last: bool) -> Tensor:
    """A y in this format with the strides of a new one. (Where a dimension of size 1 has another stride, as after
    cropping, ATen takes y for NCHW: the gradients of its batch norm are wrong then, for some formats of its result's.)
    """
    return restrided(y, new_strides(y.shape, channels_last))


# --- forward ----------------------------------------------------------------------------------------------------------


def _rows(t: Tensor) -> Tensor:
    """A channels-last (N, C, H, W) as (N*H*W, C)."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _matrix(weight: Tensor) -> Tensor:
    """(C_in, C_out, kh, kw) as (C_in, kh*kw*C_out), a view of a channels-last one."""
    return convert(weight, weight.dtype, True).permute(0, 2, 3, 1).reshape(weight.shape[0], -1)


def suited(x: Tensor, weight: Tensor, times: int = 1) -> Tensor:
    """A channels-last x in NCHW where the weight is and outweighs it (or what it becomes, ``times`` as large): ATen
    would bring the weight into channels-last first. Its gradient stays channels-last."""
    if not weight.is_contiguous() or weight.numel() <= 4 * times * x.numel():
        return x
    return enter(x, x.dtype, False, True) if torch.is_grad_enabled() and x.requires_grad else x.contiguous()


def _forward_aten(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    apart = bias is not None and adds_by_element(spec, tuple(x.shape), x.dtype)
    y = reference.conv(suited(x, weight), weight, None if apart else bias, spec)
    return y.add_(bias.view(-1, *(1,) * spec.ndim)) if apart else y  # type: ignore[union-attr]


def _forward_product(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    """Of 1x1 inputs: each output position has the tap of its own. In the weight's memory order, so that the weight,
    the largest of the three, is not copied."""
    n, c = x.shape[:2]
    _, c_out, kh, kw = weight.shape
    x = x.reshape(n, c)
    if weight.is_contiguous():
        y = torch.mm(x, weight.view(c, -1)).view(n, c_out, kh, kw)
    else:
        y = torch.mm(x, _matrix(weight)).view(n, kh, kw, c_out).permute(0, 3, 1, 2)
    return y if bias is None else y.add_(bias.view(-1, 1, 1))


class _Phases(Gathered):
    """With the weight as it is, gathered by phases: oneDNN's layout takes longer to make than the products take."""

    def pack(self, weight: Tensor, shift: Tensor | None) -> Any:
        taps = convert(weight, self.dtype, True).permute(2, 3, 0, 1)
        return [
            torch.cat([taps[th, tw] for th, _ in a.pairs()[::-1] for tw, _ in b.pairs()[::-1]])
            for a, b, _, _ in self.phases
        ], shift

    @staticmethod
    def product(patches: Tensor, weight: Any, shift: Tensor | None, post: PostOp) -> Tensor:
        return torch.mm(patches, weight) if shift is None else torch.addmm(shift, patches, weight)


def _forward_phases(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    method = _Phases(spec, x.shape, x.dtype)
    return method.run(x, method.pack(weight, bias), PostOp(), True)


def _forward_merged(x: Tensor, weight: Tensor, bias: Tensor | None, spec: ConvSpec) -> Tensor:
    method = Merged(spec, x.shape, x.dtype)
    return method.run(x, method.pack(weight, bias), PostOp(), True)


_FORWARD = {
    **{"aten": _forward_aten, "product": _forward_product, "phases": _forward_phases, "merged": _forward_merged},
    **{"halves": halves.forward, "columns": columns.forward},
}


# --- backward ---------------------------------------------------------------------------------------------------------


def _by_aten(
    grad: Tensor, x: Tensor, weight: Tensor, bias_size: list[int] | None, spec: ConvSpec, need: tuple[bool, ...]
) -> Gradients:
    s = spec
    return torch.ops.aten.convolution_backward(
        grad, x, weight, bias_size, s.stride, s.padding, s.dilation, s.transposed, s.output_padding, s.groups, need
    )


def _bias_gradient(grad: Tensor, need: tuple[bool, ...]) -> Tensor | None:
    return grad.sum((0, *range(2, grad.dim()))) if need[2] else None


def _by_aten_apart(
    grad: Tensor, x: Tensor, weight: Tensor, bias_size: list[int] | None, spec: ConvSpec, need: tuple[bool, ...]
) -> Gradients:
    dx, dw, _ = _by_aten(grad, x, weight, None, spec, (*need[:2], False)) if any(need[:2]) else (None, None, None)
    return dx, dw, _bias_gradient(grad, need)


def _by_product(
    grad: Tensor, x: Tensor, weight: Tensor, bias_size: list[int] | None, spec: ConvSpec, need: tuple[bool, ...]
) -> Gradients:
    """Of 1x1 inputs, in the weight's memory order."""
    n, c = x.shape[:2]
    _, c_out, kh, kw = weight.shape
    contiguous = weight.is_contiguous()
    matrix = weight.view(c, -1) if contiguous else _matrix(weight)
    rows = grad.reshape(n, -1) if contiguous else grad.permute(0, 2, 3, 1).reshape(n, -1)
    dx = torch.mm(rows, matrix.t()).view(x.shape) if need[0] else None
    dw = None
    if need[1]:
        dw = torch.mm(x.reshape(n, c).t(), rows)
        dw = dw.view(weight.shape) if contiguous else dw.view(c, kh, kw, c_out).permute(0, 3, 1, 2)
    return dx, dw, _bias_gradient(grad, need)


def _patches(grad: Tensor, spec: ConvSpec, size: tuple[int, ...], taps_last: bool) -> Tensor:
    """What each position of x (of spatial ``size``) meets of the result's gradient: (N*H*W, kh*kw*C_out), or, with the
    ``taps_last``, (N*H*W, C_out*kh*kw)."""
    n, c = grad.shape[:2]
    (h, w), (sh, sw), (dh, dw), (ph, pw) = size, spec.stride, spec.dilation, spec.padding
    padded = F.pad(grad.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph))
    sn, srow, scol, _ = padded.stride()
    strides = (sn, sh * srow, sw * scol, dh * srow, dw * scol, 1)
    patches = padded.as_strided((n, h, w, *spec.kernel_size, c), strides)
    return (patches.permute(0, 1, 2, 5, 3, 4) if taps_last else patches).reshape(n * h * w, -1)


def _by_patches(
    grad: Tensor, x: Tensor, weight: Tensor, bias_size: list[int] | None, spec: ConvSpec, need: tuple[bool, ...]
) -> Gradients:
    n, c, h, w = x.shape
    # In the weight's memory order where the patches are less than the weight: gathering single numbers is slow.
    taps_last = weight.is_contiguous() and 2 * n * h * w <= c
    dx = dw = None
    if need[0] or need[1]:
        patches = _patches(grad, spec, (h, w), taps_last)
        if need[0]:
            matrix = weight.reshape(c, -1) if taps_last else _matrix(weight)
            dx = torch.mm(patches, matrix.t()).view(n, h, w, c).permute(0, 3, 1, 2)
        if need[1]:
            dw = torch.mm(_rows(x).t(), patches)
            dw = dw.view(weight.shape) if taps_last else dw.view(c, *spec.kernel_size, -1).permute(0, 3, 1, 2)
    return dx, dw, _bias_gradient(grad, need)


_BACKWARD = {
    **{"aten": _by_aten_apart, "product": _by_product, "patches": _by_patches},
    **{"halves": halves.backward, "columns": columns.backward},
}
