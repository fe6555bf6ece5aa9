"""Types whose weights are integers times scales: Q4_0 to Q6_K, the ternary ones, FP4 and IQ4.

The layouts are those of `ggml-common.h` in llama.cpp. Products are taken in the order of its
`dequantize_row_*` (ggml-quants.c), so the float32 results are the same bits.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgert.converters.gguf.layout import (
    Bytes,
    Decoded,
    Floats,
    TensorType,
    blocks_of,
    planes,
    scale_of,
    spread,
)
from edgert.converters.mxfp4 import FP4

Integers = tuple[NDArray[np.int8], Floats]
Lines = tuple[NDArray[np.int8], Floats, Floats]
"""Integers, scales and minimums."""

# The 16 levels of IQ4_NL and IQ4_XS: closer together near zero, where most weights are.
NONLINEAR: Final = np.array(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.int8
)


@blocks_of(("d", "<f2"), ("qs", "u1", 16))
def _q4_0(b: Any) -> Integers:
    return planes(b["qs"], 16, (0, 4), 15).astype(np.int8) - np.int8(8), scale_of(b["d"])


@blocks_of(("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16))
def _q4_1(b: Any) -> Lines:
    return planes(b["qs"], 16, (0, 4), 15).astype(np.int8), scale_of(b["d"]), scale_of(b["m"])


def _fifth_bit(qh: Bytes) -> Bytes:
    bits: Bytes = np.unpackbits(qh, axis=1, bitorder="little") << np.uint8(4)
    return bits


@blocks_of(("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16))
def _q5_0(b: Any) -> Integers:
    values = planes(b["qs"], 16, (0, 4), 15) | _fifth_bit(b["qh"])
    return values.astype(np.int8) - np.int8(16), scale_of(b["d"])


@blocks_of(("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16))
def _q5_1(b: Any) -> Floats:
    values = planes(b["qs"], 16, (0, 4), 15) | _fifth_bit(b["qh"])
    weights: Floats = scale_of(b["d"]) * values + scale_of(b["m"])
    return weights


@blocks_of(("d", "<f2"), ("qs", "i1", 32))
def _q8_0(b: Any) -> Integers:
    return b["qs"], scale_of(b["d"])


@blocks_of(("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2"))
def _q2_k(b: Any) -> Floats:
    scales = scale_of(b["d"]) * (b["scales"] & 15)
    least = scale_of(b["dmin"]) * (b["scales"] >> 4)
    weights: Floats = spread(scales, planes(b["qs"], 32, (0, 2, 4, 6), 3)) - np.repeat(least, 16, axis=1)
    return weights


@blocks_of(("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2"))
def _q3_k(b: Any) -> Floats:
    low = planes(b["scales"][:, :8], 8, (0, 4), 15)
    high = planes(b["scales"][:, 8:], 4, (0, 2, 4, 6), 3)
    scales = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    values = planes(b["qs"], 32, (0, 2, 4, 6), 3).astype(np.int8)
    values -= np.int8(4) * (planes(b["hmask"], 32, tuple(range(8)), 1) == 0)  # a clear bit subtracts 4
    return spread(scale_of(b["d"]) * scales, values)


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """12 bytes to eight 6-bit scales and eight 6-bit minima; the last four of each are in two parts."""
    low, least, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 2 & 48)], axis=1)
    minima = np.concatenate([least & 63, rest >> 4 | (least >> 2 & 48)], axis=1)
    return scales, minima


@blocks_of(("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128))
def _q4_k(b: Any) -> Lines:
    scales, minima = _k_scales(b["scales"])
    values = planes(b["qs"], 32, (0, 4), 15).astype(np.int8)
    return values, scale_of(b["d"]) * scales, -(scale_of(b["dmin"]) * minima)


@blocks_of(("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128))
def _q5_k(b: Any) -> Floats:
    scales, minima = _k_scales(b["scales"])
    values = planes(b["qs"], 32, (0, 4), 15) | planes(b["qh"], 32, tuple(range(8)), 1) << np.uint8(4)
    return spread(scale_of(b["d"]) * scales, values) - np.repeat(scale_of(b["dmin"]) * minima, 32, axis=1)


@blocks_of(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2"))
def _q6_k(b: Any) -> Floats:
    values = planes(b["ql"], 64, (0, 4), 15) | planes(b["qh"], 32, (0, 2, 4, 6), 3) << np.uint8(4)
    return spread(scale_of(b["d"]) * b["scales"], values.astype(np.int8) - np.int8(32))


@blocks_of(("qs", "u1", 48), ("qh", "u1", 4), ("d", "<f2"))
def _tq1_0(b: Any) -> Integers:
    """Five base-3 digits to a byte, as a fraction of 256: a digit is what carries over when it is tripled."""
    digits = [
        (part[:, None, :] * np.array(powers, np.uint8)[:, None]).reshape(len(part), -1)  # modulo 256
        for part, powers in (
            (b["qs"][:, :32], (1, 3, 9, 27, 81)),
            (b["qs"][:, 32:], (1, 3, 9, 27, 81)),
            (b["qh"], (1, 3, 9, 27)),
        )
    ]
    values = np.concatenate(digits, axis=1).astype(np.uint16) * 3 >> 8
    return values.astype(np.int8) - np.int8(1), scale_of(b["d"])


@blocks_of(("qs", "u1", 64), ("d", "<f2"))
def _tq2_0(b: Any) -> Integers:
    return planes(b["qs"], 32, (0, 2, 4, 6), 3).astype(np.int8) - np.int8(1), scale_of(b["d"])


@blocks_of(("d", "<f2"), ("qs", "u1", 16))
def _q1_0(b: Any) -> Integers:
    signs = np.unpackbits(b["qs"], axis=1, bitorder="little").astype(np.int8)
    return signs * np.int8(2) - np.int8(1), scale_of(b["d"])


@blocks_of(("e", "u1"), ("qs", "u1", 16))
def _mxfp4(b: Any) -> Integers:
    """The scale is a power of two, 2**(e - 127), halved because the values are doubled."""
    exponent = b["e"].astype(np.uint32)
    subnormal = np.uint32(0x00200000) << np.minimum(exponent, 1)
    bits = np.where(exponent < 2, subnormal, (exponent - np.uint32(1)) << np.uint32(23))
    return FP4[planes(b["qs"], 16, (0, 4), 15)], bits.view(np.float32)[:, None]


@blocks_of(("d", "u1", 4), ("qs", "u1", 32))
def _nvfp4(b: Any) -> Floats:
    """A scale of type E4M3, without its sign, for every 16 weights; halved as above."""
    exponent, fraction = (b["d"] >> 3 & 15).astype(np.float32), (b["d"] & 7).astype(np.float32)
    normal = (1 + fraction / 8) * np.float32(2) ** (exponent - 7)
    scales = np.where(exponent == 0, fraction * np.float32(2.0**-9), normal) * np.float32(0.5)
    scales[b["d"] == 0x7F] = 0  # not a number; llama.cpp reads 0
    return spread(scales, FP4[planes(b["qs"], 8, (0, 4), 15)])


@blocks_of(("d", "<f2"), ("qs", "u1", 16))
def _iq4_nl(b: Any) -> Integers:
    return NONLINEAR[planes(b["qs"], 16, (0, 4), 15)], scale_of(b["d"])


@blocks_of(("d", "<f2"), ("high", "<u2"), ("low", "u1", 4), ("qs", "u1", 128))
def _iq4_xs(b: Any) -> Floats:
    high = (b["high"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
    scales = (planes(b["low"], 1, (0, 4), 15) | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    return spread(scale_of(b["d"]) * scales, NONLINEAR[planes(b["qs"], 16, (0, 4), 15)])


def _bf16(raw: Bytes) -> Decoded:
    """The upper half of a float32."""
    wide: NDArray[np.uint32] = raw.view("<u2").astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


BLOCK_TYPES: Final = {
    0: TensorType("F32", 1, 4, lambda raw: raw.view("<f4").astype(np.float32), "f32"),
    1: TensorType("F16", 1, 2, lambda raw: raw.view("<f2").astype(np.float32), "f16"),
    2: TensorType("Q4_0", 32, 18, _q4_0, "q4"),
    3: TensorType("Q4_1", 32, 20, _q4_1, "q4m"),
    6: TensorType("Q5_0", 32, 22, _q5_0, "q8"),
    7: TensorType("Q5_1", 32, 24, _q5_1, "q8"),
    8: TensorType("Q8_0", 32, 34, _q8_0, "q8"),
    10: TensorType("Q2_K", 256, 84, _q2_k, "q8"),
    11: TensorType("Q3_K", 256, 110, _q3_k, "q8"),
    12: TensorType("Q4_K", 256, 144, _q4_k, "q4m"),
    13: TensorType("Q5_K", 256, 176, _q5_k, "q8"),
    14: TensorType("Q6_K", 256, 210, _q6_k, "q8"),
    20: TensorType("IQ4_NL", 32, 18, _iq4_nl, "q8"),
    23: TensorType("IQ4_XS", 256, 136, _iq4_xs, "q8"),
    28: TensorType("F64", 1, 8, lambda raw: raw.view("<f8").astype(np.float32), "f32"),
    30: TensorType("BF16", 1, 2, _bf16, "f16"),
    34: TensorType("TQ1_0", 256, 54, _tq1_0, "q4"),
    35: TensorType("TQ2_0", 256, 66, _tq2_0, "q4"),
    39: TensorType("MXFP4", 32, 17, _mxfp4, "q8"),
    40: TensorType("NVFP4", 64, 36, _nvfp4, "q8"),
    41: TensorType("Q1_0", 128, 18, _q1_0, "q4"),
}
"""By their number in the format."""
