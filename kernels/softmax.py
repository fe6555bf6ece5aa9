"""s[i] <- exp(s[i] - max) / sum, over a range of a scratch array (unnormalised: see `softmax`)."""

import numpy as np

from edgert.kernels import simd
from edgert.kernels.elementwise import exp
from edgert.kernels.jit import kernel
from edgert.kernels.reference import softmax as _twin
from edgert.kernels.reference.softmax import LOWEST


@kernel(_twin.softmax)
def softmax(s, s_at, first, last, sink):
    """Replace scores first..last-1 of s by exp(score - max) and give their sum.

    Works on the whole blocks of 16 around them: lanes outside the range become 0. The sum is one
    chain per lane, blocks in order, then across lanes; the caller divides by it once, at the end.
    sink: one more score, which takes its share of the sum and has no place (attention sinks, gpt-oss);
    with LOWEST it takes nothing, to the bit: the sum is at least 1, and the least `exp` below half its ulp.
    """
    begin, end = first // 16 * 16, (last + 15) // 16 * 16
    lowest = simd.splat(LOWEST)
    top = lowest
    for i in range(begin, end, 16):
        v = simd.first_lanes(last - i, simd.load_f32(s, s_at + i), lowest)
        v = simd.first_lanes(first - i, lowest, v)
        simd.store_f32(s, s_at + i, v)
        top = simd.maximum(top, v)
    largest = simd.splat(max(simd.max_lanes(top), sink))
    total = simd.splat(0.0)
    zero = simd.splat(0.0)
    for i in range(begin, end, 16):
        p = exp(simd.sub(simd.load_f32(s, s_at + i), largest))
        p = simd.first_lanes(last - i, p, zero)
        p = simd.first_lanes(first - i, zero, p)
        simd.store_f32(s, s_at + i, p)
        total = simd.add(total, p)
    rest = exp(simd.sub(simd.splat(sink), largest))
    return np.float32(simd.sum_lanes(total) + simd.max_lanes(rest))
