"""Twin of kernels/softmax.py."""

import numpy as np

from edgert.kernels.reference.arithmetic import exp, sum_lanes


def softmax(s, s_at, first, last):
    """See kernels/softmax.py."""
    begin, end = first // 16 * 16, (last + 15) // 16 * 16
    row = s[s_at + begin : s_at + end]
    index = np.arange(begin, end)
    live = (index >= first) & (index < last)
    row[:] = np.where(live, exp(row - row[live].max()), np.float32(0))
    total = np.zeros(16, np.float32)
    for block in row.reshape(-1, 16):
        total = total + block
    return sum_lanes(total)
