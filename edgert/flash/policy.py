"""Which segment gives way to another: each policy says what keeping one is worth."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.flash.config import PolicyName

Values = NDArray[np.float64]


class Policy(Protocol):
    """The worth of every segment, [groups, members]; of those that may go, the one worth least does."""

    values: Values

    def used(self, group: int, step: int, members: list[int], weights: Values) -> None:
        """A request for `members` of a group came in forward `step`; weights [members of a group], summed
        over the rows, is what each counts for there: an expert's routing weight."""


class Lru:
    """Least recently used, by forward: within one, groups come in turn and none is fresher than another."""

    def __init__(self, groups: int, members: int) -> None:
        self.values = np.full((groups, members), -1.0)

    def used(self, group: int, step: int, members: list[int], weights: Values) -> None:
        """See Policy."""
        self.values[group, members] = step


class Frequency:
    """How often a segment was used, older uses counting less: half after HALF_LIFE forwards."""

    HALF_LIFE = 128
    """A few sentences. Longer remembers the last topic, shorter is LRU."""

    def __init__(self, groups: int, members: int) -> None:
        self.values = np.zeros((groups, members))
        self._steps = np.zeros(groups, np.int64)

    def used(self, group: int, step: int, members: list[int], weights: Values) -> None:
        """See Policy."""
        self.values[group] *= 0.5 ** (max(0, step - self._steps[group]) / self.HALF_LIFE)
        self._steps[group] = step
        self.values[group, members] += 1


class Score:
    """S <- a * s + (1 - a) * S with the weights s of a request, a = 0.5 (HybriMoE, arXiv:2504.05897).

    A nearly chosen segment is not told from others here: the weights are those of the chosen ones.
    """

    A = 0.5

    def __init__(self, groups: int, members: int) -> None:
        self.values = np.zeros((groups, members))

    def used(self, group: int, step: int, members: list[int], weights: Values) -> None:
        """See Policy."""
        total = weights.sum()
        share = weights / total if total > 0 else weights
        self.values[group] = self.A * share + (1 - self.A) * self.values[group]


def make_policy(name: PolicyName, groups: int, members: int) -> Policy:
    """The policy of this name."""
    kinds: dict[PolicyName, type[Lru] | type[Frequency] | type[Score]] = {
        "lru": Lru,
        "frequency": Frequency,
        "score": Score,
    }
    return kinds[name](groups, members)
