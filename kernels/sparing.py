"""Approximations that spare reads of experts. They change the text: only where asked for."""

import numpy as np

from edgert.kernels.jit import kernel
from edgert.kernels.reference import sparing as _twin
from edgert.kernels.requests import TABLE

UNIT = 1 << 20
"""What the shares `near` and `least` are given in: whole numbers of 1 / UNIT."""


@kernel(_twin.spare, inline=True)
def spare(x, x_at, experts, active, near, least, table, first, chosen, chosen_at, weights, weights_at):
    """Change one row's choice of experts, as `route` left it, so that fewer of them must be read.

    x[x_at + e]: of every expert, proportional to its probability. table[first + e * TABLE]: below 0 where
    it is not in memory. From the least of the chosen up, one that is not there gives way to the most
    probable expert that is, is not chosen, and has at least (1 - near) of its probability. Then one that is
    not there, is not the best, and has less than `least` of the probability of all chosen is left out: its
    place goes to the best expert, at weight 0. The weights keep their sum, in proportion to x.
    Gives how many were swapped, and how many left out.
    """
    sum_before = np.float32(0.0)
    for r in range(active):
        sum_before += weights[weights_at + r]
    keep = np.float32(1.0) - np.float32(near) / np.float32(UNIT)
    swapped, dropped = 0, 0
    for r in range(active - 1, -1, -1):
        e = chosen[chosen_at + r]
        if near == 0 or table[first + e * TABLE] >= 0:
            continue
        best = -1
        for f in range(experts):
            if table[first + f * TABLE] < 0 or (best >= 0 and x[x_at + f] <= x[x_at + best]):
                continue
            free = True
            for other in range(active):
                if chosen[chosen_at + other] == f:
                    free = False
            if free:
                best = f
        if best >= 0 and x[x_at + best] >= keep * x[x_at + e]:
            chosen[chosen_at + r] = best
            swapped += 1
    total = np.float32(0.0)
    for r in range(active):
        total += x[x_at + chosen[chosen_at + r]]
    bar = np.float32(least) / np.float32(UNIT) * total
    rest = np.float32(0.0)
    for r in range(active):
        e = chosen[chosen_at + r]
        weights[weights_at + r] = x[x_at + e]
        if r > 0 and table[first + e * TABLE] < 0 and x[x_at + e] < bar:
            chosen[chosen_at + r] = chosen[chosen_at]
            weights[weights_at + r] = np.float32(0.0)
            dropped += 1
        rest += weights[weights_at + r]
    scale = sum_before / rest
    for r in range(active):
        weights[weights_at + r] *= scale
    return swapped, dropped


@kernel(_twin.stand_in, inline=True)
def stand_in(x, x_at, experts, active, below, table, first, chosen, chosen_at, weights, weights_at):
    """Let stand-ins take the place of some experts that are not in memory; gives for how many.

    Member `experts + e` of the layer is a smaller copy of expert e. x, table and chosen as in `spare`, and
    after it: such an expert has at most `below` of the probability of all chosen. The weights stay.
    """
    total = np.float32(0.0)
    for r in range(active):
        if weights[weights_at + r] > 0:  # else it was left out, and names the best expert once more
            total += x[x_at + chosen[chosen_at + r]]
    bar = np.float32(below) / np.float32(UNIT) * total
    replaced = 0
    for r in range(active):
        e = chosen[chosen_at + r]
        if table[first + e * TABLE] < 0 and x[x_at + e] <= bar:
            chosen[chosen_at + r] = experts + e
            if weights[weights_at + r] > 0:
                replaced += 1
    return replaced
