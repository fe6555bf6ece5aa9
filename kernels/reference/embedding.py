"""Twin of kernels/embedding.py."""

from edgert.kernels import packing

_QUANTS = tuple(packing.RECORD_BYTES)


def embed(quant, w, w_at, groups, token, y, y_at):
    """See kernels/embedding.py."""
    name = _QUANTS[quant]
    size = packing.RECORD_BYTES[name] * groups
    start = w_at + token // 16 * size
    y[y_at : y_at + groups * 32] = packing.unpack(name, w[start : start + size], 16, groups * 32)[token % 16]
