"""Columns of a row, taken out of it: what a product reads beside the rest."""

import numpy as np

from edgert.kernels.elementwise import read_f32
from edgert.kernels.jit import kernel
from edgert.kernels.reference import columns as _twin


@kernel(_twin.take_columns, inline=True)
def take_columns(x, x_at, w, columns, count, y, y_at):
    """y[j] = x[c_j], and then x[c_j] = 0, for `count` different c_j, float32s at byte `columns` of w."""
    for j in range(count):
        at = x_at + np.int64(read_f32(w, columns + j * 4))
        y[y_at + j] = x[at]
        x[at] = np.float32(0.0)
