"""Twin of kernels/hadamard.py."""


def hadamard(x, at, d):
    """See kernels/hadamard.py."""
    row, step = x[at : at + d], 1
    while d % (2 * step) == 0:
        pairs = row.reshape(-1, 2, step)
        a, b = pairs[:, 0].copy(), pairs[:, 1].copy()
        pairs[:, 0], pairs[:, 1] = a + b, a - b
        step *= 2
