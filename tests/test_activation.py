"""kernels/activation.py against the table of cnnfast/spec.py: the one fact that stands twice."""

from __future__ import annotations

import pytest
import torch

from cnnfast.spec import ACTIVATIONS, Activation

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402

from cnnfast.kernels.activation import act  # noqa: E402

SLOPE = 0.25
PARAMS = {"leaky_relu": (0.2,), "elu": (1.5,), "hardtanh": (-0.5, 0.75)}


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


def device_function(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    size = triton.next_power_of_2(x.numel())
    padded = torch.zeros(size, device=x.device)
    padded[: x.numel()] = x
    y = torch.empty_like(padded)
    p0, p1, *_ = (*activation.params, 0.0, 0.0)
    slope = torch.full((1,), SLOPE, device=x.device)
    table_kernel[(1,)](padded, y, slope, p0, p1, activation.name, size)
    return y[: x.numel()]


def expected(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    slope = torch.tensor([SLOPE], dtype=torch.float64) if activation.name == "prelu" else None
    return activation(x.cpu().double(), slope)


def activations() -> list[Activation]:
    defaults = [Activation(name) for name in ACTIVATIONS]
    return defaults + [Activation(name, params) for name, params in PARAMS.items()]


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
    """As the table's function in float64 (silu and gelu of -inf are NaN: a product with zero)."""
    x = torch.tensor([float("nan"), float("inf"), float("-inf")], device=device)
    y, want = device_function(activation, x).cpu().double(), expected(activation, x)
    assert want[0].isnan()
    torch.testing.assert_close(y, want, equal_nan=True, rtol=1e-6, atol=0)


def test_small_arguments_keep_their_relative_accuracy(device: torch.device) -> None:
    """tanh, elu and silu are about linear at 0: no cancellation may eat their digits."""
    x = torch.cat([torch.logspace(-8, -1, 200), -torch.logspace(-8, -1, 200)]).to(device)
    for name in ("tanh", "elu", "silu", "gelu", "gelu_tanh"):
        y, exact = device_function(Activation(name), x).cpu().double(), expected(Activation(name), x)
        assert ((y - exact).abs() <= 1e-6 * exact.abs()).all(), name
