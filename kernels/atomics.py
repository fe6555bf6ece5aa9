"""Atomic operations on int64 arrays, for the thread team. Indices are elements."""

import os
import platform
import time
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from edgert.kernels import jit, simd

_I64 = ir.IntType(64)


@intrinsic
def _fetch_add(typing: Any, array: Any, index: Any, value: Any) -> Any:
    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        pointer = simd.element_pointer(context, builder, sig.args[0], args[0], args[1])
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), body


@intrinsic
def _load(typing: Any, array: Any, index: Any) -> Any:
    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        pointer = simd.element_pointer(context, builder, sig.args[0], args[0], args[1])
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(array, types.intp), body


@intrinsic
def _store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        pointer = simd.element_pointer(context, builder, sig.args[0], args[0], args[1])
        builder.store_atomic(args[2], pointer, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), body


@intrinsic
def _exchange_if(typing: Any, array: Any, index: Any, expected: Any, value: Any) -> Any:
    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        pointer = simd.element_pointer(context, builder, sig.args[0], args[0], args[1])
        pair = builder.cmpxchg(pointer, args[2], args[3], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(array, types.intp, types.int64, types.int64), body


@intrinsic
def _pause(typing: Any) -> Any:
    """Tell the core that this is a spin loop."""

    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        void, i32 = ir.VoidType(), ir.IntType(32)
        if platform.machine() == "x86_64":
            simd.call(builder, "llvm.x86.sse2.pause", void, [])
        elif platform.machine() == "aarch64":
            simd.call(builder, "llvm.aarch64.hint", void, [ir.Constant(i32, 1)])
        return context.get_dummy_value()

    return types.void(), body


NAP = 20
"""Microseconds of `give_way`; the system makes it 70 or so."""


@intrinsic
def _give_way(typing: Any) -> Any:
    """Leave this core for a moment (usleep of the C library).

    Sleeping, not yielding: on a busy machine the thread that is waited for has lost its core, and a
    core that merely yields still looks busy to the scheduler. Measured with another process on each
    of two cores: a token of a small model takes 7 ms with sched_yield.
    """

    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        i32 = ir.IntType(32)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(i32, [i32]), "usleep")
        builder.call(function, [ir.Constant(i32, NAP)])
        return context.get_dummy_value()

    return types.void(), body


@intrinsic
def _ring(typing: Any, descriptor: Any) -> Any:
    """Write one word to a pipe (write of the C library): wakes whoever reads from it."""

    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        i8, i32 = ir.IntType(8), ir.IntType(32)
        kind = ir.FunctionType(_I64, [i32, i8.as_pointer(), _I64])
        function = cgutils.get_or_insert_function(builder.module, kind, "write")
        word = cgutils.alloca_once_value(builder, ir.Constant(_I64, 1))
        pointer = builder.bitcast(word, i8.as_pointer())
        builder.call(function, [builder.trunc(args[0], i32), pointer, ir.Constant(_I64, 8)])
        return context.get_dummy_value()

    return types.void(types.int64), body


@intrinsic
def _now(typing: Any) -> Any:
    """CLOCK_MONOTONIC in nanoseconds (clock_gettime of the C library)."""

    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        i32, pair = ir.IntType(32), ir.ArrayType(_I64, 2)
        kind = ir.FunctionType(i32, [i32, pair.as_pointer()])
        function = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        spec = cgutils.alloca_once(builder, pair)
        builder.call(function, [ir.Constant(i32, time.CLOCK_MONOTONIC), spec])
        found = builder.load(spec)
        seconds = builder.mul(builder.extract_value(found, 0), ir.Constant(_I64, 10**9))
        return builder.add(seconds, builder.extract_value(found, 1))

    return types.int64(), body


def _plain_ring(descriptor: int) -> None:
    os.write(descriptor, b"\1")


def _plain_give_way() -> None:
    time.sleep(NAP * 1e-6)


def _plain_fetch_add(array: Any, index: int, value: int) -> int:
    array[index] += value
    return int(array[index]) - value


def _plain_load(array: Any, index: int) -> int:
    return int(array[index])


def _plain_store(array: Any, index: int, value: int) -> None:
    array[index] = value


def _plain_exchange_if(array: Any, index: int, expected: int, value: int) -> bool:
    if array[index] != expected:
        return False
    array[index] = value
    return True


def _nothing() -> None:
    return None


fetch_add = _fetch_add if jit.JIT else _plain_fetch_add
"""array[index] += value, giving the value before."""
load = _load if jit.JIT else _plain_load
store = _store if jit.JIT else _plain_store
exchange_if = _exchange_if if jit.JIT else _plain_exchange_if
"""array[index] = value if it was `expected`; gives whether it was."""
pause = _pause if jit.JIT else _nothing
give_way = _give_way if jit.JIT else _plain_give_way
ring = _ring if jit.JIT else _plain_ring
now = _now if jit.JIT else time.monotonic_ns
