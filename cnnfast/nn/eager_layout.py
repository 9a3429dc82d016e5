"""What a fused step takes from eager mode: memory formats of results, and what PyTorch's modules would refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..memory_format import has_both, in_format, new_strides
from ..norms import check_values
from .fusion import FusedStep

__all__ = ["eager_layout", "one_value", "pads", "why_no_residual"]


def eager_layout(
    step: FusedStep, channels_last: bool, size: Sequence[int], out: Sequence[int], loops: bool = False
) -> bool:
    """Whether eager mode's result suggests channels_last, for an input that does (``channels_last``) or doesn't.

    Convolutions follow input or weight, the rest mostly keeps what it gets; but a tensor that is contiguous as well
    comes out of a BatchNorm or an activation as contiguous, InstanceNorm makes its input contiguous, and so does
    GroupNorm on a GPU. In one dimension there is no channels_last: only a weight whose strides happen to say so has an
    effect, and a norm ends it. ``loops``: `dispatch.by_loops`, of three. (Checked against torch 2.13 on a CPU.)
    """
    spec, rule = step.step.spec, step.rule
    if rule is not None and rule.contiguous or loops:
        return False
    if step.ndim == 1:  # ATen makes 3-D inputs contiguous first, and so does padding
        channels_last = channels_last and has_both(spec.in_channels, size) and not any(step.step.pad)
        if step.norm is not None:
            return False
    channels_last = channels_last or step.weight_channels_last
    if has_both(spec.out_channels, out):
        return channels_last and step.in_place and not (spec.out_channels == 1 and all(n == 1 for n in out))
    return channels_last


def one_value(step: FusedStep, shape: torch.Size) -> bool:
    """Whether the step's norm has one value of ``shape`` for each of its statistics: PyTorch's modules raise then."""
    assert step.rule is not None
    try:
        check_values(shape, step.step.norm)
    except ValueError:
        return not step.rule.synchronised
    return False


def why_no_residual(
    s: FusedStep, residual: Any, x: Tensor, dtype: torch.dtype, out: torch.Size, last: bool | None
) -> str | None:
    """Why the step cannot add ``residual`` (in the dimensions of its layer), or None. ``out``: its result's shape;
    ``last``: see `chain.Chain.run`."""
    if type(residual) is not Tensor and type(residual) is not nn.Parameter:
        return f"a {type(residual).__name__} is added"
    shape = out[:2] + out[3:] if s.ndim == 1 else out
    if residual.shape != shape or residual.dtype != dtype or residual.device != x.device:
        return f"{residual.dtype} of shape {tuple(residual.shape)} is added to {dtype} of shape {tuple(shape)}"
    if has_both(out[1], out[2:]):
        return "a sum of maps with one channel or position"
    # Not `is_contiguous`: a dimension of one may have any stride, and ATen's sum follows it.
    if s.ndim == 1:
        fits = residual.is_contiguous() or last is not None and in_format(residual, True)
    else:
        fits = residual.stride() in [new_strides(shape, f) for f in (False, True)]
    if fits:
        return None
    return f"what is added has strides {residual.stride()}"


def pads(module: nn.Module) -> bool:
    """Whether it pads by an operator whose gradient has its input's memory format, whatever the weight's."""
    return getattr(module, "padding_mode", "zeros") != "zeros" or isinstance(module, _PADS)


_PADS = (
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
)
