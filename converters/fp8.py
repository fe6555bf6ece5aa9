"""Matrices in 8-bit floats with a scale for each block of them, as DeepSeek-V3 and Qwen3-FP8 are published.

A float8_e4m3fn has a sign, four bits of exponent and three of mantissa, no infinity, and NaN for 0x7F and
0xFF (Micikevicius et al., 2022, arXiv:2209.05433, section 3). `NAME_scale_inv` [ceil(N/n), ceil(K/k)] is what
blocks of n x k of the matrix `NAME` are multiplied by. Activations, which such models round so too, are here
what they are for every file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Final, TypeGuard

import numpy as np
from numpy.typing import NDArray

from edgert.converters.hf_config import HfConfig, shown
from edgert.converters.safetensors_source import ITEM_BYTES, SourceTensor
from edgert.errors import ConversionError

SCALE: Final = "_scale_inv"
_KEY: Final = "quantization_config"
_FLOAT8: Final = "F8_E4M3"
_AGAIN: Final = "download the model's files again"


def _every_float8() -> NDArray[np.float32]:
    """The number that each byte stands for."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    # Subnormals have the exponent of the least normal, and no leading one.
    size = np.ldexp((mantissa + 8 * (exponent > 0)).astype(np.float32), np.maximum(exponent, 1) - 10)
    size[127] = np.nan
    return np.concatenate([size, -size])


FLOAT8: Final = _every_float8()

Block = tuple[int, int]
"""Rows and columns that share a scale."""


def without_blocks(config: HfConfig) -> tuple[HfConfig, Block | None]:
    """A config without what it says of 8-bit floats in blocks, and their size.

    Every other quantisation is left to be refused.
    """
    if not config.has(_KEY) or not isinstance(config.values[_KEY], dict):
        return config, None
    said = config.child(_KEY)
    sizes = said.values.get("weight_block_size")
    known = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if any(said.values.get(key, value) != value for key, value in known.items()) or not _is_block(sizes):
        return config, None
    if not said.has("quant_method"):
        return config, None
    values = {key: value for key, value in config.values.items() if key != _KEY}
    return HfConfig(values, config.where), (sizes[0], sizes[1])


def _is_block(sizes: object) -> TypeGuard[list[int]]:
    return (
        isinstance(sizes, list) and len(sizes) == 2 and all(type(s) is int and 0 < s < 1 << 20 for s in sizes)
    )


def with_scales(tensors: Mapping[str, SourceTensor], block: Block) -> dict[str, SourceTensor]:
    """The tensors of a folder, each matrix of 8-bit floats joined with its scales.

    ConversionError for one whose scales are missing or are not one for each block.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype == _FLOAT8 and len(tensor.shape) == 2 and all(tensor.shape):
            found[name] = Fp8Tensor.of(tensor, tensors.get(name + SCALE), block)
            del found[name + SCALE]
    return found


def _named(tensor: str) -> str:
    """A tensor's name, which may be anything, on one line; the end of a long one."""
    return repr(tensor[-100:])


@dataclass(frozen=True, slots=True)
class Fp8Tensor(SourceTensor):
    """As a tensor of floats."""

    scales: SourceTensor | None = None
    block: Block = (1, 1)
    above: int = 0  # rows of the matrix before the first of these

    @classmethod
    def of(cls, values: SourceTensor, scales: SourceTensor | None, block: Block) -> "Fp8Tensor":
        """The matrix in two tensors; ConversionError for two that do not fit."""
        grid = tuple(-(-size // unit) for size, unit in zip(values.shape, block, strict=True))
        expected = f"shape {list(grid)} for blocks of {block[0]} x {block[1]} of {list(values.shape)}"
        named = _named(values.name + SCALE)
        if scales is None:
            raise ConversionError(f"{values.path}: found no {named}, expected one of {expected}; {_AGAIN}")
        if not scales.readable or scales.shape != grid:
            raise ConversionError(
                f"{scales.path}: found {named} as {shown(scales.dtype)} of shape {list(scales.shape)}, "
                f"expected {', '.join(ITEM_BYTES)} of {expected}; {_AGAIN}"
            )
        if values.nbytes != prod(values.shape):
            raise ConversionError(
                f"{values.path}: found {values.nbytes:,} bytes of {_named(values.name)}, "
                f"expected {prod(values.shape):,}; {_AGAIN}"
            )
        shape, at = values.shape, values.offset
        return cls(
            values.name, values.path, values.dtype, shape, at, values.nbytes, scales=scales, block=block
        )

    @property
    def readable(self) -> bool:
        """As for other tensors: yes."""
        return True

    @property
    def _item_bytes(self) -> int:
        return 1

    def part(self, first: int, rows: int, columns: int) -> "Fp8Tensor":
        """Rows first.. as a tensor of its own."""
        at = self.offset + first * columns
        return replace(
            self, shape=(rows, columns), offset=at, nbytes=rows * columns, above=self.above + first
        )

    def same_bytes(self, other: SourceTensor, piece: int = 1 << 22) -> bool:
        """Not known: other scales may stand beside the same bytes."""
        return False

    def stored(self, first: int, count: int) -> NDArray[np.float32]:
        """Rows first.. of what is stored, before transposing and picking: [count, columns]."""
        if self.scales is None:
            raise AssertionError("8-bit floats without scales")
        raw = np.frombuffer(self.read(first * self._row_bytes, count * self._row_bytes), np.uint8)
        values = FLOAT8[raw].reshape(count, -1)
        high, wide = self.block
        rows = (np.arange(count) + self.above + first) // high
        columns = np.arange(values.shape[1]) // wide  # a block may be far wider than the matrix
        scales = self.scales.stored(int(rows[0]), int(rows[-1] - rows[0]) + 1)
        with np.errstate(
            all="ignore"
        ):  # a damaged file may hold anything; what is not finite is refused later
            values *= scales[np.ix_(rows - rows[0], columns)]
        return values
