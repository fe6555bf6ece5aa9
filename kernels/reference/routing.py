"""Twins of kernels/routing.py."""

import numpy as np

from edgert.kernels.reference.arithmetic import exp, fma
from edgert.kernels.reference.softmax import softmax
from edgert.kernels.reference.topk import topk


def route(x, x_at, experts, active, normalized, shared_at, chosen, chosen_at, weights, weights_at):
    """See kernels/routing.py."""
    best = chosen[chosen_at : chosen_at + active]
    topk(x, x_at, experts, active, best)
    total = softmax(x, x_at, 0, experts)
    scores = x[x_at + best]
    if normalized:
        total = np.float32(0)
        for score in scores:
            total = np.float32(total + score)
    weights[weights_at : weights_at + active] = scores / total
    if shared_at >= 0:
        one = np.float32(1)
        weights[weights_at + active] = one / (one + exp(np.float32(0) - x[shared_at : shared_at + 1])[0])


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
