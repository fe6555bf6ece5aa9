"""Where a number of the cache of keys and values lies, and what it is: written by hand."""

import struct

import numpy as np
import pytest
from hypothesis import strategies as st

from tests import kernel_inputs as inputs

F16, Q8, Q4 = 0, 1, 2
KINDS = pytest.mark.parametrize("kind", [F16, Q8, Q4], ids=["f16", "q8", "q4"])


def key_byte(kind: int, region: int, d: int, slot: int, i: int) -> int:
    return region + ((slot // 16 * d + i) * 16 + slot % 16) * (2 if kind == F16 else 1)


def value_byte(kind: int, region: int, capacity: int, d: int, slot: int, i: int) -> int:
    size = 2 if kind == F16 else 1
    return region + capacity * d * size + ((i // 16 * capacity + slot) * 16 + i % 16) * size


def scale_byte(region: int, capacity: int, d: int, dv: int, slot: int, part: int) -> int:
    wide = -(-dv // 16) * 16
    return region + capacity * (d + wide) + (part * capacity + slot) * 4


def key_nibble(region: int, d: int, slot: int, i: int) -> tuple[int, int]:
    """The byte of a q4 key's dimension i, and the shift of its nibble."""
    record = region + (slot // 16 * -(-d // 32) + i // 32) * 288
    return record + i % 32 // 8 * 64 + slot % 16 * 4 + i % 4, i % 8 // 4 * 4


def value_nibble(region: int, capacity: int, d: int, slot: int, i: int) -> tuple[int, int]:
    """The byte of a q4 value's dimension i, and the shift of its nibble."""
    groups = -(-d // 32)
    record = region + capacity * groups * 18 + (i // 32 * capacity + slot) * 18
    return record + 2 + i % 16, i % 32 // 16 * 4


def scales_q4(region: int, capacity: int, d: int, slot: int, group: int) -> tuple[int, int]:
    """The bytes of the float16 scales of a q4 key's and value's group."""
    groups = -(-d // 32)
    key = region + (slot // 16 * groups + group) * 288 + 256 + slot % 16 * 2
    return key, region + capacity * groups * 18 + (group * capacity + slot) * 18


def read_q4(
    part: int, cache: inputs.U8, region: int, capacity: int, d: int, dv: int, slot: int
) -> inputs.F64:
    """The key (part 0) or value (part 1) in a slot, as it is stored: rotated."""
    row = []
    for i in range((d, dv)[part]):
        places = key_nibble(region, d, slot, i), value_nibble(region, capacity, d, slot, i)
        byte, shift = places[part]
        scale = struct.unpack_from("<e", cache, scales_q4(region, capacity, d, slot, i // 32)[part])[0]
        row.append(scale * ((int(cache[byte]) >> shift & 15) - 8))
    return np.array(row)


def rotation(d: int) -> inputs.F64:
    """H [d, d]: Sylvester's matrix of the largest power of two in d, along the diagonal."""
    h = np.ones((1, 1))
    while d % (2 * len(h)) == 0:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(d // len(h)), h)


def read_key(
    kind: int, cache: inputs.U8, region: int, capacity: int, d: int, dv: int, slot: int
) -> inputs.F64:
    if kind == Q4:
        return read_q4(0, cache, region, capacity, d, dv, slot)
    if kind == F16:
        return np.array(
            [struct.unpack_from("<e", cache, key_byte(kind, region, d, slot, i))[0] for i in range(d)]
        )
    scale = struct.unpack_from("<f", cache, scale_byte(region, capacity, d, dv, slot, 0))[0]
    return scale * np.array(
        [struct.unpack_from("<b", cache, key_byte(kind, region, d, slot, i))[0] for i in range(d)]
    )


def read_value(
    kind: int, cache: inputs.U8, region: int, capacity: int, d: int, dv: int, slot: int
) -> inputs.F64:
    if kind == Q4:
        return read_q4(1, cache, region, capacity, d, dv, slot)
    places = [value_byte(kind, region, capacity, d, slot, i) for i in range(dv)]
    if kind == F16:
        return np.array([struct.unpack_from("<e", cache, place)[0] for place in places])
    scale = struct.unpack_from("<f", cache, scale_byte(region, capacity, d, dv, slot, 1))[0]
    return scale * np.array([struct.unpack_from("<b", cache, place)[0] for place in places])


def region_size(kind: int, capacity: int, d: int, dv: int) -> int:
    if kind == Q4:
        return capacity * (-(-d // 32) + -(-dv // 32)) * 18
    numbers = capacity * (d + -(-dv // 16) * 16)
    return numbers * 2 if kind == F16 else numbers + capacity * 8


def width(kind: int, d: int) -> int:
    """Length of a padded output."""
    unit = 32 if kind == Q4 else 16
    return -(-d // unit) * unit


halves = st.integers(1, 40).map(lambda half: 2 * half)
sizes = st.tuples(st.integers(1, 4), halves, halves)
"""Blocks of positions, dimensions of a key and of a value."""
