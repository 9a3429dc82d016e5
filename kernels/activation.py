"""Device functions of the table in `cnnfast.activations`: same names, same parameters, computed in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # (1 - e) / (1 + e) with e = exp(-2|x|) in (0, 1]: no overflow; a short odd series where 1 - e would cancel.
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    a2 = a * a
    small = a * (1.0 - a2 * (0.3333333333 - a2 * (0.1333333333 - a2 * 0.0539682540)))
    t = tl.where(a < 0.1, small, large)
    return tl.where(x < 0, -t, t)


@triton.jit
def _expm1_negative(x):
    # exp(x) - 1 for x <= 0, by series where the difference would cancel.
    series = x * (1.0 + x * (0.5 + x * (0.1666666667 + x * (0.0416666667 + x * 0.0083333333))))
    return tl.where(x > -0.1, series, tl.exp(x) - 1.0)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _logistic(x):
    # The sigmoid and its derivative, without the cancellation in 1 - sigmoid.
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * r, r), e * r * r


@triton.jit
def _tanh_softplus(x):
    # t = tanh(log(1 + exp(x))) and 1 - t^2, as fractions of sums of positive numbers: no overflow, no cancellation.
    e = tl.exp(-tl.abs(x))
    n = tl.where(x < 0, e * (2.0 + e), 1.0 + 2.0 * e)
    rest = tl.where(x < 0, 2.0, 2.0 * e * e)
    d = n + rest
    return n / d, rest * (n + d) / (d * d)


@triton.jit
def act(x, slope, P0: tl.constexpr, P1: tl.constexpr, ACT: tl.constexpr):
    """Activation ``ACT`` of x (float32). ``slope`` is PReLU's weight, broadcast against x; P0 and P1 are the
    parameters.

    Comparisons are written so that NaN passes through, as it does in torch.
    """
    if ACT == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACT == "leaky_relu":
        x = tl.where(x < 0, x * P0, x)
    elif ACT == "prelu":
        x = tl.where(x < 0, x * slope, x)
    elif ACT == "elu":
        x = tl.where(x < 0, _expm1_negative(tl.minimum(x, 0.0)) * P0, x)
    elif ACT == "silu":
        x = x * _sigmoid(x)
    elif ACT == "mish":
        t, rest = _tanh_softplus(x)
        x = x * t
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        x = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACT == "tanh":
        x = _tanh(x)
    elif ACT == "sigmoid":
        x = _sigmoid(x)
    elif ACT == "hardtanh":
        x = tl.where(x < P0, P0, tl.where(x > P1, P1, x))
    else:
        tl.static_assert(ACT == "identity", "activation without a device function")
    return x


@triton.jit
def act_grad(saved, slope, P0: tl.constexpr, P1: tl.constexpr, ACT: tl.constexpr, OF: tl.constexpr):
    """The derivative of activation ``ACT`` by its input, of its input (``OF`` "x") or its output ("y"), in float32.

    At the kinks, and for NaN, as torch's backward functions have it.
    """
    if ACT == "relu":
        d = tl.where(saved <= 0, 0.0, 1.0)
    elif ACT == "leaky_relu":
        d = tl.where(saved > 0, 1.0, P0)
    elif ACT == "prelu":
        tl.static_assert(OF == "x", "the output of prelu does not determine its derivative")
        d = tl.where(saved > 0, 1.0, slope)
    elif ACT == "elu":
        below = saved + P0 if OF == "y" else P0 * tl.exp(tl.minimum(saved, 0.0))
        d = tl.where(saved <= 0, below, 1.0)
    elif ACT == "tanh":
        if OF == "y":
            d = (1.0 - saved) * (1.0 + saved)
        else:
            s, ds = _logistic(2.0 * saved)
            d = 4.0 * ds
    elif ACT == "sigmoid":
        if OF == "y":
            d = saved * (1.0 - saved)
        else:
            s, d = _logistic(saved)
    elif ACT == "hardtanh":
        d = tl.where((saved <= P0) | (saved >= P1), 0.0, 1.0)
    elif ACT == "silu":
        tl.static_assert(OF == "x", "the output of silu does not determine its derivative")
        s, ds = _logistic(saved)
        d = s + saved * ds
    elif ACT == "mish":
        tl.static_assert(OF == "x", "the output of mish does not determine its derivative")
        s, ds = _logistic(saved)
        t, rest = _tanh_softplus(saved)
        d = t + saved * s * rest
    elif ACT == "gelu":
        tl.static_assert(OF == "x", "the output of gelu does not determine its derivative")
        density = tl.exp(-0.5 * saved * saved) * 0.3989422804014327
        d = 0.5 * (1.0 + tl.erf(saved * 0.7071067811865476)) + saved * density
    elif ACT == "gelu_tanh":
        tl.static_assert(OF == "x", "the output of gelu does not determine its derivative")
        square = saved * saved
        s, ds = _logistic(1.5957691216057308 * saved * (1.0 + 0.044715 * square))  # (1 + tanh(u)) / 2
        d = s + saved * ds * 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        tl.static_assert(ACT == "identity", "activation without a device function")
        d = saved * 0.0 + 1.0
    return d
