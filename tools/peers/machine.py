"""What a figure depends on besides the code: the machine and the versions."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Those that choose a kernel in any of the runtimes; the second line is ARM's.
FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "sve", "sve2", "bf16"),
)
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def machine() -> dict[str, Any]:
    """Of this machine, all values for people; a system without /proc shows less."""
    found = _proc_cpuinfo()
    flags = (found.get("flags") or found.get("Features") or "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": found.get("model name") or platform.processor() or platform.machine(),
        "flags": " ".join(flag for flag in FLAGS if flag in flags),
        "cores": cores,
        "memory": f"{_memory() / (1 << 30):.1f} GiB",
        "cache": found.get("cache size", "unknown"),
        "transparent huge pages": _huge_pages(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def versions() -> dict[str, str]:
    """Of what edgert computes with; the peers report their own."""
    found = {"python": platform.python_version()}
    found |= {name: version(name) for name in ("numpy", "numba", "llvmlite")}
    return found | {"commit": _commit()}


def _proc_cpuinfo() -> dict[str, str]:
    """The first processor's fields."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _huge_pages() -> str:
    if not HUGE_PAGES.exists():
        return "unknown"
    return HUGE_PAGES.read_text().partition("[")[2].partition("]")[0]


def _commit() -> str:
    """Of the tree this file is in; a plus sign where it has changes of its own."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"
