"""How sure is sure enough: counts lead to thresholds, and measured times to shares of tokens."""

import random

import pytest

from edgert.errors import OptionError
from edgert.format import ExitCalibration
from edgert.handoff.thresholds import NEVER, TimeBudget, threshold_for_agreement, threshold_for_budget

COUNTS = ExitCalibration(1.0, (0.0, 0.25, 0.5, 0.75), (40, 30, 20, 10), (10, 20, 18, 10))


@pytest.mark.parametrize(
    ("agreement", "threshold"),
    [(1, NEVER), (0.99, 0.75), (0.98, 0.5), (0.89, 0.5), (0.87, 0.25), (0.58, 0.0), (0.01, 0.0)],
)
def test_an_agreement_is_kept_by_the_least_sufficient_confidence(agreement: float, threshold: float) -> None:
    """Wrong from each bucket on: 42, 12, 2 and 0 of 100 tokens."""
    assert threshold_for_agreement(COUNTS, agreement) == threshold


@pytest.mark.parametrize(
    ("budget", "threshold"),
    [(0, 0.0), (0.39, 0.0), (0.4, 0.25), (0.7, 0.5), (0.89, 0.5), (0.9, 0.75), (1, NEVER)],
)
def test_a_budget_is_spent_by_the_largest_confidence_that_keeps_it(budget: float, threshold: float) -> None:
    assert threshold_for_budget(COUNTS, budget) == threshold


def average(seconds: float, lower: float, upper: float, harder: float = 1.0, tokens: int = 2000) -> float:
    """Seconds per token of texts whose confidences are the counted ones, or `harder` times lower."""
    fine = ExitCalibration(1.0, tuple(i / 100 for i in range(100)), (10,) * 100, (5,) * 100)
    budget, draw, total = TimeBudget(fine, seconds), random.Random(7), 0.0
    budget.begin()
    for _ in range(tokens):
        asked = draw.random() / harder < budget.value()
        jitter = draw.uniform(0.8, 1.2)
        budget.took(lower, upper * jitter if asked else None)
        total += lower + (upper * jitter if asked else 0.0)
    return total / tokens


def test_tokens_take_the_time_they_were_given() -> None:
    assert average(0.005, lower=0.002, upper=0.010) == pytest.approx(0.005, rel=0.03)
    # Also where the text is harder than the one that was counted, or easier.
    assert average(0.005, lower=0.002, upper=0.010, harder=1.5) == pytest.approx(0.005, rel=0.03)
    assert average(0.005, lower=0.002, upper=0.010, harder=0.7) == pytest.approx(0.005, rel=0.03)
    # A time that cannot be kept: nothing is handed over but the first, which shows that it cannot.
    assert average(0.001, lower=0.002, upper=0.010) == pytest.approx(0.002, rel=0.01)
    # And one that everything keeps.
    assert average(0.020, lower=0.002, upper=0.010) == pytest.approx(0.012, rel=0.01)


def test_a_link_that_becomes_slow_is_followed() -> None:
    budget = TimeBudget(COUNTS, 0.020)
    for _ in range(16):
        budget.took(0.002, 0.010)
    assert budget.share == 1.0
    for _ in range(16):
        budget.took(0.002, 0.100)
    assert budget.share == 0.0  # the time that was lost is saved first
    for _ in range(100):
        budget.took(0.002, None)
    assert 0.1 < budget.share <= 0.4
    report = budget.report()
    assert (report["exit_s"], report["handoff_s"]) == (0.002, 0.100)


def test_a_time_that_is_none_is_refused() -> None:
    for seconds in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(OptionError, match="expected a time above 0"):
            TimeBudget(COUNTS, seconds)
