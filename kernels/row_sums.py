"""What norms other than RMSNorm add to or take from a row: its mean, a bias, the residual stream."""

import numpy as np

from edgert.kernels import simd
from edgert.kernels.jit import kernel
from edgert.kernels.reference import row_sums as _twin


@kernel(_twin.center, inline=True)
def center(x, x_at, width, y, y_at):
    """y = x - mean(x), over one row padded with zeros to whole vectors of 16, as y is then.

    RMSNorm of it is LayerNorm (Ba et al., 2016, arXiv:1607.06450): the mean of the squares of what is
    centred is the variance. The sum is one chain per lane, vectors in order, then across lanes.
    """
    vectors = (width + 15) // 16
    total = simd.splat(0.0)
    for i in range(0, vectors * 16, 16):
        total = simd.add(total, simd.load_f32(x, x_at + i))
    mean = simd.splat(simd.sum_lanes(total) / np.float32(width))
    for i in range(0, vectors * 16, 16):
        v = simd.sub(simd.load_f32(x, x_at + i), mean)
        simd.store_f32(y, y_at + i, simd.first_lanes(width - i, v, simd.splat(0.0)))


@kernel(_twin.add)
def add(x, x_at, width, y, y_at):
    """y += x, over one row padded to whole vectors of 16; x is float32s, or bytes that hold them.

    Of bytes x_at is a byte, of float32s an element.
    """
    step = 64 if x.itemsize == 1 else 16
    for i in range((width + 15) // 16):
        v = simd.add(simd.load_f32(y, y_at + i * 16), simd.load_f32(x, x_at + i * step))
        simd.store_f32(y, y_at + i * 16, v)
