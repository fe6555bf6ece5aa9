"""Float32 weights to whole numbers and scales: what a conversion spends its time on.

w[n, k] ~ scale[n, g] * value[n, k] + minimum[n, g] in groups g of 32 columns. One lane is one row, as in the
file (packing.py): 16 rows are searched at once, and a sum over a group is one chain of a lane, k ascending.
Which searches there are, and why, reference/rounding.py says; here they are over vectors.
"""

import numpy as np

from edgert.kernels import simd
from edgert.kernels.jit import inlined, jit, kernel
from edgert.kernels.packing import BYTE_SCALE_FACTOR, LARGEST_BYTE_SCALE
from edgert.kernels.reference import rounding as _twin
from edgert.kernels.reference.rounding import (
    F16_MAX,
    GAIN,
    LEAST_INVERTED,
    LEAST_SCALE,
    LINE_REFINEMENTS,
    PEAK,
    PLAIN,
    STORED,
)

_SMALLEST_BINADE = 2.0**-14 * BYTE_SCALE_FACTOR
"""Below it scales of one byte are multiples of one step."""
_MANTISSA = 1.5 * 2.0**20
"""Times a power of two, a number whose last place is an eighth of it: adding and taking it away rounds to 3
bits of mantissa."""


@jit
def _half(x):
    """Rounded to float16, saturated."""
    return simd.through_half(simd.maximum(simd.minimum(x, simd.splat(F16_MAX)), simd.splat(-F16_MAX)))


@jit
def _byte(x):
    """Rounded to a scale of one byte, saturated: `packing.byte_scales`."""
    limit = simd.splat(LARGEST_BYTE_SCALE)
    x = simd.maximum(simd.minimum(x, limit), simd.sub(simd.splat(0.0), limit))
    step = simd.mul(simd.maximum(simd.binade(x), simd.splat(_SMALLEST_BINADE)), simd.splat(_MANTISSA))
    return simd.sub(simd.add(x, step), step)


@jit
def _reciprocal(x):
    """1 / x, and 0 for 0 and what is as good as 0."""
    least, zero = simd.splat(LEAST_SCALE), simd.splat(0.0)
    return simd.where_above(least, simd.absolute(x), zero, simd.div(simd.splat(1.0), x))


@jit
def _quotient(x, y):
    """x / y, and 0 where y is not positive."""
    zero = simd.splat(0.0)
    return simd.where_above(y, zero, simd.div(x, y), zero)


@jit
def _round(v, by, low, high):
    """The whole number in low..high nearest to v * by."""
    return simd.nearest(simd.minimum(simd.maximum(simd.mul(v, by), low), high))


@jit
def _project(x, at, step, weight, by, low, high):
    """For the whole numbers q of x * by: <x, q> and <q, q>."""
    along, length = simd.splat(0.0), simd.splat(0.0)
    for k in range(weight.size):
        v = simd.load_f32(x, at + k * step)
        q = _round(v, by, low, high)
        weighted = simd.mul(q, simd.splat(weight[k]))
        along = simd.add(along, simd.mul(weighted, v))
        length = simd.add(length, simd.mul(weighted, q))
    return along, length


@jit
def _error(x, at, step, weight, scale, minimum, low, high):
    """The squared error of rounding x with a scale and a minimum."""
    by, total = _reciprocal(scale), simd.splat(0.0)
    for k in range(weight.size):
        v = simd.sub(simd.load_f32(x, at + k * step), minimum)
        e = simd.sub(v, simd.mul(_round(v, by, low, high), scale))
        total = simd.add(total, simd.mul(simd.mul(e, simd.splat(weight[k])), e))
    return total


@inlined
def _range(x, at, step, count):
    """The smallest and the largest of each lane."""
    low = high = simd.load_f32(x, at)
    for k in range(1, count):
        v = simd.load_f32(x, at + k * step)
        low, high = simd.minimum(low, v), simd.maximum(high, v)
    return low, high


@inlined
def _search_gain(x, at, step, weight, low, high, extreme, inverse, candidates):
    """q4: the scale of most gain, made up for its integers once, or the plain one."""
    scale, gain = simd.splat(0.0), simd.splat(0.0)
    for i in range(candidates.size):
        by = simd.mul(inverse, simd.splat(candidates[i]))
        along, length = _project(x, at, step, weight, by, low, high)
        candidate = _quotient(along, length)
        lowered = simd.mul(candidate, along)
        scale = simd.where_above(lowered, gain, candidate, scale)
        gain = simd.maximum(gain, lowered)
    along, length = _project(x, at, step, weight, _reciprocal(scale), low, high)
    found = _half(_quotient(along, length))
    plain, zero = _half(simd.div(extreme, simd.splat(PLAIN))), simd.splat(0.0)
    of_plain = _error(x, at, step, weight, plain, zero, low, high)
    of_found = _error(x, at, step, weight, found, zero, low, high)
    return simd.where_above(of_found, of_plain, plain, found)


@inlined
def _search_stored(x, at, step, weight, low, high, inverse, candidates):
    """Scales of one byte, each judged as it is stored."""
    scale = zero = simd.splat(0.0)
    least = _error(x, at, step, weight, scale, zero, low, high)
    for i in range(candidates.size):
        by = simd.mul(inverse, simd.splat(candidates[i]))
        along, length = _project(x, at, step, weight, by, low, high)
        candidate = _byte(_quotient(along, length))
        error = _error(x, at, step, weight, candidate, zero, low, high)
        scale = simd.where_above(least, error, candidate, scale)
        least = simd.minimum(least, error)
    return scale


@inlined
def _search_line(x, at, step, weight, candidates, codes):
    """q4m: the line of least error. codes: float32 [32 * 16], what is found on the way."""
    smallest, largest = _range(x, at, step, weight.size)
    zero, top, spread = simd.splat(0.0), simd.splat(15.0), simd.sub(largest, smallest)
    mean = zero
    for k in range(weight.size):
        mean = simd.add(mean, simd.mul(simd.splat(weight[k]), simd.load_f32(x, at + k * step)))
    scale, minimum = zero, _half(mean)
    least = _error(x, at, step, weight, scale, minimum, zero, top)
    for i in range(0, candidates.size, 2):
        slope = simd.mul(spread, simd.splat(candidates[i]))
        start = simd.add(smallest, simd.mul(spread, simd.splat(candidates[i + 1])))
        for _ in range(LINE_REFINEMENTS):
            by, middle = _reciprocal(slope), zero
            for k in range(weight.size):
                q = _round(simd.sub(simd.load_f32(x, at + k * step), start), by, zero, top)
                simd.store_f32(codes, k * 16, q)
                middle = simd.add(middle, simd.mul(simd.splat(weight[k]), q))
            along, length = zero, zero
            for k in range(weight.size):
                q = simd.sub(simd.load_f32(codes, k * 16), middle)
                weighted = simd.mul(q, simd.splat(weight[k]))
                v = simd.sub(simd.load_f32(x, at + k * step), mean)
                along = simd.add(along, simd.mul(weighted, v))
                length = simd.add(length, simd.mul(weighted, q))
            slope = _quotient(along, length)
            start = simd.sub(mean, simd.mul(slope, middle))
        slope, start = _half(slope), _half(start)
        error = _error(x, at, step, weight, slope, start, zero, top)
        scale = simd.where_above(least, error, slope, scale)
        minimum = simd.where_above(least, error, start, minimum)
        least = simd.minimum(least, error)
    return scale, minimum


@jit
def _search(how, x, at, step, weight, low, high, candidates, codes):
    """Scale and minimum, as stored, of 16 groups: in lanes x[at + k * step], k below weight.size."""
    scale = minimum = simd.splat(0.0)
    if how == PEAK or how == GAIN or how == STORED:
        smallest, largest = _range(x, at, step, weight.size)
        below = simd.sub(simd.splat(0.0), smallest)
        if how == PEAK:
            return _half(simd.div(simd.maximum(largest, below), simd.splat(high))), minimum
        extreme = simd.where_above(largest, below, largest, smallest)
        inverse = simd.where_above(
            simd.splat(LEAST_INVERTED), simd.absolute(extreme), minimum, simd.div(simd.splat(1.0), extreme)
        )
        bottom, top = simd.splat(low), simd.splat(high)
        if how == GAIN:
            scale = _search_gain(x, at, step, weight, bottom, top, extreme, inverse, candidates)
        else:
            scale = _search_stored(x, at, step, weight, bottom, top, inverse, candidates)
    else:
        scale, minimum = _search_line(x, at, step, weight, candidates, codes)
    return scale, minimum


@kernel(_twin.search_groups)
def search_groups(how, low, high, candidates, x, weight, scales, minimums):
    """The scales and minimums [G] of groups x [k, G], G a multiple of 16.

    how: one of the searches of reference/rounding.py, over whole numbers low..high (float32); weight:
    float32 [k], of the squared errors.
    """
    flat, codes = x.reshape(-1), np.empty(512, np.float32)
    for g in range(0, x.shape[1], 16):
        scale, minimum = _search(how, flat, g, x.shape[1], weight, low, high, candidates, codes)
        simd.store_f32(scales, g, scale)
        simd.store_f32(minimums, g, minimum)


@kernel(_twin.round_group)
def round_group(low, high, x, answer, scales, minimums, values, made):
    """Round rows x [k, G] one after another, G a multiple of 16; those after it make up for each one's error.

    made[j] [k, G] is row j's error divided by answer[j, j]; x[i] -= answer[j, i] * made[j] for i after j.
    answer: float32 [k, k]; values: int8 [k, G]; the others as for `search_groups`.
    """
    count, flat = x.shape[1], x.reshape(-1)
    codes, errors = values.reshape(-1), made.reshape(-1)
    bottom, top = simd.splat(low), simd.splat(high)
    for g in range(0, count, 16):
        scale, minimum = simd.load_f32(scales, g), simd.load_f32(minimums, g)
        by = _reciprocal(scale)
        for j in range(x.shape[0]):
            v = simd.load_f32(flat, j * count + g)
            q = _round(simd.sub(v, minimum), by, bottom, top)
            e = simd.sub(v, simd.add(simd.mul(q, scale), minimum))
            e = simd.div(e, simd.splat(answer[j, j]))
            simd.store_i8(codes, j * count + g, q)
            simd.store_f32(errors, j * count + g, e)
            for i in range(j + 1, x.shape[0]):
                at = i * count + g
                changed = simd.sub(simd.load_f32(flat, at), simd.mul(simd.splat(answer[j, i]), e))
                simd.store_f32(flat, at, changed)


@kernel(_twin.round_rows)
def round_rows(how, low, high, candidates, weights, importance, values, scales, minimums, sums):
    """float32 [N, K] to int8 [N, K], scales and minimums [N, ceil(K/32)], and what was lost.

    how, low, high, candidates: as for `search_groups`; importance: float32 [K, whole groups], of the squared
    errors that the search minimises. sums: float64 [ceil(N/16), 2], of each 16 rows the squared error and the
    energy.
    """
    rows, columns = weights.shape
    x, codes = np.empty(512, np.float32), np.empty(512, np.float32)
    small, lanes, offsets = np.empty(512, np.int8), np.empty(16, np.float32), np.empty(16, np.float32)
    bottom, top = simd.splat(low), simd.splat(high)
    for block in range((rows + 15) // 16):
        first, error, energy = block * 16, 0.0, 0.0
        count = min(16, rows - first)
        for g in range(scales.shape[1]):
            at = g * 32
            wide = min(32, columns - at)
            if count < 16 or wide < 32:
                x[:] = np.float32(0.0)
            for n in range(count):
                for k in range(wide):
                    x[k * 16 + n] = weights[first + n, at + k]
            weight = importance[at : at + 32]
            scale, minimum = _search(how, x, 0, 16, weight, low, high, candidates, codes)
            by, lost, whole = _reciprocal(scale), simd.splat(0.0), simd.splat(0.0)
            for k in range(wide):
                v = simd.load_f32(x, k * 16)
                q = _round(simd.sub(v, minimum), by, bottom, top)
                simd.store_i8(small, k * 16, q)
                e = simd.sub(v, simd.add(simd.mul(q, scale), minimum))
                lost = simd.add(lost, simd.mul(e, e))
                whole = simd.add(whole, simd.mul(v, v))
            error += np.float64(simd.sum_lanes(lost))
            energy += np.float64(simd.sum_lanes(whole))
            simd.store_f32(lanes, 0, scale)
            simd.store_f32(offsets, 0, minimum)
            for n in range(count):
                scales[first + n, g] = lanes[n]
                minimums[first + n, g] = offsets[n]
                for k in range(wide):
                    values[first + n, at + k] = small[k * 16 + n]
        sums[block, 0] = error
        sums[block, 1] = energy
