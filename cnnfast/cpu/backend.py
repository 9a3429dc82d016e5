"""Fused steps on a CPU: the three functions of a backend (`cnnfast.dispatch.Backend`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import Arrangement, Planned, Ready, channels_last_inside, needs_gradient, outsized
from ..memory_format import convert, has_both
from ..step import Operands, Step
from . import inference, norm_inference, tuned
from .isa import process
from .methods import by_patches
from .onednn import adds_by_element
from .training import run as by_layers
from .training import stays_contiguous, why_slower_3d

__all__ = ["arrange", "run", "why_not"]


def why_not(step: Step, o: Operands, *, channels_last: bool, training: bool, required: bool) -> str | None:
    """See `dispatch.Backend`."""
    if step.spec is None:
        return norm_inference.why_not(step.norm, o) and "PyTorch's own norms are as fast"
    if training and step.spec.ndim == 3 and needs_gradient(o):
        return why_slower_3d(step, o.x.shape, o.x.dtype)
    return None if training else inference.why_not(step, o, channels_last)


def run(step: Step, o: Operands, *, channels_last: bool, training: bool, required: bool) -> Tensor | None:
    """See `dispatch.Backend`."""
    if step.spec is None and step.norm is not None:
        y = norm_inference.finished(step.norm, o, step.activation, ours=False)
        return convert(y, y.dtype, channels_last)
    y = None if training else inference.run(step, o, channels_last)
    return by_layers(step, o, channels_last, new=not training) if y is None else y


# --- which steps of a chain gain --------------------------------------------------------------------------------------


def arrange(
    steps: Sequence[Planned], shapes: Sequence[torch.Size], eager: Sequence[bool], *, gradient: bool
) -> Arrangement | str:
    """Channels-last where it saves more conversions than it costs, and modules where those are as fast."""
    three = steps[0].ndim == 3
    if three and gradient:
        slower = [why_slower_3d(s.step, shape, s.dtype) for s, shape in zip(steps, shapes, strict=False)]
        return Arrangement(tuple(eager[1:]), tuple(slower)) if None in slower else str(slower[0])
    if steps[0].ndim == 1 and not (gradient or _gain_in_1d(steps, shapes, eager)):
        return "in one dimension, PyTorch's own convolutions of one sample are as fast on a CPU"
    inside, as_eager = channels_last_inside(eager).channels_last, tuple(eager[1:])
    elements = [shape.numel() for shape in shapes]
    contiguous = gradient and not any(eager) and any(map(_stays_contiguous, steps, shapes))
    saves = not contiguous and (three or any(eager) or _saves_conversions(steps, elements, gradient))
    if not saves:
        inside = as_eager
    if three:
        outsize = [_outsized(s, shape) for s, shape in zip(steps, shapes, strict=False)]
        inside = tuple(last and not reader for last, reader in zip(inside, (*outsize[1:], False), strict=True))
    # Whoever runs the chain converts the input where the first result is channels-last.
    reads = [inside[0] or eager[0], *inside]
    why: list[str | None] = [None] * len(steps)
    chosen = (None,) * len(steps) if gradient else tuple(map(_chosen, steps, shapes, reads, inside))
    converted = any(eager) or _converts_anyway(steps, shapes)
    for i, s in enumerate(steps):
        before, after = reads[i : i + 2]
        if s.step.measured and (before or after) and not eager[i + 1] and s.step.norm.kind != "instance":  # type: ignore[union-attr]
            continue  # ATen's statistics are less exact in channels-last, `norm`'s are not
        if gradient:
            why[i] = _no_gain_in_training(s, shapes[i], before, saves)
        else:
            why[i] = _no_gain(s, shapes[i], before, after, chosen[i], converted)
    nothing = why[0] if None not in why else None
    if nothing is not None and (three or inside == as_eager or gradient and steps[0].ndim == 1):
        return nothing
    if not contiguous and (small := _too_small(steps, shapes, eager, why, chosen, gradient)):
        return small
    ready: tuple[Ready | None, ...] = ()
    if not gradient:
        each = zip(steps, shapes[:-1], inside, chosen, why, strict=True)
        ready = tuple(_ready(s, shape, last, by) if no is None else None for s, shape, last, by, no in each)
    if steps[0].ndim == 1:  # modules would convert on the way in and out
        why = [None] * len(why)
    # Whatever runs the first step: its result is likely to be larger.
    converts = inside[0] or gradient and why[0] is None and not contiguous
    return Arrangement(inside, tuple(why), converts, ready, chosen)


# Elements of the results of a chain (with gradients and transposed convolutions or upsamplings: of a step, on average)
# below which its modules are faster; docs/facts.md, "Small chains". Where its input or weights are channels-last:
# elements that need not be read and written again, and bytes of a weight that ATen would bring into oneDNN's layout (in
# one dimension whatever the format).
SMALL, SMALL_IN_TRAINING = 2**21, 2**17
LEAST_SAVED, _LARGE_WEIGHT = 2**20, 2**21
# Of chains in float32 of which no step gains by itself: positions of the largest result from which two of them are
# enough, as what oneDNN converts in each convolution outweighs the ends; and so many more, from fewer positions on one
# thread and on several, where each conversion is a loop over all threads.
_LARGEST, _LARGE, _LARGE_ON_THREADS, _MANY = 2**14, 2**12, 2**10, 5
_LARGEST_OF_NORMS = 2**20  # numbers of the largest result for each of two threads: norms are quicker contiguous
_MANY_SMALL = 6  # of smaller maps, `SMALL` in all, whose channels are whole vectors
_FEW_BY_PATCHES, _LEAST_BY_PATCHES = 3, 2**15  # convolutions, and elements of their results, as above


def _converts_anyway(steps: Sequence[Planned], shapes: Sequence[torch.Size]) -> bool:
    """Whether channels-last maps inside of a chain whose ends are contiguous pay in inference whatever the steps gain
    by themselves."""
    count, elements, now = len(steps), sum(shape.numel() for shape in shapes[1:]), process()
    if steps[0].ndim != 2 or any(s.dtype != torch.float32 for s in steps):
        return elements >= SMALL
    plain = not any(s.step.measured for s in steps)
    patches = sum(by_patches(s.step.spec, shape) for s, shape in zip(steps, shapes, strict=False))
    if plain and now.threads > 1 and patches:
        if now.full_width:
            count -= patches  # as fast
        elif count >= _FEW_BY_PATCHES and elements >= _LEAST_BY_PATCHES:
            return True
    if count <= 1:
        return False
    positions = max(shape.numel() // shape[1] for shape in shapes[1:])
    large = _LARGE if now.threads == 1 else _LARGE_ON_THREADS
    if not plain and max(shape.numel() for shape in shapes[1:]) >= _LARGEST_OF_NORMS * min(now.threads, 2):
        return True
    if plain and (positions >= _LARGEST or count >= _MANY and positions >= large):
        return True
    return elements >= SMALL and (count >= _MANY_SMALL or any(shape[1] % 16 for shape in shapes))


def _too_small(
    steps: Sequence[Planned],
    shapes: Sequence[torch.Size],
    eager: Sequence[bool],
    why: Sequence[str | None],
    chosen: Sequence[str | None],
    gradient: bool,
) -> str | None:
    """Why a chain is left to its modules though channels-last inside saves conversions, or there are none: its own
    cost in Python, the conversions at its ends and the norms outweigh what is saved on small maps."""
    if steps[0].ndim != 2 or any(s.synchronised for s in steps) or gradient and any(eager):
        return None
    elements, plain = sum(shape.numel() for shape in shapes[1:]), not any(s.step.spec.transposed for s in steps)
    each = zip(steps, shapes, shapes[1:], why, chosen, strict=False)
    if gradient:
        small = elements < (SMALL if plain else SMALL_IN_TRAINING * len(steps))
    elif any(eager):
        gaining = [(s, before, after, by) for s, before, after, no, by in each if no is None]
        small = not any(by is not None or _gains_by_itself(s, before) for s, before, _, by in gaining)
        small = small and sum(_passes(s) * after.numel() for s, _, after, _ in gaining) < LEAST_SAVED
    else:
        gains = (no is None and (by is not None or _much_work(s, before)) for s, before, _, no, by in each)
        small = not (any(gains) or _converts_anyway(steps, shapes))
    return "the maps are too small: PyTorch's modules are as fast" if small else None


def _gains_by_itself(s: Planned, shape: Sequence[int]) -> bool:
    """`_much_work` of a step whose tensors are channels-last: there oneDNN's own deconvolution, called from ATen,
    converts nothing but the weight, and only a bias may take it long."""
    spec = s.step.spec
    if not spec.transposed:
        return True  # `_no_gain` knows
    small = s.step.upsample is None and math.prod(spec.weight_shape) * s.dtype.itemsize < _LARGE_WEIGHT
    small = small and not (s.bias and adds_by_element(spec, tuple(shape), s.dtype))
    if small and inference.method_name(s.step.bare, tuple(shape), s.dtype) == f"Deconvolution in {s.dtype}":
        return False
    return _much_work(s, shape)


def _passes(s: Planned) -> int:
    """Over memory that PyTorch's modules make after the convolution, a folded norm's counted twice."""
    return 2 * (s.step.norm is not None) + (s.step.activation.name != "identity")


def _much_work(s: Planned, shape: Sequence[int]) -> bool:
    """So much that packed operators gain whatever the chain is. (A plain convolution that is a step for its GroupNorm's
    sake has none, and several threads make short work of more.)"""
    step, spec = s.step, s.step.spec
    if step.measured and step.norm.kind == "group":  # type: ignore[union-attr]
        if inference.why_slower_plain(step.bare, shape, s.dtype, norm=False, slopes=0, nchw=False) is not None:
            return False
    if spec.transposed and step.upsample is None and max(shape[2:]) > 1:
        return inference.why_slower_transposed(step.bare, tuple(shape), s.dtype, bias=s.bias) is None
    macs = spec.macs(shape[0], [n + 2 * p for n, p in zip(shape[2:], step.pad, strict=True)])
    if spec.transposed or step.upsample is not None or s.dtype != torch.float32 or process().threads == 1:
        return macs >= (5e5 if spec.transposed else 25e6)
    large = math.prod(spec.weight_shape) * s.dtype.itemsize >= _LARGE_WEIGHT
    return macs >= 25e6 if large else macs >= 50e6 and not step.measured


def _chosen(s: Planned, shape: torch.Size, before: bool, after: bool) -> str | None:
    """What tuning found for a step in inference. (Of one that measures, its convolution is looked up where it runs.)"""
    if s.step.measured or s.synchronised:
        return None
    if tuned.RECORDERS:
        tuned.see(s.step, shape, s.dtype, (before, after), s.weight_channels_last, s.slopes)
    return tuned.choice(s.step, shape, s.dtype, before, after)


def _ready(s: Planned, shape: torch.Size, channels_last: bool, chosen: str | None) -> Ready | None:
    """See `dispatch.Arrangement`."""
    packed = None if s.synchronised else inference.Ready.of(s.step, shape, s.dtype, channels_last, chosen)
    if packed is None:
        return None

    def ready(o: Operands) -> Tensor | None:
        if not packed.holds(o):
            return None
        y = packed.run(o)
        return by_layers(s.step, o, channels_last, new=True) if y is None else y

    return ready


_LEAST_1D = 5e6  # multiply-adds of a step from which a packed operator is faster than ATen's convolution of one sample


def _gain_in_1d(steps: Sequence[Planned], shapes: Sequence[torch.Size], eager: Sequence[bool]) -> bool:
    """Whether steps of one dimension gain. ATen brings every map into (N, C, L): convolutions of one sample gain where
    the input is channels-last, or where the result stays so and there is enough to do; transposed ones by a norm or a
    large weight. (In 16 bits ATen has no vectors here; docs/facts.md.)"""
    if eager[0] or shapes[0][0] > 1:
        return True
    for s in steps:
        saves = s.step.norm is not None or math.prod(s.step.spec.weight_shape) * s.dtype.itemsize > _LARGE_WEIGHT
        if s.dtype != torch.float32 or s.step.spec.transposed and saves or s.step.measured or s.synchronised:
            return True
    works = (s.step.spec.macs(shape[0], shape[2:]) for s, shape in zip(steps, shapes, strict=False))
    return eager[-1] and max(works) >= _LEAST_1D


def _outsized(s: Planned, shape: Sequence[int]) -> bool:
    spec = s.step.spec
    return spec.transposed and outsized(spec.groups, spec.kernel_size, shape[2:])


def _stays_contiguous(s: Planned, shape: Sequence[int]) -> bool:
    """Whether a step gains by contiguous maps: where a weight that is so outweighs them."""
    plain = s.ndim == 2 and not (s.weight_channels_last or s.synchronised)
    return plain and stays_contiguous(s.step, shape, s.dtype) is not None


def _no_gain_in_training(s: Planned, shape: Sequence[int], before: bool, saves: bool) -> str | None:
    """Why a step that needs a gradient gains nothing: a plain convolution is ATen's in any case, and so is a transposed
    one where channels-last inside ``saves`` no conversions, unless its weight outweighs its maps. (An InstanceNorm
    module would convert to NCHW, a SyncBatchNorm's wants a GPU. And of an input that is channels-last (``before``), a
    module's weight that is contiguous as well would get a gradient in other strides.)"""
    spec = s.step.spec
    if s.step.upsample is not None or s.synchronised or s.instance_norm and s.ndim == 2:
        return None
    if s.ndim == 2 and not saves:
        return None if _stays_contiguous(s, shape) else "in training, PyTorch's modules of contiguous maps are as fast"
    both = before and has_both(spec.in_channels // spec.groups, spec.kernel_size)
    if spec.transposed or both and not s.weight_channels_last:
        return None
    return "in training, PyTorch's modules of a plain convolution are as fast on a CPU"


def _no_gain(
    s: Planned, shape: torch.Size, before: bool, after: bool, chosen: str | None, converted: bool
) -> str | None:
    """Why a plain convolution's step gains nothing; ``before``, ``after``: whether its input and its result are
    channels-last; ``chosen``: by tuning; ``converted``: maps are channels-last whatever the steps gain."""
    if s.synchronised:  # its module wants a GPU
        return None
    if chosen is not None:
        return tuned.FASTER if chosen == tuned.MODULES else None
    if s.step.spec.ndim == 3 and s.step.spec.transposed:
        return inference.why_slower_transposed(s.step, shape, s.dtype, bias=s.bias)
    if before and after and s.step.measured and s.step.norm.per_image:  # type: ignore[union-attr]
        return None  # the module of an InstanceNorm would convert twice, statistics of a GroupNorm's are less exact
    step, norm, slopes = s.step, s.step.norm is not None, s.slopes
    if s.step.measured or s.step.residual:  # what follows the convolution takes its passes anyway
        step, norm, slopes = s.step.bare, False, 0
    nchw, last = not (before or after), s.weight_channels_last or not converted
    return inference.why_slower_plain(step, shape, s.dtype, norm=norm, slopes=slopes, nchw=nchw, weight_last=last)


def _saves_conversions(steps: Sequence[Planned], elements: list[int], gradient: bool) -> bool:
    """Whether channels-last inside is worth the conversions at both ends: oneDNN, called from ATen, brings the input
    and the result of every convolution into a layout of its own, unless the kernel is 1x1. (Upsamplings, and transposed
    convolutions but those of two dimensions with gradients, were measured to gain.)"""
    saved = 0
    for s, before, after in zip(steps, elements[:-1], elements[1:], strict=True):
        if s.step.upsample is not None or s.step.spec.transposed and not (gradient and s.ndim == 2):
            return True
        if not gradient and s.step.measured and s.step.norm.kind == "instance":  # type: ignore[union-attr]
            continue  # its module returns NCHW
        saved += before + after if max(s.step.spec.kernel_size) > 1 else 0
    ends = elements[0] + elements[-1]
    return saved > ends or saved == ends and not gradient
