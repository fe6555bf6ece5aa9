"""y[t, n] += sum over k of W[n, k] * x[t, k], for blocks of 16 rows of a stored matrix."""

from edgert.kernels import tiles
from edgert.kernels.jit import kernel
from edgert.kernels.reference import matmul as _twin

F32, F16, Q8, Q4 = 0, 1, 2, 3
"""Stored precisions as numbers, in the order of `config.QUANTS`."""

_q4_1, _q4_2, _q4_4, _q4_8 = (tiles.quantized_tile("q4", rows) for rows in (1, 2, 4, 8))
_q8_1, _q8_2, _q8_4, _q8_8 = (tiles.quantized_tile("q8", rows) for rows in (1, 2, 4, 8))
_f16_1, _f16_4 = (tiles.float_tile("f16", rows) for rows in (1, 4))
_f32_1, _f32_4 = (tiles.float_tile("f32", rows) for rows in (1, 4))


@kernel(_twin.matmul_q4)
def matmul_q4(w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride):
    """Blocks first..last-1 of a q4 matrix at byte w_at, against `rows` quantised rows.

    Row t of x is groups x_at + t * groups + 0..groups-1: 32 int8 each in xq, a scale in xs, a sum in
    xn. y[y_at + t * y_stride + n] is added to. Equation: per group an exact integer dot product i,
    then y = fma(i, w_scale * x_scale, y') from y' = 0, groups in order; last the addition to y.
    """
    t = 0
    while t < rows:
        x, row = x_at + t * groups, y_at + t * y_stride
        left = rows - t
        # Blocks inside: the rows of a tile stay in the first cache while a unit's weights pass.
        for block in range(first, last):
            at, out = w_at + block * groups * 288, row + block * 16
            if left >= 8:
                _q4_8(w, at, groups, xq, xs, xn, x, y, out, y_stride)
            elif left >= 4:
                _q4_4(w, at, groups, xq, xs, xn, x, y, out, y_stride)
            elif left >= 2:
                _q4_2(w, at, groups, xq, xs, xn, x, y, out, y_stride)
            else:
                _q4_1(w, at, groups, xq, xs, xn, x, y, out, y_stride)
        t += 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1


@kernel(_twin.matmul_q8)
def matmul_q8(w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride):
    """As `matmul_q4`, over a q8 matrix."""
    t = 0
    while t < rows:
        x, row = x_at + t * groups, y_at + t * y_stride
        left = rows - t
        # Blocks inside: the rows of a tile stay in the first cache while a unit's weights pass.
        for block in range(first, last):
            at, out = w_at + block * groups * 544, row + block * 16
            if left >= 8:
                _q8_8(w, at, groups, xq, xs, xn, x, y, out, y_stride)
            elif left >= 4:
                _q8_4(w, at, groups, xq, xs, xn, x, y, out, y_stride)
            elif left >= 2:
                _q8_2(w, at, groups, xq, xs, xn, x, y, out, y_stride)
            else:
                _q8_1(w, at, groups, xq, xs, xn, x, y, out, y_stride)
        t += 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1


@kernel(_twin.matmul_f16)
def matmul_f16(w, w_at, groups, first, last, rows, x, x_at, x_stride, y, y_at, y_stride):
    """Blocks first..last-1 of an f16 matrix at byte w_at, against float rows.

    Row t of x starts at x_at + t * x_stride and holds 32 * groups values. Equation: four chains of
    fma over k mod 4, added as (0+1)+(2+3); last the addition to y.
    """
    for block in range(first, last):
        at = w_at + block * groups * 1024
        t = 0
        while t + 4 <= rows:
            _f16_4(
                w, at, groups, x, x_at + t * x_stride, x_stride, y, y_at + t * y_stride + block * 16, y_stride
            )
            t += 4
        while t < rows:
            _f16_1(
                w, at, groups, x, x_at + t * x_stride, x_stride, y, y_at + t * y_stride + block * 16, y_stride
            )
            t += 1


@kernel(_twin.matmul_f32)
def matmul_f32(w, w_at, groups, first, last, rows, x, x_at, x_stride, y, y_at, y_stride):
    """As `matmul_f16`, over an f32 matrix."""
    for block in range(first, last):
        at = w_at + block * groups * 2048
        t = 0
        while t + 4 <= rows:
            _f32_4(
                w, at, groups, x, x_at + t * x_stride, x_stride, y, y_at + t * y_stride + block * 16, y_stride
            )
            t += 4
        while t < rows:
            _f32_1(
                w, at, groups, x, x_at + t * x_stride, x_stride, y, y_at + t * y_stride + block * 16, y_stride
            )
            t += 1
