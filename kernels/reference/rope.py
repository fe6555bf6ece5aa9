"""Twins of kernels/rope.py, and the constants of its sine and cosine."""

import math

import numpy as np

TWO_OVER_PI = 2 / math.pi
PIO2_HIGH = float.fromhex("0x1.921fb544p+0")
"""The first 33 bits of pi/2, so that turns * PIO2_HIGH is exact below 2**20 turns."""
PIO2_LOW = float.fromhex("0x1.0b4611a626331p-34")
"""The rest of pi/2."""
SINE = tuple((-1) ** (n // 2) / math.factorial(n) for n in range(3, 15, 2))
COSINE = tuple((-1) ** (n // 2) / math.factorial(n) for n in range(2, 16, 2))
"""Taylor coefficients: at pi/4 the first left out is below 2**-40, beyond float32."""


def rope_table(position, w, frequency_at, half, magnitude, y, y_at):
    """See kernels/rope.py."""
    frequencies = w[frequency_at : frequency_at + half * 4].view(np.float32)
    angle = (np.float32(position) * frequencies).astype(np.float64)
    turns = np.floor(angle * TWO_OVER_PI + 0.5)
    r = (angle - turns * PIO2_HIGH) - turns * PIO2_LOW
    z = r * r
    s, c = np.zeros_like(r), np.zeros_like(r)
    for coefficient in reversed(SINE):
        s = (s + coefficient) * z
    for coefficient in reversed(COSINE):
        c = (c + coefficient) * z
    s, c = s * r + r, c + 1.0
    quadrant = turns.astype(np.int64) & 3
    sine = np.choose(quadrant, (s, c, -s, -c))
    cosine = np.choose(quadrant, (c, -s, -c, s))
    y[y_at : y_at + half] = cosine.astype(np.float32) * np.float32(magnitude)
    y[y_at + half : y_at + 2 * half] = sine.astype(np.float32) * np.float32(magnitude)


def rotate(x, x_at, half, table, table_at):
    """See kernels/rope.py."""
    c, s = table[table_at : table_at + half], table[table_at + half : table_at + 2 * half]
    low = x[x_at : x_at + half].copy()
    high = x[x_at + half : x_at + 2 * half].copy()
    x[x_at : x_at + half] = low * c - high * s
    x[x_at + half : x_at + 2 * half] = high * c + low * s
