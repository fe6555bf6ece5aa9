"""Matrix products of a graph and their weights, floats or whole numbers in blocks."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgert.config import Quant
from edgert.converters.onnx.graph import Graph, Node
from edgert.converters.onnx.tensors import FLOATS, OnnxTensor, to_float32
from edgert.converters.quantize import Codes
from edgert.errors import UnsupportedError
from edgert.kernels.packing import GROUP

Floats = NDArray[np.float32]
KEPT: Final[dict[str, Quant]] = {"FLOAT": "f32", "FLOAT16": "f16", "BFLOAT16": "f16"}


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows `first` to `first` + `count` of a weight W [N, K]; a product is x W^T."""

    tensor: OnnxTensor  # [N, K], or [K, N] if transposed
    transposed: bool
    first: int
    count: int
    columns: int

    def part(self, first: int, count: int) -> "Matrix":
        """Some of its rows."""
        return replace(self, first=self.first + first, count=count)

    def rows(self, slab_rows: int) -> Iterator[Floats | Codes]:
        """In slabs of `slab_rows` rows, the last maybe shorter."""
        for start in range(self.first, self.first + self.count, slab_rows):
            yield self._slab(start, min(start + slab_rows, self.first + self.count))

    @property
    def stored_as(self) -> str:
        """ONNX's name of its type."""
        return self.tensor.kind

    @property
    def kept_as(self) -> Quant:
        """The least of ours that holds it without loss (bfloat16: with three more bits)."""
        return KEPT[self.tensor.kind]

    def _slab(self, start: int, end: int) -> Floats | Codes:
        data = self.tensor.data
        cut = data[:, start:end].T if self.transposed else data[start:end]
        return to_float32(np.ascontiguousarray(cut), self.tensor.kind)


@dataclass(frozen=True, slots=True)
class BlockMatrix(Matrix):
    """As MatMulNBits has it: scale * (whole number - zero point), a scale for every `block` columns."""

    bits: int
    block: int
    scales: OnnxTensor  # N * blocks values
    zeros: OnnxTensor | None  # N rows of `blocks` numbers, packed like the weights; None: the middle

    @property
    def stored_as(self) -> str:
        """Bits and block, as int4x32."""
        return f"int{self.bits}x{self.block}"

    @property
    def kept_as(self) -> Quant:
        """q4 for four bits around the middle, which ours has too; with zero points they take five bits."""
        return "q4" if self.bits == 4 and self.zeros is None else "q8"

    def _slab(self, start: int, end: int) -> Floats | Codes:
        blocks = -(-self.columns // self.block)
        rows = self.tensor.data.reshape(-1, self.tensor.data.size // self._all_rows())[start:end]
        values = _unpacked(rows, self.bits)[:, : blocks * self.block].astype(np.int16)
        scales = to_float32(self.scales.data.reshape(-1, blocks)[start:end], self.scales.kind)
        middle = np.full((end - start, blocks), 1 << (self.bits - 1), np.float32)
        if self.zeros is not None:
            zeros = self.zeros.data.reshape(self._all_rows(), -1)[start:end]
            packed = self.zeros.kind == "UINT8"
            middle = (
                _unpacked(zeros, self.bits)[:, :blocks].astype(np.float32)
                if packed
                else (to_float32(zeros, self.zeros.kind))
            )
        whole = bool((middle == np.rint(middle)).all()) and self.block % GROUP == 0
        moved = values.reshape(end - start, blocks, self.block) - middle[:, :, None]
        if whole and np.abs(moved).max(initial=0) <= 127:
            codes = moved.reshape(end - start, -1)[:, : self.columns].astype(np.int8)
            per_group = np.repeat(scales, self.block // GROUP, axis=1)[:, : -(-self.columns // GROUP)]
            return Codes(codes, np.ascontiguousarray(per_group))
        weights = (moved * scales[:, :, None]).reshape(end - start, -1)[:, : self.columns]
        return np.ascontiguousarray(weights, np.float32)

    def _all_rows(self) -> int:
        return self.scales.data.size // -(-self.columns // self.block)


@dataclass(frozen=True, slots=True)
class Linear:
    """x W^T, maybe with a bias."""

    matrix: Matrix
    bias: Floats | None  # [N]
    input: str

    def part(self, first: int, count: int) -> "Linear":
        """What gives some of the outputs."""
        bias = None if self.bias is None else self.bias[first : first + count]
        return Linear(self.matrix.part(first, count), bias, self.input)


def linear(graph: Graph, value: str) -> Linear | None:
    """The product with a constant matrix that makes a value; None if nothing of the kind does."""
    node = graph.producer(value)
    match node.op:
        case "Add" if len(node.inputs) == 2:
            for bias, product in (node.inputs, node.inputs[::-1]):
                found, values = graph.vector(bias), None
                if found is not None:
                    values = linear(graph, product) if graph.producer(product).op != "Add" else None
                if values is not None and found is not None and values.bias is None:
                    return replace(values, bias=found) if len(found) == values.matrix.count else None
        case "MatMul" if len(node.inputs) == 2:
            matrix = float_matrix(graph, node.inputs[1], transposed=True)
            return Linear(matrix, None, node.inputs[0]) if matrix else None
        case "Gemm" if len(node.inputs) >= 2:
            return _gemm(graph, node)
        case "Reshape" if graph.made_by(node.input(0), "Gemm"):  # rows flattened around it
            found_gemm = linear(graph, node.inputs[0])
            inner = found_gemm and graph.made_by(found_gemm.input, "Reshape")
            return replace(found_gemm, input=inner.inputs[0]) if found_gemm and inner else None
        case "MatMulNBits" if len(node.inputs) >= 3:
            return _blocks(graph, node)
        case "Split":
            return _split(graph, node, value)
    return None


def float_matrix(graph: Graph, value: str, transposed: bool) -> Matrix | None:
    """A constant of two dimensions; `transposed` for [K, N]."""
    turn = graph.made_by(value, "Transpose")
    if (
        turn is not None
        and turn.input(0) in graph.constants
        and turn.attributes.get("perm", (1, 0)) == (1, 0)
    ):
        return float_matrix(graph, turn.input(0), not transposed)
    tensor = graph.constants.get(value)
    if tensor is None or tensor.kind not in FLOATS or len(tensor.shape) != 2 or not tensor.data.size:
        return None
    rows, columns = tensor.shape[::-1] if transposed else tensor.shape
    return Matrix(tensor, transposed, 0, rows, columns)


def _gemm(graph: Graph, node: Node) -> Linear | None:
    plain = all(node.attributes.get(key, 1.0) == 1.0 for key in ("alpha", "beta"))
    if not plain or node.attributes.get("transA", 0):
        return None
    matrix = float_matrix(graph, node.inputs[1], transposed=not node.attributes.get("transB", 0))
    bias = graph.vector(node.input(2)) if node.input(2) else None
    if matrix is None or (node.input(2) and (bias is None or len(bias) != matrix.count)):
        return None
    return Linear(matrix, bias, node.inputs[0])


def _split(graph: Graph, node: Node, value: str) -> Linear | None:
    """Some of the outputs of a product of several matrices at once."""
    whole = None if graph.made_by(node.input(0), "Split") else linear(graph, node.input(0))
    if whole is None or node.attributes.get("axis", 0) not in (-1, 2):
        return None
    lengths = graph.constants.get(node.input(1))
    count, parts = whole.matrix.count, len(node.outputs)
    if lengths is not None and (lengths.kind != "INT64" or lengths.data.size != parts):
        return None
    sizes = [count // parts] * parts if lengths is None else [int(n) for n in lengths.data.reshape(-1)]
    if sum(sizes) != count or min(sizes) <= 0 or len(sizes) != parts:
        return None
    place = node.outputs.index(value)
    return whole.part(sum(sizes[:place]), sizes[place])


def _blocks(graph: Graph, node: Node) -> Linear | None:
    if node.input(4):
        raise graph.unexpected(node.outputs[0], "columns in order, without g_idx")
    sizes = {key: node.whole(key, 0) for key in ("N", "K", "block_size")}
    matrix = block_matrix(graph, node, sizes["N"], sizes["K"], node.inputs[1:4])
    bias = graph.vector(node.input(5)) if node.input(5) else None
    if node.input(5) and (bias is None or len(bias) != matrix.count):
        raise graph.unexpected(node.input(5), "a constant bias")
    return Linear(matrix, bias, node.inputs[0])


def block_matrix(graph: Graph, node: Node, rows: int, columns: int, names: tuple[str, ...]) -> BlockMatrix:
    """The weights, scales and maybe zero points of MatMulNBits or GatherBlockQuantized."""
    bits, block = node.whole("bits", 4), node.whole("block_size", 128)
    reshaped = graph.made_by(names[0], "Reshape")
    weights = graph.constants.get(reshaped.input(0) if reshaped else names[0])
    scales = graph.constants.get(names[1])
    zeros = graph.constants.get(names[2]) if len(names) > 2 and names[2] else None
    good = bits in (2, 4, 8) and 16 <= block <= 1 << 16 and block & (block - 1) == 0 and rows > 0 < columns
    if good and weights is not None and scales is not None and (zeros is not None or not "".join(names[2:])):
        blocks = -(-columns // block)
        sizes = {"UINT8": rows * -(-blocks * bits // 8)} | dict.fromkeys(FLOATS, rows * blocks)
        good = (
            weights.kind == "UINT8"
            and weights.data.size == rows * blocks * block * bits // 8
            and scales.kind in FLOATS
            and scales.data.size == rows * blocks
            and (zeros is None or zeros.data.size == sizes.get(zeros.kind))
        )
        if good:
            return BlockMatrix(weights, False, 0, rows, columns, bits, block, scales, zeros)
    raise UnsupportedError(
        f"{graph.path}: found {node.op} of {bits} bits in blocks of {block} for {rows} x {columns}, expected "
        "2, 4 or 8 bits in constants of those sizes; export the model again"
    )


def _unpacked(packed: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """[N, bytes] to [N, bytes * 8 / bits], the lowest bits first."""
    flat = np.ascontiguousarray(packed).view(np.uint8)
    if bits == 8:
        return flat
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    apart: NDArray[np.uint8] = flat[:, :, None] >> shifts & np.uint8((1 << bits) - 1)
    return apart.reshape(len(flat), -1)
