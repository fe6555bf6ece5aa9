"""Count the multiply instructions in the matrix kernels' machine code.

Usage: instructions.py [REQUIRED...]. Prints one line per kernel: its name, then
instruction=count. Exits with 1 where an integer kernel lacks a required instruction:
`instructions.py sdot` shows that all use it.
"""

import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from edgert.kernels import jit, matmul, packing, target

MULTIPLY = re.compile(r"^\s+(?:{vex} )?(\w*(?:dot|dpbusd|mmla|maddubsw|fml[as]|fn?m(?:add|sub)\w*))\s", re.M)
INTEGER_KERNELS = ("matmul_q4", "matmul_q8", "matmul_small")
FLOAT_KERNELS = ("matmul_f16", "matmul_f32")


def main() -> int:
    """Print the counts; 1 where a required instruction is missing."""
    required, missing = sys.argv[1:], 0
    print(f"# {target.cpu_name()} lowering={target.lowering().name}")
    with tempfile.TemporaryDirectory() as folder:
        jit.use_cache_root(Path(folder))  # machine code out of a cache has no assembly to show
        for name in (*INTEGER_KERNELS, *FLOAT_KERNELS):
            found = counts(name)
            print(name, *(f"{instruction}={found[instruction]}" for instruction in sorted(found)))
            for instruction in required if name in INTEGER_KERNELS else ():
                if not found[instruction]:
                    print(f"{name} does not use {instruction}", file=sys.stderr)
                    missing = 1
    return missing


def counts(name: str) -> Counter[str]:
    """How often each multiply instruction occurs in a kernel, compiled for this process's CPU."""
    kernel = getattr(matmul, name)
    kernel(*_arguments(name))
    assembly = "\n".join(kernel.inspect_asm().values())
    return Counter(MULTIPLY.findall(assembly))


def _arguments(name: str) -> list[Any]:
    """One block times one group times one row, all zeros: enough to compile a kernel."""
    quant = name.removeprefix("matmul_")
    weights = np.zeros(packing.RECORD_BYTES["q4m" if quant == "small" else quant], np.uint8)
    y = np.zeros(packing.BLOCK, np.float32)
    if name in FLOAT_KERNELS:
        return [weights, 0, 1, 0, 1, 1, np.zeros(packing.GROUP, np.float32), 0, packing.GROUP, y, 0, y.size]
    x, scales, sums = np.zeros(packing.GROUP, np.int8), np.zeros(1, np.float32), np.zeros(1, np.int32)
    several = [0] if quant == "small" else []  # which of its types
    return [*several, weights, 0, 1, 0, 1, 1, x, scales, sums, 0, y, 0, y.size]


if __name__ == "__main__":
    sys.exit(main())
