"""What a tensor type of GGUF is, and the bit twiddling its decoders share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.config import Quant
from edgert.converters.quantize import Codes
from edgert.kernels.packing import GROUP

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Decoded = Floats | tuple[NDArray[np.int8], Floats] | tuple[NDArray[np.int8], Floats, Floats]
"""Of n blocks: weights [n, block]; or integers [n, block], their scales [n, scales of a block] and, for some
types, as many minimums."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """A type of the format. A row is a run of blocks of `block` weights in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int
    decode: Callable[[Bytes], Decoded] | None  # blocks' bytes [n, nbytes]; None for no type of weights
    kept_as: Quant  # the smallest of ours that loses nothing, or less than a product's own rounding

    def weights(self, raw: Bytes) -> Floats | Codes:
        """Rows of bytes [N, ...] to weights [N, K]."""
        if self.decode is None:
            raise AssertionError(f"{self.name} holds no weights")
        rows = len(raw)
        # A damaged scale may be infinite: what comes of it is refused when it is stored, not here.
        with np.errstate(all="ignore"):
            found = self.decode(np.ascontiguousarray(raw).reshape(-1, self.nbytes))
        if not isinstance(found, tuple):
            return found.reshape(rows, -1)
        values, *others = found
        groups_of_a_scale = values.size // others[0].size // GROUP
        spread_out = [np.repeat(x.reshape(rows, -1), groups_of_a_scale, axis=1) for x in others]
        return Codes(values.reshape(rows, -1), *spread_out)


def blocks_of(*fields: tuple[Any, ...]) -> Callable[[Callable[[Any], Decoded]], Callable[[Bytes], Decoded]]:
    """Names the fields of a block in order; the decoder gets arrays [n, ...] by these names."""
    record = np.dtype(list(fields))

    def decorate(decode: Callable[[Any], Decoded]) -> Callable[[Bytes], Decoded]:
        return lambda raw: decode(raw.view(record)[:, 0])

    return decorate


def planes(packed: Bytes, width: int, shifts: tuple[int, ...], mask: int) -> Bytes:
    """Bit fields of [n, bytes] as [n, values]: every `width` bytes at the first shift, then at the next."""
    runs = packed.reshape(len(packed), -1, 1, width)
    fields: Bytes = (runs >> np.array(shifts, np.uint8)[:, None]) & np.uint8(mask)
    return fields.reshape(len(packed), -1)


def scale_of(halves: NDArray[np.float16]) -> Floats:
    """A block's own scale [n] as float32 [n, 1]."""
    return halves.astype(np.float32)[:, None]


def spread(scales: Floats, values: NDArray[Any]) -> Floats:
    """[n, s] scales times [n, block] values, each scale over its equal share."""
    n, count = scales.shape
    products: Floats = scales[:, :, None] * values.reshape(n, count, -1)
    return products.reshape(n, -1)
