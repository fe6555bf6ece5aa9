"""Twin of kernels/attention.py."""

import numpy as np

from edgert.kernels.reference.arithmetic import fma
from edgert.kernels.reference.kv import region_views
from edgert.kernels.reference.softmax import softmax


def _one_head(view, q, scale, positions, slots, s, s_at):
    """The output [slabs * 16] of one query [d]; leaves the probabilities in s."""
    keys = view.keys[slots // 16, :, slots % 16].astype(np.float32)  # [n, d]
    scores = np.zeros(len(slots), np.float32)
    for i, value in enumerate(q):
        scores = fma(value, keys[:, i], scores)
    if view.scales is not None:
        scores = scores * view.scales[0, slots]
    row = slice(s_at + positions[0], s_at + positions[-1] + 1)
    s[row] = scores * np.float32(scale)
    total = softmax(s, s_at, positions[0], positions[-1] + 1)
    if view.scales is not None:
        s[row] = s[row] * view.scales[1, slots]
    values = view.values[:, slots].astype(np.float32)  # [slabs, n, 16]
    out = np.zeros((values.shape[0], 16), np.float32)
    for n, weight in enumerate(s[row]):
        out = fma(weight, values[:, n], out)
    return (out / total).reshape(-1)


def attention(
    kind, heads, kv, region, capacity, d, q, q_at, scale, first, last, base, path, path_at, s, s_at, y_at
):
    """See kernels/attention.py."""
    view = region_views(kind, kv, region, capacity, d)
    positions = np.arange(first, last)
    slots = positions.copy()
    branch = positions >= base
    slots[branch] = path[path_at + positions[branch] - base]
    for h in range(heads):
        query = q[q_at + h * d : q_at + (h + 1) * d]
        out = _one_head(view, query, scale, positions, slots, s, s_at + h * capacity)
        s[y_at + h * out.size : y_at + (h + 1) * out.size] = out
