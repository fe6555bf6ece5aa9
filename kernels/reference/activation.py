"""Twin of kernels/activation.py."""

import numpy as np

from edgert.kernels.reference.arithmetic import F32, exp, fma

TAIL = (
    0.2316418882663604,
    *(0.127414796, -0.142248368, 0.7107068705, -0.7265760135, 0.5307027145),
)
"""The constants p and a_1 to a_5 of Abramowitz and Stegun, 7.1.26, for the normal distribution itself:
p / sqrt(2) and a / 2."""


def normal_tail(x: F32) -> F32:
    """P(X > x) for a normal X and x >= 0."""
    scale, *constants = (np.float32(c) for c in TAIL)
    t: F32 = np.asarray(np.float32(1) / fma(scale, x, np.float32(1)), np.float32)
    p: F32 = np.full_like(x, constants[-1])
    for constant in constants[-2::-1]:
        p = fma(p, t, constant)
    return np.asarray((p * t) * exp((x * x) * np.float32(-0.5)), np.float32)


def capped(x: F32, cap: np.float32) -> F32:
    """cap tanh(x / cap)."""
    u: F32 = np.divide(x, cap, dtype=np.float32)
    rest = np.float32(2) / (exp(u + u) + np.float32(1))
    return np.asarray(cap * (np.float32(1) - rest), np.float32)


def activated(kind: int, x: F32) -> F32:
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
    if kind == 4:
        return np.asarray(positive - np.abs(x) * normal_tail(np.abs(x)), np.float32)
    return positive * positive if kind == 2 else positive


def gate(kind, g, g_at, u, u_at, count):
    """See kernels/activation.py."""
    part = slice(g_at, g_at + count)
    g[part] = activated(kind, g[part]) * u[u_at : u_at + count]


def soft_cap(x, x_at, count, cap):
    """See kernels/activation.py."""
    x[x_at : x_at + count] = capped(x[x_at : x_at + count], np.float32(cap))


def clamped_gate(g, g_at, u, u_at, count, alpha, limit):
    """See kernels/activation.py."""
    one, alpha, limit = np.float32(1), np.float32(alpha), np.float32(limit)
    x = np.minimum(g[g_at : g_at + count], limit)
    up = np.maximum(np.minimum(u[u_at : u_at + count], limit), -limit)
    g[g_at : g_at + count] = (x / (one + exp(np.float32(0) - alpha * x))) * (up + one)
