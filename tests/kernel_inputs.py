"""Inputs for the tests of kernels and of the forward pass, and comparison of bits.

Everything random is a function of a label alone (SHAKE-256), so it is the same on every machine
and with every version of NumPy. What decodes stored bytes here does so by hand, from the layout
that `kernels/packing.py` and `kernels/kv.py` document, so that expectations never come from the
code under test.
"""

import hashlib
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgert.config import ModelSpec
from edgert.format import StoredTensor, declared
from edgert.format.layout import LAYOUT_OF, page_padded, stored_bytes
from edgert.kernels import packing
from edgert.state import Weights

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]

QUANTS = ("f32", "f16", "q8", "q4m", "q4", "q4s", "q3", "q2")
RECORD = {"f32": 2048, "f16": 1024, "q8": 544, "q4m": 320, "q4": 288, "q4s": 272, "q3": 208, "q2": 144}
INTEGERS = {"q8": (-127, 127), "q4m": (0, 15), "q4": (-8, 7), "q4s": (-8, 7), "q3": (-4, 3), "q2": (-2, 1)}

few = settings(deadline=None, max_examples=12, derandomize=True)
some = settings(deadline=None, max_examples=50, derandomize=True)
many = settings(deadline=None, max_examples=200, derandomize=True)

seeds = st.integers(0, 2**32 - 1)


# ---- numbers ---------------------------------------------------------------------------------


def raw(label: object, count: int) -> U8:
    """`count` bytes that depend on the label alone."""
    return np.frombuffer(hashlib.shake_256(repr(label).encode()).digest(count), np.uint8).copy()


def uniform(label: object, *shape: int) -> F32:
    """Numbers in [-1, 1), multiples of 2**-23: exact, so the same everywhere."""
    count = int(np.prod(shape))
    whole = raw(label, count * 4).view(np.int32) >> 8
    return (whole.astype(np.float32) * np.float32(2.0**-23)).reshape(shape)


def whole(label: object, low: int, high: int, *shape: int) -> NDArray[np.int64]:
    """Whole numbers in low..high."""
    count = int(np.prod(shape))
    return (raw(label, count * 4).view(np.uint32) % np.uint64(high - low + 1)).astype(np.int64).reshape(
        shape
    ) + low


# What a row of activations can look like. Each spans what a kernel has to survive.
FLAVOURS = ("plain", "zeros", "signed zeros", "subnormal", "tiny", "large", "outlier", "sparse", "mixed")
flavours = st.sampled_from(FLAVOURS)


def floats(label: object, flavour: str, *shape: int, large: float = 1e6) -> F32:
    """Finite float32 of one flavour, none above `large` in magnitude."""
    x = uniform((label, "x"), *shape)
    choice = raw((label, "choice"), x.size).reshape(shape)
    if flavour == "zeros":
        return np.zeros(shape, np.float32)
    if flavour == "signed zeros":
        return np.where(choice % 2 == 0, np.float32(0.0), np.float32(-0.0))
    if flavour == "subnormal":
        return (x.astype(np.float64) * 2.0**-127).astype(np.float32)
    if flavour == "tiny":
        return x * np.float32(1e-30)
    if flavour == "large":
        return x * np.float32(large)
    if flavour == "outlier":
        x.reshape(-1)[int(choice.reshape(-1)[0]) % x.size] = large
        return x
    if flavour == "sparse":
        return np.where(choice < 40, x, np.float32(0.0))
    if flavour == "mixed":
        exponents = whole((label, "exponents"), -140, int(np.log2(large)) - 1, *shape)
        return np.ldexp(x.astype(np.float64), exponents).astype(np.float32)
    return x


def bits(array: NDArray[Any]) -> NDArray[Any]:
    """The array's bits as unsigned integers: equal floats with other signs of zero differ."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def same(found: NDArray[Any], expected: NDArray[Any]) -> None:
    """Assert equality bit for bit."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_array_equal(bits(found), bits(expected))


def agree(kernel: Callable[..., Any], twin: Callable[..., Any], *arguments: Any) -> None:
    """Run a kernel and its twin on copies of the same arguments: every array ends up the same."""

    def copies() -> list[Any]:
        return [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]

    ours, theirs = copies(), copies()
    result, expected = kernel(*ours), twin(*theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, np.ndarray):
            same(a, b)
    if expected is not None:
        same(np.float32(result).reshape(-1), np.float32(expected).reshape(-1))


# ---- stored matrices, by hand ----------------------------------------------------------------


def weight_bytes(quant: str, label: object, blocks: int, groups: int, flavour: str = "plain") -> U8:
    """The bytes of a stored matrix [16 * blocks, 32 * groups] of random weights and scales."""
    records = blocks * groups
    if quant in ("f32", "f16"):
        values = floats(label, flavour, records * 512, large=6e4)
        return (values if quant == "f32" else values.astype(np.float16)).view(np.uint8)
    data = raw(label, records * RECORD[quant]).reshape(records, -1)
    if quant == "q8":
        data[:, :512][data[:, :512] == 128] = 127  # -128 is not a q8 value
    if quant in ("q4s", "q3", "q2"):
        return data.reshape(-1)  # every byte is a scale
    scales = floats((label, "scales"), flavour, records * 16, large=6e4).astype(np.float16)
    at = 512 if quant == "q8" else 256
    data[:, at : at + 32] = scales.view(np.uint8).reshape(records, 32)
    if quant == "q4m":
        minimums = floats((label, "minimums"), flavour, records * 16, large=6e4).astype(np.float16)
        data[:, 288:] = minimums.view(np.uint8).reshape(records, 32)
    return data.reshape(-1)


def stored_value(quant: str, data: U8, at: int, groups: int, n: int, k: int) -> float:
    """The weight W[n, k] of the matrix at byte `at`, read by hand."""
    record = at + ((n // 16) * groups + k // 32) * RECORD[quant]
    row, k = n % 16, k % 32
    if quant == "f32":
        return float(struct.unpack_from("<f", data, record + (k * 16 + row) * 4)[0])
    if quant == "f16":
        return float(struct.unpack_from("<e", data, record + (k * 16 + row) * 2)[0])
    if quant == "q8":
        value = struct.unpack_from("<b", data, record + (k // 4) * 64 + row * 4 + k % 4)[0]
        return value * float(struct.unpack_from("<e", data, record + 512 + row * 2)[0])
    if quant in ("q3", "q2"):
        low = int(data[record + k // 16 * 64 + row * 4 + k % 4]) >> (k % 16 // 4 * 2) & 3
        if quant == "q2":
            return (low - 2) * byte_scale(int(data[record + 128 + row]))
        high = int(data[record + 128 + row * 4 + k % 4]) >> (k // 4) & 1
        return (low + 4 * high - 4) * byte_scale(int(data[record + 192 + row]))
    byte = int(data[record + (k // 8) * 64 + row * 4 + k % 4])
    nibble = byte >> 4 if k % 8 >= 4 else byte & 15
    if quant == "q4s":
        return (nibble - 8) * byte_scale(int(data[record + 256 + row]))
    if quant == "q4m":
        scale = float(struct.unpack_from("<e", data, record + 256 + row * 2)[0])
        return nibble * scale + float(struct.unpack_from("<e", data, record + 288 + row * 2)[0])
    return (nibble - 8) * float(struct.unpack_from("<e", data, record + 256 + row * 2)[0])


def byte_scale(byte: int) -> float:
    """A sign, 4 bits of exponent and 3 of mantissa, read by hand."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = (8 + mantissa) * 2.0 ** (exponent - 16) if exponent else mantissa * 2.0**-15
    return -size if byte & 128 else size


def stored_matrix(quant: str, data: U8, at: int, groups: int, rows: int, columns: int) -> F64:
    """W[0:rows, 0:columns] of the matrix at byte `at`, read by hand."""
    return np.array(
        [[stored_value(quant, data, at, groups, n, k) for k in range(columns)] for n in range(rows)]
    )


# ---- tiny models -----------------------------------------------------------------------------


def tiny_weights(spec: ModelSpec, quant_of: Callable[[str], str], label: object = "tiny") -> Weights:
    """Random weights of a spec; `quant_of` gives the precision of each matrix by its name."""
    tensors, at = {}, 0
    for decl in declared(spec):
        quant = quant_of(decl.name) if decl.role in ("matrix", "expert") else "f32"
        size = stored_bytes(decl.role, quant, decl.shape)
        layout = LAYOUT_OF[decl.role]
        tensors[decl.name] = StoredTensor(decl.name, decl.role, decl.shape, quant, layout, at, size, "")
        at += page_padded(size)
    data = np.zeros(at, np.uint8)
    for tensor in tensors.values():
        data[tensor.offset : tensor.offset + tensor.nbytes] = _tensor_bytes(spec, tensor, label)
    data.flags.writeable = False  # as a mapped file: the program is compiled once for both
    return Weights(spec, data, tensors)


def _tensor_bytes(spec: ModelSpec, tensor: StoredTensor, label: object) -> U8:
    random = uniform((label, tensor.name), *tensor.shape)
    if tensor.name.endswith("rope_frequencies"):
        # Powers of two, not of theta: exact on every machine, and quick at the front as they should be.
        half = spec.rotated // 2
        return np.array([2.0 ** -(i * 13 // half) for i in range(half)], np.float32).view(np.uint8)
    if tensor.role == "vector":
        if tensor.name.endswith("_bias"):
            return (random * np.float32(0.25)).view(np.uint8)
        return (np.float32(1) + random * np.float32(0.5)).view(np.uint8)
    if tensor.role == "expert":
        gate, up, down = random[0], random[1], random[2].T
        parts = [
            _matrix_bytes(tensor, np.ascontiguousarray(m), (label, i)) for i, m in enumerate((gate, up, down))
        ]
        return np.concatenate(parts)
    return _matrix_bytes(tensor, random * np.float32(4 if tensor.role == "router" else 1), label)


def _matrix_bytes(tensor: StoredTensor, random: F32, label: object) -> U8:
    rows, columns = random.shape
    # The power of two next to K**-0.5 keeps activations near 1 and is exact in float16.
    spread = 2.0 ** -(columns.bit_length() // 2 - 1)
    if tensor.quant in ("f32", "f16"):
        kind = np.float32 if tensor.quant == "f32" else np.float16
        return packing.pack_floats((random * np.float32(spread)).astype(kind)).reshape(-1)
    _, top = INTEGERS[tensor.quant]
    middle = 8 if tensor.quant == "q4m" else 0
    values = (np.rint(random * np.float32(top - middle)) + middle).astype(np.int8)
    wobble = whole((label, tensor.name, "scales"), 8, 15, rows, -(-columns // 32)) / 16
    scales = (wobble * spread / (top - middle)).astype(np.float16)
    if tensor.quant in ("q4s", "q3", "q2"):
        scales = packing.byte_scales(scales)
    minimums = -scales * np.float16(middle) if middle else None
    return packing.pack(tensor.quant, values, scales, minimums).reshape(-1)


# ---- other processes -------------------------------------------------------------------------

_PRELUDE = f"""
import sys, types
package = types.ModuleType("tests")
package.__path__ = [{str(Path(__file__).parent)!r}]
sys.modules["tests"] = package
"""


def start_python(code: str, *arguments: str, **environment: str | None) -> "subprocess.Popen[str]":
    """A fresh Python that may import from `tests`; None takes a variable out of its environment."""
    merged = {**os.environ, **{k: v for k, v in environment.items() if v is not None}}
    for name in [k for k, v in environment.items() if v is None]:
        merged.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-c", _PRELUDE + code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=merged,
    )


def finish(process: "subprocess.Popen[str]", limit: float = 800) -> tuple[str, str]:
    """(stdout, stderr) of a process that must end well."""
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"still running after {limit} s; it said:\n{out}{err}") from None
    assert process.returncode == 0, f"exit status {process.returncode}:\n{out}{err}"
    return out, err


def run_python(code: str, *arguments: str, **environment: str | None) -> tuple[str, str]:
    """(stdout, stderr) of `code` in a fresh Python that must end well."""
    return finish(start_python(code, *arguments, **environment))
