"""Guessing the experts of the next layer while this one is computed."""

from typing import Protocol

import numpy as np

from edgert.experts.config import PredictorName


class Predictor(Protocol):
    """Guesses at the next layer, best first."""

    def next_experts(self, layer: int, experts: list[int], ahead: list[int]) -> list[int]:
        """The experts that layer + 1 will want.

        experts: those of `layer`; ahead: what the next router says of this layer's input, empty for a
        forward of many rows.
        """


class FromRouter:
    """The next layer's router on this layer's input: its own differs little (Fate, arXiv:2502.12224)."""

    def next_experts(self, layer: int, experts: list[int], ahead: list[int]) -> list[int]:
        """See Predictor."""
        return list(dict.fromkeys(ahead))


class FromHistory:
    """What followed the experts of the two layers before, counted as it happens (EdgeMoE, arXiv:2308.14352).

    counts[i][l, e, n]: how often expert n of layer l + 1 came with expert e of layer l - i.
    """

    DECAY = 0.999
    """Per observation of a layer: some thousand tokens of memory."""

    def __init__(self, layers: int, experts: int, active: int) -> None:
        self._counts = [np.zeros((layers, experts, experts), np.float32) for _ in range(2)]
        self._seen: list[list[int]] = [[] for _ in range(layers)]
        self._active = active

    def next_experts(self, layer: int, experts: list[int], ahead: list[int]) -> list[int]:
        """See Predictor."""
        self._seen[layer] = experts
        for back, counts in enumerate(self._counts):
            at = layer - 1 - back
            if at >= 0:
                counts[at] *= self.DECAY
                counts[at][np.ix_(self._seen[at], experts)] += 1
        if layer + 1 >= len(self._seen):
            return []
        total = self._counts[0][layer][experts].sum(axis=0)
        if layer > 0:
            total = total + self._counts[1][layer - 1][self._seen[layer - 1]].sum(axis=0)
        best = np.argsort(-total, kind="stable")[: self._active]
        return [int(e) for e in best if total[e] > 0]


def make_predictor(name: PredictorName, layers: int, experts: int, active: int) -> Predictor | None:
    """The predictor of this name; None for "none"."""
    if name == "none":
        return None
    return FromRouter() if name == "router" else FromHistory(layers, experts, active)
