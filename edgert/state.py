"""What a forward pass works on: the weights, and the buffers of a run.

Every buffer is a span of one float32 array, every quantised row a span of three parallel arrays, so
that compiled code gets a handful of arrays and indices (see kernels/program.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgert.config import QUANTS, EngineConfig, ModelSpec
from edgert.format import ErtFile, StoredTensor
from edgert.format.tensors import expert_name, neurons_name, stand_in_name
from edgert.kernels import packing
from edgert.kernels.program import PATH, TOKEN_WORDS

MAX_OUTPUTS = PATH
"""Rows of logits one forward can give: enough for a token tree; a prompt needs one."""


class Matrix(NamedTuple):
    """Where a stored matrix [N, K] lies and how."""

    quant: int  # as in kernels/matmul.py
    at: int  # byte in the weights
    groups: int  # of 32 along K
    blocks: int  # of 16 along N


class Neurons(NamedTuple):
    """Where the up and down of a feed-forward lie neuron by neuron (see kernels/neuron_packing.py)."""

    quant: int  # as in kernels/matmul.py
    at: int  # byte in the weights; from flash, of the scales of down in the store's arena
    whole: int  # byte where all of it lies, or, from flash, comes to lie for a chunk of a prompt
    word: int = -1  # of the store's table: the place of the first neuron; below 0: nothing is streamed
    file_at: int = 0  # byte in the file
    nbytes: int = 0


class Weights:
    """The tensors of a model in one byte array: a mapped file, or random ones for a benchmark."""

    def __init__(
        self,
        spec: ModelSpec,
        data: NDArray[np.uint8],
        tensors: dict[str, StoredTensor],
        neurons: Sequence[Neurons] = (),
    ) -> None:
        """neurons: of each layer held, where a store streams them."""
        self.spec, self._neurons = spec, neurons
        # A view that cannot be written, as that of a mapped file: numba would compile the kernels
        # once more for an array that can.
        self.data = data.view()  # [file size] uint8
        self.data.flags.writeable = False
        self.tensors = tensors

    @classmethod
    def of_file(cls, file: ErtFile) -> "Weights":
        """The weights of an open file; its mapping stays alive as long as they do."""
        return cls(file.spec, file.data, file.tensors)

    def matrix(self, name: str) -> Matrix:
        """The matrix called `name`."""
        tensor = self.tensors[name]
        rows, columns = packing.padded(*tensor.shape)
        return Matrix(QUANTS.index(tensor.quant), tensor.offset, columns // 32, rows // 16)

    def neurons(self, layer: int) -> Neurons:
        """The neurons of a layer that has them one by one."""
        if self._neurons:
            return self._neurons[layer - self.spec.first_layer]
        tensor = self.tensors[neurons_name(layer)]
        return Neurons(QUANTS.index(tensor.quant), tensor.offset, tensor.offset)

    def vector(self, name: str) -> int:
        """The byte where a float32 vector starts; -1 where the model has none of that name."""
        return self.tensors[name].offset if name in self.tensors else -1

    def expert_table(self) -> NDArray[np.int64]:
        """Where each expert lies in `data`, and its precision: int64 [L, E, 2]; -1 in a dense layer."""
        spec = self.spec
        table = np.full((spec.layers, max(1, spec.experts), 2), -1, np.int64)
        for layer in range(spec.first_layer, spec.last_layer):
            for expert in range(spec.experts if spec.has_experts(layer) else 0):
                tensor = self.tensors[expert_name(layer, expert)]
                table[layer, expert] = tensor.offset, QUANTS.index(tensor.quant)
        return table

    def expert_quants(self, layer: int) -> list[int]:
        """The precision of each expert of a layer, and of each stand-in that there is."""
        names = (name(layer, e) for name in (expert_name, stand_in_name) for e in range(self.spec.experts))
        return [QUANTS.index(self.tensors[name].quant) for name in names if name in self.tensors]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def padded(width: int) -> int:
    """A row's width in whole groups of 32: what every buffer row has."""
    return -(-width // 32) * 32


@dataclass(frozen=True, slots=True)
class Rows:
    """A float buffer [rows, stride], and the same rows quantised."""

    at: int  # element of the float array
    stride: int  # elements from row to row, a multiple of 32
    groups: int  # of 32 in a row
    quantized: int  # group where the quantised rows start; -1 for a buffer that is never quantised


class Layout:
    """Hands out spans while a run is planned; its totals are the arrays' sizes."""

    def __init__(self) -> None:
        self.floats = 0
        self.groups = 0
        self.words = 0
        self.spare = 0  # bytes

    def rows(self, count: int, width: int, *, quantized: bool = False) -> Rows:
        """A buffer of `count` rows of `width` values."""
        stride = padded(width)
        at, self.floats = self.floats, self.floats + count * stride
        if not quantized:
            return Rows(at, stride, stride // 32, -1)
        first, self.groups = self.groups, self.groups + count * stride // 32
        return Rows(at, stride, stride // 32, first)

    def integers(self, count: int) -> int:
        """The place of `count` whole numbers."""
        at, self.words = self.words, self.words + count
        return at


class RunState:
    """The arrays of one run. Zeroed: the padding of every row stays zero."""

    def __init__(self, layout: Layout, config: EngineConfig) -> None:
        self.f: NDArray[np.float32] = np.zeros(layout.floats, np.float32)
        self.spare: NDArray[np.uint8] = np.zeros(layout.spare, np.uint8)
        self.xq: NDArray[np.int8] = np.zeros(layout.groups * 32, np.int8)  # quantised rows
        self.xs: NDArray[np.float32] = np.zeros(layout.groups, np.float32)  # their scales
        self.xn: NDArray[np.int32] = np.zeros(layout.groups, np.int32)  # their sums
        width = max(config.chunk, MAX_OUTPUTS)
        self.rows: NDArray[np.int64] = np.zeros((TOKEN_WORDS, width), np.int64)  # see program.py
        self.paths: NDArray[np.int64] = np.zeros(MAX_OUTPUTS * PATH, np.int64)
        self.tree: list[list[int]] = []  # slots from the top to each row of the last tree
        self.routes: NDArray[np.int64] = np.zeros(max(1, layout.words), np.int64)  # see kernels/routing.py

    @property
    def nbytes(self) -> int:
        """Memory of all arrays, in bytes."""
        arrays = (self.f, self.xq, self.xs, self.xn, self.rows, self.paths, self.routes, self.spare)
        return sum(a.nbytes for a in arrays)
