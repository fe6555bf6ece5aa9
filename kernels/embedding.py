"""y[k] = W[token, k]: one row of a stored matrix as floats."""

import numpy as np

from edgert.kernels.elementwise import read_byte_scale, read_f16, read_f32
from edgert.kernels.jit import kernel
from edgert.kernels.matmul import F16, F32, Q3, Q4M, Q4S, Q8, record_bytes
from edgert.kernels.reference import embedding as _twin


@kernel(_twin.embed)
def embed(quant, w, w_at, groups, token, y, y_at):
    """Row `token` of the matrix at byte w_at into y[y_at : y_at + 32 * groups]; see packing.py."""
    lane = token % 16
    block = token // 16
    for g in range(groups):
        out = y_at + g * 32
        if quant == F32 or quant == F16:
            for k in range(32):
                if quant == F32:
                    y[out + k] = read_f32(w, w_at + (block * groups + g) * 2048 + k * 64 + lane * 4)
                else:
                    y[out + k] = read_f16(w, w_at + (block * groups + g) * 1024 + k * 32 + lane * 2)
        elif quant == Q8:
            record = w_at + (block * groups + g) * 544
            scale = read_f16(w, record + 512 + lane * 2)
            for k in range(32):
                value = np.int32(w[record + (k // 4) * 64 + lane * 4 + k % 4])
                y[out + k] = scale * np.float32(value - (value >> 7) * 256)  # a byte as signed
        elif quant <= Q4S:
            record = w_at + (block * groups + g) * record_bytes(quant)
            if quant == Q4S:
                scale = read_byte_scale(w, record + 256 + lane)
            else:
                scale = read_f16(w, record + 256 + lane * 2)
            offset = 0 if quant == Q4M else 8
            for k in range(32):
                value = np.int32(w[record + (k // 8) * 64 + lane * 4 + k % 4])
                y[out + k] = scale * np.float32(((value >> (k % 8 // 4 * 4)) & 15) - offset)
                if quant == Q4M:
                    y[out + k] += read_f16(w, record + 288 + lane * 2)
        else:
            record = w_at + (block * groups + g) * (208 if quant == Q3 else 144)
            scale = read_byte_scale(w, record + (192 if quant == Q3 else 128) + lane)
            offset = 4 if quant == Q3 else 2
            for k in range(32):
                at = record + lane * 4 + k % 4
                value = np.int32(w[at + k // 16 * 64]) >> (k % 16 // 4 * 2) & 3
                if quant == Q3:
                    value |= (np.int32(w[at + 128]) >> (k // 4) & 1) << 2
                y[out + k] = scale * np.float32(value - offset)
