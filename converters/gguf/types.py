"""The tensor types of GGUF, by their number in the format."""

from typing import Final

from edgert.converters.gguf.blocks import BLOCK_TYPES
from edgert.converters.gguf.codebooks import CODEBOOK_TYPES
from edgert.converters.gguf.layout import TensorType

# Their sizes let a file that holds them be checked; no weight is stored in them.
_OTHERS: Final = {
    9: TensorType("Q8_1", 32, 40, None, "q8"),
    15: TensorType("Q8_K", 256, 292, None, "q8"),
    24: TensorType("I8", 1, 1, None, "q8"),
    25: TensorType("I16", 1, 2, None, "f32"),
    26: TensorType("I32", 1, 4, None, "f32"),
    27: TensorType("I64", 1, 8, None, "f32"),
}

TYPES: Final[dict[int, TensorType]] = BLOCK_TYPES | CODEBOOK_TYPES | _OTHERS
WEIGHT_TYPES: Final = tuple(kind.name for _, kind in sorted(TYPES.items()) if kind.decode)
