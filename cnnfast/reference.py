"""The mathematics in plain torch: the word of truth for every backend, in any dtype (float64 included), differentiable.

Nothing here is fast. `conv_block` is what users get wherever no faster path applies and a gradient is needed;
`gather_conv` restates `spec.py`'s phases, so that a test can hold the geometry against torch's own convolutions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .activations import Activation
from .spec import ConvSpec, summed_taps

__all__ = ["collapse_weight", "conv", "conv_block", "epilogue", "gather_conv", "upsample_conv"]


def conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, spec: ConvSpec) -> torch.Tensor:
    """torch's own convolution for ``spec``. x (N, C_in, *size) -> (N, C_out, *output_size)."""
    s = spec
    if s.transposed:
        ct = F.conv_transpose1d if s.ndim == 1 else F.conv_transpose2d
        return ct(x, weight, bias, s.stride, s.padding, s.output_padding, s.groups, s.dilation)
    c = F.conv1d if s.ndim == 1 else F.conv2d
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
    """Weight of `spec.collapse_upsample`: (C_out, C_in/g, kh, kw) -> (C_in, C_out/g, kh+r-1, kw+r-1).

    Sums are taken in float64 and rounded once to the weight's dtype.
    """
    c_out, c_in, kh, kw = weight.shape
    w = weight.double()
    sh, sw = (_sum_matrix(k, r, w.dtype, w.device) for k, r in zip((kh, kw), scale, strict=True))
    w = torch.einsum("jt,octu,lu->ocjl", sh, w, sw)
    w = w.reshape(groups, c_out // groups, c_in, kh + scale[0] - 1, kw + scale[1] - 1).transpose(1, 2)
    return w.reshape(groups * c_in, c_out // groups, *w.shape[-2:]).to(weight.dtype)


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
    if padding_mode == "zeros":
        return F.conv2d(x, weight, bias, padding=tuple(padding), groups=groups)
    ph, pw = padding
    return F.conv2d(F.pad(x, (pw, pw, ph, ph), mode=padding_mode), weight, bias, groups=groups)
