"""Twin of kernels/attention.py."""

from functools import partial

import numpy as np

from edgert.kernels import packing
from edgert.kernels.reference.activation import capped
from edgert.kernels.reference.arithmetic import fma
from edgert.kernels.reference.hadamard import hadamard
from edgert.kernels.reference.kv import region_views, region_views_q4
from edgert.kernels.reference.quantize import quantize
from edgert.kernels.reference.softmax import LOWEST, softmax


def _biased(scores, cap, slope, positions):
    """Scores soft-capped and with ALiBi's bias, as the model has them."""
    if cap > 0:
        scores = capped(scores, np.float32(cap))
    if slope is not None:
        scores = fma(slope, (positions - positions[-1]).astype(np.float32), scores)
    return scores


def _one_head(view, q, scale, cap, slope, sink, positions, slots, s, s_at):
    """The output [slabs * 16] of one query [d]; leaves the probabilities in s."""
    keys = view.keys[slots // 16, :, slots % 16].astype(np.float32)  # [n, d]
    scores = np.zeros(len(slots), np.float32)
    for i, value in enumerate(q):
        scores = fma(value, keys[:, i], scores)
    if view.scales is not None:
        scores = scores * view.scales[0, slots]
    row = slice(s_at + positions[0], s_at + positions[-1] + 1)
    s[row] = _biased(scores * np.float32(scale), cap, slope, positions)
    total = softmax(s, s_at, positions[0], positions[-1] + 1, sink)
    if view.scales is not None:
        s[row] = s[row] * view.scales[1, slots]
    values = view.values[:, slots].astype(np.float32)  # [slabs, n, 16]
    out = np.zeros((values.shape[0], 16), np.float32)
    for n, weight in enumerate(s[row]):
        out = fma(weight, values[:, n], out)
    return (out / total).reshape(-1)


def _one_head_q4(dv, view, q, scale, cap, slope, sink, positions, slots, s, s_at):
    """`_one_head` over a q4 cache; the query and the output are rotated."""
    d, groups = q.size, view.keys.shape[1]
    rotated = np.zeros(groups * 32, np.float32)
    rotated[:d] = q
    hadamard(rotated, 0, d)
    xq, xs = np.zeros(groups * 32, np.int8), np.zeros(groups, np.float32)
    quantize(rotated, 0, groups, xq, xs, np.zeros(groups, np.int32), 0)
    keys = packing.unpack_values("q4", view.keys).astype(np.int32)[slots // 16, :, slots % 16]  # [n, G, 32]
    scales = packing.unpack_scales("q4", view.keys)[slots // 16, :, slots % 16]  # [n, G]
    scores = np.zeros(len(slots), np.float32)
    for g in range(groups):
        whole = (keys[:, g] * xq.reshape(groups, 32)[g].astype(np.int32)).sum(axis=1)
        scores = fma(whole.astype(np.float32), scales[:, g] * xs[g], scores)
    row = slice(s_at + positions[0], s_at + positions[-1] + 1)
    s[row] = _biased((np.float32(0) + scores) * np.float32(scale), cap, slope, positions)
    total = softmax(s, s_at, positions[0], positions[-1] + 1, sink)
    records = view.values[:, slots]  # [G, n, 18]
    nibbles = np.concatenate([records[..., 2:] & 15, records[..., 2:] >> 4], axis=2).astype(np.float32)
    values = (nibbles - np.float32(8)) * np.ascontiguousarray(records[..., :2]).view(np.float16).astype(
        np.float32
    )
    out = np.zeros((len(records), 32), np.float32)
    for n, weight in enumerate(s[row]):
        out = fma(weight, values[:, n], out)
    out = (out / total).reshape(-1)
    hadamard(out, 0, dv)
    return out


def _number(w, at, h, absent):
    """Number h of those at byte `at` of w, if there are any."""
    return w[at + h * 4 : at + h * 4 + 4].view(np.float32)[0] if at >= 0 else absent


def attention(
    kind,
    heads,
    kv,
    region,
    capacity,
    d,
    dv,
    q,
    q_at,
    scale,
    first,
    last,
    base,
    path,
    path_at,
    s,
    s_at,
    y_at,
    xq,
    xs,
    xn,
    x_at,
    cap,
    w,
    slopes,
    sinks,
):
    """See kernels/attention.py."""
    place = (kv, region, capacity, d, dv)
    view = region_views_q4(*place) if kind == 2 else region_views(kind, *place)
    one_head = partial(_one_head_q4, dv) if kind == 2 else _one_head
    positions = np.arange(first, last)
    slots = positions.copy()
    branch = positions >= base
    slots[branch] = path[path_at + positions[branch] - base]
    for h in range(heads):
        query = q[q_at + h * d : q_at + (h + 1) * d]
        slope, sink = _number(w, slopes, h, None), _number(w, sinks, h, LOWEST)
        out = one_head(view, query, scale, cap, slope, sink, positions, slots, s, s_at + h * capacity)
        s[y_at + h * out.size : y_at + (h + 1) * out.size] = out
