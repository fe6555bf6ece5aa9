"""The experts of one layer: whoever is free takes a unit of any expert that is there.

    h[i] = act(Wg x[i]) * (Wu x[i]);  y[i] = Wd h[i]        i: the entries of an expert (routing.py)

An expert is three matrices, one after another: gate [F, D], up [F, D], down [D, F]. In gpt-oss a bias is
added to each product (those of all experts of a layer are three vectors, [E * F] or [E * D], that stay in
memory) and the gate is clamped (activation.py). Its units are
first blocks of gate and up, each unit finishing its part of h, and when all of them are done blocks
of down. No barrier lies between: while one expert waits (for its last unit, or to arrive from flash)
the others are computed. Each output is whole in one unit, so no result depends on the order.
"""

import numpy as np

from edgert.kernels import atomics, matmul
from edgert.kernels.activation import clamped_gate, gate
from edgert.kernels.elementwise import read_f32
from edgert.kernels.jit import inlined, jit
from edgert.kernels.operations import operands, operation
from edgert.kernels.program import EXPERTS
from edgert.kernels.quantize import quantize
from edgert.kernels.requests import (
    AHEAD,
    BELL,
    CONTROL,
    COUNT,
    FAILED,
    GROUP,
    HEAD,
    HITS,
    MISSES,
    NEWEST,
    RING,
    ROWS,
    STEP,
    STEP_OF,
    TABLE,
    WAITED,
    request_words,
)

COUNTERS = 4
"""Words per busy expert: units of up taken and done, units of down taken and done."""
_UP, _UP_DONE, _DOWN, _DOWN_DONE = range(COUNTERS)


@inlined
def publish(
    rows, layer, experts, active, chosen, weights, stride, busy, ahead, ahead_rows, control, f, routes, table
):
    """Tell the store what this layer needs, and what the next may need; wake it where it has work."""
    number = atomics.load(table, control + NEWEST) + 1
    at = control + CONTROL + number % RING * request_words(experts)
    count = routes[busy]
    table[at + GROUP], table[at + ROWS], table[at + STEP_OF] = layer, rows, table[control + STEP]
    table[at + COUNT] = count
    for e in range(experts):
        table[at + HEAD + experts + e] = 0
    for i in range(rows * active):
        weight = f[weights + i // active * stride + i % active]
        table[at + HEAD + experts + routes[chosen + i]] += np.int64(weight * np.float32(1 << 30))
    first, misses, unknown = layer * experts * TABLE, 0, 0
    for i in range(count):
        expert = routes[busy + 1 + i]
        table[at + HEAD + i] = expert
        if atomics.load(table, first + expert * TABLE) < 0:
            misses += 1
    known = min(experts, ahead_rows * active) if ahead >= 0 else 0
    table[at + AHEAD] = known
    for i in range(known):
        expert = routes[ahead + i]
        table[at + HEAD + 2 * experts + i] = expert
        if atomics.load(table, first + (experts + expert) * TABLE) < 0:
            unknown += 1
    table[control + HITS] += count - misses
    table[control + MISSES] += misses
    atomics.store(table, control + NEWEST, number)
    if misses + unknown > 0:
        atomics.ring(table[control + BELL])


@jit
def finished(routes, counters, i, units):
    """Whether the i-th busy expert of the layer is computed, and its weights needed no more."""
    return atomics.load(routes, counters + i * COUNTERS + _DOWN_DONE) >= units


NOTHING, WORKED, EMPTY = 0, 1, 2
SPINS = 500
"""Turns without work before a thread naps: some 10 us, where a read takes a hundred times that."""


@jit
def _begin(f, at, first, last, w, biases, rows):
    """Outputs first..last-1 of a matrix of `rows` rows, before its products are added: their biases, or 0."""
    f[at + first : at + last] = np.float32(0.0)
    if biases >= 0:
        for n in range(first, min(last, rows)):
            f[at + n] = read_f32(w, biases + n * 4)


@inlined
def _up(
    run, at, quant, groups, blocks, first, last, kind, alpha, limit, of_gate, of_up, inner_rows, entry, rows,
    x, g, u, stride, q, h, most, ahead,
):  # fmt: skip
    """Blocks first..last-1 of gate and up for `rows` entries from `entry`, and their part of h.

    `first` is even: two blocks of 16 are a group of h.
    """
    w, f = run.w, run.f
    size = groups * matmul.record_bytes(quant)
    width = groups * 32
    row_x, row_q = x + entry * width, q + entry * groups
    row_g, row_u = g + entry * stride, u + entry * stride
    for t in range(rows):
        _begin(f, row_g + t * stride, first * 16, last * 16, w, of_gate, inner_rows)
        _begin(f, row_u + t * stride, first * 16, last * 16, w, of_up, inner_rows)
    for part, y in ((0, row_g), (1, row_u)):
        w_at = at + part * blocks * size
        matmul.product(
            run, quant, run.pool, w_at, groups, first, last, rows, row_x, width, row_q, y, stride, most, ahead
        )
    for t in range(rows):
        part = t * stride + first * 16
        if limit > np.float32(0.0):
            clamped_gate(f, row_g + part, f, row_u + part, (last - first) * 16, alpha, limit)
        else:
            gate(kind, f, row_g + part, f, row_u + part, (last - first) * 16)
        if quant >= matmul.Q8:
            into = h + (entry + t) * (stride // 32) + first // 2
            quantize(f, row_g + part, (last - first + 1) // 2, run.xq, run.xs, run.xn, into)


@inlined
def _down(
    run, at, quant, groups, first, last, biases, outer_rows, entry, rows, g, y, y_stride, h, most, ahead
):
    """Blocks first..last-1 of down for `rows` entries from `entry`."""
    row_y, stride = y + entry * y_stride, groups * 32
    for t in range(rows):
        _begin(run.f, row_y + t * y_stride, first * 16, last * 16, run.w, biases, outer_rows)
    row_g, row_h = g + entry * stride, h + entry * groups
    matmul.product(
        run,
        quant,
        run.pool,
        at,
        groups,
        first,
        last,
        rows,
        row_g,
        stride,
        row_h,
        row_y,
        y_stride,
        most,
        ahead,
    )


@inlined
def _unit(run, c, alpha, limit, i):
    """Take and compute one unit of the i-th busy expert; WORKED, NOTHING to take now, or EMPTY for good."""
    table, routes = run.table, run.routes
    word, groups, blocks, inner, outer, unit = c[3], c[4], c[5], c[6], c[7], c[8]
    kind, x, q, g, u, h = c[9], c[10], c[11], c[12], c[13], c[14]
    starts, busy, counters = c[15], c[16], c[17] + i * COUNTERS
    of_gate, of_up, of_down, inner_rows, outer_rows, experts = c[21], c[22], c[23], c[24], c[25], c[26]
    expert = routes[busy + 1 + i]
    if of_gate >= 0:
        whose = expert if expert < experts else expert - experts  # a stand-in has those of its expert
        of_gate += whose * inner_rows * 4
        of_up += whose * inner_rows * 4
        of_down += whose * outer_rows * 4
    at = atomics.load(table, word + expert * TABLE)  # before the counters: it stays while units are left
    quant = table[word + expert * TABLE + 1]
    entry = routes[starts + expert]
    rows = routes[starts + expert + 1] - entry
    if atomics.load(routes, counters + _DOWN) >= (outer + unit - 1) // unit:
        return EMPTY  # before its place is looked at: it may be gone already
    if at < 0:
        return NOTHING
    units = (blocks + unit - 1) // unit
    if atomics.load(routes, counters + _UP) < units:
        mine = atomics.fetch_add(routes, counters + _UP, 1)
        if mine < units:
            first, last = mine * unit, min(blocks, mine * unit + unit)
            _up(
                run, at, quant, groups, blocks, first, last, kind, alpha, limit, of_gate, of_up, inner_rows,
                entry, rows, x, g, u, inner * 32, q, h, c[18], c[19],
            )  # fmt: skip
            atomics.fetch_add(routes, counters + _UP_DONE, 1)
            return WORKED
    if atomics.load(routes, counters + _UP_DONE) < units:
        return NOTHING
    units = (outer + unit - 1) // unit
    mine = atomics.fetch_add(routes, counters + _DOWN, 1)
    if mine >= units:
        return EMPTY
    first, last = mine * unit, min(outer, mine * unit + unit)
    down = at + 2 * blocks * groups * matmul.record_bytes(quant)
    _down(
        run,
        down,
        quant,
        inner,
        first,
        last,
        of_down,
        outer_rows,
        entry,
        rows,
        g,
        x,
        groups * 32,
        h,
        c[18],
        c[19],
    )
    atomics.fetch_add(routes, counters + _DOWN_DONE, 1)
    return WORKED


@operation(EXPERTS)
def run_experts(packed, i, unit, rows, me):
    """Take units until none is left to take; every thread of the team calls this, then meets a barrier.

    control: of streamed experts, else below 0. alpha, limit: of a clamped gate, or a limit of 0.
    """
    run, c, alpha, limit = operands(packed, i)
    table = run.table
    count, control = run.routes[c[16]], c[20]
    first = 0  # all before it are empty
    idle = 0
    since = np.int64(0)
    while first < count:
        worked = False
        which = first
        while which < count:
            state = _unit(run, c, alpha, limit, which)
            if state == WORKED:
                worked = True
            elif state == EMPTY and which == first:
                first += 1
                which += 1
            else:
                which += 1
        if worked or first == count:
            if idle >= SPINS and me == 0 and control >= 0:
                table[control + WAITED] += atomics.now() - since
            idle = 0
            continue
        if control >= 0 and atomics.load(table, control + FAILED):
            return
        idle += 1
        if idle == SPINS:
            since = atomics.now()
        if idle < SPINS:
            atomics.pause()
        else:
            atomics.give_way()
