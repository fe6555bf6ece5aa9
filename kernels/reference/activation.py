"""Twin of kernels/activation.py."""

import numpy as np

from edgert.kernels.reference.arithmetic import F32, exp, fma


def activate(kind: int, x: F32) -> F32:
    """act(x); kinds as in kernels/activation.py."""
    one = np.float32(1)
    if kind == 0:
        return np.asarray(x / (one + exp(np.float32(0) - x)), np.float32)
    if kind == 3:
        cube = (x * x) * x
        u = np.float32(0.7978845608) * fma(np.float32(0.044715), cube, x)
        tail = one / (exp(u + u) + one)
        return np.asarray(x * (one - tail), np.float32)
    positive = np.where(x > 0, x, np.float32(0))
    return positive * positive if kind == 2 else positive


def gate(kind, g, g_at, u, u_at, count):
    """See kernels/activation.py."""
    part = slice(g_at, g_at + count)
    g[part] = activate(kind, g[part]) * u[u_at : u_at + count]
