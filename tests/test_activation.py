"""The table of cnnfast/activations.py, and kernels/activation.py against it: the one fact that stands twice."""

from __future__ import annotations

import pytest
import torch

from cnnfast.activations import ACTIVATIONS, Activation, activation_derivative

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from cnnfast.kernels.activation import act, act_grad  # noqa: E402

SLOPE = 0.25
PARAMS = {"leaky_relu": (0.2,), "elu": (1.5,), "hardtanh": (-0.5, 0.75)}
NEGATIVE = [Activation("leaky_relu", (-0.3,)), Activation("elu", (-0.5,))]  # the sign of y does not tell that of x


@triton.jit
def table_kernel(
    x_ptr,  # (BLOCK,)
    y_ptr,
    slope_ptr,  # (1,)
    P0: tl.constexpr,
    P1: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, act(tl.load(x_ptr + offs), tl.load(slope_ptr), P0, P1, ACT))


@triton.jit
def derivative_kernel(
    saved_ptr,  # (BLOCK,)
    d_ptr,
    slope_ptr,  # (1,)
    P0: tl.constexpr,
    P1: tl.constexpr,
    ACT: tl.constexpr,
    OF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.arange(0, BLOCK)
    tl.store(d_ptr + offs, act_grad(tl.load(saved_ptr + offs), tl.load(slope_ptr), P0, P1, ACT, OF))


def device_function(activation: Activation, x: torch.Tensor, derivative_of: str = "") -> torch.Tensor:
    size = triton.next_power_of_2(x.numel())
    padded = torch.zeros(size, device=x.device)
    padded[: x.numel()] = x
    y = torch.empty_like(padded)
    p0, p1, *_ = (*activation.params, 0.0, 0.0)
    slope = torch.full((1,), SLOPE, device=x.device)
    if derivative_of:
        derivative_kernel[(1,)](padded, y, slope, p0, p1, activation.name, derivative_of, size)
    else:
        table_kernel[(1,)](padded, y, slope, p0, p1, activation.name, size)
    return y[: x.numel()]


def expected(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    slope = torch.tensor([SLOPE], dtype=torch.float64) if activation.name == "prelu" else None
    return activation(x.cpu().double(), slope)


def activations() -> list[Activation]:
    defaults = [Activation(name) for name in ACTIVATIONS]
    return defaults + [Activation(name, params) for name, params in PARAMS.items()] + NEGATIVE


@pytest.mark.parametrize("activation", activations(), ids=str)
def test_values(activation: Activation, device: torch.device) -> None:
    """At every magnitude, within two float32 roundings of the larger of 1 and the result."""
    x = torch.cat([
        torch.linspace(-30, 30, 1501), torch.linspace(-0.3, 0.3, 301), torch.logspace(-30, 2, 100),
        -torch.logspace(-30, 2, 100), torch.tensor([0.0, -0.0, 1e4, -1e4, 3e38, -3e38]),
    ]).to(device)  # fmt: skip
    y, exact = device_function(activation, x).cpu().double(), expected(activation, x)
    error = (y - exact).abs() / exact.abs().clamp_min(1)
    worst = int(error.argmax())
    assert error[worst] <= 2 * torch.finfo(torch.float32).eps, (x[worst], y[worst], exact[worst])


@pytest.mark.parametrize("activation", activations(), ids=str)
def test_nan_and_infinities(activation: Activation, device: torch.device) -> None:
    """As the table's function in float64 (silu, mish and gelu of -inf are NaN: a product with zero)."""
    x = torch.tensor([float("nan"), float("inf"), float("-inf")], device=device)
    y, want = device_function(activation, x).cpu().double(), expected(activation, x)
    assert want[0].isnan()
    torch.testing.assert_close(y, want, equal_nan=True, rtol=1e-6, atol=0)


def test_small_arguments_keep_their_relative_accuracy(device: torch.device) -> None:
    """tanh, elu, silu and the like are about linear at 0: no cancellation may eat their digits."""
    x = torch.cat([torch.logspace(-8, -1, 200), -torch.logspace(-8, -1, 200)]).to(device)
    for name in ("tanh", "elu", "silu", "mish", "gelu", "gelu_tanh"):
        y, exact = device_function(Activation(name), x).cpu().double(), expected(Activation(name), x)
        assert ((y - exact).abs() <= 1e-6 * exact.abs()).all(), name


# --- derivatives ------------------------------------------------------------------------------------------------------


def sources() -> list[tuple[Activation, str]]:
    """Every activation with what its derivative can be had of."""
    return [(a, of) for a in activations() for of in ("x", "y") if of == "x" or a.saves() != "x"]


def by_autograd(activation: Activation, x: torch.Tensor, order: int = 1) -> torch.Tensor:
    """The derivative of torch's own function, in float64."""
    x = x.cpu().double().requires_grad_()
    y = expected(activation, x)
    for _ in range(order):
        if not y.requires_grad:
            return torch.zeros_like(x)
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y.detach()


def spread() -> torch.Tensor:
    return torch.cat([torch.linspace(-12, 12, 777), torch.linspace(-0.3, 0.3, 301), torch.tensor([0.0, -0.5, 0.75])])


@pytest.mark.parametrize(("activation", "of"), sources(), ids=str)
def test_derivative_of_the_table(activation: Activation, of: str) -> None:
    """`activation_derivative` is torch's derivative, at the kinks too, and its own derivative is the second one."""
    x = spread().double().requires_grad_()
    slope = torch.tensor([SLOPE], dtype=torch.float64) if activation.name == "prelu" else None
    d = activation_derivative(activation, x if of == "x" else activation(x, slope), slope, of)
    torch.testing.assert_close(d.detach(), by_autograd(activation, x.detach()), rtol=1e-10, atol=1e-12)
    second = torch.zeros_like(x)
    if d.requires_grad:
        (second,) = torch.autograd.grad(d.sum(), x)
    smooth = (x.detach() != 0) & (x.detach() != -0.5) & (x.detach() != 0.75)
    torch.testing.assert_close(second[smooth], by_autograd(activation, x.detach(), 2)[smooth], rtol=1e-9, atol=1e-10)


def test_derivative_refuses_what_cannot_be() -> None:
    y = torch.ones(3)
    for activation in (Activation("silu"), Activation("mish"), *NEGATIVE):
        assert activation.saves() == "x"
        with pytest.raises(ValueError, match="does not determine"):
            activation_derivative(activation, y, of="y")
    with pytest.raises(ValueError, match="slope"):
        activation_derivative(Activation("prelu"), y)


@pytest.mark.parametrize(("activation", "of"), sources(), ids=str)
def test_derivative_on_the_device(activation: Activation, of: str, device: torch.device) -> None:
    """`act_grad` against torch's derivative in float64, within a few float32 roundings of 1. Of the output: of what
    float32 keeps of it."""
    x = spread()
    saved = x if of == "x" else expected(activation, x).float()
    d = device_function(activation, saved.to(device), of).cpu().double()
    exact = by_autograd(activation, x)
    flips = torch.zeros_like(x, dtype=torch.bool)
    if of == "y" and activation.name == "hardtanh":  # a bound that float32 rounds
        low, high = activation.params
        flips = ((x - low).abs() < 1e-6) | ((x - high).abs() < 1e-6)
    error = torch.where(flips, 0.0, (d - exact).abs() / exact.abs().clamp_min(1))
    worst = int(error.argmax())
    assert error[worst] <= 4 * torch.finfo(torch.float32).eps, (x[worst], d[worst], exact[worst])
