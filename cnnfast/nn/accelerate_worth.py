"""Calls that gain nothing: where what runs otherwise than in eager mode saves less time than graphs cost, the model
runs as it stands.

Dynamo asks some hundred questions ahead of a graph, and a model whose tracing is interrupted pays that dozens of times
in a call; what it saves of eager mode's own Python, a module's call each, makes up for most of that. A kind of call is
judged once its graphs have run twice as they are; by a rule, so that it does not depend on what else the machine does.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..cpu import norm_inference, tuned
from ..cpu.isa import instruction_set, process, products_dtype
from ..cpu.methods import by_patches
from ..dispatch import on_cpu, resolve_backend
from .chain import Chain
from .fusion import FusedStep
from .rewrite import Graph
from .rewrite_layout import converted
from .rewrite_quick import state
from .rewrite_site import Site

__all__ = [
    "STANDS",
    "Calls",
    "Kind",
    "as_it_stands",
    "gains",
    "judged",
    "never_standing",
    "stands",
    "stands_here",
    "work",
]

STANDS = "the call runs as it stands: its steps save less time than finding them costs"

FINDING = 1e-4
"""Seconds that a graph costs in a call, beside those of the modules in it."""

# Seconds that each costs beyond what it does in eager mode: a module, a step, and one with a norm by the image's own
# statistics, of a few calls and of many (docs/facts.md).
_A_MODULE, _A_STEP, _A_MEASURED_STEP, _A_NORM_OF_MANY = 5e-7, 1e-5, 4e-5, 1e-4
# Of the time of a step: in three dimensions (but where the processor has instructions for its 16 bits), with a norm
# folded in, and others.
_SAVED_3D, _SAVED_FOLDED, _SAVED = 1.5, 0.3, 0.15
_FLOPS, _FLOPS_16, _BYTES = 1e11, 2.5e11, 4e9  # in a second of one thread; by instructions for 16 bits
# Likewise, bytes of maps: that oneDNN brings into a layout of its own where they are contiguous, of a convolution and
# of a grouped one; and that ATen does. Beside them, seconds of each such convolution on one thread, and on several.
_BY_ONEDNN, _BY_ONEDNN_GROUPED, _BY_ATEN = 2.2e10, 1.4e10, 3.3e9
_A_REORDER, _A_REORDER_ON_THREADS = 1.5e-5, 3e-5
# Seconds that a dilated one of a small contiguous map takes longer for each number of its patches, which ATen gathers
# in a loop of one thread, where its channels fill most of a vector.
_DILATED, _LEAST_DILATED = 6e-10, 12
_SAVED_FULL_WIDTH = 0.1  # of a convolution of contiguous maps, where oneDNN's kernel for its own layout is the slower
_MAX_KINDS = 64


class _Here(threading.local):
    standing = False
    through_graphs = False


_here = _Here()


def stands_here() -> bool:
    """Whether a call around this one runs as it stands."""
    return _here.standing


@contextmanager
def as_it_stands() -> Iterator[None]:
    """Inside, in this thread, accelerated modules run as they stand."""
    before, _here.standing = _here.standing, True
    try:
        yield
    finally:
        _here.standing = before


@contextmanager
def never_standing() -> Iterator[None]:
    """Inside, in this thread, each call goes through its graphs, whatever it gains, and is not judged."""
    before, _here.through_graphs = _here.through_graphs, True
    try:
        yield
    finally:
        _here.through_graphs = before


# --- what is known of a module's calls --------------------------------------------------------------------------------


@dataclass(eq=False)
class Kind:
    """Of calls of one kind: how many were the same through and through, and, once judged, whether they gain."""

    calls: int = 0
    gain: bool | None = None
    state: object = None


@dataclass(eq=False)
class Calls:
    """Of one module's."""

    kinds: dict[object, Kind] = field(default_factory=dict)

    def kind(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind | None:
        """Of a call with these arguments; None where it is not to be judged: on a GPU, for who asks
        for a backend, or looks at the steps."""
        if _here.through_graphs or tuned.RECORDERS or resolve_backend(None) != "auto":
            return None
        try:
            key = torch.is_grad_enabled(), module.training, _key(args), _key(kwargs)
        except _Unknown:
            return None
        found = self.kinds.get(key)
        if found is None:
            if len(self.kinds) >= _MAX_KINDS:
                self.kinds.clear()
            found = self.kinds[key] = Kind()
        return found


def stands(kind: Kind | None) -> bool:
    """Whether calls of this kind are known to gain nothing, in the state that they are judged in."""
    if kind is None or kind.gain is not False:
        return False
    if kind.state == _state():
        return True
    kind.calls, kind.gain = 0, None
    return False


def _state() -> object:
    return state(), Site.switched


class _Unknown(Exception):
    pass


def _key(v: Any) -> object:
    """What graphs depend on, roughly: a number's value may differ from call to call."""
    if isinstance(v, Tensor):
        plain = type(v) in (Tensor, nn.Parameter) and v.layout is torch.strided and not v.is_nested
        if not plain or not on_cpu(v):
            raise _Unknown
        return v.shape, v.stride(), v.dtype, v.requires_grad
    if v is None or isinstance(v, (bool, str)):
        return v
    if isinstance(v, (int, float)):
        return type(v)
    if isinstance(v, (list, tuple)):
        return tuple([_key(w) for w in v])
    if isinstance(v, Mapping):
        return tuple([(k, _key(w)) for k, w in v.items()])
    raise _Unknown


# --- the judgement ----------------------------------------------------------------------------------------------------


def judged(
    kind: Kind, module: nn.Module, before: Sequence[tuple[Graph, int]], after: Sequence[tuple[Graph, int]]
) -> None:
    """Note a call: each graph, and how often it had run ``before`` and ``after``."""
    if len(before) != len(after):
        return  # something was compiled
    kind.calls += 1
    if kind.calls >= 2:
        ran = ((graph, now - was) for (graph, was), (_, now) in zip(before, after, strict=True))
        kind.gain, kind.state = gains(module, ran), _state()


def gains(module: nn.Module, ran: Iterable[tuple[Graph, int]]) -> bool:
    """Whether a call of ``module`` that runs each graph so often gains anything by that."""
    ran = [(graph, times) for graph, times in ran if times]
    saved = sum(times * _saved(graph) for graph, times in ran)
    return bool(ran) and saved > FINDING * sum(times for _, times in ran) + _A_MODULE * sum(1 for _ in module.modules())


def _saved(graph: Graph) -> float:
    """Seconds, roughly, by what runs otherwise than in eager mode: fused, or channels-last where that is not."""
    threads = torch.get_num_threads()
    return (sum(_saved_by_site(site, threads) for site in graph.sites) - graph.converted / _BY_ATEN) / threads


def _saved_by_site(site: Site, threads: int) -> float:
    chains = [item for item in site.ran if isinstance(item, Chain)] if site.off is None else []
    return sum(_saved_by_chain(site, chain, threads) for chain in chains)


def _saved_by_chain(site: Site, chain: Chain, threads: int) -> float:
    if chain.latest is None:
        return 0.0
    saved, packed = 0.0, False
    first, contiguous, bound = chain.latest
    shape: tuple[int, ...] | None = first
    alone = site.channels_last is None and contiguous and not isinstance(bound, str) and bound.convert
    for k, s in enumerate(chain.steps):
        if shape is None:
            return saved
        flops, moved, after = work(s, shape)
        fast_16 = s.dtype.itemsize == 2 and products_dtype(s.dtype, instruction_set()) == s.dtype
        rate = _FLOPS_16 if fast_16 else _FLOPS
        seconds = flops / rate + moved / _BYTES
        if not isinstance(bound, str) and bound.runs[k].as_modules is None:
            packed, folded = True, s.step.norm is not None and not s.step.measured
            share = _SAVED_3D if s.ndim == 3 and not fast_16 else _SAVED_FOLDED if folded else _SAVED
            saved += share * seconds - _of_its_own(s, after) * threads
            if s.step.upsample is not None:
                plain, size = s.step.unfused(shape[2:])
                saved += (2 * plain.macs(shape[0], size) - flops) / rate
        elif (alone or site.channels_last is not None and site.given_contiguous) and s.step.spec is not None:
            saved += _of_contiguous(s, shape, seconds, moved, threads)
        shape = after
    if alone and not packed:  # a stretch of its own
        ends = (first, *([] if bound.runs[-1].channels_last else [shape or first]))  # type: ignore[union-attr]
        saved -= sum(converted(end, chain.steps[0].dtype) for end in ends) / _BY_ATEN
    return saved


def _of_its_own(s: FusedStep, made: Sequence[int] | None) -> float:
    """Seconds that a step costs whatever it saves; ``made``: the shape of its result."""
    if not s.step.measured:
        return _A_STEP
    many = made is None or not norm_inference.at_once(s.step.norm, made, s.dtype)  # type: ignore[arg-type]
    return _A_NORM_OF_MANY if many else _A_MEASURED_STEP


def _of_contiguous(s: FusedStep, shape: Sequence[int], seconds: float, moved: int, threads: int) -> float:
    """Seconds of one thread that a convolution of so many takes longer where its maps are contiguous."""
    spec = s.step.spec
    if by_patches(spec, shape):
        if max(spec.dilation) > 1:
            few = min(spec.in_channels, spec.out_channels) < _LEAST_DILATED
            patches = math.prod((*spec.output_size(shape[2:]), *spec.weight_shape[1:]))
            return 0.0 if few else threads * _DILATED * patches
        if threads == 1 or process().full_width:
            return 0.0
    saved = moved / (_BY_ONEDNN_GROUPED if spec.groups > 1 else _BY_ONEDNN)
    spatial = max(spec.kernel_size) > 1
    dense = spatial and spec.groups == 1 and spec.out_channels > 16 and not spec.transposed
    if dense and process().full_width and s.dtype == torch.float32:
        saved += _SAVED_FULL_WIDTH * seconds
    if s.ndim == 1:
        return saved if spatial else 0.0
    return saved + (_A_REORDER if threads == 1 else _A_REORDER_ON_THREADS * threads)


def work(s: FusedStep, shape: Sequence[int]) -> tuple[int, int, tuple[int, ...] | None]:
    """FLOPs and bytes of a step on an input of this (4-D) shape, and its result's shape."""
    try:
        size = s.step.output_size(shape[2:])
        padded = [n + 2 * p for n, p in zip(shape[2:], s.step.pad, strict=True)]
        flops = 2 * s.step.spec.macs(shape[0], padded)
    except ValueError:
        return 0, 0, None
    out = (shape[0], s.step.spec.out_channels, *size)
    elements = math.prod(shape) + math.prod(out) * (1 + s.step.residual) + math.prod(s.step.spec.weight_shape)
    return flops, elements * s.dtype.itemsize, out
