"""exp on 16 lanes, and single values read from and written to byte arrays."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgert.kernels import simd
from edgert.kernels.jit import JIT, jit
from edgert.kernels.reference import arithmetic

_MIN, _MAX = (float(v) for v in (arithmetic.EXP_MIN, arithmetic.EXP_MAX))
_C0, _C1, _C2, _C3, _C4, _C5 = arithmetic.EXP_COEFFICIENTS


@jit
def exp(x):
    """e**x in every lane, clamped to normal results; `arithmetic.exp` is its definition."""
    x = simd.minimum(simd.maximum(x, simd.splat(_MIN)), simd.splat(_MAX))
    n = simd.nearest(simd.mul(x, simd.splat(1.44269504088896341)))
    minus_n = simd.sub(simd.splat(0.0), n)
    r = simd.fma(minus_n, simd.splat(0.693359375), x)
    r = simd.fma(minus_n, simd.splat(-2.12194440e-4), r)
    p = simd.fma(simd.splat(_C0), r, simd.splat(_C1))
    p = simd.fma(p, r, simd.splat(_C2))
    p = simd.fma(p, r, simd.splat(_C3))
    p = simd.fma(p, r, simd.splat(_C4))
    p = simd.fma(p, r, simd.splat(_C5))
    p = simd.add(simd.fma(p, simd.mul(r, r), r), simd.splat(1.0))
    return simd.mul(p, simd.power_of_two(n))


def _scalar_reader(stored: ir.Type, convert: Any) -> Any:
    @intrinsic
    def read(typing: Any, array: Any, index: Any) -> Any:
        def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
            pointer = simd.element_pointer(context, builder, sig.args[0], args[0], args[1])
            value = convert(builder, simd.load(builder, pointer, ir.VectorType(stored, 1)))
            return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

        return types.float32(array, types.intp), body

    return read


@intrinsic
def write_f16(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Store a float32 as two bytes of float16 at byte `index`, to nearest even."""

    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        pointer = simd.element_pointer(context, builder, sig.args[0], args[0], args[1])
        simd.store(builder, simd.float_to_half(builder, simd.broadcast(builder, args[2], 1)), pointer)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), body


@intrinsic
def write_f32(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Store a float32 as four bytes at byte `index`."""

    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        pointer = simd.element_pointer(context, builder, sig.args[0], args[0], args[1])
        simd.store(builder, args[2], pointer)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), body


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c of float32 scalars, rounded once."""

    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        return simd.call(builder, "llvm.fma.f32", ir.FloatType(), args)

    f32 = types.float32
    return f32(f32, f32, f32), body


def _plain_read_f32(array: Any, index: int) -> np.float32:
    return np.float32(array[index : index + 4].view(np.float32)[0])


read_f16 = _scalar_reader(ir.IntType(16), simd.half_to_float)
"""The float16 at byte `index`, as float32."""
read_byte_scale = _scalar_reader(ir.IntType(8), simd.byte_scales)
"""The scale of one byte at byte `index`, as float32; see packing.py."""
read_f32 = _scalar_reader(ir.FloatType(), lambda builder, value: value) if JIT else _plain_read_f32
"""The float32 at byte `index`."""
