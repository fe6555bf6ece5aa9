"""From a graph to the decoder it computes, walked backwards from the logits; no name matters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from edgert.config import Activation
from edgert.converters.architectures.windows import MAX_LAYERS
from edgert.converters.onnx.attention import Attention, Norm, attention, norm
from edgert.converters.onnx.graph import Graph, Node
from edgert.converters.onnx.linear import Linear, Matrix, block_matrix, float_matrix, linear
from edgert.errors import NotAModelError


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, as it computes: norms before attention and before the feed-forward."""

    attention_norm: Norm
    attention: Attention
    o: Linear
    ffn_norm: Norm
    gate: Linear
    up: Linear
    down: Linear
    activation: Activation


@dataclass(frozen=True, slots=True)
class Found:
    """A whole decoder."""

    embedding: Matrix
    layers: tuple[Layer, ...]
    output_norm: Norm
    output: Matrix
    tokens: str  # the input of token ids
    logits: str  # the output


def find_decoder(graph: Graph) -> Found:
    """The decoder of a graph.

    Raises UnsupportedError naming the first operation, from the logits backwards, that a decoder of the
    Llama family does not have.
    """
    logits, head = _head(graph)
    last = norm(graph, head.input)
    if last is None:
        raise graph.unexpected(head.input, "an RMSNorm before the output matrix")
    if head.bias is not None:
        raise graph.unexpected(logits, "an output matrix without a bias")
    layers: list[Layer] = []
    value = last.input
    while graph.producer(value).op == "Add":
        if len(layers) == MAX_LAYERS:
            raise graph.unexpected(value, f"at most {MAX_LAYERS} layers")
        layer, value = _layer(graph, value)
        layers.append(layer)
    if not layers:
        raise graph.unexpected(value, "the sum of a layer's input and its output")
    embedding, tokens = _embedding(graph, value)
    return Found(embedding, tuple(reversed(layers)), last, head.matrix, tokens, logits)


def _head(graph: Graph) -> tuple[str, Linear]:
    """The first output that is a product with constant weights."""
    for value in graph.outputs:
        found = linear(graph, value)
        if found is not None:
            return value, found
    first = graph.producer(graph.outputs[0])
    if first.op == "If":
        raise graph.unexpected(graph.outputs[0], "one graph; export the model without merging its decoders")
    raise NotAModelError(
        f"{graph.path}: found no output that is a product with constant weights (the first comes from "
        f"{first.op}), expected the logits of a language model; convert an export of a decoder"
    )


def _layer(graph: Graph, value: str) -> tuple[Layer, str]:
    """The layer that ends in a sum, and the value that it starts from."""
    middle, down = _branch(graph, value, "a feed-forward")
    gate, up, activation = _feed_forward(graph, down.input)
    ffn_norm = _norm_of(graph, gate, middle)
    if up.input != gate.input:
        raise graph.unexpected(up.input, "gate and up of the same rows")
    start, o = _branch(graph, middle, "attention")
    found = attention(graph, o.input)
    attention_norm = _norm_of(graph, found.q, start)
    if not found.q.input == found.k.input == found.v.input:
        raise graph.unexpected(found.k.input, "q, k and v of the same rows")
    return Layer(attention_norm, found, o, ffn_norm, gate, up, down, activation), start


def _branch(graph: Graph, value: str, what: str) -> tuple[str, Linear]:
    """The sides of a residual sum: what goes on, and the product that is added to it."""
    node = graph.made_by(value, "Add")
    if node is None or len(node.inputs) != 2:
        raise graph.unexpected(value, f"the sum of a value and of {what} of it")
    found = [(other, linear(graph, side)) for side, other in (node.inputs, node.inputs[::-1])]
    branches = [(other, product) for other, product in found if product is not None]
    if len(branches) != 1:
        raise graph.unexpected(value, f"the sum of a value and of {what} of it")
    return branches[0]


def _norm_of(graph: Graph, projection: Linear, residual: str) -> Norm:
    found = norm(graph, projection.input)
    if found is None:
        raise graph.unexpected(projection.input, "an RMSNorm before a projection")
    if found.input != residual:
        raise graph.unexpected(found.input, "a norm of what the layer's output is added to")
    return found


def _feed_forward(graph: Graph, value: str) -> tuple[Linear, Linear, Activation]:
    """gate, up and the activation of act(gate) * up."""
    node = graph.made_by(value, "Mul")
    for active, plain in (node.inputs, node.inputs[::-1]) if node else ():
        up, behind = linear(graph, plain), _activation(graph, active)
        gate = linear(graph, behind[0]) if behind else None
        if up is not None and gate is not None and behind is not None:
            return gate, up, behind[1]
    raise graph.unexpected(value, "a gated feed-forward: an activation of one product times another")


def _activation(graph: Graph, value: str) -> tuple[str, Activation] | None:
    """What an activation is of, and which it is."""
    node = graph.producer(value)
    return _ACTIVATIONS[node.op](graph, node) if node.op in _ACTIVATIONS else None


def _of_product(graph: Graph, node: Node) -> tuple[str, Activation] | None:
    for x, other in (node.inputs, node.inputs[::-1]):
        gated = graph.made_by(other, "Sigmoid")
        if gated and gated.inputs[0] == x:
            return x, "silu"
    rectified = graph.made_by(node.inputs[0], "Relu")
    if rectified and node.inputs[0] == node.inputs[1]:
        return rectified.inputs[0], "relu2"
    return None


def _of_power(graph: Graph, node: Node) -> tuple[str, Activation] | None:
    rectified = graph.made_by(node.inputs[0], "Relu")
    return (rectified.inputs[0], "relu2") if rectified and graph.number(node.inputs[1]) == 2 else None


def _of_gelu(graph: Graph, node: Node) -> tuple[str, Activation] | None:
    is_tanh = node.op == "FastGelu" or node.attributes.get("approximate") == "tanh"
    return (node.inputs[0], "gelu_tanh") if is_tanh and not node.input(1) else None


def _of_swish(graph: Graph, node: Node) -> tuple[str, Activation] | None:
    usual = {"QuickGelu": 1.702, "Swish": 1.0}[node.op]
    return (node.inputs[0], "silu") if node.attributes.get("alpha", usual) == 1 else None


_ACTIVATIONS: Final[dict[str, Callable[[Graph, Node], tuple[str, Activation] | None]]] = {
    "Mul": _of_product,
    "Pow": _of_power,
    "Relu": lambda _graph, node: (node.inputs[0], "relu"),
    "Gelu": _of_gelu,
    "FastGelu": _of_gelu,
    "QuickGelu": _of_swish,
    "Swish": _of_swish,
}


def _embedding(graph: Graph, value: str) -> tuple[Matrix, str]:
    """The token embedding and the name of the token ids."""
    node = graph.producer(value)
    matrix: Matrix | None = None
    if node.op == "Gather" and node.attributes.get("axis", 0) == 0:
        matrix = float_matrix(graph, node.inputs[0], transposed=False)
    elif node.op == "GatherBlockQuantized" and node.attributes.get("gather_axis", 0) == 0:
        matrix = _quantized_rows(graph, node)
    if matrix is None or node.input(1) not in graph.inputs:
        raise graph.unexpected(value, "rows of a constant matrix, looked up by token id")
    return matrix, node.inputs[1]


def _quantized_rows(graph: Graph, node: Node) -> Matrix | None:
    scales = graph.constants.get(node.input(2))
    reshaped = graph.made_by(node.input(0), "Reshape")
    weights = graph.constants.get(reshaped.input(0) if reshaped else node.input(0))
    if scales is None or weights is None or len(weights.shape) < 2 or weights.kind != "UINT8":
        return None
    bits, rows = node.whole("bits", 4), weights.shape[0]
    columns = weights.data.size // max(1, rows) * 8 // max(1, bits)
    names = (node.inputs[0], node.inputs[2], node.input(3))
    return block_matrix(graph, node, rows, columns, names)


def same(one: Matrix, other: Matrix) -> bool:
    """Whether two matrices hold the same weights, compared slab by slab."""
    if (one.count, one.columns) != (other.count, other.columns):
        return False
    if one.tensor is other.tensor and one.transposed == other.transposed and one.first == other.first:
        return True
    step = max(1, (1 << 20) // one.columns)
    for a, b in zip(one.rows(step), other.rows(step), strict=True):
        if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray) or not np.array_equal(a, b):
            return False
    return True
