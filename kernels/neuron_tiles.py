"""The products of single neurons, emitted as LLVM (see neuron_packing.py for what they read).

A row of up is multiplied with 16 groups of x side by side, so that a lane is a group. Whole numbers and
products of scales of four rows are then zipped, so that four lanes are the rows, and the chain of fused
multiply-adds runs over the groups in order, as in tiles.py. A column of down adds to all outputs at once:
four columns are zipped byte by byte, which is what a dot product of four takes.

Single rows and columns come as fast as a core can ask for lines by itself, without the hardware's streams:
where one thread reads whole matrices at 26 GB/s, no way of asking got more than 16 out of rows of 2304 bytes
(Zen 4). So lines should be asked for all the time, and nothing else be in their way: sums of 16 rows that
wait in memory for the last, even in the first cache, cost a fifth.
"""

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgert.kernels import packing, simd, tiles
from edgert.kernels.simd import f32x16, i8x64, i32x16

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_i16x16 = ir.VectorType(_I16, 16)
_BLOCKS = 8
"""Vectors of 16 outputs in a slice."""

Emission = Callable[[ir.IRBuilder, list[ir.Value]], None]


def _intrinsic(arrays: int, emit: Emission, count: int) -> Any:
    """An intrinsic without a result of `count` arguments: `arrays` arrays, as pointers, then integers."""

    def typed(typing: Any, *arguments: Any) -> Any:
        kinds = [*arguments[:arrays], *[types.int64] * (count - arrays)]

        def body(context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value]) -> ir.Value:
            pointers = [
                context.make_array(kind)(context, builder, value).data
                for kind, value in zip(signature.args[:arrays], args[:arrays], strict=True)
            ]
            emit(builder, [*pointers, *args[arrays:]])
            return context.get_dummy_value()

        return types.void(*kinds), body

    # numba reads the arity from the function's signature.
    names = ["typing", *(f"a{i}" for i in range(count))]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(typed)


def _at(builder: ir.IRBuilder, pointer: ir.Value, *terms: tuple[ir.Value, int]) -> ir.Value:
    total: ir.Value = ir.Constant(_I64, 0)
    for value, factor in terms:
        total = builder.add(total, builder.mul(value, ir.Constant(_I64, factor)))
    return builder.gep(pointer, [total])


def _past(builder: ir.IRBuilder, pointer: ir.Value, count: int) -> ir.Value:
    return builder.gep(pointer, [ir.Constant(_I64, count)])


def transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """16 vectors of 16 lanes: lane i of vector j becomes lane j of vector i."""
    for distance in (8, 4, 2, 1):
        # What lies above the diagonal of each pair of squares changes places with what lies below.
        low = [lane if not lane & distance else 16 + lane - distance for lane in range(16)]
        high = [lane + distance if not lane & distance else 16 + lane for lane in range(16)]
        swapped = list(rows)
        for i in range(16):
            if not i & distance:
                a, b = rows[i], rows[i + distance]
                swapped[i] = simd.shuffle(builder, a, b, low)
                swapped[i + distance] = simd.shuffle(builder, a, b, high)
        rows = swapped
    return rows


# ---- rows of up ------------------------------------------------------------------------------


ROWS = 4
"""Rows of up that are multiplied side by side: what is loaded of x serves all of them, and a vector of four
lanes holds their sums."""


def _by_group(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Four vectors of 16 lanes to four others: lane 4b + i of the j-th is lane 4b + j of row i."""

    # Within 128 bits, which every instruction set has instructions for.
    def zipped(a: ir.Value, b: ir.Value, lanes: tuple[int, ...]) -> ir.Value:
        order = [block + lane % 4 + lane // 4 * 16 for block in range(0, 16, 4) for lane in lanes]
        return simd.shuffle(builder, a, b, order)

    a, b, c, d = rows
    low, high = (0, 4, 1, 5), (2, 6, 3, 7)
    pairs = [(zipped(a, b, half), zipped(c, d, half)) for half in (low, high)]
    return [zipped(ab, cd, half) for ab, cd in pairs for half in ((0, 1, 4, 5), (2, 3, 6, 7))]


def _chain(
    builder: ir.IRBuilder, wholes: list[ir.Value], scales: list[ir.Value], total: ir.Value
) -> ir.Value:
    """fma(whole, scale, total) for 16 groups in order, as `_by_group` gives them; the totals of four rows.

    The totals move on by four lanes with every fourth group, as the next is there in the same vectors. What
    is in the other lanes is of no use, and no harm.
    """
    total = simd.shuffle(builder, total, total, [0, 1, 2, 3] * 4)
    for _ in range(4):
        for whole, scale in zip(wholes, scales, strict=True):
            total = simd.fma_values(builder, whole, scale, total)
        total = simd.shuffle(builder, total, total, [(lane - 4) % 16 for lane in range(16)])
    return simd.shuffle(builder, total, total, [0, 1, 2, 3])


def row_sums(quant: str) -> Any:
    """row_sums(w, x, xs, xn, f, a, b, c, d, spans, x_at, s_at, out, e, g, h, i)

    The rows of up at bytes a, b, c, d times one row of x, to f[out : out + 4]: from y = 0, for the groups in
    order, y = fma(the whole number of its products, the product of its two scales, y). Groups past the last
    have scales of zero and change nothing. x: spread int8 (see `neurons.spread`) from x_at; s_at: the group
    of the row's scales and sums; e, g, h, i: four rows that are wanted next.
    """
    size = packing.RECORD_BYTES[quant]
    dot = simd.dot4_nibbles if quant == "q4" else simd.dot4_bytes

    def emit(builder: ir.IRBuilder, args: list[ir.Value]) -> None:
        w, x, xs, xn, f = args[:5]
        places, (spans, x_at, s_at, out), coming = args[5:9], args[9:13], args[13:]
        zero = simd.constant(f32x16.llvm, 0.0)
        total = cgutils.alloca_once_value(builder, simd.constant(ir.VectorType(ir.FloatType(), ROWS), 0.0))
        # The chain of a span runs beside the products of the next: it would wait for itself otherwise.
        before = [cgutils.alloca_once_value(builder, zero) for _ in range(2 * ROWS)]

        def add_before() -> None:
            parts = [builder.load(part) for part in before]
            builder.store(_chain(builder, parts[:ROWS], parts[ROWS:], builder.load(total)), total)

        with cgutils.for_range(builder, spans) as loop:
            span = loop.index
            values = _at(builder, x, (x_at, 1), (span, 512))
            fours = [simd.load(builder, _past(builder, values, 64 * j), i8x64.llvm) for j in range(8)]
            totals = simd.load(builder, _at(builder, xn, (s_at, 1), (span, 16)), i32x16.llvm)
            start = builder.mul(totals, simd.constant(i32x16.llvm, -tiles.weight_offset(quant)))
            scale = simd.load(builder, _at(builder, xs, (s_at, 1), (span, 16)), f32x16.llvm)
            wholes, scales = [], []
            for at, next_ in zip(places, coming, strict=True):
                tiles.prefetch(builder, _at(builder, w, (next_, 1), (span, size)), size)
                group = tiles.load_group(builder, quant, _at(builder, w, (at, 1), (span, size)))
                # Two chains, as in tiles.py.
                chains = [start, simd.constant(i32x16.llvm, 0)]
                for j, (weights, four) in enumerate(zip(group.registers, fours, strict=True)):
                    chains[j % 2] = dot(builder, chains[j % 2], weights, four)
                wholes.append(builder.sitofp(builder.add(*chains), f32x16.llvm))
                scales.append(builder.fmul(group.scales, scale))
            add_before()
            for part, place in zip(
                _by_group(builder, wholes) + _by_group(builder, scales), before, strict=True
            ):
                builder.store(part, place)
        add_before()
        simd.store(builder, builder.load(total), _at(builder, f, (out, 1)))

    return _intrinsic(5, emit, 17)


def rows_of_up(quant: str) -> Any:
    """rows_of_up(w, out, at, stride, spans, out_at): 16 rows of up, each `stride` bytes behind the one
    before, as the records of one block of rows16 in `out`, 16 for each span."""
    size = packing.RECORD_BYTES[quant]

    def emit(builder: ir.IRBuilder, args: list[ir.Value]) -> None:
        w, out, at, stride, spans, out_at = args
        with cgutils.for_range(builder, spans) as loop:
            rows = [
                builder.gep(
                    _at(builder, w, (at, 1), (loop.index, size)),
                    [builder.mul(stride, ir.Constant(_I64, row))],
                )
                for row in range(16)
            ]
            record = _at(builder, out, (out_at, 1), (loop.index, 16 * size))
            for kind, start in [(i32x16.llvm, j) for j in range(0, size - 32, 64)] + [(_i16x16, size - 32)]:
                loaded = [simd.load(builder, _past(builder, row, start), kind) for row in rows]
                for group, value in enumerate(transposed(builder, loaded)):
                    simd.store(builder, value, _past(builder, record, group * size + start))

    return _intrinsic(2, emit, 6)


# ---- columns of down -------------------------------------------------------------------------


def _zipped(builder: ir.IRBuilder, columns: list[ir.Value]) -> list[ir.Value]:
    """64 bytes of four neurons to four registers: 16 outputs of 4 neurons each, outputs in order."""

    def halves(a: ir.Value, b: ir.Value, size: int) -> list[ir.Value]:
        # Within 128 bits, which every instruction set has an instruction for.
        lanes = a.type.count
        picked = []
        for first in (0, size // 2):
            order = []
            for block in range(0, lanes, size):
                for i in range(first, first + size // 2):
                    order += [block + i, lanes + block + i]
            picked.append(simd.shuffle(builder, a, b, order))
        return picked

    words = ir.VectorType(_I16, 32)
    pairs = [[builder.bitcast(v, words) for v in halves(a, b, 16)] for a, b in (columns[:2], columns[2:])]
    fours = [part for low, high in zip(*pairs, strict=True) for part in halves(low, high, 8)]
    return [builder.bitcast(v, i8x64.llvm) for v in fours]


def _load_columns(builder: ir.IRBuilder, quant: str, columns: list[ir.Value]) -> list[ir.Value]:
    """A slice of four columns as 8 registers of 16 outputs by 4 neurons."""
    if quant == "q8":
        parts = [
            [simd.load(builder, _past(builder, c, half), i8x64.llvm) for c in columns] for half in (0, 64)
        ]
    else:
        # Zipped before they are cut into nibbles: half as many shuffles.
        zipped = _zipped(builder, [simd.load(builder, c, i8x64.llvm) for c in columns])
        low, high = zip(*(simd.nibbles(builder, v) for v in zipped), strict=True)
        return [*low, *high]
    return [register for part in parts for register in _zipped(builder, part)]


def _slice_bytes(quant: str) -> int:
    return 64 if quant == "q4" else 128


def _columns(
    builder: ir.IRBuilder, quant: str, w: ir.Value, words: ir.Value, slice_: ir.Value
) -> list[ir.Value]:
    """Where a slice of the four columns of a quad starts."""
    starts = [builder.load(_past(builder, words, i)) for i in range(4)]
    return [_at(builder, w, (start, 1), (slice_, _slice_bytes(quant))) for start in starts]


QUAD_WORDS = 5
"""Words of four neurons in a list of them: the bytes where their columns start, and their four int8."""


def add_columns(quant: str) -> Any:
    """add_columns(w, f, xs, routes, quads, count, sum, s_at, scales, slices, total, next, next_count,
    next_scales)

    `slices` slices of the columns of one group of neurons: total[n] = fma(the sum of their products, the
    scale of n at byte `scales` of w times xs[s_at], total[n]), total in f. The neurons are `count` fours from
    routes[quads] (QUAD_WORDS), and `sum` is the sum of the int8 of the group; what the next group wants, the
    fours from routes[next] and its scales, is asked for.
    """

    def emit(builder: ir.IRBuilder, args: list[ir.Value]) -> None:
        w, f, xs, routes, quads, count, sum_, s_at, scales, slices, total, next_, next_count, next_scales = (
            args
        )
        dot = simd.dot4_nibbles if quant == "q4" else simd.dot4_bytes
        scale = simd.broadcast(builder, builder.load(builder.gep(xs, [s_at])), 16)
        offset = builder.mul(builder.trunc(sum_, _I32), ir.Constant(_I32, -tiles.weight_offset(quant)))
        start = simd.broadcast(builder, offset, 16)
        sums = [cgutils.alloca_once(builder, i32x16.llvm) for _ in range(_BLOCKS)]
        with cgutils.for_range(builder, slices) as slice_:
            tiles.prefetch(builder, _at(builder, w, (next_scales, 1), (slice_.index, 256)), 256)
            with cgutils.for_range(builder, next_count) as four:
                words = _at(builder, routes, (next_, 1), (four.index, QUAD_WORDS))
                for column in _columns(builder, quant, w, words, slice_.index):
                    tiles.prefetch(builder, column, _slice_bytes(quant))
            for acc in sums:
                builder.store(start, acc)
            with cgutils.for_range(builder, count) as four:
                words = _at(builder, routes, (quads, 1), (four.index, QUAD_WORDS))
                h = builder.trunc(builder.load(_past(builder, words, 4)), _I32)
                values = builder.bitcast(simd.broadcast(builder, h, 16), i8x64.llvm)
                columns = _columns(builder, quant, w, words, slice_.index)
                for acc, weights in zip(sums, _load_columns(builder, quant, columns), strict=True):
                    builder.store(dot(builder, builder.load(acc), weights, values), acc)
            for block, acc in enumerate(sums):
                at = builder.add(
                    builder.mul(slice_.index, ir.Constant(_I64, _BLOCKS)), ir.Constant(_I64, block)
                )
                bits = simd.load(builder, _at(builder, w, (scales, 1), (at, 32)), _i16x16)
                product = builder.fmul(simd.half_to_float(builder, bits), scale)
                out = _at(builder, f, (total, 1), (at, 16))
                real = builder.sitofp(builder.load(acc), f32x16.llvm)
                before = simd.load(builder, out, f32x16.llvm)
                simd.store(builder, simd.fma_values(builder, real, product, before), out)

    return _intrinsic(4, emit, 14)


def group_of_down(quant: str) -> Any:
    """group_of_down(w, out, at, stride, scales, out_at, block): one slice of the columns of a cluster, at
    byte `at` and each `stride` behind the one before, and its scales, as a record of rows16 in each of 8
    blocks of `block` bytes in `out`."""
    size = packing.RECORD_BYTES[quant]

    def emit(builder: ir.IRBuilder, args: list[ir.Value]) -> None:
        w, out, at, stride, scales, out_at, block = args
        first = _at(builder, w, (at, 1))
        records = [
            builder.gep(_at(builder, out, (out_at, 1)), [builder.mul(block, ir.Constant(_I64, i))])
            for i in range(_BLOCKS)
        ]
        per_register = 8 if quant == "q4" else 4  # neurons
        for j in range(32 // per_register):
            fours = []
            for quad in range(j * per_register, (j + 1) * per_register, 4):
                columns = [
                    builder.gep(first, [builder.mul(stride, ir.Constant(_I64, quad + i))]) for i in range(4)
                ]
                fours.append(_load_columns(builder, quant, columns))
            for i, record in enumerate(records):
                value = fours[0][i]
                if quant == "q4":
                    four = simd.constant(i8x64.llvm, 4)
                    value = builder.or_(value, builder.shl(fours[1][i], four))
                simd.store(builder, value, _past(builder, record, 64 * j))
        for i, record in enumerate(records):
            bits = simd.load(builder, _at(builder, w, (scales, 1), (ir.Constant(_I64, i), 32)), _i16x16)
            simd.store(builder, bits, _past(builder, record, size - 32))

    return _intrinsic(2, emit, 7)


# ---- which ones ------------------------------------------------------------------------------


@intrinsic
def nonzero(typing: Any, x: Any, at: Any) -> Any:
    """Which of 32 int8 from x[at] are not zero: bit i for the i-th."""

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value]) -> ir.Value:
        kind = ir.VectorType(ir.IntType(8), 32)
        pointer = simd.element_pointer(context, builder, signature.args[0], args[0], args[1])
        value = simd.load(builder, pointer, kind)
        lanes = builder.icmp_signed("!=", value, simd.constant(kind, 0))
        return builder.zext(builder.bitcast(lanes, _I32), _I64)

    return types.int64(x, types.int64), body


@intrinsic
def positive(typing: Any, x: Any, at: Any) -> Any:
    """Which of 32 floats from x[at] are above zero: bit i for the i-th."""

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value]) -> ir.Value:
        kind = ir.VectorType(ir.FloatType(), 32)
        pointer = simd.element_pointer(context, builder, signature.args[0], args[0], args[1])
        value = simd.load(builder, pointer, kind)
        lanes = builder.fcmp_ordered(">", value, simd.constant(kind, 0.0))
        return builder.zext(builder.bitcast(lanes, _I32), _I64)

    return types.int64(x, types.int64), body


@intrinsic
def move_four(typing: Any, x: Any, x_at: Any, y: Any, y_at: Any) -> Any:
    """y[y_at : y_at + 4] = x[x_at : x_at + 4], int8."""

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value]) -> ir.Value:
        kinds = signature.args
        source = simd.element_pointer(context, builder, kinds[0], args[0], args[1])
        into = simd.element_pointer(context, builder, kinds[2], args[2], args[3])
        simd.store(builder, simd.load(builder, source, _I32), into)
        return context.get_dummy_value()

    return types.void(x, types.int64, y, types.int64), body


@intrinsic
def lowest_bit(typing: Any, mask: Any) -> Any:
    """The number of the lowest bit that is set; there is one."""

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value]) -> ir.Value:
        kind = ir.FunctionType(_I64, [_I64, ir.IntType(1)])
        count = cgutils.get_or_insert_function(builder.module, kind, "llvm.cttz.i64")
        return builder.call(count, [args[0], ir.Constant(ir.IntType(1), 1)])

    return types.int64(types.int64), body
