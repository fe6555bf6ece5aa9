"""out = softmax(scale * q K^T) V for query heads that share a key/value head (Vaswani et al., 2017).

Keys are taken by position, so a row's result does not depend on how its tokens were grouped into
forwards, nor on where in the cache a token tree's nodes lie: positions below `base` are in their
own slots, position base + j is in slot path[path_at + j].

Order of operations, for every machine: a score is one chain of fma over the dimensions, (for q8
times the key's scale,) times `scale`; softmax.py; (for q8 each probability times its value's scale;)
an output is one chain of fma over the positions, divided by the sum.
"""

import numpy as np

from edgert.kernels import simd
from edgert.kernels.attention_tiles import score_tile, value_tile
from edgert.kernels.elementwise import fma, read_f16, read_f32
from edgert.kernels.jit import jit, kernel
from edgert.kernels.kv import F16, Q8
from edgert.kernels.reference import attention as _twin
from edgert.kernels.softmax import softmax

MOST_HEADS = 4
"""Most query heads of one call: one load of the cache serves them all."""

_scores_f16_1, _scores_f16_2, _scores_f16_4 = (score_tile(F16, heads) for heads in (1, 2, 4))
_scores_q8_1, _scores_q8_2, _scores_q8_4 = (score_tile(Q8, heads) for heads in (1, 2, 4))
_values_f16_1, _values_f16_2, _values_f16_4 = (value_tile(F16, heads) for heads in (1, 2, 4))
_values_q8_1, _values_q8_2, _values_q8_4 = (value_tile(Q8, heads) for heads in (1, 2, 4))


@jit
def _block_scores(kind, heads, kv, keys, blocks, d, q, q_at, s, s_at, s_stride):
    """Scores of whole blocks of keys, for 1, 2 or 4 heads."""
    if kind == F16:
        if heads == 4:
            _scores_f16_4(kv, keys, blocks, d, q, q_at, s, s_at, s_stride)
        elif heads == 2:
            _scores_f16_2(kv, keys, blocks, d, q, q_at, s, s_at, s_stride)
        else:
            _scores_f16_1(kv, keys, blocks, d, q, q_at, s, s_at, s_stride)
    elif heads == 4:
        _scores_q8_4(kv, keys, blocks, d, q, q_at, s, s_at, s_stride)
    elif heads == 2:
        _scores_q8_2(kv, keys, blocks, d, q, q_at, s, s_at, s_stride)
    else:
        _scores_q8_1(kv, keys, blocks, d, q, q_at, s, s_at, s_stride)


@jit
def _add_values(kind, heads, kv, values, slab, slabs, count, s, p_at, p_stride, y_at, y_stride):
    """Weighted sums of the values of `count` positions, for 1, 2 or 4 heads."""
    if kind == F16:
        if heads == 4:
            _values_f16_4(kv, values, slab, slabs, count, s, p_at, p_stride, y_at, y_stride)
        elif heads == 2:
            _values_f16_2(kv, values, slab, slabs, count, s, p_at, p_stride, y_at, y_stride)
        else:
            _values_f16_1(kv, values, slab, slabs, count, s, p_at, p_stride, y_at, y_stride)
    elif heads == 4:
        _values_q8_4(kv, values, slab, slabs, count, s, p_at, p_stride, y_at, y_stride)
    elif heads == 2:
        _values_q8_2(kv, values, slab, slabs, count, s, p_at, p_stride, y_at, y_stride)
    else:
        _values_q8_1(kv, values, slab, slabs, count, s, p_at, p_stride, y_at, y_stride)


@jit
def _branch_score(kind, kv, keys, d, q, q_at, slot):
    """The product of one query with the key in one slot: a lane of a tile, operation for operation."""
    total = np.float32(0.0)
    at = slot // 16 * 16 * d + slot % 16
    for i in range(d):
        if kind == F16:
            key = read_f16(kv, keys + (at + i * 16) * 2)
        else:
            value = np.int32(kv[keys + at + i * 16])
            key = np.float32(value - (value >> 7) * 256)  # a byte as signed
        total = fma(q[q_at + i], key, total)
    return total


@jit
def _scale_scores(kind, kv, key_scales, scale, begin, direct, s, s_at):
    """Scores times the scales of their keys (q8) and the attention's scale."""
    factor = simd.splat(scale)
    for position in range(begin, direct, 16):
        score = simd.load_f32(s, s_at + position)
        if kind != F16:
            score = simd.mul(score, simd.load_f32(kv, key_scales + position * 4))
        simd.store_f32(s, s_at + position, simd.mul(score, factor))


@jit
def _branch_scores(kind, kv, keys, key_scales, d, q, q_at, scale, first, last, base, path, path_at, s, s_at):
    """Scores of the positions of a tree branch, one by one."""
    for position in range(max(first, base), last):
        slot = path[path_at + position - base]
        score = _branch_score(kind, kv, keys, d, q, q_at, slot)
        if kind != F16:
            score = score * read_f32(kv, key_scales + slot * 4)
        s[s_at + position] = score * np.float32(scale)


@jit
def _scale_weights(kv, value_scales, first, last, base, path, path_at, s, s_at):
    """Probabilities times the scales of their values (q8)."""
    for position in range(first, last):
        slot = position if position < base else path[path_at + position - base]
        s[s_at + position] = s[s_at + position] * read_f32(kv, value_scales + slot * 4)


@jit
def _branch_values(kind, kv, values, slab, slabs, first, last, base, path, path_at, s, s_at, y_at):
    """The weighted values of the positions of a tree branch, after those before it."""
    size = 2 if kind == F16 else 1
    for position in range(max(first, base), last):
        slot = path[path_at + position - base]
        p = simd.splat(s[s_at + position])
        for b in range(slabs):
            at = values + b * slab + slot * 16 * size
            v = simd.load_f16(kv, at) if kind == F16 else simd.load_i8(kv, at)
            simd.store_f32(s, y_at + b * 16, simd.fma(p, v, simd.load_f32(s, y_at + b * 16)))


@kernel(_twin.attention)
def attention(
    kind, heads, kv, region, capacity, d, q, q_at, scale, first, last, base, path, path_at, s, s_at, y_at
):
    """1, 2 or 4 query heads q[q_at : +heads * d] over positions first..last-1 of the region at byte `region`.

    The scratch array s holds head h's scores from s_at + h * capacity and receives its output, padded
    to whole vectors, at y_at + h * 16 * ceil(d / 16). Rows of a plain sequence pass base = last.
    """
    size = 2 if kind == F16 else 1
    slabs, slab = (d + 15) // 16, capacity * 16 * size
    values = region + capacity * d * size
    key_scales = values + slabs * slab
    value_scales = key_scales + capacity * 4
    begin, direct = first // 16 * 16, min(last, base)
    blocks = max(0, (direct - begin + 15) // 16)
    _block_scores(kind, heads, kv, region + begin * d * size, blocks, d, q, q_at, s, s_at + begin, capacity)
    for h in range(heads):
        row = s_at + h * capacity
        _scale_scores(kind, kv, key_scales, scale, begin, direct, s, row)
        _branch_scores(
            kind, kv, region, key_scales, d, q, q_at + h * d, scale, first, last, base, path, path_at, s, row
        )
    y_stride = slabs * 16
    s[y_at : y_at + heads * y_stride] = np.float32(0.0)
    # The sums of the probabilities wait behind the outputs until the division.
    sums = y_at + heads * y_stride
    for h in range(heads):
        row = s_at + h * capacity
        s[sums + h] = softmax(s, row, first, last)
        if kind != F16:
            _scale_weights(kv, value_scales, first, last, base, path, path_at, s, row)
    count = max(0, direct - begin)
    here = values + begin * 16 * size
    _add_values(kind, heads, kv, here, slab, slabs, count, s, s_at + begin, capacity, y_at, y_stride)
    for h in range(heads):
        out = y_at + h * y_stride
        _branch_values(
            kind, kv, values, slab, slabs, first, last, base, path, path_at, s, s_at + h * capacity, out
        )
        total = simd.splat(s[sums + h])
        for b in range(slabs):
            simd.store_f32(s, out + b * 16, simd.div(simd.load_f32(s, out + b * 16), total))
