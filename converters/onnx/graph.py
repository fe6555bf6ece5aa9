"""An ONNX file as a graph to be read backwards: bounded, in order, in a smaller vocabulary.

What exporters write in several ways is brought to one: casts, identities and constants vanish, and a norm
that adds first (SkipSimplifiedLayerNormalization) becomes an addition and a norm.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edgert.converters.hf_config import shown
from edgert.converters.onnx.merged import Flat, flattened
from edgert.converters.onnx.tensors import FLOATS, ExternalFiles, OnnxTensor, read_tensor, to_float32
from edgert.errors import ConversionError, NotAModelError, UnsupportedError

# A protobuf cannot be larger; larger models keep their weights in files beside it.
MAX_BYTES: Final = 1 << 31
DOMAINS: Final = frozenset({"", "ai.onnx", "com.microsoft"})
TRANSPARENT: Final = frozenset({"Cast", "CastLike", "Identity", "Dropout"})
SKIP_NORM: Final = "SkipSimplifiedLayerNormalization"
NORM: Final = "SimplifiedLayerNormalization"
# How many inputs the operations that are looked at have at least; those of two have no third.
LEAST: Final = (
    dict.fromkeys(("Add", "Mul", "Div", "Pow", "MatMul", NORM, "Gather", "Gemm"), 2)
    | dict.fromkeys(("Where", "MatMulNBits", "GatherBlockQuantized", SKIP_NORM), 3)
    | dict.fromkeys(("GroupQueryAttention", "MultiHeadAttention"), 3)
    | dict.fromkeys(("Reshape", "Unsqueeze", "Squeeze", "Expand", "Transpose", "Slice", "Split", "Concat"), 1)
    | dict.fromkeys(("Neg", "Sqrt", "Reciprocal", "ReduceMean", "Softmax", "Sigmoid", "Relu", "IsNaN"), 1)
    | dict.fromkeys(("Gelu", "FastGelu", "QuickGelu", "Swish", "Cos", "Sin", "RotaryEmbedding"), 1)
)
EXACT: Final = frozenset({"Add", "Mul", "Div", "Pow", "MatMul"})
_AGAIN: Final = "download the file again"


@dataclass(frozen=True, slots=True)
class Node:
    """One operation; an input that is left out is ""."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)  # numbers, lists of them, and texts

    def input(self, place: int) -> str:
        """The value at a place, "" for none."""
        return self.inputs[place] if place < len(self.inputs) else ""

    def whole(self, key: str, default: int) -> int:
        """An attribute that is a whole number; one that is none fits nothing."""
        value = self.attributes.get(key, default)
        return value if isinstance(value, int) else -(1 << 62)

    def real(self, key: str, default: float) -> float:
        """An attribute that is a number; one that is none fits nothing."""
        value = self.attributes.get(key, default)
        return float(value) if isinstance(value, int | float) else float("nan")


@dataclass(frozen=True, slots=True)
class Graph:
    """The operations of a model by what they make."""

    path: Path
    producers: Mapping[str, Node]
    constants: Mapping[str, OnnxTensor]
    inputs: frozenset[str]
    outputs: tuple[str, ...]

    def producer(self, value: str) -> Node:
        """What makes a value; a node named after what it is where no operation does."""
        if value in self.producers:
            return self.producers[value]
        return Node("a constant" if value in self.constants else "an input of the model", (), (value,))

    def made_by(self, value: str, *ops: str) -> Node | None:
        """What makes a value, if it is one of `ops`."""
        node = self.producers.get(value)
        return node if node is not None and node.op in ops else None

    def number(self, value: str) -> float | None:
        """A constant of one value; None for anything else."""
        tensor = self.constants.get(value)
        if tensor is None or tensor.data.size != 1:
            return None
        values = to_float32(tensor.data, tensor.kind) if tensor.kind in FLOATS else tensor.data
        return float(values.reshape(-1)[0])

    def vector(self, value: str) -> NDArray[np.float32] | None:
        """A constant along the last axis, flattened; None for anything else."""
        tensor = self.constants.get(value)
        if tensor is None or tensor.kind not in FLOATS or not tensor.shape:
            return None
        return tensor.floats().reshape(-1) if tensor.data.size == tensor.shape[-1] else None

    def unexpected(self, value: str, expected: str) -> UnsupportedError:
        """The error for a value that is not made as a decoder makes it."""
        return UnsupportedError(
            f"{self.path}: found {self.producer(value).op} making {shown(value)}, expected {expected}; "
            "convert an export of a decoder of the Llama family, or the model it was made from"
        )


def open_graph(path: Path) -> Graph:
    """The graph of an ONNX file; nothing of it is run, and weights in other files are mapped.

    Raises NotAModelError for what is no ONNX file, ConversionError for a damaged one, UnsupportedError for
    operators of unknown domains, sparse initialisers and functions.
    """
    proto = _parse(path)
    graph = flattened(proto.graph)
    # protobuf gives the bytes of a text that is not UTF-8
    wrong = next((text for text in _texts(graph) if not isinstance(text, str)), None)
    if wrong is not None:
        raise NotAModelError(f"{path}: found the name {shown(wrong)}, expected UTF-8; {_AGAIN}")
    _refuse(path, proto, graph)
    files = ExternalFiles(path)
    constants = {tensor.name: read_tensor(tensor, files, path) for tensor in graph.initializer}
    inputs = frozenset(value.name for value in graph.input) - set(constants)
    known = {*constants, *inputs, ""}
    alias: dict[str, str] = {}
    producers: dict[str, Node] = {}
    for proto_node in graph.node:
        made = [name for name in proto_node.output if name]
        missing = next((name for name in proto_node.input if name not in known), None)
        if missing is not None or len(set(made)) != len(made) or not known.isdisjoint(made):
            wrong = f"{shown(missing)} before anything makes it" if missing else f"{shown(made)} made twice"
            raise ConversionError(
                f"{path}: found {wrong} in {shown(proto_node.op_type)}, expected operations in order; "
                f"{_AGAIN}"
            )
        known.update(made)
        if proto_node.op_type == "Constant":
            constants.update(_constant(proto_node, files, path))
            continue
        ins = tuple(alias.get(name, name) for name in proto_node.input)
        if proto_node.op_type in TRANSPARENT and ins and made:
            alias[made[0]] = ins[0]
            continue
        node = Node(proto_node.op_type, ins, tuple(proto_node.output), _attributes(proto_node))
        if len(ins) < LEAST.get(node.op, 0) or (node.op in EXACT and len(ins) != 2):
            raise ConversionError(
                f"{path}: found {len(ins)} inputs of {node.op}, expected {LEAST[node.op]}; {_AGAIN}"
            )
        producers |= {name: small for small in _smaller(node) for name in small.outputs if name}
    outputs = tuple(alias.get(name, name) for name in graph.output)
    return Graph(path, producers, constants, inputs, outputs)


def _parse(path: Path) -> Any:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise ConversionError(
            f"{path}: found an ONNX model and no package onnx to read it; "
            "install it: pip install 'edgert[convert]'"
        ) from None
    try:
        if path.stat().st_size >= MAX_BYTES:
            raise ConversionError(
                f"{path}: found {path.stat().st_size:,} bytes, expected fewer than {MAX_BYTES:,}; {_AGAIN}"
            )
        proto = onnx.ModelProto()
        proto.ParseFromString(path.read_bytes())
    except OSError as error:
        raise ConversionError(
            f"{path}: cannot be read ({error.strerror}); check the file and its rights"
        ) from None
    except (DecodeError, ValueError, RuntimeError):
        raise NotAModelError(f"{path}: found no ONNX model, or a damaged one; {_AGAIN}") from None
    if not proto.graph.node or not proto.graph.output:
        raise NotAModelError(f"{path}: found a file without operations, expected an ONNX model; {_AGAIN}")
    return proto


def _texts(graph: Flat) -> Iterator[object]:
    """Every text of a graph that is looked at."""
    for node in graph.node:
        yield from (node.op_type, node.domain, *node.input, *node.output)
        for attribute in node.attribute:
            yield attribute.name
            yield from _tensor_texts(attribute.t)
    for tensor in graph.initializer:
        yield from _tensor_texts(tensor)
    yield from (value.name for value in graph.input)
    yield from graph.output


def _tensor_texts(tensor: Any) -> Iterator[object]:
    yield tensor.name
    for entry in tensor.external_data:
        yield from (entry.key, entry.value)


def _refuse(path: Path, proto: Any, graph: Flat) -> None:
    own = next((node for node in graph.node if node.domain not in DOMAINS), None)
    if own is not None:
        raise UnsupportedError(
            f"{path}: found operator {shown(own.op_type)} of domain {shown(own.domain)}, expected those of "
            "ONNX and com.microsoft; export the model without operators of its own"
        )
    if proto.functions or proto.graph.sparse_initializer:
        what = "functions" if proto.functions else "sparse initialisers"
        raise UnsupportedError(
            f"{path}: found {what}, expected plain operators and tensors; export the model without"
        )


def _constant(proto_node: Any, files: ExternalFiles, path: Path) -> Iterable[tuple[str, OnnxTensor]]:
    name = proto_node.output[0] if proto_node.output else ""
    for attribute in proto_node.attribute:
        if attribute.name == "value":
            tensor = read_tensor(attribute.t, files, path)
            return [(name, OnnxTensor(name, tensor.kind, tensor.data))]
        if attribute.name in ("value_float", "value_floats"):
            values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            return [(name, OnnxTensor(name, "FLOAT", np.array(values, np.float32)))]
        if attribute.name in ("value_int", "value_ints"):
            whole = attribute.i if attribute.name == "value_int" else list(attribute.ints)
            return [(name, OnnxTensor(name, "INT64", np.array(whole, np.int64)))]
    raise UnsupportedError(f"{path}: found constant {shown(name)} of no number; export the model again")


def _attributes(proto_node: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for given in proto_node.attribute:
        match given.type:  # the numbers of AttributeProto.AttributeType; graphs and tensors are not looked at
            case 1:
                found[given.name] = given.f
            case 2:
                found[given.name] = given.i
            case 3:
                found[given.name] = given.s.decode("utf-8", "replace")
            case 7:
                found[given.name] = tuple(given.ints)
    return found


def _smaller(node: Node) -> tuple[Node, ...]:
    """The same in operations that need no case of their own."""
    if node.op != SKIP_NORM or len(node.inputs) < 3 or not node.outputs:
        return (node,)
    total = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3] else f"{node.outputs[0]}\0sum"
    added: tuple[Node, ...] = (Node("Add", node.inputs[:2], (total,)),)
    if node.input(3):
        inner = f"{total}\0bias"
        added = Node("Add", node.inputs[:2], (inner,)), Node("Add", (inner, node.inputs[3]), (total,))
    return *added, Node(NORM, (total, node.inputs[2]), node.outputs[:1], node.attributes)
