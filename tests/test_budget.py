"""Who gets the bits: against trying every assignment."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.converters.budget import Choice, assign
from edgert.errors import OptionError

QUANTS: Any = ("q2", "q3", "q4", "q8")


def choices_of(seed: int, count: int) -> dict[str, list[Choice]]:
    rng = np.random.default_rng(seed)
    found = {}
    for tensor in range(count):
        sizes = np.cumsum(rng.integers(1, 40, 4))
        losses = np.sort(rng.exponential(size=4))[::-1] * rng.lognormal(0, 2)
        found[f"t{tensor}"] = [
            Choice(q, int(s), float(x)) for q, s, x in zip(QUANTS, sizes, losses, strict=True)
        ]
    return found


def cost(choices: dict[str, list[Choice]], assigned: dict[str, Any]) -> tuple[int, float]:
    taken = [next(c for c in choices[name] if c.quant == quant) for name, quant in assigned.items()]
    return sum(c.nbytes for c in taken), sum(c.loss for c in taken)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1))
def test_no_assignment_that_is_smaller_loses_less(seed: int, share: float) -> None:
    """The best at each price of a byte; what is left over is then less than one step."""
    choices = choices_of(seed, 5)
    least = sum(found[0].nbytes for found in choices.values())
    most = sum(found[-1].nbytes for found in choices.values())
    budget = least + share * (most - least)
    size, loss = cost(choices, assign(choices, budget))
    assert size <= budget
    # Against everything that fits: what is lost to it is at most the gain of a single step.
    everything = (
        sum(c.loss for c in taken)
        for taken in itertools.product(*choices.values())
        if sum(c.nbytes for c in taken) <= budget
    )
    largest = max(found[0].loss - found[-1].loss for found in choices.values())
    assert loss <= min(everything) + largest


def test_bits_go_where_they_matter() -> None:
    choices = {
        "deaf": [Choice("q2", 10, 0.1), Choice("q4", 20, 0.01)],
        "keen": [Choice("q2", 10, 9.0), Choice("q4", 20, 0.5), Choice("q8", 40, 0.0)],
    }
    assert assign(choices, 20) == {"deaf": "q2", "keen": "q2"}
    assert assign(choices, 30) == {"deaf": "q2", "keen": "q4"}
    assert assign(choices, 50) == {"deaf": "q2", "keen": "q8"}
    assert assign(choices, 1000) == {"deaf": "q4", "keen": "q8"}


def test_a_type_above_the_line_between_its_neighbours_is_not_taken() -> None:
    choices = {"t": [Choice("q2", 10, 9.0), Choice("q3", 20, 8.9), Choice("q4", 21, 1.0)]}
    assert assign(choices, 20.5) == {"t": "q2"}
    assert assign(choices, 21) == {"t": "q4"}


def test_what_costs_more_and_gains_nothing_is_not_taken() -> None:
    assert assign({"t": [Choice("q2", 10, 0.0), Choice("q8", 40, 0.0)]}, 100) == {"t": "q2"}


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(OptionError, match="take at least 10; give more bits"):
        assign({"t": [Choice("q2", 10, 0.0)]}, 9)
