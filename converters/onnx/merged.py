"""Decoders that Optimum merged: one with a cache and one without, the two branches of an If.

Both compute the same of the same weights, which lie in the graph around them; the one with a cache is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Flat:
    """The parts of a graph that are looked at, as protobuf gives them."""

    node: Sequence[Any]
    initializer: Sequence[Any]
    input: Sequence[Any]
    output: Sequence[str]  # names


def flattened(graph: Any) -> Flat:
    """The graph, with the first branch of an If in its place where all outputs are that one's."""
    nodes, outputs = list(graph.node), [value.name for value in graph.output]
    last = nodes[-1]
    branches = {given.name: given.g for given in last.attribute if last.op_type == "If"}
    then = branches.get("then_branch")
    if then is None or len(then.output) != len(last.output) or not set(outputs) <= set(last.output):
        return Flat(nodes, list(graph.initializer), list(graph.input), outputs)
    inner = dict(zip(last.output, (value.name for value in then.output), strict=True))
    return Flat(
        node=[*nodes[:-1], *then.node],
        initializer=[*graph.initializer, *then.initializer],
        input=list(graph.input),
        output=[inner[name] for name in outputs],
    )
