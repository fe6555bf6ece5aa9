"""Which experts a row of tokens needs, and the rows of each expert side by side.

The choice falls on float32 logits of a float32 matrix: a rounding would flip it between experts of
nearly equal logits, and the output would change by far more than a rounding.
"""

import numpy as np

from edgert.kernels import simd
from edgert.kernels.elementwise import exp, read_f32
from edgert.kernels.jit import jit, kernel
from edgert.kernels.reference import routing as _twin
from edgert.kernels.reference.routing import OUT, UNGATED
from edgert.kernels.reference.softmax import LOWEST
from edgert.kernels.softmax import softmax
from edgert.kernels.topk import topk


@jit
def _sigmoid(x):
    """In every lane."""
    one = simd.splat(1.0)
    return simd.div(one, simd.add(one, exp(simd.sub(simd.splat(0.0), x))))


@kernel(_twin.affinities, inline=True)
def affinities(x, x_at, experts, w, bias, y, y_at):
    """x[e] <- sigmoid(x[e]), and y[e] <- x[e] + bias[e], which decides the choice and no weight.

    DeepSeek-V3, arXiv:2412.19437, section 2.1.2. bias: the byte of w with `experts` float32. Whole blocks
    of 16 of x are overwritten.
    """
    for i in range(x_at, x_at + experts, 16):
        simd.store_f32(x, i, _sigmoid(simd.load_f32(x, i)))
    for e in range(experts):
        y[y_at + e] = x[x_at + e] + read_f32(w, bias + e * 4)


@jit
def _group_score(y, first, size, best):
    """The largest of a group, or the sum of its two largest."""
    top, second = OUT, OUT
    for e in range(first, first + size):
        if y[e] > top:
            top, second = y[e], top
        elif y[e] > second:
            second = y[e]
    return top if best == 1 else top + second


@kernel(_twin.keep_groups, inline=True)
def keep_groups(y, y_at, experts, groups, kept, best):
    """Put all of y[y_at : +experts] out of the choice but the best `kept` of its `groups` equal parts.

    A group is as good as the sum of its `best` largest, 1 (DeepSeek-V2, arXiv:2405.04434, section 2.2.2) or 2
    (V3); of equal ones the lower comes first. A group that is out has `kept` better ones, none of which goes.
    """
    size = experts // groups
    for g in range(groups):
        score, better = _group_score(y, y_at + g * size, size, best), 0
        for other in range(groups):
            against = _group_score(y, y_at + other * size, size, best)
            if against > score or (against == score and other < g):
                better += 1
        if better >= kept:
            y[y_at + g * size : y_at + (g + 1) * size] = OUT


@kernel(_twin.route, inline=True)
def route(
    x, x_at, choice, choice_at, experts, active, sigmoid, normalized, shared_at, chosen, chosen_at, weights,
    weights_at,
):  # fmt: skip
    """The `active` experts of the largest choice[choice_at : +experts], and their weights.

    chosen[chosen_at + r] is the r-th best expert, of equal ones the lower first; choice may be x itself, the
    logits x[x_at : +experts]. weights[weights_at + r] is the expert's softmax over all of them, or, where
    `sigmoid`, what `affinities` left there; divided by the sum over the chosen ones where `normalized`.
    Where shared_at >= 0, weights[weights_at + active] = sigmoid(x[shared_at]), the weight of the shared
    expert (Qwen2-MoE); where UNGATED, 1. x is scratch: its blocks of 16 are overwritten.
    """
    topk(choice, choice_at, experts, active, chosen[chosen_at : chosen_at + active])
    total = np.float32(1.0)
    if not sigmoid:
        total = softmax(x, x_at, np.int64(0), experts, LOWEST)
    if normalized:
        total = np.float32(0.0)
        for r in range(active):
            total += x[x_at + chosen[chosen_at + r]]
    for r in range(active):
        weights[weights_at + r] = x[x_at + chosen[chosen_at + r]] / total
    if shared_at >= 0:
        weights[weights_at + active] = np.float32(simd.max_lanes(_sigmoid(simd.splat(x[shared_at]))))
    elif shared_at == UNGATED:
        weights[weights_at + active] = np.float32(1.0)


@kernel(_twin.group, inline=True)
def group(rows, active, experts, routes, chosen, sources, places, starts, busy):
    """Sort the choices of `rows` rows by expert, rows in order; all operands are places in `routes`.

    chosen [rows, active] is read. Written: sources[i], the row of entry i; places[t * active + r], the
    entry of the r-th choice of row t; starts[e] .. starts[e + 1], the entries of expert e;
    busy, the number of experts that have any and then these, ascending.
    """
    count = rows * active
    for e in range(experts + 1):
        routes[starts + e] = 0
    for i in range(count):
        routes[starts + routes[chosen + i] + 1] += 1
    held = 0
    for e in range(experts):
        if routes[starts + e + 1] > 0:
            held += 1
            routes[busy + held] = e
        routes[starts + e + 1] += routes[starts + e]
    routes[busy] = held
    for i in range(count):  # starts[e] runs through the entries of e ...
        e = routes[chosen + i]
        entry = routes[starts + e]
        routes[starts + e] = entry + 1
        routes[sources + entry] = i // active
        routes[places + i] = entry
    for e in range(experts, 0, -1):  # ... and is put back
        routes[starts + e] = routes[starts + e - 1]
    routes[starts] = 0


@kernel(_twin.combine, inline=True)
def combine(x, x_at, width, y, y_at, y_stride, routes, places, active, weights, weights_at, shared_at):
    """x[i] += the weighted sum of a row's experts, in the order of their choice whatever came first.

    y holds one row per entry of `group`; the sum is one chain of fused multiply-adds from 0 over
    r = 0 .. active - 1, and last, where shared_at >= 0, the row y[shared_at] of the shared expert.
    `width` is a multiple of 16.
    """
    for i in range(0, width, 16):
        total = simd.splat(0.0)
        for r in range(active):
            row = y_at + routes[places + r] * y_stride
            total = simd.fma(simd.splat(weights[weights_at + r]), simd.load_f32(y, row + i), total)
        if shared_at >= 0:
            weight = simd.splat(weights[weights_at + active])
            total = simd.fma(weight, simd.load_f32(y, shared_at + i), total)
        simd.store_f32(x, x_at + i, simd.add(simd.load_f32(x, x_at + i), total))
