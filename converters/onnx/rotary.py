"""Rotary embeddings in a graph: as tables of cosines and sines, or computed from frequencies."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edgert.converters.onnx.graph import Graph, Node
from edgert.converters.onnx.tensors import FLOATS, OnnxTensor

Floats = NDArray[np.float32]
# What lies between the frequencies and their cosines, and changes no value.
ARRANGING: Final = ("Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "Slice")


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """How far a pair (i, i + d/2) is turned per position."""

    frequencies: Floats  # [d/2]
    magnitude: float
    positions: int  # rows of the table; 0 where it is computed

    def equals(self, other: "Turn") -> bool:
        """Whether the two are one: all layers of a model have the same."""
        return (
            self.frequencies.shape == other.frequencies.shape
            and bool(np.allclose(self.frequencies, other.frequencies, rtol=1e-4))
            and abs(self.magnitude - other.magnitude) < 1e-3
        )


def of_tables(graph: Graph, cosines: str, sines: str) -> Turn | None:
    """From constants [positions, d/2]; None for anything else."""
    tables = [graph.constants.get(name) for name in (cosines, sines)]
    pair = [table for table in tables if table and table.kind in FLOATS and len(table.shape) == 2]
    if len(pair) != 2 or pair[0].shape != pair[1].shape or 0 in pair[0].shape:
        return None
    return _from_tables(*pair)


def _from_tables(cosines: OnnxTensor, sines: OnnxTensor) -> Turn:
    """The angle of position 1 is a frequency; those of 2, 4, 8 .. say it twice as exactly each.

    Tables of 16 bits would otherwise give frequencies that are wrong by a whole turn far out.
    """
    rows = len(cosines.data)
    tables = [OnnxTensor(t.name, t.kind, t.data[[1 << n for n in range(rows.bit_length()) if 1 << n < rows]])
              for t in (cosines, sines)]  # fmt: skip
    with np.errstate(all="ignore"):  # of a damaged table: NaN is found when it is written
        cos, sin = (table.floats().astype(np.float64) for table in tables)
        frequencies = np.zeros(cosines.shape[1])
        for step, angle in enumerate(np.arctan2(sin, cos)):
            position = 1 << step
            ahead = angle - frequencies * position
            frequencies += (ahead - np.rint(ahead / (2 * np.pi)) * 2 * np.pi) / position
        turned = frequencies.astype(np.float32)
    first = OnnxTensor(cosines.name, cosines.kind, cosines.data[:1]).floats()
    return Turn(turned, float(first[0, 0]), rows)


def rotated(graph: Graph, value: str) -> tuple[str, Turn] | None:
    """What is turned to make a value, and how; None where it is not turned."""
    node = graph.producer(value)
    if node.op == "RotaryEmbedding" and len(node.inputs) == 4:  # of com.microsoft: input, ids, cos, sin
        plain = {"interleaved": 0, "rotary_embedding_dim": 0, "scale": 1.0, "is_packed_batching": 0}
        turn = of_tables(graph, node.inputs[2], node.inputs[3])
        if turn is None or any(
            node.attributes.get(key, neutral) != neutral for key, neutral in plain.items()
        ):
            raise graph.unexpected(value, "a rotary embedding of halves of whole heads, of constant tables")
        return node.inputs[0], turn
    if node.op != "Add" or len(node.inputs) != 2:
        return None
    for plain_side, turned_side in (node.inputs, node.inputs[::-1]):
        straight, across = graph.made_by(plain_side, "Mul"), graph.made_by(turned_side, "Mul")
        if straight is None or across is None:
            continue
        for swapped, sines in (across.inputs, across.inputs[::-1]):
            source = _halves_swapped(graph, swapped)
            if source is None or source not in straight.inputs:
                continue
            cosines = straight.inputs[1] if straight.inputs[0] == source else straight.inputs[0]
            cos, sin = _computed(graph, cosines, "Cos"), _computed(graph, sines, "Sin")
            if cos is None or sin is None or not cos.equals(sin):
                raise graph.unexpected(value, "a rotary embedding of constant frequencies")
            return source, cos
    return None


def _halves_swapped(graph: Graph, value: str) -> str | None:
    """x of concat(-upper half of x, lower half of x)."""
    node = graph.made_by(value, "Concat")
    negated = graph.made_by(node.inputs[0], "Neg") if node and len(node.inputs) == 2 else None
    if node is None or negated is None:
        return None
    upper, lower = graph.producer(negated.input(0)), graph.producer(node.inputs[1])
    if upper.op == "Split" and upper is lower:
        return upper.inputs[0] if upper.outputs == (node.inputs[1], negated.inputs[0]) else None
    if upper.op != "Slice" or lower.op != "Slice" or upper.input(0) != lower.input(0):
        return None
    # The half that starts at 0 must be the one that is not negated.
    return upper.inputs[0] if graph.number(lower.input(1)) == 0 != graph.number(upper.input(1)) else None


def _computed(graph: Graph, value: str, function: str) -> Turn | None:
    """The frequencies behind cosines or sines that are computed from positions."""
    magnitude = 1.0
    while (node := graph.producer(value)).op in (*ARRANGING, "Mul"):
        value = node.inputs[0]
        if node.op == "Mul":
            factors = [graph.number(name) for name in node.inputs]
            if factors.count(None) != 1:
                return None
            value = node.inputs[factors.index(None)]
            magnitude *= next(factor for factor in factors if factor is not None)
    frequencies = _frequencies(graph, node.inputs[0]) if node.op == function else None
    return None if frequencies is None else Turn(frequencies, magnitude, 0)


def _frequencies(graph: Graph, angles: str) -> Floats | None:
    """The one constant vector that positions are multiplied by; twice side by side is once."""
    node: Node = graph.producer(angles)
    while node.op in ARRANGING or (node.op == "Concat" and len(set(node.inputs)) == 1):
        node = graph.producer(node.inputs[0])
    if node.op not in ("Mul", "MatMul") or len(node.inputs) != 2:
        return None
    for value in node.inputs:
        while (maker := graph.producer(value)).op in ARRANGING:
            value = maker.inputs[0]
        tensor = graph.constants.get(value)
        if tensor is not None and tensor.kind in FLOATS and max(tensor.shape, default=0) == tensor.data.size:
            return tensor.floats().reshape(-1)
    return None
