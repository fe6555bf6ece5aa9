"""How often a drafter's guesses come true: from what it says to what it is worth."""

import math

_EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Bins of stated probability, finer where an answer is nearly certain: there one miss ends a long path."""
_PRIOR = 8.0
"""Guesses that the statement itself counts for, against those that were seen come true or not."""
_MEMORY = 400.0
"""Guesses of one bin that are remembered: a text can change its kind within a page."""
_LEAST, _MOST = 1e-4, 0.995


class Trust:
    """Turns a stated probability into the share of such guesses that the target took.

    A draft is over-confident where it was trained on something else, a lookup says "always" after one
    sight. The tree is cut by these probabilities, so this is the self-adjusting threshold of LLMCad
    (section 3.3) with a unit: a miss lowers, a hit raises what the next tree may cost.
    """

    def __init__(self) -> None:
        self._tried = [0.0] * (len(_EDGES) + 1)
        self._taken = [0.0] * (len(_EDGES) + 1)
        self._expected = _PRIOR  # over all bins: what the statements promised, and what came
        self._came = _PRIOR

    def probability(self, stated: float) -> float:
        """The probability that a guess with this statement comes true."""
        index = _bin(stated)
        prior = min(stated * self._came / self._expected, _MOST)
        found = (self._taken[index] + _PRIOR * prior) / (self._tried[index] + _PRIOR)
        return min(max(found, _LEAST), _MOST)

    def logprob(self, stated: float) -> float:
        """Its natural logarithm."""
        return math.log(self.probability(stated))

    def observe(self, stated: float, taken: bool) -> None:
        """The target took this guess, or it took another token at its place."""
        index = _bin(stated)
        self._tried[index] += 1.0
        self._taken[index] += taken
        self._expected += stated
        self._came += taken
        if self._tried[index] > _MEMORY:
            self._tried[index] /= 2
            self._taken[index] /= 2
        if self._expected > _MEMORY:
            self._expected /= 2
            self._came /= 2


def _bin(stated: float) -> int:
    for index, edge in enumerate(_EDGES):
        if stated < edge:
            return index
    return len(_EDGES)
