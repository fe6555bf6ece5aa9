"""Attention micro-kernels: a few query heads that share a key/value head, emitted as LLVM.

Each cached number is loaded and widened once for all heads of a tile. A score is one chain of
multiply-adds over the dimensions, an output one chain over the positions, whatever the tile is.
"""

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgert.kernels import simd, target
from edgert.kernels.kv import F16, Q4, Q8, VALUE_RECORD
from edgert.kernels.simd import f32x16, i32x16

_I8, _I16, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(64)

HEADS = (4, 2, 1)
"""Query heads a tile can have."""
POSITION_BYTES = {F16: 32, Q8: 16, Q4: VALUE_RECORD}
"""From one position to the next in a slab of values."""


def breadth(heads: int) -> int:
    """Key blocks, or slabs of 16 outputs, that a tile of `heads` heads takes at once.

    Enough accumulators to hide the latency of a multiply-add, few enough to stay in registers: 8 of
    AVX-512's 32, 4 of 16 lanes elsewhere (8 of AVX2's 16 registers, 16 of NEON's 32).
    """
    return max(1, (8 if target.lowering().dot == "vnni512" else 4) // heads)


def _widen(builder: ir.IRBuilder, kind: int, pointer: ir.Value) -> list[ir.Value]:
    """The cached numbers at a pointer as floats: 16 of them, of a q4 value record two times 16."""
    if kind == F16:
        return [simd.half_to_float(builder, simd.load(builder, pointer, ir.VectorType(_I16, 16)))]
    if kind == Q8:
        stored = simd.load(builder, pointer, ir.VectorType(_I8, 16))
        return [builder.sitofp(builder.sext(stored, i32x16.llvm), f32x16.llvm)]
    bits = simd.load(builder, pointer, ir.VectorType(_I16, 1))
    one = builder.extract_element(simd.half_to_float(builder, bits), ir.Constant(ir.IntType(32), 0))
    scale = simd.broadcast(builder, one, 16)
    stored = simd.load(builder, builder.gep(pointer, [ir.Constant(_I64, 2)]), ir.VectorType(_I8, 16))
    return [builder.fmul(half, scale) for half in simd.nibble_floats(builder, stored)]


def _times(builder: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    return builder.mul(value, ir.Constant(_I64, count))


def _chunks(builder: ir.IRBuilder, count: ir.Value, width: int) -> Iterator[tuple[ir.Value, int]]:
    """Loops over 0..count-1 in steps of `width`, then of 1: (start, size) for the body of each."""
    whole = builder.udiv(count, ir.Constant(_I64, width))
    with cgutils.for_range(builder, whole) as loop:
        yield _times(builder, loop.index, width), width
    if width > 1:
        done = _times(builder, whole, width)
        with cgutils.for_range(builder, builder.sub(count, done)) as loop:
            yield builder.add(done, loop.index), 1


def _each_case(
    builder: ir.IRBuilder, kind: ir.Value, heads: ir.Value, kinds: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    """(kind, heads) of every tile, each emitted behind the question whether it is the wanted one."""
    for known in kinds:
        with builder.if_then(builder.icmp_signed("==", kind, ir.Constant(_I64, known))):
            for count in HEADS:
                with builder.if_then(builder.icmp_signed("==", heads, ir.Constant(_I64, count))):
                    yield known, count


def _scores(
    builder: ir.IRBuilder, kind: int, keys: ir.Value, d: ir.Value, queries: list[ir.Value], blocks: int
) -> list[list[ir.Value]]:
    """[head][block]: the products of a few key blocks with every query."""
    zero = simd.constant(f32x16.llvm, 0.0)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(blocks)] for _ in queries]
    size = 32 if kind == F16 else 16
    with cgutils.for_range(builder, d) as loop:
        rows = [builder.add(_times(builder, d, b), loop.index) for b in range(blocks)]
        lanes = [_widen(builder, kind, builder.gep(keys, [_times(builder, row, size)]))[0] for row in rows]
        for query, row in zip(queries, sums, strict=True):
            value = simd.broadcast(builder, builder.load(builder.gep(query, [loop.index])), 16)
            for lane, total in zip(lanes, row, strict=True):
                builder.store(simd.fma_values(builder, value, lane, builder.load(total)), total)
    return [[builder.load(total) for total in row] for row in sums]


@intrinsic
def block_scores(
    typing: Any,
    kind: Any,
    heads: Any,
    kv: Any,
    keys: Any,
    blocks: Any,
    d: Any,
    q: Any,
    q_at: Any,
    s: Any,
    s_at: Any,
    s_stride: Any,
) -> Any:
    """Scores of `blocks` blocks of 16 f16 or q8 keys, for 1, 2 or 4 heads.

    s[h, 16 b + lane] = sum over i of q[h, i] * k[b, i, lane]. keys: byte where the first block starts;
    head h is q[q_at + h * d : +d]; its scores go to s[s_at + h * s_stride].
    """
    i64 = types.int64
    signature = types.void(i64, i64, kv, i64, i64, i64, q, i64, s, i64, i64)

    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        kind, heads, _, keys, blocks, d, _, q_at, _, s_at, s_stride = args
        kv, q, s = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in (2, 6, 8))
        for known, count in _each_case(builder, kind, heads, (F16, Q8)):
            queries = [builder.gep(q, [builder.add(q_at, _times(builder, d, h))]) for h in range(count)]
            for start, size in _chunks(builder, blocks, breadth(count)):
                skipped = builder.mul(start, _times(builder, d, POSITION_BYTES[known]))
                first = builder.gep(kv, [builder.add(keys, skipped)])
                for h, row in enumerate(_scores(builder, known, first, d, queries, size)):
                    at = builder.add(_times(builder, s_stride, h), _times(builder, start, 16))
                    out = builder.gep(s, [builder.add(s_at, at)])
                    for b, value in enumerate(row):
                        simd.store(builder, value, builder.gep(out, [ir.Constant(_I64, 16 * b)]))
        return context.get_dummy_value()

    return signature, body


def _outputs(
    builder: ir.IRBuilder,
    kind: int,
    slabs: list[ir.Value],
    count: ir.Value,
    weights: list[ir.Value],
    outputs: list[list[ir.Value]],
) -> None:
    """outputs[head][vector] += the positions of the slabs, weighted; a slab is one vector, or two of q4."""
    sums = [[cgutils.alloca_once(builder, f32x16.llvm) for _ in row] for row in outputs]
    for row, kept in zip(outputs, sums, strict=True):
        for pointer, total in zip(row, kept, strict=True):
            builder.store(simd.load(builder, pointer, f32x16.llvm), total)
    with cgutils.for_range(builder, count) as loop:
        here = _times(builder, loop.index, POSITION_BYTES[kind])
        lanes = [lane for slab in slabs for lane in _widen(builder, kind, builder.gep(slab, [here]))]
        for weight, kept in zip(weights, sums, strict=True):
            spread = simd.broadcast(builder, builder.load(builder.gep(weight, [loop.index])), 16)
            for lane, total in zip(lanes, kept, strict=True):
                builder.store(simd.fma_values(builder, spread, lane, builder.load(total)), total)
    for row, kept in zip(outputs, sums, strict=True):
        for pointer, total in zip(row, kept, strict=True):
            simd.store(builder, builder.load(total), pointer)


@intrinsic
def add_values(
    typing: Any,
    kind: Any,
    heads: Any,
    kv: Any,
    values: Any,
    slab: Any,
    slabs: Any,
    count: Any,
    s: Any,
    p_at: Any,
    p_stride: Any,
    y_at: Any,
    y_stride: Any,
) -> Any:
    """Weighted sums of values, for 1, 2 or 4 heads.

    y[h, i] += sum over j < count of p[h, j] * v[j, i]. values: byte of the first position in the first slab
    of 16 outputs (q4: 32); the next slab is `slab` bytes on, of `slabs`. p and y both lie in s: head h at
    p_at + h * p_stride and y_at + h * y_stride.
    """
    i64 = types.int64
    signature = types.void(i64, i64, kv, i64, i64, i64, i64, s, i64, i64, i64, i64)

    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        kind, heads, _, values, slab, slabs, count, _, p_at, p_stride, y_at, y_stride = args
        kv, s = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in (2, 7))
        for known, number in _each_case(builder, kind, heads, (F16, Q8, Q4)):
            vectors = 2 if known == Q4 else 1
            weights = [
                builder.gep(s, [builder.add(p_at, _times(builder, p_stride, h))]) for h in range(number)
            ]
            for start, size in _chunks(builder, slabs, max(1, breadth(number) // vectors)):
                first = builder.add(values, builder.mul(start, slab))
                streams = [
                    builder.gep(kv, [builder.add(first, _times(builder, slab, b))]) for b in range(size)
                ]
                at = builder.add(y_at, _times(builder, start, 16 * vectors))
                rows = [
                    builder.gep(s, [builder.add(at, _times(builder, y_stride, h))]) for h in range(number)
                ]
                outputs = [
                    [builder.gep(row, [ir.Constant(_I64, 16 * b)]) for b in range(size * vectors)]
                    for row in rows
                ]
                _outputs(builder, known, streams, count, weights, outputs)
        return context.get_dummy_value()

    return signature, body
