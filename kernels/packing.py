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


def _records(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """[N, K] zero-padded and cut to [blocks, groups, 16, 32]."""
    rows, columns = padded(*values.shape)
    whole = np.zeros((rows, columns), values.dtype)
    whole[: values.shape[0], : values.shape[1]] = values
    cut = whole.reshape(rows // BLOCK, BLOCK, columns // GROUP, GROUP)
    return np.ascontiguousarray(cut.transpose(0, 2, 1, 3))


def pack_floats(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """float32 or float16 [N, K] to record bytes [blocks, groups, record]."""
    records = np.ascontiguousarray(_records(values).transpose(0, 1, 3, 2))
    return records.view(np.uint8).reshape(*records.shape[:2], -1)


def _pack_scales(scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    rows = -(-scales.shape[0] // BLOCK) * BLOCK
    whole = np.zeros((rows, scales.shape[1]), np.float16)
    whole[: scales.shape[0]] = scales
    cut = np.ascontiguousarray(whole.reshape(rows // BLOCK, BLOCK, -1).transpose(0, 2, 1))
    return cut.view(np.uint8)


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
    if quant == "q8":
        return pack_q8(values, scales)
    if quant == "q4m":
        assert minimums is not None
        return np.concatenate(
            [_nibbles(_records(values)), _pack_scales(scales), _pack_scales(minimums)], axis=2
        )
    if quant == "q4":
        return pack_q4(values, scales)
    small = scale_bytes(_pack_scales(scales).view(np.float16))
    if quant == "q4s":
        return np.concatenate([_nibbles(_records(values) + np.int8(8)), small], axis=2)
    codes = (_records(values) + np.int8(OFFSETS[quant])).view(np.uint8)
    shape = codes.shape[:2]
    # [.., row, i, t, c] to bytes [.., i, row, c], two bits for each t
    pairs = (codes & np.uint8(3)).reshape(*shape, 16, 2, 4, 4)
    low = np.zeros((*shape, 16, 2, 4), np.uint8)
    for t in range(4):
        low |= pairs[..., t, :] << np.uint8(2 * t)
    parts = [np.ascontiguousarray(low.swapaxes(2, 3)).reshape(*shape, 128)]
    if quant == "q3":
        thirds = (codes >> np.uint8(2)).reshape(*shape, 16, 8, 4)  # [.., row, j, c]
        high = np.zeros((*shape, 16, 4), np.uint8)
        for j in range(8):
            high |= thirds[..., j, :] << np.uint8(j)
        parts.append(high.reshape(*shape, 64))
    return np.concatenate([*parts, small], axis=2)


def pack_q8(values: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """int8 [N, K] in -127..127 and scales [N, ceil(K/32)] to record bytes [blocks, groups, 544]."""
    cut = _records(values)
    shape = cut.shape[:2]
    registers = np.ascontiguousarray(cut.reshape(*shape, 16, 8, 4).transpose(0, 1, 3, 2, 4))
    return np.concatenate([registers.view(np.uint8).reshape(*shape, 512), _pack_scales(scales)], axis=2)


def pack_q4(values: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """int8 [N, K] in -8..7 and scales [N, ceil(K/32)] to record bytes [blocks, groups, 288]."""
    return np.concatenate([_nibbles(_records(values) + np.int8(8)), _pack_scales(scales)], axis=2)


def _nibbles(codes: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Codes 0..15 [blocks, groups, 16, 32] to the registers [blocks, groups, 256]."""
    shape = codes.shape[:2]
    nibbles = codes.view(np.uint8).reshape(*shape, 16, 4, 2, 4)
    joined = nibbles[..., 0, :] | (nibbles[..., 1, :] << np.uint8(4))  # [.., row, j, 4]
    return np.ascontiguousarray(joined.transpose(0, 1, 3, 2, 4)).reshape(*shape, 256)


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
