"""Matrix micro-kernels: 16 rows of W against a few rows of x, emitted as LLVM.

    y[t, 0:16] += sum over k of W[0:16, k] * x[t, k]        t in 0..T-1

T is fixed per tile, so that its accumulators live in registers and each weight is unpacked once
for all T rows. Numba source cannot express T accumulators without writing each out by hand; here a
Python loop does it. An output is always the same chain of fused multiply-adds, whatever T is.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgert.kernels import packing, simd, target
from edgert.kernels.simd import f32x16, i8x64, i32x16

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()

QUANTIZED_ROWS = (8, 4, 2, 1)
FLOAT_ROWS = (4, 1)
"""Rows of a tile, largest first: as many as leave their accumulators in registers."""

FLOAT_CHAINS = 4
"""Accumulators per output of a float tile (k mod 4), added as (0+1)+(2+3): one chain would wait for
the latency of each multiply-add, and the number is part of the result's definition."""

PREFETCHING_ROWS = 2
"""Rows from which a tile prefetches. Its arithmetic fills the core's window, so that too few loads are
under way by themselves. With one row the hardware's own prefetching is better left alone. Measured on Zen 4,
a forward of the Llama-3.2-1B shape: one row takes 31.5 ms without and 35.0 with, two rows 42.4 and 34.0."""


class _Range(NamedTuple):
    """What one call of a product covers: blocks first..last-1 of W, `rows` rows in tiles of up to `most`."""

    first: ir.Value
    last: ir.Value
    rows: ir.Value
    most: ir.Value


class _Rows(NamedTuple):
    """The quantised rows of a tile: pointers to row 0's values, scales and sums; groups from row to row."""

    values: ir.Value
    scales: ir.Value
    sums: ir.Value
    groups: ir.Value


def _int(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _at(builder: ir.IRBuilder, pointer: ir.Value, index: int) -> ir.Value:
    return builder.gep(pointer, [_int(index)])


def _index(builder: ir.IRBuilder, *terms: tuple[ir.Value, int]) -> ir.Value:
    total: ir.Value = _int(0)
    for value, factor in terms:
        total = builder.add(total, builder.mul(value, _int(factor)))
    return total


def _each_tile(
    builder: ir.IRBuilder, covered: _Range, sizes: tuple[int, ...]
) -> Iterator[tuple[int, ir.Value, ir.Value]]:
    """Loops over tiles, the largest that fit first: (rows of the tile, its first row, its block)."""
    done: ir.Value = _int(0)
    for size in sizes:
        turns = builder.udiv(builder.sub(covered.rows, done), _int(size))
        if size > 1:
            allowed = builder.icmp_unsigned("<=", _int(size), covered.most)
            turns = builder.select(allowed, turns, _int(0))
        with cgutils.for_range(builder, turns) as outer:
            row = builder.add(done, _index(builder, (outer.index, size)))
            # Blocks inside: the rows of a tile stay in the first cache while a unit's weights pass.
            with cgutils.for_range(builder, builder.sub(covered.last, covered.first)) as inner:
                yield size, row, builder.add(covered.first, inner.index)
        done = builder.add(done, _index(builder, (turns, size)))


def _add_to_rows(builder: ir.IRBuilder, sums: list[ir.Value], y: ir.Value, stride: ir.Value) -> None:
    for t, total in enumerate(sums):
        row = builder.gep(y, [_index(builder, (stride, t))])
        simd.store(builder, builder.fadd(simd.load(builder, row, f32x16.llvm), total), row)


# ---- quantised -------------------------------------------------------------------------------


def _broadcast_bytes(builder: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    """4 bytes of x in every lane."""
    four = simd.load(builder, pointer, _I32)
    return builder.bitcast(simd.broadcast(builder, four, 16), i8x64.llvm)


def weight_offset(quant: str) -> int:
    """By how much a weight that a dot product takes is above the weight that is meant."""
    return simd.bytes_offset() if quant == "q8" else packing.OFFSETS.get(quant, 0)


class Group(NamedTuple):
    """A record unpacked: weights as whole numbers, `offset` above what they mean, and their scales."""

    registers: list[ir.Value]  # eight of 64 bytes, in order of k
    scales: ir.Value  # f32x16
    offset: ir.Value  # i32
    minimums: ir.Value | None = None  # f32x16, of those types that have them or share a tile with one


def _correction(builder: ir.IRBuilder, group: Group, total: ir.Value) -> ir.Value:
    """What the offset of the stored weights adds to a product with a row of sum `total`, negated."""
    return simd.broadcast(builder, builder.neg(builder.mul(total, group.offset)), 16)


def _dot_group(builder: ir.IRBuilder, is_bytes: bool, group: Group, x: ir.Value, total: ir.Value) -> ir.Value:
    """The integer products of one group: i32x16 of sum over 32 k of q[row, k] * x[k]."""
    # Two chains, for the latency of the dot product; integer sums are exact in any order.
    chains = [_correction(builder, group, total), simd.constant(i32x16.llvm, 0)]
    for j, weights in enumerate(group.registers):
        values = _broadcast_bytes(builder, _at(builder, x, 4 * j))
        dot = simd.dot4_bytes if is_bytes else simd.dot4_nibbles
        chains[j % 2] = dot(builder, chains[j % 2], weights, values)
    return builder.add(*chains)


def _dot_groups(
    builder: ir.IRBuilder, is_bytes: bool, group: Group, xs: list[ir.Value], totals: list[ir.Value]
) -> list[ir.Value]:
    """`_dot_group` of several rows: two at a time where the machine multiplies matrices of bytes."""
    if not target.lowering().pairs or len(xs) == 1:
        each = zip(xs, totals, strict=True)
        return [_dot_group(builder, is_bytes, group, x, total) for x, total in each]
    return [
        builder.add(whole, _correction(builder, group, total))
        for whole, total in zip(simd.dot_pairs(builder, group.registers, xs), totals, strict=True)
    ]


def _halves(builder: ir.IRBuilder, record: ir.Value, at: int) -> ir.Value:
    """16 float16 of a record, as floats."""
    bits = simd.load(builder, _at(builder, record, at), ir.VectorType(_I16, 16))
    return simd.half_to_float(builder, bits)


def load_group(builder: ir.IRBuilder, quant: str, record: ir.Value) -> Group:
    """A record of one type (packing.py)."""
    planes = {"q8": 8, "q4m": 4, "q4": 4, "q4s": 4, "q3": 3, "q2": 2}[quant]
    raw = [simd.load(builder, _at(builder, record, 64 * j), i8x64.llvm) for j in range(planes)]
    offset = ir.Constant(_I32, weight_offset(quant))
    if quant in ("q3", "q2"):
        registers = [simd.field(builder, raw[j // 4], j % 4 * 2, 3) for j in range(8)]
    else:
        registers = raw if quant == "q8" else [half for v in raw for half in simd.nibbles(builder, v)]
    if quant == "q3":
        thirds = (simd.field(builder, raw[2], j - 2, 4) for j in range(8))
        registers = [builder.or_(low, third) for low, third in zip(registers, thirds, strict=True)]
    if quant in packing.BYTE_SCALED:
        stored = simd.load(builder, _at(builder, record, 64 * planes), ir.VectorType(ir.IntType(8), 16))
        return Group(registers, simd.byte_scales(builder, stored), offset)
    minimums = _halves(builder, record, 64 * planes + 32) if quant == "q4m" else None
    return Group(registers, _halves(builder, record, 64 * planes), offset, minimums)


def _load_one_of(builder: ir.IRBuilder, quants: tuple[str, ...], which: ir.Value, record: ir.Value) -> Group:
    """A record of the type quants[which]."""
    if len(quants) == 1:
        return load_group(builder, quants[0], record)
    zero = simd.constant(f32x16.llvm, 0.0)
    kinds = [*[i8x64.llvm] * 8, f32x16.llvm, _I32, f32x16.llvm]
    places = [cgutils.alloca_once(builder, kind) for kind in kinds]
    for number, quant in enumerate(quants):
        with builder.if_then(builder.icmp_unsigned("==", which, _int(number))):
            found = load_group(builder, quant, record)
            parts = [*found.registers, found.scales, found.offset, found.minimums or zero]
            for part, place in zip(parts, places, strict=True):
                builder.store(part, place)
    *registers, scales, offset, minimums = (builder.load(place) for place in places)
    return Group(registers, scales, offset, minimums)


def _record_bytes(builder: ir.IRBuilder, quants: tuple[str, ...], which: ir.Value) -> ir.Value:
    size: ir.Value = _int(packing.RECORD_BYTES[quants[0]])
    for number, quant in enumerate(quants[1:], 1):
        this = builder.icmp_unsigned("==", which, _int(number))
        size = builder.select(this, _int(packing.RECORD_BYTES[quant]), size)
    return size


def prefetch(builder: ir.IRBuilder, record: ir.Value, size: int) -> None:
    """Ask for the `size` bytes of a record into the second cache. Past the weights that asks for nothing."""
    i32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    read, second, data = (ir.Constant(i32, value) for value in (0, 2, 1))
    for line in range(0, size, 64):
        address = builder.bitcast(_at(builder, record, line), pointer)
        simd.call(builder, "llvm.prefetch.p0", ir.VoidType(), [address, read, second, data])


def _quantized_tile(
    builder: ir.IRBuilder,
    quants: tuple[str, ...],
    which: ir.Value,
    rows: int,
    weights: ir.Value,
    x: _Rows,
    ahead: ir.Value,
) -> list[ir.Value]:
    """The sums [rows] of one block, whose records start at `weights`; `ahead` in bytes."""
    size = _record_bytes(builder, quants, which)
    sums = [cgutils.alloca_once_value(builder, simd.constant(f32x16.llvm, 0.0)) for _ in range(rows)]
    with cgutils.for_range(builder, x.groups) as loop:
        record = builder.gep(weights, [builder.mul(loop.index, size)])
        if rows >= PREFETCHING_ROWS:
            prefetch(builder, builder.gep(record, [ahead]), max(packing.RECORD_BYTES[q] for q in quants))
        group = _load_one_of(builder, quants, which, record)
        places = [_index(builder, (x.groups, t), (loop.index, 1)) for t in range(rows)]
        values = [builder.gep(x.values, [_index(builder, (at, packing.GROUP))]) for at in places]
        totals = [builder.load(builder.gep(x.sums, [at])) for at in places]
        wholes = _dot_groups(builder, quants == ("q8",), group, values, totals)
        for whole, at, row_sum, total in zip(wholes, places, totals, sums, strict=True):
            x_scale = builder.load(builder.gep(x.scales, [at]))
            product = builder.fmul(group.scales, simd.broadcast(builder, x_scale, 16))
            real = builder.sitofp(whole, f32x16.llvm)
            result = simd.fma_values(builder, real, product, builder.load(total))
            if group.minimums is not None:
                x_sum = builder.fmul(builder.sitofp(row_sum, _F32), x_scale)
                result = simd.fma_values(builder, group.minimums, simd.broadcast(builder, x_sum, 16), result)
            builder.store(result, total)
    return [builder.load(total) for total in sums]


def quantized_product(*quants: str, sizes: tuple[int, ...] = QUANTIZED_ROWS) -> Any:
    """The product of weights of some types and quantised rows.

    product(which, w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride, most, ahead):
    the weights are of type quants[which]; the other arguments are those of `matmul.matmul_q4`.
    """

    @intrinsic
    def product(
        typing: Any,
        which: Any,
        w: Any,
        w_at: Any,
        groups: Any,
        first: Any,
        last: Any,
        rows: Any,
        xq: Any,
        xs: Any,
        xn: Any,
        x_at: Any,
        y: Any,
        y_at: Any,
        y_stride: Any,
        most: Any,
        ahead: Any,
    ) -> Any:
        i = types.int64
        signature = types.void(i, w, i, i, i, i, i, xq, xs, xn, i, y, i, i, i, i)

        def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
            which, w, w_at, groups, first, last, rows, xq, xs, xn, x_at, y, y_at, y_stride, most, ahead = (
                context.make_array(kind)(context, builder, value).data
                if isinstance(kind, types.Array)
                else value
                for kind, value in zip(sig.args, args, strict=True)
            )
            size = _record_bytes(builder, quants, which)
            distance = builder.mul(ahead, size)
            block_bytes = builder.mul(groups, size)
            for count, row, block in _each_tile(builder, _Range(first, last, rows, most), sizes):
                weights = builder.gep(w, [builder.add(w_at, builder.mul(block, block_bytes))])
                at = builder.add(x_at, builder.mul(row, groups))
                values = builder.gep(xq, [_index(builder, (at, packing.GROUP))])
                x = _Rows(values, builder.gep(xs, [at]), builder.gep(xn, [at]), groups)
                sums = _quantized_tile(builder, quants, which, count, weights, x, distance)
                out = builder.add(builder.mul(row, y_stride), _index(builder, (y_at, 1), (block, 16)))
                _add_to_rows(builder, sums, builder.gep(y, [out]), y_stride)
            return context.get_dummy_value()

        return signature, body

    return product


# ---- float -----------------------------------------------------------------------------------


def _float_tile(
    builder: ir.IRBuilder,
    quant: str,
    rows: int,
    weights: ir.Value,
    x: ir.Value,
    x_stride: ir.Value,
    groups: ir.Value,
) -> list[ir.Value]:
    """The sums [rows] of one block."""
    size = 4 if quant == "f32" else 2

    def load_weights(pointer: ir.Value) -> ir.Value:
        if quant == "f32":
            return simd.load(builder, pointer, f32x16.llvm)
        return simd.half_to_float(builder, simd.load(builder, pointer, ir.VectorType(_I16, 16)))

    zero = simd.constant(f32x16.llvm, 0.0)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(FLOAT_CHAINS)] for _ in range(rows)]
    with cgutils.for_range(builder, _index(builder, (groups, packing.GROUP // FLOAT_CHAINS))) as loop:
        base = builder.gep(weights, [_index(builder, (loop.index, FLOAT_CHAINS * 16 * size))])
        for c in range(FLOAT_CHAINS):
            lanes = load_weights(_at(builder, base, c * 16 * size))
            for t in range(rows):
                at = _index(builder, (x_stride, t), (loop.index, FLOAT_CHAINS))
                value = builder.load(_at(builder, builder.gep(x, [at]), c))
                spread = simd.broadcast(builder, value, 16)
                total = simd.fma_values(builder, lanes, spread, builder.load(sums[t][c]))
                builder.store(total, sums[t][c])
    totals = []
    for chains in sums:
        a, b, c, d = (builder.load(s) for s in chains)
        totals.append(builder.fadd(builder.fadd(a, b), builder.fadd(c, d)))
    return totals


def float_product(quant: str) -> Any:
    """The product of f32 or f16 weights and float rows.

    product(w, w_at, groups, first, last, rows, x, x_at, x_stride, y, y_at, y_stride): the arguments of
    `matmul.matmul_f16`.
    """

    @intrinsic
    def product(
        typing: Any,
        w: Any,
        w_at: Any,
        groups: Any,
        first: Any,
        last: Any,
        rows: Any,
        x: Any,
        x_at: Any,
        x_stride: Any,
        y: Any,
        y_at: Any,
        y_stride: Any,
    ) -> Any:
        i = types.int64
        signature = types.void(w, i, i, i, i, i, x, i, i, y, i, i)

        def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
            w, w_at, groups, first, last, rows, x, x_at, x_stride, y, y_at, y_stride = (
                context.make_array(kind)(context, builder, value).data
                if isinstance(kind, types.Array)
                else value
                for kind, value in zip(sig.args, args, strict=True)
            )
            block_bytes = _index(builder, (groups, packing.RECORD_BYTES[quant]))
            covered = _Range(first, last, rows, _int(FLOAT_ROWS[0]))
            for count, row, block in _each_tile(builder, covered, FLOAT_ROWS):
                weights = builder.gep(w, [builder.add(w_at, builder.mul(block, block_bytes))])
                here = builder.gep(x, [builder.add(x_at, builder.mul(row, x_stride))])
                sums = _float_tile(builder, quant, count, weights, here, x_stride, groups)
                out = builder.add(builder.mul(row, y_stride), _index(builder, (y_at, 1), (block, 16)))
                _add_to_rows(builder, sums, builder.gep(y, [out]), y_stride)
            return context.get_dummy_value()

        return signature, body

    return product
