"""Twin of kernels/sparing.py."""

import numpy as np


def spare(x, x_at, experts, active, near, least, table, first, chosen, chosen_at, weights, weights_at):
    """See kernels/sparing.py."""
    odds = x[x_at : x_at + experts]
    here = table[first : first + 2 * experts : 2] >= 0
    own, picks = weights[weights_at : weights_at + active], chosen[chosen_at : chosen_at + active]
    before = _sum(own)
    keep = np.float32(1) - np.float32(near) / np.float32(1 << 20)
    swapped = dropped = 0
    for r in reversed(range(active if near else 0)):
        others = [f for f in np.flatnonzero(here).tolist() if f not in picks]
        best = max(others, key=lambda f: (odds[f], -f), default=None)
        if not here[picks[r]] and best is not None and odds[best] >= keep * odds[picks[r]]:
            picks[r] = best
            swapped += 1
    own[:] = odds[picks]
    bar = np.float32(least) / np.float32(1 << 20) * _sum(own)
    for r in range(1, active):
        if not here[picks[r]] and own[r] < bar:
            picks[r], own[r] = picks[0], 0
            dropped += 1
    own *= before / _sum(own)
    return swapped, dropped


def stand_in(x, x_at, experts, active, below, table, first, chosen, chosen_at, weights, weights_at):
    """See kernels/sparing.py."""
    picks = chosen[chosen_at : chosen_at + active]
    used = weights[weights_at : weights_at + active] > 0
    odds = x[x_at + picks]
    bar = np.float32(below) / np.float32(1 << 20) * _sum(odds[used])
    replaced = (table[first + 2 * picks] < 0) & (odds <= bar)
    picks[replaced] += experts
    return int((replaced & used).sum())


def _sum(values):
    total = np.float32(0)
    for value in values:
        total = np.float32(total + value)
    return total
