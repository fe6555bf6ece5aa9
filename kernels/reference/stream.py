"""Twin of kernels/stream.py."""

import numpy as np


def read(data, start, count):
    """See kernels/stream.py."""
    whole = count // 512 * 512
    return np.bitwise_xor.reduce(data[start : start + whole].view(np.int32), initial=np.int32(0))
