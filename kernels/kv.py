"""Keys and values in the cache, and attention's layout of them.

One region per (layer, key/value head), C positions long (a multiple of 16), keys of d values and values of
dv (the same but where keys and values share a latent, model/latent.py):

    keys    [C/16, d, 16]    the 16 positions of a block side by side: one lane is one key
    values  [ceil(dv/16), C, 16]   16 dimensions side by side: one lane is one output
    f16: 2 bytes each. q8: int8, and after them float32 scales, keys' [C] then values' [C].

    q4, in groups of 32 dimensions, G = ceil(d/32), the last padded with zeros, and Gv of dv:
    keys    [C/16, G, 288]   the q4 records of packing.py, a key being a row: products with them are integer
    values  [Gv, C, 18]      a float16 scale, then 16 bytes: dimension i in the low nibble, i + 16 in the high

With these no product ever adds across lanes, and all are read as streams. Four bits hold a key or a value
rotated by `hadamard`, which spreads an outlier over all dimensions (docs/kv.md).
"""

import numpy as np

from edgert.kernels.elementwise import read_f16, write_f16, write_f32
from edgert.kernels.hadamard import block_of, hadamard
from edgert.kernels.jit import jit, kernel
from edgert.kernels.reference import kv as _twin

F16, Q8, Q4 = 0, 1, 2
"""Cache precisions as numbers, in the order of `config.KV_TYPES`."""

KEY_RECORD, VALUE_RECORD = 288, 18
"""Bytes of the q4 records of 16 keys, and of one value, of one group."""


def region_bytes(kind: int, capacity: int, d: int, dv: int) -> int:
    """Bytes of one region of `capacity` positions."""
    if kind == Q4:
        return capacity * (-(-d // 32) * (KEY_RECORD // 16) + -(-dv // 32) * VALUE_RECORD)
    values = capacity * (d + -(-dv // 16) * 16)
    return values * 2 if kind == F16 else values + capacity * 8


@kernel(_twin.store_f16, inline=True)
def store_f16(kv, region, capacity, slot, d, dv, x, key_at, value_at):
    """Put a key x[key_at : +d] and a value x[value_at : +dv] into position `slot` of a region."""
    values = region + capacity * d * 2
    for i in range(d):
        write_f16(kv, region + ((slot // 16 * d + i) * 16 + slot % 16) * 2, x[key_at + i])
    for i in range(dv):
        write_f16(kv, values + ((i // 16 * capacity + slot) * 16 + i % 16) * 2, x[value_at + i])


@kernel(_twin.store_q8, inline=True)
def store_q8(kv, region, capacity, slot, d, dv, x, key_at, value_at):
    """As `store_f16`, as int8 with one scale for the key and one for the value (max|x| / 127)."""
    values = region + capacity * d
    scales = values + (dv + 15) // 16 * 16 * capacity
    for part in range(2):
        source, size = (key_at, d) if part == 0 else (value_at, dv)
        largest = np.float32(0.0)
        for i in range(size):
            largest = max(largest, abs(x[source + i]))
        inverse = np.float32(0.0)
        if largest > np.float32(1e-30):
            inverse = np.float32(127.0) / largest
        magic = np.float32(12582912.0)  # see simd.nearest
        for i in range(size):
            whole = np.int32((x[source + i] * inverse + magic) - magic)
            if part == 0:
                kv[region + (slot // 16 * d + i) * 16 + slot % 16] = np.uint8(whole & 255)
            else:
                kv[values + (i // 16 * capacity + slot) * 16 + i % 16] = np.uint8(whole & 255)
        write_f32(kv, scales + (part * capacity + slot) * 4, largest / np.float32(127.0))


@jit
def _scale_q4(x, at, count):
    """The scale of up to 32 values: what makes the largest in magnitude -8, the longer end of -8..7."""
    largest = np.float32(0.0)
    for i in range(at, at + count):
        if abs(x[i]) > abs(largest):
            largest = x[i]
    return largest * np.float32(-0.125)


@jit
def _nibble(x, at, i, count, inverse):
    """Value i of a group as 0..15; those past `count` are zeros."""
    if i >= count:
        return 8
    magic = np.float32(12582912.0)  # see simd.nearest
    return min(15, max(0, np.int32((x[at + i] * inverse + magic) - magic) + 8))


@jit
def _store_group(kv, scale_at, first, run, step, x, at, count):
    """Quantise x[at : at + count]: scale to scale_at; the byte of values i and i + run at `first`, runs
    of `run` bytes every `step` bytes (a key's nibbles pair i with i + 4, a value's i with i + 16)."""
    write_f16(kv, scale_at, _scale_q4(x, at, count))
    scale = read_f16(kv, scale_at)  # as it is stored: what the values will be multiplied with
    inverse = np.float32(0.0)
    if scale != np.float32(0.0):
        inverse = np.float32(1.0) / scale
    for j in range(16 // run):
        for i in range(run):
            low = _nibble(x, at, j * 2 * run + i, count, inverse)
            high = _nibble(x, at, j * 2 * run + run + i, count, inverse)
            kv[first + j * step + i] = np.uint8(low | high << 4)


@kernel(_twin.store_q4, inline=True)
def store_q4(kv, region, capacity, slot, d, dv, x, key_at, value_at):
    """As `store_f16`, rotated and in 4 bits with a float16 scale per group of 32.

    The key and the value in x are left as they were stored: H x / block (see `hadamard`).
    """
    groups, lane = (d + 31) // 32, slot % 16
    values = region + capacity * groups * (KEY_RECORD // 16)
    for at, size in ((key_at, d), (value_at, dv)):
        hadamard(x, at, size)
        inverse = np.float32(1.0) / np.float32(block_of(size))
        for i in range(at, at + size):
            x[i] *= inverse
    for g in range(groups):
        record = region + (slot // 16 * groups + g) * KEY_RECORD
        at, count = key_at + g * 32, min(32, d - g * 32)
        _store_group(kv, record + 256 + lane * 2, record + lane * 4, 4, 64, x, at, count)
    for g in range((dv + 31) // 32):
        record = values + (g * capacity + slot) * VALUE_RECORD
        _store_group(kv, record, record + 2, 16, 0, x, value_at + g * 32, min(32, dv - g * 32))


@jit
def _copy(kv, source, target, count):
    for b in range(count):
        kv[target + b] = kv[source + b]


@kernel(_twin.move)
def move(kind, kv, region, capacity, d, dv, source, target):
    """Copy one position of a region over another: an accepted branch becomes the sequence."""
    if kind == Q4:
        groups = (d + 31) // 32
        for g in range(groups):
            a = region + (source // 16 * groups + g) * KEY_RECORD
            b = region + (target // 16 * groups + g) * KEY_RECORD
            for j in range(4):
                _copy(kv, a + j * 64 + source % 16 * 4, b + j * 64 + target % 16 * 4, 4)
            _copy(kv, a + 256 + source % 16 * 2, b + 256 + target % 16 * 2, 2)
        for g in range((dv + 31) // 32):
            here = region + capacity * groups * (KEY_RECORD // 16) + g * capacity * VALUE_RECORD
            _copy(kv, here + source * VALUE_RECORD, here + target * VALUE_RECORD, VALUE_RECORD)
        return
    size = 2 if kind == F16 else 1
    values = region + capacity * d * size
    wide = (dv + 15) // 16 * 16
    for i in range(d):
        a = region + ((source // 16 * d + i) * 16 + source % 16) * size
        _copy(kv, a, region + ((target // 16 * d + i) * 16 + target % 16) * size, size)
    for b in range(wide // 16):
        a = values + (b * capacity + source) * 16 * size
        _copy(kv, a, values + (b * capacity + target) * 16 * size, 16 * size)
    if kind == Q8:
        scales = values + wide * capacity
        for part in range(2):
            here = scales + part * capacity * 4
            _copy(kv, here + source * 4, here + target * 4, 4)
