"""Attention in a graph: one operator, or spelled out in products and a softmax."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgert.converters.onnx.graph import NORM, Graph, Node
from edgert.converters.onnx.linear import Linear, linear
from edgert.converters.onnx.rotary import Turn, of_tables, rotated

Floats = NDArray[np.float32]
# Exporters spell out how many heads there are in shapes computed at run time; what is known of the order
# of values is the order of axes, and these orders keep a head's values together.
ARRANGING: Final = ("Reshape", "Unsqueeze", "Squeeze", "Expand", "Transpose")
ORDERS: Final = {(0, 2, 1, 3), (0, 2, 3, 1), (0, 1, 3, 2), (0, 2, 1)}


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm: gain * x / sqrt(mean of x^2 + eps)."""

    gain: Floats
    eps: float
    input: str


@dataclass(frozen=True, slots=True)
class Attention:
    """q, k and v of one attention, before the output projection."""

    q: Linear
    k: Linear
    v: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    turn: Turn
    heads: int
    kv_heads: int
    window: int | None  # keys visible, 0 for all; None where only a computed mask says


def norm(graph: Graph, value: str) -> Norm | None:
    """The RMSNorm that makes a value, as an operator or spelled out; None if none does."""
    node = graph.producer(value)
    if node.op in (NORM, "RMSNormalization") and len(node.inputs) == 2:
        gain = graph.vector(node.inputs[1])
        if gain is None or node.attributes.get("axis", -1) not in (-1, 2, 3):
            raise graph.unexpected(value, "a norm over the last axis with constant gains")
        return Norm(gain, node.real("epsilon", 1e-5), node.inputs[0])
    if node.op != "Mul":
        return None
    for name, scaled in (node.inputs, node.inputs[::-1]):
        gain = graph.vector(name)
        found = None if gain is None else _scaled(graph, scaled)
        if gain is not None and found is not None:
            return Norm(gain, found[1], found[0])
    return None


def _scaled(graph: Graph, value: str) -> tuple[str, float] | None:
    """x and eps of x / sqrt(mean(x^2) + eps), in any of its spellings."""
    node = graph.made_by(value, "Mul", "Div")
    if node is None:
        return None
    for x, other in (node.inputs, node.inputs[::-1]) if node.op == "Mul" else (node.inputs,):
        root = graph.producer(other)
        if node.op == "Mul":
            match root.op:
                case "Reciprocal":
                    root = graph.producer(root.inputs[0])
                case "Div" if graph.number(root.inputs[0]) == 1:
                    root = graph.producer(root.inputs[1])
                case _:
                    continue
        total = graph.made_by(root.inputs[0], "Add") if root.op == "Sqrt" else None
        for mean, eps in (total.inputs, total.inputs[::-1]) if total else ():
            average, number = graph.made_by(mean, "ReduceMean"), graph.number(eps)
            square = average and graph.made_by(average.inputs[0], "Pow", "Mul")
            if square and number is not None and _is_square(graph, square, x):
                return x, float(np.float32(number))
    return None


def _is_square(graph: Graph, node: Node, x: str) -> bool:
    if node.op == "Mul":
        return node.inputs == (x, x)
    return node.inputs[0] == x and graph.number(node.inputs[1]) == 2


def attention(graph: Graph, value: str) -> Attention:
    """The attention that makes the input of an output projection; UnsupportedError for anything else."""
    value = _unscaled(graph, value)
    if node := graph.made_by(value, "GroupQueryAttention"):
        return _one_operator(graph, node)
    if node := graph.made_by(value, "MultiHeadAttention"):
        return _many_heads(graph, node)
    if node := graph.made_by(value, "MatMul"):
        return _spelled_out(graph, node)
    raise graph.unexpected(
        value, "GroupQueryAttention, MultiHeadAttention, or a product of a softmax with values"
    )


def _one_operator(graph: Graph, node: Node) -> Attention:
    made, given = node.outputs[0], node.attributes
    heads, kv_heads = node.whole("num_heads", 0), node.whole("kv_num_heads", 0)
    neutral = {"rotary_interleaved": 0, "softcap": 0.0, "smooth_softmax": 0, "qk_output": 0}
    if not 0 < kv_heads <= heads or any(given.get(key, value) != value for key, value in neutral.items()):
        raise graph.unexpected(made, "heads, no soft cap and a rotary embedding of halves")
    if node.input(10) or node.input(11):
        raise graph.unexpected(made, "attention without a bias or sinks")
    turn = of_tables(graph, node.input(7), node.input(8)) if given.get("do_rotary", 0) else None
    names = node.inputs[:3]
    if not node.input(1):  # q, k and v side by side
        packed = _projection(graph, node.inputs[0])
        size, rest = divmod(packed.matrix.count, heads + 2 * kv_heads)
        if rest or turn is None:
            raise graph.unexpected(node.inputs[0], f"q, k and v of {heads} and {kv_heads} heads, turned")
        at, part = size * heads, size * kv_heads
        q, k, v = packed.part(0, at), packed.part(at, part), packed.part(at + part, part)
        found = Attention(q, k, v, None, None, turn, heads, kv_heads, 0)
    else:
        q, q_norm, q_turn = _head(graph, names[0], turn)
        k, k_norm, k_turn = _head(graph, names[1], turn)
        if not q_turn.equals(k_turn):
            raise graph.unexpected(made, "q and k turned alike")
        v = _projection(graph, _unscaled(graph, names[2]))
        found = Attention(q, k, v, q_norm, k_norm, q_turn, heads, kv_heads, 0)
    _check_scale(graph, found, node.real("scale", 0.0), made)
    window = node.whole("local_window_size", -1)
    if window < -1:
        raise graph.unexpected(made, "local_window_size of -1 or more")
    return _with_window(found, 0 if window < 0 else window)


def _many_heads(graph: Graph, node: Node) -> Attention:
    """A key head for each query head; q and k are turned before it, and it sees what a mask lets it see."""
    made, heads = node.outputs[0], node.whole("num_heads", 0)
    if heads < 1 or not (node.input(1) and node.input(2)):
        raise graph.unexpected(made, "heads, and q, k and v apart")
    if node.input(3):
        raise graph.unexpected(made, "attention without a bias of its own")
    if node.attributes.get("unidirectional", 0) != 1 and not node.input(5):
        raise graph.unexpected(made, "attention under a mask, or to what lies before alone")
    q, q_norm, turn = _head(graph, node.inputs[0], None)
    k, k_norm, k_turn = _head(graph, node.inputs[1], None)
    if not turn.equals(k_turn):
        raise graph.unexpected(made, "q and k turned alike")
    v = _projection(graph, _unscaled(graph, node.inputs[2]))
    window = None if node.input(5) else 0
    found = Attention(q, k, v, q_norm, k_norm, turn, heads, heads, window)
    _check_scale(graph, found, node.real("scale", 0.0), made)
    return found


def _with_window(found: Attention, window: int) -> Attention:
    a = found
    return Attention(a.q, a.k, a.v, a.q_norm, a.k_norm, a.turn, a.heads, a.kv_heads, window)


def _spelled_out(graph: Graph, node: Node) -> Attention:
    made = node.outputs[0]
    weights = _softmax(graph, node.inputs[0])
    scores = graph.producer(weights.input(0))
    product, factor = weights.input(0), 1.0
    masked = scores.op in ("Add", "Where")
    if masked:
        sides = scores.inputs if scores.op == "Add" else scores.inputs[1:]
        products = [side for side in sides if graph.made_by(_arranged(graph, side)[0], "MatMul")]
        if len(products) != 1:
            raise graph.unexpected(weights.inputs[0], "scores and a mask")
        product, factor = _arranged(graph, products[0])
    both = graph.made_by(product, "MatMul")
    if both is None or not masked:
        raise graph.unexpected(product, "scores of q and k under a mask")
    q_name, q_factor = _arranged(graph, both.inputs[0])
    k_name, k_factor = _arranged(graph, both.inputs[1])
    v_name, v_factor = _arranged(graph, node.inputs[1])
    q, q_norm, turn = _head(graph, q_name, None)
    k, k_norm, k_turn = _head(graph, k_name, None)
    if not turn.equals(k_turn) or v_factor != 1:
        raise graph.unexpected(made, "q and k turned alike, and v as it is")
    v = _projection(graph, v_name)
    size = 2 * len(turn.frequencies)
    if q.matrix.count % size or k.matrix.count % size:
        raise graph.unexpected(made, f"q and k of whole heads of {size} values")
    heads, kv_heads = q.matrix.count // size, k.matrix.count // size
    found = Attention(q, k, v, q_norm, k_norm, turn, heads, kv_heads, None)
    _check_scale(graph, found, factor * q_factor * k_factor, made)
    return found


def _check_scale(graph: Graph, found: Attention, scale: float, made: str) -> None:
    size = found.q.matrix.count // found.heads
    if 2 * len(found.turn.frequencies) != size or found.v.matrix.count != found.k.matrix.count:
        raise graph.unexpected(made, f"heads of {size} values, turned whole")
    if found.k.matrix.count != size * found.kv_heads or found.q.matrix.count != size * found.heads:
        raise graph.unexpected(made, f"{found.heads} and {found.kv_heads} heads of {size} values")
    if scale and not abs(scale * size**0.5 - 1) <= 2e-3:  # 16-bit exports round it
        raise graph.unexpected(made, f"scores multiplied by {size**-0.5:.4g}, not {scale:.4g}")


def _softmax(graph: Graph, value: str) -> Node:
    """Behind torch's guard, which makes rows without any visible key 0 instead of NaN."""
    guard = graph.made_by(value, "Where")
    if guard and graph.made_by(guard.inputs[0], "IsNaN") and graph.number(guard.inputs[1]) == 0:
        value = guard.inputs[2]
    node = graph.made_by(value, "Softmax")
    if node is None or node.attributes.get("axis", -1) not in (-1, 3):
        raise graph.unexpected(value, "a softmax over keys")
    return node


def _head(graph: Graph, value: str, turn: Turn | None) -> tuple[Linear, Norm | None, Turn]:
    """The projection, norm and turn behind q or k; `turn` if the operator itself turns."""
    if turn is None:
        found = rotated(graph, _unscaled(graph, value))
        if found is None:
            raise graph.unexpected(value, "a rotary embedding")
        value, turn = found
    value = _unscaled(graph, value)
    normed = norm(graph, value)
    if normed is not None:
        value = _unscaled(graph, normed.input)
    return _projection(graph, value), normed, turn


def _projection(graph: Graph, value: str) -> Linear:
    found = linear(graph, value)
    if found is None:
        raise graph.unexpected(value, "a product with constant weights")
    return found


def _arranged(graph: Graph, value: str) -> tuple[str, float]:
    """Back through what moves values but does not change them, caches and constant factors.

    Returns the value there and the product of the factors.
    """
    factor = 1.0
    while True:
        node = graph.producer(value)
        if node.op in ARRANGING:
            if node.op == "Reshape" and graph.made_by(node.inputs[0], "Gemm"):
                return value, factor  # `linear` sees to it
            if node.op == "Transpose" and node.attributes.get("perm") not in ORDERS:
                raise graph.unexpected(value, "axes in an order that keeps heads whole")
            value = node.inputs[0]
        elif node.op in ("Mul", "Div") and (number := graph.number(node.inputs[1])):
            value, factor = node.inputs[0], factor * (number if node.op == "Mul" else 1 / number)
        elif node.op == "Mul" and (number := graph.number(node.inputs[0])):
            value, factor = node.inputs[1], factor * number
        elif node.op == "Concat" and _is_given(graph, node.inputs[0]) and len(node.inputs) == 2:
            value = node.inputs[1]  # after the cache
        elif node.op == "Concat" and len(node.inputs) == 1:
            value = node.inputs[0]
        else:
            return value, factor


def _unscaled(graph: Graph, value: str) -> str:
    """As `_arranged`, where there may be no factors: only those of scores are accounted for."""
    found, factor = _arranged(graph, value)
    if factor != 1:
        raise graph.unexpected(value, "a value that is not scaled")
    return found


def _is_given(graph: Graph, value: str) -> bool:
    """Whether a value is an input of the model, as caches are."""
    while (node := graph.made_by(value, "Concat", *ARRANGING)) and (
        node.op != "Concat" or len(node.inputs) == 1
    ):
        value = node.inputs[0]
    return value in graph.inputs
