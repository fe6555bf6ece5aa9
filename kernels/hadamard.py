"""x <- H x in blocks: the rotation that makes 4 bits enough for a key or a value.

H is the Walsh-Hadamard matrix of +1 and -1 (Sylvester's order), without a factor: H H = block * I. A
product of two vectors is `block` times larger after both are multiplied with H, and otherwise the same; but
a single large coordinate has become the same magnitude in every one (Ashkboos et al., "QuaRot", 2024).
"""

import numpy as np

from edgert.kernels.jit import jit, kernel
from edgert.kernels.reference import hadamard as _twin


@jit
def block_of(d):
    """Length of a block: the largest power of two that divides d."""
    return d & -d


@kernel(_twin.hadamard)
def hadamard(x, at, d):
    """Multiply each block of x[at : at + d] with H, by butterflies of pairs 1, 2, 4, ... apart."""
    step = 1
    while d % (2 * step) == 0:
        for start in range(at, at + d, 2 * step):
            for i in range(start, start + step):
                a, b = x[i], x[i + step]
                x[i] = np.float32(a + b)
                x[i + step] = np.float32(a - b)
        step *= 2
