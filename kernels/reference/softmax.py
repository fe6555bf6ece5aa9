"""Twin of kernels/softmax.py."""

import numpy as np

from edgert.kernels.reference.arithmetic import exp, sum_lanes

LOWEST = np.float32(-3.0e38)
"""Stands for minus infinity: below every score, and finite, so that differences are too."""


def softmax(s, s_at, first, last, sink):
    """See kernels/softmax.py."""
    begin, end = first // 16 * 16, (last + 15) // 16 * 16
    row = s[s_at + begin : s_at + end]
    index = np.arange(begin, end)
    live = (index >= first) & (index < last)
    largest = max(row[live].max(), sink)
    row[:] = np.where(live, exp(row - largest), np.float32(0))
    total = np.zeros(16, np.float32)
    for block in row.reshape(-1, 16):
        total = total + block
    return sum_lanes(total) + exp(np.full(1, sink - largest, np.float32))[0]
