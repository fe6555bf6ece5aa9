"""Operations as functions that are compiled each by itself, and called by their address.

LLVM optimises whatever a function calls once more together with it, and takes longer than in proportion for
a large function: with all operations inside the one entry of the threads (execute.py), that entry alone took
half of the time that everything takes to compile. So it gets a table of addresses instead, and an operation
gets the arrays of the run as one array of addresses: passing twenty arrays takes longer than a small unit.
"""

import logging
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from numpy.typing import NDArray

from edgert.kernels.jit import JIT, inlined, jit, missing
from edgert.kernels.program import FIELDS

_log = logging.getLogger("edgert.kernels")

OPERATIONS: dict[int, Any] = {}
"""Of each operation of program.py the function of one unit of it."""
PRODUCT = len(FIELDS)
"""Behind them: `matmul`, which five of them call. It is the largest kernel, and exists once."""
_NONE: NDArray[np.int64] = np.zeros(0, np.int64)


class Run(NamedTuple):
    """The arrays of one run; program.py says what is in them, but for the last two: `Team` and `pack` make
    the tickets, a word for each operation that says which unit is next, and the operations' addresses."""

    code: NDArray[np.int64]
    reals: NDArray[np.float32]
    w: NDArray[np.uint8]
    pool: NDArray[np.uint8]
    table: NDArray[np.int64]
    f: NDArray[np.float32]
    xq: NDArray[np.int8]
    xs: NDArray[np.float32]
    xn: NDArray[np.int32]
    kv: NDArray[np.uint8]
    spare: NDArray[np.uint8]
    routes: NDArray[np.int64]
    rows: NDArray[np.int64]
    paths: NDArray[np.int64]
    job: NDArray[np.int64]
    tickets: NDArray[np.int64] = _NONE
    operations: NDArray[np.int64] = _NONE


_KINDS: Any = Run(
    code=types.int64[:, ::1],
    reals=types.float32[:, ::1],
    w=types.uint8[::1],
    pool=types.uint8[::1],
    table=types.int64[::1],
    f=types.float32[::1],
    xq=types.int8[::1],
    xs=types.float32[::1],
    xn=types.int32[::1],
    kv=types.uint8[::1],
    spare=types.uint8[::1],
    routes=types.int64[::1],
    rows=types.int64[:, ::1],
    paths=types.int64[::1],
    job=types.int64[::1],
    tickets=types.int64[::1],
    operations=types.int64[::1],
)
_WORDS = 3
"""Of one array in an opened run: its address, and its length in either dimension."""


def operation(number: int) -> Callable[[Callable[..., Any]], Any]:
    """Enter a function (opened, i, unit, rows, me) that computes one unit of operation i of the program.

    opened: of `pack`, for `operands`; rows: of the operation; me: the thread.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        OPERATIONS[number] = jit(function)
        return OPERATIONS[number]

    return decorate


@intrinsic
def _unpack(typing: Any, packed: Any) -> Any:
    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        words = make_array(sig.args[0])(context, builder, args[0]).data

        def word(k: int) -> ir.Value:
            return builder.load(builder.gep(words, [ir.Constant(ir.IntType(64), k)]))

        arrays = []
        for k, kind in enumerate(_KINDS):
            size = context.get_abi_sizeof(context.get_data_type(kind.dtype))
            array = make_array(kind)(context, builder)
            shape = [word(k * _WORDS + 1 + axis) for axis in range(kind.ndim)]
            item = ir.Constant(ir.IntType(64), size)
            strides = [builder.mul(shape[1], item), item] if kind.ndim == 2 else [item]
            data = builder.inttoptr(word(k * _WORDS), array.data.type)
            # No owner: nothing here is counted, and no thread writes to a counter that others read.
            populate_array(array, data, shape, strides, item, meminfo=None)
            arrays.append(array._getvalue())
        return context.make_tuple(builder, sig.return_type, arrays)

    return types.NamedTuple(list(_KINDS), Run)(packed), body


unpack = _unpack if JIT else lambda run: run
"""The arrays of a run that `pack` packed."""


@inlined
def operands(packed, i):
    """(run, c, real, cap): the arrays, the row of operation i in the table, and its real numbers."""
    run = unpack(packed)
    return run, run.code[i], run.reals[i, 0], run.reals[i, 1]


_N = types.int64
_OF_UNIT = (types.int64[::1], _N, _N, _N, _N)
_OF_PRODUCT = (
    *(_N, _KINDS.w, _N, _N, _N, _N, _N, _KINDS.f, _N, _N, _KINDS.xq, _KINDS.xs, _KINDS.xn),
    *(_N, _N, _N, _N, _N),
)


@intrinsic
def _call(typing: Any, address: Any, arguments: Any) -> Any:
    kinds = tuple(types.unliteral(kind) for kind in arguments)
    if kinds not in (_OF_UNIT, _OF_PRODUCT):
        raise TypingError(f"call of {kinds}, expected {_OF_UNIT} or {_OF_PRODUCT}")

    def body(context: Any, builder: ir.IRBuilder, sig: Any, args: list[ir.Value]) -> ir.Value:
        values = [builder.extract_value(args[1], k) for k in range(len(kinds))]
        function = context.call_conv.get_function_type(types.none, kinds)
        callee = builder.inttoptr(args[0], function.as_pointer())
        status, _ = context.call_conv.call_function(builder, callee, types.none, kinds, values)
        with cgutils.if_unlikely(builder, status.is_error):  # an index out of bounds, where they are checked
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.void(types.int64, types.Tuple(kinds)), body


def _plain_call(number: int, arguments: tuple[Any, ...]) -> None:
    OPERATIONS[number](*arguments)


call = _call if JIT else _plain_call
"""call(run.operations[number], arguments), of exactly the types it is compiled for."""


def pack(run: Run) -> Any:
    """What `unpack` takes of a run, whose arrays must outlive it; its operations are in it.

    Compiles the operations of their program, or loads them from the cache.
    """
    if not JIT:
        return run._replace(operations=np.arange(len(OPERATIONS)))
    used = {int(number) for number in run.code[:, 0]} | {PRODUCT}
    packed = np.zeros(len(Run._fields) * _WORDS + len(OPERATIONS), np.int64)
    operations = packed[-len(OPERATIONS) :]
    operations[:] = addresses(used)
    arrays: tuple[NDArray[Any], ...] = run._replace(operations=operations)
    for k, (array, kind) in enumerate(zip(arrays, _KINDS, strict=True)):
        if array.dtype.name != kind.dtype.name or array.ndim != kind.ndim or not array.flags.c_contiguous:
            raise AssertionError(f"{Run._fields[k]} is {array.dtype}[{array.ndim}], expected {kind}")
        packed[k * _WORDS] = array.ctypes.data
        packed[k * _WORDS + 1 : k * _WORDS + 1 + array.ndim] = array.shape
    return packed


_found: dict[int, int] = {}


def addresses(numbers: Collection[int]) -> NDArray[np.int64]:
    """Where the machine code of these operations is, by number; 0 for the others."""
    wanted = {number: OPERATIONS[number] for number in numbers if number not in _found}
    if lacking := missing(wanted.values()):
        _log.info("compiling %d kernels for this CPU, once; this may take half a minute", len(lacking))
    for number, function in wanted.items():
        signature = _OF_PRODUCT if number == PRODUCT else _OF_UNIT
        function.compile(signature)
        code = function.overloads[signature]
        _found[number] = code.library.get_pointer_to_function(code.fndesc.llvm_func_name)
    return np.array([_found[k] if k in numbers else 0 for k in range(len(OPERATIONS))], np.int64)
