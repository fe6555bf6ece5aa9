"""The `rows16` byte layout of a matrix W[N, K], written by converters and read by kernels.

N is padded to blocks of 16 rows, K to groups of 32, both with zeros. Blocks follow one another;
inside a block the groups follow one another; one (block, group) record is, for

    f32   32 x 16 float32: for each k the 16 rows
    f16   32 x 16 float16: the same
    q8    8 x 64 int8 then 16 float16 scales: register j holds, row by row, k = 4j .. 4j+3
    q4    4 x 64 bytes then 16 float16 scales: register j holds, row by row, k = 8j .. 8j+3 in the
          low nibbles and k = 8j+4 .. 8j+7 in the high nibbles, each nibble the value + 8
    q4m   the same with nibbles that are the value itself, then 16 float16 minimums
    q4s   the nibbles of q4, then 16 scales of one byte
    q3    2 x 64 bytes: register i holds, row by row and c = 0 .. 3, the low two bits of the value + 4 at
          k = 16i + 4t + c in its bits 2t and 2t+1; then 64 bytes, whose bit j is the third bit at
          k = 4j + c; then 16 scales of one byte
    q2    the first two registers of q3, of the value + 2; then 16 scales of one byte

A row's weight is scale * value, for q4m + minimum. A scale of one byte is a sign, 4 bits of exponent and 3
of mantissa: the sign and the bits 13 .. 7 of a float16 whose other bits are 0, times 4; from 2**-15 to 7.5.
It adds 1 to 5 % to the squared error that a float16 would leave, and saves a quarter of a bit per weight,
which lowers it by 29 % where it is spent on values.

One lane of a register is one row, so a matrix-vector product never adds across lanes; scales lie beside
their values, so it is one stream through memory (measured: 0.96 of the streaming bandwidth, against 0.69
with the scales of a block after its values).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 16
GROUP = 32
RECORD_BYTES = {"f32": 2048, "f16": 1024, "q8": 544, "q4m": 320, "q4": 288, "q4s": 272, "q3": 208, "q2": 144}
"""Bytes of one (block, group) record, by type, the most precise first."""
OFFSETS = {"q4": 8, "q4s": 8, "q3": 4, "q2": 2}
"""What is added to a value before it is stored, so that no stored one is negative."""
BYTE_SCALED = ("q4s", "q3", "q2")
"""The types whose scales take one byte."""
LARGEST_BYTE_SCALE = 7.5
"""The largest of these scales."""
BYTE_SCALE_FACTOR = 4.0
"""What the float16 in a scale of one byte is multiplied by. Weights of a standard deviation from 0.0005 (a
twentieth of what is usual) to 10 then keep all 3 bits of mantissa."""


def padded(rows: int, columns: int) -> tuple[int, int]:
    """(N, K) with whole blocks and groups."""
    return -(-rows // BLOCK) * BLOCK, -(-columns // GROUP) * GROUP


def _blocks(values: NDArray[np.generic], wide: int) -> NDArray[np.generic]:
    """[N, K] zero-padded to whole blocks of rows and `wide` columns as [blocks, 16, columns / wide, wide]."""
    rows, columns = values.shape
    whole = -(-rows // BLOCK) * BLOCK, -(-columns // wide) * wide
    if whole != values.shape:
        given, values = values, np.zeros(whole, values.dtype)
        values[:rows, :columns] = given
    return np.ascontiguousarray(values).reshape(-1, BLOCK, whole[1] // wide, wide)


def pack_floats(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """float32 or float16 [N, K] to record bytes [blocks, groups, record]."""
    records = np.ascontiguousarray(_blocks(values, GROUP).transpose(0, 2, 3, 1))
    return records.view(np.uint8).reshape(*records.shape[:2], -1)


def byte_scales(scales: NDArray[np.floating[Any]]) -> NDArray[np.float16]:
    """The nearest scales that BYTE_SCALED can store, as float16; too large ones become the largest."""
    limited = np.clip(scales, -LARGEST_BYTE_SCALE, LARGEST_BYTE_SCALE).astype(np.float32)
    # Mantissas of 3 bits, below 2**-12 multiples of 2**-15.
    step = np.maximum(np.frexp(limited)[1] - 1, -12) - 3
    return np.asarray(np.ldexp(np.rint(np.ldexp(limited, -step)), step), np.float16)


def scale_bytes(scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Scales that `byte_scales` gave, as the bytes that stand for them."""
    halves = (scales / np.float16(BYTE_SCALE_FACTOR)).view(np.uint16)
    return ((halves >> np.uint16(8) & np.uint16(0x80)) | (halves >> np.uint16(7) & np.uint16(0x7F))).astype(
        np.uint8
    )


def _unpack_byte_scales(stored: NDArray[np.uint8]) -> NDArray[np.float32]:
    wide = stored.astype(np.uint16)
    halves = (wide & np.uint16(0x80)) << np.uint16(8) | (wide & np.uint16(0x7F)) << np.uint16(7)
    return halves.view(np.float16).astype(np.float32) * np.float32(BYTE_SCALE_FACTOR)


def pack(
    quant: str,
    values: NDArray[np.int8],
    scales: NDArray[np.float16],
    minimums: NDArray[np.float16] | None = None,
) -> NDArray[np.uint8]:
    """Whole numbers [N, K] and scales [N, ceil(K/32)] to record bytes [blocks, groups, record].

    Values are in the range of `quant`: -127..127 for q8, 0..15 for q4m, -8..7 for q4 and q4s, -4..3 and
    -2..1 for q3 and q2. Scales of BYTE_SCALED are as `byte_scales` gives them. minimums: as scales, for
    q4m alone.
    """
    # Four columns of a row stay side by side everywhere, so that they are worked on as one word.
    words = _blocks(values, GROUP).view(np.uint32)  # [blocks, 16, groups, 8]
    blocks, _, groups, _ = words.shape
    packed = np.empty((blocks, groups, RECORD_BYTES[quant]), np.uint8)
    registers = _registers(quant, words)
    count = registers.shape[-1] * BLOCK
    out = packed.view(np.uint32)[..., :count].reshape(blocks, groups, -1, BLOCK)
    out[:] = registers.transpose(0, 2, 3, 1)
    at = 4 * count
    for given in (scales,) if minimums is None else (scales, minimums):
        stored = scale_bytes(given) if quant in BYTE_SCALED else given.view(np.uint16)
        size = BLOCK * stored.itemsize
        packed[..., at : at + size].view(stored.dtype)[:] = _blocks(stored, 1)[..., 0].transpose(0, 2, 1)
        at += size
    return packed


def _registers(quant: str, words: NDArray[np.generic]) -> NDArray[np.generic]:
    """The registers of records, one row's word of each: int8 as uint32 [.., 8] to uint32 [.., registers]."""
    if quant == "q8":
        return words
    if quant.startswith("q4"):
        low = words & np.uint32(0x0F0F0F0F)
        joined = low[..., ::2] | low[..., 1::2] << np.uint32(4)
        return joined if quant == "q4m" else joined ^ np.uint32(0x88888888)  # + 8
    twos = words & np.uint32(0x03030303)
    low = twos[..., ::4] | twos[..., 1::4] << np.uint32(2) | twos[..., 2::4] << np.uint32(4)
    low |= twos[..., 3::4] << np.uint32(6)
    if quant == "q2":
        return low ^ np.uint32(0xAAAAAAAA)  # + 2
    signs = words >> np.uint32(2) & np.uint32(0x01010101)
    high = np.bitwise_or.reduce(signs << np.arange(8, dtype=np.uint32), axis=-1, keepdims=True)
    return np.concatenate([low, high ^ np.uint32(0xFFFFFFFF)], axis=-1)  # + 4 changes the third bit alone


def unpack_values(quant: str, records: NDArray[np.uint8]) -> NDArray[np.generic]:
    """Record bytes [..., record] to stored values [..., 16, 32]: int8, or float32/float16."""
    shape = records.shape[:-1]
    if quant in ("f32", "f16"):
        kind = np.float32 if quant == "f32" else np.float16
        return np.ascontiguousarray(records).view(kind).reshape(*shape, 32, 16).swapaxes(-1, -2)
    if quant == "q8":
        values = np.ascontiguousarray(records[..., :512]).view(np.int8).reshape(*shape, 8, 16, 4)
        return values.swapaxes(-2, -3).reshape(*shape, 16, 32)
    if quant in ("q3", "q2"):
        low = np.ascontiguousarray(records[..., :128]).reshape(*shape, 2, 16, 1, 4)
        shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
        codes = low >> shifts & np.uint8(3)  # [.., i, row, t, c]
        codes = np.moveaxis(codes, -4, -3).reshape(*shape, 16, 8, 4)
        if quant == "q3":
            high = np.ascontiguousarray(records[..., 128:192]).reshape(*shape, 16, 1, 4)
            codes = codes | (high >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)) << np.uint8(2)
        return codes.reshape(*shape, 16, 32).view(np.int8) - np.int8(OFFSETS[quant])
    bytes_ = records[..., :256].reshape(*shape, 4, 16, 4)
    pair = np.stack([bytes_ & np.uint8(15), bytes_ >> np.uint8(4)], axis=-2)  # [.., j, row, half, 4]
    return pair.swapaxes(-3, -4).reshape(*shape, 16, 32).astype(np.int8) - np.int8(OFFSETS.get(quant, 0))


def unpack_scales(quant: str, records: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Record bytes [..., record] to scales [..., 16]."""
    if quant in BYTE_SCALED:
        return _unpack_byte_scales(records[..., -16:])
    at = 512 if quant == "q8" else 256
    return np.ascontiguousarray(records[..., at : at + 32]).view(np.float16).astype(np.float32)


def unpack_minimums(quant: str, records: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Record bytes [..., record] to minimums [..., 16], zeros for a type that has none."""
    if quant == "q4m":
        return np.ascontiguousarray(records[..., 288:320]).view(np.float16).astype(np.float32)
    return np.zeros((*records.shape[:-1], BLOCK), np.float32)


def unpack(quant: str, data: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.float32]:
    """A stored matrix as float32 [N, K]."""
    n, k = padded(rows, columns)
    records = data.reshape(n // BLOCK, k // GROUP, RECORD_BYTES[quant])
    values = unpack_values(quant, records).astype(np.float32)
    if quant not in ("f32", "f16"):
        values *= unpack_scales(quant, records)[..., None]
    if quant == "q4m":
        values += unpack_minimums(quant, records)[..., None]
    return np.ascontiguousarray(values.transpose(0, 2, 1, 3)).reshape(n, k)[:rows, :columns]
