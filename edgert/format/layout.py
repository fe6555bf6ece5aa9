"""How many bytes a tensor takes: arithmetic only, no bytes are touched here.

Shapes are logical. A matrix W[N, K] is stored in tiles of ROW_BLOCK rows by GROUP columns,
so N and K are padded with zeros to whole tiles. An expert [3, F, D] is the three matrices gate [F, D],
up [F, D] and down [D, F] one after another; neurons [2, F, D] are up and down interleaved (see
kernels/neuron_packing.py). Everything else is stored flat.
"""

from typing import Final, Literal

from edgert.config import QUANTS
from edgert.kernels import neuron_packing

Role = Literal["matrix", "rows", "router", "expert", "neurons", "vector", "bytes"]

# One AVX-512 register holds 16 rows of 4 int8 values; AVX2 takes two, NEON four.
# Fewer rows would waste lanes there, more would waste rows of small matrices.
ROW_BLOCK: Final = 16
# Values that share one scale. 32 is the field's choice for 4 bits (GGUF Q4_0): half the
# group costs 6 % more bytes, twice the group costs visible quality.
GROUP: Final = 32
# The unit of mmap and of O_DIRECT: any tensor can be mapped or read by itself.
PAGE: Final = 4096
# What the processor can map as one piece. Memory is streamed a fifth faster through such pages (measured:
# 30 against 25 GB/s on one thread), and a cold file is read in half the time.
LARGE_PAGE: Final = 2 << 20

SCALE_BYTES: Final = 2  # one f16 per row and group, and another for a minimum
TILE_BYTES: Final[dict[str, int]] = {
    "f32": ROW_BLOCK * GROUP * 4,
    "f16": ROW_BLOCK * GROUP * 2,
    "q8": ROW_BLOCK * (GROUP + SCALE_BYTES),
    "q4m": ROW_BLOCK * (GROUP // 2 + 2 * SCALE_BYTES),
    "q4": ROW_BLOCK * (GROUP // 2 + SCALE_BYTES),
    "q4s": ROW_BLOCK * (GROUP // 2 + 1),  # a scale of one byte
    "q3": ROW_BLOCK * (GROUP * 3 // 8 + 1),
    "q2": ROW_BLOCK * (GROUP // 4 + 1),
}
QUANTS_OF: Final[dict[Role, tuple[str, ...]]] = {
    "matrix": QUANTS,
    "rows": neuron_packing.QUANTS,
    "router": ("f32",),  # rounding it would send tokens to other experts
    "expert": QUANTS,
    "neurons": neuron_packing.QUANTS,
    "vector": ("f32",),
    "bytes": ("u8",),
}
QUANTIZED: Final[tuple[Role, ...]] = ("matrix", "rows", "expert", "neurons")
"""What has a choice of precision."""
LAYOUT_OF: Final[dict[Role, str]] = {
    "matrix": "rows16",
    "rows": "rows1",
    "router": "rows16",
    "expert": "gated16",
    "neurons": "neurons32",
    "vector": "flat",
    "bytes": "flat",
}


def allowed_quants(role: Role, shape: tuple[int, ...]) -> tuple[str, ...]:
    """What a tensor may be stored as, the most precise first.

    Not q4m where a row ends inside a group: the padding would not be zero, but the minimum.
    """
    columns = shape[1:] if role in ("matrix", "expert") else ()
    whole = all(width % GROUP == 0 for width in columns)
    return tuple(quant for quant in QUANTS_OF[role] if whole or quant != "q4m")


def round_up(count: int, unit: int) -> int:
    """The least multiple of `unit` that is not below `count`."""
    return -(-count // unit) * unit


def page_padded(nbytes: int) -> int:
    """Bytes a tensor of `nbytes` takes in the file, whole pages."""
    return round_up(nbytes, PAGE)


def stored_bytes(role: Role, quant: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's data, before padding to a page.

    Raises KeyError for a quantisation that no matrix has.
    """
    if role in ("matrix", "router"):
        return _tiles(*shape) * TILE_BYTES[quant]
    if role == "rows":
        return neuron_packing.rows_bytes(quant, *shape)
    if role == "neurons":
        _, ffn, width = shape
        return neuron_packing.stored_bytes(quant, ffn, width)
    if role == "expert":
        _, ffn, width = shape
        return (2 * _tiles(ffn, width) + _tiles(width, ffn)) * TILE_BYTES[quant]
    (length,) = shape
    return length * 4 if role == "vector" else length


def _tiles(rows: int, columns: int) -> int:
    return (round_up(rows, ROW_BLOCK) // ROW_BLOCK) * (round_up(columns, GROUP) // GROUP)
