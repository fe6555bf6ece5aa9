"""ggml's own rounding of matrices, for `quality_curve.py`; needs llama-cpp-python and gguf.

    python tools/ggml_round.py IN.npz OUT.npz TYPE

IN holds float32 matrices [N, K] by name, and beside each, where it is known, "NAME importance" [K], the mean
square of what each column meets (an importance matrix). OUT holds what they become in TYPE (Q4_K), or in
"NAME type" where IN has that. Superblocks take 256 weights: rows of other lengths are laid end to end, filled
up with zeros to a multiple of 32, so that a superblock may span rows but no group does.
"""

import ctypes
import math
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
SUPERBLOCK = 256
GROUP = 32


def library() -> ctypes.CDLL:
    """ggml as llama-cpp-python brings it."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    found = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return found


def rounded(ggml: ctypes.CDLL, weights: Floats, kind: str, importance: Floats | None) -> Floats:
    """What a matrix [N, K] decodes to after ggml rounded it."""
    rows, columns = weights.shape
    padded = -(-columns // GROUP) * GROUP
    together = math.lcm(padded, SUPERBLOCK) // padded  # rows laid end to end
    count = -(-rows // together)
    whole = np.zeros((count * together, padded), np.float32)
    whole[:rows, :columns] = weights
    whole = whole.reshape(count, together * padded)
    matters = None
    if importance is not None:
        spread = np.zeros(padded, np.float32)
        spread[:columns] = importance
        matters = np.tile(spread, together)
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    out = np.empty((count, whole.shape[1] // block * size), np.uint8)
    ggml.ggml_quantize_chunk(
        int(number),
        whole.ctypes.data,
        out.ctypes.data,
        0,
        count,
        whole.shape[1],
        None if matters is None else matters.ctypes.data,
    )
    decoded: Floats = gguf.quants.dequantize(out, number).reshape(-1, padded)
    return np.ascontiguousarray(decoded[:rows, :columns])


def main() -> None:
    """Round every matrix of a file."""
    source, target, kind = sys.argv[1:]
    ggml, given = library(), np.load(source)
    found = {}
    for name in given.files:
        if " " not in name:
            own = str(given[f"{name} type"]) if f"{name} type" in given.files else kind
            importance = given[f"{name} importance"] if f"{name} importance" in given.files else None
            found[name] = rounded(ggml, given[name], own, importance)
    np.savez(target, **found)


if __name__ == "__main__":
    main()
