"""Types that store groups of 4 or 8 weights as one entry of a table (`grids.py`): IQ1 to IQ3.

An entry gives magnitudes; signs are stored beside it, except in IQ1, whose entries have them.
Layouts and the order of the products are those of llama.cpp (ggml-common.h, ggml-quants.c).
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgert.converters.gguf.grids import grid
from edgert.converters.gguf.layout import Bytes, Floats, TensorType, blocks_of, planes, scale_of, spread

# Seven signs are stored; the eighth makes the number of minuses even.
_EVEN: Final = np.array([i | (i.bit_count() & 1) << 7 for i in range(128)], np.uint8)
_SEVENS: Final = np.array((0, 7, 14, 21), np.uint32)
_QUARTER, _HALF = np.float32(0.25), np.float32(0.5)


def _looked_up(table: str, places: NDArray[Any]) -> Floats:
    """Entries of a grid [n, groups] as weights [n, block]."""
    entries: Floats = grid(table)[places]
    return entries.reshape(len(places), -1)


def _signs(bits: Bytes) -> Floats:
    """[n, bytes] to [n, 8 bytes]: -1 where a bit is set, lowest first."""
    return 1 - 2 * np.unpackbits(bits, axis=1, bitorder="little").astype(np.float32)


def _even_signs(words: NDArray[np.uint32]) -> Floats:
    """Four times seven signs in each word [n, words]: [n, 32 words]."""
    return _signs(_EVEN[(words[:, :, None] >> _SEVENS) & 127].reshape(len(words), -1))


@blocks_of(("d", "<f2"), ("qs", [("places", "u1", 4), ("word", "<u4")], 8))
def _iq2_xxs(b: Any) -> Floats:
    words = b["qs"]["word"]
    scales = scale_of(b["d"]) * (_HALF + (words >> 28).astype(np.float32)) * _QUARTER
    places = b["qs"]["places"].reshape(len(b), -1)
    return spread(scales, _looked_up("IQ2_XXS", places)) * _even_signs(words)


@blocks_of(("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8))
def _iq2_xs(b: Any) -> Floats:
    scales = scale_of(b["d"]) * (_HALF + planes(b["scales"], 1, (0, 4), 15)) * _QUARTER
    return spread(scales, _looked_up("IQ2_XS", b["qs"] & 511)) * _signs(_EVEN[b["qs"] >> 9])


@blocks_of(("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8))
def _iq2_s(b: Any) -> Floats:
    scales = scale_of(b["d"]) * (_HALF + planes(b["scales"], 1, (0, 4), 15)) * _QUARTER
    places = b["qs"] | planes(b["qh"], 1, (0, 2, 4, 6), 3).astype(np.uint16) << 8
    return spread(scales, _looked_up("IQ2_S", places)) * _signs(b["signs"])


@blocks_of(("d", "<f2"), ("qs", "u1", 64), ("words", "<u4", 8))
def _iq3_xxs(b: Any) -> Floats:
    scales = scale_of(b["d"]) * (_HALF + (b["words"] >> 28).astype(np.float32)) * _HALF
    return spread(scales, _looked_up("IQ3_XXS", b["qs"])) * _even_signs(b["words"])


@blocks_of(("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4))
def _iq3_s(b: Any) -> Floats:
    scales = scale_of(b["d"]) * (1 + 2 * planes(b["scales"], 1, (0, 4), 15))
    places = b["qs"] | planes(b["qh"], 1, tuple(range(8)), 1).astype(np.uint16) << 8
    return spread(scales, _looked_up("IQ3_S", places)) * _signs(b["signs"])


# Entries of IQ1 are moved by an eighth, up or down, so that no weight is zero.
_EIGHTH: Final = np.float32(0.125)


@blocks_of(("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8))
def _iq1_s(b: Any) -> Floats:
    scales = scale_of(b["d"]) * (2 * (b["qh"] >> 12 & 7) + 1)
    high = (b["qh"][:, :, None] >> np.array((0, 3, 6, 9), np.uint16) & 7).reshape(len(b), -1)
    moved = np.where(b["qh"] & 0x8000, -_EIGHTH, _EIGHTH)
    return spread(scales, _looked_up("IQ1_S", b["qs"] | high << 8) + np.repeat(moved, 32, axis=1))


@blocks_of(("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4))
def _iq1_m(b: Any) -> Floats:
    # The block's scale is in the upper four bits of the four words.
    parts = (b["scales"] & 0xF000) >> np.array((12, 8, 4, 0), np.uint16)
    d = np.bitwise_or.reduce(parts, axis=1).view(np.float16)
    steps = (b["scales"][:, :, None] >> np.array((0, 3, 6, 9), np.uint16) & 7).reshape(len(b), -1)
    high = planes(b["qh"], 1, (0, 4), 15)
    moved = np.where(high & 8, -_EIGHTH, _EIGHTH)
    places = b["qs"] | (high & 7).astype(np.uint16) << 8
    weights = _looked_up("IQ1_S", places) + np.repeat(moved, 8, axis=1)
    return spread(scale_of(d) * (2 * steps + 1), weights)


CODEBOOK_TYPES: Final = {
    16: TensorType("IQ2_XXS", 256, 66, _iq2_xxs, "q8"),
    17: TensorType("IQ2_XS", 256, 74, _iq2_xs, "q8"),
    18: TensorType("IQ3_XXS", 256, 98, _iq3_xxs, "q8"),
    19: TensorType("IQ1_S", 256, 50, _iq1_s, "q8"),
    21: TensorType("IQ3_S", 256, 110, _iq3_s, "q8"),
    22: TensorType("IQ2_S", 256, 82, _iq2_s, "q8"),
    29: TensorType("IQ1_M", 256, 56, _iq1_m, "q8"),
}
"""By their number in the format."""
