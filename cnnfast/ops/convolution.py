"""What the public convolutions share: arguments to a step, torch's own function where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import dispatch, reference
from ..activations import Activation
from ..dispatch import by_loops, on_cpu, watched
from ..gradients import enter, plain, squeezed
from ..memory_format import has_both, in_rows, is_channels_last
from ..norms import Norm
from ..spec import DTYPES, MAX_STRIDE, ConvSpec
from ..step import Operands, Step, convolution_of
from .arguments import (
    Epilogue,
    Ints,
    as_ints,
    autocast,
    check_devices,
    check_reach,
    check_residual,
    check_slope,
    check_types,
    check_vectors,
    epilogue,
    mixes,
    parse_activation,
)
from .run import run_step

__all__ = ["DOC", "convolve", "finish", "fused", "takes", "why_unseen"]

_TORCH: dict[tuple[int, bool], Callable[..., Tensor]] = {
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
}


_NOT_TRACED_3D = "in three dimensions, modes and, on a CPU, traced code see PyTorch's operators"


DOC = """{ndim}-D {kind}, then ``act(scale * (conv + bias) + shift + residual)``.

    The positional arguments, their checks and errors are those of `torch.nn.functional.{function}{ndim}d`. Sums,
    scale, shift, residual and activation are computed in float32 and rounded once, to the input's dtype.

    Args:
        input: ({batched}) or ({unbatched}); float32, float16 or bfloat16 for the fast paths (other dtypes run in ATen).
        weight: ({channels}, {kernel}), the input's dtype. On a GPU a channels_last weight is read in place.
        bias: (C_out,) or None.
        {geometry}
        scale, shift: (C_out,), any floating dtype, or None.
        residual: the output's shape and the input's dtype, or None. Under autocast any floating dtype: the result then
            has the wider one of the two, as of ``conv(input) + residual``.
        activation: an `Activation`, or its name in `cnnfast.activations.ACTIVATIONS`, or None.
        activation_param: a number (slope of leaky_relu, alpha of elu), two (bounds of hardtanh), or prelu's weight, a
            tensor of 1 or C_out elements.
        backend: "auto", "triton", "aten", or None for the context's (`cnnfast.backend`).

    Returns:
        The output in the input's dtype, channels_last where input or weight is (as torch's). The input's gradient is
        in that memory format, too; a weight's has the weight's strides.

    Raises:
        RuntimeError: what torch raises; ``backend="triton"`` where the kernel cannot run this, with the reason.
        TypeError: an argument of a wrong type.
        ValueError: an unknown activation or backend; scale, shift, residual or activation_param of a wrong shape.

    Differentiable any number of times.
    """


class Geometry(NamedTuple):
    """The arguments that say how; a plain convolution's output padding is 0."""

    stride: Ints
    padding: Ints | str
    output_padding: Ints
    groups: int
    dilation: Ints

    @classmethod
    def of(cls, stride: Any, padding: Any, output_padding: Any, groups: Any, dilation: Any) -> Geometry | None:
        """In ints and tuples of ints; None where torch's own function is to judge."""
        p = padding if type(padding) is str else as_ints(padding)
        s, op, g, d = as_ints(stride), as_ints(output_padding), as_ints(groups), as_ints(dilation)
        if s is None or p is None or op is None or d is None or not isinstance(g, int):
            return None
        return cls(s, p, op, g, d)


@lru_cache(maxsize=4096)
def _resolve(
    ndim: int,
    transposed: bool,
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    given: Geometry,
    activation: Activation,
    affine: bool,
    residual: bool,
) -> Step | None:
    """The step of these arguments (``affine``: with a scale or a shift). None where they describe no convolution of a
    non-empty image: torch's own function then decides, and raises its own error."""
    if len(weight_shape) != ndim + 2 or len(input_shape) not in (ndim + 1, ndim + 2):
        return None
    pads = given.padding
    if isinstance(pads, str):
        named = None if transposed else _named_padding(pads, weight_shape[2:], given.stride, given.dilation)
        if named is None:
            return None
        pads = named
    first, second = weight_shape[0], weight_shape[1] * given.groups
    try:
        spec = ConvSpec.make(
            *((first, second) if transposed else (second, first)),
            weight_shape[2:],
            given.stride,
            pads,
            given.output_padding,
            given.groups,
            given.dilation,
            transposed=transposed,
            ndim=ndim,
        )
        size = spec.output_size(input_shape[-ndim:])
    except ValueError:
        return None
    if input_shape[-ndim - 1] != spec.in_channels or min(input_shape[-ndim:]) < 1:
        return None
    if not torch.compiler.is_compiling() and math.prod((*size, spec.out_channels, *input_shape[: -ndim - 1])) >= 2**60:
        return None
    return Step(spec.as_2d(), activation, norm=Norm("affine") if affine else None, residual=residual)


def _named_padding(name: str, kernel: Sequence[int], stride: Ints, dilation: Ints) -> tuple[int, ...] | None:
    """The padding that "valid" and an even-sided "same" stand for; None for what torch itself does or refuses."""
    if name == "valid":
        return (0,) * len(kernel)
    steps = dilation if isinstance(dilation, tuple) else (dilation,)
    strides = stride if isinstance(stride, tuple) else (stride,)
    reach = [d * (k - 1) for d, k in zip(steps * (len(kernel) // len(steps)), kernel, strict=False)]
    if name != "same" or len(reach) != len(kernel) or any(s != 1 for s in strides) or any(r % 2 for r in reach):
        return None
    return tuple(r // 2 for r in reach)


# --- what all convolutions end in -------------------------------------------------------------------------------------


def why_unseen(ndim: int, x: Tensor) -> str | None:
    """Why traced code and modes see torch's own functions, or None."""
    if ndim < 3 or not (on_cpu(x) if torch.compiler.is_compiling() else watched(x)):
        return None
    return _NOT_TRACED_3D


def takes(x: Tensor, w: Tensor, b: Tensor | None, channels: int | None) -> str | None:
    """Why torch's own function is to judge these tensors of one device (or to run them: meta tensors), or None."""
    dtype = x.dtype
    if x.is_meta:
        return "its tensors are on meta"
    if not dtype.is_floating_point or w.dtype != dtype:
        return f"dtype {dtype}" if w.dtype == dtype else f"the input is {dtype}, the weight {w.dtype}"
    if b is not None and (b.shape != (channels,) or b.dtype != dtype):
        return f"a bias of shape {tuple(b.shape)} and {b.dtype}"
    if x.layout is not torch.strided or w.layout is not torch.strided:
        return "an operand is not a dense tensor"
    if not torch.compiler.is_compiling() and (x.is_neg() or w.is_neg()):  # whose memory holds other numbers
        return "an operand is a lazy negation"
    return None


def finish(y: Tensor, ndim: int, e: Epilogue, activation: Activation, slope: Tensor | None) -> Tensor:
    """The epilogue on what torch's own convolution gave, with the checks of a fused step."""
    unbatched, residual = y.dim() == ndim + 1, e.residual
    check_vectors(y, y.shape[-ndim - 1], scale=e.scale, shift=e.shift)
    check_slope(y, slope)
    if residual is not None:
        check_residual(y, residual, y.shape)
        residual = residual.unsqueeze(0) if unbatched else residual
    apply = epilogue if mixes(y, residual) else reference.epilogue
    y = apply(y.unsqueeze(0) if unbatched else y, e.scale, e.shift, residual, activation, slope)
    return y.squeeze(0) if unbatched else y


def fused(step: Step, ndim: int, x: Tensor, w: Tensor, b: Tensor | None, e: Epilogue, slope: Tensor | None) -> Tensor:
    """``step`` on tensors that `takes` accepts and that fit it: x (N, C, *size) or (C, *size)."""
    unbatched = x.dim() == ndim + 1
    if unbatched:
        x = x.unsqueeze(0)
    channels_last = ndim > 1 and is_channels_last(x)  # of one dimension, ATen makes the input contiguous first
    if ndim == 1:
        x, w = x.unsqueeze(-2), in_rows(w)
    channels_last = channels_last or is_channels_last(w)
    if ndim == 3 and channels_last and on_cpu(x):
        conv, size = step.unfused(x.shape[2:])
        channels_last = not by_loops(conv, (*x.shape[:2], *size), x.dtype)
    compiling = torch.compiler.is_compiling()
    if ndim == 1 and not (channels_last or compiling) and is_channels_last(x):
        x = enter(x, x.dtype, None, False) if torch.is_grad_enabled() and x.requires_grad else x
    residual = e.residual
    if e.scale is not None or e.shift is not None:
        check_vectors(x, step.spec.out_channels, scale=e.scale, shift=e.shift)
    if slope is not None:
        check_slope(x, slope)
    mixed = False
    if residual is not None:
        size = step.output_size(x.shape[2:])[-ndim:]
        check_residual(x, residual, (*(() if unbatched else x.shape[:1]), step.spec.out_channels, *size))
        residual = residual.unsqueeze(0) if unbatched else residual
        residual = residual.unsqueeze(-2) if ndim == 1 else residual
        mixed = mixes(x, residual)
    if mixed:
        y = run(convolution_of(step) if compiling else step.bare, Operands(x, w, b), channels_last, e.backend)
        y = epilogue(y, e.scale, e.shift, residual, step.activation, slope)
    else:
        o = Operands(x, w, b, None, None, e.scale, e.shift, residual, slope)
        y = run(step, o, channels_last, e.backend)
        if not (compiling or y.requires_grad) and has_both(y.shape[1], y.shape[2:]):
            y = y if watched(y) else plain(y, channels_last)
    if ndim == 1:
        y = y.squeeze(-2) if compiling or watched(y) else squeezed(y, 2)
    return y.squeeze(0) if unbatched else y


def run(step: Step, o: Operands, channels_last: bool, backend: str | None) -> Tensor:
    """`run_step`, or what stands for it in traced code."""
    if not torch.compiler.is_compiling():
        return run_step(step, o, channels_last=channels_last, backend=backend)
    from .traced import traced_step  # here: it loads torch._dynamo

    return traced_step(step, o, channels_last, backend)


# --- plain and transposed convolutions --------------------------------------------------------------------------------


def convolve(
    ndim: int,
    transposed: bool,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints | str,
    output_padding: Ints,
    groups: int,
    dilation: Ints,
    e: Epilogue,
) -> Tensor:
    """``act(scale * (conv(input) + bias) + shift + residual)``; ``output_padding`` is 0 for a plain convolution."""
    dispatch.check_backend(e.backend)
    geometry = (
        (stride, padding, output_padding, groups, dilation) if transposed else (stride, padding, dilation, groups)
    )
    function = _TORCH[ndim, transposed]
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
        function(input, weight, bias, *geometry)
        raise TypeError(f"input and weight must be tensors, got {type(input).__name__} and {type(weight).__name__}")
    check_types(bias, e)
    given, channels = Geometry.of(stride, padding, output_padding, groups, dilation), None
    if given is not None and weight.dim() > 1:
        channels = weight.shape[1] * given.groups if transposed else weight.shape[0]
    act, slope = parse_activation(e.activation, e.activation_param, channels)
    x, w, b = autocast(input, weight, bias)
    if w.device != x.device or b is not None and b.device != x.device:
        check_devices(x, w, b)
    compiling = torch.compiler.is_compiling()
    reason: str | None = f"an empty input, or sizes such as padding={padding!r} that no kernel has"
    if given is not None:
        resolve = _resolve.__wrapped__ if compiling else _resolve  # symbolic sizes have no hash
        affine = e.scale is not None or e.shift is not None
        step = resolve(ndim, transposed, x.shape, w.shape, given, act, affine, e.residual is not None)
        if step is not None:
            reason = why_unseen(ndim, x) or takes(x, w, b, channels)
            if reason is None:
                return fused(step, ndim, x, w, b, e, slope)
        elif not compiling:
            _check_sizes(transposed, x.shape, w.shape, given)
    if transposed and given is not None and _crashes(x, given.stride):
        y = function(x.double(), w.double(), None if b is None else b.double(), *geometry).to(x.dtype)
    else:
        y = function(x, w, b, *geometry)
    if dispatch.resolve_backend(e.backend) == "triton":
        raise dispatch.refusal(str(reason))
    return finish(y, ndim, e, act, slope)


def _crashes(x: Tensor, stride: Ints) -> bool:
    """Whether oneDNN's deconvolution may end the process (seen for strides of 100,000, torch 2.13); it takes no
    float64."""
    huge = max((stride,) if isinstance(stride, int) else stride, default=1) > MAX_STRIDE
    return huge and on_cpu(x) and x.dtype in DTYPES


def _check_sizes(transposed: bool, shape: Sequence[int], weight_shape: Sequence[int], given: Geometry) -> None:
    """`check_reach` of arguments of whatever lengths; where these do not fit, torch says so."""
    ndim = len(weight_shape) - 2
    if ndim < 1 or len(shape) < ndim + 1:
        return
    sizes = []
    for v in (given.stride, given.padding, given.output_padding, given.dilation):
        each = (0,) if isinstance(v, str) else (v,) if isinstance(v, int) else tuple(v)
        sizes.append(each * ndim if len(each) == 1 else each)
    if all(len(v) == ndim for v in sizes):
        check_reach(transposed, shape[-ndim:], weight_shape[2:], *sizes)
