"""The buffers of layers with experts: which token goes where, and the rows of every expert."""

from edgert.config import ModelSpec
from edgert.kernels.experts import COUNTERS
from edgert.state import Layout

MOST_FORESEEN = 4
"""Rows whose next experts are predicted: more rows need most of a layer's experts in any case."""


class Routing:
    """One set for all layers. An entry is one token at one of its experts; there are T * k of them.

    members: M, the experts of a layer and their stand-ins.
    """

    def __init__(self, spec: ModelSpec, members: int, rows: int, layout: Layout) -> None:
        active = spec.active_experts
        entries = rows * active
        self.logits = layout.rows(rows, spec.experts)  # [T, E]
        self.choice = layout.rows(rows, spec.experts) if chosen_apart(spec) else None  # [T, E]
        self.weights = layout.rows(rows, active + 1)  # [T, k] and the weight of the shared expert
        self.routed = layout.rows(entries, spec.width, quantized=True)  # [T*k, D] in, then out
        self.gate = layout.rows(entries, spec.expert_width, quantized=True)  # [T*k, F]
        self.up = layout.rows(entries, spec.expert_width)  # [T*k, F]
        self.chosen = layout.integers(entries)  # [T, k] experts, best first
        self.sources = layout.integers(entries)  # [T*k] the row of each entry
        self.places = layout.integers(entries)  # [T, k] the entry of each choice
        self.starts = layout.integers(members + 1)  # [M + 1] the first entry of each member
        self.busy = layout.integers(members + 1)  # the number of members with entries, and these
        self.counters = layout.integers(members * COUNTERS)  # [M, COUNTERS] see kernels/experts.py
        # What the layer before predicts: its own logits, choices and weights, as above.
        self.foreseen = Foreseen(spec, layout)
        self.shared = Shared(spec, rows, layout) if spec.shared_width else None


def chosen_apart(spec: ModelSpec) -> bool:
    """Whether experts are chosen by other numbers than their logits."""
    return spec.sigmoid_routing or spec.routing_groups > 1


class Foreseen:
    """The buffers in which a layer predicts the experts of the next, for a few rows."""

    def __init__(self, spec: ModelSpec, layout: Layout) -> None:
        self.x = layout.rows(MOST_FORESEEN, spec.width)  # [R, D]
        self.logits = layout.rows(MOST_FORESEEN, spec.experts)  # [R, E]
        self.choice = layout.rows(MOST_FORESEEN, spec.experts) if chosen_apart(spec) else None  # [R, E]
        self.weights = layout.rows(MOST_FORESEEN, spec.active_experts)  # [R, k]
        self.chosen = layout.integers(MOST_FORESEEN * spec.active_experts)  # [R, k]


class Shared:
    """The buffers of the expert that every token takes."""

    def __init__(self, spec: ModelSpec, rows: int, layout: Layout) -> None:
        self.logit = None if spec.open_shared else layout.rows(rows, 1)  # [T, 1]
        self.gate = layout.rows(rows, spec.shared_width, quantized=True)  # [T, F]
        self.up = layout.rows(rows, spec.shared_width)  # [T, F]
        self.out = layout.rows(rows, spec.width)  # [T, D]
