"""The logical 16-lane vector: LLVM vector types as numba types, and operations on them.

`f32x16`, `i32x16` and `i8x64` are values in compiled code. Each operation below is one LLVM
operation on all lanes, with no reassociation, no contraction and no approximate instruction, so
its result is the same on every machine. `load_*` and `store_*` take an array of any type and an
index in that array's elements; nothing is bounds-checked here.
"""

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from edgert.kernels import target
from edgert.kernels.packing import BYTE_SCALE_FACTOR

LANES = 16

_I8, _I16, _I32, _F16, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


class VectorType(types.Type):
    """A numba type that is one LLVM vector."""

    def __init__(self, element: ir.Type, lanes: int) -> None:
        self.llvm = ir.VectorType(element, lanes)
        super().__init__(name=f"vector<{element}x{lanes}>")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: VectorType) -> None:
        super().__init__(manager, vector, vector.llvm)


f32x16 = VectorType(_F32, 16)
i32x16 = VectorType(_I32, 16)
i8x64 = VectorType(_I8, 64)


# ---- plain LLVM emission, shared with tiles.py -----------------------------------------------


def constant(vector: ir.VectorType, value: float) -> ir.Constant:
    """A vector with `value` in every lane."""
    return ir.Constant(vector, [value] * vector.count)


def shuffle(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
    """The lanes of `a` followed by `b`, picked by number."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def broadcast(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """One scalar in every lane."""
    vector = ir.VectorType(scalar.type, lanes)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return shuffle(builder, first, undefined, [0] * lanes)


def call(builder: ir.IRBuilder, name: str, result: ir.Type, args: list[ir.Value]) -> ir.Value:
    """A call of an LLVM intrinsic by name."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def load(builder: ir.IRBuilder, pointer: ir.Value, kind: ir.Type) -> ir.Value:
    """An unaligned load of `kind` from a pointer of any type."""
    value = builder.load(builder.bitcast(pointer, kind.as_pointer()))
    value.align = 1
    return value


def store(builder: ir.IRBuilder, value: ir.Value, pointer: ir.Value) -> None:
    """An unaligned store through a pointer of any type."""
    done = builder.store(value, builder.bitcast(pointer, value.type.as_pointer()))
    done.align = 1


def element_pointer(context: Any, builder: ir.IRBuilder, kind: Any, array: Any, index: ir.Value) -> ir.Value:
    """The address of element `index` of a contiguous numba array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def fma_values(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a * b + c in every lane, rounded once."""
    return call(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


def half_to_float(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Float16 bits (i16 lanes) to float32, exactly."""
    lanes = bits.type.count
    f32, i32 = ir.VectorType(_F32, lanes), ir.VectorType(_I32, lanes)
    if target.lowering().half:
        return builder.fpext(builder.bitcast(bits, ir.VectorType(_F16, lanes)), f32)
    # Exponent and mantissa moved to their float32 places read as value * 2^-112; the product
    # restores the scale and normalises subnormals. Infinities are refused when files are read.
    wide = builder.zext(bits, i32)
    sign = builder.shl(builder.and_(wide, constant(i32, 0x8000)), constant(i32, 16))
    magnitude = builder.shl(builder.and_(wide, constant(i32, 0x7FFF)), constant(i32, 13))
    scaled = builder.fmul(builder.bitcast(magnitude, f32), constant(f32, 2.0**112))
    return builder.bitcast(builder.or_(builder.bitcast(scaled, i32), sign), f32)


def float_to_half(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Float32 to float16 bits (i16 lanes), to nearest even, infinite from 65520 on."""
    lanes = value.type.count
    f32, i32, i16 = value.type, ir.VectorType(_I32, lanes), ir.VectorType(_I16, lanes)
    if target.lowering().half:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(_F16, lanes)), i16)
    bits = builder.bitcast(value, i32)
    sign = builder.lshr(builder.and_(bits, constant(i32, 0x80000000 - (1 << 32))), constant(i32, 16))
    magnitude = builder.and_(bits, constant(i32, 0x7FFFFFFF))
    # Normal result: rebias the exponent, add half of the last place (less one when even), shift.
    odd = builder.and_(builder.lshr(magnitude, constant(i32, 13)), constant(i32, 1))
    rounded = builder.add(builder.add(magnitude, constant(i32, 0xFFF - (112 << 23))), odd)
    normal = builder.lshr(rounded, constant(i32, 13))
    # Subnormal result: adding 0.5 leaves the wanted bits, correctly rounded, in the mantissa.
    shifted = builder.fadd(builder.bitcast(magnitude, f32), constant(f32, 0.5))
    subnormal = builder.sub(builder.bitcast(shifted, i32), constant(i32, 0x3F000000))
    small = builder.icmp_signed("<", magnitude, constant(i32, 113 << 23))
    large = builder.icmp_signed(">=", magnitude, constant(i32, 0x477FF000))  # 65520
    half = builder.select(large, constant(i32, 0x7C00), builder.select(small, subnormal, normal))
    return builder.trunc(builder.or_(half, sign), i16)


def split(builder: ir.IRBuilder, value: ir.Value, parts: int) -> list[ir.Value]:
    """A vector cut into equal parts, low lanes first."""
    size = value.type.count // parts
    return [
        shuffle(builder, value, value, list(range(part * size, part * size + size))) for part in range(parts)
    ]


def join(builder: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """The inverse of `split`, for a power of two of parts."""
    while len(parts) > 1:
        lanes = list(range(2 * parts[0].type.count))
        parts = [shuffle(builder, a, b, lanes) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def byte_scales(builder: ir.IRBuilder, stored: ir.Value) -> ir.Value:
    """Scales of one byte (i8 lanes; see packing.py) to float32, exactly."""
    wide = ir.VectorType(_I16, stored.type.count)
    moved = builder.shl(builder.sext(stored, wide), constant(wide, 7))
    # The sign was extended through bits 15 and 14; the second belongs to the exponent.
    halves = half_to_float(builder, builder.and_(moved, constant(wide, -(1 << 14) - 1)))
    return builder.fmul(halves, constant(halves.type, BYTE_SCALE_FACTOR))


def field(builder: ir.IRBuilder, value: ir.Value, shift: int, mask: int) -> ir.Value:
    """Every byte shifted right by `shift` (left where negative) and masked; no bit of `mask` is shifted in.

    On x86, for the reason given in `nibbles`, by shifts of 16 bits.
    """
    kind = value.type if platform.machine() != "x86_64" else ir.VectorType(_I16, value.type.count // 2)
    wide = builder.bitcast(value, kind)
    if shift:
        move = builder.lshr if shift > 0 else builder.shl
        wide = move(wide, constant(kind, abs(shift)))
    return builder.and_(builder.bitcast(wide, value.type), constant(value.type, mask))


def nibbles(builder: ir.IRBuilder, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The low and the high nibble of every byte."""
    low = constant(value.type, 15)
    if platform.machine() != "x86_64":
        return builder.and_(value, low), builder.lshr(value, constant(value.type, 4))
    # x86 has no shift of bytes: LLVM would take an affine transformation of GF(2)^8 where there is one,
    # which on Zen 4 waits for the same unit as the dot products (a record of 2 rows in cache: 7.3 to 6.1 ns).
    wide = ir.VectorType(_I16, value.type.count // 2)
    shifted = builder.lshr(builder.bitcast(value, wide), constant(wide, 4))
    return builder.and_(value, low), builder.and_(builder.bitcast(shifted, value.type), low)


def _maddubs(builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    i16x16, i32x8 = ir.VectorType(_I16, 16), ir.VectorType(_I32, 8)
    pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", i16x16, [u, s])
    fours = call(builder, "llvm.x86.avx2.pmadd.wd", i32x8, [pairs, constant(i16x16, 1)])
    return builder.add(acc, fours)


def _vpdpbusd(builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    # Declared over words, as LLVM did at first: newer versions declare bytes and take both.
    words = [builder.bitcast(v, acc.type) for v in (u, s)]
    return call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * acc.type.count}", acc.type, [acc, *words])


def _sdot(builder: ir.IRBuilder, acc: ir.Value, u: ir.Value, s: ir.Value) -> ir.Value:
    return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, [acc, u, s])


def _generic_dot(builder: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    wide = ir.VectorType(_I32, 64)
    products = builder.mul(builder.sext(w, wide), builder.sext(x, wide))
    for k in range(4):
        acc = builder.add(acc, shuffle(builder, products, products, list(range(k, 64, 4))))
    return acc


def dot4_nibbles(builder: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """acc (i32x16) + the sums of 4 products w * x (i8x64), for w in 0..15.

    Such w are the same signed and unsigned, and AVX2's 16-bit pairs (2 * 15 * 127) never saturate.
    """
    how = target.lowering().dot
    if how == "generic":
        return _generic_dot(builder, acc, w, x)
    if how == "vnni512":
        return _vpdpbusd(builder, acc, w, x)
    parts = 4 if how == "sdot" else 2
    triples = zip(*(split(builder, v, parts) for v in (acc, w, x)), strict=True)
    dot = {"maddubs": _maddubs, "vnni256": _vpdpbusd, "sdot": _sdot}[how]
    return join(builder, [dot(builder, *t) for t in triples])


def bytes_offset() -> int:
    """What `dot4_bytes` adds to each weight: its caller subtracts offset * sum(x) from the result.

    VNNI multiplies unsigned by signed bytes, so weights are moved up to 1..255 there.
    """
    return 128 if target.lowering().dot.startswith("vnni") else 0


def dot4_bytes(builder: ir.IRBuilder, acc: ir.Value, w: ir.Value, x: ir.Value) -> ir.Value:
    """acc (i32x16) + the sums of 4 products (w + bytes_offset()) * x (i8x64), w and x in -127..127."""
    how = target.lowering().dot
    if bytes_offset():
        return dot4_nibbles(builder, acc, builder.xor(w, constant(w.type, -128)), x)
    if how != "maddubs":
        return dot4_nibbles(builder, acc, w, x)
    # |w| * (x with the sign of w): the same products, unsigned times signed, and no saturation
    # because 2 * 127 * 127 < 32768.
    halves = []
    for a, v, y in zip(*(split(builder, value, 2) for value in (acc, w, x)), strict=True):
        signed = call(builder, "llvm.x86.avx2.psign.b", y.type, [y, v])
        size = call(builder, "llvm.x86.avx2.psign.b", v.type, [v, v])
        halves.append(_maddubs(builder, a, size, signed))
    return join(builder, halves)


def dot_pairs(builder: ir.IRBuilder, registers: list[ir.Value], xs: list[ir.Value]) -> list[ir.Value]:
    """Products of signed weights with an even number of rows, by `smmla`: an i32x16 for each row.

    registers: i8x64, 4 consecutive k of 16 weight rows each, in order of k; xs: pointers to the bytes of
    the rows. One instruction multiplies 8 k of two weight rows with 8 k of two rows of x, so two
    neighbouring registers are zipped first.
    """
    i32x4, i8x16, i8x8 = ir.VectorType(_I32, 4), ir.VectorType(_I8, 16), ir.VectorType(_I8, 8)
    # [pair of rows][pair of weight rows]: the four products row by row, weights first.
    sums = [[constant(i32x4, 0) for _ in range(8)] for _ in xs[::2]]
    for j in range(0, len(registers), 2):
        halves = [split(builder, builder.bitcast(v, i32x16.llvm), 4) for v in registers[j : j + 2]]
        weights = [
            builder.bitcast(shuffle(builder, low, high, [n, 4 + n, n + 1, 5 + n]), i8x16)
            for low, high in zip(*halves, strict=True)
            for n in (0, 2)
        ]
        eights = [load(builder, builder.gep(x, [ir.Constant(ir.IntType(64), 4 * j)]), i8x8) for x in xs]
        for row, a, b in zip(sums, eights[::2], eights[1::2], strict=True):
            pair = join(builder, [a, b])
            for n, w in enumerate(weights):
                row[n] = call(builder, "llvm.aarch64.neon.smmla.v4i32.v16i8", i32x4, [row[n], w, pair])
    return [
        join(builder, [shuffle(builder, a, b, lanes) for a, b in zip(row[::2], row[1::2], strict=True)])
        for row in sums
        for lanes in ([0, 2, 4, 6], [1, 3, 5, 7])
    ]


# ---- operations for compiled kernels ---------------------------------------------------------

Emit = Callable[..., ir.Value]


def _operation(result: Any, *operands: Any) -> Callable[[Emit], Any]:
    """Make an emission `f(builder, *values)` callable from compiled code."""

    def decorate(emit: Emit) -> Any:
        def body(context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value]) -> ir.Value:
            return emit(builder, *args)

        # numba reads the arity from the function's own signature, so one wrapper per arity.
        if len(operands) == 0:
            return intrinsic(lambda typing: (result(), body))
        if len(operands) == 1:
            return intrinsic(lambda typing, a: (result(*operands), body))
        if len(operands) == 2:
            return intrinsic(lambda typing, a, b: (result(*operands), body))
        if len(operands) == 3:
            return intrinsic(lambda typing, a, b, c: (result(*operands), body))
        return intrinsic(lambda typing, a, b, c, d: (result(*operands), body))

    return decorate


add = _operation(f32x16, f32x16, f32x16)(lambda b, x, y: b.fadd(x, y))
sub = _operation(f32x16, f32x16, f32x16)(lambda b, x, y: b.fsub(x, y))
mul = _operation(f32x16, f32x16, f32x16)(lambda b, x, y: b.fmul(x, y))
div = _operation(f32x16, f32x16, f32x16)(lambda b, x, y: b.fdiv(x, y))
fma = _operation(f32x16, f32x16, f32x16, f32x16)(fma_values)
splat = _operation(f32x16, types.float32)(lambda b, x: broadcast(b, x, 16))


@_operation(f32x16, f32x16, f32x16)
def maximum(builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger lane; y where they compare equal. Never sees NaN."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


@_operation(f32x16, f32x16, f32x16)
def minimum(builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The smaller lane; y where they compare equal. Never sees NaN."""
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


@_operation(f32x16, f32x16, f32x16)
def not_below(builder: ir.IRBuilder, x: ir.Value, least: ir.Value) -> ir.Value:
    """x where it is at least `least` in magnitude, else 0."""
    size = call(builder, "llvm.fabs.v16f32", x.type, [x])
    return builder.select(builder.fcmp_ordered(">=", size, least), x, constant(x.type, 0.0))


@_operation(f32x16, f32x16, f32x16, f32x16, f32x16)
def where_above(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """x in the lanes where a > b, else y."""
    return builder.select(builder.fcmp_ordered(">", a, b), x, y)


@_operation(f32x16, f32x16)
def through_half(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The nearest float16, for |x| up to 65504."""
    return half_to_float(builder, float_to_half(builder, x))


@_operation(f32x16, f32x16)
def binade(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The largest power of two that is at most |x|; 0 for x below 2**-126."""
    exponent = builder.and_(builder.bitcast(x, i32x16.llvm), constant(i32x16.llvm, 0x7F800000))
    return builder.bitcast(exponent, x.type)


@_operation(f32x16, f32x16)
def absolute(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """|x| in every lane."""
    return call(builder, "llvm.fabs.v16f32", x.type, [x])


@_operation(f32x16, f32x16)
def power_of_two(builder: ir.IRBuilder, n: ir.Value) -> ir.Value:
    """2**n for whole n in -126..127."""
    exponent = builder.add(builder.fptosi(n, i32x16.llvm), constant(i32x16.llvm, 127))
    return builder.bitcast(builder.shl(exponent, constant(i32x16.llvm, 23)), f32x16.llvm)


@_operation(f32x16, f32x16)
def nearest(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The nearest whole number, ties to even, for |x| < 2**22.

    Adding 1.5 * 2**23 leaves no fraction bits; one rule for all machines, no rounding instruction.
    """
    magic = constant(x.type, 12582912.0)
    return builder.fsub(builder.fadd(x, magic), magic)


@_operation(types.float32, f32x16)
def sum_lanes(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The sum of the lanes, always as ((0+8)+(4+12))+...: halves added until one is left."""
    while x.type.count > 1:
        low, high = split(builder, x, 2)
        x = builder.fadd(low, high)
    return builder.extract_element(x, ir.Constant(_I32, 0))


@_operation(types.float32, f32x16)
def max_lanes(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The largest lane."""
    while x.type.count > 1:
        low, high = split(builder, x, 2)
        x = builder.select(builder.fcmp_ordered(">", low, high), low, high)
    return builder.extract_element(x, ir.Constant(_I32, 0))


@_operation(f32x16, types.int64, f32x16, f32x16)
def first_lanes(builder: ir.IRBuilder, count: ir.Value, x: ir.Value, y: ir.Value) -> ir.Value:
    """x in the first `count` lanes, y in the others."""
    lane = ir.Constant(i32x16.llvm, list(range(16)))
    limit = broadcast(builder, builder.trunc(count, _I32), 16)
    return builder.select(builder.icmp_signed("<", lane, limit), x, y)


@intrinsic
def square_root(typing: Any, x: Any) -> Any:
    """The correctly rounded square root of a float32."""

    def body(context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value]) -> ir.Value:
        return call(builder, "llvm.sqrt.f32", _F32, args)

    return types.float32(types.float32), body


def _loader(result: Any, stored: ir.Type, convert: Emit) -> Any:
    @intrinsic
    def load_lanes(typing: Any, array: Any, index: Any) -> Any:
        def body(context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value]) -> ir.Value:
            pointer = element_pointer(context, builder, signature.args[0], args[0], args[1])
            return convert(builder, load(builder, pointer, stored))

        return result(array, types.intp), body

    return load_lanes


def _storer(vector: Any, convert: Emit) -> Any:
    @intrinsic
    def store_lanes(typing: Any, array: Any, index: Any, value: Any) -> Any:
        def body(context: Any, builder: ir.IRBuilder, signature: Any, args: list[ir.Value]) -> ir.Value:
            pointer = element_pointer(context, builder, signature.args[0], args[0], args[1])
            store(builder, convert(builder, args[2]), pointer)
            return context.get_dummy_value()

        return types.void(array, types.intp, vector), body

    return store_lanes


def _whole_to_bytes(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return builder.trunc(builder.fptosi(x, i32x16.llvm), ir.VectorType(_I8, 16))


def nibble_floats(builder: ir.IRBuilder, stored: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The low and the high nibbles of 16 bytes, less 8, as floats."""
    wide = builder.zext(stored, i32x16.llvm)
    halves = (builder.and_(wide, constant(wide.type, 15)), builder.lshr(wide, constant(wide.type, 4)))
    low, high = (builder.sitofp(builder.sub(half, constant(wide.type, 8)), f32x16.llvm) for half in halves)
    return low, high


load_f32 = _loader(f32x16, f32x16.llvm, lambda b, v: v)
load_f16 = _loader(f32x16, ir.VectorType(_I16, 16), half_to_float)
load_i8 = _loader(f32x16, ir.VectorType(_I8, 16), lambda b, v: b.sitofp(b.sext(v, i32x16.llvm), f32x16.llvm))
load_low_nibbles = _loader(f32x16, ir.VectorType(_I8, 16), lambda b, v: nibble_floats(b, v)[0])
load_high_nibbles = _loader(f32x16, ir.VectorType(_I8, 16), lambda b, v: nibble_floats(b, v)[1])
"""The nibbles of 16 bytes, less 8."""
store_f32 = _storer(f32x16, lambda b, v: v)
store_f16 = _storer(f32x16, float_to_half)
store_i8 = _storer(f32x16, _whole_to_bytes)
"""Store whole numbers in -128..127 as bytes."""
