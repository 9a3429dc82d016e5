"""A chain of fused steps: channels-last inside, its last store in the memory format of eager mode, with gradients and
under autocast as PyTorch's modules."""

from __future__ import annotations

from ..memory_format import has_both
from ..nn.fusion import FusedStep


def _no_gain_in_training(step: FusedStep, channels_last: bool) -> str | None:
    """Why a step that needs a gradient gains nothing on a CPU: a plain convolution is ATen's in any case. (An
    InstanceNorm module would convert to NCHW, a SyncBatchNorm's wants a GPU. And of an input that is
    ``channels_last``, a module's weight that is contiguous as well would get a gradient in other strides.)"""
    spec, rule = step.step.spec, step.rule
    better = rule is not None and (rule.synchronised or rule.norm.kind == "instance" and step.ndim == 2)
    both = channels_last and has_both(spec.in_channels // spec.groups, spec.kernel_size)
    if spec.transposed or step.step.upsample is not None or better or both and not step.weight_channels_last:
        return None
    return "in training, PyTorch's modules of a plain convolution are as fast on a CPU"
