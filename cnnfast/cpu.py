"""Fused steps on a CPU through oneDNN's packed weights and post-ops (inference only).

PyTorch's own convolution repacks the weight on every call and makes a pass over memory for BatchNorm and the
activation. Here the weight is packed once, BatchNorm's scale folded into it and its shift into the bias (in float32,
rounded once), and the activation runs on the accumulator. ``mkldnn::_reorder_*`` and ``mkldnn::*_pointwise`` are what
`torch.compile` itself calls; they stand in this file alone, behind `_missing`.

How a step runs is a method (`_Deconvolution`, `_Convolution`, `_Projection`), chosen by `_plan`.
oneDNN's relu and hardtanh turn NaN into a number, torch's do not: where a weight holds a NaN they come afterwards.
"""

from __future__ import annotations

import os
import platform
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch

from .block import Operands, Step
from .packing import PACKS
from .spec import Activation

__all__ = ["InstructionSet", "instruction_set", "run", "why_not"]

_OPS = (
    "_reorder_convolution_transpose_weight",
    "_convolution_transpose_pointwise",
    "_reorder_convolution_weight",
    "_convolution_pointwise",
    "_reorder_linear_weight",
    "_linear_pointwise",
)


# --- what the processor has -------------------------------------------------------------------------------------------


class InstructionSet(IntEnum):
    """What oneDNN's kernels may use, in rising order (x86)."""

    NONE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AVX512_FP16 = 4
    AMX = 5
    AMX_FP16 = 6


# The values of ONEDNN_MAX_CPU_ISA (oneDNN's documentation, "CPU dispatcher control"); what is not here is no limit.
_LIMITS = {
    "SSE41": InstructionSet.NONE,
    "AVX": InstructionSet.NONE,
    "AVX2": InstructionSet.AVX2,
    "AVX2_VNNI": InstructionSet.AVX2,
    "AVX2_VNNI_2": InstructionSet.AVX2,
    "AVX512_CORE": InstructionSet.AVX512,
    "AVX512_CORE_VNNI": InstructionSet.AVX512,
    "AVX512_CORE_BF16": InstructionSet.AVX512_BF16,
    "AVX512_CORE_FP16": InstructionSet.AVX512_FP16,
    "AVX10_1_512": InstructionSet.AVX512_FP16,
    "AVX512_CORE_AMX": InstructionSet.AMX,
    "AVX10_1_512_AMX": InstructionSet.AMX,
    "AVX512_CORE_AMX_FP16": InstructionSet.AMX_FP16,
    "AVX10_1_512_AMX_FP16": InstructionSet.AMX_FP16,
}


@lru_cache(maxsize=1)
def instruction_set() -> InstructionSet:
    """The best instruction set that oneDNN uses in this process: the processor's, limited by ``ONEDNN_MAX_CPU_ISA``.

    Read once, as oneDNN does.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return InstructionSet.NONE
    found = InstructionSet.NONE
    has = torch.cpu.get_capabilities()
    for level, flag in (
        (InstructionSet.AVX2, "avx2"),
        (InstructionSet.AVX512, "avx512_bw"),
        (InstructionSet.AVX512_BF16, "avx512_bf16"),
        (InstructionSet.AVX512_FP16, "avx512_fp16"),
        (InstructionSet.AMX, "amx_bf16"),
        (InstructionSet.AMX_FP16, "amx_fp16"),
    ):
        if has.get(flag):
            found = level
    asked = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return min(found, _LIMITS.get(asked, InstructionSet.AMX_FP16))


@lru_cache(maxsize=1)
def _missing() -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN"
    for name in _OPS:
        if not hasattr(torch.ops.mkldnn, name):
            return f"this build of PyTorch has no mkldnn::{name}"
    if instruction_set() < InstructionSet.AVX2:
        return "oneDNN's packed operators are measured on x86 with AVX2 and above only"
    return None


# --- the activation on the accumulator --------------------------------------------------------------------------------


class _PostOp(NamedTuple):
    """Arguments of the ``*_pointwise`` operators, and the activation that is left to do."""

    attr: str = "none"
    scalars: tuple[float, ...] = ()
    algorithm: str = ""
    after: Activation | None = None


def _post_op(activation: Activation) -> _PostOp:
    name, params = activation.name, activation.params
    if name == "identity":
        return _PostOp()
    if name in ("relu", "tanh", "sigmoid", "leaky_relu", "hardtanh"):
        return _PostOp(name, params)
    if name == "silu":
        return _PostOp("swish")
    if name in ("gelu", "gelu_tanh"):
        return _PostOp("gelu", (), "tanh" if name == "gelu_tanh" else "none")
    return _PostOp(after=activation)  # elu, prelu


_IN_PLACE: dict[str, Any] = {
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
    "leaky_relu": torch.nn.functional.leaky_relu_,
    "elu": torch.nn.functional.elu_,
    "hardtanh": torch.nn.functional.hardtanh_,
}


def _activate(y: torch.Tensor, activation: Activation, slope: torch.Tensor | None) -> torch.Tensor:
    """The activation on a tensor that is ours to overwrite."""
    in_place = _IN_PLACE.get(activation.name)
    if in_place is not None:
        return in_place(y, *activation.params)
    return activation(y, None if slope is None else slope.to(y.dtype))


# --- methods ----------------------------------------------------------------------------------------------------------


class _Method(Protocol):
    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        """From the float weight of the convolution with every scale in it, and the float shift (C_out)."""

    def run(self, x: torch.Tensor, packed: Any, post: _PostOp) -> torch.Tensor:
        """x (N, C_in, H, W) channels-last -> (N, C_out, H_out, W_out), channels-last."""


class _Deconvolution:
    """oneDNN's deconvolution primitive."""

    def __init__(self, step: Step, size: tuple[int, int], dtype: torch.dtype) -> None:
        s = step.spec
        self.dtype = dtype
        self.geometry = (list(s.padding), list(s.output_padding), list(s.stride), list(s.dilation), s.groups)
        self.op = torch.ops.mkldnn._convolution_transpose_pointwise.default

    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        reorder = torch.ops.mkldnn._reorder_convolution_transpose_weight
        return reorder(weight.to(self.dtype), *self.geometry, None), shift

    def run(self, x: torch.Tensor, packed: Any, post: _PostOp) -> torch.Tensor:
        weight, bias = packed
        return self.op(x, weight, bias, *self.geometry, post.attr, post.scalars, post.algorithm)


class _Convolution:
    """oneDNN's convolution primitive."""

    def __init__(self, step: Step, size: tuple[int, int], dtype: torch.dtype) -> None:
        s = step.spec
        self.dtype = dtype
        self.geometry = (list(s.padding), list(s.stride), list(s.dilation), s.groups)
        self.op = torch.ops.mkldnn._convolution_pointwise.default

    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        return reorder(weight.to(self.dtype), *self.geometry, None), shift

    def run(self, x: torch.Tensor, packed: Any, post: _PostOp) -> torch.Tensor:
        weight, bias = packed
        return self.op(x, weight, bias, *self.geometry, post.attr, post.scalars, post.algorithm)


class _Projection:
    """A 1x1 input, each output position one tap: one matrix product, (N, C_in) x (C_in, H_out * W_out * C_out)."""

    def __init__(self, step: Step, size: tuple[int, int], dtype: torch.dtype) -> None:
        s = step.spec
        self.dtype = dtype
        self.out = (*s.output_size(size), s.out_channels)
        taps = self.taps(step, size)
        assert taps is not None
        self.rows, self.cols = taps

    @staticmethod
    def taps(step: Step, size: tuple[int, int]) -> tuple[list[int], list[int]] | None:
        """Per dimension, the tap of each output position; None where one has none or the method does not apply."""
        s = step.spec
        if size != (1, 1) or not s.transposed or s.groups != 1:
            return None
        found = []
        for n, k, p, d in zip(s.output_size(size), s.kernel_size, s.padding, s.dilation, strict=True):
            if any((o + p) % d or (o + p) // d >= k for o in range(n)):
                return None
            found.append([(o + p) // d for o in range(n)])
        return found[0], found[1]

    def pack(self, weight: torch.Tensor, shift: torch.Tensor | None) -> Any:
        h, w, c = self.out
        w2 = weight[:, :, self.rows][:, :, :, self.cols].permute(2, 3, 1, 0).reshape(h * w * c, -1)
        bias = None if shift is None else shift.repeat(h * w)
        return torch.ops.mkldnn._reorder_linear_weight(w2.to(self.dtype).contiguous(), None), bias

    def run(self, x: torch.Tensor, packed: Any, post: _PostOp) -> torch.Tensor:
        weight, bias = packed
        n = x.shape[0]
        y = torch.ops.mkldnn._linear_pointwise.default(
            x.reshape(n, -1), weight, bias, post.attr, post.scalars, post.algorithm
        )
        return y.view(n, *self.out).permute(0, 3, 1, 2)


# --- the choice -------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    method: _Method
    post: _PostOp


@lru_cache(maxsize=4096)
def _plan(step: Step, shape: tuple[int, ...], dtype: torch.dtype) -> _Plan | str:
    """How to run ``step`` on an x of this shape and dtype, or why ATen does it better."""
    isa = instruction_set()
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{dtype} has no packed operators"
    if dtype == torch.bfloat16 and isa < InstructionSet.AVX512_BF16:
        return "packed bfloat16 is slower than ATen without AVX512_BF16"
    if dtype == torch.float16 and isa < InstructionSet.AVX512_FP16:
        return "packed float16 needs AVX512_FP16"
    if not all(shape):
        return "empty input"
    size = (shape[2] + 2 * step.pad[0], shape[3] + 2 * step.pad[1])
    post = _post_op(step.activation)
    method: _Method
    if not step.spec.transposed:
        method = _Convolution(step, size, dtype)
    elif _Projection.taps(step, size) is not None:
        method = _Projection(step, size, dtype)
    else:
        method = _Deconvolution(step, size, dtype)
    return _Plan(method, post)


def why_not(step: Step, operands: Operands) -> str | None:
    """Why `run` should not take this step (it can't, or plain ATen is faster); None where it should."""
    x = operands.x
    if x.device.type != "cpu" or x.layout != torch.strided:
        return "the input is not a dense CPU tensor"
    reason = _missing()
    if reason is not None:
        return reason
    if not torch._C._get_mkldnn_enabled():
        return "oneDNN is switched off (torch.backends.mkldnn)"
    plan = _plan(step, x.shape, x.dtype)
    return plan if isinstance(plan, str) else None


def _pack(method: _Method, step: Step, o: Operands) -> Any:
    weight = step.conv_weight(o.weight.detach().float())
    scale, shift = o.folded()
    if scale is not None:
        s = step.spec
        if s.transposed:  # (C_in, C_out/g, kh, kw): input channels go by groups, and so do their outputs
            scale = scale.view(s.groups, 1, -1).expand(-1, s.in_channels // s.groups, -1).reshape(s.in_channels, -1)
            weight = weight * scale[:, :, None, None]
        else:
            weight = weight * scale[:, None, None, None]
    finite = bool(torch.isfinite(weight).all()) and (shift is None or bool(torch.isfinite(shift).all()))
    return method.pack(weight, shift), finite


def run(step: Step, operands: Operands, channels_last: bool) -> torch.Tensor:
    """The step, for operands that `why_not` accepts. No gradient flows. (N, C_out, H_out, W_out) in x's dtype and the
    memory format asked for."""
    o = operands
    plan = _plan(step, o.x.shape, o.x.dtype)
    if isinstance(plan, str):
        raise ValueError(f"cpu.run cannot take this step: {plan}")
    method, post = plan
    vectors = (o.bias, o.mean, o.var, o.scale, o.shift)
    packed, finite = PACKS.get(o.weight, (step, plan, o.eps), vectors, lambda: _pack(method, step, o))
    if o.residual is not None or not finite:
        post = _PostOp(after=step.activation)
    x = step.pad_input(o.x).contiguous(memory_format=torch.channels_last)
    y = method.run(x, packed, post)
    if post.after is not None:
        y = _finish(y, post.after, o)
    return y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _finish(y: torch.Tensor, activation: Activation, o: Operands) -> torch.Tensor:
    """Residual and activation after the convolution, in float32."""
    if o.residual is None:
        return _activate(y, activation, o.slope)
    if y.dtype == torch.float32:
        return _activate(y.add_(o.residual), activation, o.slope)
    return _activate(y.float().add_(o.residual), activation, o.slope).to(y.dtype)
