"""The table of activations: each is one row here and one branch of the functions of `kernels/activation.py`.

A test walks this table against the kernels'. Everything else (which modules are fused, what a backward keeps, what
oneDNN runs on its accumulator) reads the rows: a new activation is added in these two files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Activation", "ActivationRow", "activation_derivative"]


@dataclass(frozen=True)
class ActivationRow:
    """One row of the table. What is left out is the safe answer: an activation without it is slower, not wrong.

    Its function:

    - ``forward(x, *params)``: torch's own. ``defaults``: the parameters where the caller gives none. ``slope``: the one
      parameter is a tensor instead, PReLU's weight.
    - ``in_place(x, *params)``: torch's own in place, where the backward needs the result alone. ``copies_input``: its
      own backward reads a copy of the input all the same.
    - ``without_gradient(x, *params)``: torch's own in place, where no gradient is wanted; ``in_place`` where left out.
    - ``keeps_format``: out of place, torch's allocates like its input. (The others ask TensorIterator, which may choose
      another memory format for a tensor that has several.)

    Its derivative:

    - ``of_x(x, *params)`` and ``of_y(y, *params)``: of the input, and of the output where that determines it; made of
      differentiable operations.
    - ``saves``: what our backward needs, the input ("x"), the output ("y") or neither ("").
    - ``reads_input``: torch's backward, out of place, reads the input although the output would do. Whoever gets the
      result may then overwrite it; where a backward has saved the result, that is an error.

    Its module:

    - ``modules``: the classes. ``attributes``: theirs that tell the parameters, in order, after "inplace" where they
      have that. ``variant``: another attribute and its value here, where a class has several rows.

    Its form in oneDNN:

    - ``onednn``: name and algorithm as torch's packed operators take them, where they do; the parameters are ours.
    - ``loses_nan``: that form gives a number for NaN.
    """

    name: str
    forward: Callable[..., Tensor]
    of_x: Callable[..., Tensor]
    of_y: Callable[..., Tensor] | None = None
    defaults: tuple[float, ...] = ()
    slope: bool = False
    saves: str = "y"
    in_place: Callable[..., Tensor] | None = None
    copies_input: bool = False
    without_gradient: Callable[..., Tensor] | None = None
    reads_input: bool = False
    keeps_format: bool = False
    modules: tuple[type[nn.Module], ...] = ()
    attributes: tuple[str, ...] = ()
    variant: tuple[str, str] | None = None
    onednn: tuple[str, str] | None = None
    loses_nan: bool = False


# At the kinks, and for NaN, the comparisons choose what torch's backward functions choose.


def _step(x: Tensor) -> Tensor:
    return torch.where(x <= 0, torch.zeros_like(x), torch.ones_like(x))


def _kink(x: Tensor, slope: float) -> Tensor:
    return torch.where(x > 0, torch.ones_like(x), torch.full_like(x, slope))


def _elu_of_x(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x <= 0, alpha * torch.exp(x.clamp(max=0)), torch.ones_like(x))


def _elu_of_y(y: Tensor, alpha: float) -> Tensor:
    return torch.where(y <= 0, y + alpha, torch.ones_like(y))


def _silu(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _mish(x: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(x))
    return t + x * torch.sigmoid(x) * (1 - t * t)


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * 0.3989422804014327


def _gelu_tanh(x: Tensor) -> Tensor:
    t = torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * (0.7978845608028654 * (1 + 0.134145 * x * x))


def _tanh_of_y(y: Tensor) -> Tensor:
    return (1 - y) * (1 + y)


def _sigmoid_of_y(y: Tensor) -> Tensor:
    return y * (1 - y)


def _between(x: Tensor, low: float, high: float) -> Tensor:
    return torch.where((x <= low) | (x >= high), torch.zeros_like(x), torch.ones_like(x))


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    return F.prelu(x, weight)


def _prelu_of_x(x: Tensor, weight: Tensor) -> Tensor:
    slope = weight.reshape(-1, *(1,) * (x.dim() - 2)) if x.dim() > 1 else weight
    return torch.where(x > 0, torch.ones_like(x), slope * torch.ones_like(x))


ACTIVATIONS: dict[str, ActivationRow] = {
    row.name: row
    for row in (
        ActivationRow("identity", lambda x: x, torch.ones_like, torch.ones_like, saves="", onednn=("none", "")),
        ActivationRow(
            "relu", F.relu, _step, _step, in_place=torch.relu_,
            modules=(nn.ReLU,), attributes=("inplace",), onednn=("relu", ""), loses_nan=True,
        ),
        ActivationRow(
            "leaky_relu", F.leaky_relu, _kink, _kink, (0.01,), in_place=F.leaky_relu_, reads_input=True,
            modules=(nn.LeakyReLU,), attributes=("inplace", "negative_slope"), onednn=("leaky_relu", ""),
        ),
        ActivationRow(
            "elu", F.elu, _elu_of_x, _elu_of_y, (1.0,), in_place=F.elu_, reads_input=True,
            modules=(nn.ELU,), attributes=("inplace", "alpha"),
        ),
        ActivationRow(
            "silu", F.silu, _silu, saves="x", without_gradient=lambda x: F.silu(x, inplace=True),
            modules=(nn.SiLU,), attributes=("inplace",), onednn=("swish", ""),
        ),
        ActivationRow(
            "mish", F.mish, _mish, saves="x", without_gradient=lambda x: F.mish(x, inplace=True),
            modules=(nn.Mish,), attributes=("inplace",),
        ),
        ActivationRow(
            "gelu", F.gelu, _gelu, saves="x",
            modules=(nn.GELU,), variant=("approximate", "none"), onednn=("gelu", "none"),
        ),
        ActivationRow(
            "gelu_tanh", lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh, saves="x",
            modules=(nn.GELU,), variant=("approximate", "tanh"), onednn=("gelu", "tanh"),
        ),
        ActivationRow(
            "tanh", torch.tanh, lambda x: _tanh_of_y(torch.tanh(x)), _tanh_of_y, in_place=torch.tanh_,
            modules=(nn.Tanh,), onednn=("tanh", ""),
        ),
        ActivationRow(
            "sigmoid", torch.sigmoid, lambda x: _sigmoid_of_y(torch.sigmoid(x)), _sigmoid_of_y,
            in_place=torch.sigmoid_, modules=(nn.Sigmoid,), onednn=("sigmoid", ""),
        ),
        ActivationRow(
            "hardtanh", F.hardtanh, _between, _between, (-1.0, 1.0), in_place=F.hardtanh_, copies_input=True,
            reads_input=True, keeps_format=True,
            modules=(nn.Hardtanh, nn.ReLU6), attributes=("inplace", "min_val", "max_val"),
            onednn=("hardtanh", ""), loses_nan=True,
        ),
        ActivationRow("prelu", _prelu, _prelu_of_x, slope=True, saves="x", keeps_format=True, modules=(nn.PReLU,)),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Activation:
    """An activation by its name in `ACTIVATIONS`, with its numeric parameters (defaults are torch's).

    ``Activation("leaky_relu", (0.2,))``, ``Activation("hardtanh", (0.0, 6.0))``. PReLU's slope is a tensor, so it is
    not part of this value: it is passed beside it.
    """

    name: str = "identity"
    params: tuple[float, ...] = field(default=())

    def __post_init__(self) -> None:
        row = ACTIVATIONS.get(self.name)
        if row is None:
            raise ValueError(f"unknown activation {self.name!r}: expected one of {', '.join(ACTIVATIONS)}")
        params = tuple(float(p) for p in self.params) or row.defaults
        if len(params) != len(row.defaults):
            raise ValueError(f"activation {self.name!r} takes {len(row.defaults)} parameter(s), got {self.params}")
        object.__setattr__(self, "params", params)

    @property
    def row(self) -> ActivationRow:
        """Its row of the table."""
        return ACTIVATIONS[self.name]

    def __call__(self, x: Tensor, slope: Tensor | None = None) -> Tensor:
        """torch's own function of ``x``; ``slope`` is PReLU's weight, of 1 or C elements (channels are dimension 1)."""
        row = self.row
        return row.forward(x, slope) if row.slope else row.forward(x, *self.params)

    def saves(self) -> str:
        """What a backward needs: the input ("x"), the output ("y"), or neither ("")."""
        if self.name in ("leaky_relu", "elu") and self.params[0] < 0:
            return "x"  # the output's sign does not tell the input's
        return self.row.saves


def activation_derivative(
    activation: Activation, saved: Tensor, slope: Tensor | None = None, of: str | None = None
) -> Tensor:
    """The activation's derivative by its input, of ``saved``: the activation's input (``of="x"``) or output ("y"; what
    `Activation.saves` says where None). In float32, or saved's wider dtype; differentiable any number of times.

    ``slope``: PReLU's weight. ValueError where the output does not determine the derivative.
    """
    row = activation.row
    of = of or activation.saves()
    function = row.of_y if of == "y" else row.of_x
    if function is None or (of == "y" and activation.saves() == "x"):
        raise ValueError(f"the output of {activation} does not determine its derivative: give its input")
    saved = saved.to(torch.promote_types(saved.dtype, torch.float32))
    if row.slope:
        if slope is None:
            raise ValueError(f"the derivative of {row.name} needs slope, its weight")
        return function(saved, slope.to(saved.dtype))
    return function(saved, *activation.params)
