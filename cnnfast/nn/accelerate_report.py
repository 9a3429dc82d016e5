"""`explain`: what of a model runs fused, and why the rest does not, as an object and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..gpu import guard
from .accelerate_call import Record, record_of, restore, switch_on
from .accelerate_worth import STANDS, gains, never_standing, work
from .chain import Chain
from .fusion import Unfused
from .layers import Sequential
from .rewrite import Graph
from .rewrite_site import Site

__all__ = ["Explanation", "Row", "arguments", "explain", "explained", "unchanged"]


@dataclass(frozen=True)
class Row:
    """A convolution, with what runs with it. ``path``: of its module; ``line``: file:line of the call; ``pattern``: the
    calls, "conv2d + batch_norm + relu"; ``why_not``: why PyTorch's own operators run, "" where it is ``fused``;
    ``found``: it is a step, whether that runs or PyTorch's operators are as fast;
    ``flops`` and ``bytes``: of one call (each tensor once), 0 where nothing has run; ``verified``: "yes", "no" (not
    asked for), or what was wrong; ``tuned``: the method that `cnnfast.tune` chose on this processor, or ""."""

    path: str
    line: str
    pattern: str
    why_not: str
    verified: str = "no"
    flops: int = 0
    bytes: int = 0
    found: bool = False
    tuned: str = ""

    @property
    def fused(self) -> bool:
        return not self.why_not


@dataclass(frozen=True)
class Explanation:
    """Of a model: its ``rows``; how many ``graphs`` a call has run (more than one: tracing was interrupted between
    them, and ``breaks`` says where), and the ``compilations`` so far (of other modes and kinds of input, too);
    ``notes``: what else is to be said; ``modules``: what each `cnnfast.Sequential` says. ``str()`` is a table."""

    model: str
    rows: tuple[Row, ...]
    graphs: int = 0
    compilations: int = 0
    breaks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    modules: Mapping[str, str] | None = None

    @property
    def convolutions(self) -> int:
        return len(self.rows)

    @property
    def fused(self) -> int:
        """How many of the convolutions run fused."""
        return sum(row.fused for row in self.rows)

    @property
    def found(self) -> int:
        """How many could: those that run fused, and those whose operators are as fast on these inputs."""
        return sum(row.found for row in self.rows)

    @property
    def reasons(self) -> dict[str, int]:
        """Why the others do not, and how many of them for each reason."""
        found: dict[str, int] = {}
        for row in self.rows:
            if not row.fused:
                found[row.why_not] = found.get(row.why_not, 0) + 1
        return found

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.fused} of {self.convolutions} convolutions fused; "
            f"graphs: {self.graphs}, compiled so far: {self.compilations}"
        ]
        table = [(r.path, r.line, r.pattern, _runs(r), r.verified, _short(r.flops), _short(r.bytes)) for r in self.rows]
        if table:
            headers = ("module", "line", "calls", "runs", "verified", "FLOP", "bytes")
            lines.append(tabulate(table, headers=headers, tablefmt="simple", disable_numparse=True))
        lines += [f"interrupted: {reason}" for reason in self.breaks]
        lines += self.notes
        for path, text in (self.modules or {}).items():
            lines += [f"{path or '(the model)'}:", *(f"  {line}" for line in text.splitlines())]
        return "\n".join(lines)


def _runs(r: Row) -> str:
    return r.why_not or ("fused" if not r.tuned else f"fused (tuned: {r.tuned})")


def _short(n: float) -> str:
    for unit in ("", "k", "M", "G"):
        if n < 1000:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g}T"


# --- running a model without a trace ----------------------------------------------------------------------------------


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, from what `cnnfast.accelerate` and `explain` take."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def copied(values: Any) -> Any:
    """The same values in tensors of their own, for a forward that may write to them."""

    def copy(t: Any) -> Any:
        return t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t

    return tree_map(copy, values)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Inside, the model may be run; buffers, gradients and random state are as before afterwards."""
    buffers = [(m, name, b, None if b is None else b.detach().clone()) for m, name, b in _buffers(model)]
    grads = [(p, p.grad) for p in model.parameters()]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    for p, _ in grads:
        p.grad = None
    try:
        with torch.random.fork_rng([d.index or 0 for d in devices]):
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for m, name, b, saved in buffers:
                m._buffers[name] = b
                if b is not None and saved is not None and not _same(b, saved):
                    b.copy_(saved)


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor | None]]:
    for m in model.modules():
        for name, b in m._buffers.items():
            yield m, name, b


def _same(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or a.shape == b.shape and torch.equal(a, b)


# --- explain ----------------------------------------------------------------------------------------------------------


def explain(model: nn.Module, example_inputs: Any = None) -> Explanation:
    """What of ``model`` runs fused where it is accelerated, and why the rest does not.

    With ``example_inputs`` (as `cnnfast.accelerate` takes them) the model runs on them once, accelerated for that time
    if it is not; buffers, gradients and random state are as before afterwards. Without, it is said of the calls that an
    accelerated model has had so far, and of each `cnnfast.Sequential` in another. TypeError where ``model`` is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain() takes an nn.Module, got {type(model).__name__}")
    name = type(model).__name__
    if example_inputs is None:
        record = record_of(model)
        if record is None:
            own = {path: m.explain() for path, m in model.named_modules() if isinstance(m, Sequential)}
            note = "not accelerated: give example_inputs to see what would be fused"
            return Explanation(name, (), notes=(note,), modules=own)
        latest = {tuple(c.place for site in g.sites for c in site.calls): g for g in record.graphs}
        return explained(name, record, [*latest.values()])
    accelerated = record_of(model) is not None
    if not accelerated:
        switch_on(model)
    try:
        record = record_of(model)
        assert record is not None
        args, kwargs = arguments(example_inputs)
        before = [graph.runs for graph in record.graphs]
        counted = torch._dynamo.utils.counters["graph_break"]
        known = dict(counted)
        with unchanged(model), never_standing():
            model(*copied(args), **copied(kwargs))
        breaks = tuple(str(reason).splitlines()[0] for reason, n in counted.items() if n > known.get(reason, 0))
        before += [0] * (len(record.graphs) - len(before))
        ran = [(g, g.runs - n) for g, n in zip(record.graphs, before, strict=True) if g.runs > n]
        found = explained(name, record, [g for g, _ in ran])
        if record.calls.kind(model, args, kwargs) is not None and not gains(model, ran):
            found = replace(found, rows=tuple([replace(r, why_not=r.why_not or STANDS) for r in found.rows]))
        return replace(found, breaks=breaks, graphs=len(ran))
    finally:
        if not accelerated:
            restore(model)


def explained(name: str, record: Record, graphs: Sequence[Graph]) -> Explanation:
    """Of these graphs of a record."""
    rows = [row for graph in graphs for row in _rows(graph)]
    notes = [] if record.failed is None else [f"runs as it stands: {record.failed}"]
    if standing := sum(kind.gain is False for kind in record.calls.kinds.values()):
        notes.append(f"{STANDS}: so for {standing} of {len(record.calls.kinds)} kinds of calls")
    return Explanation(
        name, tuple(rows), graphs=len(graphs), compilations=record.compilations, notes=(*notes, *record.notes)
    )


def _rows(graph: Graph) -> Iterator[Row]:
    for site in graph.sites:
        yield from _rows_of(site)
    for apart in graph.apart:
        yield Row(apart.place.path, apart.place.line, apart.name, apart.why_not)


def _rows_of(site: Site) -> Iterator[Row]:
    ran = site.ran if site.off is None else (site.off,)
    if not ran or isinstance(ran[0], str):
        why = str(ran[0]) if ran else "it has not run yet"
        for k, call in enumerate(site.calls):
            if call.kind.name.startswith("conv"):
                yield _row(site, (k,), why)
        return
    for item in ran:
        if isinstance(item, Unfused):
            if site.calls[item.slot].kind.name.startswith("conv"):
                yield _row(site, (item.slot,), item.why_not)
        elif isinstance(item, Chain):
            yield from _of_chain(site, item)


def _row(site: Site, slots: Sequence[int], why_not: str, *work: Any) -> Row:
    calls = [site.calls[k] for k in slots]
    at = next(c.place for c in calls if c.kind.name.startswith("conv"))
    pattern = " + ".join(c.kind.name for c in calls)
    return Row(at.path, at.line, pattern, why_not, site.verified, *work)


def _of_chain(site: Site, chain: Chain) -> Iterator[Row]:
    latest = chain.latest
    shape: Sequence[int] | None = None
    for i, s in enumerate(chain.steps):
        why = by = ""
        flops = moved = 0
        if latest is not None:
            first, _, bound = latest
            shape = first if i == 0 else shape
            why = bound if isinstance(bound, str) else bound.runs[i].as_modules or ""
            by = "" if isinstance(bound, str) or why else bound.runs[i].tuned or ""
            if shape is not None:
                flops, moved, shape = work(s, shape)
        for failure in guard.failures(s.step, s.dtype, s.device):
            why = why or f"the kernel {failure}"
        yield _row(site, s.slots, why, flops, moved, True, by)


def leaves(values: Any) -> list[Tensor]:
    """The floating-point tensors of a result, of whatever structure."""
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]
