"""Rotary position embedding (Su et al., RoFormer, 2021), with halves paired: i with i + d/2.

angle[i] = position * frequency[i]
x[i]       <- x[i] * cos - x[i + d/2] * sin
x[i + d/2] <- x[i + d/2] * cos + x[i] * sin
"""

import math

import numpy as np

from edgert.kernels.elementwise import read_f32
from edgert.kernels.jit import jit, kernel
from edgert.kernels.reference import rope as _twin
from edgert.kernels.reference.rope import COSINE, PIO2_HIGH, PIO2_LOW, SINE, TWO_OVER_PI

_S3, _S5, _S7, _S9, _S11, _S13 = SINE
_C2, _C4, _C6, _C8, _C10, _C12, _C14 = COSINE


@jit
def _sine_cosine(angle):
    """(sin, cos) of a float64 by Taylor polynomials after reduction to +-pi/4, without fused operations."""
    turns = math.floor(angle * TWO_OVER_PI + 0.5)
    r = (angle - turns * PIO2_HIGH) - turns * PIO2_LOW
    z = r * r
    s = ((((((_S13 * z) + _S11) * z + _S9) * z + _S7) * z + _S5) * z + _S3) * z
    s = s * r + r
    c = ((((((_C14 * z + _C12) * z + _C10) * z + _C8) * z + _C6) * z + _C4) * z + _C2) * z + 1.0
    quadrant = np.int64(turns) & 3
    if quadrant == 0:
        return s, c
    if quadrant == 1:
        return c, -s
    if quadrant == 2:
        return -s, -c
    return -c, s


@kernel(_twin.rope_table, inline=True)
def rope_table(position, w, frequency_at, half, magnitude, y, y_at):
    """cos into y[y_at : +half], sin into y[y_at + half : +half], times `magnitude`.

    Frequencies are float32 at byte frequency_at of w. The angle is rounded to float32, as in the
    programs the models were trained with; its sine and cosine are then exact to float32.
    """
    for i in range(half):
        angle = np.float32(position) * read_f32(w, frequency_at + i * 4)
        s, c = _sine_cosine(np.float64(angle))
        y[y_at + i] = np.float32(c) * np.float32(magnitude)
        y[y_at + half + i] = np.float32(s) * np.float32(magnitude)


@kernel(_twin.rotate, inline=True)
def rotate(x, x_at, half, table, table_at):
    """Rotate one head x[x_at : x_at + 2 * half] in place by a row of `rope_table`."""
    for i in range(half):
        c, s = table[table_at + i], table[table_at + half + i]
        low, high = x[x_at + i], x[x_at + half + i]
        x[x_at + i] = low * c - high * s
        x[x_at + half + i] = high * c + low * s
