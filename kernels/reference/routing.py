"""Twins of kernels/routing.py."""

import numpy as np

from edgert.kernels.reference.arithmetic import exp, fma
from edgert.kernels.reference.softmax import LOWEST, softmax
from edgert.kernels.reference.topk import topk

OUT = np.float32(-1.0e38)
"""Below what any expert is chosen by, and so is the sum of two."""
UNGATED = -2
"""For `shared_at`: a shared expert that is added as it is."""


def _sigmoid(x):
    one = np.float32(1)
    return one / (one + exp(np.float32(0) - x))


def affinities(x, x_at, experts, w, bias, y, y_at):
    """See kernels/routing.py."""
    blocks = slice(x_at, x_at + -(-experts // 16) * 16)
    x[blocks] = _sigmoid(x[blocks])
    y[y_at : y_at + experts] = x[x_at : x_at + experts] + w[bias : bias + experts * 4].view(np.float32)


def keep_groups(y, y_at, experts, groups, kept, best):
    """See kernels/routing.py."""
    parts = y[y_at : y_at + experts].reshape(groups, -1)
    ranked = np.sort(np.maximum(parts, OUT), axis=1)[:, ::-1]
    second = ranked[:, 1] if ranked.shape[1] > 1 else OUT
    scores = ranked[:, 0] if best == 1 else ranked[:, 0] + second
    parts[np.argsort(-scores, kind="stable")[kept:]] = OUT


def route(
    x, x_at, choice, choice_at, experts, active, sigmoid, normalized, shared_at, chosen, chosen_at, weights,
    weights_at,
):  # fmt: skip
    """See kernels/routing.py."""
    best = chosen[chosen_at : chosen_at + active]
    topk(choice, choice_at, experts, active, best)
    total = np.float32(1) if sigmoid else softmax(x, x_at, 0, experts, LOWEST)
    scores = x[x_at + best]
    if normalized:
        total = np.float32(0)
        for score in scores:
            total = np.float32(total + score)
    weights[weights_at : weights_at + active] = scores / total
    if shared_at >= 0:
        weights[weights_at + active] = _sigmoid(x[shared_at : shared_at + 1])[0]
    elif shared_at == UNGATED:
        weights[weights_at + active] = 1


def group(rows, active, experts, routes, chosen, sources, places, starts, busy):
    """See kernels/routing.py."""
    wanted = routes[chosen : chosen + rows * active]
    order = np.argsort(wanted, kind="stable")
    routes[sources : sources + order.size] = order // active
    routes[places + order] = np.arange(order.size)
    routes[starts : starts + experts + 1] = np.searchsorted(wanted[order], np.arange(experts + 1))
    found = np.unique(wanted)
    routes[busy] = found.size
    routes[busy + 1 : busy + 1 + found.size] = found


def combine(x, x_at, width, y, y_at, y_stride, routes, places, active, weights, weights_at, shared_at):
    """See kernels/routing.py."""
    total = np.zeros(width, np.float32)
    rows = [y_at + entry * y_stride for entry in routes[places : places + active]]
    if shared_at >= 0:
        rows.append(shared_at)
    for r, row in enumerate(rows):
        total = fma(weights[weights_at + r], y[row : row + width], total)
    x[x_at : x_at + width] += total
