"""y[t, n] += sum over k of W[n, k] * x[t, k], for blocks of 16 rows of a stored matrix."""

from edgert.kernels import tiles
from edgert.kernels.jit import inlined, jit, kernel
from edgert.kernels.operations import OPERATIONS, PRODUCT, call
from edgert.kernels.reference import matmul as _twin

F32, F16, Q8, Q4M, Q4, Q4S, Q3, Q2 = range(8)
"""Stored precisions as numbers, in the order of `config.QUANTS`."""

MOST = tiles.QUANTIZED_ROWS[0]
"""Rows of the largest tile: 8 amortise the unpacking of a weight to a tenth of its multiplications."""
AHEAD = 64
"""Records that a tile of 4 or more rows prefetches ahead, into the second cache: 18 KiB of q4. Measured on
Zen 4, per record of a matrix far larger than the caches: 4 rows 17.2 ns without, 13.4 with 8 records into
the first cache, 11.7 with 64 into the second (11.3 if all is in cache); 8 rows 50, 24.1 and 23.4 (23.0)."""

_q4, _q8 = tiles.quantized_product("q4"), tiles.quantized_product("q8")
_small = tiles.quantized_product(*_twin.SMALL)
_f16, _f32 = tiles.float_product("f16"), tiles.float_product("f32")


@kernel(_twin.matmul_q4, inline=True)
def matmul_q4(
    w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride, most=MOST, ahead=AHEAD
):
    """Blocks first..last-1 of a q4 matrix at byte w_at, against `rows` quantised rows.

    Row t of x is groups x_at + t * groups + 0..groups-1: 32 int8 each in xq, a scale in xs, a sum in
    xn. y[y_at + t * y_stride + n] is added to. Equation: per group an exact integer dot product i,
    then y = fma(i, w_scale * x_scale, y') from y' = 0, groups in order; last the addition to y.
    `most` rows of a tile and `ahead` records of prefetching change the speed and no bit.
    """
    _q4(0, w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride, most, ahead)


@kernel(_twin.matmul_q8, inline=True)
def matmul_q8(
    w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride, most=MOST, ahead=AHEAD
):
    """As `matmul_q4`, over a q8 matrix."""
    _q8(0, w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride, most, ahead)


@kernel(_twin.matmul_small, inline=True)
def matmul_small(
    quant, w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride, most=MOST, ahead=AHEAD
):
    """As `matmul_q4`, over a matrix of type q4m (quant 0), q4s (1), q3 (2) or q2 (3).

    Per group y = fma(minimum, x_sum * x_scale, fma(i, w_scale * x_scale, y')); the minimum is 0 but in q4m.
    One function of four types, which differ in how a record is unpacked, so that one is compiled.
    """
    _small(quant, w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride, most, ahead)


@kernel(_twin.matmul_f16, inline=True)
def matmul_f16(w, w_at, groups, first, last, rows, x, x_at, x_stride, y, y_at, y_stride):
    """Blocks first..last-1 of an f16 matrix at byte w_at, against float rows.

    Row t of x starts at x_at + t * x_stride and holds 32 * groups values. Equation: four chains of
    fma over k mod 4, added as (0+1)+(2+3); last the addition to y.
    """
    _f16(w, w_at, groups, first, last, rows, x, x_at, x_stride, y, y_at, y_stride)


@kernel(_twin.matmul_f32, inline=True)
def matmul_f32(w, w_at, groups, first, last, rows, x, x_at, x_stride, y, y_at, y_stride):
    """As `matmul_f16`, over an f32 matrix."""
    _f32(w, w_at, groups, first, last, rows, x, x_at, x_stride, y, y_at, y_stride)


@jit
def record_bytes(quant):
    """Bytes of 16 rows by 32 columns; as `packing.RECORD_BYTES`, by number."""
    if quant <= Q8:
        return 2048 if quant == F32 else 1024 if quant == F16 else 544
    if quant <= Q4S:
        return 320 if quant == Q4M else 288 if quant == Q4 else 272
    return 208 if quant == Q3 else 144


@jit
def matmul(
    quant, w, w_at, groups, first, last, rows, f, x, x_stride, xq, xs, xn, at, y, y_stride, most, ahead
):
    """y[t, n] += sum over k of W[n, k] * x[t, k] for blocks first..last-1 of a matrix of any precision.

    Rows of x are float at f[x] for f32 and f16, else quantised from group `at`; y is in f.
    """
    if quant == Q4:
        matmul_q4(w, w_at, groups, first, last, rows, xq, xs, xn, at, f, y, y_stride, most, ahead)
    elif quant == Q8:
        matmul_q8(w, w_at, groups, first, last, rows, xq, xs, xn, at, f, y, y_stride, most, ahead)
    elif quant == F16:
        matmul_f16(w, w_at, groups, first, last, rows, f, x, x_stride, f, y, y_stride)
    elif quant == F32:
        matmul_f32(w, w_at, groups, first, last, rows, f, x, x_stride, f, y, y_stride)
    else:
        kind = 0 if quant == Q4M else quant - Q4  # its place in SMALL
        matmul_small(kind, w, w_at, groups, first, last, rows, xq, xs, xn, at, f, y, y_stride, most, ahead)


OPERATIONS[PRODUCT] = matmul


@inlined
def product(run, quant, w, w_at, groups, first, last, rows, x, x_stride, at, y, y_stride, most, ahead):
    """`matmul` with the arrays of a run (operations.py), by its address."""
    call(
        run.operations[PRODUCT],
        (
            quant, w, w_at, groups, first, last, rows, run.f, x, x_stride, run.xq, run.xs, run.xn, at, y,
            y_stride, most, ahead,
        ),
    )  # fmt: skip
