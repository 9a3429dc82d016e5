"""The calls of an accelerated model: through Dynamo, or plain.

What is set is one attribute, the one that `torch.nn.Module.compile` sets: the module's class, its parameters, buffers,
hooks and ``state_dict`` stay what they are, and copies and pickles are of the plain model, as PyTorch has it.
"""

from __future__ import annotations

import itertools
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx, nn

from ..cpu.watch import end_watches
from ..messages import CnnfastWarning, UsageError, one_line
from .accelerate_hooks import Hooked, Hooks
from .accelerate_worth import Calls, as_it_stands, judged, stands, stands_here
from .layers import plain_now
from .rewrite import Graph, rewritten

__all__ = ["LIMIT", "Record", "plain_call", "record_of", "restore", "switch_on"]

M = TypeVar("M", bound=nn.Module)

LIMIT = 64
"""Graphs of one module: PyTorch's own limit of 8 would leave layers of large models out without a word."""

_CALL = "_compiled_call_impl"
_numbers = itertools.count()


@dataclass(eq=False)
class Record:
    """What became of a module's calls: its ``graphs``; ``failed``: why it runs as it stands from now on, or None;
    ``calls``: which kinds of them run as they stand; ``hooks``: those of its modules."""

    hooks: Hooks
    graphs: list[Graph] = field(default_factory=list)
    calls: Calls = field(default_factory=Calls)
    failed: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def compilations(self) -> int:
        """How many graphs Dynamo has traced."""
        return sum(not graph.again for graph in self.graphs)

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """The backend that Dynamo is given. (It makes its guards after this.)"""
        if not self.hooks.know(gm.graph):
            _dynamo().skip_nnmodule_hook_guards = False  # until the call ends: `_settings`
        run, graph = rewritten(gm, self.graphs.append, self.notes.append)
        self.graphs.append(graph)
        if self.compilations == LIMIT:
            warnings.warn(
                f"cnnfast: {LIMIT} graphs of one accelerated module: what needs more runs as it stands",
                CnnfastWarning,
                stacklevel=2,
            )
        return run


def switch_on(model: nn.Module) -> None:
    """Let the calls of ``model`` and of its direct children go through Dynamo. TypeError and UsageError as
    `cnnfast.accelerate` raises them."""
    _check(model)
    restore(model)
    _set(model)
    for child in _callable_children(model):
        _set(child)


def restore(model: M) -> M:
    """Undo `cnnfast.accelerate`, in place. Returns ``model``. A module that is not accelerated stays as it is."""
    for module in model.modules():
        if record_of(module) is not None:
            del module.__dict__[_CALL]
            end_watches(module)
    return model


def record_of(module: nn.Module) -> Record | None:
    """That of an accelerated module; None for another."""
    return getattr(module.__dict__.get(_CALL), "record", None)


def _check(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate() takes an nn.Module, got {type(model).__name__}")
    if isinstance(model, (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)):
        raise UsageError(f"accelerate() takes a model as it was written, not a {type(model).__name__}")
    if model.__dict__.get(_CALL) is not None and record_of(model) is None:
        raise UsageError("the model is compiled already (model.compile()): accelerate() takes it as it was written")


def _callable_children(model: nn.Module) -> Iterator[nn.Module]:
    """The direct children, and those inside lists and dicts of modules."""
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _callable_children(child)
        elif not isinstance(child, torch.jit.ScriptModule) and child.__dict__.get(_CALL) is None:
            yield child


# --- a call -----------------------------------------------------------------------------------------------------------


def _set(module: nn.Module) -> None:
    record = Record(Hooks(module))
    by_hooks: dict[Hooked, Callable[..., Any]] = {}

    def compiled_for(hooked: Hooked) -> Callable[..., Any]:
        def entry(*args: Any, **kwargs: Any) -> Any:
            return module._call_impl(*args, **kwargs)

        # Dynamo keeps its graphs by code object: one of its own for each module, and its own count of recompilations.
        entry.__code__ = entry.__code__.replace(co_name=f"accelerated_{next(_numbers)}")
        if len(by_hooks) >= _MAX_HOOKED:
            by_hooks.clear()
        compiled = by_hooks[hooked] = torch.compile(entry, backend=record.backend)
        return compiled

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or record.failed is not None or stands_here() or plain_now():
            return module._call_impl(*args, **kwargs)
        kind = record.calls.kind(module, args, kwargs)
        if stands(kind):
            with as_it_stands():
                return module._call_impl(*args, **kwargs)
        unknown = kind is not None and kind.gain is None
        before = _runs(module) if unknown else []
        hooked = record.hooks()
        compiled = by_hooks.get(hooked) or compiled_for(hooked)
        try:
            with _settings():
                result = compiled(*args, **kwargs)
            if kind is not None and unknown:
                judged(kind, module, before, _runs(module))
            return result
        except Exception as error:
            if not _while_tracing(error):
                raise
            problem = one_line(error)
        # An input that eager mode refuses ends here in eager mode's own error.
        result = module._call_impl(*args, **kwargs)
        record.failed = f"PyTorch could not trace it: {problem}"
        warnings.warn(f"cnnfast: {type(module).__name__} runs as it stands: {problem}", CnnfastWarning, stacklevel=3)
        return result

    call.record = record  # type: ignore[attr-defined]
    module.__dict__[_CALL] = call


def _while_tracing(error: Exception) -> bool:
    """Whether Dynamo raised it at work. (It passes on some as they are: an assertion of its own, an IndexError.)"""
    names = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return isinstance(error, torch._dynamo.exc.TorchDynamoException) or "torch._dynamo.convert_frame" in names


def _runs(module: nn.Module) -> list[tuple[Graph, int]]:
    """Each graph of a module and of its parts, and how often it has run."""
    records = [record for m in module.modules() if (record := record_of(m)) is not None]
    return [(graph, graph.runs) for record in records for graph in record.graphs]


@contextmanager
def plain_call(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` and its parts run as they stand."""
    calls = {m: m.__dict__.pop(_CALL) for m in model.modules() if record_of(m) is not None}
    try:
        yield
    finally:
        for m, call in calls.items():
            m.__dict__[_CALL] = call


_SETTINGS = {
    "skip_nnmodule_hook_guards": True,  # `Hooks` sees them
    "recompile_limit": LIMIT,
    "rewrite_assert_with_torch_assert": False,  # it raises a RuntimeError for an AssertionError
}
_MAX_HOOKED = 16


def _dynamo() -> Any:
    return torch._dynamo.config


@contextmanager
def _settings() -> Iterator[None]:
    """Dynamo's settings for what it may compile in a call. (Its own context manager takes several times as long.)"""
    config = _dynamo()
    before = [(name, getattr(config, name)) for name in _SETTINGS]
    for (name, was), wanted in zip(before, _SETTINGS.values(), strict=True):
        if was != wanted:
            setattr(config, name, wanted)
    try:
        yield
    finally:
        for name, was in before:
            if getattr(config, name) != was:
                setattr(config, name, was)
