"""Activations to int8 in groups of 32: x[k] ~ scale[g] * q[k], scale = max|x| / 127."""

import numpy as np

from edgert.kernels import simd
from edgert.kernels.jit import kernel
from edgert.kernels.reference import quantize as _twin


@kernel(_twin.trim, inline=True)
def trim(x, x_at, count, least):
    """x[x_at : x_at + count] <- 0 where it is below `least` in magnitude; count: of 16."""
    limit = simd.splat(least)
    for i in range(x_at, x_at + count, 16):
        simd.store_f32(x, i, simd.not_below(simd.load_f32(x, i), limit))


@kernel(_twin.quantize)
def quantize(x, x_at, groups, xq, xs, xn, at):
    """Quantise `groups` groups from x[x_at] into groups `at`.. of xq (int8), xs (scales), xn (sums).

    The sums of the int8 values let a product with unsigned weights be corrected afterwards.
    """
    for g in range(groups):
        low = simd.load_f32(x, x_at + g * 32)
        high = simd.load_f32(x, x_at + g * 32 + 16)
        largest = simd.max_lanes(simd.maximum(simd.absolute(low), simd.absolute(high)))
        inverse = np.float32(0.0)
        # Below this 127 / largest would overflow; such a group is zero for every purpose.
        if largest > np.float32(1e-30):
            inverse = np.float32(127.0) / largest
        low = simd.nearest(simd.mul(low, simd.splat(inverse)))
        high = simd.nearest(simd.mul(high, simd.splat(inverse)))
        simd.store_i8(xq, (at + g) * 32, low)
        simd.store_i8(xq, (at + g) * 32 + 16, high)
        xs[at + g] = largest / np.float32(127.0)
        xn[at + g] = np.int32(simd.sum_lanes(simd.add(low, high)))
