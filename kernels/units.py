"""What one unit of each operation of a program computes (see program.py, operations.py)."""

import numpy as np

from edgert.kernels import atomics, gate_rows, matmul, neurons
from edgert.kernels import kv as kv_cache
from edgert.kernels.activation import gate, soft_cap
from edgert.kernels.attention import MOST_HEADS, attention, width
from edgert.kernels.columns import take_columns
from edgert.kernels.elementwise import read_f32
from edgert.kernels.embedding import embed
from edgert.kernels.experts import COUNTERS, publish
from edgert.kernels.jit import jit
from edgert.kernels.operations import operands, operation
from edgert.kernels.program import (
    ACTIVATE,
    AHEAD,
    ATTEND,
    COMBINE,
    DIRECT,
    EMBED,
    EXPERTS,
    FIRED,
    GATE,
    GATE_ROWS,
    GATED,
    GATES,
    GATHER,
    GROUP,
    HEADS,
    LIVE,
    MATMUL,
    NEURONS,
    NEURONS_DOWN,
    NEURONS_READ,
    NEURONS_UP,
    NORM,
    OUTPUT,
    OUTPUTS,
    PARTIAL,
    PATH,
    POSITION,
    PREDICTED,
    PUBLISH,
    QUANTIZE,
    ROPE_TABLE,
    ROUTE,
    SEQUENCE,
    SLOT,
    SPARE,
    TAKE,
)
from edgert.kernels.quantize import quantize, trim
from edgert.kernels.requests import DROPPED, STOOD_IN, SWAPPED
from edgert.kernels.rmsnorm import rmsnorm
from edgert.kernels.rope import rope_table, rotate
from edgert.kernels.routing import affinities, combine, group, keep_groups, route
from edgert.kernels.row_sums import add, center
from edgert.kernels.sparing import spare, stand_in


@operation(NORM)
def _norm(packed, i, t, count, me):
    run, c, real, _ = operands(packed, i)
    w, f, xq, xs, xn = run.w, run.f, run.xq, run.xs, run.xn
    source = run.rows[OUTPUT, t] if c[1] == OUTPUTS else t
    width, gain, groups, at, bias, centred, total = c[5], c[6], c[9], c[10], c[11], c[12], c[13]
    x, y = c[3] + source * c[4], c[7] + t * c[8]
    if centred:
        center(f, x, width, f, y)
        x = y
    rmsnorm(f, x, width, real, w, gain, f, y)
    if bias >= 0:
        add(w, bias, width, f, y)
    if total >= 0:
        add(f, y, width, f, total + t * c[14])
    if groups > 0:
        quantize(f, y, groups, xq, xs, xn, at + t * groups)


@operation(MATMUL)
def _matmul(packed, i, unit, count, me):
    run, c, _, _ = operands(packed, i)
    w, f = run.w, run.f
    quant, w_at, groups, blocks, size = c[3], c[4], c[5], c[6], c[7]
    x, x_stride, at, y, y_stride, bias, keep = c[8], c[9], c[10], c[11], c[12], c[13], c[14]
    most, ahead = c[15], c[16]
    first = unit * size
    last = min(blocks, first + size)
    for t in range(count):
        row = y + t * y_stride
        if keep == 0:
            f[row + first * 16 : row + last * 16] = np.float32(0.0)
        if bias >= 0:
            for n in range(first * 16, last * 16):
                f[row + n] += read_f32(w, bias + n * 4)
    matmul.product(run, quant, w, w_at, groups, first, last, count, x, x_stride, at, y, y_stride, most, ahead)


@jit
def _norm_head(f, at, d, eps, w, gain, scratch):
    """RMSNorm of one head in place, by way of a scratch row padded to whole vectors."""
    for i in range(d):
        f[scratch + i] = f[at + i]
    for i in range(d, (d + 15) // 16 * 16):
        f[scratch + i] = np.float32(0.0)
    rmsnorm(f, scratch, d, eps, w, gain, f, scratch)
    for i in range(d):
        f[at + i] = f[scratch + i]


@operation(HEADS)
def _heads(packed, i, unit, count, me):
    run, c, eps, _ = operands(packed, i)
    w, f, kv, rows = run.w, run.f, run.kv, run.rows
    q, q_stride, k, k_stride, v, v_stride, q_gain, k_gain = c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10]
    heads, kv_heads, d, dv, rotary, table, kind, region = (
        c[11],
        c[12],
        c[13],
        c[14],
        c[15],
        c[16],
        c[17],
        c[18],
    )
    region_bytes, capacity, scratch = c[19], c[20], c[21] + me * c[22]
    t, h = unit // (heads + kv_heads), unit % (heads + kv_heads)
    if h < heads:
        at, gain = q + t * q_stride + h * d, q_gain
    else:
        at, gain = k + t * k_stride + (h - heads) * d, k_gain
    if gain >= 0:
        _norm_head(f, at, d, eps, w, gain, scratch)
    rotate(f, at, rotary // 2, f, table + t * rotary)
    if h >= heads:
        value = v + t * v_stride + (h - heads) * dv
        here, slot = rows[SEQUENCE, t] + region + (h - heads) * region_bytes, rows[SLOT, t]
        if kind == kv_cache.F16:
            kv_cache.store_f16(kv, here, capacity, slot, d, dv, f, at, value)
        elif kind == kv_cache.Q4:
            kv_cache.store_q4(kv, here, capacity, slot, d, dv, f, at, value)
        else:
            kv_cache.store_q8(kv, here, capacity, slot, d, dv, f, at, value)


@jit
def _pieces(group):
    """Calls of `attention` for `group` query heads: fours, then two, then one."""
    return group // MOST_HEADS + (group % MOST_HEADS + 1) // 2


@operation(ATTEND)
def _attend(packed, i, unit, rows, me):
    run, c, scale, cap = operands(packed, i)
    f = run.f
    q, q_stride, heads, kv_heads, d, dv, kind = c[3], c[4], c[5], c[6], c[7], c[8], c[9]
    region, region_bytes, capacity, window, y, y_stride = c[10], c[11], c[12], c[13], c[14], c[15]
    scratch = c[16] + me * c[17]
    group = heads // kv_heads
    pieces = _pieces(group)
    t, shared, piece = unit // (kv_heads * pieces), unit // pieces % kv_heads, unit % pieces
    start = piece * MOST_HEADS
    count = MOST_HEADS
    if start + MOST_HEADS > group:  # what is left after the fours: 3 is two and one
        start = group // MOST_HEADS * MOST_HEADS + (piece - group // MOST_HEADS) * 2
        count = min(2, group - start)
    last = run.rows[POSITION, t] + 1
    first = max(0, last - window) if window > 0 else 0
    here, head = run.rows[SEQUENCE, t] + region + shared * region_bytes, shared * group + start
    at, out = q + t * q_stride + head * d, scratch + MOST_HEADS * capacity
    direct, queries = run.rows[DIRECT, t], c[18] + me * MOST_HEADS * ((d + 31) // 32)
    slopes = c[19] + head * 4 if c[19] >= 0 else -1
    sinks = c[20] + head * 4 if c[20] >= 0 else -1
    attention(
        kind, count, run.kv, here, capacity, d, dv, f, at, scale, first, last, direct, run.paths, t * PATH, f,
        scratch, out, run.xq, run.xs, run.xn, queries, cap, run.w, slopes, sinks,
    )  # fmt: skip
    wide = width(kind, dv)
    for h in range(count):
        for i in range(dv):
            f[y + t * y_stride + (head + h) * dv + i] = f[out + h * wide + i]


@operation(GATE)
def _gate(packed, i, unit, rows, me):
    run, c, _, cap = operands(packed, i)
    f = run.f
    kind, g, u, stride, groups, at = c[3], c[4], c[5], c[6], c[7], c[8]
    pieces = (groups + GATE_GROUPS - 1) // GATE_GROUPS
    t, first = unit // pieces, unit % pieces * GATE_GROUPS
    count = min(GATE_GROUPS, groups - first)
    here = t * stride + first * 32
    if cap > np.float32(0.0):
        soft_cap(f, g + here, count * 32, cap)
    elif u < 0:
        neurons.activate(kind, np.float32(0.0), f, g + here, count * 32)
    else:
        gate(kind, f, g + here, f, u + here, count * 32)
    if at >= 0:
        quantize(f, g + here, count, run.xq, run.xs, run.xn, at + t * groups + first)


GATE_GROUPS = 64
"""Groups of one unit of GATE: 2048 activations, about 2 us of work."""


@operation(ACTIVATE)
def _activate(packed, i, unit, rows, me):
    run, c, threshold, _ = operands(packed, i)
    f = run.f
    kind, g, stride, groups, scores = c[3], c[4], c[5], c[6], c[7]
    pieces = (groups + GATE_GROUPS - 1) // GATE_GROUPS
    t, first = unit // pieces, unit % pieces * GATE_GROUPS
    at, count = t * stride + first * 32, min(GATE_GROUPS, groups - first) * 32
    whole = run.rows[PARTIAL, t] < 0
    neurons.activate(kind, np.float32(0.0) if whole else threshold, f, g + at, count)
    if scores >= 0 and not whole:
        gate_rows.silence(f, g + at, scores + at, count)


@operation(ROUTE)
def _route(packed, i, t, count, me):
    run, c, _, _ = operands(packed, i)
    w, f = run.w, run.f
    x, experts, active, normalized, shared = c[3] + t * c[4], c[5], c[6], c[7], c[8]
    choice, bias, groups = x, c[15], c[16]
    if c[13] >= 0:
        choice = c[13] + t * c[14]
        if bias >= 0:
            affinities(f, x, experts, w, bias, f, choice)
        else:
            for e in range(experts):
                f[choice + e] = f[x + e]
        if groups > 1:
            keep_groups(f, choice, experts, groups, c[17], 2 if bias >= 0 else 1)
    if shared >= 0:
        shared += t * c[9]
    route(
        f, x, f, choice, experts, active, bias >= 0, normalized, shared, run.routes,
        c[10] + t * active, f, c[11] + t * c[12],
    )  # fmt: skip


@operation(SPARE)
def _spare(packed, i, t, count, me):
    run, c, _, _ = operands(packed, i)
    table, f, routes = run.table, run.f, run.routes
    experts, active, first, control = c[5], c[6], c[10], c[11]
    x, chosen, weights = c[3] + t * c[4], c[7] + t * active, c[8] + t * c[9]
    if c[13] > 0 or c[14] > 0:
        near, least = c[13], c[14]
        swapped, dropped = spare(f, x, experts, active, near, least, table, first, routes, chosen, f, weights)
        atomics.fetch_add(table, control + SWAPPED, swapped)
        atomics.fetch_add(table, control + DROPPED, dropped)
    if c[15] > 0:
        replaced = stand_in(f, x, experts, active, c[15], table, first, routes, chosen, f, weights)
        atomics.fetch_add(table, control + STOOD_IN, replaced)


@operation(LIVE)
def _live(packed, i, unit, count, me):
    run, c, _, _ = operands(packed, i)
    fired = neurons.run_live(c, count, run.f, run.xq, run.routes)
    if fired >= 0:
        run.job[FIRED] += fired
        run.job[NEURONS] += c[8]


@operation(PREDICTED)
def _predicted(packed, i, unit, count, me):
    run, c, _, _ = operands(packed, i)
    job = run.job
    found = gate_rows.run_predicted(c, count, run.f, run.xq, run.routes, run.rows)
    if count <= neurons.MOST_ROWS:
        job[GATES] += found if found >= 0 else c[8]
        job[GATED] += c[8]


@operation(GROUP)
def _group(packed, i, unit, count, me):
    run, c, _, _ = operands(packed, i)
    routes = run.routes
    experts, counters = c[3], c[10]
    group(count, c[4], experts, routes, c[5], c[6], c[7], c[8], c[9])
    routes[counters : counters + experts * COUNTERS] = 0


@operation(PUBLISH)
def _publish(packed, i, unit, count, me):
    run, c, _, _ = operands(packed, i)
    publish(
        count, c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], run.job[AHEAD], c[11], run.f, run.routes,
        run.table,
    )  # fmt: skip


@operation(GATHER)
def _gather(packed, i, t, count, me):
    run, c, _, _ = operands(packed, i)
    f, xq, xs, xn, routes = run.f, run.xq, run.xs, run.xn, run.routes
    active, places, x, groups, y, floats = c[3], c[4], c[5] + t * c[6] * 32, c[6], c[8], c[10]
    at = c[7] + t * groups
    for r in range(active):
        entry = routes[places + t * active + r]
        if floats:
            for k in range(groups * 32):
                f[y + entry * groups * 32 + k] = f[x + k]
        into = c[9] + entry * groups
        for k in range(groups * 32):
            xq[into * 32 + k] = xq[at * 32 + k]
        for g in range(groups):
            xs[into + g] = xs[at + g]
            xn[into + g] = xn[at + g]


@operation(COMBINE)
def _combine(packed, i, t, count, me):
    run, c, _, _ = operands(packed, i)
    f = run.f
    x, width, y, y_stride, active, shared = c[3] + t * c[4], c[5], c[6], c[7], c[9], c[12]
    places, weights = c[8] + t * active, c[10] + t * c[11]
    if shared >= 0:
        shared += t * c[13]
    combine(f, x, width, f, y, y_stride, run.routes, places, active, f, weights, shared)


@operation(TAKE)
def _take(packed, i, t, rows, me):
    run, c, _, _ = operands(packed, i)
    f, xq, xs, xn = run.f, run.xq, run.xs, run.xn
    x, groups, count, y = c[3] + t * c[4], c[5], c[8], c[9] + t * c[10]
    take_columns(f, x, run.w, c[7], count, f, y)
    quantize(f, x, groups, xq, xs, xn, c[6] + t * groups)
    quantize(f, y, count // 32, xq, xs, xn, c[11] + t * (count // 32))


@operation(QUANTIZE)
def _quantize(packed, i, t, count, me):
    run, c, least, _ = operands(packed, i)
    x = c[3] + t * c[4]
    if least > np.float32(0.0) and run.rows[PARTIAL, t] >= 0:
        trim(run.f, x, c[5] * 32, least)
    quantize(run.f, x, c[5], run.xq, run.xs, run.xn, c[6] + t * c[5])


@operation(ROPE_TABLE)
def _rope_table(packed, i, t, count, me):
    run, c, magnitude, _ = operands(packed, i)
    rope_table(run.rows[POSITION, t], run.w, c[3], c[4], magnitude, run.f, c[5] + t * c[4] * 2)


@operation(EMBED)
def _embed(packed, i, t, count, me):
    run, c, _, _ = operands(packed, i)
    at = c[7] + t * c[8]
    embed(c[3], run.w, c[4], c[5], run.rows[c[6], t], run.f, at)
    if c[9] >= 0:
        add(run.f, at, c[5] * 32, run.f, c[9] + t * c[10])


@jit
def units_of(c, count, routes):
    """How many units an operation of `count` rows has."""
    op = c[0]
    if count == 0:
        return 0
    if op == MATMUL:
        return (c[6] + c[7] - 1) // c[7]
    if op == HEADS:
        return count * (c[11] + c[12])
    if op == ATTEND:
        return count * c[6] * _pieces(c[5] // c[6])
    if op == GATE:
        return count * ((c[7] + GATE_GROUPS - 1) // GATE_GROUPS)
    if op == ACTIVATE:
        return count * ((c[6] + GATE_GROUPS - 1) // GATE_GROUPS)
    if op == NEURONS_UP:
        return neurons.units_of_up(c, count, routes)
    if op == NEURONS_DOWN:
        return neurons.units_of_down(c)
    if op == GATE_ROWS:
        return gate_rows.units_of_gate(c, routes)
    if op == GROUP or op == PUBLISH or op == LIVE or op == PREDICTED or op == NEURONS_READ:
        return 1
    if op == EXPERTS or (op == SPARE and count > c[12]):
        return 0
    return count
