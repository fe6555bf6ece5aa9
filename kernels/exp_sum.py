"""sum over i of exp(x[i] - peak): what a log-probability needs of all the logits."""

import numpy as np

from edgert.kernels import simd
from edgert.kernels.elementwise import exp
from edgert.kernels.jit import kernel
from edgert.kernels.reference import exp_sum as _twin


@kernel(_twin.exp_sum)
def exp_sum(x, peak):
    """The sum for a float32 array [N] and its largest value.

    One chain per lane over 1024 values, those sums in a second chain, then across lanes: a single
    chain over a vocabulary of 150,000 would lose two digits. A term below e^-87 counts as e^-87,
    which is nothing beside the 1 of the peak.
    """
    top = simd.splat(peak)
    total = simd.splat(0.0)
    whole = x.size // 16 * 16
    for start in range(0, whole, 1024):
        part = simd.splat(0.0)
        for i in range(start, min(start + 1024, whole), 16):
            part = simd.add(part, exp(simd.sub(simd.load_f32(x, i), top)))
        total = simd.add(total, part)
    if whole < x.size:
        tail = np.zeros(16, np.float32)
        for i in range(x.size - whole):  # an assignment of slices compiles as long as all of this file
            tail[i] = x[whole + i]
        lanes = exp(simd.sub(simd.load_f32(tail, 0), top))
        total = simd.add(total, simd.first_lanes(x.size - whole, lanes, simd.splat(0.0)))
    return simd.sum_lanes(total)
