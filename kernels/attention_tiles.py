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
from edgert.kernels.kv import F16
from edgert.kernels.simd import f32x16, i32x16

_I8, _I16, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(64)


def breadth(heads: int) -> int:
    """Key blocks, or slabs of 16 outputs, that a tile of `heads` heads takes at once.

    Enough accumulators to hide the latency of a multiply-add, few enough to stay in registers: 8 of
    AVX-512's 32, 4 of 16 lanes elsewhere (8 of AVX2's 16 registers, 16 of NEON's 32).
    """
    return max(1, (8 if target.lowering().dot == "vnni512" else 4) // heads)


def _widen(builder: ir.IRBuilder, kind: int, base: ir.Value, number: ir.Value) -> ir.Value:
    """16 cached numbers from the `number`-th on, as floats."""
    if kind == F16:
        pointer = builder.gep(base, [builder.mul(number, ir.Constant(_I64, 2))])
        return simd.half_to_float(builder, simd.load(builder, pointer, ir.VectorType(_I16, 16)))
    stored = simd.load(builder, builder.gep(base, [number]), ir.VectorType(_I8, 16))
    return builder.sitofp(builder.sext(stored, i32x16.llvm), f32x16.llvm)


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


def _scores(
    builder: ir.IRBuilder, kind: int, keys: ir.Value, d: ir.Value, queries: list[ir.Value], blocks: int
) -> list[list[ir.Value]]:
    """[head][block]: the products of a few key blocks with every query."""
    zero = simd.constant(f32x16.llvm, 0.0)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(blocks)] for _ in queries]
    for row in sums:
        for total in row:
            builder.store(zero, total)
    with cgutils.for_range(builder, d) as loop:
        rows = [builder.add(_times(builder, d, b), loop.index) for b in range(blocks)]
        lanes = [_widen(builder, kind, keys, _times(builder, row, 16)) for row in rows]
        for query, row in zip(queries, sums, strict=True):
            value = simd.broadcast(builder, builder.load(builder.gep(query, [loop.index])), 16)
            for lane, total in zip(lanes, row, strict=True):
                builder.store(simd.fma_values(builder, value, lane, builder.load(total)), total)
    return [[builder.load(total) for total in row] for row in sums]


def score_tile(kind: int, heads: int) -> Any:
    """tile(kv, keys, blocks, d, q, q_at, s, s_at, s_stride): scores of `blocks` blocks of 16 keys.

    s[h, 16 b + lane] = sum over i of q[h, i] * k[b, i, lane]. keys: byte where the first block starts;
    head h is q[q_at + h * d : +d]; its scores go to s[s_at + h * s_stride].
    """

    @intrinsic
    def tile(
        typing: Any,
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
        i64 = types.int64
        signature = types.void(kv, i64, i64, i64, q, i64, s, i64, i64)

        def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
            _, keys, blocks, d, _, q_at, _, s_at, s_stride = args
            kv, q, s = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 4, 6))
            size = 2 if kind == F16 else 1
            queries = [builder.gep(q, [builder.add(q_at, _times(builder, d, h))]) for h in range(heads)]
            for start, count in _chunks(builder, blocks, breadth(heads)):
                skipped = builder.mul(start, _times(builder, d, 16 * size))
                first = builder.gep(kv, [builder.add(keys, skipped)])
                for h, row in enumerate(_scores(builder, kind, first, d, queries, count)):
                    at = builder.add(
                        s_at, builder.add(_times(builder, s_stride, h), _times(builder, start, 16))
                    )
                    for b, value in enumerate(row):
                        simd.store(
                            builder, value, builder.gep(s, [builder.add(at, ir.Constant(_I64, 16 * b))])
                        )
            return context.get_dummy_value()

        return signature, body

    return tile


def _outputs(
    builder: ir.IRBuilder,
    kind: int,
    slabs: list[ir.Value],
    count: ir.Value,
    weights: list[ir.Value],
    outputs: list[list[ir.Value]],
) -> None:
    """outputs[head][slab] += the positions of each slab, weighted."""
    sums = [[cgutils.alloca_once(builder, f32x16.llvm) for _ in row] for row in outputs]
    for row, kept in zip(outputs, sums, strict=True):
        for pointer, total in zip(row, kept, strict=True):
            builder.store(simd.load(builder, pointer, f32x16.llvm), total)
    with cgutils.for_range(builder, count) as loop:
        lanes = [_widen(builder, kind, slab, _times(builder, loop.index, 16)) for slab in slabs]
        for weight, kept in zip(weights, sums, strict=True):
            spread = simd.broadcast(builder, builder.load(builder.gep(weight, [loop.index])), 16)
            for lane, total in zip(lanes, kept, strict=True):
                builder.store(simd.fma_values(builder, spread, lane, builder.load(total)), total)
    for row, kept in zip(outputs, sums, strict=True):
        for pointer, total in zip(row, kept, strict=True):
            simd.store(builder, builder.load(total), pointer)


def value_tile(kind: int, heads: int) -> Any:
    """tile(kv, values, slab, slabs, count, s, p_at, p_stride, y_at, y_stride): weighted sums of values.

    y[h, 16 b + lane] += sum over j < count of p[h, j] * v[b, j, lane]. values: byte of the first
    position in the first slab of 16 outputs; the next slab is `slab` bytes on, of `slabs`. p and y both
    lie in s: head h at p_at + h * p_stride and y_at + h * y_stride.
    """

    @intrinsic
    def tile(
        typing: Any,
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
        i64 = types.int64
        signature = types.void(kv, i64, i64, i64, i64, s, i64, i64, i64, i64)

        def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
            _, values, slab, slabs, count, _, p_at, p_stride, y_at, y_stride = args
            kv, s = (context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 5))
            weights = [
                builder.gep(s, [builder.add(p_at, _times(builder, p_stride, h))]) for h in range(heads)
            ]
            for start, size in _chunks(builder, slabs, breadth(heads)):
                first = builder.add(values, builder.mul(start, slab))
                streams = [
                    builder.gep(kv, [builder.add(first, _times(builder, slab, b))]) for b in range(size)
                ]
                at = builder.add(y_at, _times(builder, start, 16))
                rows = [builder.gep(s, [builder.add(at, _times(builder, y_stride, h))]) for h in range(heads)]
                outputs = [
                    [builder.gep(row, [ir.Constant(_I64, 16 * b)]) for b in range(size)] for row in rows
                ]
                _outputs(builder, kind, streams, count, weights, outputs)
            return context.get_dummy_value()

        return signature, body

    return tile
