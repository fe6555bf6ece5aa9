"""Guessing what the next group will need while this one is computed."""

from typing import Protocol

import numpy as np

from edgert.flash.config import PredictorName


class Predictor(Protocol):
    """Guesses at the next group, best first."""

    def next_members(self, group: int, members: list[int], ahead: list[int]) -> list[int]:
        """What group + 1 will need.

        members: those of `group`; ahead: what the program itself predicts, empty for a forward of many rows.
        """


class FromRouter:
    """What the program says. For experts: the next layer's router on this layer's input, which differs
    little from its own (Fate, arXiv:2502.12224)."""

    def next_members(self, group: int, members: list[int], ahead: list[int]) -> list[int]:
        """See Predictor."""
        return list(dict.fromkeys(ahead))


class FromHistory:
    """What followed the members of the two groups before, counted as it happens (EdgeMoE, arXiv:2308.14352).

    counts[i][l, e, n]: how often member n of group l + 1 came with member e of group l - i.
    """

    DECAY = 0.999
    """Per observation of a group: some thousand tokens of memory."""

    def __init__(self, groups: int, members: int, active: int) -> None:
        self._counts = [np.zeros((groups, members, members), np.float32) for _ in range(2)]
        self._seen: list[list[int]] = [[] for _ in range(groups)]
        self._active = active

    def next_members(self, group: int, members: list[int], ahead: list[int]) -> list[int]:
        """See Predictor."""
        self._seen[group] = members
        for back, counts in enumerate(self._counts):
            at = group - 1 - back
            if at >= 0:
                counts[at] *= self.DECAY
                counts[at][np.ix_(self._seen[at], members)] += 1
        if group + 1 >= len(self._seen):
            return []
        total = self._counts[0][group][members].sum(axis=0)
        if group > 0:
            total = total + self._counts[1][group - 1][self._seen[group - 1]].sum(axis=0)
        best = np.argsort(-total, kind="stable")[: self._active]
        return [int(e) for e in best if total[e] > 0]


def make_predictor(name: PredictorName, groups: int, members: int, active: int) -> Predictor | None:
    """The predictor of this name; None for "none"."""
    if name == "none":
        return None
    return FromRouter() if name == "router" else FromHistory(groups, members, active)
