"""y[k] = W[token, k]: one row of a stored matrix as floats."""

import numpy as np

from edgert.kernels.elementwise import read_byte_scale, read_f16, read_f32
from edgert.kernels.jit import kernel
from edgert.kernels.matmul import F16, F32, Q3, Q4M, Q4S, Q8, record_bytes
from edgert.kernels.reference import embedding as _twin


@kernel(_twin.embed, inline=True)
def embed(quant, w, w_at, groups, token, y, y_at):
    """Row `token` of the matrix at byte w_at into y[y_at : y_at + 32 * groups]; see packing.py."""
    lane = token % 16
    first = token // 16 * groups
    # One loop over all columns: one over the 32 of a group would be unrolled for every type.
    for column in range(groups * 32):
        g, k = column // 32, column % 32
        record = w_at + (first + g) * record_bytes(quant)
        if quant == F32:
            value = read_f32(w, record + k * 64 + lane * 4)
        elif quant == F16:
            value = read_f16(w, record + k * 32 + lane * 2)
        elif quant == Q8:
            code = np.int32(w[record + (k // 4) * 64 + lane * 4 + k % 4])
            code -= (code >> 7) * 256  # a byte as signed
            value = read_f16(w, record + 512 + lane * 2) * np.float32(code)
        elif quant <= Q4S:
            code = np.int32(w[record + (k // 8) * 64 + lane * 4 + k % 4]) >> (k % 8 // 4 * 4) & 15
            if quant == Q4S:
                value = read_byte_scale(w, record + 256 + lane) * np.float32(code - 8)
            elif quant == Q4M:
                value = read_f16(w, record + 256 + lane * 2) * np.float32(code)
                value += read_f16(w, record + 288 + lane * 2)
            else:
                value = read_f16(w, record + 256 + lane * 2) * np.float32(code - 8)
        else:
            at = record + lane * 4 + k % 4
            code = np.int32(w[at + k // 16 * 64]) >> (k % 16 // 4 * 2) & 3
            if quant == Q3:
                code |= (np.int32(w[at + 128]) >> (k // 4) & 1) << 2
            scales = record + (192 if quant == Q3 else 128)
            value = read_byte_scale(w, scales + lane) * np.float32(code - (4 if quant == Q3 else 2))
        y[y_at + column] = value
