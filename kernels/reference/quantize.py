"""Twin of kernels/quantize.py."""

import numpy as np

from edgert.kernels.reference.arithmetic import nearest


def trim(x, x_at, count, least):
    """See kernels/quantize.py."""
    part = x[x_at : x_at + count]
    part[:] = np.where(np.abs(part) >= np.float32(least), part, np.float32(0))


def quantize(x, x_at, groups, xq, xs, xn, at):
    """See kernels/quantize.py."""
    values = x[x_at : x_at + groups * 32].reshape(groups, 32)
    largest = np.abs(values).max(axis=1)
    usable = largest > np.float32(1e-30)
    inverse = np.where(usable, np.float32(127) / np.where(usable, largest, np.float32(1)), np.float32(0))
    whole = nearest(values * inverse[:, None])
    xq[at * 32 : (at + groups) * 32] = whole.astype(np.int8).reshape(-1)
    xs[at : at + groups] = largest / np.float32(127)
    xn[at : at + groups] = whole.sum(axis=1).astype(np.int32)
