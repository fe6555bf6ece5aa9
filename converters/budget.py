"""Which type each tensor gets under a budget of bits per weight, from what each type of each would cost.

Losses add up, so the best choice at a price of so much loss per byte is made tensor by tensor: each takes a
point of the lower convex hull of its (bytes, loss). Taking the steps of all hulls in the order of what they
gain per byte, until the budget is spent, is the Lagrangian solution (Shoham and Gersho, 1988, IEEE
Transactions on Acoustics, Speech and Signal Processing 36(9)); what is left is spent on steps that fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from edgert.config import Quant
from edgert.errors import OptionError


@dataclass(frozen=True, slots=True)
class Choice:
    """One type of one tensor."""

    quant: Quant
    nbytes: int
    loss: float  # expected, in any unit that is the same for all tensors


def assign(choices: Mapping[str, list[Choice]], budget: float) -> dict[str, Quant]:
    """The type of every tensor, of the least loss found in `budget` bytes.

    Raises OptionError where the smallest of all do not fit.
    """
    hulls = {name: _hull(found) for name, found in choices.items()}
    left = budget - sum(hull[0].nbytes for hull in hulls.values())
    if left < 0:
        raise OptionError(
            f"the budget is {budget:.0f} bytes of matrices, but they take at least {budget - left:.0f}; "
            "give more bits"
        )
    steps = sorted(
        (
            (_gain(hull[i], hull[i + 1]), name, i)
            for name, hull in hulls.items()
            for i in range(len(hull) - 1)
        ),
        key=lambda step: (-step[0], step[1], step[2]),
    )
    at = dict.fromkeys(hulls, 0)
    # Gains fall along a hull, so its steps come in order; after one that did not fit those behind it cannot
    # be taken either.
    for _, name, i in steps:
        cost = hulls[name][i + 1].nbytes - hulls[name][i].nbytes
        if at[name] == i and cost <= left:
            at[name] += 1
            left -= cost
    return {name: hulls[name][i].quant for name, i in at.items()}


def _gain(small: Choice, large: Choice) -> float:
    return (small.loss - large.loss) / (large.nbytes - small.nbytes)


def _hull(choices: list[Choice]) -> list[Choice]:
    """Those of the lower convex hull with falling loss, the smallest first."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull
