"""Device functions between loaded operands and the accumulator: the product, in the precision that was asked for."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_tf32(v):
    """float32 to TF32's mantissa, to nearest and ties away: the tensor core would truncate."""
    # In floats, because a test for NaN costs predicates, which the compiler packs into bit masks: sign and exponent are
    # a power of two, of which 2^-11 is half of TF32's last place. NaN and infinity stay; a denormal is cut.
    power = (v.to(tl.int32, bitcast=True) & -8388608).to(tl.float32, bitcast=True)
    rounded = v + power * 0.00048828125
    return (rounded.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def split_tf32(v):
    """Half of a float32 as a sum of two: the nearest of TF32, and the rest, of which TF32 loses the last bit at most.

    Half, because the largest floats would round to infinity. Below 2^-114 the rest is a denormal and loses more.
    """
    half = tl.fma(v, 0.5, 0.0)  # v * 0.5 would be fused into the difference, at the price of a negation
    high = round_tf32(half)
    return high, half - high


@triton.jit
def multiply_add(a, b, acc, TF32: tl.constexpr):
    """acc + a @ b in float32. TF32 says how many of its products stand for one of float32's.

    0: none (or operands of 16 bits). 1: one, of rounded operands. 3: high * high + high * low + low * high of operands
    in two parts (`split_tf32`), as exact as float32's own; acc is a quarter of the sum then (`unscaled`).
    """
    if TF32 == 3:
        # Tensor cores cut their sums, which shows beside float32's where more than 32 k are added in one. So the sum of
        # a block is added to acc outside of them.
        tl.static_assert(a.shape[1] <= 32)
        a_high, a_low = split_tf32(a)
        b_high, b_low = split_tf32(b)
        low = tl.dot(a_low, b_high, input_precision="tf32")
        low = tl.dot(a_high, b_low, low, input_precision="tf32")
        # Infinity less itself is NaN, and low products overflow with any sign. Whatever finite number stands here then,
        # the high ones are infinite or NaN, and as float32's. (A minimum takes the number beside a NaN; a test would
        # cost predicates.)
        low = tl.minimum(tl.maximum(low, -3.4028234663852886e38), 3.4028234663852886e38)
        return acc + tl.dot(a_high, b_high, low, input_precision="tf32")
    elif TF32 == 1:
        return tl.dot(round_tf32(a), round_tf32(b), acc, input_precision="tf32")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def unscaled(acc, TF32: tl.constexpr):
    """The sum, where `multiply_add` is done."""
    if TF32 == 3:
        return acc * 4.0
    else:
        return acc
