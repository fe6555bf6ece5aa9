"""Matrix micro-kernels: 16 rows of W against a few rows of x, emitted as LLVM.

    y[t, 0:16] += sum over k of W[0:16, k] * x[t, k]        t in 0..T-1

T is fixed per tile, so that its accumulators live in registers and each weight is unpacked once
for all T rows. Numba source cannot express T accumulators without writing each out by hand; here a
Python loop does it. An output is always the same chain of fused multiply-adds, whatever T is.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgert.kernels import packing, simd
from edgert.kernels.simd import f32x16, i8x64, i32x16

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()

FLOAT_CHAINS = 4
"""Accumulators per output of a float tile (k mod 4), added as (0+1)+(2+3): one chain would wait for
the latency of each multiply-add, and the number is part of the result's definition."""

AHEAD = 8
"""Records a tile of several rows prefetches ahead. Its arithmetic fills the core's window, so that too few
loads are under way by themselves: 4 rows of a large matrix take 0.75 of the time, 8 rows 0.68 (4 to 16
records ahead are alike). With one or two rows the hardware's own prefetching is better left alone."""


def _at(builder: ir.IRBuilder, pointer: ir.Value, index: int) -> ir.Value:
    return builder.gep(pointer, [ir.Constant(_I64, index)])


def _index(builder: ir.IRBuilder, *terms: tuple[ir.Value, int]) -> ir.Value:
    total = ir.Constant(_I64, 0)
    for value, factor in terms:
        total = builder.add(total, builder.mul(value, ir.Constant(_I64, factor)))
    return total


def _add_to_rows(builder: ir.IRBuilder, sums: list[ir.Value], y: ir.Value, stride: ir.Value) -> None:
    for t, total in enumerate(sums):
        row = builder.gep(y, [_index(builder, (stride, t))])
        simd.store(builder, builder.fadd(simd.load(builder, row, f32x16.llvm), total), row)


def _broadcast_bytes(builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    """4 bytes of x in every lane."""
    four = simd.load(builder, pointer, _I32)
    return builder.bitcast(simd.broadcast(builder, four, 16), i8x64.llvm)


def _dot_group(
    builder: ir.IRBuilder, quant: str, registers: list[ir.Value], x: ir.Value, total: ir.Value
) -> ir.Value:
    """The integer products of one group: i32x16 of sum over 32 k of q[row, k] * x[k]."""
    offset = 8 if quant == "q4" else simd.bytes_offset()
    correction = builder.mul(total, ir.Constant(_I32, -offset))
    # Two chains, for the latency of the dot product; integer sums are exact in any order.
    chains = [simd.broadcast(builder, correction, 16), simd.constant(i32x16.llvm, 0)]
    for j, weights in enumerate(registers):
        values = _broadcast_bytes(builder, _at(builder, x, 4 * j))
        dot = simd.dot4_nibbles if quant == "q4" else simd.dot4_bytes
        chains[j % 2] = dot(builder, chains[j % 2], weights, values)
    return builder.add(*chains)


def _load_group(builder: ir.IRBuilder, quant: str, record: ir.Value) -> tuple[list[ir.Value], ir.Value]:
    """The eight weight registers of a record, in order of k, and its 16 scales."""
    stored = 4 if quant == "q4" else 8
    raw = [simd.load(builder, _at(builder, record, 64 * j), i8x64.llvm) for j in range(stored)]
    bits = simd.load(builder, _at(builder, record, 64 * stored), ir.VectorType(_I16, 16))
    scales = simd.half_to_float(builder, bits)
    if quant == "q8":
        return raw, scales
    low, shift = simd.constant(i8x64.llvm, 15), simd.constant(i8x64.llvm, 4)
    halves = [(builder.and_(v, low), builder.lshr(v, shift)) for v in raw]
    return [half for pair in halves for half in pair], scales


def _prefetch(builder: ir.IRBuilder, record: ir.Value, size: int) -> None:
    """Ask for the record AHEAD of this one. Past the end of the weights that asks for nothing."""
    i32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    read, keep, data = (ir.Constant(i32, value) for value in (0, 3, 1))
    for line in range(0, size, 64):
        address = builder.bitcast(_at(builder, record, AHEAD * size + line), pointer)
        simd.call(builder, "llvm.prefetch.p0", ir.VoidType(), [address, read, keep, data])


def quantized_tile(quant: str, rows: int) -> Any:
    """A tile over q4 or q8 weights and quantised rows.

    tile(w, w_at, groups, xq, xs, xn, x_at, y, y_at, y_stride): weights at byte w_at of w; row t of x
    is groups x_at + t * groups + 0..groups-1, each 32 bytes of xq, a scale in xs and a sum in xn.
    """

    @intrinsic
    def tile(
        typing: Any,
        w: Any,
        w_at: Any,
        groups: Any,
        xq: Any,
        xs: Any,
        xn: Any,
        x_at: Any,
        y: Any,
        y_at: Any,
        y_stride: Any,
    ) -> Any:
        i64 = types.int64
        signature = types.void(w, i64, i64, xq, xs, xn, i64, y, i64, i64)

        def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
            _, w_at, groups, _, _, _, x_at, _, y_at, y_stride = args
            data = [
                context.make_array(sig.args[i])(context, builder, args[i]).data
                if i in (0, 3, 4, 5, 7)
                else None
                for i in range(len(args))
            ]
            weights = builder.gep(data[0], [w_at])
            sums = [cgutils.alloca_once_value(builder, simd.constant(f32x16.llvm, 0.0)) for _ in range(rows)]
            with cgutils.for_range(builder, groups) as loop:
                g = loop.index
                record = builder.gep(weights, [_index(builder, (g, packing.RECORD_BYTES[quant]))])
                if rows > 2:
                    _prefetch(builder, record, packing.RECORD_BYTES[quant])
                registers, scales = _load_group(builder, quant, record)
                for t in range(rows):
                    at = _index(builder, (x_at, 1), (groups, t), (g, 1))
                    values = builder.gep(data[3], [_index(builder, (at, packing.GROUP))])
                    total = builder.load(builder.gep(data[5], [at]))
                    whole = _dot_group(builder, quant, registers, values, total)
                    scale = simd.broadcast(builder, builder.load(builder.gep(data[4], [at])), 16)
                    product = builder.fmul(scales, scale)
                    real = builder.sitofp(whole, f32x16.llvm)
                    builder.store(simd.fma_values(builder, real, product, builder.load(sums[t])), sums[t])
            _add_to_rows(builder, [builder.load(s) for s in sums], builder.gep(data[7], [y_at]), y_stride)
            return context.get_dummy_value()

        return signature, body

    return tile


def float_tile(quant: str, rows: int) -> Any:
    """A tile over f32 or f16 weights and float rows.

    tile(w, w_at, groups, x, x_at, x_stride, y, y_at, y_stride): row t of x starts at element
    x_at + t * x_stride.
    """
    size = 4 if quant == "f32" else 2

    @intrinsic
    def tile(
        typing: Any,
        w: Any,
        w_at: Any,
        groups: Any,
        x: Any,
        x_at: Any,
        x_stride: Any,
        y: Any,
        y_at: Any,
        y_stride: Any,
    ) -> Any:
        i64 = types.int64
        signature = types.void(w, i64, i64, x, i64, i64, y, i64, i64)

        def load_weights(builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
            if quant == "f32":
                return simd.load(builder, pointer, f32x16.llvm)
            return simd.half_to_float(builder, simd.load(builder, pointer, ir.VectorType(_I16, 16)))

        def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
            _, w_at, groups, _, x_at, x_stride, _, y_at, y_stride = args
            data = {i: context.make_array(sig.args[i])(context, builder, args[i]).data for i in (0, 3, 6)}
            zero = simd.constant(f32x16.llvm, 0.0)
            sums = [
                [cgutils.alloca_once_value(builder, zero) for _ in range(FLOAT_CHAINS)] for _ in range(rows)
            ]
            steps = builder.mul(groups, ir.Constant(_I64, packing.GROUP // FLOAT_CHAINS))
            with cgutils.for_range(builder, steps) as loop:
                base = _index(builder, (w_at, 1), (loop.index, FLOAT_CHAINS * 16 * size))
                for c in range(FLOAT_CHAINS):
                    weights = load_weights(builder, _at(builder, builder.gep(data[0], [base]), c * 16 * size))
                    for t in range(rows):
                        at = _index(builder, (x_at, 1), (x_stride, t), (loop.index, FLOAT_CHAINS))
                        value = builder.load(_at(builder, builder.gep(data[3], [at]), c))
                        spread = simd.broadcast(builder, value, 16)
                        total = simd.fma_values(builder, weights, spread, builder.load(sums[t][c]))
                        builder.store(total, sums[t][c])
            totals = []
            for chains in sums:
                a, b, c, d = (builder.load(s) for s in chains)
                totals.append(builder.fadd(builder.fadd(a, b), builder.fadd(c, d)))
            _add_to_rows(builder, totals, builder.gep(data[6], [y_at]), y_stride)
            return context.get_dummy_value()

        return signature, body

    return tile
