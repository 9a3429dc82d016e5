"""The finder: runs of calls in a graph that Dynamo traced become sites, which run fused (`rewrite_site`).

`backend` is a backend of `torch.compile`: the graph runs as PyTorch's own operators in eager mode, but for its sites. A
site takes the calls that a `cnnfast.Sequential` would take as modules: each has the one before as its only user's
argument, nothing writes in between to what they read, and nothing reads what they write. It runs where its last call
stood.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from .layers import plain_now
from .rewrite_calls import AFFINE, CallKind, as_shift, call_kind, conv_functions
from .rewrite_effects import Everything, storages, touched, value, written
from .rewrite_layout import keep_channels_last
from .rewrite_norm import NORMS
from .rewrite_quick import state
from .rewrite_settle import settled
from .rewrite_site import Call, Place, Ref, Site
from .rewrite_sizes import Sizes, has_sizes
from .rewrite_weights import Computed, keep_weights

__all__ = ["Apart", "Graph", "backend", "rewritten"]


@dataclass(frozen=True)
class Apart:
    """A convolution in no site, and why."""

    name: str
    place: Place
    why_not: str


@dataclass
class Graph:
    """What became of one traced graph, which runs with ``gradients`` or without. ``again``: it is another one, of
    symbolic sizes, with some that came again (`rewrite_sizes`)."""

    gradients: bool
    again: bool = False
    sites: list[Site] = field(default_factory=list)
    apart: list[Apart] = field(default_factory=list)
    convolutions: int = 0
    runs: int = 0
    converted: float = 0.0  # see `keep_channels_last`
    # The state that calls met, how many of them, and what the second settled on; set at once, for other threads.
    _seen: tuple[object, int, Callable[..., Any] | None] = (None, 0, None)
    _off: tuple[int, bool] = (-1, False)

    @property
    def off(self) -> bool:
        """Whether any of its sites is."""
        if self._off[0] != Site.switched:
            self._off = Site.switched, any(site.off for site in self.sites)
        return self._off[1]

    def forward(self, gm: fx.GraphModule) -> Callable[..., Any]:
        """What a call runs: from the second in the same `state` on what its sites have `settled` on."""
        now = state(), Site.switched
        before, calls, found = self._seen
        if now != before:
            calls, found = 0, None
        if calls < 2:
            found = settled(gm, now[0], gradients=self.gradients) if calls else None
            self._seen = now, calls + 1, found
        return gm.forward if found is None or plain_now() else found


def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """``torch.compile(model, backend="cnnfast")``: what PyTorch runs, with fused steps. `cnnfast.accelerate` is this,
    which sees hooks that are added later, with a recompile limit of its own and eager mode's errors."""
    return rewritten(gm)[0]


def rewritten(
    gm: fx.GraphModule,
    more: Callable[[Graph], object] = lambda graph: None,
    note: Callable[[str], object] = lambda problem: None,
) -> tuple[Callable[..., Any], Graph]:
    """The graph as a function, and what became of it. Where its sizes are symbolic, ``more`` is given what becomes of
    it for sizes that come again, and ``note`` why nothing does."""
    found = Graph(torch.is_grad_enabled())
    _prepare(gm)
    if all(has_sizes(node) for node in gm.graph.nodes):
        return _runner(gm, found, fixed=True), found

    def make(gm: fx.GraphModule) -> Callable[..., Any]:
        again = Graph(found.gradients, again=True)
        run = _runner(gm, again, fixed=True)
        more(again)
        return run

    sizes = Sizes(gm, make, note)
    if (only := sizes.only()) is not None:
        return _runner(only, found, fixed=True), found
    of_any = _runner(gm, found, fixed=False)

    def run(*args: Any) -> Any:
        return ((None if found.off else sizes.met(args)) or of_any)(*args)

    return run, found


def _runner(gm: fx.GraphModule, found: Graph, *, fixed: bool) -> Callable[..., Any]:
    """The graph as a function, of ``fixed`` sizes or of any; ``found`` is told what becomes of it."""
    fixed = fixed and not any(isinstance(child, fx.GraphModule) for child in gm.children())
    _rewrite(gm, found)
    gm = fx.GraphModule(gm, gm.graph)  # of Dynamo's own kind the first call prints to stderr where it raises

    def run(*args: Any) -> Any:
        found.runs += 1
        return (found.forward(gm) if fixed else gm.forward)(*args)

    return run


def _prepare(gm: fx.GraphModule) -> None:
    """What there is to do to a graph, whatever its sizes."""
    for child in gm.children():  # what operators of higher order run
        if isinstance(child, fx.GraphModule):
            _prepare(child)
    for node in gm.graph.nodes:
        if node.target is operator.pow and repr(node.args[0]).startswith("-"):
            node.target = pow  # FX writes the operator as ``-1 ** x``, which Python reads as -(1 ** x)
        elif node.target is torch.ops.higher_order.tag_activation_checkpoint:
            node.target = _checkpointed
        elif getattr(node.target, "__name__", "") == "_lower_version_count_by_1":
            node.target = _Lowered(node.target)
        elif _returns_input(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    keep_weights(gm.graph)


def _rewrite(gm: fx.GraphModule, found: Graph) -> None:
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            _rewrite(child, found)
    nodes = list(gm.graph.nodes)
    finder = _Finder(nodes)
    taken: set[fx.Node] = set()
    for node in nodes:
        kind = _kind(node)
        if kind is None or not kind.starts or node in taken:
            continue
        run = finder.run_from(node, kind, taken)
        found.convolutions += sum(n.target in conv_functions() for n in run.nodes)
        if run.problem:
            if node.target in conv_functions():
                found.apart.append(Apart(kind.name, _place(node), run.problem))
            continue
        if not any(n.target in conv_functions() for n in run.nodes):
            continue  # an upsampling or a padding that nothing takes in
        taken.update(run.nodes)
        found.sites.append(_replace(gm.graph, run))
    found.converted += keep_channels_last(gm.graph)
    gm.graph.lint()
    gm.recompile()


def _checkpointed(body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What Dynamo's operator leaves to a compiler of backwards. (Buffers are arguments, too, and not to be saved.)"""
    kwargs = {k: v for k, v in kwargs.items() if k in ("preserve_rng_state", "determinism_check")}
    return checkpoint(lambda: body(*args), use_reentrant=False, **kwargs)


def _returns_input(node: fx.Node) -> bool:
    """Whether it is a dropout in eval mode, which gives the very tensor that it is given."""
    kind = _kind(node)
    if kind is None or "dropout" not in kind.name:
        return False
    bound = kind.bind(node.args, node.kwargs)
    if bound is None or bound["training"] is not False or node.args[:1] != (bound["input"],):
        return False
    x = value(node.args[0])
    return isinstance(x, Tensor) and kind.part(bound).ndim in (0, x.dim() - 2)


class _Lowered:
    """What Dynamo puts behind ``tensor.data = ...``, for a tensor made in inference mode, too, which counts none."""

    __name__ = __qualname__ = "lowered"  # as FX writes it into code

    def __init__(self, lower: Any) -> None:
        self._lower = lower

    def __call__(self, t: Tensor) -> Tensor:
        return t if t.is_inference() else self._lower(t)


def _kind(node: fx.Node) -> CallKind | None:
    return call_kind(node.target) if node.op in ("call_function", "call_method") else None


# --- which calls are one site -----------------------------------------------------------------------------------------


@dataclass
class _Run:
    nodes: list[fx.Node]
    kinds: list[CallKind]
    through: list[str]
    ended: str = ""
    problem: str = ""


class _Finder:
    def __init__(self, nodes: list[fx.Node]) -> None:
        self.nodes = nodes
        self.order = {n: i for i, n in enumerate(nodes)}

    def run_from(self, node: fx.Node, kind: CallKind, taken: set[fx.Node]) -> _Run:
        """The longest run that starts at ``node``."""
        run = _Run([node], [kind], ["input"])
        run.problem = _why_no_start(node, kind)
        while not run.problem:
            last = run.nodes[-1]
            if len(last.users) != 1:
                run.ended = f"its result has {len(last.users)} users"
                break
            (user,) = last.users
            how = _joins(user, last, run.kinds[-1])
            if isinstance(how, str):
                run.ended = how
                break
            if user in taken:
                run.ended = "the step of another convolution takes in what follows"
                break
            if why := self._why_not_moved(run.nodes, user):
                run.ended = why
                break
            run.nodes.append(user)
            run.kinds.append(how[0])
            run.through.append(how[1])
        return run

    def _why_not_moved(self, nodes: list[fx.Node], user: fx.Node) -> str | None:
        """Why ``nodes`` cannot run where ``user`` stands."""
        inside = {*nodes, user}
        reads = set().union(*(touched(n) for n in inside))
        own = set().union(*(storages(n) for n in nodes)) - touched(nodes[0])
        writes = set().union(*(written(n) for n in inside)) - own
        for between in self.nodes[self.order[nodes[0]] + 1 : self.order[user]]:
            if between in inside:
                continue
            changed = written(between)
            if _meet(changed, reads | writes) or _meet(writes, touched(between)):
                return f"{_name(between)}, which runs in between, may write to what it reads, or read what it writes"
        return None


def _meet(a: set[Any], b: set[Any]) -> bool:
    return bool(a & b) or Everything in a and bool(b) or Everything in b and bool(a) or a == {Everything}


def _why_no_start(node: fx.Node, kind: CallKind) -> str:
    bound = kind.bind(node.args, node.kwargs)
    if bound is None:
        return "it is called with arguments that are not known here"
    x = bound["input"]
    if not isinstance(x, fx.Node) or not isinstance(value(x), Tensor):
        return "its input is not a tensor"
    return ""


def _joins(user: fx.Node, last: fx.Node, before: CallKind) -> tuple[CallKind, str] | str:
    """The kind of ``user`` and the name of its argument that ``last``, of the kind ``before``, is; or why it does not
    go on after that."""
    kind = _kind(user)
    if user.op == "output":
        return "its result is returned"
    bound = None if kind is None else kind.bind(user.args, user.kwargs)
    if kind is None or bound is None:
        return f"{_name(user)} follows"
    at = [name for name, v in bound.items() if v is last]
    if len(at) != 1 or at[0] not in kind.input:
        return f"{_name(user)} follows, which takes it in another way"
    if kind.name == "interpolate" and bound["size"] is not None:
        return "interpolate to a given size follows"
    if kind.name == "add" and bound["alpha"] == 1 and _modulates(bound, last, before):
        return as_shift(kind), at[0]
    if kind.name in AFFINE and not (bound.get("value", 1) == 1 and _modulates(bound, last, before)):
        return f"{_name(user)} follows, with something else than a scale of each channel behind its norm"
    if kind.name == "add":
        other = value(bound["other" if at[0] == "input" else "input"])
        mine = value(last)
        if not isinstance(other, Tensor) or other.dtype != mine.dtype or other.dim() != mine.dim():
            return "what is added to it is of another kind"
        known = [(a, b) for a, b in zip(mine.shape, other.shape, strict=True) if type(a) is int and type(b) is int]
        if any(a != b for a, b in known):
            return "what is added to it is of another shape"
    return kind, at[0]


def _modulates(bound: dict[str, Any], last: fx.Node, before: CallKind) -> bool:
    """Whether all but ``last`` are scales or shifts of its channels, and it is the result of an image's norm, or of
    such a scale or shift of one."""
    if before.name not in (*NORMS, *AFFINE):
        return False
    mine = value(last)
    for name, v in bound.items():
        t = value(v)
        if v is last or name in ("alpha", "value"):
            continue
        if not isinstance(v, fx.Node) or not isinstance(t, Tensor) or t.dtype != mine.dtype or t.dim() != mine.dim():
            return False
        (n, c, *size), (samples, channels) = t.shape, mine.shape[:2]
        both = type(n) is int and type(samples) is int
        if not (n in (1, samples) if both else type(n) is not int or n == 1) or not isinstance(c, int) or c != channels:
            return False
        if any(type(k) is not int or k != 1 for k in size):
            return False
    return True


# --- the site ---------------------------------------------------------------------------------------------------------


def _replace(graph: fx.Graph, run: _Run) -> Site:
    """Put a site where the last of the run's nodes stands."""
    operands: dict[fx.Node, int] = {}
    calls, before = [], None
    x = run.kinds[0].bind(run.nodes[0].args, run.nodes[0].kwargs)["input"]  # type: ignore[index]

    def ref(n: fx.Node) -> Ref:
        return Ref(-1) if n is before else Ref(operands.setdefault(n, len(operands)))

    for node, kind, through in zip(run.nodes, run.kinds, run.through, strict=True):
        before = x if node is run.nodes[0] else before
        args, kwargs = (fx.node.map_arg(a, ref) for a in (node.args, node.kwargs))
        if any(isinstance(n.target, Computed) for n in node.all_input_nodes):
            kind = kind._replace(name=f"{kind.name} of a computed weight")
        calls.append(Call(kind, node.target, tuple(args), dict(kwargs), through, _place(node)))  # type: ignore[arg-type]
        before = node
    site = Site(tuple(calls), run.ended)
    last = run.nodes[-1]
    with graph.inserting_before(last):
        new = graph.call_function(site, (x, *operands))
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)
    for node in reversed(run.nodes):
        graph.erase_node(node)
    return site


def _name(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def _place(node: fx.Node) -> Place:
    stack = node.meta.get("nn_module_stack") or {}
    path = re.sub(r"^L\[[^\]]*\]\.?|\['self'\]\.?", "", list(stack.values())[-1][0]) if stack else ""
    path = re.sub(r"\._modules\['([^']*)'\]|\['([^']*)'\]", lambda m: f".{m[1] or m[2]}", path).lstrip(".")
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not re.search(r"[/\\](torch|cnnfast)[/\\]nn[/\\]", f[0])]
    return Place(path, ":".join(own[-1]) if own else "")
