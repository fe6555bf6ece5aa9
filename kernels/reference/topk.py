"""Twin of kernels/topk.py."""

import numpy as np


def topk(x, x_at, n, k, index):
    """See kernels/topk.py."""
    index[:k] = np.argsort(-x[x_at : x_at + n], kind="stable")[:k]
