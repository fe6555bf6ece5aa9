"""How sure an exit has to be: for a wanted agreement, a wanted share of tokens handed over, a wanted time.

All come from counts on text the exit was not trained on (`edgert train exits`, `edgert calibrate`). DeeR-VLA
(Yue et al., 2024, arXiv:2411.02359) solves for budgets of computation, time and memory in the
same way; here the time of a hand-over is that of the link and the cloud as they are now.
"""

import math
import statistics
from bisect import bisect_right
from collections import deque
from itertools import accumulate
from typing import Any, Final, Protocol

from edgert.errors import OptionError
from edgert.format import ExitCalibration

NEVER: Final = math.inf
"""The threshold of an exit that is never taken."""
_LATEST: Final = 16
"""Tokens whose times are remembered. Fewer follow a changing link sooner, and a single slow answer too."""


class Threshold(Protocol):
    """The confidence from which an exit answers."""

    def begin(self) -> None:
        """A generation begins."""

    def value(self) -> float:
        """For the next token."""

    def took(self, lower_s: float, upper_s: float | None) -> None:
        """The layers up to the exit took so long for a token, and what is behind them; None: not asked."""

    def report(self) -> dict[str, Any]:
        """What there is to say of it, for `stats`."""


class Fixed:
    """The same for all tokens."""

    def __init__(self, value: float) -> None:
        self._value = value

    def begin(self) -> None:
        """Nothing changes."""

    def value(self) -> float:
        """As it was given."""
        return self._value

    def took(self, lower_s: float, upper_s: float | None) -> None:
        """Time does not matter."""

    def report(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class TimeBudget:
    """So many tokens are handed over that a token takes `seconds` on average.

    Every token takes the lower layers' time; the share s that is handed over waits for the upper part as
    well, so s = (seconds - lower) / upper, with the medians of the latest tokens. What the tokens before
    took too much, or left over, is spread over the next ones: texts differ from the one that was counted.
    """

    def __init__(self, calibration: ExitCalibration, seconds: float) -> None:
        if not 0 < seconds < math.inf:
            raise OptionError(f"time budget is {seconds:g} s; expected a time above 0, such as 20ms")
        self._seconds = seconds
        self._calibration = calibration
        self._lower: deque[float] = deque(maxlen=_LATEST)
        self._upper: deque[float] = deque(maxlen=_LATEST)
        self._left = 0.0  # seconds that the tokens so far did not need; below 0 where they needed more

    def begin(self) -> None:
        """What was measured holds on; a generation has a budget of its own."""
        self._left = 0.0

    @property
    def share(self) -> float:
        """Of the next tokens, how many may be handed over; 1 until it is known what that takes."""
        if not self._lower or not self._upper:
            return 1.0
        spare = self._seconds + self._left / _LATEST - statistics.median(self._lower)
        waited = statistics.median(self._upper)
        return min(1.0, max(0.0, spare / waited)) if waited > 0 else 1.0

    def value(self) -> float:
        """The largest threshold below which no more than `share` of the counted tokens were."""
        return threshold_for_budget(self._calibration, self.share)

    def took(self, lower_s: float, upper_s: float | None) -> None:
        """Remember it."""
        self._lower.append(lower_s)
        if upper_s is not None:
            self._upper.append(upper_s)
        most = _LATEST * self._seconds  # a long easy passage is no reason for a long slow one
        self._left = min(most, max(-most, self._left + self._seconds - lower_s - (upper_s or 0.0)))

    def report(self) -> dict[str, Any]:
        """What was measured, and the share it leaves for hand-overs."""
        return {
            "handoff_share": self.share,
            "exit_s": statistics.median(self._lower) if self._lower else 0.0,
            "handoff_s": statistics.median(self._upper) if self._upper else 0.0,
        }


def threshold_for_agreement(calibration: ExitCalibration, agreement: float) -> float:
    """The least confidence for which so large a share of *all* tokens is the whole model's choice.

    Tokens that are handed over agree. NEVER for an agreement of 1, and where no threshold reaches it.
    """
    if not 0 < agreement <= 1:
        raise OptionError(f"agreement is {agreement:g}; expected a share above 0 and up to 1, such as 0.99")
    total = sum(calibration.tokens)
    if agreement < 1:
        for index, bound in enumerate(calibration.confidence):
            wrong = sum(calibration.tokens[index:]) - sum(calibration.agreed[index:])
            if wrong <= (1 - agreement) * total:
                return bound
    return NEVER


def threshold_for_budget(calibration: ExitCalibration, budget: float) -> float:
    """The largest confidence for which at most so large a share of tokens is handed over."""
    if not 0 <= budget <= 1:
        raise OptionError(f"budget is {budget:g}; expected a share of tokens from 0 to 1")
    if budget == 1:
        return NEVER
    total = sum(calibration.tokens)
    below = [tokens / total for tokens in accumulate(calibration.tokens[:-1], initial=0)]
    return calibration.confidence[bisect_right(below, budget) - 1]
