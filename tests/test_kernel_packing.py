"""The rows16 byte layout: golden bytes, and round trips."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.kernels import packing
from tests import kernel_inputs as inputs

sizes = st.tuples(st.integers(1, 50), st.integers(1, 100))

# W[2, 9] in -8..7: row 0 is 7 6 5 4 3 2 1 0 -1, row 1 is -8 -7 -6 -5 -4 -3 -2 -1 0; a nibble is the
# value + 8, so a zero is 8. Register 0, rows 0 and 1: k = 0..3 low, k = 4..7 high.
GOLDEN_Q4 = (
    "bf ae 9d 8c 40 51 62 73" + " 88" * 56  # register 0: rows 0, 1, then zeros
    + " 87 88 88 88 88 88 88 88" + " 88" * 56  # register 1: k = 8 is -1 in row 0
    + " 88" * 128  # registers 2 and 3
    + " 00 3c 00 c0" + " 00" * 28  # scales 1.0 and -2.0 in float16
)  # fmt: skip

# W[2, 5] in -127..127: row 0 is 1 2 3 4 5, row 1 is -1 -2 -127 127 0. Register j: k = 4j .. 4j+3.
GOLDEN_Q8 = (
    "01 02 03 04 ff fe 81 7f" + " 00" * 56
    + " 05 00 00 00 00 00 00 00" + " 00" * 56
    + " 00" * 384
    + " 00 38 01 00" + " 00" * 28  # scales 0.5 and the smallest subnormal
)  # fmt: skip


def test_golden_q4_record() -> None:
    values = np.array([[7, 6, 5, 4, 3, 2, 1, 0, -1], [-8, -7, -6, -5, -4, -3, -2, -1, 0]], np.int8)
    packed = packing.pack("q4", values, np.array([[1.0], [-2.0]], np.float16))
    assert packed.shape == (1, 1, 288)
    assert packed.tobytes() == bytes.fromhex(GOLDEN_Q4)


def test_golden_q8_record() -> None:
    values = np.array([[1, 2, 3, 4, 5], [-1, -2, -127, 127, 0]], np.int8)
    packed = packing.pack("q8", values, np.array([[0.5], [2.0**-24]], np.float16))
    assert packed.shape == (1, 1, 544)
    assert packed.tobytes() == bytes.fromhex(GOLDEN_Q8)


def test_golden_q2_and_q3_records() -> None:
    """Row 1 alone: k = 0, 4, 8, 12 share a byte, k = 1 is beside it, k = 16 in the next register."""
    values = np.zeros((2, 32), np.int8)
    values[1, [0, 4, 8, 12, 1, 16]] = [1, -2, -1, 0, -1, 1]
    scales = np.array([[7.5], [-(2.0**-15)]], np.float16)
    packed = packing.pack("q2", values, scales)
    low = bytearray([0b10101010] * 128)  # zeros are 2
    low[4], low[5], low[64 + 4] = 0b10_01_00_11, 0b10101001, 0b10101011
    assert packed.tobytes() == bytes(low) + bytes([0x7F, 0x81]) + bytes(14)
    values[1, [0, 31]] = [3, -4]
    packed = packing.pack("q3", values, scales)
    low = bytearray(128)  # zeros are 4
    low[4], low[5], low[64 + 4] = 0b00_11_10_11, 0b00000011, 0b00000001
    high = bytearray([0xFF] * 64)
    high[4], high[5], high[7] = 0b11111001, 0b11111110, 0b01111111
    assert packed.tobytes() == bytes(low) + bytes(high) + bytes([0x7F, 0x81]) + bytes(14)


def test_golden_float_records() -> None:
    values = np.array([[1.0, 2.0], [-3.0, 0.5]])
    for kind, code in ((np.float32, "f"), (np.float16, "e")):
        expected = struct.pack(f"<16{code}16{code}", 1, -3, *[0] * 14, 2, 0.5, *[0] * 14)
        packed = packing.pack_floats(values.astype(kind))
        size = len(expected)
        assert packed.tobytes() == expected + bytes(30 * size // 2)


def test_golden_bytes_unpack() -> None:
    data = np.frombuffer(bytes.fromhex(GOLDEN_Q4), np.uint8)
    expected = [[7, 6, 5, 4, 3, 2, 1, 0, -1], [16, 14, 12, 10, 8, 6, 4, 2, 0]]
    np.testing.assert_array_equal(packing.unpack("q4", data, 2, 9), np.array(expected, np.float32))
    data = np.frombuffer(bytes.fromhex(GOLDEN_Q8), np.uint8)
    tiny = 2.0**-24
    expected_q8 = [[0.5, 1, 1.5, 2, 2.5], [-tiny, -2 * tiny, -127 * tiny, 127 * tiny, 0]]
    np.testing.assert_array_equal(packing.unpack("q8", data, 2, 5), np.array(expected_q8, np.float32))


@pytest.mark.parametrize("quant", ["f32", "f16"])
@inputs.some
@given(seed=inputs.seeds, size=sizes, flavour=inputs.flavours)
def test_floats_come_back(quant: str, seed: int, size: tuple[int, int], flavour: str) -> None:
    kind: Any = np.float32 if quant == "f32" else np.float16
    values = inputs.floats(seed, flavour, *size, large=6e4).astype(kind)
    packed = packing.pack_floats(values)
    blocks, groups = -(-size[0] // 16), -(-size[1] // 32)
    assert packed.shape == (blocks, groups, inputs.RECORD[quant])
    inputs.same(packing.unpack(quant, packed.reshape(-1), *size), values.astype(np.float32))


@pytest.mark.parametrize("quant", inputs.INTEGERS)
@inputs.some
@given(seed=inputs.seeds, size=sizes, flavour=inputs.flavours)
def test_whole_numbers_and_scales_come_back(
    quant: str, seed: int, size: tuple[int, int], flavour: str
) -> None:
    values = inputs.whole((seed, "v"), *inputs.INTEGERS[quant], *size).astype(np.int8)
    groups = -(-size[1] // 32)
    scales = inputs.floats((seed, "s"), flavour, size[0], groups, large=6e4).astype(np.float16)
    minimums = None
    if quant in ("q4s", "q3", "q2"):
        scales = packing.byte_scales(scales)
    elif quant == "q4m":
        minimums = inputs.floats((seed, "m"), flavour, size[0], groups, large=6e4).astype(np.float16)
    packed = packing.pack(quant, values, scales, minimums)
    assert packed.shape == (-(-size[0] // 16), groups, inputs.RECORD[quant])
    expected = values.astype(np.float32) * np.repeat(scales.astype(np.float32), 32, axis=1)[:, : size[1]]
    if minimums is not None:
        expected += np.repeat(minimums.astype(np.float32), 32, axis=1)[:, : size[1]]
    np.testing.assert_array_equal(packing.unpack(quant, packed.reshape(-1), *size), expected)
    stored = packing.unpack_values(quant, packed).transpose(0, 2, 1, 3).reshape(-1, groups * 32)
    np.testing.assert_array_equal(stored[: size[0], : size[1]], values)
    assert not stored[size[0] :].any()
    assert not stored[:, size[1] :].any()


def test_scales_of_one_byte_are_the_nearest_of_all_256() -> None:
    every = np.array([inputs.byte_scale(byte) for byte in range(256)])
    assert every.max() == packing.LARGEST_BYTE_SCALE
    given = inputs.floats("scales", "large", 2000, large=12.0).astype(np.float64)
    given = np.concatenate([given, given * 1e-4, every, [1e-9, -1e-9, 0.0]])
    found = packing.byte_scales(given)
    gaps = np.abs(given[:, None] - every[None]).min(axis=1)
    np.testing.assert_array_equal(np.abs(given - found.astype(np.float64)), gaps)
    stored = packing.scale_bytes(found)
    np.testing.assert_array_equal([inputs.byte_scale(int(byte)) for byte in stored], found.astype(np.float64))


@pytest.mark.parametrize("quant", inputs.QUANTS)
@inputs.few
@given(seed=inputs.seeds, size=sizes, flavour=inputs.flavours)
def test_packed_bytes_mean_what_the_layout_says(
    quant: str, seed: int, size: tuple[int, int], flavour: str
) -> None:
    """Against the reader of single weights in kernel_inputs.py, written from the documentation alone."""
    blocks, groups = -(-size[0] // 16), -(-size[1] // 32)
    data = inputs.weight_bytes(quant, seed, blocks, groups, flavour)
    by_hand = inputs.stored_matrix(quant, data, 0, groups, *size)
    np.testing.assert_array_equal(packing.unpack(quant, data, *size).astype(np.float64), by_hand)
