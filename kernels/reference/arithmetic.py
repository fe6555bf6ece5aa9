"""The scalar rules of the kernels in NumPy: exact fused multiply-add, exp, rounding, lane sums.

These make the twins bit-equal to compiled code rather than close to it.
"""

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def fma(a: NDArray[np.generic], b: NDArray[np.generic], c: NDArray[np.generic]) -> F32:
    """a * b + c for float32 arrays, rounded once.

    The product is exact in float64. The sum is rounded to odd there: where it is inexact (its error
    found by Knuth's TwoSum) the last bit is set, and the second rounding, to 24 bits, is then that
    of the exact value (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    product = np.multiply(a, b, dtype=np.float64)
    addend = np.asarray(c, np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    bits = np.atleast_1d(total).view(np.int64)
    error = np.atleast_1d(error)
    even = (bits & 1) == 0
    # An even, inexact sum moves one place towards the exact value, which makes it odd.
    away = (error > 0) == (np.atleast_1d(total) > 0)
    step = np.where(away, 1, -1)
    odd = np.where((error != 0) & even, bits + step, bits)
    return odd.view(np.float64).reshape(total.shape).astype(np.float32)


_LOG2E = np.float32(1.44269504088896341)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
EXP_COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
"""Polynomial of exp on |r| <= ln(2)/2 (Cephes expf, S. Moshier): relative error 2e-7."""
EXP_MIN, EXP_MAX = -87.0, 88.0
"""Arguments are clamped here, where the result is still a normal float32."""


def nearest(x: F32) -> F32:
    """The nearest whole number, ties to even, for |x| < 2**22."""
    magic = np.float32(12582912.0)
    return np.asarray((x + magic) - magic, np.float32)


def exp(x: F32) -> F32:
    """e**x, clamped to normal results."""
    x = np.minimum(np.maximum(x, np.float32(EXP_MIN)), np.float32(EXP_MAX)).astype(np.float32)
    n = nearest(x * _LOG2E)
    r = fma(-n, _LN2_LOW, fma(-n, _LN2_HIGH, x))
    p = np.full_like(r, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        p = fma(p, r, np.float32(coefficient))
    p = fma(p, r * r, r) + np.float32(1)
    return np.asarray(p * np.ldexp(np.float32(1), n.astype(np.int32)), np.float32)


def sum_lanes(x: F32) -> F32:
    """The sum over the last axis of 16 lanes, halves added until one is left."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]
