"""Matrices in MXFP4 as safetensors hold them: FP4 values in pairs, and a power of two for 32 of them.

OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1: two tensors of bytes, `blocks` [.., N, K/32, 16], the
earlier value in the low half of a byte, and `scales` [.., N, K/32], exponents + 127.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgert.converters.quantize import Codes
from edgert.converters.safetensors_source import SourceTensor

# E2M1: a sign, two bits of exponent and one of mantissa; doubled, to be whole.
FP4: Final = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.int8)
GROUP: Final = 32


@dataclass(frozen=True, slots=True)
class Mxfp4Tensor(SourceTensor):
    """As a tensor of floats, whose rows are whole numbers and scales: q8 holds them without loss."""

    scales: SourceTensor | None = None

    @classmethod
    def of(cls, blocks: SourceTensor, scales: SourceTensor) -> "Mxfp4Tensor | None":
        """The tensor [.., N, K] in two of bytes; None for tensors that are no such pair."""
        shape = (*blocks.shape[:-2], GROUP * blocks.shape[-2]) if len(blocks.shape) > 2 else ()
        bytes_of_each = all(t.dtype == "U8" and t.nbytes == prod(t.shape) for t in (blocks, scales))
        if not (shape and bytes_of_each and blocks.shape == (*scales.shape, GROUP // 2)):
            return None
        return cls(blocks.name, blocks.path, "MXFP4", shape, blocks.offset, blocks.nbytes, scales=scales)

    @property
    def readable(self) -> bool:
        """As for other tensors: yes."""
        return True

    def part(self, first: int, rows: int, columns: int) -> "Mxfp4Tensor":
        """Rows first.. of a matrix, or of a stack of them, as a tensor of its own."""
        blocks, scales = columns // 2, columns // GROUP
        of_scales = self._scales
        return replace(
            self,
            shape=(rows, columns),
            offset=self.offset + first * blocks,
            nbytes=rows * blocks,
            scales=replace(of_scales, offset=of_scales.offset + first * scales, nbytes=rows * scales),
        )

    def rows(self, slab_rows: int) -> Iterator[Codes]:
        """A matrix [N, K] in slabs of `slab_rows` rows, the last maybe shorter."""
        wanted = np.arange(self.shape[0]) if self.picked is None else self.picked
        for start in range(0, len(wanted), slab_rows):
            yield self._codes(wanted[start : start + slab_rows])

    @property
    def _scales(self) -> SourceTensor:
        if self.scales is None:
            raise AssertionError("MXFP4 without scales")
        return self.scales

    def _codes(self, rows: NDArray[np.int64]) -> Codes:
        first, last = int(rows.min()), int(rows.max()) + 1
        columns = self.shape[1]

        def taken(tensor: SourceTensor, size: int) -> NDArray[np.uint8]:
            raw = tensor.read(first * size, (last - first) * size)
            return np.frombuffer(raw, np.uint8).reshape(-1, size)[rows - first]

        packed = taken(self, columns // 2)
        nibbles = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
        exponents = taken(self._scales, columns // GROUP).astype(np.int32) - 127
        with np.errstate(over="ignore"):  # 255 is no number in the format, and infinite here
            halves = np.ldexp(np.float32(0.5), exponents)  # of what FP4 has doubled
        return Codes(FP4[nibbles].reshape(len(rows), columns), halves)
