"""Twin of kernels/rounding.py, and what its searches are.

A scale is rounded to what is stored (float16, or a byte) before the whole numbers are chosen, so that they
make up for its rounding. For fixed whole numbers q the best scale is <x,q>/<q,q>, which leaves an error of
|x|^2 - <x,q>^2/<q,q>; so candidate scales need only be good enough to produce good whole numbers. This is the
search of llama.cpp's `make_qx_quants` (ggml-quants.c), over all groups at once.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.kernels.packing import GROUP, byte_scales
from edgert.kernels.reference.arithmetic import nearest, sum_lanes

Floats = NDArray[np.float32]

PEAK, GAIN, STORED, LINE = range(4)
"""Searches: the scale that the largest magnitude needs; of float16 scales that of most gain, candidates being
divisors of the extreme; of scales of one byte that of least error, candidates too; the line
scale * q + minimum of least error, candidates being pairs of a step and a start, shares of the range."""

PLAIN = -8.0
"""The divisor of GGUF's Q4_0. GAIN keeps it to the end, so that no group is worse than there."""
LINE_REFINEMENTS = 2
"""Rounds of "best line for these whole numbers, best whole numbers for this line"."""
F16_MAX = 65504.0
LEAST_INVERTED = 2.0**-26
"""A group below float16's reach ends with scale 0 whatever is found; with its inverse taken for 0 the search
is free of overflow."""

LEAST_SCALE = 2.0**-126
"""What divides by a smaller one would be infinite; it is taken for 0."""


def search_groups(
    how: int,
    low: float,
    high: float,
    candidates: Floats,
    x: Floats,
    weight: Floats,
    scales: Floats,
    minimums: Floats,
) -> None:
    """See kernels/rounding.py; here weight may be [k, G] too."""
    weight = weight.reshape(len(x), -1)
    minimums[:] = 0
    if how == PEAK:
        scales[:] = _half(np.abs(x).max(axis=0) / np.float32(high))
    elif how == GAIN:
        scales[:] = _search_gain(x, weight, low, high, candidates)
    elif how == STORED:
        scales[:] = _search_stored(x, weight, low, high, candidates)
    else:
        scales[:], minimums[:] = _search_line(x, weight, candidates)


def round_group(
    low: float,
    high: float,
    x: Floats,
    answer: Floats,
    scales: Floats,
    minimums: Floats,
    values: NDArray[np.int8],
    made: Floats,
) -> None:
    """See kernels/rounding.py."""
    by = _reciprocal(scales)
    for j, column in enumerate(x):
        q = _round(column - minimums, by, low, high)
        values[j] = q
        made[j] = (column - (q * scales + minimums)) / answer[j, j]
        x[j + 1 :] -= answer[j, j + 1 :, None] * made[j]


def round_rows(
    how: int,
    low: float,
    high: float,
    candidates: Floats,
    weights: Floats,
    importance: Floats,
    values: NDArray[np.int8],
    scales: Floats,
    minimums: Floats,
    sums: NDArray[np.float64],
) -> None:
    """See kernels/rounding.py."""
    rows, columns = weights.shape
    groups, padded = scales.shape[1], len(sums) * 16
    whole = np.zeros((padded, groups * GROUP), np.float32)
    whole[:rows, :columns] = weights
    x = np.ascontiguousarray(whole.reshape(padded, groups, GROUP).T).reshape(GROUP, -1)  # [32, groups * rows]
    weight = np.repeat(importance.reshape(groups, GROUP).T, padded, axis=1)
    scale, minimum = np.empty((2, groups * padded), np.float32)
    search_groups(how, low, high, candidates, x, weight, scale, minimum)
    q = _round(x - minimum, _reciprocal(scale), low, high)
    e = x - (q * scale + minimum)
    e[columns - (groups - 1) * GROUP :, (groups - 1) * padded :] = 0  # beyond the columns that there are
    for column, total in enumerate((_dot(e, e), _dot(x, x))):
        records = sum_lanes(total.reshape(groups, -1, 16))
        sums[:, column] = np.add.accumulate(records, axis=0, dtype=np.float64)[-1]
    values[:] = q.reshape(GROUP, groups, padded).T.reshape(padded, -1)[:rows, :columns]
    scales[:], minimums[:] = (found.reshape(groups, padded).T[:rows] for found in (scale, minimum))


def _dot(x: Floats, y: Floats) -> Floats:
    """The sums over the first axis of x * y, one after another."""
    total = np.zeros(x.shape[1], np.float32)
    for product in x * y:
        total += product
    return total


def _half(x: Floats) -> Floats:
    return np.clip(x, -F16_MAX, F16_MAX).astype(np.float16).astype(np.float32)


def _divide(x: Any, y: Floats, where: NDArray[np.bool_]) -> Floats:
    return np.divide(x, y, out=np.zeros_like(y), where=where)


def _reciprocal(scale: Floats) -> Floats:
    return _divide(np.float32(1), scale, np.abs(scale) >= np.float32(LEAST_SCALE))


def _round(x: Floats, by: Floats, low: float, high: float) -> Floats:
    """The whole numbers nearest to x * by, in low..high."""
    return nearest(np.clip(x * by, np.float32(low), np.float32(high)))


def _best(x: Floats, q: Floats, weight: Floats) -> tuple[Floats, Floats]:
    """For whole numbers q the scale of least error, and by how much it lowers |x|^2."""
    along, length = _dot(q * weight, x), _dot(q * weight, q)
    scale = _divide(along, length, length > 0)
    return scale, scale * along


def _error(x: Floats, weight: Floats, scale: Floats, low: float, high: float) -> Floats:
    e = x - _round(x, _reciprocal(scale), low, high) * scale
    return _dot(e * weight, e)


def _extremes(x: Floats) -> tuple[Floats, Floats]:
    """Of each group the number of largest magnitude, and what divides by it."""
    low, high = x.min(axis=0), x.max(axis=0)
    extreme = np.where(high > -low, high, low)
    return extreme, _divide(np.float32(1), extreme, np.abs(extreme) >= np.float32(LEAST_INVERTED))


def _search_gain(x: Floats, weight: Floats, low: float, high: float, divisors: Floats) -> Floats:
    extreme, inverse = _extremes(x)
    scale, gain = np.zeros_like(extreme), np.zeros_like(extreme)
    for divisor in divisors:
        candidate, lowered = _best(x, _round(x, inverse * divisor, low, high), weight)
        np.copyto(scale, candidate, where=lowered > gain)
        np.maximum(gain, lowered, out=gain)
    scale, _ = _best(x, _round(x, _reciprocal(scale), low, high), weight)
    found, plain = _half(scale), _half(extreme / np.float32(PLAIN))
    worse = _error(x, weight, found, low, high) > _error(x, weight, plain, low, high)
    return np.where(worse, plain, found)


def _search_stored(x: Floats, weight: Floats, low: float, high: float, divisors: Floats) -> Floats:
    """Steps between scales of one byte are wide, so each candidate is judged as it would be stored."""
    _, inverse = _extremes(x)
    scale = np.zeros_like(inverse)
    least = _error(x, weight, scale, low, high)
    for divisor in divisors:
        candidate, _ = _best(x, _round(x, inverse * divisor, low, high), weight)
        candidate = byte_scales(candidate).astype(np.float32)
        error = _error(x, weight, candidate, low, high)
        np.copyto(scale, candidate, where=error < least)
        np.minimum(least, error, out=least)
    return scale


def _search_line(x: Floats, weight: Floats, starts: Floats) -> tuple[Floats, Floats]:
    low, high = x.min(axis=0), x.max(axis=0)
    mean = _dot(np.broadcast_to(weight, x.shape), x)
    scale, minimum = np.zeros_like(low), _half(mean)
    least = _error(x - minimum, weight, scale, 0, 15)
    for span, below in starts.reshape(-1, 2):
        step, start = (high - low) * span, low + (high - low) * below
        for _ in range(LINE_REFINEMENTS):
            q = _round(x - start, _reciprocal(step), 0, 15)
            middle = _dot(np.broadcast_to(weight, x.shape), q)
            step, _gain = _best(x - mean, q - middle, weight)
            start = mean - step * middle
        step, start = _half(step), _half(start)
        error = _error(x - start, weight, step, 0, 15)
        better = error < least
        np.copyto(scale, step, where=better)
        np.copyto(minimum, start, where=better)
        np.minimum(least, error, out=least)
    return scale, minimum
