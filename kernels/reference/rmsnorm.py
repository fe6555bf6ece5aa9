"""Twin of kernels/rmsnorm.py."""

import numpy as np

from edgert.kernels.reference.arithmetic import fma, sum_lanes


def rmsnorm(x, x_at, width, eps, w, gain_at, y, y_at):
    """See kernels/rmsnorm.py."""
    vectors = -(-width // 16)
    row = x[x_at : x_at + vectors * 16].reshape(vectors, 16)
    gain = w[gain_at : gain_at + vectors * 64].view(np.float32).reshape(vectors, 16)
    whole = vectors // 4 * 4
    chains = np.zeros((4, 16), np.float32)
    for i in range(0, whole, 4):
        chains = fma(row[i : i + 4], row[i : i + 4], chains)
    for i in range(whole, vectors):
        chains[0] = fma(row[i], row[i], chains[0])
    squares = sum_lanes((chains[0] + chains[1]) + (chains[2] + chains[3]))
    mean = squares / np.float32(width)
    scale = np.float32(1) / np.sqrt(mean + np.float32(eps))
    y[y_at : y_at + vectors * 16] = (gain * (row * scale)).reshape(-1)
