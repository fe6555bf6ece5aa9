"""Keys and values in the cache, and attention's layout of them.

One region per (layer, key/value head), C positions long (a multiple of 16), d values each:

    keys    [C/16, d, 16]    the 16 positions of a block side by side: one lane is one key
    values  [ceil(d/16), C, 16]   16 dimensions side by side: one lane is one output
    f16: 2 bytes each. q8: int8, and after them float32 scales, keys' [C] then values' [C].

With these no product ever adds across lanes, and both are read as streams.
"""

import numpy as np

from edgert.kernels.elementwise import write_f16, write_f32
from edgert.kernels.jit import kernel
from edgert.kernels.reference import kv as _twin

F16, Q8 = 0, 1
"""Cache precisions as numbers, in the order of `config.KV_TYPES`."""


def region_bytes(kind: int, capacity: int, d: int) -> int:
    """Bytes of one region of `capacity` positions."""
    values = capacity * (d + -(-d // 16) * 16)
    return values * 2 if kind == F16 else values + capacity * 8


@kernel(_twin.store_f16)
def store_f16(kv, region, capacity, slot, d, x, key_at, value_at):
    """Put a key x[key_at : +d] and a value x[value_at : +d] into position `slot` of a region."""
    values = region + capacity * d * 2
    for i in range(d):
        write_f16(kv, region + ((slot // 16 * d + i) * 16 + slot % 16) * 2, x[key_at + i])
        write_f16(kv, values + ((i // 16 * capacity + slot) * 16 + i % 16) * 2, x[value_at + i])


@kernel(_twin.store_q8)
def store_q8(kv, region, capacity, slot, d, x, key_at, value_at):
    """As `store_f16`, as int8 with one scale for the key and one for the value (max|x| / 127)."""
    values = region + capacity * d
    scales = values + (d + 15) // 16 * 16 * capacity
    for part in range(2):
        source = key_at if part == 0 else value_at
        largest = np.float32(0.0)
        for i in range(d):
            largest = max(largest, abs(x[source + i]))
        inverse = np.float32(0.0)
        if largest > np.float32(1e-30):
            inverse = np.float32(127.0) / largest
        magic = np.float32(12582912.0)  # see simd.nearest
        for i in range(d):
            whole = np.int32((x[source + i] * inverse + magic) - magic)
            if part == 0:
                kv[region + (slot // 16 * d + i) * 16 + slot % 16] = np.uint8(whole & 255)
            else:
                kv[values + (i // 16 * capacity + slot) * 16 + i % 16] = np.uint8(whole & 255)
        write_f32(kv, scales + (part * capacity + slot) * 4, largest / np.float32(127.0))


@kernel(_twin.move)
def move(kind, kv, region, capacity, d, source, target):
    """Copy one position of a region over another: an accepted branch becomes the sequence."""
    size = 2 if kind == F16 else 1
    values = region + capacity * d * size
    wide = (d + 15) // 16 * 16
    for i in range(d):
        for b in range(size):
            kv[region + ((target // 16 * d + i) * 16 + target % 16) * size + b] = kv[
                region + ((source // 16 * d + i) * 16 + source % 16) * size + b
            ]
    for i in range(wide):
        for b in range(size):
            kv[values + ((i // 16 * capacity + target) * 16 + i % 16) * size + b] = kv[
                values + ((i // 16 * capacity + source) * 16 + i % 16) * size + b
            ]
    if kind == Q8:
        scales = values + wide * capacity
        for part in range(2):
            for b in range(4):
                kv[scales + (part * capacity + target) * 4 + b] = kv[
                    scales + (part * capacity + source) * 4 + b
                ]
