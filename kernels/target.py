"""Which instructions the compiled kernels may use.

The kernels are written over a logical 16-lane vector. LLVM turns nearly all of it into the
machine's own instructions by itself; what it would not find is listed in `Lowering`. Every
lowering computes the same bits: the products are integers, and each float operation is one
IEEE operation in one lane.
"""

import platform
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm
from numba.core import config


@dataclass(frozen=True, slots=True)
class Lowering:
    """How the operations that LLVM does not find by itself are expressed."""

    name: str
    dot: str  # 4-way int8 dot product: "vnni512", "vnni256", "maddubs", "sdot" or "generic"
    half: bool  # float16 conversion instructions; without them it is done with integers
    pairs: bool = False  # products of 2x8 by 8x2 int8 matrices ("smmla"): twice those of "sdot"


# First match wins: (lowering, machine, features that must all be present).
_LOWERINGS = (
    (Lowering("avx512vnni", "vnni512", True), "x86_64", {"avx512vnni", "avx512bw", "avx512vl"}),
    (Lowering("avxvnni", "vnni256", True), "x86_64", {"avxvnni", "avx2", "f16c"}),
    (Lowering("avx2", "maddubs", True), "x86_64", {"avx2", "f16c"}),
    (Lowering("neon-i8mm", "sdot", True, pairs=True), "aarch64", {"dotprod", "i8mm"}),
    (Lowering("neon-dotprod", "sdot", True), "aarch64", {"dotprod"}),
    (Lowering("neon", "generic", True), "aarch64", {"neon"}),
    (Lowering("generic", "generic", False), "", set[str]()),
)


def _features() -> set[str]:
    """Features numba will compile for: those it was told of, else the host's."""
    if config.CPU_FEATURES is None:
        return {name for name, present in llvm.get_host_cpu_features().items() if present}
    return {name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+")}


def cpu_name() -> str:
    """The CPU numba compiles for, as LLVM names it."""
    return str(config.CPU_NAME or llvm.get_host_cpu_name())


def features_text() -> str:
    """The CPU's features as one sorted string, for cache keys and reports."""
    return ",".join(sorted(_features()))


@cache
def lowering() -> Lowering:
    """The lowering in force for this process.

    To force another one set NUMBA_CPU_NAME and NUMBA_CPU_FEATURES (they are numba's own) before
    the start, so that code generation and lowering always agree.
    """
    features, machine = _features(), platform.machine()
    for candidate, wanted_machine, wanted in _LOWERINGS:
        if wanted_machine in ("", machine) and wanted <= features:
            return candidate
    raise AssertionError("the generic lowering matches everything")
