"""The calls of a traced graph that can be part of a fused step: each as the `Part` that planning makes of a module.

A call is known by its function or by the name of its method. What is here says only where its arguments are; whether
it is fused, and why not, is `fusion`'s to say.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .fusion_conv import Part
from .modules import KINDS

__all__ = ["AFFINE", "CallKind", "as_shift", "call_kind", "conv_functions"]

AFFINE = ("mul", "shift", "addcmul")  # names of what scales and shifts a norm's result

Values = Mapping[str, Any]


class CallKind(NamedTuple):
    """How to read one function's call. ``parameters``: names and defaults, in order; ``tensors``: those of the
    parameters that are tensors, as a `Part` has them ("" for one that it does not have); ``input``: those that may be
    the tensor that comes through the step; ``starts``: a step can begin here; ``pointwise``: it gives the memory format
    that it gets, and the same numbers in each."""

    name: str
    parameters: tuple[tuple[str, Any], ...]
    tensors: tuple[str, ...]
    part: Callable[[Values], Part]
    input: tuple[str, ...] = ("input",)
    starts: bool = False
    pointwise: bool = False

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The arguments by name; None where the call has others."""
        names = [name for name, _ in self.parameters]
        if len(args) > len(names) or not kwargs.keys() <= set(names[len(args) :]):
            return None
        return dict(self.parameters) | dict(zip(names, args, strict=False)) | dict(kwargs)


# --- arguments as modules have them -----------------------------------------------------------------------------------


def _each(value: Any, n: int) -> Any:
    """An int as n ints, a list as a tuple, anything else as it is."""
    if isinstance(value, int):
        return (value,) * n
    if isinstance(value, (list, tuple)):
        return tuple(value) * (n if len(value) == 1 else 1)
    return value


def _conv(n: int, transposed: bool) -> Callable[[Values], Part]:
    def part(v: Values) -> Part:
        geometry = (
            _each(v["stride"], n),
            _each(v["padding"], n),
            _each(v["output_padding"], n) if transposed else (0,) * n,
            _each(v["dilation"], n),
            v["groups"],
            "zeros",
        )
        tensors = (v["weight"], v["bias"])
        if transposed:
            return Part("transposed", n, "", False, geometry, tensors)
        return Part("conv", n, "", False, (*geometry, ()), tensors)

    return part


def _pad(v: Values) -> Part:
    pad, mode, value = _each(v["pad"], 1), v["mode"], v["value"]
    if not isinstance(pad, tuple) or len(pad) not in (2, 4) or mode not in ("constant", "reflect", "replicate"):
        return Part("", 0, f"it pads by {pad!r} in mode {mode!r}")
    if mode == "constant" and value not in (None, 0):
        return Part("", 0, f"it pads with {value!r}")
    return Part(f"pad {'zeros' if mode == 'constant' else mode}", len(pad) // 2, "", False, (pad,))


def _interpolate(v: Values) -> Part:
    size, factors, x = v["size"], v["scale_factor"], v["input"]
    n = x.dim() - 2 if isinstance(x, torch.Tensor) else 0  # it is known where a step starts
    if size is not None and factors is None and n in (2, 3):
        wanted = _each(size, n)
        if isinstance(wanted, tuple) and len(wanted) == n and all(type(k) is int for k in wanted):
            if all(k and not w % k for w, k in zip(wanted, x.shape[2:], strict=True)):
                size, factors = None, tuple(w // k for w, k in zip(wanted, x.shape[2:], strict=True))
    if v["antialias"]:
        return Part("", 0, "it resizes with antialias=True")
    factors = tuple(factors) if isinstance(factors, list) else factors
    return Part("upsample", n if n in (2, 3) else 0, "", False, (size, factors, v["mode"], v["align_corners"]))


def _batch_norm(v: Values) -> Part:
    tensors = (v["running_mean"], v["running_var"], v["weight"], v["bias"])
    return Part("norm batch", 0, "", v["training"], (v["eps"], v["momentum"], True), tensors)


def _instance_norm(v: Values) -> Part:
    tensors = (v["running_mean"], v["running_var"], v["weight"], v["bias"])
    return Part("norm instance", 0, "", v["use_input_stats"], (v["eps"], v["momentum"], True), tensors)


def _group_norm(v: Values) -> Part:
    return Part("norm group", 0, "", False, (v["eps"], v["num_groups"]), (None, None, v["weight"], v["bias"]))


def _add(v: Values) -> Part:
    """``first``: which operand came through the step."""
    if v["alpha"] != 1:
        return Part("", 0, f"it adds {v['alpha']!r} times a tensor")
    leads = v["through"] == "other"
    return Part("add", 0, "", False, (leads,), (v["input"] if leads else v["other"],))


def _affine(scales: bool) -> Callable[[Values], Part]:
    """A product with, or a sum of, what came through the step and something that is broadcast."""

    def part(v: Values) -> Part:
        other = v["input"] if v["through"] == "other" else v["other"]
        return Part("affine", 0, "", False, (), (other, None) if scales else (None, other))

    return part


def _addcmul(v: Values) -> Part:
    if v["value"] != 1:
        return Part("", 0, f"it adds {v['value']!r} times a product")
    return Part("affine", 0, "", False, (), (v["tensor1" if v["through"] == "tensor2" else "tensor2"], v["input"]))


def _dropout(n: int) -> Callable[[Values], Part]:
    return lambda v: Part("dropout", n, "", v["training"])


def _activation(cls: type[nn.Module], *attributes: Any) -> Callable[[Values], Part]:
    """Of a module class, by its attributes: names of arguments, or values that are no strings."""
    make = KINDS[cls].activation

    def part(v: Values) -> Part:
        tensors = (v["weight"],) if cls is nn.PReLU else ()
        values = tuple(v[a] if isinstance(a, str) else a for a in attributes)
        return Part("activation", 0, "", False, values, tensors, make)

    return part


# --- the table --------------------------------------------------------------------------------------------------------


def _p(text: str, **defaults: Any) -> tuple[tuple[str, Any], ...]:
    """The parameters named in ``text``; those without a default of their own have None."""
    return tuple((name, defaults.get(name)) for name in text.split())


_NORM = ("running_mean", "running_var", "weight", "bias")


@lru_cache(maxsize=1)
def conv_functions() -> Mapping[Any, CallKind]:
    """The convolutions."""
    table: dict[Any, CallKind] = {}
    for n, (plain, transposed) in enumerate(
        [(torch.conv1d, torch.conv_transpose1d), (torch.conv2d, torch.conv_transpose2d)]
        + [(torch.conv3d, torch.conv_transpose3d)],
        1,
    ):
        p = _p("input weight bias stride padding dilation groups", stride=1, padding=0, dilation=1, groups=1)
        table[plain] = CallKind(f"conv{n}d", p, ("weight", "bias"), _conv(n, False), starts=True)
        p = _p(
            "input weight bias stride padding output_padding groups dilation",
            stride=1, padding=0, output_padding=0, groups=1, dilation=1,
        )  # fmt: skip
        table[transposed] = CallKind(f"conv_transpose{n}d", p, ("weight", "bias"), _conv(n, True), starts=True)
    return table


@lru_cache(maxsize=1)
def _functions() -> Mapping[Any, CallKind]:
    table = dict(conv_functions())
    pad = CallKind("pad", _p("input pad mode value", mode="constant"), (), _pad, starts=True)
    table[F.pad] = table[torch._C._nn.pad] = pad
    p = _p(
        "input size scale_factor mode align_corners recompute_scale_factor antialias", mode="nearest", antialias=False
    )
    table[F.interpolate] = CallKind("interpolate", p, (), _interpolate, starts=True)
    p = _p("input running_mean running_var weight bias training momentum eps", training=False, momentum=0.1, eps=1e-5)
    table[F.batch_norm] = CallKind("batch_norm", p, _NORM, _batch_norm)
    p = _p("input weight bias running_mean running_var training momentum eps cudnn_enabled")
    table[torch.batch_norm] = CallKind("batch_norm", p, _NORM, _batch_norm)
    p = _p(
        "input running_mean running_var weight bias use_input_stats momentum eps",
        use_input_stats=True, momentum=0.1, eps=1e-5,
    )  # fmt: skip
    table[F.instance_norm] = CallKind("instance_norm", p, _NORM, _instance_norm)
    p = _p("input num_groups weight bias eps", eps=1e-5)
    table[F.group_norm] = CallKind("group_norm", p, ("", "", "weight", "bias"), _group_norm)
    p = _p("input other alpha", alpha=1)
    add = CallKind("add", p, (), _add, ("input", "other"))
    # What is added in place to something else changes that.
    onto = CallKind("add", p, (), _add, ("input",))
    table |= {operator.add: add, torch.add: add, "add": add, operator.iadd: onto, "add_": onto}
    p = _p("input other")
    mul = CallKind("mul", p, ("other",), _affine(True), ("input", "other"))
    table |= {operator.mul: mul, torch.mul: mul, "mul": mul}
    table |= dict.fromkeys((operator.imul, "mul_"), mul._replace(input=("input",)))
    p = _p("input tensor1 tensor2 value", value=1)
    table[torch.addcmul] = CallKind("addcmul", p, ("input",), _addcmul, ("tensor1", "tensor2"))
    for name, n in (("dropout", 0), ("dropout1d", 1), ("dropout2d", 2), ("dropout3d", 3), ("alpha_dropout", 0)):
        p = _p("input p training inplace", p=0.5, training=name != "alpha_dropout", inplace=False)
        table[getattr(F, name)] = CallKind(name, p, (), _dropout(n))
    return table | _activations()


def _activations() -> dict[Any, CallKind]:
    table: dict[Any, CallKind] = {}

    def add(name: str, functions: Sequence[Any], parameters: Any, cls: type[nn.Module], *attributes: Any) -> None:
        tensors = ("weight",) if cls is nn.PReLU else ()
        kind = CallKind(name, parameters, tensors, _activation(cls, *attributes), pointwise=True)
        table.update(dict.fromkeys(functions, kind))

    x = _p("input")
    add("relu", [F.relu], _p("input inplace", inplace=False), nn.ReLU, "inplace")
    add("relu", [torch.relu, "relu"], x, nn.ReLU, False)
    add("relu", [torch.relu_, F.relu_, "relu_"], x, nn.ReLU, True)
    p = _p("input negative_slope inplace", negative_slope=0.01, inplace=False)
    add("leaky_relu", [F.leaky_relu], p, nn.LeakyReLU, "inplace", "negative_slope")
    add("leaky_relu", [F.leaky_relu_], p[:2], nn.LeakyReLU, True, "negative_slope")
    add("elu", [F.elu], _p("input alpha inplace", alpha=1.0, inplace=False), nn.ELU, "inplace", "alpha")
    add("silu", [F.silu], _p("input inplace", inplace=False), nn.SiLU, "inplace")
    add("mish", [F.mish], _p("input inplace", inplace=False), nn.Mish, "inplace")
    add("gelu", [F.gelu], _p("input approximate", approximate="none"), nn.GELU, "approximate")
    add("tanh", [F.tanh, torch.tanh, torch.tanh_, "tanh", "tanh_"], x, nn.Tanh)
    add("sigmoid", [F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"], x, nn.Sigmoid)
    p = _p("input min_val max_val inplace", min_val=-1.0, max_val=1.0, inplace=False)
    add("hardtanh", [F.hardtanh], p, nn.Hardtanh, "inplace", "min_val", "max_val")
    add("relu6", [F.relu6], _p("input inplace", inplace=False), nn.ReLU6, "inplace", 0.0, 6.0)
    add("prelu", [F.prelu, torch.prelu, "prelu"], _p("input weight"), nn.PReLU)
    return table


def as_shift(kind: CallKind) -> CallKind:
    """A sum's, where what is added to the step's tensor is broadcast."""
    return kind._replace(name="shift", tensors=("other",), part=_affine(False))


def call_kind(target: Any) -> CallKind | None:
    """Of a function, or of the name of a method; None for what is no part of a step."""
    try:
        return _functions().get(target)
    except TypeError:  # not hashable
        return None
