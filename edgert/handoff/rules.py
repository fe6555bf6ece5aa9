"""How sure an exit is: a confidence in [0, 1] from its logits. What is sure enough: thresholds.py."""

import math
from collections.abc import Sequence
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.kernels.exp_sum import exp_sum
from edgert.sampling import exp, largest

Logits = NDArray[np.float32]
RuleName = Literal["top", "margin", "entropy", "quantile"]


class ExitRule(Protocol):
    """How sure the exits are."""

    name: RuleName
    every_exit: bool  # whether it needs the logits of all exits passed, not only of the last

    def confidence(self, exits: Sequence[Logits]) -> float:
        """From 0 to 1, given the logits [V] of the exits passed, each divided by its temperature."""


class Top:
    """The largest probability (CE-CoLLM; CALM, Schuster et al., 2022, arXiv:2207.07061)."""

    name: RuleName = "top"
    every_exit = False

    def confidence(self, exits: Sequence[Logits]) -> float:
        """p1."""
        return _top(exits[-1])


class Margin:
    """The distance between the two largest probabilities (CALM, section 3.5)."""

    name: RuleName = "margin"
    every_exit = False

    def confidence(self, exits: Sequence[Logits]) -> float:
        """p1 - p2."""
        logits = exits[-1]
        first, second = (float(logits[i]) for i in largest(logits, 2))
        return _top(logits) * (1.0 - float(exp(np.array([second - first]))[0]))


class Entropy:
    """How far the distribution is from uniform (BranchyNet, Teerapittayanon et al., 2016)."""

    name: RuleName = "entropy"
    every_exit = False

    def confidence(self, exits: Sequence[Logits]) -> float:
        """1 - H / ln V."""
        logits = exits[-1]
        x = logits.astype(np.float64) - float(logits.max())
        weights = exp(x)
        total = float(np.cumsum(weights)[-1])  # in order of index: the same on every machine
        entropy = math.log(total) - float(np.cumsum(weights * x)[-1]) / total
        return min(1.0, max(0.0, 1.0 - entropy / math.log(len(logits))))


class Quantile:
    """The cumulative exit distribution (PALBERT's Q-exit, Balagansky and Gavrilov, 2022, arXiv:2204.03276).

    With l_i the chance that exit i is right, the chance that one of those passed was is
    1 - product(1 - l_i): the exit where it reaches a quantile is taken. PALBERT learns l_i; here it is the
    calibrated probability of the exit's own choice.
    """

    name: RuleName = "quantile"
    every_exit = True

    def confidence(self, exits: Sequence[Logits]) -> float:
        """1 - product of (1 - p1) over the exits."""
        return 1.0 - math.prod(1.0 - _top(logits) for logits in exits)


RULES: Final[dict[RuleName, ExitRule]] = {
    rule.name: rule for rule in (Top(), Margin(), Entropy(), Quantile())
}


def _top(logits: Logits) -> float:
    """The largest probability; the sum is a compiled one, the same on every machine."""
    return 1.0 / float(exp_sum(logits, np.float32(logits.max())))
