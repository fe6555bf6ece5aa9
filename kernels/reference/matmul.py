"""Twins of kernels/matmul.py."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.kernels import packing
from edgert.kernels.reference.arithmetic import F32, fma

SMALL = ("q4m", "q4s", "q3", "q2")


def _records(quant: str, w: NDArray[np.uint8], w_at: int, groups: int, first: int, last: int) -> Any:
    size = packing.RECORD_BYTES[quant]
    start = w_at + first * groups * size
    return w[start : start + (last - first) * groups * size].reshape(last - first, groups, size)


def _add(y: F32, y_at: int, y_stride: int, first: int, sums: F32) -> None:
    for t, row in enumerate(sums):
        start = y_at + t * y_stride + first * packing.BLOCK
        y[start : start + row.size] += row


def _quantized(quant, w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride):
    records = _records(quant, w, w_at, groups, first, last)
    weights = packing.unpack_values(quant, records).astype(np.int32)  # [blocks, G, 16, 32]
    scales = packing.unpack_scales(quant, records)  # [blocks, G, 16]
    minimums = packing.unpack_minimums(quant, records)  # [blocks, G, 16]
    span = slice(x_at, x_at + rows * groups)
    x = xq.reshape(-1, 32)[span].reshape(rows, groups, 32).astype(np.int32)
    x_scales = xs[span].reshape(rows, groups)
    total = np.zeros((rows, last - first, 16), np.float32)
    for g in range(groups):
        whole = np.einsum("bnk,tk->tbn", weights[:, g], x[:, g]).astype(np.float32)
        total = fma(whole, scales[None, :, g] * x_scales[:, g, None, None], total)
        if quant in SMALL:
            sums = x[:, g].sum(axis=1).astype(np.float32) * x_scales[:, g]
            total = fma(minimums[None, :, g], sums[:, None, None], total)
    _add(y, y_at, y_stride, first, total.reshape(rows, -1))


def matmul_q4(w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride, most=8, ahead=0):
    """See kernels/matmul.py."""
    _quantized("q4", w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride)


def matmul_q8(w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride, most=8, ahead=0):
    """See kernels/matmul.py."""
    _quantized("q8", w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride)


def matmul_small(
    quant, w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride, most=8, ahead=0
):
    """See kernels/matmul.py."""
    _quantized(SMALL[quant], w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride)


def _float(quant, w, w_at, groups, first, last, rows, x, x_at, x_stride, y, y_at, y_stride):
    records = _records(quant, w, w_at, groups, first, last)
    weights = packing.unpack_values(quant, records).astype(np.float32)  # [blocks, G, 16, 32]
    weights = np.ascontiguousarray(weights.transpose(0, 2, 1, 3)).reshape(-1, groups * 32)  # [N, K]
    inputs = np.stack([x[x_at + t * x_stride :][: groups * 32] for t in range(rows)])  # [T, K]
    chains = np.zeros((4, rows, weights.shape[0]), np.float32)
    for k in range(0, groups * 32, 4):
        w4, x4 = weights[:, k : k + 4].T[:, None, :], inputs[:, k : k + 4].T[:, :, None]
        chains = fma(w4, x4, chains)
    _add(y, y_at, y_stride, first, (chains[0] + chains[1]) + (chains[2] + chains[3]))


def matmul_f16(w, w_at, groups, first, last, rows, x, x_at, x_stride, y, y_at, y_stride):
    """See kernels/matmul.py."""
    _float("f16", w, w_at, groups, first, last, rows, x, x_at, x_stride, y, y_at, y_stride)


def matmul_f32(w, w_at, groups, first, last, rows, x, x_at, x_stride, y, y_at, y_stride):
    """See kernels/matmul.py."""
    _float("f32", w, w_at, groups, first, last, rows, x, x_at, x_stride, y, y_at, y_stride)
