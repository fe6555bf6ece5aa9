"""Which expert gives way to another: each policy says what keeping an expert is worth."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.experts.config import PolicyName

Values = NDArray[np.float64]


class Policy(Protocol):
    """The worth of every expert, [L, E]; of those that may go, the one worth least does."""

    values: Values

    def used(self, layer: int, step: int, experts: list[int], weights: Values) -> None:
        """A layer took `experts` in forward `step`; weights [E] are its rows' routing weights, summed."""


class Lru:
    """Least recently used, by forward: within one, layers come in turn and none is fresher than another."""

    def __init__(self, layers: int, experts: int) -> None:
        self.values = np.full((layers, experts), -1.0)

    def used(self, layer: int, step: int, experts: list[int], weights: Values) -> None:
        """See Policy."""
        self.values[layer, experts] = step


class Frequency:
    """How often an expert was used, older uses counting less: half after HALF_LIFE forwards."""

    HALF_LIFE = 128
    """A few sentences. Longer remembers the last topic, shorter is LRU."""

    def __init__(self, layers: int, experts: int) -> None:
        self.values = np.zeros((layers, experts))
        self._steps = np.zeros(layers, np.int64)

    def used(self, layer: int, step: int, experts: list[int], weights: Values) -> None:
        """See Policy."""
        self.values[layer] *= 0.5 ** (max(0, step - self._steps[layer]) / self.HALF_LIFE)
        self._steps[layer] = step
        self.values[layer, experts] += 1


class Score:
    """S <- a * s + (1 - a) * S with the routing weights s, a = 0.5 (HybriMoE, arXiv:2504.05897).

    A nearly chosen expert is not told from others here: the weights are those of the chosen ones.
    """

    A = 0.5

    def __init__(self, layers: int, experts: int) -> None:
        self.values = np.zeros((layers, experts))

    def used(self, layer: int, step: int, experts: list[int], weights: Values) -> None:
        """See Policy."""
        total = weights.sum()
        share = weights / total if total > 0 else weights
        self.values[layer] = self.A * share + (1 - self.A) * self.values[layer]


def make_policy(name: PolicyName, layers: int, experts: int) -> Policy:
    """The policy of this name."""
    kinds: dict[PolicyName, type[Lru] | type[Frequency] | type[Score]] = {
        "lru": Lru,
        "frequency": Frequency,
        "score": Score,
    }
    return kinds[name](layers, experts)
