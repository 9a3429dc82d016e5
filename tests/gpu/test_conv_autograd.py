"""Gradients of the public convolutions on the Triton kernels, first and second, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import cnnfast
from cnnfast.reference import collapse_weight
from cnnfast.tolerance import round_tf32

from ..cases import PRECISIONS
from ..conftest import conv_precision
from ..tolerance import assert_close

pytestmark = pytest.mark.usefixtures("poison")

Shape = tuple[int, ...]


def _upsampled(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None, mode: str = "zeros") -> torch.Tensor:
    x = F.pad(F.interpolate(x, scale_factor=2.0, mode="nearest"), (1, 1, 1, 1), "constant" if mode == "zeros" else mode)
    return F.conv2d(x, w, b)


@dataclass(frozen=True)
class Case:
    """``function`` of x, weight and bias with ``keywords``; ``reference`` is torch's."""

    name: str
    function: str
    x: Shape
    weight: Shape
    keywords: tuple[tuple[str, Any], ...] = ()
    bias: bool = True
    activation: str | None = None
    param: Any = None
    channels_last: bool = True

    @property
    def out_channels(self) -> int:
        groups = dict(self.keywords).get("groups", 1)
        return self.weight[1] * groups if "transpose" in self.function else self.weight[0]

    def reference(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        if self.function == "upsample_conv2d":
            y = _upsampled(x, w, b, dict(self.keywords).get("padding_mode", "zeros"))
        else:
            y = getattr(F, self.function)(x, w, b, **dict(self.keywords))
        if self.activation is None:
            return y
        params = () if self.param is None else (self.param,)
        return cnnfast.activations.Activation(self.activation, params)(y)

    def rounded(self, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
        """`reference`; of an upsampling, with the summed weight rounded to ``dtype``, which is what gets multiplied."""
        if self.function != "upsample_conv2d" or self.keywords or dtype == torch.float32:
            return self.reference

        def run(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
            summed = collapse_weight(w, (2, 2))
            summed = summed + (summed.to(dtype).to(w.dtype) - summed).detach()
            y = F.conv_transpose2d(x, summed, b, 2, 1)
            return y if self.activation is None else cnnfast.activations.Activation(self.activation)(y)

        return run

    def ours(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        function = getattr(cnnfast.ops, self.function)
        act = dict(activation=self.activation, activation_param=self.param)
        return function(x, w, b, backend="triton", **dict(self.keywords), **act)


def case(name: str, function: str, x: Shape, weight: Shape, **more: Any) -> Case:
    own = {f: more.pop(f) for f in ("bias", "activation", "param", "channels_last") if f in more}
    return Case(name, function, x, weight, tuple(more.items()), **own)


T2, C2 = "conv_transpose2d", "conv2d"
CASES = (
    case("dcgan", T2, (2, 32, 4, 4), (32, 48, 4, 4), stride=2, padding=1, activation="relu"),
    case("latent", T2, (3, 100, 1, 1), (100, 32, 4, 4), bias=False),
    case("rgb-head", T2, (2, 32, 4, 5), (32, 3, 4, 4), stride=2, padding=1, activation="tanh"),
    case("cyclegan", T2, (2, 32, 4, 3), (32, 32, 3, 3), stride=2, padding=1, output_padding=1, channels_last=False),
    case("output-padding-by-dilation", T2, (2, 32, 3, 4), (32, 32, 2, 2), output_padding=2, dilation=3),
    case(
        "groups", T2, (2, 64, 3, 4), (64, 32, 4, 4), stride=2, padding=1, groups=2, activation="leaky_relu", param=0.2
    ),
    case("grey", T2, (2, 32, 4, 5), (32, 1, 4, 4), stride=2, padding=1, channels_last=False),
    case("one-column", "conv_transpose1d", (2, 32, 9), (32, 32, 1), activation="relu"),
    case("one-dimension", "conv_transpose1d", (2, 32, 9), (32, 16, 16), stride=8, padding=4, activation="tanh"),
    case("discriminator", C2, (2, 32, 8, 8), (48, 32, 4, 4), stride=2, padding=1, activation="leaky_relu", param=0.2),
    case("discriminator-first", C2, (2, 3, 9, 8), (32, 3, 4, 4), stride=2, padding=1, activation="silu"),
    case("same", C2, (2, 32, 5, 4), (32, 32, 3, 3), padding="same", activation="sigmoid"),
    case("conv1d", "conv1d", (2, 32, 11), (32, 32, 5), stride=3, padding=2, dilation=2, activation="hardtanh"),
    case("upsample", "upsample_conv2d", (2, 32, 3, 4), (48, 32, 3, 3), activation="tanh"),
    case("upsample-reflect", "upsample_conv2d", (2, 32, 3, 4), (32, 32, 3, 3), padding_mode="reflect"),
)
NAMES = {c.name: c for c in CASES}


def tensors(c: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Leaves (x, weight, bias) and the result's gradient, on the CPU."""
    g = torch.Generator().manual_seed(0)
    fan = c.weight[0] if "transpose" in c.function else c.weight[1]
    leaves = [torch.randn(c.x, generator=g), torch.randn(c.weight, generator=g) * (fan * 4) ** -0.5]
    if c.bias:
        leaves.append(torch.randn(c.out_channels, generator=g))
    leaves = [t.to(dtype) for t in leaves]
    y = c.reference(*(t.double() for t in leaves), *([] if c.bias else [None]))
    return leaves, torch.randn(y.shape, generator=g).to(dtype)


def call(function: Callable[..., torch.Tensor], leaves: Sequence[torch.Tensor]) -> torch.Tensor:
    return function(leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None)


def first(function: Callable[..., torch.Tensor], leaves: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = call(function, leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def second(function: Callable[..., torch.Tensor], leaves: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of the squares of all first gradients together."""
    leaves, dy = [t.detach().requires_grad_() for t in leaves], dy.detach().requires_grad_()
    grads = torch.autograd.grad(call(function, leaves), leaves, dy, create_graph=True)
    penalty = sum(g.double().square().sum() if g.dtype == torch.float64 else g.float().square().sum() for g in grads)
    assert isinstance(penalty, torch.Tensor)
    return [g.detach() for g in torch.autograd.grad(penalty, [*leaves, dy], materialize_grads=True)]


def on(device: torch.device, c: Case, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    out = [t.to(device) for t in leaves]
    if c.channels_last:
        out[:2] = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in out[:2]]
    return out


def check(c: Case, precision: str, device: torch.device, how: Callable[..., list[torch.Tensor]]) -> None:
    dtype, switch = PRECISIONS[precision]
    leaves, dy = tensors(c, dtype)
    with conv_precision(switch):
        ours = on(device, c, leaves)
        got = how(c.ours, ours, dy.to(device))
    exact = how(c.reference, [t.double() for t in leaves], dy.double())
    wide = [t.float() for t in (*leaves, dy)]
    if precision == "tf32":  # as far as operands can be rounded ahead: x and weight, and dy where no activation follows
        wide = [round_tf32(t) for t in wide]
    yard = [t.to(dtype) for t in how(c.rounded(dtype), wide[:-1], wide[-1])]
    names = (["y"] if how is first else []) + ["x", "weight", "bias"][: len(leaves)] + (["dy"] if how is second else [])
    assert [t.shape for t in got] == [t.shape for t in exact]
    for name, a, e, s in zip(names, got, exact, yard, strict=True):
        assert_close(a, e, s, f"{c.name} {precision} d{name}")
    if how is first:
        like = first(c.reference, [t.detach().cpu().float() for t in ours], dy.float())
        assert [t.stride() for t in got[:2]] == [t.stride() for t in like[:2]], "result and input's gradient as torch's"
        assert got[2].stride() == ours[1].stride(), "a weight's gradient has its strides"


def convolutions(launches: list[str]) -> list[str]:
    """Which kernels of convolutions ran, sorted; their names begin with the regime."""
    kinds = {"phases": "conv", "merged": "conv", "latent": "conv", "wgrad": "wgrad"}
    return sorted(kinds[name.split()[0]] for name in launches if name.split()[0] in kinds)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "tf32"])
@pytest.mark.parametrize("name", ["dcgan", "rgb-head", "discriminator", "upsample"])
def test_gradients(name: str, precision: str, device: torch.device, launches: list[str]) -> None:
    check(NAMES[name], precision, device, first)
    assert convolutions(launches) == ["conv", "conv", "wgrad"], launches


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_gradients_of_every_geometry(c: Case, device: torch.device) -> None:
    check(c, "fp32", device, first)


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_second_gradients(c: Case, device: torch.device) -> None:
    check(c, "fp32", device, second)


def test_only_what_is_asked_for(device: torch.device, launches: list[str]) -> None:
    c = NAMES["dcgan"]
    leaves, dy = tensors(c, torch.float16)
    cases = (((0,), ["conv"]), ((1,), ["wgrad"]), ((2,), []), ((0, 1), ["conv", "wgrad"]))
    for wanted, kinds in cases:
        given = on(device, c, [t.clone() for t in leaves])
        for k in wanted:
            given[k].requires_grad_()
        y = c.ours(*given)
        launches.clear()
        y.backward(dy.to(device))
        assert convolutions(launches) == kinds
        assert [t.grad is not None for t in given] == [k in wanted for k in range(3)]


def test_runs_are_equal_to_the_bit(device: torch.device) -> None:
    c = NAMES["dcgan"]
    leaves, dy = tensors(c, torch.float32)
    one, two = (first(c.ours, on(device, c, leaves), dy.to(device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
