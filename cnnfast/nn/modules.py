"""The modules that can be part of a fused step, and a look at them that is cheap enough for every call.

Modules are matched by exact type: a subclass or a lazy module may compute anything, and so may hooks and
parametrizations but for PyTorch's own that compute a convolution's weight (`computed`). What a plan depends on (hooks,
mode, attributes, the tensors' shapes and types) is read into plain values, so that two readings can be compared; no
value keeps a module or a tensor alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..activations import ACTIVATIONS, Activation, ActivationRow
from .computed import HOOKS, ComputedWeight, by_hook, by_parametrization, is_parametrized, is_patched

__all__ = ["KINDS", "SHADOWS", "Kind", "Reading", "NotFused", "kind_of", "read"]


class NotFused(Exception):
    """The reason why a module is not fused."""


Tensors = tuple[Tensor | None, ...]  # a convolution's weight may be a `ComputedWeight`


class Kind(NamedTuple):
    """How to look at one class of modules: functions of a module's ``__dict__``, and of its tensors."""

    role: str  # transposed, conv, upsample, pad and its mode, norm and its kind, activation, identity or dropout
    ndim: int  # spatial dimensions; 0: any
    forward: Callable[..., Any]  # the class's own, which a patched class has no longer
    look: Callable[[dict[str, Any]], tuple[Any, ...]]  # the four dicts of hooks, training, then attributes
    tensors: Callable[[dict[str, Any]], Tensors] | None
    describe: Callable[..., tuple[object, ...]]  # the tensors' types and shapes
    activation: Callable[..., Activation] | None = None  # from the attributes


_weight_bias = itemgetter("weight", "bias")
_mean_var = itemgetter("running_mean", "running_var")


def _conv_tensors(d: dict[str, Any]) -> Tensors:
    return _weight_bias(d["_parameters"])


def _norm_tensors(d: dict[str, Any]) -> Tensors:
    return _mean_var(d["_buffers"]) + _weight_bias(d["_parameters"])


def _group_norm_tensors(d: dict[str, Any]) -> Tensors:
    return (None, None, *_weight_bias(d["_parameters"]))


def _slope_tensor(d: dict[str, Any]) -> Tensors:
    return (d["_parameters"]["weight"],)


def _of_conv(weight: Tensor | None, bias: Tensor | None) -> tuple[object, ...]:
    if weight is None or weight.layout is not torch.strided:
        return (weight is None,)
    w = (type(weight), weight.shape, weight.stride(), weight.dtype, weight.device)
    return w if bias is None else w + _of_vectors(bias)


def _of_norm(mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> tuple[object, ...]:
    if mean is None or var is None or weight is None or bias is None:
        return _of_vectors(mean, var, weight, bias)
    # Without devices, for the time: vectors on another device than the weight raise in every backend.
    shapes = (mean.shape, var.shape, weight.shape, bias.shape)
    return (*shapes, mean.dtype, var.dtype, weight.dtype, bias.dtype, type(mean), type(var), type(weight), type(bias))


def _of_vectors(*tensors: Tensor | None) -> tuple[object, ...]:
    return tuple([None if t is None else (type(t), t.shape, t.dtype, t.device) for t in tensors])


def _activation_of(rows: Sequence[ActivationRow]) -> tuple[tuple[str, ...], Callable[..., Activation]]:
    """Of a class with these rows: the attributes that tell its activation, and the function of their values."""
    first = rows[0]
    chooser = () if first.variant is None else first.variant[:1]
    params = slice(1 if "inplace" in first.attributes else 0, len(first.attributes))

    def make(*values: object) -> Activation:
        if not all(type(p) in (int, float) for p in values[params]):
            raise NotFused(f"its parameters {values[params]} are not numbers")
        row = first
        if chooser:
            found = [r for r in rows if r.variant == (*chooser, values[-1])]
            if not found:
                raise NotFused(f"{chooser[0]}={values[-1]!r} is unknown")
            (row,) = found
        return Activation(row.name, values[params])  # type: ignore[arg-type]

    return first.attributes + chooser, make


def _kinds() -> dict[type, Kind]:
    kinds: dict[type, Kind] = {}

    def add(
        cls: type[nn.Module],
        role: str,
        ndim: int,
        attributes: tuple[str, ...] = (),
        tensors: Callable[[dict[str, Any]], Tensors] | None = None,
        activation: Callable[..., Activation] | None = None,
    ) -> None:
        look = itemgetter(*HOOKS, "training", *attributes)
        describe: Callable[..., tuple[object, ...]] = _of_vectors
        if tensors is _conv_tensors:
            describe = _of_conv
        elif tensors in (_norm_tensors, _group_norm_tensors):
            describe = _of_norm
        kinds[cls] = Kind(role, ndim, cls.forward, look, tensors, describe, activation)

    geometry = ("stride", "padding", "output_padding", "dilation", "groups", "padding_mode")
    add(nn.ConvTranspose1d, "transposed", 1, geometry, _conv_tensors)
    add(nn.ConvTranspose2d, "transposed", 2, geometry, _conv_tensors)
    add(nn.ConvTranspose3d, "transposed", 3, geometry, _conv_tensors)
    # They pad by this list, made at construction, whenever padding_mode is not "zeros".
    add(nn.Conv1d, "conv", 1, (*geometry, "_reversed_padding_repeated_twice"), _conv_tensors)
    add(nn.Conv2d, "conv", 2, (*geometry, "_reversed_padding_repeated_twice"), _conv_tensors)
    add(nn.Conv3d, "conv", 3, (*geometry, "_reversed_padding_repeated_twice"), _conv_tensors)
    for upsample, n in ((nn.Upsample, 0), (nn.UpsamplingNearest2d, 2)):
        add(upsample, "upsample", n, ("size", "scale_factor", "mode", "align_corners"))
    pads_of = (
        (nn.ReflectionPad1d, nn.ReplicationPad1d),
        (nn.ReflectionPad2d, nn.ReplicationPad2d),
        (nn.ReflectionPad3d, nn.ReplicationPad3d),
    )
    for n, pads in enumerate(pads_of, 1):
        for pad, mode in zip(pads, ("reflect", "replicate"), strict=True):
            add(pad, f"pad {mode}", n, ("padding",))
    add(nn.ZeroPad2d, "pad zeros", 2, ("padding",))
    add(nn.ZeroPad3d, "pad zeros", 3, ("padding",))
    tracked = ("eps", "momentum", "track_running_stats")
    add(nn.BatchNorm1d, "norm batch", 1, tracked, _norm_tensors)
    add(nn.BatchNorm2d, "norm batch", 2, tracked, _norm_tensors)
    add(nn.BatchNorm3d, "norm batch", 3, tracked, _norm_tensors)
    add(nn.SyncBatchNorm, "norm sync", 0, tracked, _norm_tensors)
    add(nn.InstanceNorm1d, "norm instance", 1, (*tracked, "num_features"), _norm_tensors)
    add(nn.InstanceNorm2d, "norm instance", 2, (*tracked, "num_features"), _norm_tensors)
    add(nn.InstanceNorm3d, "norm instance", 3, (*tracked, "num_features"), _norm_tensors)
    add(nn.GroupNorm, "norm group", 0, ("eps", "num_groups"), _group_norm_tensors)
    for cls in dict.fromkeys(cls for row in ACTIVATIONS.values() for cls in row.modules):
        rows = [row for row in ACTIVATIONS.values() if cls in row.modules]
        attributes, activation = _activation_of(rows)
        add(cls, "activation", 0, attributes, _slope_tensor if rows[0].slope else None, activation)
    add(nn.Identity, "identity", 0)
    add(nn.Dropout, "dropout", 0)
    add(nn.AlphaDropout, "dropout", 0)
    add(nn.Dropout1d, "dropout", 1)
    add(nn.Dropout2d, "dropout", 2)
    add(nn.Dropout3d, "dropout", 3)
    return kinds


KINDS = _kinds()
# What a module's __dict__ must not hold: names that its forward would find there instead of where we look.
SHADOWS = frozenset(
    ("weight", "bias", "running_mean", "running_var", "_conv_forward", "_output_padding", "_check_input_dim")
    + ("_apply_instance_norm", "_handle_no_batch_input", "_get_no_batch_dim", "_check_non_zero_input_channels")
    + ("_call_impl", "_wrapped_call_impl")
)


class Reading(NamedTuple):
    """The modules in the order in which they run, what a plan depends on, and each module's tensors (among which a
    `ComputedWeight` may stand for a convolution's weight)."""

    modules: list[nn.Module]
    facts: list[object]
    tensors: list[tuple[Tensor | None, ...]]


def kind_of(cls: type) -> Kind | None:
    """The kind of a class, and of what parametrizing its weight makes of it."""
    return KINDS.get(cls.__bases__[0] if is_parametrized(cls) else cls)


def read(
    modules: Iterable[nn.Module], containers: tuple[Callable[..., Any], ...] = (), *, computed: bool = True
) -> Reading:
    """Look at ``modules``. Two readings with equal ``facts`` have equal plans.

    ``containers``: forward functions of Sequential classes that do no more than run their children; those children are
    read in their place. ``computed``: whether weights that are computed on each call are looked for.
    """
    reading = Reading([], [], [])
    _read(modules, containers, reading, computed)
    return reading


def _computed(m: nn.Module) -> tuple[object, Tensors]:
    """The facts and tensors of a convolution whose weight is computed; ("", ()) of other modules."""
    cls, d = type(m), m.__dict__
    parametrized, kind = is_parametrized(cls), kind_of(cls)
    if kind is None or kind.tensors is not _conv_tensors or cls.forward is not kind.forward or "forward" in d:
        return "", ()
    found = by_parametrization(m) if parametrized else by_hook(m)
    if not isinstance(found, ComputedWeight) or parametrized and is_patched(m):
        return found if isinstance(found, str) else "", ()
    try:
        bias, state = d["_parameters"]["bias"], kind.look(d)[len(HOOKS) :]
    except KeyError as missing:
        return f"it has no {missing}", ()
    if kind.role == "conv":
        state = (*state[:-1], tuple(state[-1]))
    return (cls, len(d), state, _of_vectors(bias), found.facts), (found, bias)  # type: ignore[return-value]


def _read(
    modules: Iterable[nn.Module], containers: tuple[Callable[..., Any], ...], reading: Reading, computed: bool
) -> None:
    # About half a microsecond a module: locals, tuples and functions in C.
    found, facts, tensors = reading
    for m in modules:
        cls = type(m)
        kind = KINDS.get(cls)
        own: Tensors = ()
        if kind is None:
            if isinstance(m, nn.Sequential) and _only_runs_children(m, containers):
                _read(m._modules.values(), containers, reading, computed)
                continue
            fact, own = _computed(m) if computed else ("", ())
            facts.append(fact if own else (cls, is_patched(m), fact))
        else:
            role, _, forward, look, tensors_of, describe, _ = kind
            d = m.__dict__
            try:
                state = look(d)
                hooked = state[0] or state[1] or state[2] or state[3]
                if hooked or "forward" in d or cls.forward is not forward:
                    fact, own = _computed(m) if computed and state[1] else ("", ())
                    facts.append(fact if own else (cls, "changed"))
                else:
                    state = state[4:]
                    if role == "conv":
                        state = (*state[:-1], tuple(state[-1]))  # the one attribute that is a list
                    # len(d) notices attributes set on the module itself, which planning then looks at.
                    if tensors_of is None:
                        facts.append((cls, len(d), state))
                    else:
                        own = tensors_of(d)
                        facts.append((cls, len(d), state, describe(*own)))
            except KeyError as missing:
                facts.append((cls, str(missing)))
        found.append(m)
        tensors.append(own)


def _only_runs_children(m: nn.Sequential, containers: tuple[Callable[..., Any], ...]) -> bool:
    cls = type(m)
    return (
        cls.forward in containers
        and cls.__iter__ is nn.Sequential.__iter__
        and cls.__call__ is nn.Module.__call__
        and not is_patched(m)
    )
