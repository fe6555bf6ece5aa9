"""Gates of the neurons that a predictor expects to fire (Deja Vu, Liu et al., 2023, arXiv:2310.17157, 4.1).

    s = W_out (W_in x) + b;    g[n] = W_gate[n] x where s[n] > 0, and 0 elsewhere

Or of those in the core of a row's sequence, whose scores s are then made once (edgert/model/cores.py).

The gate's rows lie one by one (the `rows1` layout), each as a row of up in neuron_packing.py. Several rows of
x read the gates that any of them wants; what only another row wanted is then silenced, so that a row's result
does not depend on the rows beside it. Rows that are computed whole, and more than `neurons.MOST_ROWS`, take
all gates, in the order of rows16, some at a time.
"""

import numpy as np

from edgert.kernels import matmul, neuron_tiles, neurons
from edgert.kernels.jit import inlined, jit, kernel
from edgert.kernels.operations import operands, operation
from edgert.kernels.program import GATE_ROWS, PARTIAL
from edgert.kernels.reference import gate_rows as _twin

ALL = -1
"""In the place of how many gates are wanted."""


@kernel(_twin.list_positive, inline=True)
def list_positive(s, s_at, stride, rows, groups, routes, at):
    """routes[at] = how many of 32 * groups have an s above zero in any row; which, from routes[at + 1] on."""
    count = 0
    for i in range(0, groups * 32, 32):
        mask = neuron_tiles.positive(s, s_at + i)
        for t in range(1, rows):
            mask |= neuron_tiles.positive(s, s_at + t * stride + i)
        while mask != 0:
            routes[at + 1 + count] = i + neuron_tiles.lowest_bit(mask)
            mask &= mask - 1
            count += 1
    routes[at] = count


@kernel(_twin.silence, inline=True)
def silence(f, g, s, count):
    """f[g : g + count] = 0 where f[s + i] is not above zero."""
    for i in range(count):
        f[g + i] = f[g + i] if f[s + i] > np.float32(0.0) else np.float32(0.0)


# ---- units of the operations of program.py ---------------------------------------------------


@inlined
def run_predicted(c, rows, f, xq, routes, tokens):
    """What the layer's gates need before their units are known; how many are wanted, or ALL.

    tokens: see program.py; rows that are computed whole want all.
    """
    x, groups, into, s, stride, width, at = c[3], c[4], c[5], c[6], c[7], c[8], c[9]
    cores, cores_stride = c[10], c[11]
    every = rows > neurons.MOST_ROWS
    for t in range(rows):
        sequence = tokens[PARTIAL, t]
        every |= sequence < 0
        if cores >= 0 and sequence >= 0:
            core, own = cores + sequence * cores_stride, s + t * stride
            for n in range(width):
                f[own + n] = f[core + n]
    if rows <= neurons.MOST_ROWS:  # LIVE leaves the spreading to this
        spans = (groups + 15) // 16
        for t in range(rows):
            neurons.spread(xq, (x + t * groups) * 32, groups, xq, into * 32 + t * spans * 512)
    if every:
        routes[at] = ALL
    else:
        list_positive(f, s, stride, rows, (width + 31) // 32, routes, at)
    return routes[at]


@jit
def units_of_gate(c, routes):
    """Units of a gate; never one, so that whoever asks before `run_predicted` takes it for more."""
    wanted = routes[c[7]] if c[7] >= 0 else ALL
    size = neurons.BATCH if wanted == ALL else neurons.batch(wanted)
    return max(2, ((c[6] if wanted == ALL else wanted) + size - 1) // size)


@operation(GATE_ROWS)
def run_gate(packed, i, unit, rows, me):
    """Some gates that are wanted, or 16 of all."""
    run, c, _, _ = operands(packed, i)
    w, f, xq, xs, xn, routes = run.w, run.f, run.xq, run.xs, run.xn, run.routes
    quant, w_at, groups, width, at, x, into = c[3], c[4], c[5], c[6], c[7], c[8], c[9]
    g, stride, work, out = c[10], c[11], c[12] + me * c[13], me * c[14]
    spans = (groups + 15) // 16
    apart = spans * matmul.record_bytes(quant)
    if at < 0 or routes[at] == ALL:
        first = unit * neurons.BATCH
        if first >= width:
            return
        neurons.block_of_up(quant, w, w_at, neurons.NONE, apart, groups, unit, run.spare, out)
        for t in range(rows):
            here = g + t * stride + first
            f[here : here + neurons.BATCH] = np.float32(0.0)
        matmul.product(
            run, quant, run.spare, out, groups, neurons.NONE, neurons.ONE, rows, neurons.NONE, neurons.NONE,
            x, g + first, stride, c[15], c[16],
        )  # fmt: skip
        return
    size = neurons.batch(routes[at])
    first = unit * size
    count = min(size, routes[at] - first)
    if count <= 0:
        return
    first += at + 1
    for t in range(rows):
        row = g + t * stride
        for i in range(count):
            f[row + routes[first + i]] = np.float32(0.0)
        neurons.add_up(
            quant, w, w_at, neurons.NONE, apart, neurons.NOWHERE, run.table, groups, routes, first, count, xq,
            into * 32 + t * spans * 512, xs, xn, x + t * groups, f, work, row,
        )  # fmt: skip
