"""Device functions of the activation table in `cnnfast.spec`: same names, same parameters, computed in float32."""

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
