"""The `rows16` byte layout of a matrix W[N, K], written by converters and read by kernels.

N is padded to blocks of 16 rows, K to groups of 32, both with zeros. Blocks follow one another;
inside a block the groups follow one another; one (block, group) record is, for

    f32   32 x 16 float32: for each k the 16 rows
    f16   32 x 16 float16: the same
    q8    8 x 64 int8 then 16 float16 scales: register j holds, row by row, k = 4j .. 4j+3
    q4    4 x 64 bytes then 16 float16 scales: register j holds, row by row, k = 8j .. 8j+3 in the
          low nibbles and k = 8j+4 .. 8j+7 in the high nibbles, each nibble the value + 8

A row's weight is scale * value. One lane of a register is one row, so a matrix-vector product never
adds across lanes; scales lie beside their values, so it is one stream through memory (measured:
0.96 of the streaming bandwidth, against 0.69 with the scales of a block after its values).
"""

import numpy as np
from numpy.typing import NDArray

BLOCK = 16
GROUP = 32
RECORD_BYTES = {"f32": 2048, "f16": 1024, "q8": 544, "q4": 288}
"""Bytes of one (block, group) record."""


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


def pack_q8(values: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """int8 [N, K] in -127..127 and scales [N, ceil(K/32)] to record bytes [blocks, groups, 544]."""
    cut = _records(values)
    shape = cut.shape[:2]
    registers = np.ascontiguousarray(cut.reshape(*shape, 16, 8, 4).transpose(0, 1, 3, 2, 4))
    return np.concatenate([registers.view(np.uint8).reshape(*shape, 512), _pack_scales(scales)], axis=2)


def pack_q4(values: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
    """int8 [N, K] in -8..7 and scales [N, ceil(K/32)] to record bytes [blocks, groups, 288]."""
    cut = _records(values)
    shape = cut.shape[:2]
    nibbles = (cut + np.int8(8)).view(np.uint8).reshape(*shape, 16, 4, 2, 4)
    joined = nibbles[..., 0, :] | (nibbles[..., 1, :] << np.uint8(4))  # [.., row, j, 4]
    registers = np.ascontiguousarray(joined.transpose(0, 1, 3, 2, 4)).reshape(*shape, 256)
    return np.concatenate([registers, _pack_scales(scales)], axis=2)


def unpack_values(quant: str, records: NDArray[np.uint8]) -> NDArray[np.generic]:
    """Record bytes [..., record] to stored values [..., 16, 32]: int8, or float32/float16."""
    shape = records.shape[:-1]
    if quant in ("f32", "f16"):
        kind = np.float32 if quant == "f32" else np.float16
        return np.ascontiguousarray(records).view(kind).reshape(*shape, 32, 16).swapaxes(-1, -2)
    if quant == "q8":
        values = np.ascontiguousarray(records[..., :512]).view(np.int8).reshape(*shape, 8, 16, 4)
        return values.swapaxes(-2, -3).reshape(*shape, 16, 32)
    bytes_ = records[..., :256].reshape(*shape, 4, 16, 4)
    pair = np.stack([bytes_ & np.uint8(15), bytes_ >> np.uint8(4)], axis=-2)  # [.., j, row, half, 4]
    return pair.swapaxes(-3, -4).reshape(*shape, 16, 32).astype(np.int8) - np.int8(8)


def unpack_scales(records: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Record bytes [..., 544 or 288] to scales [..., 16]."""
    return np.ascontiguousarray(records[..., -32:]).view(np.float16).astype(np.float32)


def unpack(quant: str, data: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.float32]:
    """A stored matrix as float32 [N, K]."""
    n, k = padded(rows, columns)
    records = data.reshape(n // BLOCK, k // GROUP, RECORD_BYTES[quant])
    values = unpack_values(quant, records).astype(np.float32)
    if quant in ("q8", "q4"):
        values *= unpack_scales(records)[..., None]
    return np.ascontiguousarray(values.transpose(0, 2, 1, 3)).reshape(n, k)[:rows, :columns]
