"""Reading memory as fast as it comes: the measure of the bandwidth that decoding can have."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgert.kernels import simd
from edgert.kernels.jit import kernel
from edgert.kernels.reference import stream as _twin
from edgert.kernels.simd import i32x16

STEP = 512
"""Bytes read per turn of the loop: eight registers, so that many loads are under way at once."""


@intrinsic
def _xor_all(typing: Any, data: Any, start: Any, steps: Any) -> Any:
    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        i64 = ir.IntType(64)
        base = simd.element_pointer(context, builder, sig.args[0], args[0], args[1])
        sums = [cgutils.alloca_once_value(builder, simd.constant(i32x16.llvm, 0)) for _ in range(STEP // 64)]
        with cgutils.for_range(builder, args[2]) as loop:
            here = builder.gep(base, [builder.mul(loop.index, ir.Constant(i64, STEP))])
            for j, total in enumerate(sums):
                lanes = simd.load(builder, builder.gep(here, [ir.Constant(i64, 64 * j)]), i32x16.llvm)
                builder.store(builder.xor(builder.load(total), lanes), total)
        value = builder.load(sums[0])
        for total in sums[1:]:
            value = builder.xor(value, builder.load(total))
        while value.type.count > 1:
            value = builder.xor(*simd.split(builder, value, 2))
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return types.int32(data, types.intp, types.int64), body


@kernel(_twin.read)
def read(data, start, count):
    """The exclusive or of all 32-bit words of uint8 data[start : start + count], `count` in steps of STEP.

    The result is used for nothing, but nobody can compute it without reading everything.
    """
    return _xor_all(data, start, count // STEP)
