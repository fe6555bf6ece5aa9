"""Twins of kernels/gate_rows.py."""

import numpy as np


def list_positive(s, s_at, stride, rows, groups, routes, at):
    """See kernels/gate_rows.py."""
    wanted = np.zeros(groups * 32, bool)
    for t in range(rows):
        wanted |= s[s_at + t * stride : s_at + t * stride + groups * 32] > 0
    chosen = np.flatnonzero(wanted)
    routes[at] = chosen.size
    routes[at + 1 : at + 1 + chosen.size] = chosen


def silence(f, g, s, count):
    """See kernels/gate_rows.py."""
    f[g : g + count] = np.where(f[s : s + count] > 0, f[g : g + count], np.float32(0))
