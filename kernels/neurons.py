"""The feed-forward neuron by neuron: only those that fire are read (PowerInfer-2, section 4.2).

    a[n] = act(gate[n]);  h[n] = a[n] * (W_up[n] x);  y = W_down h        n: the neurons with a[n] != 0

A neuron whose activation is zero adds fma(0, w, y) = y to every output: leaving it out changes no bit. The
gate is computed whole. Of up, some neurons that fire are a unit; of down, some slices of the outputs, so that
each output is whole in one unit. Several rows at once take the neurons that fire for any of them. With more
rows than MOST_ROWS nearly all do, and unpacking a weight once for all rows is worth more than not reading it:
up and down are then brought into the order of rows16, some blocks at a time, and multiplied as any matrix.
"""

import numpy as np

from edgert.kernels import matmul, neuron_reads, neuron_tiles, simd
from edgert.kernels.activation import activated
from edgert.kernels.jit import inlined, jit, kernel
from edgert.kernels.neuron_packing import SLICE
from edgert.kernels.operations import operands, operation
from edgert.kernels.program import NEURONS_DOWN, NEURONS_READ, NEURONS_UP
from edgert.kernels.reference import neurons as _twin

MOST_ROWS = 8
"""Rows up to which single neurons are computed: where 15% fire for one row, 73% do for any of 8 unrelated."""
NONE, ONE = np.int64(0), np.int64(1)
"""For arguments of `matmul`: numba would compile it once more for a literal 0."""
NOWHERE = np.int64(-1)
"""For `word` where nothing comes from flash."""
BATCH, LONG_BATCH = 16, 64
"""Neurons of a unit of up. The first four of a unit are not asked for early, as nobody knows who will take
it: with 64 two threads read 1.2 times as fast as with 16."""
MANY = 1024
"""Neurons from which units are long: there are then 16 of them or more, enough for as many threads."""
ROWS_AHEAD = 7
"""Entries of the list that are read past the last neuron: it is taken in fours, and the next four are asked
for. What stands there may be any neuron."""

_rows_q4, _rows_q8 = neuron_tiles.row_sums("q4"), neuron_tiles.row_sums("q8")
_add_q4, _add_q8 = neuron_tiles.add_columns("q4"), neuron_tiles.add_columns("q8")
_block_q4, _block_q8 = neuron_tiles.rows_of_up("q4"), neuron_tiles.rows_of_up("q8")
_group_q4, _group_q8 = neuron_tiles.group_of_down("q4"), neuron_tiles.group_of_down("q8")


@jit
def batch(count):
    """Neurons of a unit, of `count`."""
    return LONG_BATCH if count >= MANY else BATCH


@jit
def sizes(quant, groups):
    """Spans and slices of a neuron of `groups` groups; bytes of the scales, a row of up, a column of down."""
    spans, slices = (groups + 15) // 16, (groups + 3) // 4
    return spans, slices, slices * 256, spans * matmul.record_bytes(quant), slices * slice_bytes(quant)


@jit
def slice_bytes(quant):
    """Bytes of 128 outputs of one neuron."""
    return 64 if quant == matmul.Q4 else 128


@jit
def _neuron(n, w_at, scales, bundle):
    """The byte where neuron n of whole clusters starts."""
    return w_at + n // 32 * (scales + 32 * bundle) + scales + n % 32 * bundle


@jit
def _place(n, w_at, scales, bundle, word, table):
    """The byte where neuron n starts: in its cluster, or, from flash, where `table` says.

    One that has not arrived may be asked for early, but nothing comes of it: any byte will do.
    """
    if word < 0:
        return _neuron(n, w_at, scales, bundle)
    return max(NONE, table[word + max(NONE, n)])


@kernel(_twin.activate)
def activate(kind, threshold, g, g_at, count):
    """g[g_at : g_at + count] <- act(g), or 0 where that is below `threshold` in magnitude; count: of 16."""
    for i in range(0, count, 16):
        value = activated(kind, simd.load_f32(g, g_at + i))
        simd.store_f32(g, g_at + i, simd.not_below(value, simd.splat(threshold)))


@kernel(_twin.multiply, inline=True)
def multiply(g, g_at, u, u_at, count):
    """g[g_at : g_at + count] *= u; count: of 16."""
    for i in range(0, count, 16):
        simd.store_f32(g, g_at + i, simd.mul(simd.load_f32(g, g_at + i), simd.load_f32(u, u_at + i)))


@kernel(_twin.spread)
def spread(x, x_at, groups, y, y_at):
    """A row of int8 in the order in which rows of up take it.

    Per span of 16 groups: y[y_at + 512 s + 64 j + 4 g + b] = x[x_at + 32 (16 s + g) + 4 j + b].
    """
    for group in range(groups):
        span, g = group // 16, group % 16
        for j in range(8):
            neuron_tiles.move_four(x, x_at + group * 32 + 4 * j, y, y_at + span * 512 + j * 64 + g * 4)


@kernel(_twin.list_live, inline=True)
def list_live(g, g_at, stride, rows, width, routes, at):
    """routes[at] = how many neurons have a g that is not zero in any row; which, from routes[at + 1] on."""
    count = 0
    for n in range(width):
        live = g[g_at + n] != np.float32(0.0)
        for t in range(1, rows):
            live |= g[g_at + t * stride + n] != np.float32(0.0)
        routes[at + 1 + count] = n  # overwritten by the next where it does not count: no branch to mispredict
        count += 1 if live else 0
    routes[at] = count


@kernel(_twin.add_up)
def add_up(
    quant, w, w_at, scales, bundle, word, table, groups, routes, first, count, x, x_at, xs, xn, s_at, f, work,
    y,
):  # fmt: skip
    """f[y + n] += W_up[n] x for the neurons n at routes[first : first + count]; more follow them.

    The rows lie `bundle` bytes apart, with `scales` bytes before each 32 of them; or, where `word` is not
    below 0, each where `table` says, from that word on.
    x: spread int8 from x_at, with scales and sums from group s_at. Bit for bit the sums of `matmul`.
    work: `count` floats, in fours.
    """
    spans = (groups + 15) // 16
    for i in range(0, count, neuron_tiles.ROWS):
        here = first + i
        a = _place(routes[here], w_at, scales, bundle, word, table)
        b = _place(routes[here + 1], w_at, scales, bundle, word, table)
        c = _place(routes[here + 2], w_at, scales, bundle, word, table)
        d = _place(routes[here + 3], w_at, scales, bundle, word, table)
        e = _place(routes[here + 4], w_at, scales, bundle, word, table)
        g = _place(routes[here + 5], w_at, scales, bundle, word, table)
        h = _place(routes[here + 6], w_at, scales, bundle, word, table)
        j = _place(routes[here + 7], w_at, scales, bundle, word, table)
        if quant == matmul.Q4:
            _rows_q4(w, x, xs, xn, f, a, b, c, d, spans, x_at, s_at, work + i, e, g, h, j)
        else:
            _rows_q8(w, x, xs, xn, f, a, b, c, d, spans, x_at, s_at, work + i, e, g, h, j)
    for i in range(count):
        f[y + routes[first + i]] += f[work + i]


QUAD_LIST = 8 * neuron_tiles.QUAD_WORDS
"""Words of a list of the neurons of a group, in fours."""


@jit
def _next_quads(xq, h_at, g, inner, inside, w_at, scales, bundle, word, table, routes, quads):
    """The first group from g on with an int8 that is not zero, and in how many fours its neurons are.

    inside: the byte of a neuron from which its column is wanted. The fours are from routes[quads], the last
    one filled with its first neuron, times zero. Where no group is left there are none.
    """
    mask, count = 0, 0
    while g < inner and mask == 0:
        mask = neuron_tiles.nonzero(xq, (h_at + g) * 32)
        g += 1
    g -= 1
    at, group = (h_at + g) * 32, g * 32
    while mask != 0:
        into = quads + count * neuron_tiles.QUAD_WORDS
        n = group + neuron_tiles.lowest_bit(mask)
        first = _place(n, w_at, scales, bundle, word, table) + inside
        h = np.int64(0)
        for i in range(4):
            place = first
            if mask != 0:
                n = neuron_tiles.lowest_bit(mask)
                place = _place(group + n, w_at, scales, bundle, word, table) + inside
                h |= (np.int64(xq[at + n]) & 255) << (8 * i)
                mask &= mask - 1
            routes[into + i] = place
        routes[into + 4] = h
        count += 1
    return g, count


@kernel(_twin.add_down, inline=True)
def add_down(
    quant, w, w_at, word, table, groups, inner, first, last, xq, xs, xn, h_at, f, work, y, routes, quads
):  # fmt: skip
    """f[y + d] += (W_down h)[d] for the outputs d of slices first..last-1, from the `inner` groups of h.

    Reads the columns of the neurons whose int8 in xq is not zero. Bit for bit the sums of `matmul`.
    word: as of `add_up`; at w_at are then the scales alone.
    work: SLICE floats for every slice; quads: two lists of QUAD_LIST words.
    """
    _, _, scales, up, down = sizes(quant, groups)
    bundle, slices = up + down, last - first
    for i in range(slices * SLICE):
        f[work + i] = np.float32(0.0)
    here, there = quads, quads + QUAD_LIST
    inside = up + first * slice_bytes(quant)
    start, apart = w_at + first * 256, scales + (32 * bundle if word < 0 else 0)  # of the scales of group 0
    g, count = _next_quads(xq, h_at, NONE, inner, inside, w_at, scales, bundle, word, table, routes, here)
    while count > 0:
        then, coming = _next_quads(
            xq, h_at, g + 1, inner, inside, w_at, scales, bundle, word, table, routes, there
        )
        at, next_at, total = start + g * apart, start + then * apart, np.int64(xn[h_at + g])
        if quant == matmul.Q4:
            _add_q4(w, f, xs, routes, here, count, total, h_at + g, at, slices, work, there, coming, next_at)
        else:
            _add_q8(w, f, xs, routes, here, count, total, h_at + g, at, slices, work, there, coming, next_at)
        here, there, g, count = there, here, then, coming
    for i in range(min(slices * SLICE, groups * 32 - first * SLICE)):
        f[y + first * SLICE + i] += f[work + i]


@kernel(_twin.block_of_up)
def block_of_up(quant, w, w_at, scales, bundle, groups, block, out, out_at):
    """Rows 16 * block .. + 15 as one block of rows16 from out[out_at], 16 groups for every span."""
    spans = (groups + 15) // 16
    at = _neuron(block * 16, w_at, scales, bundle)
    if quant == matmul.Q4:
        _block_q4(w, out, at, bundle, spans, out_at)
    else:
        _block_q8(w, out, at, bundle, spans, out_at)


@kernel(_twin.slice_of_down, inline=True)
def slice_of_down(quant, w, w_at, groups, inner, which, out, out_at):
    """Outputs 128 * which .. + 127 of down as 8 blocks of rows16 of `inner` groups from out[out_at]."""
    _, _, scales, up, down = sizes(quant, groups)
    size, bundle = matmul.record_bytes(quant), up + down
    for g in range(inner):
        cluster = w_at + g * (scales + 32 * bundle)
        at, factors = cluster + scales + up + which * slice_bytes(quant), cluster + which * 256
        if quant == matmul.Q4:
            _group_q4(w, out, at, bundle, factors, out_at + g * size, inner * size)
        else:
            _group_q8(w, out, at, bundle, factors, out_at + g * size, inner * size)


# ---- units of the operations of program.py ---------------------------------------------------


@inlined
def run_live(c, rows, f, xq, routes):
    """What the layer's up needs before its units are known; how many neurons fire, -1 if nobody asked."""
    x, groups, into, g, stride, width, at = c[3], c[4], c[5], c[6], c[7], c[8], c[9]
    if rows > MOST_ROWS:
        return -1
    spans = (groups + 15) // 16
    for t in range(rows if x >= 0 else 0):
        spread(xq, (x + t * groups) * 32, groups, xq, into * 32 + t * spans * 512)
    list_live(f, g, stride, rows, width, routes, at)
    return routes[at]


@operation(NEURONS_READ)
def run_read(packed, i, unit, rows, me):
    """Ask for what the layer needs from flash, where it comes from there."""
    run, c, _, _ = operands(packed, i)
    routes, table = run.routes, run.table
    word, file_at, nbytes, cluster, bundle = c[3], c[4], c[5], c[6], c[7]
    live, whole, control = c[8], c[9], c[10]
    if table[control + neuron_reads.FAILED]:
        return  # the forward is lost, and ends without waiting for anything
    if rows > MOST_ROWS:
        neuron_reads.ask_whole(file_at, nbytes, whole, control, table)
    else:
        neuron_reads.ask_live(word, file_at, cluster, bundle, live, control, routes, table)
    if table[control + neuron_reads.ALONE]:
        neuron_reads.wait_for_all(0, control, table)


@jit
def units_of_up(c, rows, routes):
    """Units of up; never one, so that whoever asks before `run_live` takes it for more than a single."""
    if rows > MOST_ROWS:
        return (c[6] + BATCH - 1) // BATCH
    size = batch(routes[c[7]])
    return max(2, (routes[c[7]] + size - 1) // size)


@operation(NEURONS_UP)
def run_up(packed, i, unit, rows, me):
    """Some neurons that fire, or 16 of all; from flash, the next that arrive, whichever those are."""
    run, c, _, _ = operands(packed, i)
    w, table, f, xq, xs, xn, routes = run.pool, run.table, run.f, run.xq, run.xs, run.xn, run.routes
    quant, w_at, groups, at, x, into = c[3], c[4], c[5], c[7], c[8], c[9]
    g, u, stride, work = c[10], c[11], c[12], c[13] + me * c[14]
    _, _, scales, up, down = sizes(quant, groups)
    word, whole, control = c[18], c[19], c[20]
    if rows > MOST_ROWS:
        if control >= 0 and not neuron_reads.wait_for_all(me, control, table):
            return
        out, n = me * c[15], unit * BATCH
        block_of_up(quant, w, whole, scales, up + down, groups, unit, run.spare, out)
        for t in range(rows):
            f[u + t * stride + n : u + t * stride + n + BATCH] = np.float32(0.0)
        matmul.product(
            run,
            quant,
            run.spare,
            out,
            groups,
            NONE,
            ONE,
            rows,
            NONE,
            NONE,
            x,
            u + n,
            stride,
            c[16],
            c[17],
        )
        for t in range(rows):
            multiply(f, g + t * stride + n, f, u + t * stride + n, BATCH)
        return
    size, spans = batch(routes[at]), (groups + 15) // 16
    first = unit * size
    count = min(size, routes[at] - first)
    if count <= 0:
        return
    first += at + 1
    if control >= 0 and not neuron_reads.wait_for(me, first, count, control, routes, table):
        return
    for t in range(rows):
        row, gated = u + t * stride, g + t * stride
        for i in range(count):
            f[row + routes[first + i]] = np.float32(0.0)
        spread_at = into * 32 + t * spans * 512
        add_up(
            quant, w, w_at, scales, up + down, word, table, groups, routes, first, count, xq, spread_at, xs,
            xn, x + t * groups, f, work, row,
        )  # fmt: skip
        for i in range(count):
            n = routes[first + i]
            f[gated + n] *= f[row + n]


@jit
def units_of_down(c):
    """Units of down."""
    return ((c[5] + 3) // 4 + c[7] - 1) // c[7]


@operation(NEURONS_DOWN)
def run_down(packed, i, unit, rows, me):
    """Some slices of the outputs."""
    run, c, _, _ = operands(packed, i)
    w, table, f, xq, xs, xn, routes = run.pool, run.table, run.f, run.xq, run.xs, run.xn, run.routes
    quant, w_at, groups, inner, size, h = c[3], c[4], c[5], c[6], c[7], c[8]
    y, y_stride, work, out = c[9], c[10], c[11] + me * c[12], me * c[13]
    word, whole = c[17], c[18]
    first = unit * size
    last = min(first + size, (groups + 3) // 4)
    if rows <= MOST_ROWS:
        for t in range(rows):
            at, quads = h + t * inner, c[16] + me * 2 * QUAD_LIST
            row = y + t * y_stride
            add_down(
                quant, w, w_at, word, table, groups, inner, first, last, xq, xs, xn, at, f, work, row, routes,
                quads,
            )  # fmt: skip
        return
    for which in range(first, last):
        slice_of_down(quant, w, whole, groups, inner, which, run.spare, out)
        blocks = min(8, groups * 2 - which * 8)
        matmul.product(
            run, quant, run.spare, out, inner, NONE, blocks, rows, NONE, NONE, h, y + which * 128, y_stride,
            c[14], c[15],
        )  # fmt: skip
