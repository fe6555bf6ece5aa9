"""Files and pipes without the interpreter: calls of the C library for threads in compiled code."""

import os
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgert.kernels import jit, simd

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_BYTES = _I8.as_pointer()
MOST_RINGS = 64
"""Words that one call of `ring_all` writes at most."""


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, args: list[ir.Value]) -> ir.Value:
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


@intrinsic
def _pread(typing: Any, descriptor: Any, array: Any, at: Any, count: Any, offset: Any) -> Any:
    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        into = simd.element_pointer(context, builder, sig.args[1], args[1], args[2])
        number = builder.trunc(args[0], _I32)
        return _call(builder, "pread", _I64, [number, builder.bitcast(into, _BYTES), args[3], args[4]])

    return types.int64(types.int64, array, types.int64, types.int64, types.int64), body


@intrinsic
def _ring_all(typing: Any, descriptor: Any, words: Any) -> Any:
    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        zeros = cgutils.alloca_once_value(builder, ir.Constant(ir.ArrayType(_I64, MOST_RINGS), None))
        size = builder.mul(args[1], ir.Constant(_I64, 8))
        number = builder.trunc(args[0], _I32)
        _call(builder, "write", _I64, [number, builder.bitcast(zeros, _BYTES), size])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), body


@intrinsic
def _hear(typing: Any, descriptor: Any) -> Any:
    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        word = cgutils.alloca_once(builder, _I64)
        number = builder.trunc(args[0], _I32)
        _call(builder, "read", _I64, [number, builder.bitcast(word, _BYTES), ir.Constant(_I64, 8)])
        return context.get_dummy_value()

    return types.void(types.int64), body


@intrinsic
def _copy(typing: Any, into: Any, into_at: Any, source: Any, at: Any, count: Any) -> Any:
    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        target = simd.element_pointer(context, builder, sig.args[0], args[0], args[1])
        origin = simd.element_pointer(context, builder, sig.args[2], args[2], args[3])
        cgutils.raw_memcpy(builder, target, origin, args[4], 1)
        return context.get_dummy_value()

    return types.void(into, types.int64, source, types.int64, types.int64), body


def _plain_pread(descriptor: int, array: Any, at: int, count: int, offset: int) -> int:
    try:
        return os.preadv(descriptor, [memoryview(array)[at : at + count]], offset)
    except OSError:
        return -1


def _plain_ring_all(descriptor: int, words: int) -> None:
    os.write(descriptor, bytes(8 * words))


def _plain_hear(descriptor: int) -> None:
    os.read(descriptor, 8)


def _plain_copy(into: Any, into_at: int, source: Any, at: int, count: int) -> None:
    into[into_at : into_at + count] = source[at : at + count]


pread = _pread if jit.JIT else _plain_pread
"""Fill array[at : at + count] (bytes) from byte `offset` of a file: how many came, below 0 for an error."""
ring_all = _ring_all if jit.JIT else _plain_ring_all
"""Write so many words to a pipe: each lets one `hear` return."""
hear = _hear if jit.JIT else _plain_hear
"""Sleep until there is a word in a pipe, and take it."""
copy = _copy if jit.JIT else _plain_copy
"""into[into_at : into_at + count] = source[at : at + count], bytes."""
