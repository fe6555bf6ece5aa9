"""Twins of kernels/row_sums.py."""

import numpy as np

from edgert.kernels.reference.arithmetic import sum_lanes


def center(x, x_at, width, y, y_at):
    """See kernels/row_sums.py."""
    vectors = -(-width // 16)
    row = x[x_at : x_at + vectors * 16].reshape(vectors, 16)
    total = np.zeros(16, np.float32)
    for vector in row:
        total = total + vector
    centred = (row - sum_lanes(total) / np.float32(width)).reshape(-1)
    centred[width:] = 0
    y[y_at : y_at + vectors * 16] = centred


def add(x, x_at, width, y, y_at):
    """See kernels/row_sums.py."""
    count = -(-width // 16) * 16
    row = x[x_at : x_at + count * 4 // x.itemsize].view(np.float32)
    y[y_at : y_at + count] = y[y_at : y_at + count] + row
