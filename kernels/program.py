"""A forward pass as a table of operations, and the one compiled function that executes it.

A program is an int64 array [operations, COLUMNS] and a float32 array [operations] beside it. Every
operation is cut into units; threads take units from an atomic counter, so that a slow core takes
fewer, and meet at a barrier where the next operation needs all of them. Each unit computes its
outputs whole and in a fixed order, so results depend neither on threads nor on who took what.

Operands are indices into the arrays of a run: w (the weights, bytes), f (float32 buffers), xq, xs, xn
(quantised rows, by group), kv (the cache, bytes), routes (which expert takes which row, int64), and
table, which says where in pool (bytes) each expert lies. Column 0 is the operation, column 1 what
its rows are (see TOKENS), column 2 whether a barrier follows; the rest is listed in FIELDS.
"""

import numpy as np
from numpy.typing import NDArray

from edgert.kernels import atomics, matmul, team
from edgert.kernels import kv as kv_cache
from edgert.kernels.activation import gate
from edgert.kernels.attention import MOST_HEADS, attention, width
from edgert.kernels.elementwise import read_f32
from edgert.kernels.embedding import embed
from edgert.kernels.experts import COUNTERS, publish, run_experts
from edgert.kernels.jit import jit
from edgert.kernels.quantize import quantize
from edgert.kernels.rmsnorm import rmsnorm
from edgert.kernels.rope import rope_table, rotate
from edgert.kernels.routing import combine, group, route

COLUMNS = 24
(
    EMBED,
    ROPE_TABLE,
    NORM,
    MATMUL,
    HEADS,
    ATTEND,
    QUANTIZE,
    GATE,
    ROUTE,
    GROUP,
    GATHER,
    EXPERTS,
    COMBINE,
    PUBLISH,
) = range(14)
TOKENS, OUTPUTS, CHOSEN, FORESEEN = range(4)
"""Rows of an operation: all tokens; the wanted ones, gathered from among them; those gathered before; or
all tokens where the next layer's experts are to be predicted, else none."""

FIELDS = {
    EMBED: ("quant", "w_at", "groups", "y", "y_stride"),
    ROPE_TABLE: ("frequencies", "half", "table"),
    NORM: ("x", "x_stride", "width", "gain", "y", "y_stride", "groups", "xq"),
    MATMUL: (
        "quant",
        "w_at",
        "groups",
        "blocks",
        "unit",
        "x",
        "x_stride",
        "xq",
        "y",
        "y_stride",
        "bias",
        "keep",
        "most",
        "ahead",
    ),
    HEADS: (
        *("q", "q_stride", "k", "k_stride", "v", "v_stride", "q_gain", "k_gain", "heads", "kv_heads", "d"),
        *("table", "kind", "region", "region_bytes", "capacity", "scratch", "scratch_stride"),
    ),
    ATTEND: (
        *("q", "q_stride", "heads", "kv_heads", "d", "kind", "region", "region_bytes", "capacity"),
        *("window", "y", "y_stride", "scratch", "scratch_stride", "queries"),
    ),
    QUANTIZE: ("x", "x_stride", "groups", "xq"),
    GATE: ("kind", "g", "u", "stride", "groups", "xq"),
    ROUTE: (
        *("x", "x_stride", "experts", "active", "normalized", "shared", "shared_stride"),
        *("chosen", "weights", "weights_stride"),
    ),
    GROUP: (*("experts", "active", "chosen", "sources", "places", "starts", "busy", "counters"),),
    GATHER: ("active", "places", "x", "groups", "xq", "y", "yq", "floats"),
    EXPERTS: (
        *("table", "groups", "blocks", "inner", "outer", "unit", "kind", "x", "xq", "g", "u", "h"),
        *("starts", "busy", "counters", "most", "ahead", "control"),
    ),
    PUBLISH: (
        *("layer", "experts", "active", "chosen", "weights", "weights_stride", "busy", "ahead", "control"),
    ),
    COMBINE: (
        *("x", "x_stride", "width", "y", "y_stride", "places", "active", "weights", "weights_stride"),
        *("shared", "shared_stride"),
    ),
}
"""Operands of each operation, in the order of its columns from 3 on, which its function unpacks.

    EMBED       y[t] = W[token t]
    ROPE_TABLE  table[t] = cos and sin of position t                  (real: magnitude)
    NORM        y[t] = rmsnorm(x[t]); quantised too where groups > 0  (real: eps)
    MATMUL      y[t] = W x[t] (+ bias); added to y where keep; reads xq for q8 and q4, else x
                (`unit` blocks at a time; `most` and `ahead` as in matmul.py)
    HEADS       q and k heads: norm where gain >= 0, rotate; k and v into the cache
    ATTEND      y[t] = attention of every head                        (real: scale)
    QUANTIZE    xq[t] = int8 of x[t]
    GATE        g[t] = act(g[t]) * u[t]; quantised too where xq >= 0
    ROUTE       the experts of row t and their weights (routing.py)
    GROUP       the entries of every expert; one unit
    PUBLISH     what the layer needs, to the store of streamed experts; one unit
    GATHER      y[i] = x[t], quantised rows and, where asked, floats, for the entries i of row t
    EXPERTS     the experts of all entries, in place of their x (experts.py); no units
    COMBINE     x[t] += the weighted sum of the entries of row t

Buffers hold one row per token at their stride. A row is padded with zeros to whole groups of 32.
"""

# The job of one execution.
FIRST, LAST, ROWS, WANTED, AHEAD = range(5)
JOB_WORDS = 8
"""FIRST, LAST: operations; ROWS: tokens; WANTED: output rows; AHEAD: rows for which
experts are predicted."""

# Rows of the int64 array that describes the tokens of a forward.
TOKEN, POSITION, SLOT, SEQUENCE, DIRECT, OUTPUT = range(6)
TOKEN_WORDS = 6
"""TOKEN, POSITION: its id, and its place in its sequence; SLOT: where its key and value go; SEQUENCE: the
byte where the cache of its sequence starts; DIRECT: positions below it lie in their own slots, those from
it on in the slots of the row's `paths`; OUTPUT: (of the first WANTED columns) the row to give."""
PATH = 64
"""Length of a row of `paths`: slots of the ancestors of a tree node, itself last; the deepest tree."""


def encode(op: int, rows: int, barrier: bool, **operands: int) -> NDArray[np.int64]:
    """One row of the table; every operand of FIELDS[op] must be given, and no other."""
    if set(operands) != set(FIELDS[op]):
        raise AssertionError(f"operands {sorted(operands)}, expected {sorted(FIELDS[op])}")
    row = np.zeros(COLUMNS, np.int64)
    row[:3] = op, rows, barrier
    row[3 : 3 + len(FIELDS[op])] = [operands[name] for name in FIELDS[op]]
    return row


@jit
def _norm(c, real, t, source, w, f, xq, xs, xn):
    x, x_stride, width, gain, y, y_stride, groups, at = c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10]
    rmsnorm(f, x + source * x_stride, width, real, w, gain, f, y + t * y_stride)
    if groups > 0:
        quantize(f, y + t * y_stride, groups, xq, xs, xn, at + t * groups)


@jit
def _matmul(c, unit, rows, w, f, xq, xs, xn):
    quant, w_at, groups, blocks, size = c[3], c[4], c[5], c[6], c[7]
    x, x_stride, at, y, y_stride, bias, keep = c[8], c[9], c[10], c[11], c[12], c[13], c[14]
    most, ahead = c[15], c[16]
    first = unit * size
    last = min(blocks, first + size)
    for t in range(rows):
        row = y + t * y_stride
        if keep == 0:
            f[row + first * 16 : row + last * 16] = np.float32(0.0)
        if bias >= 0:
            for n in range(first * 16, last * 16):
                f[row + n] += read_f32(w, bias + n * 4)
    matmul.matmul(
        quant, w, w_at, groups, first, last, rows, f, x, x_stride, xq, xs, xn, at, y, y_stride, most, ahead
    )


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


@jit
def _head(c, eps, unit, rows, me, w, f, kv):
    q, q_stride, k, k_stride, v, v_stride, q_gain, k_gain = c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10]
    heads, kv_heads, d, table, kind, region = c[11], c[12], c[13], c[14], c[15], c[16]
    region_bytes, capacity, scratch = c[17], c[18], c[19] + me * c[20]
    t, h = unit // (heads + kv_heads), unit % (heads + kv_heads)
    if h < heads:
        at, gain = q + t * q_stride + h * d, q_gain
    else:
        at, gain = k + t * k_stride + (h - heads) * d, k_gain
    if gain >= 0:
        _norm_head(f, at, d, eps, w, gain, scratch)
    rotate(f, at, d // 2, f, table + t * d)
    if h >= heads:
        value = v + t * v_stride + (h - heads) * d
        here, slot = rows[SEQUENCE, t] + region + (h - heads) * region_bytes, rows[SLOT, t]
        if kind == kv_cache.F16:
            kv_cache.store_f16(kv, here, capacity, slot, d, f, at, value)
        elif kind == kv_cache.Q4:
            kv_cache.store_q4(kv, here, capacity, slot, d, f, at, value)
        else:
            kv_cache.store_q8(kv, here, capacity, slot, d, f, at, value)


@jit
def _pieces(group):
    """Calls of `attention` for `group` query heads: fours, then two, then one."""
    return group // MOST_HEADS + (group % MOST_HEADS + 1) // 2


@jit
def _attend(c, scale, unit, rows, paths, me, f, xq, xs, xn, kv):
    q, q_stride, heads, kv_heads, d, kind = c[3], c[4], c[5], c[6], c[7], c[8]
    region, region_bytes, capacity, window, y, y_stride = c[9], c[10], c[11], c[12], c[13], c[14]
    scratch = c[15] + me * c[16]
    group = heads // kv_heads
    pieces = _pieces(group)
    t, shared, piece = unit // (kv_heads * pieces), unit // pieces % kv_heads, unit % pieces
    start = piece * MOST_HEADS
    count = MOST_HEADS
    if start + MOST_HEADS > group:  # what is left after the fours: 3 is two and one
        start = group // MOST_HEADS * MOST_HEADS + (piece - group // MOST_HEADS) * 2
        count = min(2, group - start)
    last = rows[POSITION, t] + 1
    first = max(0, last - window) if window > 0 else 0
    here, head = rows[SEQUENCE, t] + region + shared * region_bytes, shared * group + start
    at, out = q + t * q_stride + head * d, scratch + MOST_HEADS * capacity
    direct, queries = rows[DIRECT, t], c[17] + me * MOST_HEADS * ((d + 31) // 32)
    attention(
        kind,
        count,
        kv,
        here,
        capacity,
        d,
        f,
        at,
        scale,
        first,
        last,
        direct,
        paths,
        t * PATH,
        f,
        scratch,
        out,
        xq,
        xs,
        xn,
        queries,
    )
    wide = width(kind, d)
    for h in range(count):
        for i in range(d):
            f[y + t * y_stride + (head + h) * d + i] = f[out + h * wide + i]


@jit
def _gate(c, unit, f, xq, xs, xn):
    kind, g, u, stride, groups, at = c[3], c[4], c[5], c[6], c[7], c[8]
    pieces = (groups + GATE_GROUPS - 1) // GATE_GROUPS
    t, first = unit // pieces, unit % pieces * GATE_GROUPS
    count = min(GATE_GROUPS, groups - first)
    here = t * stride + first * 32
    gate(kind, f, g + here, f, u + here, count * 32)
    if at >= 0:
        quantize(f, g + here, count, xq, xs, xn, at + t * groups + first)


GATE_GROUPS = 64
"""Groups of one unit of GATE: 2048 activations, about 2 us of work."""


@jit
def _route(c, t, f, routes):
    x, experts, active, normalized, shared = c[3] + t * c[4], c[5], c[6], c[7], c[8]
    if shared >= 0:
        shared += t * c[9]
    route(f, x, experts, active, normalized, shared, routes, c[10] + t * active, f, c[11] + t * c[12])


@jit
def _group(c, count, routes):
    experts, counters = c[3], c[10]
    group(count, c[4], experts, routes, c[5], c[6], c[7], c[8], c[9])
    routes[counters : counters + experts * COUNTERS] = 0


@jit
def _gather(c, t, f, xq, xs, xn, routes):
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


@jit
def _combine(c, t, f, routes):
    x, width, y, y_stride, active, shared = c[3] + t * c[4], c[5], c[6], c[7], c[9], c[12]
    places, weights = c[8] + t * active, c[10] + t * c[11]
    if shared >= 0:
        shared += t * c[13]
    combine(f, x, width, f, y, y_stride, routes, places, active, f, weights, shared)


@jit
def _units(c, count):
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
    if op == GROUP or op == PUBLISH:
        return 1
    if op == EXPERTS:
        return 0
    return count


@jit
def _run_unit(c, real, unit, count, me, w, table, f, xq, xs, xn, kv, routes, rows, paths, job):
    op = c[0]
    if op == MATMUL:
        _matmul(c, unit, count, w, f, xq, xs, xn)
    elif op == ATTEND:
        _attend(c, real, unit, rows, paths, me, f, xq, xs, xn, kv)
    elif op == GATE:
        _gate(c, unit, f, xq, xs, xn)
    elif op == NORM:
        _norm(c, real, unit, rows[OUTPUT, unit] if c[1] == OUTPUTS else unit, w, f, xq, xs, xn)
    elif op == HEADS:
        _head(c, real, unit, rows, me, w, f, kv)
    elif op == ROUTE:
        _route(c, unit, f, routes)
    elif op == GROUP:
        _group(c, count, routes)
    elif op == PUBLISH:
        publish(count, c[3], c[4], c[5], c[6], c[7], c[8], c[9], c[10], job[AHEAD], c[11], f, routes, table)
    elif op == GATHER:
        _gather(c, unit, f, xq, xs, xn, routes)
    elif op == COMBINE:
        _combine(c, unit, f, routes)
    elif op == QUANTIZE:
        quantize(f, c[3] + unit * c[4], c[5], xq, xs, xn, c[6] + unit * c[5])
    elif op == ROPE_TABLE:
        rope_table(rows[POSITION, unit], w, c[3], c[4], real, f, c[5] + unit * c[4] * 2)
    else:
        embed(c[3], w, c[4], c[5], rows[TOKEN, unit], f, c[6] + unit * c[7])


@jit
def _count(c, job):
    """Rows of an operation."""
    return job[ROWS] if c[1] == TOKENS else job[AHEAD] if c[1] == FORESEEN else job[WANTED]


@jit
def _past_singles(i, code, job):
    """The first operation from `i` on that is more than one unit, or runs beside the next."""
    while i < job[LAST] and code[i, 2] and _units(code[i], _count(code[i], job)) == 1:
        i += 1
    return i


@jit
def _execute(
    me, threads, code, reals, w, pool, table, f, xq, xs, xn, kv, routes, rows, paths, job, ctl, tickets
):
    i = until = job[FIRST]  # what lies before `until` this thread does alone, the others wait for it
    while i < job[LAST]:
        c, count = code[i], _count(code[i], job)
        if c[0] == EXPERTS:
            run_experts(me, c, pool, table, routes, f, xq, xs, xn)
        units, shared = _units(c, count), threads > 1 and i >= until
        unit = atomics.fetch_add(tickets, i, 1) if shared else 0
        while unit < units:
            _run_unit(c, reals[i], unit, count, me, w, table, f, xq, xs, xn, kv, routes, rows, paths, job)
            unit = atomics.fetch_add(tickets, i, 1) if shared else unit + 1
        i += 1
        if i == until:
            team.let_go(ctl, threads)
        elif i > until and c[2]:
            # Single units that follow (the norm of one row) are done by the last to arrive while the others
            # wait for it in any case: one barrier instead of two.
            then = _past_singles(i, code, job)
            if not team.arrive(ctl, threads):
                i = then
            elif then == i:
                team.let_go(ctl, threads)
            until = then


@jit
def enter(
    worker, workers, code, reals, w, pool, table, f, xq, xs, xn, kv, routes, rows, paths, job, ctl, tickets
):
    """Thread 0 executes one job with whoever is ready; a worker (1, 2, ...) serves until it parks.

    One compiled entry for both, so that the kernels exist once in machine code.
    """
    if worker == 0:
        tickets[job[FIRST] : job[LAST]] = 0
        threads = team.claim(ctl, workers)
        _execute(
            0, threads, code, reals, w, pool, table, f, xq, xs, xn, kv, routes, rows, paths, job, ctl, tickets
        )
        team.barrier(ctl, threads)
        return
    team.set_ready(ctl, worker)
    while True:
        rank = team.wait_for_rank(ctl, worker)
        if rank == 0:
            return
        threads = team.threads_claimed(ctl)
        _execute(
            rank,
            threads,
            code,
            reals,
            w,
            pool,
            table,
            f,
            xq,
            xs,
            xn,
            kv,
            routes,
            rows,
            paths,
            job,
            ctl,
            tickets,
        )
        team.set_ready(ctl, worker)  # before the barrier: the leader may start the next job at once
        team.barrier(ctl, threads)
