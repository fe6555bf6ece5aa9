"""Twins of kernels/neurons.py."""

import numpy as np

from edgert.kernels import neuron_packing, packing
from edgert.kernels.neuron_packing import SLICE, NeuronShape
from edgert.kernels.reference.activation import activated as _activation
from edgert.kernels.reference.arithmetic import fma

_NAMES = tuple(packing.RECORD_BYTES)


def _clusters(quant, w, w_at, groups, first, last):
    """Scales of down [clusters, padded D] and the neurons' rows of bytes."""
    shape = NeuronShape.of(_NAMES[quant], groups * 32)
    data = w[w_at + first * shape.cluster : w_at + last * shape.cluster]
    return shape, *neuron_packing.parts(_NAMES[quant], data, groups * 32)


def _rows(quant, w, w_at, scales, bundle, groups, neurons):
    """The bytes of some rows of up, or of a matrix of single rows."""
    size = NeuronShape.of(_NAMES[quant], groups * 32).up
    starts = w_at + neurons // 32 * (scales + 32 * bundle) + scales + neurons % 32 * bundle
    return np.stack([w[at : at + size] for at in starts])


def _bundles(quant, w, word, table, groups, neurons):
    """The bytes of neurons that lie where `table` says; zeros for one that is not there."""
    shape = NeuronShape.of(_NAMES[quant], groups * 32)
    none = np.zeros(shape.up + shape.down, np.uint8)
    return np.stack([w[at : at + none.size] if at >= 0 else none for at in table[word + neurons]])


def activate(kind, threshold, g, g_at, count):
    """See kernels/neurons.py."""
    part = g[g_at : g_at + count]
    value = _activation(kind, part)
    part[:] = np.where(np.abs(value) >= np.float32(threshold), value, np.float32(0))


def multiply(g, g_at, u, u_at, count):
    """See kernels/neurons.py."""
    g[g_at : g_at + count] *= u[u_at : u_at + count]


def spread(x, x_at, groups, y, y_at):
    """See kernels/neurons.py."""
    fours = x[x_at : x_at + groups * 32].reshape(groups, 8, 4).copy()
    for group in range(groups):
        for j in range(8):
            at = y_at + group // 16 * 512 + j * 64 + group % 16 * 4
            y[at : at + 4] = fours[group, j]


def list_live(g, g_at, stride, rows, width, routes, at):
    """See kernels/neurons.py."""
    live = np.zeros(width, bool)
    for t in range(rows):
        live |= g[g_at + t * stride : g_at + t * stride + width] != 0
    chosen = np.flatnonzero(live)
    routes[at] = chosen.size
    routes[at + 1 : at + 1 + chosen.size] = chosen


def add_up(
    quant,
    w,
    w_at,
    scales,
    bundle,
    word,
    table,
    groups,
    routes,
    first,
    count,
    x,
    x_at,
    xs,
    xn,
    s_at,
    f,
    work,
    y,
):
    """See kernels/neurons.py."""
    neurons = routes[first : first + count]
    if word < 0:
        rows = _rows(quant, w, w_at, scales, bundle, groups, neurons)
    else:
        size = NeuronShape.of(_NAMES[quant], groups * 32).up
        rows = _bundles(quant, w, word, table, groups, neurons)[:, :size]
    values, factors = neuron_packing.unpack_up(_NAMES[quant], rows)
    spans = (groups + 15) // 16
    stored = x[x_at : x_at + spans * 512].reshape(spans, 8, 16, 4)
    row = stored.transpose(0, 2, 1, 3).reshape(-1, 32).astype(np.int32)  # [groups, 32]
    weights = values.reshape(count, -1, 32).astype(np.int32)
    total = np.zeros(count, np.float32)
    for g in range(groups):
        whole = (weights[:, g] @ row[g]).astype(np.float32)
        total = fma(whole, factors[:, g] * xs[s_at + g], total)
    f[y + neurons] += total


def add_down(
    quant, w, w_at, word, table, groups, inner, first, last, xq, xs, xn, h_at, f, work, y, routes, quads
):
    """See kernels/neurons.py."""
    h = xq[h_at * 32 : (h_at + inner) * 32].astype(np.int32)
    if word < 0:
        shape, scales, bundles = _clusters(quant, w, w_at, groups, 0, inner)
    else:
        shape = NeuronShape.of(_NAMES[quant], groups * 32)
        scales = w[w_at : w_at + inner * shape.scales].view(np.float16).astype(np.float32)
        scales = scales.reshape(inner, -1)
        bundles = np.zeros((inner * 32, shape.up + shape.down), np.uint8)
        live = np.flatnonzero(h)
        if live.size:
            bundles[live] = _bundles(quant, w, word, table, groups, live)
    span = slice(first * SLICE, min(last * SLICE, groups * 32))
    values = neuron_packing.unpack_down(_NAMES[quant], bundles[:, shape.up :])[:, span].astype(np.int32)
    total = np.zeros(span.stop - span.start, np.float32)
    for g in range(inner):
        part = slice(g * 32, g * 32 + 32)
        whole = (h[part] @ values[part]).astype(np.float32)
        total = fma(whole, scales[g, span] * xs[h_at + g], total)
    f[y + span.start : y + span.stop] += total


def _pack(quant, values, scales):
    return packing.pack(_NAMES[quant], values, scales.astype(np.float16)).reshape(-1)


def block_of_up(quant, w, w_at, scales, bundle, groups, block, out, out_at):
    """See kernels/neurons.py."""
    rows = _rows(quant, w, w_at, scales, bundle, groups, np.arange(block * 16, block * 16 + 16))
    packed = _pack(quant, *neuron_packing.unpack_up(_NAMES[quant], rows))
    out[out_at : out_at + packed.size] = packed


def slice_of_down(quant, w, w_at, groups, inner, which, out, out_at):
    """See kernels/neurons.py."""
    shape, scales, bundles = _clusters(quant, w, w_at, groups, 0, inner)
    span = slice(which * SLICE, which * SLICE + SLICE)
    values = neuron_packing.unpack_down(_NAMES[quant], bundles[:, shape.up :])[:, span]
    packed = _pack(quant, np.ascontiguousarray(values.T), np.ascontiguousarray(scales[:, span].T))
    out[out_at : out_at + packed.size] = packed
