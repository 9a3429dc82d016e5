"""Fused steps on a CPU through oneDNN's packed weights and post-ops (inference only).

PyTorch's own convolution repacks the weight on every call and makes a pass over memory for BatchNorm and one for the
activation. Here the weight is packed once, BatchNorm's scale folded into it and its shift into the bias, and the
activation runs on the accumulator. The rules that choose the method (`by_rule`) and the dtype of the products
(`products_dtype`) were measured; docs/facts.md says where.

oneDNN's relu and hardtanh turn NaN into a number, torch's do not. Where the weight, the shift or the input (its sum
tells, at the price of reading it once: under 1 % of the step) is not finite, those two come afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..dispatch import by_loops
from ..memory_format import format_of, is_channels_last
from ..spec import DTYPES, ConvSpec
from ..step import Operands, Step
from . import tuned
from .isa import InstructionSet, Process, instruction_set, process, products_dtype
from .methods import METHODS, applicable, by_rule, moving, winograd_gain
from .onednn import Deconvolution, Method, PostOp, Projection, layout, passed_over, post_op, why_missing
from .packed import Call, Packed, packed
from .packing import Leased, why_not_cacheable
from .winograd import Winograd

__all__ = ["Ready", "method_name", "methods_of", "ready", "run", "why_not", "why_slower_plain", "why_slower_transposed"]


# --- the choice -------------------------------------------------------------------------------------------------------


def methods_of(step: Step, shape: tuple[int, ...], dtype: torch.dtype, now: Process) -> list[str]:
    """The names of the methods that are right for an x of this shape and dtype; ``now``: what `process` says."""
    compute = products_dtype(dtype, instruction_set())
    return applicable(step.spec, _padded(step, shape), compute, not now.lowered or compute != torch.float32)


_CONVERSION = 50  # multiply-adds, times `moving`, while a number is brought into or out of channels-last
# Numbers of a weight in 16 bits from which ATen takes longer to bring it into oneDNN's layout than a packed step's
# calls (docs/facts.md).
_LEAST_WEIGHT_16 = 2**12
# Multiply-adds from which packed operators beat ATen's own loops in three dimensions: plain, transposed, upsampled.
_LEAST_3D, _LEAST_3D_TRANSPOSED, _LEAST_3D_UPSAMPLED = 2e6, 2e7, 2e5


def _too_few(s: ConvSpec, shape: tuple[int, ...], least: float) -> str | None:
    """Whether the step is too little work for packed operators; ``least`` where ATen leaves oneDNN for a matrix product
    and col2im (or im2col) with little overhead."""
    macs = s.macs(shape[0], shape[2:])
    few = macs < (least if s.ndim == 3 or passed_over(s, shape) else 2e6)
    return f"{macs} multiply-adds are too few to gain from packed operators" if few else None


def _why_slower(step: Step, shape: tuple[int, ...], method: Method) -> str | None:
    """Why PyTorch's own transposed convolution is expected to be as fast, or in three dimensions an upsampling (in two
    it does several times the arithmetic); a plain convolution's rule is `why_slower_plain`."""
    s, padded = step.spec, _padded(step, shape)
    if not s.transposed or step.upsample is not None and s.ndim < 3 or isinstance(method, Projection):
        return None
    if s.groups > 1:
        return "grouped transposed convolutions have no fast packed implementation"
    conv, size = step.unfused(shape[2:])
    loops = by_loops(conv, (*shape[:2], *size), method.dtype)
    if step.upsample is not None:
        if max(conv.kernel_size) == 1:
            return "a kernel of one position has no taps that an upsampling could sum"
        return _too_few(s, padded, _LEAST_3D_UPSAMPLED if loops else _LEAST_3D)
    if loops:
        return _too_few(s, padded, _LEAST_3D_TRANSPOSED)
    if s.ndim == 3 and not _adds_apart(method):
        return "PyTorch's own transposed convolution by oneDNN is as fast in three dimensions"
    return _too_few(s, padded, 8e6)


def _adds_apart(method: Method) -> bool:
    """Whether it is oneDNN's deconvolution, and what is added to its result a pass of ours."""
    return isinstance(method, Deconvolution) and not method.takes_post


def _why_slower_unbiased(step: Step, shape: tuple[int, ...], method: Method) -> str | None:
    """Why PyTorch's own transposed convolution without a bias is expected to be as fast, where ours with one would not
    be: it adds nothing element by element."""
    loops = step.spec.ndim == 3 and by_loops(step.spec, shape, method.dtype)
    if step.upsample is not None or loops or not _adds_apart(method):
        return None
    large = math.prod(step.spec.weight_shape) >= max(_elements(step, shape))
    return None if large else "without a bias PyTorch's own transposed convolution is as fast"


def _padded(step: Step, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:2], *(n + 2 * p for n, p in zip(shape[2:], step.pad, strict=True)))


def _elements(step: Step, shape: tuple[int, ...]) -> tuple[int, int]:
    """Numbers in the input and in the result."""
    return math.prod(shape), shape[0] * step.spec.out_channels * math.prod(step.output_size(shape[2:]))


def _check_pays(step: Step, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether reading x for NaNs costs less than an activation afterwards that is in place."""
    before, after = _elements(step, shape)
    return before * dtype.itemsize < after * 4


def why_slower_plain(
    step: Step,
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    norm: bool,
    slopes: int,
    nchw: bool,
    weight_last: bool = True,
) -> str | None:
    """Why PyTorch's own plain convolution of an x of ``shape`` is expected to be as fast, passes over memory included.

    ``norm``: a scale to fold in; ``slopes``: elements of PReLU's weight; ``nchw``: neither x nor the result is
    channels-last, so that both would be converted (oneDNN itself, called from ATen, converts faster than ATen's
    copies); ``weight_last``: the weight is channels-last. None for other steps.
    """
    if step.spec.transposed or step.upsample is not None:
        return None
    return _why_slower_plain(step, tuple(shape), dtype, process(), norm, slopes, nchw, weight_last)


@lru_cache(maxsize=4096)
def _why_slower_plain(
    step: Step,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    now: Process,
    norm: bool,
    slopes: int,
    nchw: bool,
    last: bool,
) -> str | None:
    s = step.spec
    isa, padded = instruction_set(), _padded(step, shape)
    if by_loops(s, padded, dtype):
        if max(s.kernel_size) == 1 and nchw:
            return "ATen runs a kernel of one position as a matrix product, without conversions"
        return _too_few(s, padded, _LEAST_3D)
    before, after = _elements(step, shape)
    elements = before + after
    way = _way(step, shape, dtype, now)
    if isinstance(way, Way) and isinstance(way.method, Winograd):
        saved = 1 - 1 / winograd_gain(s, padded, now)
        if not nchw or saved * s.macs(shape[0], padded[2:]) > moving(now) * _CONVERSION * elements:
            return None
    if shape[2] == s.kernel_size[0] == 1 and not nchw:
        return _too_few(s, padded, 2e6)  # one dimension: ATen would copy a channels-last map, or the weight
    # In 16 bits ATen takes oneDNN for small inputs, too; few input channels it gathers slowly.
    if few := _too_few(s, padded, 25e6 if dtype == torch.float32 and after < 4 * before else 2e6):
        return few
    weights = math.prod(s.weight_shape)
    if weights >= max(elements, 2**17):
        return None  # ATen brings the weight into oneDNN's layout on every call
    large = weights >= (2**17 if now.full_width else 2**15) and s.macs(shape[0], padded[2:]) >= 1.5e8
    if not (nchw or last) and dtype == torch.float32 and s.ndim == 2 and now.threads > 1 and large:
        return None  # and ahead of that into channels-last, by one thread
    intense = s.macs(padded[0], padded[2:]) >= 64 * elements
    if products_dtype(dtype, isa) != dtype:
        if dtype == torch.float16 and isa >= InstructionSet.AMX and not intense:
            return "too little arithmetic for its conversions to float32"
        return None
    if nchw:
        fast_products = isa >= InstructionSet.AMX and dtype != torch.float32
        worth = (intense or after >= 4 * before) and s.out_channels >= 16 and elements >= 2**21
        if fast_products and worth:
            return None
        if isa < InstructionSet.AVX512 and intense and s.out_channels < 8:
            return None  # ATen takes two to four times as long as in channels-last
        return "the conversions to channels-last and back cost what packed operators save"
    apart = step.activation.name != "identity" and slopes != 1 and post_op(step.activation).attr == "none"
    if dtype != torch.float32 and weights >= (2**17 if apart else _LEAST_WEIGHT_16):
        return None
    loses_nan = step.activation.row.loses_nan
    # A folded norm costs nothing, an activation its post-op; both save a pass, and cost Python with cold caches.
    norms, least = (2, 2**20) if dtype == torch.float32 else (1, 2**18)
    saved = norms * after if norm else 0
    if slopes == 1 or post_op(step.activation).attr != "none" and not loses_nan:
        saved += after
    elif loses_nan and _check_pays(step, shape, dtype):
        saved += after - before * dtype.itemsize // 4
    if saved < least:
        return "a pass over memory saved is too little or none, and the weight is small"
    return None


class Way(NamedTuple):
    method: Method
    post: PostOp
    slower: str | None
    check_pays: bool
    chosen: str | None = None  # by tuning


@lru_cache(maxsize=4096)
def _way(step: Step, shape: tuple[int, ...], dtype: torch.dtype, now: Process, chosen: str | None = None) -> Way | str:
    """How to run ``step`` on an x of this shape and dtype, or why not; ``now``: what `process` says;
    ``chosen``: the method that `tuned.choice` named."""
    if dtype not in DTYPES:
        return f"{dtype} has no packed operators"
    if len(shape) != step.spec.ndim + 2 or not all(shape) or shape[1] != step.spec.in_channels:
        return f"an input of shape {tuple(shape)} is empty or does not fit"
    try:
        step.output_size(shape[2:])
    except ValueError as error:
        return str(error)
    isa, padded = instruction_set(), _padded(step, shape)
    compute, right = products_dtype(dtype, isa), methods_of(step, shape, dtype, now)
    if chosen is not None and chosen in right:
        known: Method = METHODS[chosen](step.spec, padded, compute)
        return Way(known, post_op(step.activation), None, _check_pays(step, shape, dtype), chosen)
    kind = by_rule(step.spec, padded, compute, isa, now, right)
    if kind.__name__ not in right:
        return "oneDNN has no deconvolution whose output padding reaches the stride"
    method = kind(step.spec, padded, compute)
    slower = _why_slower(step, tuple(shape), method)
    return Way(method, post_op(step.activation), slower, _check_pays(step, shape, dtype))


@lru_cache(maxsize=4096)
def _key(
    step: Step, shape: tuple[int, ...], dtype: torch.dtype, now: Process, chosen: str | None = None
) -> tuple[Any, ...]:
    """What a packed weight depends on beside the tensors. (Knowing costs a packing: not asked ahead of the first.)"""
    plan = _way(step, shape, dtype, now, chosen)
    assert isinstance(plan, Way)
    # Device and dtype are named: a default may be set (`torch.set_default_device`).
    sample = plan.method.pack(torch.zeros(step.spec.weight_shape, dtype=torch.float32, device="cpu"), None)
    return step, dtype, plan.method.dtype, type(plan.method), layout(sample)


def why_slower_transposed(step: Step, shape: tuple[int, ...], dtype: torch.dtype, *, bias: bool) -> str | None:
    """`why_slower_plain` of a transposed convolution."""
    plan = _way(step, shape, dtype, process())
    if isinstance(plan, str):
        return plan
    return plan.slower or (None if bias else _why_slower_unbiased(step, shape, plan.method))


def why_not(step: Step, operands: Operands, channels_last: bool = True) -> str | None:
    """Why `run` should not take this step (it can't, or plain ATen is faster); None where it should.

    ``channels_last``: the memory format of the result. A float32 weight may meet an input in 16 bits (autocast): it is
    rounded once, when it is packed.
    """
    x, weight = operands.x, operands.weight
    if x.layout != torch.strided:
        return "the input is not a dense tensor"
    if weight.dtype not in (x.dtype, torch.float32):
        return f"the input is {x.dtype} and the weight {weight.dtype}"
    reason = why_missing() or why_not_cacheable(weight)
    if reason is not None:
        return reason
    if not torch._C._get_mkldnn_enabled():
        return "oneDNN is switched off (torch.backends.mkldnn)"
    chosen = _chosen(step, operands, channels_last)
    plan = _way(step, x.shape, x.dtype, process(), chosen)
    if isinstance(plan, str):
        return plan
    if tuned.RECORDERS:
        tuned.see(step, x.shape, x.dtype, _formats(x, channels_last), is_channels_last(weight), _slopes(operands))
    if chosen == tuned.MODULES:
        return tuned.FASTER
    if plan.chosen is not None or plan.slower is not None:
        return plan.slower
    if step.spec.transposed or step.upsample is not None:
        return None if operands.bias is not None else _why_slower_unbiased(step, tuple(x.shape), plan.method)
    norm = not step.residual and step.norm is not None
    nchw, last = not any(_formats(x, channels_last)), is_channels_last(weight)
    return why_slower_plain(step, x.shape, x.dtype, norm=norm, slopes=_slopes(operands), nchw=nchw, weight_last=last)


def _slopes(o: Operands) -> int:
    return 0 if o.slope is None else o.slope.numel()


def _formats(x: torch.Tensor, channels_last: bool) -> tuple[bool, bool]:
    return x.is_contiguous(memory_format=format_of(x.dim(), True)), channels_last


def _chosen(step: Step, o: Operands, channels_last: bool) -> str | None:
    """`tuned.choice` for a call."""
    return tuned.choice(step, o.x.shape, o.x.dtype, *_formats(o.x, channels_last))


def method_name(step: Step, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Which method `run` takes for an x of this shape and dtype, for reports and tests."""
    plan = _way(step, shape, dtype, process())
    return plan if isinstance(plan, str) else f"{type(plan.method).__name__} in {plan.method.dtype}"


# --- packing and running ----------------------------------------------------------------------------------------------


def run(step: Step, operands: Operands, channels_last: bool) -> torch.Tensor | None:
    """The step, for operands that `why_not` accepts. No gradient flows.

    Returns (N, C_out, *size) in x's dtype and the memory format asked for; None where weight and vectors are met
    for the first time, or hold something else than at the call before: packing them pays if they are met again.
    ValueError where there is no way to run it here (what `why_not` says beyond that is about speed, and is not asked
    again).
    """
    return ready(step, operands, channels_last).run(operands)


def ready(step: Step, operands: Operands, channels_last: bool) -> Ready:
    """`run` of operands like these, with which it shares its errors, for who knows what `Ready.holds` asks."""
    shape, dtype = tuple(operands.x.shape), operands.x.dtype
    way = _way(step, shape, dtype, process(), _chosen(step, operands, channels_last))
    if isinstance(way, str):
        raise ValueError(f"the packed CPU path cannot take this step: {way}")
    return Ready(step, shape, dtype, channels_last, way)


class Ready:
    """`run` of ``step`` where everything is known that does not change from call to call, for chains: x has this shape
    and dtype, and `why_not` has nothing to say but of the weight and of PyTorch's switches (`holds`)."""

    def __init__(self, step: Step, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, way: Way) -> None:
        self.step, self.channels_last, self.way, self.now = step, channels_last, way, process()
        self._key: tuple[Any, ...] | None = None
        self._call = way.method, channels_last
        self._of = shape, dtype
        self._leased = Leased()

    @classmethod
    def of(
        cls, step: Step, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, chosen: str | None = None
    ) -> Ready | None:
        """None where the step does not run with a packed weight, or what its operands are decides that. ``chosen``:
        what `tuned.choice` said."""
        if step.measured or step.residual or step.spec.ndim == 3 or why_missing() is not None:
            return None
        way = _way(step, shape, dtype, process(), chosen)
        return None if isinstance(way, str) or way.slower is not None else cls(step, shape, dtype, channels_last, way)

    def holds(self, o: Operands) -> bool:
        switches = torch._C._get_mkldnn_enabled() and process() == self.now
        return switches and why_not_cacheable(o.weight) is None

    def key(self) -> tuple[Any, ...]:
        if self._key is None:
            self._key = _key(self.step, *self._of, self.now, self.way.chosen)
        return self._key

    def held(self, *tensors: torch.Tensor | None) -> Packed | None:
        """What `run` packed of these (weight, bias, mean, var, scale and shift), where it is known that nobody has
        written to them since."""
        return self._leased.held(*tensors)

    def run(self, o: Operands, onto: bool = False) -> torch.Tensor | None:
        """``onto``: the result may be written into the memory of the residual."""
        vectors = o.bias, o.mean, o.var, o.scale, o.shift
        found = self._leased.held(o.weight, *vectors)
        if found is None:
            found = self._leased.get(o.weight, self.key, vectors, lambda: packed(self.way.method, self.step, o))
        return None if found is None else self.run_with(found, o.x, o.residual, o.slope, onto)

    def run_with(
        self,
        found: Packed,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        slope: torch.Tensor | None,
        onto: bool = False,
    ) -> torch.Tensor | None:
        """`run` with what is packed for it."""
        call = found.calls.get(self._call)
        if call is None:
            call = Call(self.step, self.way.method, self.way.post, self.way.check_pays, found, self.channels_last)
            found.keep(self._call, call)
        return call(x, residual, slope, onto)
