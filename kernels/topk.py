"""The k largest of n values, largest first, the lower index first among equals."""

import numpy as np

from edgert.kernels.jit import kernel
from edgert.kernels.reference import topk as _twin


@kernel(_twin.topk)
def topk(x, x_at, n, k, index):
    """Write the places (0..n-1) of the k largest of x[x_at : x_at + n] into index[0:k].

    Insertion into a sorted list: one comparison for nearly every value, which is what wins for the
    k of a router or of a list of alternatives (below about 100).
    """
    held = 0
    for i in range(n):
        value = x[x_at + i]
        if held == k and not value > x[x_at + index[k - 1]]:
            continue
        if held < k:
            held += 1
        j = held - 1
        while j > 0 and value > x[x_at + index[j - 1]]:
            index[j] = index[j - 1]
            j -= 1
        index[j] = np.int64(i)
