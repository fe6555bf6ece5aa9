"""out = softmax(scale * q K^T) V for query heads that share a key/value head (Vaswani et al., 2017).

Keys are taken by position, so a row's result does not depend on how its tokens were grouped into
forwards, nor on where in the cache a token tree's nodes lie: positions below `base` are in their
own slots, position base + j is in slot path[path_at + j].

Order of operations, for every machine: a score is one chain of fma over the dimensions, (for q8
times the key's scale,) times `scale`; (soft-capped;) (plus slope * distance, one fma;) softmax.py, with the
head's sink if it has one;
(for q8 each probability times its value's scale;) an output is one chain of fma over the positions,
divided by the sum.

A q4 cache holds H k / n and H v / n (hadamard.py, n its block). There the query is rotated to H q and
quantised as the activations of a matrix product are, a score is such a product with the keys' records,
and H takes the output back: H (H v / n) = v.
"""

import numpy as np

from edgert.kernels import matmul, simd, tiles
from edgert.kernels.activation import capped
from edgert.kernels.attention_tiles import HEADS, add_values, block_scores
from edgert.kernels.elementwise import fma, read_f16, read_f32
from edgert.kernels.hadamard import hadamard
from edgert.kernels.jit import jit, kernel
from edgert.kernels.kv import F16, KEY_RECORD, Q4, Q8, VALUE_RECORD
from edgert.kernels.quantize import quantize
from edgert.kernels.reference import attention as _twin
from edgert.kernels.reference.softmax import LOWEST
from edgert.kernels.softmax import softmax

MOST_HEADS = 4
"""Most query heads of one call: one load of the cache serves them all."""

_record_scores = tiles.quantized_product("q4", sizes=HEADS)


@jit
def width(kind, size):
    """Length of an output with its padding, and of a rotated query."""
    return (size + 31) // 32 * 32 if kind == Q4 else (size + 15) // 16 * 16


@jit
def _rotate_queries(heads, d, q, q_at, s, at, xq, xs, xn, x_at):
    """H q of each head, quantised into groups x_at..; s[at:] is room for it."""
    wide = width(Q4, d)
    for h in range(heads):
        row = at + h * wide
        s[row + d : row + wide] = np.float32(0.0)
        for i in range(d):
            s[row + i] = q[q_at + h * d + i]
        hadamard(s, row, d)
    quantize(s, at, heads * wide // 32, xq, xs, xn, x_at)


@jit
def _scores_q4(heads, kv, region, d, first, last, s, s_at, s_stride, xq, xs, xn, x_at):
    """Scores of blocks first..last-1 of q4 keys."""
    for h in range(heads):
        s[s_at + h * s_stride + first * 16 : s_at + h * s_stride + last * 16] = np.float32(0.0)
    groups, ahead = (d + 31) // 32, matmul.AHEAD
    _record_scores(
        0, kv, region, groups, first, last, heads, xq, xs, xn, x_at, s, s_at, s_stride, MOST_HEADS, ahead
    )


@jit
def _scale_scores(kind, kv, key_scales, scale, cap, begin, end, s, s_at):
    """Scores times the scales of their keys (q8) and the attention's scale; soft-capped where cap > 0."""
    factor, limit = simd.splat(scale), simd.splat(cap)
    for slot in range(begin, end, 16):
        score = simd.load_f32(s, s_at + slot)
        if kind == Q8:
            score = simd.mul(score, simd.load_f32(kv, key_scales + slot * 4))
        score = simd.mul(score, factor)
        if cap > np.float32(0.0):
            score = capped(score, limit)
        simd.store_f32(s, s_at + slot, score)


@jit
def _add_distances(slope, first, last, s, s_at):
    """ALiBi: scores plus slope times the key's position behind the query's, 0 or less (Press et al., 2022,
    arXiv:2108.12409, section 3)."""
    for position in range(first, last):
        s[s_at + position] = fma(slope, np.float32(position - last + 1), s[s_at + position])


@jit
def _scale_weights(kv, value_scales, first, last, base, path, path_at, s, s_at):
    """Probabilities times the scales of their values (q8)."""
    for position in range(first, last):
        slot = position if position < base else path[path_at + position - base]
        s[s_at + position] = s[s_at + position] * read_f32(kv, value_scales + slot * 4)


@jit
def _add_branch_value(kind, kv, values, slab, slabs, slot, p, s, y_at):
    """y += p * the value in one slot."""
    weight = simd.splat(p)
    for b in range(slabs):
        if kind == Q4:
            at, out = values + b * slab + slot * VALUE_RECORD, y_at + b * 32
            scale = simd.splat(read_f16(kv, at))
            low = simd.mul(simd.load_low_nibbles(kv, at + 2), scale)
            high = simd.mul(simd.load_high_nibbles(kv, at + 2), scale)
            simd.store_f32(s, out, simd.fma(weight, low, simd.load_f32(s, out)))
            simd.store_f32(s, out + 16, simd.fma(weight, high, simd.load_f32(s, out + 16)))
        else:
            at, out = values + b * slab + slot * (32 if kind == F16 else 16), y_at + b * 16
            v = simd.load_f16(kv, at) if kind == F16 else simd.load_i8(kv, at)
            simd.store_f32(s, out, simd.fma(weight, v, simd.load_f32(s, out)))


@kernel(_twin.attention, inline=True)
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
    """1, 2 or 4 query heads q[q_at : +heads * d] over positions first..last-1 of the region at byte `region`.

    The scratch array s holds head h's scores from s_at + h * capacity and receives its output at
    y_at + h * width(kind, dv), padded with zeros; one more number per head behind the outputs is used. Groups
    x_at.. of xq, xs and xn, ceil(d / 32) per head, are scratch for q4. Rows of a plain sequence pass
    base = last. cap: 0 for none; slopes, sinks: the bytes of w with the heads' ALiBi slopes, and with the
    scores of a key that nobody holds (gpt-oss), -1 for none.
    """
    wide = width(kind, dv)
    if kind == Q4:
        slabs, slab = wide // 32, capacity * VALUE_RECORD
        values = region + capacity * ((d + 31) // 32) * (KEY_RECORD // 16)
    else:
        size = 2 if kind == F16 else 1
        slabs, slab = wide // 16, capacity * 16 * size
        values = region + capacity * d * size
    key_scales = values + slabs * slab  # of q8
    value_scales = key_scales + capacity * 4
    begin, direct = first // 16 * 16, min(last, base)
    # Scores are of whole blocks of slots, those of other branches among them: a branch takes its own
    # from there, in place, because its slots ascend and none lies before the position it holds.
    end = direct if base >= last else path[path_at + last - 1 - base] + 1
    blocks = max(0, (end - begin + 15) // 16)
    if kind == Q4:
        _rotate_queries(heads, d, q, q_at, s, y_at, xq, xs, xn, x_at)
        start = begin // 16
        _scores_q4(heads, kv, region, d, start, start + blocks, s, s_at, capacity, xq, xs, xn, x_at)
    else:
        keys = region + begin * d * size
        block_scores(kind, heads, kv, keys, blocks, d, q, q_at, s, s_at + begin, capacity)
    for h in range(heads):
        row = s_at + h * capacity
        _scale_scores(kind, kv, key_scales, scale, cap, begin, end, s, row)
        for position in range(max(first, base), last):
            s[row + position] = s[row + path[path_at + position - base]]
        if slopes >= 0:
            _add_distances(read_f32(w, slopes + h * 4), first, last, s, row)
    s[y_at : y_at + heads * wide] = np.float32(0.0)
    # The sums of the probabilities wait behind the outputs until the division.
    sums = y_at + heads * wide
    for h in range(heads):
        row = s_at + h * capacity
        s[sums + h] = softmax(s, row, first, last, read_f32(w, sinks + h * 4) if sinks >= 0 else LOWEST)
        if kind == Q8:
            _scale_weights(kv, value_scales, first, last, base, path, path_at, s, row)
    here, count = values + begin * (slab // capacity), max(0, direct - begin)
    add_values(kind, heads, kv, here, slab, slabs, count, s, s_at + begin, capacity, y_at, wide)
    for h in range(heads):
        out = y_at + h * wide
        for position in range(max(first, base), last):
            slot = path[path_at + position - base]
            _add_branch_value(kind, kv, values, slab, slabs, slot, s[s_at + h * capacity + position], s, out)
        total = simd.splat(s[sums + h])
        for i in range(out, out + wide, 16):
            simd.store_f32(s, i, simd.div(simd.load_f32(s, i), total))
        if kind == Q4:
            hadamard(s, out, dv)
