"""y[i] = gain[i] * (x[i] / sqrt(mean(x^2) + eps)), over one row (Zhang and Sennrich, 2019)."""

import numpy as np

from edgert.kernels import simd
from edgert.kernels.jit import kernel
from edgert.kernels.reference import rmsnorm as _twin


@kernel(_twin.rmsnorm)
def rmsnorm(x, x_at, width, eps, w, gain_at, y, y_at):
    """Normalise x[x_at : x_at + width] into y, with float32 gains at byte gain_at of w.

    All three are padded with zeros to whole vectors of 16. The squares are summed in four chains
    (vector index mod 4), added as (0+1)+(2+3), then across lanes.
    """
    a = simd.splat(0.0)
    b, c, d = a, a, a
    vectors = (width + 15) // 16
    whole = vectors // 4 * 4
    for i in range(0, whole, 4):
        v = simd.load_f32(x, x_at + i * 16)
        a = simd.fma(v, v, a)
        v = simd.load_f32(x, x_at + i * 16 + 16)
        b = simd.fma(v, v, b)
        v = simd.load_f32(x, x_at + i * 16 + 32)
        c = simd.fma(v, v, c)
        v = simd.load_f32(x, x_at + i * 16 + 48)
        d = simd.fma(v, v, d)
    for i in range(whole, vectors):
        v = simd.load_f32(x, x_at + i * 16)
        a = simd.fma(v, v, a)
    squares = simd.sum_lanes(simd.add(simd.add(a, b), simd.add(c, d)))
    mean = squares / np.float32(width)
    scale = simd.splat(np.float32(1.0) / simd.square_root(mean + np.float32(eps)))
    for i in range(vectors):
        v = simd.mul(simd.load_f32(x, x_at + i * 16), scale)
        simd.store_f32(y, y_at + i * 16, simd.mul(simd.load_f32(w, gain_at + i * 64), v))
